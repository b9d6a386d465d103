/* Connections shared between threads, against a daemon of the test's own. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "lib/client.h"
#include "lib/pool.h"
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

#define SECOND_US 1000000u
#define MINUTE_US (60u * SECOND_US)

/* Time that passes when a test says so, and by `step_us` with each look at the clock. */
struct test_clock {
    struct clock clock; /* first: looked at through it */
    atomic_ullong now_us;
    uint64_t step_us;
};

static uint64_t test_now(const struct clock *clock)
{
    struct test_clock *test = (struct test_clock *)clock;
    return atomic_fetch_add(&test->now_us, test->step_us);
}

#define TEST_CLOCK_INIT                                    \
    {                                                      \
        .clock = {.now_us = test_now}, .now_us = MINUTE_US \
    }

static void pass(struct test_clock *clock, uint64_t us)
{
    atomic_fetch_add(&clock->now_us, us);
}

/* A pool with the defaults but for its size, and with patience for a ping on a busy machine. */
static struct hearth_pool *must_open_in(struct test_clock *clock, const struct fake *fake,
                                        uint32_t min, uint32_t max)
{
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    options.connection.socket_path = fake->path;
    options.min_connections = min;
    options.max_connections = max;
    options.health_timeout_us = PATIENCE_US;
    cr_assert_eq(pool_new(&options, &clock->clock, &pool), 0);
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
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 1, 4);
    for (int i = 0; i < 4; i++)
        out[i] = must_acquire(pool);
    for (int i = 0; i < 4; i++)
        hearth_pool_release(pool, out[i]);
    pass(&clock, 5 * MINUTE_US - 1);
    hearth_pool_maintain(pool);
    cr_assert_eq(stats_of(pool).open, 4, "not before 5 minutes");
    pass(&clock, 1);
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
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 2, 4);
    struct hearth *h = must_acquire(pool);
    pass(&clock, 10 * MINUTE_US - 1);
    hearth_pool_maintain(pool);
    cr_assert_eq(stats_of(pool).closed_aged, 0, "not before 10 minutes");
    pass(&clock, 1);
    hearth_pool_maintain(pool);
    cr_assert_eq(stats_of(pool).closed_aged, 1, "one in use is never closed under its user");
    use_once(h);
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
    struct hearth_pool_options bad[8];
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        bad[i] = (struct hearth_pool_options)HEARTH_POOL_OPTIONS_INIT;
    bad[0].size = 0;
    bad[1].connection.size = 1;
    bad[2].max_connections = 0;
    bad[3].max_connections = 1000000;
    bad[4].min_connections = 17;
    bad[5].connection.size = SIZE_MAX & ~(size_t)7;
    bad[6].connection.size += 4; /* no struct of these members is as long as that */
    bad[7].size -= sizeof(uint64_t);
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        cr_assert_eq(hearth_pool_new(&bad[i], &pool), -EINVAL, "case %zu", i);
    cr_assert_null(pool);
}

/* As a program would hand them in that was built with a later header: both structs are longer. */
struct later_options {
    size_t size;
    struct {
        struct hearth_options now;
        uint64_t later;
    } connection;
    uint32_t min_connections, max_connections;
    uint64_t idle_timeout_us, max_age_us, health_every_us, health_timeout_us, later;
};

static int open_later(const struct later_options *options, struct hearth_pool **ret_pool)
{
    return hearth_pool_new((const void *)options, ret_pool);
}

Test(pool, options_of_a_later_version_are_taken_while_their_ends_are_empty)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct later_options options = {.size = sizeof(options),
                                    .connection = {.now = HEARTH_OPTIONS_INIT},
                                    .min_connections = 2,
                                    .max_connections = 3,
                                    .health_timeout_us = PATIENCE_US};
    struct hearth_pool *pool = NULL;
    struct hearth *out[3], *none = NULL;
    options.connection.now.socket_path = fake.path;
    options.connection.now.size = sizeof(options.connection);
    cr_assert_eq(open_later(&options, &pool), 0);
    cr_assert_eq(stats_of(pool).open, 2);
    for (int i = 0; i < 3; i++)
        out[i] = must_acquire(pool);
    cr_assert_eq(hearth_pool_acquire(pool, 0, &none), -ETIMEDOUT, "what follows was understood");
    for (int i = 0; i < 3; i++)
        hearth_pool_release(pool, out[i]);
    pool = hearth_pool_free(pool);
    options.later = 1;
    cr_assert_eq(open_later(&options, &pool), -EINVAL);
    options.later = 0;
    options.connection.later = 1;
    cr_assert_eq(open_later(&options, &pool), -EINVAL);
    cr_assert_null(pool);
    fake_stop(&fake);
}

Test(pool, a_completion_of_a_later_version_is_taken_while_its_end_is_empty)
{
    struct {
        struct hearth_generate now;
        uint64_t later;
    } request = {.now = HEARTH_GENERATE_INIT};
    struct fake fake;
    char message[HEARTH_MESSAGE_BYTES];
    int done = 0;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    request.now.size = sizeof(request);
    request.now.prompt = "a";
    cr_assert_eq(hearth_pool_complete(pool, &request.now, count_done, &done, PATIENCE_US), 0);
    cr_assert_eq(done, 1);
    request.later = 1;
    cr_assert_eq(hearth_pool_complete(pool, &request.now, NULL, NULL, PATIENCE_US), -EINVAL);
    hearth_pool_get_message(pool, message);
    cr_assert_not_null(strstr(message, "does not know"), "%s", message);
    /* What ends before the first version did is no such struct. */
    request.now.size = sizeof(request.now) - sizeof(uint64_t);
    cr_assert_eq(hearth_pool_complete(pool, &request.now, NULL, NULL, PATIENCE_US), -EINVAL);
    hearth_pool_get_message(pool, message);
    cr_assert_not_null(strstr(message, "HEARTH_GENERATE_INIT"), "%s", message);
    hearth_pool_free(pool);
    fake_stop(&fake);
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

/* ---- waiting in line ---- */

#define LINE 6

struct in_line {
    struct hearth_pool *pool;
    atomic_int *served;
    int place; /* when it was served, from 0 */
};

static void *wait_in_line(void *userdata)
{
    struct in_line *in_line = userdata;
    struct hearth *h = NULL;
    if (hearth_pool_acquire(in_line->pool, PATIENCE_US, &h) == 0) {
        in_line->place = atomic_fetch_add(in_line->served, 1);
        hearth_pool_release(in_line->pool, h);
    }
    return NULL;
}

Test(pool, who_waits_is_served_in_the_order_of_coming)
{
    struct fake fake;
    struct in_line line[LINE];
    pthread_t threads[LINE];
    atomic_int served = 0;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    struct hearth *h = must_acquire(pool);
    for (int i = 0; i < LINE; i++) {
        line[i] = (struct in_line){.pool = pool, .served = &served, .place = -1};
        pthread_create(&threads[i], NULL, wait_in_line, &line[i]);
        while (stats_of(pool).waits <= (uint64_t)i)
            usleep(500);
    }
    hearth_pool_release(pool, h);
    for (int i = 0; i < LINE; i++) {
        pthread_join(threads[i], NULL);
        cr_expect_eq(line[i].place, i, "number %d was served as number %d", i, line[i].place);
    }
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 1 && stats.waits == LINE && stats.timeouts == 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, one_that_is_too_old_goes_to_nobody_who_waits)
{
    struct fake fake;
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 0, 1);
    struct hearth *h = must_acquire(pool);
    struct taker taker = {.pool = pool};
    pthread_t thread;
    pthread_create(&thread, NULL, take_one, &taker);
    while (stats_of(pool).waits == 0)
        usleep(500);
    pass(&clock, 10 * MINUTE_US);
    hearth_pool_release(pool, h);
    pthread_join(thread, NULL);
    cr_assert_eq(taker.stage, 2);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 2 && stats.closed_aged == 1 && stats.closed_broken == 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

/* ---- health ---- */

Test(pool, what_answers_its_ping_stays_and_a_ping_is_no_request)
{
    struct fake fake;
    struct hearth *out[3];
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 0, 3);
    for (int i = 0; i < 3; i++)
        out[i] = must_acquire(pool);
    for (int i = 0; i < 3; i++)
        hearth_pool_release(pool, out[i]);
    pass(&clock, 30 * SECOND_US);
    hearth_pool_maintain(pool);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert_eq(stats.health_passed, 3, "maintain asks each that is due");
    cr_assert(stats.health_failed == 0 && stats.idle == 3 && stats.created == 3);
    pass(&clock, 30 * SECOND_US);
    cr_assert_eq(must_acquire(pool), out[2], "they keep their order");
    stats = stats_of(pool);
    cr_assert_eq(stats.health_passed, 4, "acquire asks the one it takes");
    cr_assert_eq(stats.reused, 0, "only pings went over it");
    hearth_pool_release(pool, out[2]);
    cr_assert_eq(stats_of(pool).health_passed, 5, "release asks one other");
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, one_that_is_not_due_is_not_asked)
{
    struct fake fake;
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 0, 16);
    hearth_pool_release(pool, must_acquire(pool));
    pass(&clock, 30 * SECOND_US - 1);
    hearth_pool_release(pool, must_acquire(pool));
    hearth_pool_maintain(pool);
    cr_assert_eq(stats_of(pool).health_passed, 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
    cr_assert_eq(fake.seen, 0);
}

/* Answers everything but pings; the connections that come later answer those too. */
static void serve_deaf_first(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    bool deaf = atomic_load(&fake->accepted) <= 2;
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer out = {0};
        if (deaf && frame.header.type == WIRE_PING)
            continue;
        fake_put_done(&out, frame.header.id, "stop");
        if (!fake_send(fd, &out))
            return;
    }
}

Test(pool, what_does_not_answer_its_ping_is_replaced)
{
    struct fake fake;
    struct test_clock clock = TEST_CLOCK_INIT;
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    fake_start(&fake, serve_deaf_first);
    options.connection.socket_path = fake.path;
    options.health_timeout_us = 500000;
    cr_assert_eq(pool_new(&options, &clock.clock, &pool), 0);
    struct hearth *a = must_acquire(pool), *b = must_acquire(pool);
    use_once(a);
    use_once(b);
    hearth_pool_release(pool, a);
    pass(&clock, 30 * SECOND_US);
    hearth_pool_maintain(pool); /* a is asked, and closed */
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.health_failed == 1 && stats.closed_broken == 1 && stats.open == 1);
    hearth_pool_release(pool, b);
    pass(&clock, 30 * SECOND_US);
    struct hearth *c = must_acquire(pool); /* b is asked, and c is a new one */
    use_once(c);
    stats = stats_of(pool);
    cr_assert_eq(stats.health_failed, 2);
    cr_assert(stats.created == 3 && stats.reused == 0 && stats.open == 1);
    hearth_pool_release(pool, c);
    pass(&clock, 30 * SECOND_US);
    c = must_acquire(pool);
    cr_assert_eq(stats_of(pool).reused, 1);
    hearth_pool_release(pool, c);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

/* Says goaway at once; the note counts those that have. */
static void serve_goaway(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_done(&out, frame.header.id, NULL);
    fake_put_goaway(&out);
    if (fake_send(fd, &out))
        atomic_fetch_add(&fake->note, 1);
    while (fake_next(fd, &frame))
        ;
}

Test(pool, maintain_closes_what_is_told_to_go_away_and_opens_nothing)
{
    struct fake fake;
    struct hearth *out[3];
    fake_start(&fake, serve_goaway);
    struct hearth_pool *pool = must_open(&fake, 3, 4, 0);
    for (int i = 0; i < 3; i++)
        out[i] = must_acquire(pool);
    for (int i = 0; i < 3; i++) {
        use_once(out[i]);
        hearth_pool_release(pool, out[i]);
    }
    while (atomic_load(&fake.note) < 3)
        usleep(500);
    hearth_pool_maintain(pool);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.open == 0 && stats.closed_broken == 3 && stats.created == 3);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

/* ---- failover: a daemon that breaks in the middle of a story ---- */

static const char story[] = "Once upon a time there was a lighthouse.";
#define STORY_SEED 4242u

/* What the n-th connection does with a completion, counted from 1. */
struct turn {
    int tell;              /* bytes of the story, counted from skip_bytes; -1: all, and done */
    const char *print;     /* the fingerprint it computes with */
    const char *error;     /* in place of the end: this code */
    bool no_origin, quiet; /* no seed and fingerprint; stays silent and does not close */
};

static const struct turn *turns;
static int n_turns;
/* What the completions asked for, by connection. */
static uint64_t asked_skip[8], asked_seed[8], asked_deadline[8];
static char asked_print[8][16];

static void put_story(struct wire_buffer *out, uint64_t id, const struct turn *turn, uint64_t from,
                      uint64_t to)
{
    for (uint64_t at = from; at < to;) {
        uint64_t n = MIN(to - at, (uint64_t)5);
        wire_begin(out, WIRE_TOKENS, id);
        if (at == from && !turn->no_origin) {
            wire_put_number(out, TAG_SEED, STORY_SEED);
            wire_put_text(out, TAG_FINGERPRINT, turn->print);
        }
        wire_put_bytes(out, TAG_TEXT, story + at, n);
        wire_end(out);
        at += n;
    }
}

static void put_error(struct wire_buffer *out, uint64_t id, const char *code, const char *option)
{
    wire_begin(out, WIRE_ERROR, id);
    wire_put_text(out, TAG_CODE, code);
    wire_put_text(out, TAG_SENTENCE, "so it is");
    if (option)
        wire_put_text(out, TAG_OPTION, option);
    wire_end(out);
}

static void play_turn(const struct fake_frame *frame, const struct turn *turn, int number, int fd)
{
    struct wire_buffer out = {0};
    uint64_t id = frame->header.id, skip = fake_number(frame, TAG_SKIP_BYTES, 0);
    asked_skip[number] = skip;
    asked_seed[number] = fake_number(frame, TAG_SEED, 0);
    asked_deadline[number] = fake_number(frame, TAG_DEADLINE_US, 0);
    bool has = fake_text(frame, TAG_FINGERPRINT, asked_print[number], sizeof(asked_print[0]));
    uint64_t end = turn->tell < 0 ? sizeof(story) - 1 : skip + (uint64_t)turn->tell;
    if (has && strcmp(asked_print[number], turn->print) != 0) {
        put_error(&out, id, "bad-request", "fingerprint");
    } else {
        put_story(&out, id, turn, skip, end);
        if (turn->error)
            put_error(&out, id, turn->error, NULL);
        else if (turn->tell < 0)
            fake_put_done(&out, id, "stop");
    }
    fake_send(fd, &out);
}

static void serve_turns(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    int number = atomic_fetch_add(&fake->seen, 1);
    if (number >= n_turns)
        return;
    play_turn(&frame, &turns[number], number, fd);
    if (turns[number].tell < 0 || turns[number].error || turns[number].quiet)
        while (fake_next(fd, &frame))
            ;
}

struct heard {
    char text[128];
    size_t bytes;
    int frames, origins, ends;
    enum hearth_reply_kind end;
    char code[32], option[32];
    bool lost;
};

static void hear(void *userdata, const struct hearth_reply *reply)
{
    struct heard *heard = userdata;
    cr_assert_eq(heard->ends, 0, "nothing comes behind the end");
    if (reply->kind == HEARTH_TOKENS) {
        cr_assert_lt(heard->bytes + reply->text_bytes, sizeof(heard->text));
        memcpy(heard->text + heard->bytes, reply->text, reply->text_bytes);
        heard->bytes += reply->text_bytes;
        heard->frames++;
        heard->origins += reply->fingerprint != NULL;
        return;
    }
    heard->ends++;
    heard->end = reply->kind;
    heard->lost = reply->lost;
    snprintf(heard->code, sizeof(heard->code), "%s", reply->code ? reply->code : "");
    snprintf(heard->option, sizeof(heard->option), "%s", reply->option ? reply->option : "");
}

/* Plays the turns against one request: what hearth_pool_complete() returns. */
static int tell(const struct turn *with, int n, const struct hearth_generate *request,
                uint64_t timeout_us, struct heard *ret_heard, struct hearth_pool_stats *ret_stats)
{
    struct fake fake;
    struct hearth_generate plain = HEARTH_GENERATE_INIT;
    plain.prompt = "Tell";
    turns = with;
    n_turns = n;
    *ret_heard = (struct heard){0};
    fake_start(&fake, serve_turns);
    struct hearth_pool *pool = must_open(&fake, 0, 2, 0);
    int r = hearth_pool_complete(pool, request ? request : &plain, hear, ret_heard, timeout_us);
    *ret_stats = stats_of(pool);
    cr_assert_eq(ret_stats->busy, 0, "the connection is back, whatever happened");
    hearth_pool_free(pool);
    fake_stop(&fake);
    return r;
}

Test(pool, a_whole_story_goes_over_one_connection_and_leaves_it_for_the_next)
{
    struct turn with[] = {{.tell = -1, .print = "one"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 1, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.text, story);
    cr_assert(heard.ends == 1 && heard.end == HEARTH_DONE && heard.origins == 1);
    cr_assert(stats.failovers == 0 && stats.created == 1 && stats.idle == 1);
}

Test(pool, a_request_of_which_nothing_has_come_is_sent_again_as_it_was)
{
    struct turn with[] = {{.tell = 0, .print = "one"}, {.tell = -1, .print = "two"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 2, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.text, story);
    cr_assert(heard.ends == 1 && heard.end == HEARTH_DONE);
    cr_assert(stats.failovers == 1 && stats.created == 2 && stats.closed_broken == 1);
    cr_assert(asked_skip[1] == 0 && asked_print[1][0] == '\0');
}

Test(pool, a_story_goes_on_where_it_broke_off)
{
    struct turn with[] = {
        {.tell = 10, .print = "one"}, {.tell = 13, .print = "one"}, {.tell = -1, .print = "one"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 3, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.text, story);
    cr_assert(heard.ends == 1 && heard.end == HEARTH_DONE);
    cr_assert_eq(heard.origins, 1, "the stream begins once");
    cr_assert_eq(stats.failovers, 2);
    for (int i = 1; i < 3; i++) {
        cr_assert_eq(asked_skip[i], i == 1 ? 10 : 23);
        cr_assert_eq(asked_seed[i], STORY_SEED);
        cr_assert_str_eq(asked_print[i], "one");
    }
}

Test(pool, a_callers_own_skip_is_added_to)
{
    struct turn with[] = {{.tell = 10, .print = "one"}, {.tell = -1, .print = "one"}};
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct hearth_pool_stats stats;
    struct heard heard;
    request.prompt = "Tell";
    request.skip_bytes = 5;
    request.fingerprint = "one";
    request.fingerprint_bytes = 3;
    cr_assert_eq(tell(with, 2, &request, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.text, story + 5);
    cr_assert_eq(asked_skip[0], 5);
    cr_assert_eq(asked_skip[1], 15);
}

Test(pool, another_fingerprint_ends_the_story_without_a_wrong_byte)
{
    /* The daemon refuses; or it does not look, and says so itself; or it says nothing of its
     * origin. */
    struct turn refuses[] = {{.tell = 10, .print = "one"}, {.tell = -1, .print = "two"}};
    struct turn silent[] = {{.tell = 10, .print = "one"},
                            {.tell = -1, .print = "one", .no_origin = true}};
    struct hearth_pool_stats stats;
    struct heard heard;
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(tell(i ? silent : refuses, 2, NULL, PATIENCE_US, &heard, &stats), 0);
        cr_assert_eq(heard.bytes, 10);
        cr_assert(heard.ends == 1 && heard.end == HEARTH_ERROR);
        cr_assert_str_eq(heard.code, "shutting-down", "case %d", i);
        cr_assert_eq(stats.failovers, 1);
    }
    /* A caller's own fingerprint that does not fit is the caller's business. */
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.prompt = "Tell";
    request.fingerprint = "old";
    request.fingerprint_bytes = 3;
    cr_assert_eq(tell(refuses, 1, &request, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.code, "bad-request");
    cr_assert_str_eq(heard.option, "fingerprint");
}

Test(pool, a_daemon_that_is_shutting_down_is_left_for_the_next)
{
    struct turn with[] = {{.tell = 15, .print = "one", .error = "shutting-down"},
                          {.tell = 0, .print = "one", .error = "shutting-down"},
                          {.tell = -1, .print = "one"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 3, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.text, story);
    cr_assert(stats.failovers == 2 && stats.created == 3 && stats.closed_broken == 2);
}

Test(pool, any_other_error_is_the_callers)
{
    struct turn with[] = {{.tell = 5, .print = "one", .error = "no-memory"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 1, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.code, "no-memory");
    cr_assert(stats.failovers == 0 && stats.idle == 1 && !heard.lost);
}

Test(pool, a_request_that_breaks_every_connection_is_given_up)
{
    struct turn with[] = {{.tell = 0, .print = "one"},
                          {.tell = 5, .print = "one"},
                          {.tell = 5, .print = "one"},
                          {.tell = 5, .print = "one"},
                          {.tell = -1, .print = "one"}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 5, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert(heard.end == HEARTH_ERROR && heard.lost && heard.bytes == 15);
    cr_assert(stats.failovers == 3 && stats.created == 4);
    /* Nor is one sent again whose text has come without an origin. */
    struct turn no_origin[] = {{.tell = 5, .print = "one", .no_origin = true}};
    cr_assert_eq(tell(no_origin, 1, NULL, PATIENCE_US, &heard, &stats), 0);
    cr_assert(heard.end == HEARTH_ERROR && heard.lost && heard.bytes == 5);
    cr_assert_eq(stats.failovers, 0);
}

Test(pool, time_runs_out_in_the_middle)
{
    struct turn with[] = {{.tell = 5, .print = "one", .quiet = true}};
    struct hearth_pool_stats stats;
    struct heard heard;
    cr_assert_eq(tell(with, 1, NULL, 50000, &heard, &stats), -ETIMEDOUT);
    cr_assert_eq(heard.ends, 0);
    cr_assert_eq(stats.open, 0, "closing it cancels the request");
}

Test(pool, a_deadline_goes_on_running_while_a_request_is_sent_again)
{
    struct turn with[] = {{.tell = 5, .print = "one"}, {.tell = -1, .print = "one"}};
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct hearth_pool_stats stats;
    struct heard heard;
    request.prompt = "Tell";
    request.deadline_us = 60000000;
    cr_assert_eq(tell(with, 2, &request, PATIENCE_US, &heard, &stats), 0);
    cr_assert_eq(asked_deadline[0], 60000000);
    cr_assert(asked_deadline[1] < 60000000 && asked_deadline[1] > 0);
    request.deadline_us = 1;
    cr_assert_eq(tell(with, 2, &request, PATIENCE_US, &heard, &stats), 0);
    cr_assert_str_eq(heard.code, "deadline");
}

Test(pool, without_a_daemon_a_completion_says_so_at_once)
{
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct hearth_pool *pool = NULL;
    struct heard heard = {0};
    char message[HEARTH_MESSAGE_BYTES];
    options.connection.socket_path = "/nonexistent/s";
    cr_assert_eq(hearth_pool_new(&options, &pool), 0);
    request.prompt = "Tell";
    cr_assert_eq(hearth_pool_complete(pool, &request, hear, &heard, PATIENCE_US), -ENOENT);
    cr_assert_eq(heard.ends, 0);
    hearth_pool_get_message(pool, message);
    cr_assert_not_null(strstr(message, "no daemon at"), "%s", message);
    request.manual_credit = true;
    cr_assert_eq(hearth_pool_complete(pool, &request, hear, &heard, PATIENCE_US), -EINVAL);
    request.size = 0;
    cr_assert_eq(hearth_pool_complete(pool, &request, hear, &heard, PATIENCE_US), -EINVAL);
    hearth_pool_free(pool);
}

/* Answers one request of each connection and closes it. */
static void serve_one(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    (void)fake;
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_done(&out, frame.header.id, "stop");
    fake_send(fd, &out);
}

static int tell_again(struct hearth_pool *pool)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct heard heard = {0};
    request.prompt = "Tell";
    int r = hearth_pool_complete(pool, &request, hear, &heard, PATIENCE_US);
    cr_assert_eq(heard.ends, r == 0);
    return r;
}

Test(pool, a_daemon_that_went_while_all_were_idle_is_looked_for_during_10_s)
{
    struct fake fake;
    struct test_clock clock = TEST_CLOCK_INIT;
    fake_start(&fake, serve_one);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 0, 2);
    cr_assert_eq(tell_again(pool), 0);
    fake_stop(&fake);
    clock.step_us = SECOND_US / 2; /* several looks at the clock with each try */
    uint64_t before = clock.now_us;
    cr_assert_eq(tell_again(pool), -ENOENT);
    cr_assert_geq(clock.now_us - before, 10 * SECOND_US);
    uint64_t failed = stats_of(pool).failed;
    cr_assert_gt(failed, 2, "it was looked for again and again");
    for (int i = 0; i < 3; i++)
        cr_assert_eq(tell_again(pool), -ENOENT);
    cr_assert_eq(stats_of(pool).failed, failed + 3, "one that stays away is missing at once");
    cr_assert_eq(stats_of(pool).failovers, 0);
    hearth_pool_free(pool);
}

/* ---- embeddings, ids, chats ---- */

/* The first connection ends before the item, the second behind it, the third tells all. */
static void serve_item(struct fake *fake, int fd)
{
    static const int32_t ids[] = {1, 2, 3};
    static const float vector[] = {1, 2, 3};
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    int number = atomic_fetch_add(&fake->seen, 1);
    atomic_store(&fake->note, frame.header.type);
    if (number >= 1) {
        wire_begin(&out, WIRE_ITEM, frame.header.id);
        if (frame.header.type == WIRE_EMBED)
            wire_put_bytes(&out, TAG_VECTOR, vector, sizeof(vector));
        else
            wire_put_bytes(&out, TAG_IDS, ids, sizeof(ids));
        wire_end(&out);
    }
    if (number >= 2)
        fake_put_done(&out, frame.header.id, "stop");
    fake_send(fd, &out);
}

struct got {
    int items, ends;
    size_t n_ids, n_vector;
};

static void get(void *userdata, const struct hearth_reply *reply)
{
    struct got *got = userdata;
    cr_assert_eq(got->ends, 0);
    got->items += reply->kind == HEARTH_ITEM;
    got->n_ids += reply->n_ids;
    got->n_vector += reply->n_vector;
    got->ends += reply->kind == HEARTH_DONE;
}

Test(pool, embeddings_and_ids_are_asked_for_again_and_come_once)
{
    for (int tokenizes = 0; tokenizes < 2; tokenizes++) {
        struct fake fake;
        struct got got = {0};
        struct hearth_generate request = HEARTH_GENERATE_INIT;
        request.prompt = "Tell";
        fake_start(&fake, serve_item);
        struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
        cr_assert_eq(tokenizes ? hearth_pool_tokenize(pool, NULL, "Tell", 4, get, &got, PATIENCE_US)
                               : hearth_pool_embed(pool, &request, get, &got, PATIENCE_US),
                     0);
        cr_assert(got.items == 1 && got.ends == 1);
        cr_assert_eq(tokenizes ? got.n_ids : got.n_vector, 3);
        cr_assert_eq(fake.note, tokenizes ? WIRE_TOKENIZE : WIRE_EMBED);
        cr_assert_eq(stats_of(pool).failovers, 2);
        hearth_pool_free(pool);
        fake_stop(&fake);
    }
}

Test(pool, an_empty_text_has_ids_too)
{
    struct fake fake;
    int done = 0;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    cr_assert_eq(hearth_pool_tokenize(pool, "m", "", 0, count_done, &done, PATIENCE_US), 0);
    cr_assert_eq(done, 1);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, a_chat_goes_on_where_it_broke_off)
{
    static const struct turn with[] = {{.tell = 10, .print = "one"}, {.tell = -1, .print = "one"}};
    struct hearth_message_part message = {"user", "Tell"};
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct heard heard = {0};
    struct fake fake;
    turns = with;
    n_turns = 2;
    fake_start(&fake, serve_turns);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    cr_assert_eq(hearth_pool_chat(pool, &request, hear, &heard, PATIENCE_US), -EINVAL);
    request.messages = &message;
    request.n_messages = 1;
    cr_assert_eq(hearth_pool_chat(pool, &request, hear, &heard, PATIENCE_US), 0);
    cr_assert_str_eq(heard.text, story);
    cr_assert_eq(stats_of(pool).failovers, 1);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

/* ---- cancelling ---- */

/* Tells a piece, and the rest when it is told to stop; the note is 1 from the piece on. */
static void serve_piece(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer out = {0};
        uint64_t id = frame.header.id;
        bool stops = frame.header.type == WIRE_CANCEL;
        fake_put_tokens(&out, id, "piece");
        if (stops || frame.header.type == WIRE_NULL)
            fake_put_done(&out, id, "cancelled");
        atomic_fetch_add(&fake->seen, stops);
        if (!fake_send(fd, &out))
            return;
        atomic_store(&fake->note, 1);
    }
}

struct canceller {
    struct hearth_pool *pool;
    int replies, cancelled, result;
    bool itself; /* in its callback */
    pthread_t thread;
};

static void cancel_in_callback(void *userdata, const struct hearth_reply *reply)
{
    struct canceller *canceller = userdata;
    (void)reply;
    canceller->replies++;
    if (canceller->itself)
        canceller->cancelled += hearth_pool_cancel(canceller->pool, canceller);
}

static void *complete_until_cancelled(void *userdata)
{
    struct canceller *canceller = userdata;
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.prompt = "Tell";
    canceller->result =
        hearth_pool_complete(canceller->pool, &request, cancel_in_callback, canceller, UINT64_MAX);
    return NULL;
}

static void expect_cancelled(struct hearth_pool *pool, const struct canceller *canceller)
{
    char message[HEARTH_MESSAGE_BYTES];
    cr_assert_eq(canceller->result, -ECANCELED);
    hearth_pool_get_message(pool, message);
    cr_assert_str_eq(message, "the request was cancelled");
    cr_assert_eq(hearth_pool_cancel(pool, canceller), 0, "there is none any more");
    cr_assert_eq(stats_of(pool).timeouts, 0);
}

/* On a thread of its own, until cancel_call(). */
static void begin_call(struct canceller *canceller)
{
    pthread_create(&canceller->thread, NULL, complete_until_cancelled, canceller);
}

static void cancel_call(struct canceller *canceller)
{
    cr_assert_eq(hearth_pool_cancel(canceller->pool, canceller), 1);
    pthread_join(canceller->thread, NULL);
    expect_cancelled(canceller->pool, canceller);
}

Test(pool, a_callback_can_cancel_its_own_call_and_the_connection_stays)
{
    struct fake fake;
    fake_start(&fake, serve_piece);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    struct canceller canceller = {.pool = pool, .itself = true};
    complete_until_cancelled(&canceller);
    expect_cancelled(pool, &canceller);
    cr_assert(canceller.replies == 1 && canceller.cancelled == 1, "nothing comes after it");
    cr_assert_eq(fake.seen, 1, "the daemon was told");
    struct hearth *h = must_acquire(pool);
    use_once(h);
    hearth_pool_release(pool, h);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.created == 1 && stats.reused == 1 && stats.failovers == 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, another_thread_can_cancel_a_call_that_waits_for_the_daemon)
{
    struct fake fake;
    fake_start(&fake, serve_piece);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    struct canceller canceller = {.pool = pool};
    begin_call(&canceller);
    while (atomic_load(&fake.note) == 0)
        usleep(500);
    cr_assert_eq(hearth_pool_cancel(pool, NULL), 0, "somebody else's");
    cancel_call(&canceller);
    struct hearth_pool_stats stats = stats_of(pool);
    cr_assert(stats.open == 0 && stats.closed_broken == 1 && stats.failovers == 0);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, a_call_that_waits_in_line_can_be_cancelled)
{
    struct fake fake;
    fake_start(&fake, fake_serve_done);
    struct hearth_pool *pool = must_open(&fake, 0, 1, 0);
    struct hearth *h = must_acquire(pool);
    struct canceller canceller = {.pool = pool};
    begin_call(&canceller);
    while (stats_of(pool).waits == 0)
        usleep(500);
    cancel_call(&canceller);
    hearth_pool_release(pool, h);
    cr_assert_eq(must_acquire(pool), h, "its place in line is gone");
    hearth_pool_release(pool, h);
    hearth_pool_free(pool);
    fake_stop(&fake);
}

Test(pool, a_call_that_looks_for_a_missing_daemon_can_be_cancelled)
{
    struct fake fake;
    struct test_clock clock = TEST_CLOCK_INIT; /* stands: the look has no end */
    fake_start(&fake, serve_one);
    struct hearth_pool *pool = must_open_in(&clock, &fake, 0, 1);
    cr_assert_eq(tell_again(pool), 0);
    fake_stop(&fake);
    struct canceller canceller = {.pool = pool};
    begin_call(&canceller);
    while (stats_of(pool).failed < 8) /* it pauses for longer and longer */
        usleep(500);
    cancel_call(&canceller);
    cr_assert_eq(canceller.replies, 0);
    hearth_pool_free(pool);
}
