/* Connections shared between threads. Idle ones are a list with the warmest in front: it is used
 * next, so that what the load does not need grows old at the end and is closed. Connecting, looking
 * whether a connection still lives, and closing happen outside the lock: a slow daemon holds up
 * only whoever waits for it.
 *
 * Nothing waits while there is something to have: where `waiters` is not empty, `idle` is, and
 * `open` is at its maximum. What comes back (a connection, or the place of one that was closed)
 * goes to the first who waits, so nobody who comes later overtakes. */
#include "lib/pool.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>

#include "lib/cleanup.h"
#include "lib/client.h"
#include "lib/sized.h"

#define POOL_MAX_CONNECTIONS 4096u
/* Connections that hearth_pool_maintain() has out at the same time. */
#define LOOK_BATCH 32u

/* A connection of the pool: on a list of it, or out with its user. */
struct entry {
    struct hearth *connection;
    uint64_t created_us, idle_since_us;
    uint64_t answered_us; /* when it last proved to be alive */
    uint64_t looked_us;   /* when maintain last took it out */
    uint64_t pings;       /* of what was sent on it */
    uint64_t sent;        /* on it, when it was last given back */
    bool pinging, pong;
    TAILQ_ENTRY(entry) link;
};
TAILQ_HEAD(entries, entry);

/* On the stack of who waits; in line `granted` with an entry, or with none: the place for a new
 * one. */
struct waiter {
    pthread_cond_t wake;
    bool granted;
    struct entry *entry;
    TAILQ_ENTRY(waiter) link;
};
TAILQ_HEAD(waiters, waiter);
TAILQ_HEAD(calls, pool_call);

/* Options, strings and the clock are fixed after hearth_pool_new(); all the rest is guarded by
 * `lock`, under which no system call on a connection is made but the shutdown(2) of a cancelled
 * call. */
struct hearth_pool {
    const struct clock *clock;
    struct hearth_pool_options options;
    char socket_path[HEARTH_PATH_BYTES];
    char client_name[CLIENT_MAX_CLIENT_NAME + 1];
    pthread_condattr_t wake_attributes; /* the monotonic clock */

    pthread_mutex_t lock;
    struct waiters waiters; /* front: came first */
    struct entries idle;    /* front: used last */
    uint32_t n_idle;
    uint32_t open; /* idle, out, and being connected */
    /* Before these times no idle one is past its time, or due for a ping: nobody walks the list. */
    uint64_t expiry_us, due_us;
    struct calls calls; /* that can be cancelled */
    bool met;           /* a daemon has been there */
    uint64_t gone_us;   /* since when a call has missed it; 0: it has been there since */
    struct hearth_pool_stats stats;
    struct fault message; /* why the last acquisition failed */
};

static const struct hearth_pool_options options_defaults = HEARTH_POOL_OPTIONS_INIT;
static const struct clock real_clock = {.now_us = clock_monotonic_us};

/* ---- entries; no lock held ---- */

static struct entry *entry_free(struct entry *entry)
{
    if (!entry)
        return NULL;
    hearth_free(entry->connection);
    free(entry);
    return NULL;
}

DEFINE_CLEANUP(struct entry *, entry_free)

static int entry_new(const struct hearth_pool *pool, uint64_t timeout_us, struct entry **ret_entry,
                     char ret_message[HEARTH_MESSAGE_BYTES])
{
    struct hearth_options options = pool->options.connection;
    if (options.connect_timeout_us == 0 || options.connect_timeout_us > timeout_us)
        options.connect_timeout_us = MAX(timeout_us, (uint64_t)1);
    _cleanup_(entry_freep) struct entry *entry = calloc(1, sizeof(*entry));
    if (!entry)
        return -ENOMEM;
    int r = hearth_connect(&options, &entry->connection, ret_message);
    if (r < 0)
        return r;
    entry->created_us = entry->answered_us = clock_now_us(pool->clock);
    entry->connection->pool_entry = entry;
    *ret_entry = TAKE_PTR(entry);
    return 0;
}

/* Takes in what the daemon said meanwhile (goaway, the end): whether it is still good. */
static bool entry_look(struct entry *entry)
{
    return hearth_dispatch(entry->connection) >= 0 && client_is_reusable(entry->connection);
}

static bool entry_due(const struct hearth_pool *pool, const struct entry *entry, uint64_t now)
{
    return pool->options.health_every_us &&
           now - entry->answered_us >= pool->options.health_every_us;
}

static void take_pong(void *userdata, const struct hearth_reply *reply)
{
    struct entry *entry = userdata;
    entry->pinging = false;
    entry->pong = reply->kind == HEARTH_DONE;
}

/* Sends a ping, its answer comes later. */
static void entry_ping(struct entry *entry)
{
    entry->pong = false;
    entry->pinging = hearth_ping(entry->connection, take_pong, entry, NULL) >= 0;
    entry->pings += entry->pinging;
    hearth_dispatch(entry->connection);
}

static bool entry_await_pong(const struct hearth_pool *pool, struct entry *entry,
                             uint64_t deadline_us)
{
    int r = 0;
    while (entry->pinging && (r >= 0 || r == -EINTR)) {
        uint64_t now = client_now_us();
        if (now >= deadline_us)
            break;
        r = hearth_wait(entry->connection, deadline_us - now);
    }
    if (!entry->pong || !client_is_reusable(entry->connection))
        return false;
    entry->answered_us = clock_now_us(pool->clock);
    return true;
}

/* Looks at the entries and pings those that are due, all at once. Those that are not good go to
 * `bad`; the number of pings answered is returned, of those not answered in ret_failed. */
static uint32_t entries_look(const struct hearth_pool *pool, struct entries *entries,
                             struct entries *bad, uint32_t *ret_failed)
{
    uint64_t now = clock_now_us(pool->clock);
    uint64_t deadline_us = client_now_us() + pool->options.health_timeout_us;
    uint32_t passed = 0, failed = 0;
    struct entry *entry, *next;
    for (entry = TAILQ_FIRST(entries); entry; entry = TAILQ_NEXT(entry, link))
        if (entry_due(pool, entry, now))
            entry_ping(entry);
    for (entry = TAILQ_FIRST(entries); entry; entry = next) {
        bool due = entry_due(pool, entry, now);
        bool good = due ? entry_await_pong(pool, entry, deadline_us) : entry_look(entry);
        next = TAILQ_NEXT(entry, link);
        passed += due && good;
        failed += due && !good;
        if (good)
            continue;
        TAILQ_REMOVE(entries, entry, link);
        TAILQ_INSERT_TAIL(bad, entry, link);
    }
    *ret_failed = failed;
    return passed;
}

static void entries_close(struct entries *entries)
{
    struct entry *entry;
    while ((entry = TAILQ_FIRST(entries))) {
        TAILQ_REMOVE(entries, entry, link);
        entry_free(entry);
    }
}

/* ---- under the lock ---- */

static bool entry_aged(const struct hearth_pool *pool, const struct entry *entry, uint64_t now)
{
    return pool->options.max_age_us && now - entry->created_us >= pool->options.max_age_us;
}

static bool entry_too_idle(const struct hearth_pool *pool, const struct entry *entry, uint64_t now)
{
    return pool->options.idle_timeout_us &&
           now - entry->idle_since_us >= pool->options.idle_timeout_us &&
           pool->open > pool->options.min_connections;
}

/* `since` and `limit_us` later; UINT64_MAX where there is no limit. */
static uint64_t later(uint64_t since, uint64_t limit_us)
{
    uint64_t then;
    return limit_us == 0 || __builtin_add_overflow(since, limit_us, &then) ? UINT64_MAX : then;
}

/* When the idle entry is past its time. One that the minimum keeps beyond it is looked at again
 * after a part of that time. */
static uint64_t entry_expiry(const struct hearth_pool *pool, const struct entry *entry,
                             uint64_t now)
{
    const struct hearth_pool_options *o = &pool->options;
    uint64_t aged_us = later(entry->created_us, o->max_age_us);
    uint64_t idle_us = later(entry->idle_since_us, o->idle_timeout_us);
    return MIN(aged_us, MAX(idle_us, later(now, o->idle_timeout_us / 16 + 1)));
}

/* Moves the idle connections that are past their time, the coldest first, to `expired`: the caller
 * closes them once the lock is given back. */
static void take_expired(struct hearth_pool *pool, struct entries *expired)
{
    uint64_t now = clock_now_us(pool->clock);
    if (now < pool->expiry_us)
        return;
    struct entry *entry, *next;
    pool->expiry_us = UINT64_MAX;
    for (entry = TAILQ_LAST(&pool->idle, entries); entry; entry = next) {
        next = TAILQ_PREV(entry, entries, link);
        bool aged = entry_aged(pool, entry, now);
        if (!aged && !entry_too_idle(pool, entry, now)) {
            pool->expiry_us = MIN(pool->expiry_us, entry_expiry(pool, entry, now));
            continue;
        }
        pool->stats.closed_aged += aged;
        pool->stats.closed_idle += !aged;
        TAILQ_REMOVE(&pool->idle, entry, link);
        TAILQ_INSERT_TAIL(expired, entry, link);
        pool->n_idle--;
        pool->open--; /* nobody waits for the place while one is idle */
    }
}

static struct entry *take_idle(struct hearth_pool *pool)
{
    struct entry *entry = TAILQ_FIRST(&pool->idle);
    if (!entry)
        return NULL;
    TAILQ_REMOVE(&pool->idle, entry, link);
    pool->n_idle--;
    return entry;
}

/* Gives what came back to the first who waits: an entry, or the place of one (NULL). */
static bool grant(struct hearth_pool *pool, struct entry *entry)
{
    struct waiter *waiter = TAILQ_FIRST(&pool->waiters);
    if (!waiter)
        return false;
    assert(pool->n_idle == 0);
    TAILQ_REMOVE(&pool->waiters, waiter, link);
    waiter->granted = true;
    waiter->entry = entry;
    pthread_cond_signal(&waiter->wake);
    return true;
}

/* A place among the open ones is free again. */
static void give_place(struct hearth_pool *pool)
{
    if (!grant(pool, NULL))
        pool->open--;
}

static void give_entry(struct hearth_pool *pool, struct entry *entry, bool warm)
{
    if (grant(pool, entry))
        return;
    if (warm)
        TAILQ_INSERT_HEAD(&pool->idle, entry, link);
    else
        TAILQ_INSERT_TAIL(&pool->idle, entry, link);
    pool->n_idle++;
    pool->expiry_us = MIN(pool->expiry_us, entry_expiry(pool, entry, entry->idle_since_us));
    pool->due_us = MIN(pool->due_us, later(entry->answered_us, pool->options.health_every_us));
}

static int refuse_cancelled(struct hearth_pool *pool)
{
    return fault_set(&pool->message, -ECANCELED, "the request was cancelled");
}

/* Waits until something is granted, the call is cancelled or, in real time, the deadline. */
static void waiter_wait(struct hearth_pool *pool, struct waiter *waiter, struct pool_call *call,
                        uint64_t deadline_us)
{
    struct timespec deadline = {.tv_sec = (time_t)(deadline_us / 1000000u),
                                .tv_nsec = (long)(deadline_us % 1000000u) * 1000};
    int r = 0;
    if (call)
        call->waiter = waiter;
    while (!waiter->granted && !(call && call->cancelled) && r == 0)
        r = deadline_us == UINT64_MAX
                ? pthread_cond_wait(&waiter->wake, &pool->lock)
                : pthread_cond_timedwait(&waiter->wake, &pool->lock, &deadline);
    if (call)
        call->waiter = NULL;
    pthread_cond_destroy(&waiter->wake);
}

/* Waits in line. 0 with what was granted, -ETIMEDOUT or -ECANCELED. */
static int wait_in_line(struct hearth_pool *pool, struct pool_call *call, uint64_t deadline_us,
                        struct entry **ret_entry)
{
    struct waiter waiter = {0};
    int r = -pthread_cond_init(&waiter.wake, &pool->wake_attributes);
    if (r < 0)
        return fault_set(&pool->message, r, "no means to wait for a connection");
    pool->stats.waits++;
    TAILQ_INSERT_TAIL(&pool->waiters, &waiter, link);
    waiter_wait(pool, &waiter, call, deadline_us);
    if (waiter.granted) {
        *ret_entry = waiter.entry;
        return 0;
    }
    TAILQ_REMOVE(&pool->waiters, &waiter, link);
    if (call && call->cancelled)
        return refuse_cancelled(pool);
    pool->stats.timeouts++;
    return fault_set(&pool->message, -ETIMEDOUT,
                     "all %u connections of the pool stayed in use: raise max_connections or wait "
                     "longer",
                     pool->options.max_connections);
}

/* What acquire goes on with: an idle connection to look at, leave to open one (NULL, counted in
 * `open` already), -ETIMEDOUT or -ECANCELED. */
static int take_or_wait(struct hearth_pool *pool, struct pool_call *call, uint64_t deadline_us,
                        struct entries *expired, struct entry **ret_entry)
{
    if (call && call->cancelled)
        return refuse_cancelled(pool);
    take_expired(pool, expired);
    *ret_entry = take_idle(pool);
    if (*ret_entry)
        return 0;
    if (pool->open == pool->options.max_connections)
        return wait_in_line(pool, call, deadline_us, ret_entry);
    pool->open++;
    return 0;
}

/* ---- acquire and release ---- */

/* An idle connection of the pool if it is good; else it is closed, and the next idle one or the
 * place that it leaves (NULL) takes its part: whoever has waited does not wait again. */
static struct entry *use_idle(struct hearth_pool *pool, struct entry *entry)
{
    struct entries one = TAILQ_HEAD_INITIALIZER(one), bad = TAILQ_HEAD_INITIALIZER(bad);
    uint32_t failed, passed;
    struct entry *next = entry;
    TAILQ_INSERT_TAIL(&one, entry, link);
    passed = entries_look(pool, &one, &bad, &failed);
    bool good = TAILQ_EMPTY(&bad);
    pthread_mutex_lock(&pool->lock);
    pool->stats.health_passed += passed;
    pool->stats.health_failed += failed;
    if (good) {
        pool->stats.acquired++;
        pool->stats.reused += hearth_requests_sent(entry->connection) > entry->pings;
    } else {
        pool->stats.closed_broken++;
        next = take_idle(pool);
        if (next)
            give_place(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    entries_close(&bad);
    return next;
}

/* A new connection for a place that the caller holds. A signal does not end the attempt. */
static int use_new(struct hearth_pool *pool, uint64_t deadline_us, struct entry **ret_entry)
{
    struct fault fault = {"no memory for a connection"};
    struct entry *entry;
    int r;
    do {
        uint64_t now = client_now_us();
        r = entry_new(pool, deadline_us > now ? deadline_us - now : 0, &entry, fault.text);
    } while (r == -EINTR && client_now_us() < deadline_us);
    pthread_mutex_lock(&pool->lock);
    if (r >= 0) {
        pool->stats.created++;
        pool->stats.acquired++;
        pool->met = true;
        pool->gone_us = 0;
        *ret_entry = entry;
    } else {
        pool->stats.failed++;
        pool->message = fault;
        give_place(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    return r;
}

static int acquire(struct hearth_pool *pool, struct pool_call *call, uint64_t timeout_us,
                   struct hearth **ret_hearth)
{
    uint64_t deadline_us;
    if (__builtin_add_overflow(client_now_us(), timeout_us, &deadline_us))
        deadline_us = UINT64_MAX;
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    struct entry *entry = NULL, *looked = NULL;
    pthread_mutex_lock(&pool->lock);
    int r = take_or_wait(pool, call, deadline_us, &expired, &entry);
    pthread_mutex_unlock(&pool->lock);
    entries_close(&expired);
    if (r < 0)
        return r;
    /* Each round but the last closes one idle connection that had gone bad. */
    while (entry && entry != looked) {
        looked = entry;
        entry = use_idle(pool, looked);
    }
    if (!entry)
        r = use_new(pool, deadline_us, &entry);
    if (r < 0)
        return r;
    *ret_hearth = entry->connection;
    return 0;
}

int hearth_pool_acquire(struct hearth_pool *pool, uint64_t timeout_us, struct hearth **ret_hearth)
{
    return acquire(pool, NULL, timeout_us, ret_hearth);
}

static void take_out(struct hearth_pool *pool, struct entry *entry, struct entries *looked)
{
    TAILQ_REMOVE(&pool->idle, entry, link);
    TAILQ_INSERT_TAIL(looked, entry, link);
    pool->n_idle--;
}

/* Takes out an idle connection that is due for a ping, the coldest. */
static void take_due(struct hearth_pool *pool, uint64_t now, struct entries *looked)
{
    if (now < pool->due_us)
        return;
    struct entry *entry;
    uint64_t due_us = UINT64_MAX;
    for (entry = TAILQ_LAST(&pool->idle, entries); entry;
         entry = TAILQ_PREV(entry, entries, link)) {
        if (entry_due(pool, entry, now)) {
            take_out(pool, entry, looked);
            return; /* the next may be due as well */
        }
        due_us = MIN(due_us, later(entry->answered_us, pool->options.health_every_us));
    }
    pool->due_us = due_us;
}

/* Takes out idle connections that nobody has looked at since `before`, the coldest first. */
static void take_unseen(struct hearth_pool *pool, uint64_t before, struct entries *looked)
{
    struct entry *entry, *next;
    uint32_t n = 0;
    for (entry = TAILQ_LAST(&pool->idle, entries); entry && n < LOOK_BATCH; entry = next) {
        next = TAILQ_PREV(entry, entries, link);
        if (entry->looked_us >= before)
            continue;
        entry->looked_us = before;
        take_out(pool, entry, looked);
        n++;
    }
}

/* Puts them back, the coldest at the end again, and gives up the places of the bad ones. */
static void put_looked(struct hearth_pool *pool, struct entries *looked, struct entries *bad)
{
    struct entry *entry;
    while ((entry = TAILQ_LAST(looked, entries))) {
        TAILQ_REMOVE(looked, entry, link);
        give_entry(pool, entry, false);
    }
    for (entry = TAILQ_FIRST(bad); entry; entry = TAILQ_NEXT(entry, link)) {
        pool->stats.closed_broken++;
        give_place(pool);
    }
}

/* Looks at what was taken out; false where that is nothing. */
static bool look(struct hearth_pool *pool, struct entries *looked)
{
    struct entries bad = TAILQ_HEAD_INITIALIZER(bad);
    uint32_t failed, passed;
    if (TAILQ_EMPTY(looked))
        return false;
    passed = entries_look(pool, looked, &bad, &failed);
    pthread_mutex_lock(&pool->lock);
    pool->stats.health_passed += passed;
    pool->stats.health_failed += failed;
    put_looked(pool, looked, &bad);
    pthread_mutex_unlock(&pool->lock);
    entries_close(&bad);
    return true;
}

void hearth_pool_release(struct hearth_pool *pool, struct hearth *h)
{
    if (!h)
        return;
    hearth_act_for_self(h); /* the next user is another */
    struct entry *entry = h->pool_entry;
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    struct entries looked = TAILQ_HEAD_INITIALIZER(looked);
    bool good = client_is_reusable(h);
    uint64_t now = clock_now_us(pool->clock);
    pthread_mutex_lock(&pool->lock);
    bool aged = good && entry_aged(pool, entry, now);
    if (good && !aged) {
        entry->idle_since_us = now;
        if (entry->sent != hearth_requests_sent(h))
            entry->answered_us = now; /* all of them, or it would not be good */
        entry->sent = hearth_requests_sent(h);
        give_entry(pool, entry, true);
    } else {
        pool->stats.closed_aged += aged;
        pool->stats.closed_broken += !aged;
        give_place(pool);
    }
    take_expired(pool, &expired);
    take_due(pool, now, &looked);
    pthread_mutex_unlock(&pool->lock);
    if (!good || aged)
        entry_free(entry);
    entries_close(&expired);
    look(pool, &looked);
}

void hearth_pool_maintain(struct hearth_pool *pool)
{
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    struct entries looked = TAILQ_HEAD_INITIALIZER(looked);
    uint64_t now = clock_now_us(pool->clock);
    pthread_mutex_lock(&pool->lock);
    take_expired(pool, &expired);
    pthread_mutex_unlock(&pool->lock);
    entries_close(&expired);
    /* Ends: each connection is looked at once, and at most POOL_MAX_CONNECTIONS are open. */
    do {
        pthread_mutex_lock(&pool->lock);
        take_unseen(pool, now, &looked);
        pthread_mutex_unlock(&pool->lock);
    } while (look(pool, &looked));
}

/* ---- calls that can be cancelled ---- */

void pool_call_begin(struct hearth_pool *pool, struct pool_call *call, const void *userdata)
{
    *call = (struct pool_call){.userdata = userdata, .thread = pthread_self()};
    pthread_mutex_lock(&pool->lock);
    TAILQ_INSERT_TAIL(&pool->calls, call, link);
    pthread_mutex_unlock(&pool->lock);
}

void pool_call_end(struct hearth_pool *pool, struct pool_call *call)
{
    assert(!call->connection);
    pthread_mutex_lock(&pool->lock);
    TAILQ_REMOVE(&pool->calls, call, link);
    pthread_mutex_unlock(&pool->lock);
}

int pool_call_acquire(struct hearth_pool *pool, struct pool_call *call, uint64_t timeout_us)
{
    struct hearth *connection;
    int r = acquire(pool, call, timeout_us, &connection);
    if (r < 0)
        return r;
    pthread_mutex_lock(&pool->lock);
    call->connection = connection;
    pthread_mutex_unlock(&pool->lock);
    return 0;
}

void pool_call_release(struct hearth_pool *pool, struct pool_call *call)
{
    pthread_mutex_lock(&pool->lock);
    struct hearth *connection = call->connection;
    call->connection = NULL; /* no shutdown(2) from now on */
    pthread_mutex_unlock(&pool->lock);
    hearth_pool_release(pool, connection);
}

void pool_call_pause(struct hearth_pool *pool, struct pool_call *call, uint64_t us)
{
    struct waiter waiter = {0};
    if (pthread_cond_init(&waiter.wake, &pool->wake_attributes) != 0)
        return;
    pthread_mutex_lock(&pool->lock);
    waiter_wait(pool, &waiter, call, client_now_us() + us);
    pthread_mutex_unlock(&pool->lock);
}

int hearth_pool_cancel(struct hearth_pool *pool, const void *userdata)
{
    struct pool_call *call;
    int n = 0;
    pthread_mutex_lock(&pool->lock);
    for (call = TAILQ_FIRST(&pool->calls); call; call = TAILQ_NEXT(call, link)) {
        if (call->userdata != userdata || call->cancelled)
            continue;
        call->cancelled = true;
        n++;
        if (call->waiter)
            pthread_cond_signal(&call->waiter->wake);
        /* In its own callback it asks the daemon once that has returned. */
        if (call->connection && !pthread_equal(call->thread, pthread_self()))
            shutdown(hearth_fd(call->connection), SHUT_RDWR);
    }
    pthread_mutex_unlock(&pool->lock);
    return n;
}

/* ---- what it says about itself ---- */

bool pool_daemon_may_return(struct hearth_pool *pool, int error)
{
    bool goes = error == -ESHUTDOWN || error == -ECONNRESET;
    if (!goes && error != -ENOENT && error != -ECONNREFUSED)
        return false;
    uint64_t now = clock_now_us(pool->clock);
    pthread_mutex_lock(&pool->lock);
    pool->met |= goes;
    if (pool->met && pool->gone_us == 0)
        pool->gone_us = now;
    bool may = pool->met && now - pool->gone_us < POOL_RESTART_US;
    pthread_mutex_unlock(&pool->lock);
    return may;
}

void pool_count_failover(struct hearth_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stats.failovers++;
    pthread_mutex_unlock(&pool->lock);
}

void pool_set_message(struct hearth_pool *pool, const char *sentence)
{
    pthread_mutex_lock(&pool->lock);
    fault_set(&pool->message, 0, "%s", sentence);
    pthread_mutex_unlock(&pool->lock);
}

void hearth_pool_get_stats(struct hearth_pool *pool, struct hearth_pool_stats *ret_stats)
{
    size_t size = MIN(ret_stats->size_of, sizeof(*ret_stats));
    pthread_mutex_lock(&pool->lock);
    struct hearth_pool_stats stats = pool->stats;
    stats.open = pool->open;
    stats.idle = pool->n_idle;
    stats.busy = pool->open - pool->n_idle;
    pthread_mutex_unlock(&pool->lock);
    stats.size_of = size;
    memcpy(ret_stats, &stats, size);
}

void hearth_pool_get_message(struct hearth_pool *pool, char ret_message[HEARTH_MESSAGE_BYTES])
{
    pthread_mutex_lock(&pool->lock);
    memcpy(ret_message, pool->message.text, sizeof(pool->message.text));
    pthread_mutex_unlock(&pool->lock);
}

/* ---- life ---- */

/* The caller's options, or the defaults. Strings are copied: the pool outlives them. */
static int options_copy(struct hearth_pool *pool, const struct hearth_pool_options *options)
{
    struct hearth_pool_options *own = &pool->options;
    struct hearth_options *connection = &own->connection;
    *own = options_defaults;
    int r = options ? sized_read_pool_options(options, own, &pool->message) : 0;
    if (r < 0)
        return r;
    if (own->max_connections == 0 || own->max_connections > POOL_MAX_CONNECTIONS ||
        own->min_connections > own->max_connections)
        return -EINVAL;
    r = hearth_socket_path(connection->socket_path, pool->socket_path);
    if (r < 0)
        return r;
    connection->socket_path = pool->socket_path;
    if (connection->client_name) {
        strncpy(pool->client_name, connection->client_name, sizeof(pool->client_name) - 1);
        connection->client_name = pool->client_name;
    }
    return 0;
}

/* The lock, and how those wait who wait in line. */
static int locks_init(struct hearth_pool *pool)
{
    int r = pthread_condattr_init(&pool->wake_attributes);
    if (r != 0)
        return -r;
    r = pthread_condattr_setclock(&pool->wake_attributes, CLOCK_MONOTONIC);
    if (r == 0)
        r = pthread_mutex_init(&pool->lock, NULL);
    if (r != 0)
        pthread_condattr_destroy(&pool->wake_attributes);
    return -r;
}

static int open_minimum(struct hearth_pool *pool)
{
    for (uint32_t i = 0; i < pool->options.min_connections; i++) {
        struct entry *entry;
        int r = entry_new(pool, UINT64_MAX, &entry, pool->message.text);
        if (r < 0)
            return r;
        entry->idle_since_us = entry->created_us;
        TAILQ_INSERT_HEAD(&pool->idle, entry, link);
        pool->n_idle++;
        pool->open++;
        pool->stats.created++;
        pool->met = true;
    }
    return 0;
}

static struct hearth_pool *pool_destroy(struct hearth_pool *pool)
{
    entries_close(&pool->idle);
    pthread_condattr_destroy(&pool->wake_attributes);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
    return NULL;
}

int pool_new(const struct hearth_pool_options *options, const struct clock *clock,
             struct hearth_pool **ret_pool)
{
    _cleanup_free_ struct hearth_pool *pool = calloc(1, sizeof(*pool));
    if (!pool)
        return -ENOMEM;
    int r = options_copy(pool, options);
    if (r < 0)
        return r;
    TAILQ_INIT(&pool->idle);
    TAILQ_INIT(&pool->waiters);
    TAILQ_INIT(&pool->calls);
    pool->clock = clock;
    r = locks_init(pool);
    if (r < 0)
        return r;
    r = open_minimum(pool);
    if (r < 0) {
        pool_destroy(TAKE_PTR(pool));
        return r;
    }
    *ret_pool = TAKE_PTR(pool);
    return 0;
}

int hearth_pool_new(const struct hearth_pool_options *options, struct hearth_pool **ret_pool)
{
    return pool_new(options, &real_clock, ret_pool);
}

struct hearth_pool *hearth_pool_free(struct hearth_pool *pool)
{
    return pool ? pool_destroy(pool) : NULL;
}
