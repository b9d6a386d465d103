#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>

#include "daemon/queue.h"
#include "lib/cleanup.h"

static bool readable(const struct queue *q)
{
    struct pollfd p = {.fd = queue_fd(q), .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

static struct queue *queue_of(size_t capacity)
{
    struct queue *q = NULL;
    cr_assert_eq(queue_new(capacity, &q), 0);
    return q;
}

static void push(struct queue *q, uint32_t number)
{
    cr_assert_eq(queue_push(q, &(struct message){.kind = 1, .number = number, .subject = q}), 0);
}

Test(queue, gives_messages_back_in_order_and_whole)
{
    struct queue *q = queue_of(8);
    const struct message *m;
    for (uint32_t i = 0; i < 5; i++)
        cr_assert_eq(queue_push(q, &(struct message){.kind = 7 + i,
                                                     .number = i,
                                                     .subject = q,
                                                     .value = UINT64_MAX - i}),
                     0);
    cr_assert_eq(queue_length(q), 5);
    cr_assert_eq(queue_take(q, &m), 5);
    for (uint32_t i = 0; i < 5; i++) {
        cr_expect_eq(m[i].kind, 7 + i);
        cr_expect_eq(m[i].number, i);
        cr_expect_eq(m[i].subject, q);
        cr_expect_eq(m[i].value, UINT64_MAX - i);
    }
    cr_expect_eq(queue_length(q), 0);
    cr_expect_eq(queue_take(q, &m), 0);
    queue_free(q);
}

Test(queue, refuses_beyond_its_capacity_and_takes_again_after_a_take)
{
    struct queue *q = queue_of(3);
    const struct message *m;
    for (uint32_t i = 0; i < 3; i++)
        push(q, i);
    cr_expect_eq(queue_push(q, &(struct message){0}), -ENOBUFS);
    cr_expect_eq(queue_length(q), 3);
    cr_expect_eq(queue_take(q, &m), 3);
    push(q, 9);
    cr_expect_eq(queue_length(q), 1);
    queue_free(q);
}

Test(queue, wakes_its_reader_only_when_it_was_empty)
{
    struct queue *q = queue_of(4);
    const struct message *m;
    cr_expect(!readable(q));
    push(q, 1);
    cr_expect(readable(q));
    queue_clear_wakeup(q);
    push(q, 2); /* one waits already: the reader has been told */
    cr_expect(!readable(q));
    cr_expect_eq(queue_take(q, &m), 2);
    push(q, 3);
    cr_expect(readable(q));
    queue_free(q);
}

Test(queue, what_was_taken_stays_while_others_push)
{
    struct queue *q = queue_of(2);
    const struct message *m;
    push(q, 1);
    push(q, 2);
    cr_assert_eq(queue_take(q, &m), 2);
    push(q, 3);
    push(q, 4);
    cr_expect_eq(m[0].number, 1);
    cr_expect_eq(m[1].number, 2);
    cr_assert_eq(queue_take(q, &m), 2);
    cr_expect_eq(m[0].number, 3);
    queue_free(q);
}

Test(queue, is_freed_full_empty_or_not_at_all)
{
    struct queue *q = queue_of(0); /* holds one at least */
    push(q, 1);
    cr_expect_null(queue_free(q));
    cr_expect_null(queue_free(NULL));
}

#define WRITERS           4
#define MESSAGES_A_WRITER 20000

static void *write_numbers(void *arg)
{
    struct message m = {.subject = arg};
    void **pair = arg;
    struct queue *q = pair[0];
    for (m.number = 0; m.number < MESSAGES_A_WRITER;)
        if (queue_push(q, &m) == 0)
            m.number++;
        else
            sched_yield(); /* full: the reader is due */
    return NULL;
}

Test(queue, loses_nothing_between_four_threads_and_a_reader_that_sleeps, .timeout = 50)
{
    struct queue *q = queue_of(64);
    pthread_t threads[WRITERS];
    void *pairs[WRITERS][2];
    uint32_t next[WRITERS] = {0};
    size_t total = 0;
    for (size_t i = 0; i < WRITERS; i++) {
        pairs[i][0] = q;
        cr_assert_eq(pthread_create(&threads[i], NULL, write_numbers, pairs[i]), 0);
    }
    while (total < (size_t)WRITERS * MESSAGES_A_WRITER) {
        struct pollfd p = {.fd = queue_fd(q), .events = POLLIN};
        const struct message *m;
        cr_assert_eq(poll(&p, 1, 20000), 1, "a wake-up was lost after %zu messages", total);
        queue_clear_wakeup(q);
        size_t n = queue_take(q, &m);
        for (size_t i = 0; i < n; i++) {
            size_t writer = (size_t)((void **)m[i].subject - pairs[0]) / 2;
            cr_assert_eq(m[i].number, next[writer], "writer %zu out of order", writer);
            next[writer]++;
        }
        total += n;
    }
    for (size_t i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    cr_expect_eq(queue_length(q), 0);
    queue_free(q);
}
