/* The mirror: a copy of the daemon's values, and how far it can be trusted.
 *
 * A state machine over (events, now). Somebody who needs values says since when they must hold;
 * mirror_answers() says whether the copy will do, mirror_next() what has to be done for it, and the
 * caller reports what came of it. The copy that stays is
 *   - at most MIRROR_AGE_US old while a daemon answers,
 *   - the last one while a daemon is silent (unresponsive),
 *   - cold models and their names while there is none (inactive).
 *
 * The daemon is asked once to push its values, and does when they change: then the copy holds as
 * long as it is known to live, which a push or the answer to a ping shows. What an order has
 * changed may not have been pushed when the order is acknowledged, so they are asked for
 * after one; and each time where a daemon does not push (older than this, or on its way out).
 *
 * A question unanswered for MIRROR_PATIENCE_US by a daemon that has said nothing for
 * MIRROR_SILENCE_US makes it unresponsive; the first word from it ends that.
 *
 * Hides: the copy's memory, which answer is still missing, the rules above. Does no input or output
 * and reads no clock: times are the caller's microseconds. Thread: the caller's. */
#ifndef HEARTH_FS_MIRROR_H
#define HEARTH_FS_MIRROR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/hearth.h"

#define MIRROR_AGE_US      100000u
#define MIRROR_SILENCE_US  1000000u
#define MIRROR_PATIENCE_US 800000u
/* Who only waits for changes has the daemon's life asked after so often. */
#define MIRROR_PULSE_US 500000u
/* Bounds of the copy: what is beyond is left out (models) or cut (texts). */
#define MIRROR_MODELS_MAX     4096u
#define MIRROR_TEXT_BYTES_MAX (1u << 20)
#define MIRROR_NAME_MAX       128u
#define MIRROR_WORD_BYTES     16u

/* What the copy consists of; each part that is asked for has its own answer. */
enum mirror_part {
    MIRROR_STATUS,
    MIRROR_MODELS,
    MIRROR_PROMETHEUS,
    MIRROR_POOL,
    MIRROR_BATCHER,
    MIRROR_STREAMING,
    MIRROR_LOADER,
    _MIRROR_PART_MAX,
};

/* The section (lib/news.h) that the part is told in; NULL: it is none. */
const char *mirror_section(enum mirror_part part);

enum mirror_action {
    MIRROR_NOTHING,
    MIRROR_CONNECT,
    MIRROR_FEED, /* have the values pushed */
    MIRROR_PING,
    MIRROR_ASK, /* for all parts */
};

struct mirror_model {
    char name[MIRROR_NAME_MAX + 1];
    char state[MIRROR_WORD_BYTES]; /* one of the seven words */
    uint64_t done_bytes, total_bytes, memory_bytes;
    uint64_t keep_alive_us, holds;
    bool preload, pinned;
    bool named;     /* in the push under way; the mirror's own */
    char *info;     /* flat lines or NULL */
    char *stats;    /* flat lines or NULL */
    char *sentence; /* why it failed, or NULL */
};

struct mirror;

int mirror_new(struct mirror **ret_mirror);
struct mirror *mirror_free(struct mirror *mirror);

/* ---- for those who need values ---- */

/* Whether the copy answers somebody who wants values that held at `since_us` or later. */
bool mirror_answers(const struct mirror *mirror, uint64_t since_us, uint64_t now_us);
/* What is to be done for somebody who wants values that held at `since_us` or later. */
enum mirror_action mirror_next(const struct mirror *mirror, uint64_t since_us);
/* Since when values must hold for somebody who watches, that is waits for a change: what is pushed
 * comes by itself. */
uint64_t mirror_watch_since_us(const struct mirror *mirror, uint64_t now_us);
/* When time alone changes mirror_answers() or mirror_next(), the latter only where somebody is
 * `watching`. UINT64_MAX: never. */
uint64_t mirror_due_us(const struct mirror *mirror, bool watching, uint64_t now_us);
/* What held at `now_us` or before answers nobody from now on (something has been changed). */
void mirror_expire(struct mirror *mirror, uint64_t now_us);
/* Whether there is a connection. */
bool mirror_is_connected(const struct mirror *mirror);
/* When the copy last held, as far as is known. */
uint64_t mirror_held_us(const struct mirror *mirror);
/* Grows whenever the copy may have changed. */
uint64_t mirror_changes(const struct mirror *mirror);

/* inactive, starting, running, draining or unresponsive. */
const char *mirror_status(const struct mirror *mirror, uint64_t now_us);
/* The daemon's version, NULL when it is not known. */
const char *mirror_version(const struct mirror *mirror);
/* Whether the last look, at `since_us` or later, found no daemon. */
bool mirror_is_absent(const struct mirror *mirror, uint64_t since_us);
size_t mirror_n_models(const struct mirror *mirror);
const struct mirror_model *mirror_model_at(const struct mirror *mirror, size_t index);
/* NULL: no such model. */
const struct mirror_model *mirror_model(const struct mirror *mirror, const char *name);
/* The text of a section, "" when there is none. */
const char *mirror_text(const struct mirror *mirror, enum mirror_part part);

/* ---- for the one who talks to the daemon ---- */

void mirror_connecting(struct mirror *mirror, uint64_t now_us);
void mirror_connected(struct mirror *mirror, uint64_t now_us);
/* The name under which the daemon listens leads nowhere. `names` are the models known without it
 * (NULL: those it named last). */
void mirror_absent(struct mirror *mirror, const char *const *names, size_t n_names,
                   uint64_t now_us);
/* There is a daemon that did not let us in. */
void mirror_deaf(struct mirror *mirror, uint64_t now_us);
/* Whether one is being started for an order: `starting`, until there is a connection or this is
 * said to be over. */
void mirror_starting(struct mirror *mirror, bool starting);
/* The connection has broken; what it means shows at the next attempt. */
void mirror_lost(struct mirror *mirror);
/* The daemon takes no more questions on this connection, it is on its way out. */
void mirror_going(struct mirror *mirror, uint64_t now_us);
/* The values are to be pushed from now on; the first push is awaited. */
void mirror_feeding(struct mirror *mirror, uint64_t now_us);
/* An item of a push. */
void mirror_push(struct mirror *mirror, const struct hearth_reply *reply, uint64_t now_us);
/* No more pushes. `refused`: the daemon has ended them, and is asked from now on. */
void mirror_unfed(struct mirror *mirror, bool refused, uint64_t now_us);
void mirror_pinged(struct mirror *mirror, uint64_t now_us);
void mirror_ponged(struct mirror *mirror, uint64_t now_us);
/* All parts have been asked for. */
void mirror_asked(struct mirror *mirror, uint64_t now_us);
/* An answer to a part, or to anything else (mirror_heard). */
void mirror_take(struct mirror *mirror, enum mirror_part part, const struct hearth_reply *reply,
                 uint64_t now_us);
void mirror_heard(struct mirror *mirror, uint64_t now_us);

#endif
