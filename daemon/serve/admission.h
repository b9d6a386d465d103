/* Admission: whether a request may come in, and what exactly it asks for.
 *
 * Reads a frame's options into a plain struct, checks every value, and holds what each user has
 * against the limits. A refusal is immediate and says which option and why, and for `busy` when to
 * come again.
 *
 * Hides option parsing, defaults, the per-uid accounts. Thread: the reactor. */
#ifndef HEARTH_SERVE_ADMISSION_H
#define HEARTH_SERVE_ADMISSION_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/config.h"
#include "daemon/engine/sampler.h"
#include "daemon/serve/reply.h"
#include "daemon/serve/streaming.h"
#include "daemon/serve/text_budget.h"
#include "lib/hash.h"
#include "lib/wire.h"

/* A request's options; views into the frame. */
struct request_options {
    char model[WIRE_MAX_MODEL_NAME + 1]; /* "": not given */
    const char *prompt;                  /* NULL: not given */
    size_t prompt_bytes;
    const uint8_t *ids; /* unaligned little-endian i32; NULL: not given */
    size_t n_ids;
    bool stream;
    bool has_credit;
    uint64_t credit;
    uint32_t max_tokens;
    struct sampler_params params;
    bool has_seed;
    struct stream_stops stops;
    bool ignore_eos;
    uint64_t deadline_us; /* 0: none */
    uint32_t priority;
    uint64_t skip_bytes;
    bool has_fingerprint;
    uint64_t fingerprint;
    bool wait;
    bool has_preload, preload; /* set */
    bool has_pinned, pinned;
    bool has_keep_alive;
    uint64_t keep_alive_us;
    char name[64]; /* metrics: which section; "": all */
    bool on_behalf;
    uint32_t uid;
    const uint8_t *gids; /* unaligned little-endian u32 */
    size_t n_gids;
};

/* What a user has open. */
struct account_entry {
    uint32_t uid;
    uint32_t n_connections;
    uint32_t n_requests;
    uint64_t input_bytes;
    struct text_spent text_spent; /* of the reactor's time */
    UT_hash_handle hh;
};

struct admission;

int admission_new(const struct config *config, struct admission **ret_admission);
struct admission *admission_free(struct admission *admission);

/* Reads the options of a frame of `type`. -EINVAL: see the refusal. -EBADMSG: the frame itself is
 * malformed and its connection must end. */
int admission_parse(uint16_t type, const uint8_t *body, size_t body_len,
                    struct request_options *ret_options, struct refusal *ret_refusal);

/* A connection of the user: NULL when the house or the user is full, with a refusal. */
struct account_entry *admission_connect(struct admission *admission, uint32_t uid,
                                        struct refusal *ret_refusal);
void admission_disconnect(struct admission *admission, struct account_entry *account);
/* A place in the queue; -EINVAL with `busy`. */
int admission_enter(struct admission *admission, struct account_entry *account,
                    struct refusal *ret_refusal);
void admission_leave(struct admission *admission, struct account_entry *account);
/* Input that is held: partial frames, and the prompts and texts of live requests. False: that would
 * be too much. Who holds nothing else is never told so, or what is larger than the limit would be
 * refused for ever; limits.frame bounds it. */
bool admission_hold_input(struct admission *admission, struct account_entry *account, size_t bytes);
/* Instead of *held, which changes with it where it may. */
bool admission_resize_input(struct admission *admission, struct account_entry *account,
                            size_t *held, size_t bytes);
/* The refusal that goes with it. */
#define INPUT_RETRY_US 100000u
int refusal_input(struct refusal *ret_refusal);
void admission_release_input(struct admission *admission, struct account_entry *account,
                             size_t bytes);
uint32_t admission_n_requests(const struct admission *admission);
uint32_t admission_n_connections(const struct admission *admission);

#endif
