/* What failover.c needs of a pool beside its public calls: calls that can be cancelled, whether a
 * daemon that is not there may come back, counting, and saying why a call failed. What tests need:
 * a clock. Not installed, not exported.
 *
 * Hides: the pool's lock. Thread: any. */
#ifndef HEARTH_LIB_POOL_H
#define HEARTH_LIB_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>

#include "lib/clock.h"
#include "lib/hearth.h"

/* hearth_pool_new() with a clock that ages go by: idle time, age, health, a daemon's absence. What
 * waits for somebody else (a connection that comes back, an answer) waits in real time. */
int pool_new(const struct hearth_pool_options *options, const struct clock *clock,
             struct hearth_pool **ret_pool);

/* A call of hearth_pool_complete() or the like, on its thread's stack while it runs: what
 * hearth_pool_cancel() finds. */
struct pool_call {
    const void *userdata; /* by which it is found */
    pthread_t thread;
    atomic_bool cancelled; /* set under the pool's lock */
    /* guarded by the pool's lock */
    struct hearth *connection; /* that it has out; NULL: none */
    struct waiter *waiter;     /* where it waits for something else; NULL: it does not */
    TAILQ_ENTRY(pool_call) link;
};

void pool_call_begin(struct hearth_pool *pool, struct pool_call *call, const void *userdata);
/* It must have released its connection. */
void pool_call_end(struct hearth_pool *pool, struct pool_call *call);
/* As hearth_pool_acquire(), and -ECANCELED once the call is cancelled; it is the call's until it is
 * released. From another thread, a cancellation shuts the connection down: whoever waits on it
 * sees its end. */
int pool_call_acquire(struct hearth_pool *pool, struct pool_call *call, uint64_t timeout_us);
void pool_call_release(struct hearth_pool *pool, struct pool_call *call);
/* Waits for this long, or until it is cancelled. */
void pool_call_pause(struct hearth_pool *pool, struct pool_call *call, uint64_t us);

/* Whether the daemon that an acquisition did not find, with this error, is to be looked for again:
 * it goes, or has been there and is missing for less than POOL_RESTART_US. */
bool pool_daemon_may_return(struct hearth_pool *pool, int error);
#define POOL_RESTART_US 10000000u

void pool_count_failover(struct hearth_pool *pool);
void pool_set_message(struct hearth_pool *pool, const char *sentence);

#endif
