/* Connections shared between threads. Idle ones are a list with the warmest in front: it is used
 * next, so that what the load does not need grows old at the end and is closed. Connecting, looking
 * whether a connection still lives, and closing happen outside the lock: a slow daemon holds up
 * only whoever waits for it. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <time.h>

#include "lib/cleanup.h"
#include "lib/client.h"
#include "lib/hearth.h"

#define POOL_MAX_CONNECTIONS 4096u

/* A connection of the pool: on a list of it, or out with its user. */
struct entry {
    struct hearth *connection;
    uint64_t created_us, idle_since_us;
    TAILQ_ENTRY(entry) link;
};
TAILQ_HEAD(entries, entry);

/* Options and strings are fixed after hearth_pool_new(); all the rest is guarded by `lock`, under
 * which no system call on a connection is made. */
struct hearth_pool {
    struct hearth_pool_options options;
    char socket_path[HEARTH_PATH_BYTES];
    char client_name[CLIENT_MAX_CLIENT_NAME + 1];

    pthread_mutex_t lock;
    pthread_cond_t returned; /* a connection came back, or there is room for a new one */
    struct entries idle;     /* front: used last */
    uint32_t n_idle;
    uint32_t open; /* idle, out, and being connected */
    struct hearth_pool_stats stats;
    struct fault message; /* why the last acquisition failed */
};

static const struct hearth_pool_options options_defaults = HEARTH_POOL_OPTIONS_INIT;

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
    entry->created_us = client_now_us();
    entry->connection->pool_entry = entry;
    *ret_entry = TAKE_PTR(entry);
    return 0;
}

/* Whether an idle connection is still good: takes in what the daemon said meanwhile (goaway, the
 * end). Health checks that ask the daemon belong here too. */
static bool entry_check(struct entry *entry)
{
    return hearth_dispatch(entry->connection) >= 0 && client_is_reusable(entry->connection);
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

/* Moves the idle connections that are past their time, the coldest first, to `expired`: the caller
 * closes them once the lock is given back. */
static void take_expired(struct hearth_pool *pool, struct entries *expired)
{
    uint64_t now = client_now_us();
    struct entry *entry, *next;
    for (entry = TAILQ_LAST(&pool->idle, entries); entry; entry = next) {
        next = TAILQ_PREV(entry, entries, link);
        bool aged = entry_aged(pool, entry, now);
        if (!aged && !entry_too_idle(pool, entry, now))
            continue;
        pool->stats.closed_aged += aged;
        pool->stats.closed_idle += !aged;
        TAILQ_REMOVE(&pool->idle, entry, link);
        TAILQ_INSERT_TAIL(expired, entry, link);
        pool->n_idle--;
        pool->open--;
        pthread_cond_signal(&pool->returned);
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

/* What acquire goes on with: an idle connection to look at, leave to open one (NULL, counted in
 * `open` already), or -ETIMEDOUT. */
static int take_or_wait(struct hearth_pool *pool, uint64_t deadline_us, struct entries *expired,
                        bool *waited, struct entry **ret_entry)
{
    struct timespec deadline = {.tv_sec = (time_t)(deadline_us / 1000000u),
                                .tv_nsec = (long)(deadline_us % 1000000u) * 1000};
    for (int r = 0;;) {
        take_expired(pool, expired);
        struct entry *entry = take_idle(pool);
        if (entry || pool->open < pool->options.max_connections) {
            pool->open += !entry;
            *ret_entry = entry;
            return 0;
        }
        if (r != 0)
            break;
        pool->stats.waits += !*waited;
        *waited = true;
        r = deadline_us == UINT64_MAX
                ? pthread_cond_wait(&pool->returned, &pool->lock)
                : pthread_cond_timedwait(&pool->returned, &pool->lock, &deadline);
    }
    pool->stats.timeouts++;
    return fault_set(&pool->message, -ETIMEDOUT,
                     "all %u connections of the pool stayed in use: raise max_connections or wait "
                     "longer",
                     pool->options.max_connections);
}

/* A place among the open ones is free again. */
static void give_place(struct hearth_pool *pool)
{
    pool->open--;
    pthread_cond_signal(&pool->returned);
}

/* ---- acquire and release ---- */

/* An idle connection of the pool if it is good; else it is closed and its place given back. */
static bool use_idle(struct hearth_pool *pool, struct entry *entry)
{
    bool good = entry_check(entry);
    pthread_mutex_lock(&pool->lock);
    if (good) {
        pool->stats.acquired++;
        pool->stats.reused += hearth_requests_sent(entry->connection) > 0;
    } else {
        pool->stats.closed_broken++;
        give_place(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    if (!good)
        entry_free(entry);
    return good;
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
        *ret_entry = entry;
    } else {
        pool->stats.failed++;
        pool->message = fault;
        give_place(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    return r;
}

int hearth_pool_acquire(struct hearth_pool *pool, uint64_t timeout_us, struct hearth **ret_hearth)
{
    uint64_t deadline_us;
    if (__builtin_add_overflow(client_now_us(), timeout_us, &deadline_us))
        deadline_us = UINT64_MAX;
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    struct entry *entry = NULL;
    bool waited = false, found = false;
    int r;
    /* Each round but the last closes one idle connection that had gone bad. */
    do {
        pthread_mutex_lock(&pool->lock);
        r = take_or_wait(pool, deadline_us, &expired, &waited, &entry);
        pthread_mutex_unlock(&pool->lock);
        entries_close(&expired);
        found = r >= 0 && (!entry || use_idle(pool, entry));
    } while (r >= 0 && !found);
    if (r >= 0 && !entry)
        r = use_new(pool, deadline_us, &entry);
    if (r < 0)
        return r;
    *ret_hearth = entry->connection;
    return 0;
}

void hearth_pool_release(struct hearth_pool *pool, struct hearth *h)
{
    if (!h)
        return;
    struct entry *entry = h->pool_entry;
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    bool good = client_is_reusable(h);
    uint64_t now = client_now_us();
    pthread_mutex_lock(&pool->lock);
    if (good) {
        entry->idle_since_us = now;
        TAILQ_INSERT_HEAD(&pool->idle, entry, link);
        pool->n_idle++;
        pthread_cond_signal(&pool->returned);
    } else {
        pool->stats.closed_broken++;
        give_place(pool);
    }
    take_expired(pool, &expired);
    pthread_mutex_unlock(&pool->lock);
    if (!good)
        entry_free(entry);
    entries_close(&expired);
}

void hearth_pool_maintain(struct hearth_pool *pool)
{
    struct entries expired = TAILQ_HEAD_INITIALIZER(expired);
    pthread_mutex_lock(&pool->lock);
    take_expired(pool, &expired);
    pthread_mutex_unlock(&pool->lock);
    entries_close(&expired);
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

/* The caller's strings are copied: the pool outlives them. */
static int options_copy(struct hearth_pool *pool, const struct hearth_pool_options *options)
{
    const struct hearth_options *given = &options->connection;
    if (options->size != sizeof(*options) || given->size != sizeof(*given))
        return -EINVAL;
    if (options->max_connections == 0 || options->max_connections > POOL_MAX_CONNECTIONS ||
        options->min_connections > options->max_connections)
        return -EINVAL;
    pool->options = *options;
    int r = hearth_socket_path(given->socket_path, pool->socket_path);
    if (r < 0)
        return r;
    pool->options.connection.socket_path = pool->socket_path;
    if (given->client_name) {
        strncpy(pool->client_name, given->client_name, sizeof(pool->client_name) - 1);
        pool->options.connection.client_name = pool->client_name;
    }
    return 0;
}

static int condition_init(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;
    int r = pthread_condattr_init(&attributes);
    if (r != 0)
        return -r;
    r = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (r == 0)
        r = pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
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
    }
    return 0;
}

static struct hearth_pool *pool_destroy(struct hearth_pool *pool)
{
    entries_close(&pool->idle);
    pthread_cond_destroy(&pool->returned);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
    return NULL;
}

int hearth_pool_new(const struct hearth_pool_options *options, struct hearth_pool **ret_pool)
{
    _cleanup_free_ struct hearth_pool *pool = calloc(1, sizeof(*pool));
    if (!pool)
        return -ENOMEM;
    int r = options_copy(pool, options ? options : &options_defaults);
    if (r < 0)
        return r;
    TAILQ_INIT(&pool->idle);
    r = condition_init(&pool->returned);
    if (r < 0)
        return r;
    r = -pthread_mutex_init(&pool->lock, NULL);
    if (r < 0) {
        pthread_cond_destroy(&pool->returned);
        return r;
    }
    r = open_minimum(pool);
    if (r < 0) {
        pool_destroy(TAKE_PTR(pool));
        return r;
    }
    *ret_pool = TAKE_PTR(pool);
    return 0;
}

struct hearth_pool *hearth_pool_free(struct hearth_pool *pool)
{
    return pool ? pool_destroy(pool) : NULL;
}
