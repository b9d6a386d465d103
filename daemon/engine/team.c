#include "daemon/engine/team.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/thread.h"

/* Looks at a word this many times before sleeping on it: some 20 us, several barriers. */
#define TEAM_SPINS 4000u
/* Jobs timed at the start. */
#define TEAM_PROBES 32u

/* The state word: number of the job above, chunks not yet taken below. A successful exchange
 * proves that the job whose fields were read is still the current one: the next is only written
 * once every chunk of this one is done. 40 bits of job number do not come round in a helper's
 * sleep. */
#define LEFT_BITS 24u
#define LEFT_MASK ((UINT64_C(1) << LEFT_BITS) - 1)

static_assert(TEAM_MAX_CHUNKS < LEFT_MASK, "the counter holds every chunk");

struct team {
    /* written by the engine thread before `state` is published, read by helpers after it */
    _Atomic(team_fn) fn;
    _Atomic(void *) arg;
    _Atomic uint32_t n_chunks;

    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic uint32_t done;  /* chunks finished; the engine thread sleeps on it */
    _Atomic uint32_t waiting;            /* the engine thread sleeps, or is about to */
    _Alignas(64) _Atomic uint32_t epoch; /* changes with every job; helpers sleep on it */
    _Atomic uint32_t sleepers;           /* helpers that sleep, or are about to */
    _Atomic bool stop;

    uint32_t n_threads;
    uint32_t min_us;
    struct helper {
        struct team *team;
        uint32_t number;
        pthread_t thread;
    } helpers[]; /* n_threads - 1 */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t expected)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Takes and does chunks of the current job until none is left. */
static void team_work(struct team *team, uint32_t thread)
{
    uint64_t state = atomic_load_explicit(&team->state, memory_order_acquire);

    while (state & LEFT_MASK) {
        team_fn fn = atomic_load_explicit(&team->fn, memory_order_relaxed);
        void *arg = atomic_load_explicit(&team->arg, memory_order_relaxed);
        uint32_t n = atomic_load_explicit(&team->n_chunks, memory_order_relaxed);
        uint32_t chunk = n - (uint32_t)(state & LEFT_MASK);

        if (!atomic_compare_exchange_weak_explicit(&team->state, &state, state - 1,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        fn(arg, chunk, thread);
        /* sequentially consistent against `waiting`: one of the two sides sees the other */
        if (atomic_fetch_add(&team->done, 1) + 1 == n && atomic_load(&team->waiting))
            futex_wake(&team->done);
        state = atomic_load_explicit(&team->state, memory_order_acquire);
    }
}

/* Until the epoch leaves `seen`: spins, then sleeps. */
static void helper_wait(struct team *team, uint32_t seen)
{
    for (uint32_t i = 0; i < TEAM_SPINS; i++) {
        if (atomic_load_explicit(&team->epoch, memory_order_acquire) != seen)
            return;
        relax();
    }
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->epoch) == seen)
        futex_wait(&team->epoch, seen);
    atomic_fetch_sub(&team->sleepers, 1);
}

static void *helper_main(void *userdata)
{
    struct helper *helper = userdata;
    struct team *team = helper->team;
    uint32_t seen = 0, now;

    while (!atomic_load(&team->stop)) {
        now = atomic_load_explicit(&team->epoch, memory_order_acquire);
        if (now == seen) {
            helper_wait(team, seen);
            continue;
        }
        seen = now;
        team_work(team, helper->number);
    }
    return NULL;
}

/* Until every chunk is done; the last ones may be with helpers. */
static void team_wait(struct team *team, uint32_t n_chunks)
{
    uint32_t done;

    for (uint32_t i = 0; i < TEAM_SPINS; i++) {
        if (atomic_load_explicit(&team->done, memory_order_acquire) == n_chunks)
            return;
        relax();
    }
    atomic_store(&team->waiting, 1);
    while ((done = atomic_load(&team->done)) != n_chunks)
        futex_wait(&team->done, done);
    atomic_store(&team->waiting, 0);
}

void team_run(struct team *team, team_fn fn, void *arg, uint32_t n_chunks)
{
    uint64_t job;

    if (team->n_threads == 1 || n_chunks <= 1) {
        for (uint32_t i = 0; i < n_chunks; i++)
            fn(arg, i, 0);
        return;
    }
    atomic_store_explicit(&team->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&team->arg, arg, memory_order_relaxed);
    atomic_store_explicit(&team->n_chunks, n_chunks, memory_order_relaxed);
    atomic_store_explicit(&team->done, 0, memory_order_relaxed);
    job = (atomic_load_explicit(&team->state, memory_order_relaxed) >> LEFT_BITS) + 1;
    atomic_store_explicit(&team->state, job << LEFT_BITS | n_chunks, memory_order_release);
    /* sequentially consistent against `sleepers`: a helper sees the epoch or is seen */
    atomic_fetch_add(&team->epoch, 1);
    if (atomic_load(&team->sleepers))
        futex_wake(&team->epoch);
    team_work(team, 0);
    team_wait(team, n_chunks);
}

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void probe_chunk(void *arg, uint32_t chunk, uint32_t thread)
{
    (void)arg;
    (void)chunk;
    (void)thread;
    for (uint32_t i = 0; i < 64; i++)
        relax();
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* The median of a row of nearly empty jobs, a microsecond at least. */
static uint32_t team_measure(struct team *team)
{
    uint64_t took_ns[TEAM_PROBES];

    for (uint32_t i = 0; i < TEAM_PROBES; i++) {
        uint64_t begin = now_ns();

        team_run(team, probe_chunk, NULL, 2 * team->n_threads);
        took_ns[i] = now_ns() - begin;
    }
    qsort(took_ns, TEAM_PROBES, sizeof(took_ns[0]), compare_u64);
    return (uint32_t)MIN(took_ns[TEAM_PROBES / 2] / 1000 + 1, 1000000u);
}

static uint32_t cpus_allowed(void)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) < 0)
        return 1;
    return (uint32_t)MAX(CPU_COUNT(&set), 1);
}

int team_new(uint32_t threads, struct team **ret_team, struct fault *ret_fault)
{
    struct team *team;
    size_t bytes;
    int r = 0;

    threads = threads > 0 ? threads : TEAM_MAX_THREADS;
    threads = MIN(MIN(threads, cpus_allowed()), TEAM_MAX_THREADS);
    bytes = sizeof(*team) + (threads - 1) * sizeof(team->helpers[0]);
    team = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    if (!team)
        return fault_set(ret_fault, -ENOMEM, "no memory for a team of %u threads", threads);
    memset(team, 0, bytes);
    team->n_threads = 1;
    for (uint32_t i = 0; i + 1 < threads && r == 0; i++) {
        team->helpers[i].team = team;
        team->helpers[i].number = i + 1;
        r = thread_start(&team->helpers[i].thread, "hearth-compute", helper_main,
                         &team->helpers[i]);
        if (r == 0)
            team->n_threads++;
    }
    if (r < 0) {
        team_free(team);
        return fault_set(ret_fault, r, "cannot start %u compute threads: %s", threads,
                         strerror(-r));
    }
    team->min_us = team->n_threads > 1 ? team_measure(team) : 0;
    *ret_team = team;
    return 0;
}

struct team *team_free(struct team *team)
{
    if (!team)
        return NULL;
    atomic_store(&team->stop, true);
    atomic_fetch_add(&team->epoch, 1);
    futex_wake(&team->epoch);
    for (uint32_t i = 0; i + 1 < team->n_threads; i++)
        pthread_join(team->helpers[i].thread, NULL);
    free(team);
    return NULL;
}

uint32_t team_threads(const struct team *team)
{
    return team->n_threads;
}

uint32_t team_min_us(const struct team *team)
{
    return team->min_us;
}
