/* The outbox: what the engine thread says arrives whole, once and in order. */
#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "daemon/serve/outbox.h"
#include "tests/support/alloc_fail.h"

#define MAX_NOTES 10000u

static struct outbox *new_outbox(void)
{
    struct outbox *outbox = NULL;

    cr_assert_eq(outbox_new(MAX_NOTES, &outbox), 0);
    return outbox;
}

static bool readable(const struct outbox *outbox)
{
    struct pollfd pollfd = {.fd = outbox_fd(outbox), .events = POLLIN};

    return poll(&pollfd, 1, 0) == 1;
}

static bool event_is(const struct outbox_batch *batch, size_t i, uint32_t kind, void *subject,
                     const char *text)
{
    const struct outbox_event *event = &batch->events[i];

    return event->kind == kind && event->subject == subject && event->text_bytes == strlen(text) &&
           event->text_at + event->text_bytes <= batch->text_bytes &&
           memcmp(batch->text + event->text_at, text, event->text_bytes) == 0;
}

Test(outbox, nothing_is_seen_before_the_flush)
{
    struct outbox *outbox = new_outbox();
    const struct outbox_batch *batch;
    int subject;

    cr_assert_eq(outbox_text(outbox, 1, &subject, "one", 3), 0);
    cr_assert_not(readable(outbox));
    cr_assert_eq(outbox_take(outbox)->n_events, 0);
    cr_assert(outbox_flush(outbox));
    cr_assert(readable(outbox));
    batch = outbox_take(outbox);
    cr_assert_eq(batch->n_events, 1);
    cr_assert(event_is(batch, 0, 1, &subject, "one"));
    cr_assert_not(readable(outbox), "taking clears the descriptor");
    cr_assert_eq(outbox_take(outbox)->n_events, 0, "each event comes once");
    outbox_free(outbox);
}

Test(outbox, flushes_that_are_not_taken_add_up_in_order)
{
    struct outbox *outbox = new_outbox();
    const struct outbox_batch *batch;
    int a, b;

    outbox_text(outbox, 1, &a, "first", 5);
    outbox_note(outbox, 2, &b);
    outbox_flush(outbox);
    outbox_text(outbox, 1, &b, "second", 6);
    outbox_flush(outbox);
    outbox_text(outbox, 3, &a, "third", 5);
    outbox_flush(outbox);
    batch = outbox_take(outbox);
    cr_assert_eq(batch->n_events, 4);
    cr_assert(event_is(batch, 0, 1, &a, "first"));
    cr_assert(event_is(batch, 1, 2, &b, ""));
    cr_assert(event_is(batch, 2, 1, &b, "second"));
    cr_assert(event_is(batch, 3, 3, &a, "third"));
    outbox_free(outbox);
}

Test(outbox, wakes_only_where_it_was_empty)
{
    struct outbox *outbox = new_outbox();

    cr_assert(outbox_flush(outbox));
    cr_assert_not(readable(outbox), "an empty flush wakes nobody");
    for (int i = 0; i < 3; i++) {
        outbox_note(outbox, 1, NULL);
        outbox_flush(outbox);
    }
    outbox_take(outbox);
    cr_assert_not(readable(outbox), "three flushes are one wake-up");
    outbox_note(outbox, 1, NULL);
    outbox_flush(outbox);
    cr_assert(readable(outbox), "the next one wakes again");
    outbox_free(outbox);
}

Test(outbox, what_was_taken_stays_until_the_next_take)
{
    struct outbox *outbox = new_outbox();
    const struct outbox_batch *batch;

    outbox_text(outbox, 1, NULL, "kept", 4);
    outbox_flush(outbox);
    batch = outbox_take(outbox);
    for (int i = 0; i < 1000; i++)
        outbox_text(outbox, 2, NULL, "more", 4);
    outbox_flush(outbox);
    cr_assert_eq(batch->n_events, 1);
    cr_assert(event_is(batch, 0, 1, NULL, "kept"));
    cr_assert_eq(outbox_take(outbox)->n_events, 1000);
    outbox_free(outbox);
}

Test(outbox, large_texts_come_whole_and_their_memory_goes_back)
{
    static char large[3u << 20];
    struct outbox *outbox = new_outbox();
    const struct outbox_batch *batch;

    for (size_t i = 0; i < sizeof(large); i++)
        large[i] = (char)('a' + i % 23);
    for (int round = 0; round < 4; round++) {
        cr_assert_eq(outbox_text(outbox, 1, NULL, large, sizeof(large)), 0);
        outbox_note(outbox, 2, NULL);
        cr_assert(outbox_flush(outbox));
        batch = outbox_take(outbox);
        cr_assert_eq(batch->n_events, 2);
        cr_assert_eq(batch->text_bytes, sizeof(large));
        cr_assert_arr_eq(batch->text, large, sizeof(large));
        cr_assert_eq(batch->events[1].kind, 2);
        batch = outbox_take(outbox);
        cr_assert_eq(outbox_take(outbox)->text_capacity, 0, "kept nothing of the large text");
    }
    outbox_free(outbox);
}

/* Fills the outbox with notes between texts, while the n-th allocation of each call fails. */
static void notes_without_memory(unsigned n)
{
    struct outbox *outbox = new_outbox();
    const struct outbox_batch *batch;
    uint32_t notes = 0, expected = 0, texts = 0;

    for (uint32_t round = 0; round < 20; round++) {
        for (uint32_t i = 0; i < MAX_NOTES / 20; i++) {
            alloc_fail_at(n);
            texts += outbox_text(outbox, MAX_NOTES, NULL, "some text that needs room", 25) == 0;
            outbox_note(outbox, notes++, NULL);
        }
        alloc_fail_at(n);
        outbox_flush(outbox); /* may fail: then it goes with the next */
        if (round % 3 == 0) {
            batch = outbox_take(outbox);
            for (size_t i = 0; i < batch->n_events; i++)
                if (batch->events[i].kind != MAX_NOTES)
                    cr_assert_eq(batch->events[i].kind, expected++);
        }
    }
    alloc_fail_done();
    for (int i = 0; i < 2; i++) {
        cr_assert(outbox_flush(outbox));
        batch = outbox_take(outbox);
        for (size_t j = 0; j < batch->n_events; j++)
            if (batch->events[j].kind != MAX_NOTES)
                cr_assert_eq(batch->events[j].kind, expected++);
    }
    cr_assert_eq(expected, MAX_NOTES, "%u of the notes are lost", MAX_NOTES - expected);
    cr_assert(texts > 0 || n == 1);
    outbox_free(outbox);
}

Test(outbox, a_note_needs_no_memory)
{
    for (unsigned n = 1; n <= 3; n++)
        notes_without_memory(n);
}

Test(outbox, what_cannot_be_made_is_not_half_made)
{
    struct outbox *outbox = NULL;
    unsigned n = 0;
    int r;

    do {
        alloc_fail_at(++n);
        r = outbox_new(MAX_NOTES, &outbox);
        cr_assert(alloc_fail_done() == (r == -ENOMEM), "allocation %u", n);
    } while (r == -ENOMEM);
    cr_assert_eq(r, 0);
    cr_assert_gt(n, 3);
    outbox_free(outbox);
}

#define N_FROM_THREAD 20000u

static void *engine_side(void *argument)
{
    struct outbox *outbox = argument;
    char text[16];

    for (uint32_t i = 0; i < N_FROM_THREAD; i++) {
        int n = snprintf(text, sizeof(text), "%u;", i);
        outbox_text(outbox, i, NULL, text, (size_t)n);
        if (i % 7 == 0 || i == N_FROM_THREAD - 1)
            outbox_flush(outbox);
    }
    return NULL;
}

Test(outbox, two_threads_lose_nothing)
{
    struct outbox *outbox = new_outbox();
    pthread_t thread;
    uint32_t next = 0;

    cr_assert_eq(pthread_create(&thread, NULL, engine_side, outbox), 0);
    while (next < N_FROM_THREAD) {
        struct pollfd pollfd = {.fd = outbox_fd(outbox), .events = POLLIN};
        const struct outbox_batch *batch;
        cr_assert_eq(poll(&pollfd, 1, 30000), 1, "a wake-up was lost after %u events", next);
        batch = outbox_take(outbox);
        for (size_t i = 0; i < batch->n_events; i++, next++) {
            char text[16];
            snprintf(text, sizeof(text), "%u;", next);
            cr_assert(event_is(batch, i, next, NULL, text), "event %u", next);
        }
    }
    pthread_join(thread, NULL);
    cr_assert_eq(outbox_take(outbox)->n_events, 0);
    outbox_free(outbox);
}
