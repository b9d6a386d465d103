/* Streaming: what is handed out, when, and where it may be cut. */
#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/queue.h"
#include "daemon/serve/outbox.h"
#include "daemon/serve/streaming.h"
#include "lib/cleanup.h"

#define PLENTY (1u << 20)

struct sink {
    char *text;
    size_t len;
};

/* Takes all that may go; the number of bytes. */
static size_t drain(struct stream *stream, struct sink *sink)
{
    const char *text;
    size_t n, all = 0;

    while ((n = stream_peek(stream, &text)) > 0) {
        sink->text = realloc(sink->text, sink->len + n + 1);
        memcpy(sink->text + sink->len, text, n);
        sink->len += n;
        sink->text[sink->len] = 0;
        stream_consume(stream, n);
        all += n;
    }
    return all;
}

static void push(struct stream *stream, const char *text)
{
    cr_assert_eq(stream_push(stream, text, strlen(text)), 0);
}

static struct stream_stops stops_of(const char *a, const char *b)
{
    struct stream_stops stops = {.n = b ? 2 : 1};

    memcpy(stops.text[0], a, strlen(a));
    stops.len[0] = (uint8_t)strlen(a);
    if (b) {
        memcpy(stops.text[1], b, strlen(b));
        stops.len[1] = (uint8_t)strlen(b);
    }
    return stops;
}

static bool whole_utf8(const char *text, size_t len)
{
    size_t at = 0;

    while (at < len) {
        unsigned char c = (unsigned char)text[at];
        size_t n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
        if (c >= 0x80 && c < 0xc2)
            return false;
        for (size_t i = 1; i < n; i++)
            if (at + i >= len || ((unsigned char)text[at + i] & 0xc0) != 0x80)
                return false;
        at += n;
    }
    return true;
}

Test(streaming, hands_out_what_was_pushed_in_order)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, PLENTY, PLENTY, false, 0, NULL);
    push(&stream, "Once ");
    cr_assert_eq(drain(&stream, &sink), 5);
    push(&stream, "upon ");
    push(&stream, "a time");
    cr_assert_eq(drain(&stream, &sink), 11);
    cr_assert_str_eq(sink.text, "Once upon a time");
    cr_assert_not(stream_drained(&stream));
    cr_assert_eq(stream_finish(&stream), 0);
    cr_assert(stream_drained(&stream));
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, never_splits_a_sequence_wherever_tokens_are_cut)
{
    const char *text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z";
    size_t len = strlen(text);

    for (size_t cut = 0; cut <= len; cut++) {
        for (size_t second = cut; second <= len; second++) {
            struct stream stream;
            struct sink sink = {0};
            stream_init(&stream, PLENTY, PLENTY, false, 0, NULL);
            cr_assert_eq(stream_push(&stream, text, cut), 0);
            drain(&stream, &sink);
            cr_assert(whole_utf8(sink.text, sink.len));
            cr_assert_eq(stream_push(&stream, text + cut, second - cut), 0);
            drain(&stream, &sink);
            cr_assert(whole_utf8(sink.text, sink.len));
            cr_assert_eq(stream_push(&stream, text + second, len - second), 0);
            stream_finish(&stream);
            drain(&stream, &sink);
            cr_assert_str_eq(sink.text, text);
            stream_done(&stream);
            free(sink.text);
        }
    }
}

Test(streaming, replaces_what_cannot_be_utf8)
{
    static const struct {
        const char *bytes, *text;
    } cases[] = {
        {"\xff", "\xef\xbf\xbd"},
        {"a\x80z", "a\xef\xbf\xbdz"},
        {"\xc3(", "\xef\xbf\xbd("},
        {"\xe2\x82(", "\xef\xbf\xbd\xef\xbf\xbd("},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, /* a surrogate */
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},                 /* overlong */
        {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"end\xf0\x9f\x98", "end\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, /* cut off at the end */
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct stream stream;
        struct sink sink = {0};
        stream_init(&stream, PLENTY, PLENTY, false, 0, NULL);
        push(&stream, cases[i].bytes);
        stream_finish(&stream);
        drain(&stream, &sink);
        cr_expect_str_eq(sink.text, cases[i].text, "case %zu", i);
        stream_done(&stream);
        free(sink.text);
    }
}

Test(streaming, stops_before_a_stop_string_across_tokens)
{
    struct stream_stops stops = stops_of("</end>", NULL);
    const char *text = "story </end> more";

    for (size_t piece = 1; piece < 8; piece++) {
        struct stream stream;
        struct sink sink = {0};
        int r = 0;
        stream_init(&stream, PLENTY, PLENTY, false, 0, &stops);
        for (size_t at = 0; at < strlen(text) && r == 0; at += piece) {
            size_t n = strlen(text) - at < piece ? strlen(text) - at : piece;
            r = stream_push(&stream, text + at, n);
            drain(&stream, &sink);
        }
        cr_assert_eq(r, 1, "pieces of %zu", piece);
        drain(&stream, &sink);
        cr_assert_str_eq(sink.text, "story ", "pieces of %zu", piece);
        cr_assert(stream_drained(&stream));
        stream_done(&stream);
        free(sink.text);
    }
}

Test(streaming, the_earliest_of_several_stop_strings_counts)
{
    struct stream_stops stops = stops_of("time", "upon");
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, PLENTY, PLENTY, false, 0, &stops);
    cr_assert_eq(stream_push(&stream, "Once upon a time", 16), 1);
    drain(&stream, &sink);
    cr_assert_str_eq(sink.text, "Once ");
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, what_only_began_like_a_stop_string_comes_out)
{
    struct stream_stops stops = stops_of("END.", NULL);
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, PLENTY, PLENTY, false, 0, &stops);
    push(&stream, "the EN");
    drain(&stream, &sink);
    cr_assert_str_eq(sink.text, "the ");
    push(&stream, "D of");
    drain(&stream, &sink);
    cr_assert_str_eq(sink.text, "the END of");
    push(&stream, " EN");
    stream_finish(&stream);
    drain(&stream, &sink);
    cr_assert_str_eq(sink.text, "the END of EN");
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, hands_out_no_more_than_the_credit)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, 4, PLENTY, false, 0, NULL);
    push(&stream, "abcdefgh");
    cr_assert_eq(drain(&stream, &sink), 4);
    cr_assert_not(stream_may_run(&stream));
    cr_assert(stream_grant(&stream, 3), "a parked stream was granted room");
    cr_assert_eq(drain(&stream, &sink), 3);
    cr_assert_not(stream_may_run(&stream));
    cr_assert(stream_grant(&stream, 100));
    cr_assert_eq(drain(&stream, &sink), 1);
    cr_assert(stream_may_run(&stream));
    cr_assert_not(stream_grant(&stream, 1), "it was not parked");
    cr_assert_str_eq(sink.text, "abcdefgh");
    stream_done(&stream);
    free(sink.text);
}

/* Credit that comes after the last look and before the stream is marked parked is nobody's to tell.
 */
Test(streaming, credit_that_comes_just_before_parking_is_seen)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, 4, PLENTY, false, 0, NULL);
    push(&stream, "abcdefgh");
    cr_assert_eq(drain(&stream, &sink), 4);
    cr_assert_not(stream_grant(&stream, 100), "it is not parked yet");
    cr_assert(stream_may_run(&stream), "it would wait for credit that has come");
    cr_assert_eq(drain(&stream, &sink), 4);
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, a_window_inside_a_sequence_waits_for_all_of_it)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, 3, PLENTY, false, 0, NULL);
    push(&stream, "a\xe2\x82\xac");
    cr_assert_eq(drain(&stream, &sink), 1);
    cr_assert_not(stream_may_run(&stream));
    stream_grant(&stream, 1);
    cr_assert_eq(drain(&stream, &sink), 3);
    cr_assert_str_eq(sink.text, "a\xe2\x82\xac");
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, a_full_buffer_parks_whatever_the_credit)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, UINT64_MAX, 8, false, 0, NULL);
    push(&stream, "0123456789");
    cr_assert_eq(drain(&stream, &sink), 8);
    cr_assert_not(stream_may_run(&stream));
    cr_assert_not(stream_delivered(&stream, 8, false), "the connection has no room");
    cr_assert_eq(drain(&stream, &sink), 0);
    cr_assert(stream_delivered(&stream, 0, true), "now it has");
    cr_assert_eq(drain(&stream, &sink), 2);
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, credit_does_not_overflow)
{
    struct stream stream;

    stream_init(&stream, UINT64_MAX - 1, 64, false, 0, NULL);
    stream_grant(&stream, 100);
    cr_assert_eq(stream.granted_bytes, UINT64_MAX);
    stream_done(&stream);
}

Test(streaming, whole_text_comes_at_the_end)
{
    struct stream stream;
    struct sink sink = {0};

    stream_init(&stream, PLENTY, 64, true, 0, NULL);
    push(&stream, "Once ");
    push(&stream, "upon");
    cr_assert_eq(drain(&stream, &sink), 0);
    cr_assert(stream_may_run(&stream));
    stream_finish(&stream);
    cr_assert_eq(drain(&stream, &sink), 9);
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, whole_text_beyond_the_buffer_comes_in_several)
{
    struct stream stream;
    struct sink sink = {0};
    size_t frames = 0;

    stream_init(&stream, PLENTY, 64, true, 0, NULL);
    for (int i = 0; i < 100; i++) {
        size_t n;
        push(&stream, "0123456789");
        n = drain(&stream, &sink);
        frames += n > 0;
        cr_assert_leq(stream.len, 64 + 10);
        stream_delivered(&stream, n, true);
    }
    stream_finish(&stream);
    drain(&stream, &sink);
    cr_assert_eq(sink.len, 1000);
    cr_assert(frames > 1 && frames < 100);
    stream_done(&stream);
    free(sink.text);
}

Test(streaming, skipped_bytes_are_generated_but_not_sent)
{
    for (uint64_t skip = 0; skip < 16; skip++) {
        struct stream stream;
        struct sink sink = {0};
        stream_init(&stream, PLENTY, PLENTY, false, skip, NULL);
        push(&stream, "Once ");
        drain(&stream, &sink);
        push(&stream, "upon a time");
        stream_finish(&stream);
        drain(&stream, &sink);
        cr_assert_str_eq(sink.text, &"Once upon a time"[skip]);
        cr_assert_eq(stream.taken_bytes, 16 - skip, "what is skipped takes no credit");
        stream_done(&stream);
        free(sink.text);
    }
}

/* What its reader has cannot end there: no text that follows would join on. */
Test(streaming, skipping_to_the_inside_of_a_sequence_is_an_error)
{
    static const char text[] = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z"; /* 1, 2, 3, 4, 1 */
    static const bool whole[] = {1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1};
    size_t len = strlen(text);

    for (uint64_t skip = 0; skip <= len; skip++) {
        for (size_t piece = 1; piece <= len; piece++) {
            struct stream stream;
            struct sink sink = {0};
            int r = 0;
            stream_init(&stream, PLENTY, PLENTY, false, skip, NULL);
            for (size_t at = 0; at < len && r == 0; at += piece) {
                r = stream_push(&stream, text + at, len - at < piece ? len - at : piece);
                drain(&stream, &sink);
            }
            cr_assert_eq(r, whole[skip] ? 0 : -EILSEQ, "skip %lu in pieces of %zu", skip, piece);
            if (r == 0 && skip < len)
                cr_assert_str_eq(sink.text, text + skip);
            if (r < 0)
                cr_assert_eq(sink.len, 0, "skip %lu sent something", skip);
            stream_done(&stream);
            free(sink.text);
        }
    }
}

Test(streaming, a_text_that_is_cut_ends_with_a_whole_character)
{
    static const char text[] = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z";
    static const size_t whole[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};

    for (size_t cut = 1; cut <= strlen(text); cut++) {
        struct stream stream;
        struct sink sink = {0};
        stream_init(&stream, PLENTY, PLENTY, false, 0, NULL);
        cr_assert_eq(stream_push(&stream, text, cut), 0);
        stream_cut(&stream);
        cr_assert_eq(stream_finish(&stream), 0);
        drain(&stream, &sink);
        cr_assert_eq(sink.len, whole[cut], "cut at %zu", cut);
        cr_assert(stream_drained(&stream));
        stream_done(&stream);
        free(sink.text);
    }
}

Test(streaming, skipping_and_stop_strings_go_together)
{
    struct stream_stops stops = stops_of("END", NULL);

    for (uint64_t skip = 0; skip <= 8; skip++) {
        struct stream stream;
        struct sink sink = {0};
        stream_init(&stream, PLENTY, PLENTY, false, skip, &stops);
        push(&stream, "story E");
        drain(&stream, &sink);
        cr_assert_eq(stream_push(&stream, "ND more", 7), 1);
        drain(&stream, &sink);
        cr_assert_str_eq(sink.text ? sink.text : "", skip < 6 ? &"story "[skip] : "");
        cr_assert(stream_drained(&stream));
        stream_done(&stream);
        free(sink.text);
    }
}

/* ---- a long answer: made on one thread, read slowly on another, the outbox between ---- */

#define LONG_BYTES     (100u << 20)
#define LONG_BUFFER    8192u /* limits.stream_buffer */
#define LONG_PIECE     24u   /* the longest token */
#define LONG_CHARACTER 4u    /* the least credit that always lets something go */
#define LONG_EVENTS    512u  /* tokens between two hand-overs at most */
#define LONG_HELD      256u  /* what a stream of such tokens may hold itself */
#define LONG_LIMIT_MS  20000 /* a lost wake-up ends here */
#define LONG_TEXT_KIND 1u
#define LONG_END_KIND  2u

struct long_answer {
    struct stream stream;
    struct outbox *outbox;
    struct queue *unparks;
    /* The making side's, read once its thread is joined. */
    uint64_t made;
    uint32_t n_parked, n_events, most_held;
    const char *failure; /* what went wrong there; NULL: nothing */
};

/* Lines of sixteen bytes, each with its number, so that no byte's place can be mistaken, and with
 * characters of four and three bytes. */
static char long_byte(uint64_t at)
{
    static const char tail[] = "\xf0\x9f\x98\x80\xe2\x82\xac\n";
    uint64_t line = at / 16, column = at % 16;

    return column < 8 ? "0123456789abcdef"[line >> (28 - 4 * column) & 15] : tail[column - 8];
}

static unsigned next_random(unsigned *random, unsigned bound)
{
    *random = *random * 1103515245u + 12345u;
    return *random / 65536 % bound;
}

static void hand_out(struct long_answer *answer)
{
    const char *text;
    size_t n;

    while ((n = stream_peek(&answer->stream, &text)) > 0) {
        if (outbox_text(answer->outbox, LONG_TEXT_KIND, NULL, text, n) < 0)
            answer->failure = "the outbox takes no text";
        stream_consume(&answer->stream, n);
        answer->n_events++;
    }
    if (answer->stream.capacity > answer->most_held)
        answer->most_held = answer->stream.capacity;
}

static void hand_over(struct long_answer *answer)
{
    if (!outbox_flush(answer->outbox))
        answer->failure = "the outbox hands nothing over";
    answer->n_events = 0;
}

static void wait_for_room(struct long_answer *answer)
{
    struct pollfd pollfd = {.fd = queue_fd(answer->unparks), .events = POLLIN};
    const struct message *messages;

    answer->n_parked++;
    do {
        hand_over(answer);
        if (queue_take(answer->unparks, &messages) == 0) {
            if (poll(&pollfd, 1, LONG_LIMIT_MS) != 1)
                answer->failure = "a parked stream was never woken";
            queue_clear_wakeup(answer->unparks);
        }
        hand_out(answer);
    } while (!answer->failure && !stream_may_run(&answer->stream));
}

static void *make_long_answer(void *argument)
{
    struct long_answer *answer = argument;
    struct stream *stream = &answer->stream;
    unsigned random = 1;

    while (answer->made < LONG_BYTES && !answer->failure) {
        char piece[LONG_PIECE];
        uint64_t n = 1 + next_random(&random, LONG_PIECE);
        if (n > LONG_BYTES - answer->made)
            n = LONG_BYTES - answer->made;
        for (uint64_t i = 0; i < n; i++)
            piece[i] = long_byte(answer->made + i);
        if (stream_push(stream, piece, n) != 0)
            answer->failure = "the stream takes no token";
        answer->made += n;
        hand_out(answer);
        if (answer->n_events == LONG_EVENTS)
            hand_over(answer);
        if (!stream_may_run(stream))
            wait_for_room(answer);
    }
    if (stream_finish(stream) < 0)
        answer->failure = "the stream has no end";
    hand_out(answer);
    while (!answer->failure && !stream_drained(stream))
        wait_for_room(answer);
    outbox_note(answer->outbox, LONG_END_KIND, NULL);
    hand_over(answer);
    return NULL;
}

/* Every byte, in its place: how many there were. */
static size_t check_batch(const struct outbox_batch *batch, uint64_t at, bool *over)
{
    size_t all = 0;

    for (size_t i = 0; i < batch->n_events; i++) {
        const struct outbox_event *event = &batch->events[i];
        *over = event->kind == LONG_END_KIND;
        for (uint32_t k = 0; k < event->text_bytes; k++)
            if (batch->text[event->text_at + k] != long_byte(at + all + k))
                cr_assert_fail("another byte at %lu", (unsigned long)(at + all + k));
        all += event->text_bytes;
    }
    return all;
}

/* Its reader is always behind: it takes what is there, now and then lets it lie for a while, and
 * grants a little. What is on the way stays within the buffer's bound all the time. */
Test(streaming, a_hundred_megabytes_reach_a_slow_reader_in_bounded_memory)
{
    struct long_answer answer = {0};
    uint64_t got = 0;
    size_t most_text = 0;
    unsigned random = 2;
    pthread_t thread;
    bool over = false;

    cr_assert_eq(outbox_new(8, &answer.outbox), 0);
    cr_assert_eq(queue_new(64, &answer.unparks), 0);
    stream_init(&answer.stream, 100, LONG_BUFFER, false, 0, NULL);
    cr_assert_eq(pthread_create(&thread, NULL, make_long_answer, &answer), 0);
    while (!over) {
        struct pollfd pollfd = {.fd = outbox_fd(answer.outbox), .events = POLLIN};
        const struct outbox_batch *batch;
        bool wake;
        size_t n;
        cr_assert_eq(poll(&pollfd, 1, LONG_LIMIT_MS), 1, "no text and no end");
        batch = outbox_take(answer.outbox);
        n = check_batch(batch, got, &over);
        got += n;
        cr_assert_leq(got, answer.stream.granted_bytes, "beyond its credit");
        cr_assert_leq(batch->text_bytes, LONG_BUFFER, "beyond the buffer's bound");
        most_text = MAX(most_text, batch->text_capacity);
        if (next_random(&random, 16) == 0)
            usleep(50);
        wake = stream_delivered(&answer.stream, n, true);
        wake |= stream_grant(&answer.stream, LONG_CHARACTER + next_random(&random, LONG_BUFFER));
        if (wake)
            cr_assert_eq(queue_push(answer.unparks, &(struct message){.kind = 1}), 0);
    }
    pthread_join(thread, NULL);
    cr_assert_null(answer.failure, "%s", answer.failure);
    cr_assert_eq(got, LONG_BYTES);
    cr_assert_leq(answer.most_held, LONG_HELD);
    cr_assert_leq(most_text, 2 * LONG_BUFFER);
    cr_assert_geq(answer.n_parked, LONG_BYTES / LONG_BUFFER / 2, "the reader was not slow");
    stream_done(&answer.stream);
    outbox_free(answer.outbox);
    queue_free(answer.unparks);
}
