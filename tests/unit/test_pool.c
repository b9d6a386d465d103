/* Connections shared between threads, against a daemon of the test's own. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "lib/client.h"
#include "tests/unit/fake_daemon.h"

#define PATIENCE_US 20000000u

static struct hearth_pool *must_open(const struct fake *fake, uint32_t min, uint32_t max,
                                     uint64_t idle_us)
{
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    options.connection.socket_path = fake->path;
    options.min_connections = min;
    options.max_connections = max;
    options.idle_timeout_us = idle_us;
    options.max_age_us = 0;
    cr_assert_eq(hearth_pool_new(&options, &pool), 0);
    return pool;
}

static struct hearth *must_acquire(struct hearth_pool *pool)
{
    struct hearth *h = NULL;
    cr_assert_eq(hearth_pool_acquire(pool, PATIENCE_US, &h), 0);
    cr_assert_not_null(h);
    return h;
}

static struct hearth_pool_stats stats_of(struct hearth_pool *pool)
{
    struct hearth_pool_stats stats = {.size_of = sizeof(stats)};
    hearth_pool_get_stats(pool, &stats);
    cr_assert_eq(stats.open, stats.idle + stats.busy);
    return stats;
}

static void count_done(void *userdata, const struct hearth_reply *reply)
{
    *(int *)userdata += reply->kind == HEARTH_DONE;
}

static void use_once(struct hearth *h)
{
    uint64_t id;
    int done = 0;
    cr_assert_eq(hearth_null(h, count_done, &done, &id), 0);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_eq(done, 1);
}

Test(pool, a_connection_is_used_again)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 4, 0);
    cr_assert_eq(fake.accepted, 0, "none is opened before it is wanted");
    for (int i = 0; i < 10; i++) {
        struct hearth *h = must_acquire(pool);
        use_once(h);
        hearth_pool_release(pool, h);
    }
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 1 && stats.reused == 9 && stats.acquired == 10);
    cr_assert(stats.open == 1 && stats.idle == 1 && stats.waits == 0 && stats.failed == 0);
    hearth_pool_release(pool, NULL);
    cr_assert_null(hearth_pool_free(pool));
    cr_assert_null(hearth_pool_free(NULL));
    fake_stop(&fake);
    cr_assert_eq(fake.accepted, 1);
}

Test(pool, it_grows_on_demand_and_hands_out_the_warmest_first)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 3, 0);
    struct hearth *a = must_acquire(pool), *b = must_acquire(pool), *c = must_acquire(pool);
    cr_assert(a != b && b != c && a != c);
    cr_assert_eq(stats_of(pool).busy, 3);
    hearth_pool_release(pool, b);
    hearth_pool_release(pool, a);
    hearth_pool_release(pool, c);
    cr_assert_eq(must_acquire(pool), c);
    cr_assert_eq(must_acquire(pool), a);
    hearth_pool_release(pool, c);
    cr_assert_eq(must_acquire(pool), c);
    hearth_pool_release(pool, a);
    hearth_pool_release(pool, c);
    cr_assert_eq(stats_of(pool).created, 3);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, the_minimum_is_opened_at_once_and_a_fresh_connection_is_no_reuse)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 3, 5, 0);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 3 && stats.idle == 3);
    struct hearth *h = must_acquire(pool);
    cr_assert_eq(stats_of(pool).reused, 0);
    hearth_pool_release(pool, h);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, when_all_are_out_a_wait_ends_in_time)
{
    struct fake fake;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES];
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 2, 0);
    struct hearth *a = must_acquire(pool), *b = must_acquire(pool);
    cr_assert_eq(hearth_pool_acquire(pool, 20000, &h), -ETIMEDOUT);
    cr_assert_eq(hearth_pool_acquire(pool, 0, &h), -ETIMEDOUT);
    cr_assert_null(h);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.waits == 2 && stats.timeouts == 2 && stats.open == 2);
    hearth_pool_get_message(pool, message);
    cr_assert_not_null(strstr(message, "all 2 connections"), "%s", message);
    hearth_pool_release(pool, a);
    cr_assert_eq(must_acquire(pool), a);
    hearth_pool_release(pool, a);
    hearth_pool_release(pool, b);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

struct taker {
    struct hearth_pool *pool;
    atomic_int stage; /* 1: about to wait, 2: has got one */
};

static void *take_one(void *userdata)
{
    struct taker *taker = userdata;
    struct hearth *h = NULL;
    atomic_store(&taker->stage, 1);
    if (hearth_pool_acquire(taker->pool, PATIENCE_US, &h) == 0) {
        atomic_store(&taker->stage, 2);
        hearth_pool_release(taker->pool, h);
    }
    return NULL;
}

Test(pool, a_waiter_gets_what_comes_back_or_the_place_of_what_broke)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    for (int broken = 0; broken < 2; broken++) {
        struct taker taker = {.pool = pool};
        pthread_t thread;
        struct hearth *h = must_acquire(pool);
        uint64_t before = stats_of(pool).waits;
        pthread_create(&thread, NULL, take_one, &taker);
        while (stats_of(pool).waits == before)
            usleep(500);
        cr_assert_eq(taker.stage, 1);
        if (broken)
            cr_assert_eq(hearth_null(h, NULL, NULL, NULL), 0); /* given back in use */
        hearth_pool_release(pool, h);
        pthread_join(thread, NULL);
        cr_assert_eq(taker.stage, 2);
    }
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 2 && stats.closed_broken == 1 && stats.open == 1);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, what_is_idle_too_long_is_closed_down_to_the_minimum)
{
    struct fake fake;
    struct hearth *out[4];
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 1, 4, 10000);
    for (int i = 0; i < 4; i++)
        out[i] = must_acquire(pool);
    for (int i = 0; i < 4; i++)
        hearth_pool_release(pool, out[i]);
    usleep(15000);
    hearth_pool_maintain(pool);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.open == 1 && stats.idle == 1 && stats.closed_idle == 3);
    cr_assert_eq(must_acquire(pool), out[3], "the warmest stays");
    hearth_pool_release(pool, out[3]);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, what_is_too_old_is_closed_even_below_the_minimum)
{
    struct fake fake;
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    fake_start(&fake, fake_serve_done);
    options.connection.socket_path = fake.path;
    options.min_connections = 2;
    options.max_age_us = 10000;
    cr_assert_eq(hearth_pool_new(&options, &pool), 0);
    struct hearth *h = must_acquire(pool);
    usleep(15000);
    use_once(h); /* one in use is never closed under its user */
    cr_assert_leq(stats_of(pool).closed_aged, 1);
    hearth_pool_release(pool, h);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.closed_aged == 2 && stats.open == 0);
    h = must_acquire(pool);
    use_once(h);
    hearth_pool_release(pool, h);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

/* Answers one request, then says goaway and closes, or only closes. */
static void serve_one_and_leave(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_done(&out, frame.header.id, NULL);
    if (!fake_send(fd, &out))
        return;
    if (atomic_fetch_add(&fake->seen, 1) % 2 == 0) {
        fake_put_goaway(&out);
        fake_send(fd, &out);
        while (fake_next(fd, &frame))
            ; /* goes on until the client closes */
    }
    shutdown(fd, SHUT_RDWR);
    atomic_fetch_add(&fake->note, 1);
}

Test(pool, what_the_daemon_has_left_is_replaced_unseen)
{
    struct fake fake;
    fake_start(&fake, serve_one_and_leave);
    struct hearth_pool *pool = must_open(&fake, 0, 2, 0);
    for (int i = 0; i < 6; i++) {
        struct hearth *h = must_acquire(pool);
        use_once(h);
        if (i % 2 == 0)
            while (!hearth_going_away(h))
                cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
        hearth_pool_release(pool, h);
        while (atomic_load(&fake.note) <= i)
            usleep(500); /* until its end is closed for certain */
    }
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 6 && stats.acquired == 6 && stats.reused == 0);
    cr_assert_geq(stats.closed_broken, 5);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, one_given_back_with_a_live_request_is_closed)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 2, 0);
    struct hearth *h = must_acquire(pool);
    cr_assert_eq(hearth_null(h, NULL, NULL, NULL), 0);
    hearth_pool_release(pool, h);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.closed_broken == 1 && stats.open == 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, without_a_daemon_the_reason_is_told_and_no_place_is_lost)
{
    struct fake fake;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES];
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    fake_stop(&fake);
    for (int i = 0; i < 3; i++)
        cr_assert_eq(hearth_pool_acquire(pool, PATIENCE_US, &h), -ENOENT);
    hearth_pool_get_message(pool, message);
    cr_assert_not_null(strstr(message, "no daemon at"), "%s", message);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.failed == 3 && stats.open == 0 && stats.acquired == 0);
    hearth_pool_free(pool);
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    options.connection.socket_path = fake.path;
    options.min_connections = 1;
    cr_assert_eq(hearth_pool_new(&options, &pool), -ENOENT, "the minimum needs a daemon");
}

Test(pool, impossible_options_are_refused)
{
    struct hearth_pool *pool = NULL;
    struct hearth_pool_options bad[5];
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        bad[i] = (struct hearth_pool_options)HEARTH_POOL_OPTIONS_INIT;
    bad[0].size = 0;
    bad[1].connection.size = 1;
    bad[2].max_connections = 0;
    bad[3].max_connections = 1000000;
    bad[4].min_connections = 17;
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        cr_assert_eq(hearth_pool_new(&bad[i], &pool), -EINVAL, "case %zu", i);
    cr_assert_null(pool);
}

Test(pool, its_strings_are_its_own)
{
    struct fake fake;
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    char path[HEARTH_PATH_BYTES], name[] = "tester";
    fake_start(&fake, fake_serve_done);
    memcpy(path, fake.path, sizeof(path));
    options.connection.socket_path = path;
    options.connection.client_name = name;
    cr_assert_eq(hearth_pool_new(&options, &pool), 0);
    memset(path, 'x', sizeof(path));
    memset(name, '\0', sizeof(name));
    struct hearth *h = must_acquire(pool);
    hearth_pool_release(pool, h);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

#define THREADS 8
#define ROUNDS  200

struct worker {
    struct hearth_pool *pool;
    atomic_int *out, *most;
    int done, failed;
};

static void *work(void *userdata)
{
    struct worker *worker = userdata;
    for (int i = 0; i < ROUNDS; i++) {
        struct hearth *h = NULL;
        uint64_t id;
        if (hearth_pool_acquire(worker->pool, PATIENCE_US, &h) < 0) {
            worker->failed++;
            continue;
        }
        int out = atomic_fetch_add(worker->out, 1) + 1;
        int most = atomic_load(worker->most);
        while (out > most && !atomic_compare_exchange_weak(worker->most, &most, out))
            ;
        int before = worker->done;
        if (hearth_null(h, count_done, &worker->done, &id) < 0 ||
            hearth_finish(h, id, PATIENCE_US) < 0 || worker->done != before + 1)
            worker->failed++;
        atomic_fetch_sub(worker->out, 1);
        hearth_pool_release(worker->pool, h);
    }
    return NULL;
}

Test(pool, many_threads_share_few_connections)
{
    struct fake fake;
    struct worker workers[THREADS];
    pthread_t threads[THREADS];
    atomic_int out = 0, most = 0;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 3, 0);
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.pool = pool, .out = &out, .most = &most};
        cr_assert_eq(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert(workers[i].done == ROUNDS && workers[i].failed == 0);
    }
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert_leq(most, 3);
    cr_assert_leq(stats.created, 3);
    cr_assert(stats.acquired == THREADS * ROUNDS && stats.busy == 0 && stats.timeouts == 0);
    cr_assert_eq(stats.reused + stats.created, stats.acquired);
    hearth_pool_free(pool);
    fake_stop(&fake);
    cr_assert_eq(fake.seen, THREADS * ROUNDS);
}
