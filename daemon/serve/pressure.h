/* KV memory under pressure: who holds it, and who gives way when it is short.
 *
 * A request's sequence begins with memory for what is known of its text and a little more, and
 * grows page by page. When there is no page, in this order: prefixes that nobody uses (the engine
 * sees to that), parked requests, the youngest request of the user who holds most. Who gives way
 * keeps its ids, waits again, and is computed again with the same tokens.
 *
 * A request that wants to begin takes the memory of parked ones, and of running ones only where
 * their user holds more than his share and its own user stays within his; after it has waited for
 * long, also of those that came later, and of users who hold more than its own then does. So no
 * request waits for ever, however large, and however many small ones come. One that runs and grows
 * takes it from any other but the oldest that runs; so the oldest comes to its end, and then the
 * next. While another user waits, a user who has something begins nothing beyond his share.
 *
 * Hides what each user holds, the list of parked requests, and the rules above.
 * Thread: the engine thread. */
#ifndef HEARTH_SERVE_PRESSURE_H
#define HEARTH_SERVE_PRESSURE_H

#include <stdbool.h>
#include <stdint.h>

#include "lib/clock.h"
#include "daemon/engine/engine.h"
#include "daemon/metrics/metrics.h"

/* Positions that a sequence gets when it begins beyond the ids it has: one page of each layer. */
#define PRESSURE_MARGIN_TOKENS KV_TILE

/* One that had to wait for memory for long may generate so many tokens before it gives way again to
 * those of users who hold less. */
#define PRESSURE_TURN_TOKENS 64u

struct batcher;
struct payer;
struct pressure;
struct request;

/* What is known here of a request; embedded in it, zero at first. */
struct holding {
    struct payer *payer; /* its user, once it has asked for memory */
    /* Among those that have a sequence: of those that run, in no order, or of its user's parked
     * ones, the longest first. */
    struct request *previous, *next;
    struct request *parked_previous, *parked_next; /* all that are parked, the longest first */
    bool is_parked;
    uint64_t parked_us, parked_serial; /* since when, and in which order */
    uint64_t tried_us;                 /* it last found that not enough would give way to it */
    uint64_t short_us;                 /* it has been waiting for memory since; 0: it has not */
    uint32_t safe_tokens; /* it need not give way to others' shares before it knows so many */
    uint32_t n_computed;  /* tokens that were computed before it gave way */
};

struct pressure_options {
    struct engine *engine;
    struct batcher *batcher;
    struct metrics *metrics;
    const struct clock *clock;
    uint64_t per_uid_bytes;   /* a user's share: what he may hold while another waits */
    uint64_t park_timeout_us; /* how long a parked request may hold anything */
    bool prefix_cache;
    bool share_with_all; /* prefixes of all users; else each user's own */
};

int pressure_new(const struct pressure_options *options, struct pressure **ret_pressure);
/* After the engine, whose prefixes know their payers. Returns NULL. */
struct pressure *pressure_free(struct pressure *pressure);

/* Begins the request's sequence, what is there of its ids taken over: 0, and `fed` and `room` of
 * its job are set. As batcher_options.admit: -EAGAIN, -EBUSY, -EDQUOT; for good: -ENOSPC, -ENOMEM.
 */
int pressure_begin(struct pressure *pressure, struct request *request, struct model *model);
/* Memory for all ids it knows; as batcher_options.grow. */
int pressure_grow(struct pressure *pressure, struct request *request);
/* A step of some lane is over and its results are taken in: who was in it may give way now. */
void pressure_step_over(struct pressure *pressure);
/* Nothing more is computed for it: its memory comes free. */
void pressure_end(struct pressure *pressure, struct request *request);

/* Its reader takes nothing, or takes something again (or it is gone). Both may be said twice. */
void pressure_park(struct pressure *pressure, struct request *request);
void pressure_unpark(struct pressure *pressure, struct request *request);
/* The one parked longest, when that is for park_timeout; else NULL, and when it will be
 * (UINT64_MAX: none is parked). It is still parked, its memory is free. */
struct request *pressure_overdue(struct pressure *pressure, uint64_t now_us, uint64_t *ret_next_us);

struct pressure_stats {
    uint64_t most_uid_bytes; /* of the user who holds most */
    uint64_t parked_bytes;   /* of parked requests, with what they share */
};
void pressure_stats(const struct pressure *pressure, struct pressure_stats *ret_stats);
/* What a user holds. */
uint64_t pressure_uid_bytes(const struct pressure *pressure, uint32_t uid);

#endif
