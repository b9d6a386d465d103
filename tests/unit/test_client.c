/* One connection against a daemon of the test's own, good and bad. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>

#include "lib/client.h"
#include "tests/unit/fake_daemon.h"

#define PATIENCE_US 20000000u

/* What a request's callback has seen. */
struct log {
    char text[8192];
    size_t text_bytes;
    int tokens, items, done, errors, lost;
    char reason[64], code[64], sentence[HEARTH_MESSAGE_BYTES];
    struct hearth *h; /* for callbacks that act on it */
    int result;
};

static void log_reply(void *userdata, const struct hearth_reply *reply)
{
    struct log *log = userdata;
    log->tokens += reply->kind == HEARTH_TOKENS;
    log->items += reply->kind == HEARTH_ITEM;
    log->done += reply->kind == HEARTH_DONE;
    log->errors += reply->kind == HEARTH_ERROR;
    log->lost += reply->lost;
    if (reply->text && log->text_bytes + reply->text_bytes < sizeof(log->text)) {
        memcpy(log->text + log->text_bytes, reply->text, reply->text_bytes);
        log->text_bytes += reply->text_bytes;
    }
    if (reply->reason)
        snprintf(log->reason, sizeof(log->reason), "%s", reply->reason);
    if (reply->code)
        snprintf(log->code, sizeof(log->code), "%s", reply->code);
    if (reply->sentence)
        snprintf(log->sentence, sizeof(log->sentence), "%s", reply->sentence);
}

static struct hearth *must_connect(const struct fake *fake)
{
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES] = "";
    cr_assert_eq(fake_connect(fake, &h, message), 0, "%s", message);
    return h;
}

static uint64_t must_complete(struct hearth *h, const char *prompt, struct log *log)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    uint64_t id = 0;
    request.prompt = prompt;
    cr_assert_eq(hearth_complete(h, &request, log_reply, log, &id), 0, "%s", hearth_message(h));
    cr_assert_neq(id, 0);
    return id;
}

Test(client, connects_and_knows_the_daemon)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, fake_serve_done);
    struct hearth *h = must_connect(&fake);
    cr_assert_str_eq(hearth_daemon_version(h), "1.2.3");
    cr_assert_eq(hearth_daemon_pid(h), 4711);
    cr_assert_eq(hearth_in_flight(h), 0);
    uint64_t id = must_complete(h, "hello", &log);
    cr_assert_eq(hearth_in_flight(h), 1);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_eq(log.done, 1);
    cr_assert_str_eq(log.reason, "stop");
    cr_assert_eq(hearth_in_flight(h), 0);
    cr_assert_eq(hearth_requests_sent(h), 1);
    cr_assert_null(hearth_free(h));
    cr_assert_null(hearth_free(NULL));
    fake_stop(&fake);
}

/* Two requests are read, then answered in turns. */
static void serve_turns(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    uint64_t ids[2];
    struct wire_buffer out = {0};
    if (!fake_hello(fd))
        return;
    for (int i = 0; i < 2; i++) {
        if (!fake_next(fd, &frame))
            return;
        ids[i] = frame.header.id;
    }
    fake_put_tokens(&out, ids[1], "b1 ");
    fake_put_tokens(&out, ids[0], "a1 ");
    fake_put_tokens(&out, ids[0], "a2 ");
    fake_put_tokens(&out, ids[1], "b2 ");
    fake_put_done(&out, ids[1], "length");
    fake_put_tokens(&out, ids[0], "a3");
    fake_put_done(&out, ids[0], "stop");
    fake_send(fd, &out);
}

Test(client, answers_of_interleaved_requests_find_their_callbacks_in_order)
{
    struct fake fake;
    struct log a = {0}, b = {0};
    fake_start(&fake, serve_turns);
    struct hearth *h = must_connect(&fake);
    uint64_t id = must_complete(h, "a", &a);
    must_complete(h, "b", &b);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_str_eq(a.text, "a1 a2 a3");
    cr_assert_str_eq(a.reason, "stop");
    cr_assert_str_eq(b.text, "b1 b2 ");
    cr_assert_str_eq(b.reason, "length");
    hearth_free(h);
    fake_stop(&fake);
}

/* Hello and replies go out one byte at a time. */
static void serve_bytes(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    char magic[WIRE_MAGIC_BYTES];
    if (!fake_read(fd, magic, sizeof(magic)) || !fake_next(fd, &frame))
        return;
    fake_put_hello(&out);
    for (size_t i = 0; i < out.len; i++)
        fake_write(fd, out.data + i, 1);
    out.len = 0;
    if (!fake_next(fd, &frame))
        return;
    fake_put_tokens(&out, frame.header.id, "Once upon ");
    fake_put_tokens(&out, frame.header.id, "a time");
    fake_put_done(&out, frame.header.id, "stop");
    for (size_t i = 0; i < out.len; i++) {
        fake_write(fd, out.data + i, 1);
        usleep(50); /* so that the client sees them apart */
    }
    wire_buffer_done(&out);
}

Test(client, frames_may_come_byte_by_byte)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_bytes);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_daemon_pid(h), 4711);
    cr_assert_eq(hearth_finish(h, must_complete(h, "x", &log), PATIENCE_US), 0);
    cr_assert_str_eq(log.text, "Once upon a time");
    cr_assert_eq(log.tokens, 2);
    hearth_free(h);
    fake_stop(&fake);
}

static void serve_everything(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    static const int32_t ids[] = {1, -2, 70000};
    static const float vector[] = {0.5f, -0.25f};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    uint64_t id = frame.header.id;
    wire_begin(&out, WIRE_ITEM, id);
    wire_put_text(&out, TAG_MODEL, "ember");
    wire_put_text(&out, TAG_STATE, "loading");
    wire_put_number(&out, TAG_DONE_BYTES, 5);
    wire_put_number(&out, TAG_TOTAL_BYTES, 5000000000);
    wire_put_number(&out, TAG_MEMORY_BYTES, 7);
    wire_put_number(&out, TAG_PRELOAD, 1);
    wire_put_number(&out, TAG_PINNED, 0);
    wire_put_number(&out, TAG_KEEP_ALIVE_US, 8);
    wire_put_number(&out, TAG_HOLDS, 9);
    wire_put_text(&out, TAG_INFO, "arch llama\n");
    wire_put_text(&out, TAG_STATS, "");
    wire_put_text(&out, TAG_VERSION, "0.1");
    wire_put_number(&out, TAG_PID, 12);
    wire_put_text(&out, TAG_NAME, "pool");
    wire_put_number(&out, TAG_LOST, 13);
    wire_end(&out);
    wire_begin(&out, WIRE_ITEM, id);
    wire_put_bytes(&out, TAG_FINGERPRINT, "\1\2\3", 3); /* so that the array lies unaligned */
    wire_put_bytes(&out, TAG_IDS, ids, sizeof(ids));
    wire_end(&out);
    wire_begin(&out, WIRE_ITEM, id);
    wire_put_text(&out, TAG_TEXT, "x");
    wire_put_bytes(&out, TAG_VECTOR, vector, sizeof(vector));
    wire_end(&out);
    wire_begin(&out, WIRE_DONE, id);
    wire_put_text(&out, TAG_REASON, "context");
    wire_put_number(&out, TAG_PROMPT_TOKENS, 1);
    wire_put_number(&out, TAG_COMPLETION_TOKENS, 2);
    wire_put_number(&out, TAG_QUEUED_US, 3);
    wire_put_number(&out, TAG_LOAD_US, 4);
    wire_put_number(&out, TAG_PREFILL_US, 5);
    wire_put_number(&out, TAG_DECODE_US, 6);
    wire_put_number(&out, TAG_SEED, UINT64_MAX);
    wire_put_text(&out, TAG_VARIANT, "avx2");
    wire_put_bytes(&out, TAG_FINGERPRINT, "\0abc", 4);
    wire_end(&out);
    fake_send(fd, &out);
}

static void check_everything(void *userdata, const struct hearth_reply *r)
{
    int *n = userdata;
    switch ((*n)++) {
    case 0:
        cr_assert_str_eq(r->model, "ember");
        cr_assert_str_eq(r->state, "loading");
        cr_assert(r->done_bytes == 5 && r->total_bytes == 5000000000 && r->memory_bytes == 7);
        cr_assert(r->preload && !r->pinned && r->keep_alive_us == 8 && r->holds == 9);
        cr_assert_str_eq(r->info, "arch llama\n");
        cr_assert_str_eq(r->stats, "");
        cr_assert_str_eq(r->version, "0.1");
        cr_assert_str_eq(r->name, "pool");
        cr_assert(r->pid == 12 && r->lost_events == 13 && !r->has_seed);
        break;
    case 1:
        cr_assert_eq(r->n_ids, 3);
        cr_assert(r->ids[0] == 1 && r->ids[1] == -2 && r->ids[2] == 70000);
        break;
    case 2:
        cr_assert_eq(r->n_vector, 2);
        cr_assert(r->vector[0] == 0.5f && r->vector[1] == -0.25f);
        cr_assert_str_eq(r->text, "x");
        break;
    case 3:
        cr_assert_eq(r->kind, HEARTH_DONE);
        cr_assert_str_eq(r->reason, "context");
        cr_assert(r->prompt_tokens == 1 && r->completion_tokens == 2 && r->queued_us == 3);
        cr_assert(r->load_us == 4 && r->prefill_us == 5 && r->decode_us == 6);
        cr_assert(r->has_seed && r->seed == UINT64_MAX);
        cr_assert_str_eq(r->variant, "avx2");
        cr_assert(r->fingerprint_bytes == 4 && memcmp(r->fingerprint, "\0abc", 4) == 0);
        break;
    }
}

Test(client, every_field_of_a_reply_is_read)
{
    struct fake fake;
    uint64_t id;
    int n = 0;
    fake_start(&fake, serve_everything);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_models(h, NULL, check_everything, &n, &id), 0);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_eq(n, 4);
    hearth_free(h);
    fake_stop(&fake);
}

#define MANY 10000

/* Reads all, answers the last first. */
static void serve_backwards(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    _cleanup_free_ uint64_t *ids = malloc(MANY * sizeof(*ids));
    if (!fake_hello(fd))
        return;
    for (int round = 0; round < 2; round++) {
        struct wire_buffer out = {0};
        for (int i = 0; i < MANY; i++) {
            if (!fake_next(fd, &frame))
                return;
            ids[i] = frame.header.id;
        }
        for (int i = MANY - 1; i >= 0; i--)
            fake_put_done(&out, ids[i], NULL);
        if (!fake_send(fd, &out))
            return;
    }
}

static int compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

Test(client, ten_thousand_requests_in_flight_end_once_each_and_no_id_comes_twice)
{
    struct fake fake;
    static struct log logs[MANY];
    static uint64_t ids[2 * MANY];
    fake_start(&fake, serve_backwards);
    struct hearth *h = must_connect(&fake);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < MANY; i++)
            cr_assert_eq(hearth_null(h, log_reply, &logs[i], &ids[round * MANY + i]), 0);
        cr_assert_eq(hearth_in_flight(h), MANY);
        while (hearth_in_flight(h) > 0)
            cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
        for (int i = 0; i < MANY; i++)
            cr_assert_eq(logs[i].done, round + 1);
    }
    cr_assert_leq(h->requests_capacity, 2 * MANY, "the slots are used again");
    qsort(ids, 2 * MANY, sizeof(ids[0]), compare_ids);
    for (int i = 1; i < 2 * MANY; i++)
        cr_assert_neq(ids[i], ids[i - 1]);
    hearth_free(h);
    fake_stop(&fake);
}

/* Two requests in, half an answer, the end. */
static void serve_and_die(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame) || !fake_next(fd, &frame))
        return;
    fake_put_tokens(&out, frame.header.id, "half");
    fake_put_tokens(&out, frame.header.id, "never whole");
    fake_write(fd, out.data, out.len - 3);
    wire_buffer_done(&out);
}

Test(client, a_lost_connection_ends_every_request_once_and_takes_no_more)
{
    struct fake fake;
    struct log a = {0}, b = {0};
    fake_start(&fake, serve_and_die);
    struct hearth *h = must_connect(&fake);
    must_complete(h, "a", &a);
    uint64_t id = must_complete(h, "b", &b);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), -ECONNRESET);
    cr_assert(a.lost == 1 && a.errors == 1 && b.lost == 1 && b.errors == 1);
    cr_assert_str_eq(b.text, "half");
    cr_assert_str_eq(a.code, "internal");
    cr_assert_not_null(strstr(a.sentence, fake.path), "%s", a.sentence);
    cr_assert_eq(hearth_in_flight(h), 0);
    cr_assert_eq(hearth_dispatch(h), -ECONNRESET);
    cr_assert_eq(hearth_null(h, log_reply, &a, NULL), -ECONNRESET);
    cr_assert_eq(a.errors, 1);
    hearth_free(h);
    fake_stop(&fake);
}

static void serve_reason_and_close(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_error(&out, 0, "bad-frame", "the id 7 is live already: choose another", 0);
    fake_send(fd, &out);
}

Test(client, the_daemons_reason_for_closing_reaches_the_requests)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_reason_and_close);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_finish(h, must_complete(h, "a", &log), PATIENCE_US), -ECONNRESET);
    cr_assert_str_eq(log.sentence, "the id 7 is live already: choose another");
    cr_assert_str_eq(hearth_message(h), log.sentence);
    hearth_free(h);
    fake_stop(&fake);
}

/* One request, goaway, and its answer when the test says so. */
static void serve_goaway(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_goaway(&out);
    fake_put_tokens(&out, frame.header.id, "still ");
    if (!fake_send(fd, &out))
        return;
    while (!atomic_load(&fake->note))
        usleep(1000);
    fake_put_tokens(&out, frame.header.id, "here");
    fake_put_done(&out, frame.header.id, "stop");
    fake_send(fd, &out);
}

Test(client, after_goaway_running_requests_finish_and_new_ones_are_refused)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_goaway);
    struct hearth *h = must_connect(&fake);
    uint64_t id = must_complete(h, "a", &log);
    while (!hearth_going_away(h))
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    cr_assert_eq(hearth_null(h, log_reply, &log, NULL), -ESHUTDOWN);
    cr_assert_eq(hearth_in_flight(h), 1);
    atomic_store(&fake.note, 1);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_str_eq(log.text, "still here");
    cr_assert_eq(log.done, 1);
    hearth_free(h);
    fake_stop(&fake);
}

/* Sends 64 frames of 100 bytes and never more than the credit it has; `note` counts grants. */
static void serve_by_credit(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    char text[101];
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    uint64_t id = frame.header.id, credit = fake_number(&frame, TAG_CREDIT, FAKE_CREDIT);
    memset(text, 'x', 100);
    text[100] = '\0';
    for (int i = 0; i < 64; i++) {
        struct wire_buffer out = {0};
        while (credit < 100) {
            if (!fake_next(fd, &frame) || frame.header.type != WIRE_CREDIT || frame.header.id != id)
                return;
            credit += fake_number(&frame, TAG_CREDIT, 0);
            atomic_fetch_add(&fake->note, 1);
        }
        credit -= 100;
        fake_put_tokens(&out, id, text);
        if (!fake_send(fd, &out))
            return;
    }
    struct wire_buffer out = {0};
    fake_put_done(&out, id, "length");
    fake_send(fd, &out);
}

Test(client, credit_flows_back_in_halves_as_text_is_delivered)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_by_credit);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_finish(h, must_complete(h, "a", &log), PATIENCE_US), 0);
    cr_assert_eq(log.text_bytes, 6400);
    hearth_free(h);
    fake_stop(&fake);
    /* 6,400 bytes in grants of 600 (the first multiple of 100 from half of 1,024 on). */
    cr_assert(fake.note >= 9 && fake.note <= 11, "%d grants", fake.note);
}

Test(client, with_manual_credit_the_library_grants_nothing)
{
    struct fake fake;
    struct log log = {0};
    uint64_t id;
    fake_start(&fake, serve_by_credit);
    struct hearth *h = must_connect(&fake);
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.prompt = "a";
    request.credit = 300;
    request.manual_credit = true;
    cr_assert_eq(hearth_complete(h, &request, log_reply, &log, &id), 0);
    while (log.tokens < 3)
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    cr_assert_eq(hearth_finish(h, id, 50000), -ETIMEDOUT, "no more comes without credit");
    cr_assert(log.tokens == 3 && fake.note == 0);
    cr_assert_eq(hearth_credit(h, id, 6100), 0);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert(log.tokens == 64 && fake.note == 1);
    cr_assert_eq(hearth_credit(h, id, 1), -ENOENT);
    hearth_free(h);
    fake_stop(&fake);
}

/* Streams until cancelled; then counts what else comes. */
static void serve_until_cancel(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    uint64_t id = frame.header.id;
    fake_put_tokens(&out, id, "start");
    if (!fake_send(fd, &out) || !fake_next(fd, &frame) || frame.header.type != WIRE_CANCEL ||
        frame.header.id != id || frame.header.body_len != 0)
        return;
    fake_put_done(&out, id, "cancelled");
    fake_send(fd, &out);
    while (fake_next(fd, &frame))
        atomic_fetch_add(&fake->note, frame.header.type == WIRE_CANCEL);
}

Test(client, a_cancelled_request_still_gets_its_end)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_until_cancel);
    struct hearth *h = must_connect(&fake);
    uint64_t id = must_complete(h, "a", &log);
    while (!log.tokens)
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    cr_assert_eq(hearth_cancel(h, id), 0);
    cr_assert_eq(hearth_cancel(h, id), 0, "a second time changes nothing");
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_str_eq(log.reason, "cancelled");
    cr_assert_eq(hearth_cancel(h, id), -ENOENT);
    cr_assert_eq(hearth_cancel(h, 0), -ENOENT);
    cr_assert_eq(hearth_cancel(h, UINT64_MAX), -ENOENT);
    hearth_free(h);
    fake_stop(&fake);
    cr_assert_eq(fake.note, 0);
}

/* ---- connecting to what is no daemon, or a bad one ---- */

static void serve_silence(struct fake *fake, int fd)
{
    char c;
    (void)fake;
    while (recv(fd, &c, 1, 0) > 0)
        ;
}

Test(client, a_silent_daemon_is_given_up_in_time)
{
    struct fake fake;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES];
    fake_start(&fake, serve_silence);
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    options.socket_path = fake.path;
    options.connect_timeout_us = 50000;
    cr_assert_eq(hearth_connect(&options, &h, message), -ETIMEDOUT);
    cr_assert_null(h);
    cr_assert_not_null(strstr(message, "did not answer within 0.1 s"), "%s", message);
    fake_stop(&fake);
}

static void serve_http(struct fake *fake, int fd)
{
    (void)fake;
    fake_write(fd, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
    serve_silence(fake, fd);
}

static void serve_wrong_version(struct fake *fake, int fd)
{
    (void)fake;
    fake_write(fd, "HRTHv2\0\0", 8);
    serve_silence(fake, fd);
}

static void serve_nothing(struct fake *fake, int fd)
{
    char bytes[8];
    (void)fake;
    fake_read(fd, bytes, sizeof(bytes));
}

/* The magic and one frame with id 0 in place of the hello. */
static void serve_first(int fd, uint16_t type, uint16_t tag, const char *text)
{
    struct wire_buffer out = {0};
    wire_append(&out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(&out, type, 0);
    if (text)
        wire_put_text(&out, tag, text);
    wire_end(&out);
    fake_send(fd, &out);
    serve_silence(NULL, fd);
}

static void serve_refusal(struct fake *fake, int fd)
{
    (void)fake;
    serve_first(fd, WIRE_ERROR, TAG_SENTENCE, "uid 1000 has 1024 connections, its limit");
}

static void serve_early_goaway(struct fake *fake, int fd)
{
    (void)fake;
    serve_first(fd, WIRE_GOAWAY, 0, NULL);
}

static void serve_tokens_first(struct fake *fake, int fd)
{
    (void)fake;
    serve_first(fd, WIRE_TOKENS, TAG_TEXT, "x");
}

static void serve_bad_hello(struct fake *fake, int fd)
{
    (void)fake;
    serve_first(fd, WIRE_HELLO, TAG_PID, "abc");
}

static void serve_huge_hello(struct fake *fake, int fd)
{
    (void)fake;
    fake_write(fd, "HRTHv1\0\0\377\377\377\377\1\0\0\0\0\0\0\0\0\0\0\0", 24);
    serve_silence(fake, fd);
}

Test(client, what_is_no_good_daemon_is_named_so)
{
    static const struct {
        fake_script script;
        int error;
        const char *sentence;
    } cases[] = {
        {serve_http, -EPROTO, "does not speak hearth's protocol"},
        {serve_wrong_version, -EPROTO, "does not speak hearth's protocol"},
        {serve_nothing, -ECONNRESET, "before its hello"},
        {serve_refusal, -EBUSY, "uid 1000 has 1024 connections, its limit"},
        {serve_early_goaway, -ESHUTDOWN, "going away"},
        {serve_tokens_first, -EPROTO, "no hello"},
        {serve_bad_hello, -EPROTO, "malformed"},
        {serve_huge_hello, -EPROTO, "a frame of 4294967295 bytes"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct fake fake;
        struct hearth *h = NULL;
        char message[HEARTH_MESSAGE_BYTES] = "";
        fake_start(&fake, cases[i].script);
        cr_assert_eq(fake_connect(&fake, &h, message), cases[i].error, "case %zu: %s", i, message);
        cr_assert_null(h);
        cr_assert_not_null(strstr(message, cases[i].sentence), "case %zu: %s", i, message);
        cr_assert_not_null(strstr(message, fake.path), "case %zu: %s", i, message);
        fake_stop(&fake);
    }
}

Test(client, where_nobody_listens_the_sentence_says_how_to_start)
{
    struct fake fake;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES];
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    options.socket_path = "/nonexistent/hearth.sock";
    for (int status = 0; status < 2; status++) {
        options.status_socket = status;
        cr_assert_eq(hearth_connect(&options, &h, message), -ENOENT);
        cr_assert_str_eq(message, "no daemon at /nonexistent/hearth.sock: start it with "
                                  "'systemctl start hearthd.socket' or "
                                  "'hearthd --socket /nonexistent/hearth.sock'");
    }
    fake_start(&fake, fake_serve_done);
    char path[2 * HEARTH_PATH_BYTES];
    snprintf(path, sizeof(path), "%s.old", fake.path);
    cr_assert_eq(rename(fake.path, path), 0);
    fake_stop(&fake);
    options.socket_path = path;
    options.status_socket = false;
    cr_assert_eq(hearth_connect(&options, &h, message), -ECONNREFUSED);
    cr_assert_not_null(strstr(message, "nobody listens"), "%s", message);
    unlink(path);
    rmdir(fake.dir);

    char longer[2 * HEARTH_PATH_BYTES];
    memset(longer, 'a', sizeof(longer) - 1);
    longer[sizeof(longer) - 1] = '\0';
    options.socket_path = longer;
    cr_assert_eq(hearth_connect(&options, &h, message), -ENAMETOOLONG);
    options.socket_path = "";
    cr_assert_eq(hearth_connect(&options, &h, NULL), -ENOENT);
    options.size = 3;
    cr_assert_eq(hearth_connect(&options, &h, message), -EINVAL);
}

/* ---- hostile replies ---- */

static uint8_t hostile[64];
static size_t hostile_len;

static void serve_hostile(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    /* Bytes 8 to 15 of a header are the id. */
    memcpy(hostile + 8, &frame.header.id, 8);
    fake_write(fd, hostile, hostile_len);
    serve_silence(fake, fd);
}

Test(client, a_reply_that_breaks_the_protocol_ends_the_connection)
{
    static const struct {
        const char *sentence;
        uint8_t head[8], body[24];
        size_t body_len;
    } cases[] = {
        {"a frame of 67108865 bytes", {1, 0, 0, 4, 65}, {0}, 0},
        {"a frame of 4294967295 bytes", {255, 255, 255, 255, 65}, {0}, 0},
        {"a reserved field", {0, 0, 0, 0, 65, 0, 1, 0}, {0}, 0},
        {"an option runs past", {8, 0, 0, 0, 65}, {64, 0, 0, 0, 9, 0, 0, 0}, 8},
        {"an option runs past", {7, 0, 0, 0, 65}, {64, 0, 0, 0, 0, 0, 0}, 7},
        {"an option runs past", {8, 0, 0, 0, 66}, {64, 0, 1, 0, 0, 0, 0, 0}, 8},
        {"'seed' of 3 bytes", {11, 0, 0, 0, 66}, {28, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3}, 11},
        {"'ids' of 5 bytes", {13, 0, 0, 0, 64}, {18, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4, 5}, 13},
        {"'vector' of 1 bytes", {9, 0, 0, 0, 64}, {84, 0, 0, 0, 1, 0, 0, 0, 1}, 9},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct fake fake;
        struct log log = {0};
        memcpy(hostile, cases[i].head, 8);
        memcpy(hostile + WIRE_HEADER_BYTES, cases[i].body, cases[i].body_len);
        hostile_len = WIRE_HEADER_BYTES + cases[i].body_len;
        fake_start(&fake, serve_hostile);
        struct hearth *h = must_connect(&fake);
        cr_assert_eq(hearth_finish(h, must_complete(h, "a", &log), PATIENCE_US), -EPROTO,
                     "case %zu", i);
        cr_assert(log.lost == 1 && log.errors == 1, "case %zu", i);
        cr_assert_not_null(strstr(log.sentence, cases[i].sentence), "case %zu: %s", i,
                           log.sentence);
        hearth_free(h);
        fake_stop(&fake);
    }
}

/* What later versions may send: unknown types, tags and ids, an error without words. */
static void serve_unknown(struct fake *fake, int fd)
{
    (void)fake;
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    uint64_t id = frame.header.id;
    wire_begin(&out, 999, id);
    wire_put_text(&out, 999, "news");
    wire_end(&out);
    fake_put_tokens(&out, id + 1, "for nobody");
    fake_put_tokens(&out, UINT64_MAX, "for nobody");
    wire_begin(&out, 1000, 0);
    wire_end(&out);
    wire_begin(&out, WIRE_TOKENS, id);
    wire_put_number(&out, 1000, 7);
    wire_put_text(&out, TAG_TEXT, "for me");
    wire_put_text(&out, 0x8fff, "critical or not");
    wire_end(&out);
    wire_begin(&out, WIRE_ERROR, id);
    wire_end(&out);
    fake_put_tokens(&out, id, "too late");
    fake_put_done(&out, id, "twice");
    fake_send(fd, &out);
    serve_silence(NULL, fd);
}

Test(client, the_unknown_is_skipped)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_unknown);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_finish(h, must_complete(h, "a", &log), PATIENCE_US), 0);
    cr_assert_eq(hearth_wait(h, 1000), 0);
    cr_assert_str_eq(log.text, "for me");
    cr_assert(log.errors == 1 && log.done == 0 && log.lost == 0);
    cr_assert_str_eq(log.code, "internal");
    cr_assert_str_eq(log.sentence, "internal");
    hearth_free(h);
    fake_stop(&fake);
}

#define LARGE (1500u << 10)

static void serve_large(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    _cleanup_free_ char *text = malloc(LARGE);
    if (!fake_hello(fd))
        return;
    memset(text, 'L', LARGE);
    while (fake_next(fd, &frame)) {
        struct wire_buffer out = {0};
        if (frame.header.type == WIRE_CREDIT)
            continue;
        wire_begin(&out, WIRE_TOKENS, frame.header.id);
        wire_put_bytes(&out, TAG_TEXT, text, LARGE);
        wire_end(&out);
        fake_put_done(&out, frame.header.id, "stop");
        if (!fake_send(fd, &out))
            return;
        atomic_fetch_add(&fake->seen, 1);
    }
}

static void check_large(void *userdata, const struct hearth_reply *reply)
{
    if (reply->kind == HEARTH_DONE)
        return;
    cr_assert_eq(reply->kind, HEARTH_TOKENS);
    cr_assert_eq(reply->text_bytes, LARGE);
    cr_assert_eq(strlen(reply->text), LARGE, "terminated, though another frame follows");
    cr_assert(reply->text[0] == 'L' && reply->text[LARGE - 1] == 'L');
    ++*(int *)userdata;
}

Test(client, a_large_reply_arrives_whole_and_its_memory_goes_back)
{
    struct fake fake;
    int n = 0;
    fake_start(&fake, serve_large);
    struct hearth *h = must_connect(&fake);
    for (int i = 0; i < 3; i++) {
        struct hearth_generate request = HEARTH_GENERATE_INIT;
        uint64_t id;
        request.prompt = "a";
        cr_assert_eq(hearth_complete(h, &request, check_large, &n, &id), 0);
        cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
        cr_assert_leq(h->in_capacity, 256u << 10);
    }
    cr_assert_eq(n, 3);
    hearth_free(h);
    fake_stop(&fake);
}

/* The goaway and more come in one packet with the hello. */
static void serve_hello_and_more(struct fake *fake, int fd)
{
    struct wire_buffer out = {0};
    fake_put_hello(&out);
    fake_put_goaway(&out);
    fake_send(fd, &out);
    serve_silence(fake, fd);
}

Test(client, what_comes_with_the_hello_is_not_left_lying)
{
    struct fake fake;
    fake_start(&fake, serve_hello_and_more);
    struct hearth *h = must_connect(&fake);
    cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    cr_assert(hearth_going_away(h));
    hearth_free(h);
    fake_stop(&fake);
}

/* ---- re-entrancy ---- */

static void reply_starts_another(void *userdata, const struct hearth_reply *reply)
{
    struct log *log = userdata;
    log_reply(log, reply);
    if (reply->kind != HEARTH_DONE || log->done >= 100)
        return;
    /* Enough to move the table while the reply is still in use. */
    for (int i = 0; i < 3; i++)
        cr_assert_eq(hearth_null(log->h, log_reply, &log[1], NULL), 0);
    cr_assert_eq(hearth_null(log->h, reply_starts_another, log, NULL), 0);
    cr_assert_str_eq(reply->reason, "stop");
}

Test(client, a_callback_may_start_requests)
{
    struct fake fake;
    static struct log log[2];
    fake_start(&fake, fake_serve_done);
    struct hearth *h = log->h = must_connect(&fake);
    cr_assert_eq(hearth_null(h, reply_starts_another, log, NULL), 0);
    while (hearth_in_flight(h) > 0)
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    cr_assert_eq(log[0].done, 100);
    cr_assert_eq(log[1].done, 297);
    hearth_free(h);
    fake_stop(&fake);
}

static void reply_frees(void *userdata, const struct hearth_reply *reply)
{
    struct log *log = userdata;
    log_reply(log, reply);
    cr_assert_null(hearth_free(log->h));
    cr_assert_eq(hearth_null(log->h, log_reply, log, NULL), -ECONNRESET);
}

Test(client, a_callback_may_free_the_connection)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_turns);
    /* In the middle of a dispatch, of a wait, of a finish; with more replies behind. */
    for (int way = 0; way < 3; way++) {
        uint64_t id;
        log.h = must_connect(&fake);
        cr_assert_eq(hearth_null(log.h, reply_frees, &log, &id), 0);
        cr_assert_eq(hearth_null(log.h, reply_frees, &log, NULL), 0);
        int r = 0;
        while (r == 0 && way == 0)
            r = hearth_dispatch(log.h);
        while (r == 0 && way == 1)
            r = hearth_wait(log.h, PATIENCE_US);
        if (way == 2)
            r = hearth_finish(log.h, id, PATIENCE_US);
        cr_assert_eq(r, -ECANCELED);
        cr_assert_eq(log.tokens + log.done, way + 1, "no callback runs after the first");
    }
    fake_stop(&fake);
}

Test(client, a_callback_may_free_a_connection_that_was_just_lost)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_and_die);
    log.h = must_connect(&fake);
    cr_assert_eq(hearth_null(log.h, reply_frees, &log, NULL), 0);
    cr_assert_eq(hearth_null(log.h, log_reply, &log, NULL), 0);
    int r;
    do
        r = hearth_wait(log.h, PATIENCE_US);
    while (r >= 0);
    cr_assert_eq(r, -ECANCELED);
    cr_assert_eq(log.errors, 1);
    fake_stop(&fake);
}

static void reply_waits(void *userdata, const struct hearth_reply *reply)
{
    struct log *log = userdata;
    log_reply(log, reply);
    cr_assert_eq(hearth_dispatch(log->h), -EBUSY);
    cr_assert_eq(hearth_wait(log->h, 0), -EBUSY);
    cr_assert_eq(hearth_finish(log->h, reply->id + 1, 0), -EBUSY);
    log->result++;
}

Test(client, a_callback_cannot_dispatch)
{
    struct fake fake;
    struct log log = {0};
    uint64_t id, second;
    fake_start(&fake, fake_serve_done);
    log.h = must_connect(&fake);
    cr_assert_eq(hearth_null(log.h, reply_waits, &log, &id), 0);
    cr_assert_eq(hearth_null(log.h, log_reply, &log, &second), 0);
    cr_assert_eq(second, id + 1);
    cr_assert_eq(hearth_finish(log.h, id, PATIENCE_US), 0);
    cr_assert_eq(log.result, 1);
    hearth_free(log.h);
    fake_stop(&fake);
}

/* ---- what goes out ---- */

/* Keeps the first request's frame for the test. */
static struct fake_frame kept;

static void serve_keep(struct fake *fake, int fd)
{
    (void)fake;
    struct wire_buffer out = {0};
    if (!fake_hello(fd) || !fake_next(fd, &kept))
        return;
    fake_put_done(&out, kept.header.id, "stop");
    fake_send(fd, &out);
    serve_silence(NULL, fd);
}

static size_t kept_options(void)
{
    struct wire_reader reader;
    struct wire_option option;
    size_t n = 0;
    wire_reader_init(&reader, kept.body, kept.header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        n++;
    return n;
}

static void send_and_keep(const struct hearth_generate *request,
                          int (*send)(struct hearth *, const struct hearth_generate *,
                                      hearth_reply_fn, void *, uint64_t *))
{
    struct fake fake;
    struct log log = {0};
    uint64_t id;
    fake_start(&fake, serve_keep);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(send(h, request, log_reply, &log, &id), 0, "%s", hearth_message(h));
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    hearth_free(h);
    fake_stop(&fake);
}

Test(client, only_what_differs_from_the_defaults_is_sent)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    char text[32];
    request.model = "ember";
    request.prompt = "Once and not twice";
    request.prompt_bytes = 4;
    send_and_keep(&request, hearth_complete);
    cr_assert_eq(kept.header.type, WIRE_COMPLETE);
    cr_assert_eq(kept_options(), 2);
    cr_assert(fake_text(&kept, TAG_MODEL, text, sizeof(text)));
    cr_assert_str_eq(text, "ember");
    cr_assert(fake_text(&kept, TAG_PROMPT, text, sizeof(text)));
    cr_assert_str_eq(text, "Once");
}

Test(client, every_option_of_a_request_has_its_tag)
{
    static const char *const stops[] = {"\n\n", "The end"};
    static const int32_t ids[] = {1, 2, 3};
    static const struct {
        uint16_t tag;
        uint64_t value;
    } numbers[] = {
        {TAG_STREAM, 0},        {TAG_CREDIT, 77},       {TAG_MAX_TOKENS, 9},  {TAG_TOP_K, 0},
        {TAG_SEED, 1ull << 40}, {TAG_IGNORE_EOS, 1},    {TAG_DEADLINE_US, 5}, {TAG_PRIORITY, 1},
        {TAG_SKIP_BYTES, 6},    {TAG_KEEP_ALIVE_US, 8},
    };
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.ids = ids;
    request.n_ids = 3;
    request.no_stream = true;
    request.credit = 77;
    request.max_tokens = 9;
    request.temperature = 0;
    request.top_k = 0;
    request.top_p = 0.5f;
    request.min_p = 0.25f;
    request.repeat_penalty = 1.5f;
    request.seed = 1ull << 40;
    request.has_seed = true;
    request.stops = stops;
    request.n_stops = 2;
    request.ignore_eos = true;
    request.deadline_us = 5;
    request.batch_priority = true;
    request.skip_bytes = 6;
    request.fingerprint = "print";
    request.fingerprint_bytes = 5;
    request.keep_alive_us = 8;
    send_and_keep(&request, hearth_complete);
    for (size_t i = 0; i < ELEMENTSOF(numbers); i++)
        cr_assert_eq(fake_number(&kept, numbers[i].tag, 12345), numbers[i].value, "%s",
                     wire_tag_name(numbers[i].tag));
    struct wire_reader reader;
    struct wire_option option;
    float sum = 0;
    int n_stops = 0;
    wire_reader_init(&reader, kept.body, kept.header.body_len);
    while (wire_reader_next(&reader, &option) > 0) {
        float real;
        if (option.tag >= TAG_TEMPERATURE && option.tag <= TAG_REPEAT_PENALTY &&
            option.tag != TAG_TOP_K && wire_option_real(&option, &real) == 0)
            sum += real;
        if (option.tag == TAG_STOP)
            cr_assert(wire_option_is(&option, stops[n_stops++]));
        if (option.tag == TAG_IDS)
            cr_assert(option.len == sizeof(ids) && memcmp(option.value, ids, sizeof(ids)) == 0);
    }
    cr_assert_eq(n_stops, 2);
    cr_assert_eq(sum, 0.0f + 0.5f + 0.25f + 1.5f);
    cr_assert_eq(kept_options(), ELEMENTSOF(numbers) + 4 + 2 + 1 + 1);
}

Test(client, a_chat_sends_its_messages_in_order)
{
    static const struct hearth_message_part parts[] = {{"system", "Be kind."}, {"user", "Hello"}};
    static const char *const expected[] = {"system", "Be kind.", "user", "Hello"};
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.messages = parts;
    request.n_messages = 2;
    send_and_keep(&request, hearth_chat);
    cr_assert_eq(kept.header.type, WIRE_CHAT);
    struct wire_reader reader;
    struct wire_option option;
    int n = 0;
    wire_reader_init(&reader, kept.body, kept.header.body_len);
    for (; wire_reader_next(&reader, &option) > 0; n++) {
        cr_assert_eq(option.tag, n % 2 ? TAG_CONTENT : TAG_ROLE);
        cr_assert(wire_option_is(&option, expected[n]));
    }
    cr_assert_eq(n, 4);
}

Test(client, impossible_requests_are_refused_here_and_harm_nothing)
{
    static const char *const stops[] = {"1", "2", "3", "4", "5", "6", "7", "8", "9"};
    static const char *const empty[] = {""};
    struct fake fake;
    struct log log = {0};
    char large[FAKE_FRAME_LIMIT];
    fake_start(&fake, fake_serve_done);
    struct hearth *h = must_connect(&fake);
    struct hearth_generate bad[7];
    for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
        bad[i] = (struct hearth_generate)HEARTH_GENERATE_INIT;
        bad[i].prompt = "a";
    }
    bad[0].prompt = NULL;
    bad[1].temperature = NAN;
    bad[2].repeat_penalty = INFINITY;
    bad[3].stops = stops;
    bad[3].n_stops = ELEMENTSOF(stops);
    bad[4].stops = empty;
    bad[4].n_stops = 1;
    bad[5].size = 0;
    bad[6].size = sizeof(size_t) + sizeof(char *);
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        cr_assert_eq(hearth_complete(h, &bad[i], log_reply, &log, NULL), -EINVAL, "case %zu", i);
    memset(large, 'a', sizeof(large) - 1);
    large[sizeof(large) - 1] = '\0';
    bad[0].prompt = large;
    cr_assert_eq(hearth_complete(h, &bad[0], log_reply, &log, NULL), -EMSGSIZE);
    cr_assert_not_null(strstr(hearth_message(h), "4096"), "%s", hearth_message(h));
    cr_assert_eq(hearth_in_flight(h), 0);
    cr_assert_eq(hearth_finish(h, must_complete(h, "good", &log), PATIENCE_US), 0);
    cr_assert(log.done == 1 && fake.seen == 1);
    hearth_free(h);
    fake_stop(&fake);
}

Test(client, a_longer_struct_of_a_later_version_is_taken_while_its_end_is_empty)
{
    struct {
        struct hearth_generate now;
        uint64_t later;
    } request = {.now = HEARTH_GENERATE_INIT};
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, fake_serve_done);
    struct hearth *h = must_connect(&fake);
    request.now.size = sizeof(request);
    request.now.prompt = "a";
    cr_assert_eq(hearth_complete(h, &request.now, log_reply, &log, NULL), 0);
    request.later = 1;
    cr_assert_eq(hearth_complete(h, &request.now, log_reply, &log, NULL), -EINVAL);
    hearth_free(h);
    fake_stop(&fake);
}

Test(client, options_of_a_later_version_are_taken_while_their_end_is_empty)
{
    struct {
        struct hearth_options now;
        uint64_t later;
    } options = {.now = HEARTH_OPTIONS_INIT};
    struct fake fake;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES];
    fake_start(&fake, fake_serve_done);
    options.now.size = sizeof(options);
    options.now.socket_path = fake.path;
    cr_assert_eq(hearth_connect(&options.now, &h, message), 0, "%s", message);
    h = hearth_free(h);
    options.later = 1;
    cr_assert_eq(hearth_connect(&options.now, &h, message), -EINVAL);
    cr_assert_not_null(strstr(message, "does not know"), "%s", message);
    options.now.size = sizeof(size_t) + sizeof(char *);
    cr_assert_eq(hearth_connect(&options.now, &h, message), -EINVAL);
    cr_assert_not_null(strstr(message, "HEARTH_OPTIONS_INIT"), "%s", message);
    cr_assert_null(h);
    fake_stop(&fake);
}

/* ---- somebody else's loop, signals ---- */

Test(client, somebody_elses_loop_can_drive_it)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_by_credit);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_events(h), POLLIN);
    must_complete(h, "a", &log);
    cr_assert_eq(hearth_events(h), POLLIN | POLLOUT);
    while (hearth_in_flight(h) > 0) {
        struct pollfd pfd = {.fd = hearth_fd(h), .events = hearth_events(h)};
        cr_assert_eq(poll(&pfd, 1, PATIENCE_US / 1000), 1);
        cr_assert_geq(hearth_dispatch(h), 0);
    }
    cr_assert_eq(log.text_bytes, 6400);
    hearth_free(h);
    fake_stop(&fake);
}

Test(client, writing_to_a_daemon_that_is_gone_raises_no_signal)
{
    struct fake fake;
    struct log log = {0};
    signal(SIGPIPE, SIG_DFL);
    fake_start(&fake, serve_and_die);
    struct hearth *h = must_connect(&fake);
    must_complete(h, "a", &log);
    must_complete(h, "b", &log);
    int r = hearth_dispatch(h);
    fake_stop(&fake); /* its end is closed now */
    for (int i = 0; i < 100 && r >= 0; i++) {
        must_complete(h, "c", &log);
        r = hearth_dispatch(h);
    }
    cr_assert_eq(r, -ECONNRESET);
    cr_assert_eq(hearth_in_flight(h), 0);
    hearth_free(h);
}

static void on_alarm(int signal_number)
{
    (void)signal_number;
}

Test(client, a_signal_ends_a_wait_and_the_request_lives_on)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, serve_until_cancel);
    struct hearth *h = must_connect(&fake);
    uint64_t id = must_complete(h, "a", &log);
    /* The daemon's threads block it, so it comes here; it repeats, so that no moment misses it. */
    struct sigaction action = {.sa_handler = on_alarm};
    struct itimerval often = {{0, 5000}, {0, 5000}}, never = {0};
    sigaction(SIGALRM, &action, NULL);
    while (!log.tokens)
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0);
    setitimer(ITIMER_REAL, &often, NULL);
    int r = -ETIMEDOUT;
    for (int i = 0; i < 1000 && r == -ETIMEDOUT; i++)
        r = hearth_finish(h, id, 20000);
    setitimer(ITIMER_REAL, &never, NULL);
    cr_assert_eq(r, -EINTR);
    cr_assert_eq(hearth_in_flight(h), 1);
    cr_assert_eq(hearth_cancel(h, id), 0);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    hearth_free(h);
    fake_stop(&fake);
}

Test(client, an_ended_request_is_finished_at_once)
{
    struct fake fake;
    struct log log = {0};
    fake_start(&fake, fake_serve_done);
    struct hearth *h = must_connect(&fake);
    uint64_t id = must_complete(h, "a", &log);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_eq(hearth_finish(h, id, UINT64_MAX), 0);
    cr_assert_eq(hearth_finish(h, 12345, UINT64_MAX), 0);
    hearth_free(h);
    fake_stop(&fake);
}

/* Three requests are read by messages: which of them had a descriptor, and what it reads. */
static void serve_files(struct fake *fake, int fd)
{
    uint64_t ids[3] = {0};
    struct wire_buffer out = {0};
    if (!fake_hello(fd))
        return;
    for (int n = 0; n < 3;) {
        _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
        uint8_t bytes[1024];
        struct iovec iov = {bytes, sizeof(bytes)};
        struct msghdr message = {.msg_iov = &iov,
                                 .msg_iovlen = 1,
                                 .msg_control = control,
                                 .msg_controllen = sizeof(control)};
        ssize_t len = recvmsg(fd, &message, 0);
        if (len <= 0)
            return;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
        struct wire_header header = {0};
        for (ssize_t at = 0; at < len; at += WIRE_HEADER_BYTES + header.body_len) {
            if (wire_header_read(bytes + at, &header) < 0 || n == 3)
                return;
            ids[n++] = header.id;
        }
        if (!cmsg)
            continue;
        /* With a descriptor, the last frame of the message is a warm without a name. */
        int file;
        char text[16] = "";
        memcpy(&file, CMSG_DATA(cmsg), sizeof(file));
        if (header.type == WIRE_WARM && pread(file, text, sizeof(text) - 1, 0) == 4 &&
            strcmp(text, "GGUF") == 0)
            atomic_fetch_add(&fake->seen, n == 2);
        close(file);
    }
    for (int i = 0; i < 3; i++)
        fake_put_done(&out, ids[i], "stop");
    fake_send(fd, &out);
}

Test(client, a_file_goes_along_with_its_own_frame)
{
    struct fake fake;
    struct log log = {0};
    char path[] = "/tmp/hearth-file-XXXXXX";
    int fd = mkstemp(path);
    uint64_t id = 0;
    cr_assert_eq(write(fd, "GGUF", 4), 4);
    fake_start(&fake, serve_files);
    struct hearth *h = must_connect(&fake);
    cr_assert_eq(hearth_warm_fd(h, -1, true, log_reply, &log, NULL), -EBADF);
    cr_assert(*hearth_message(h));
    cr_assert_eq(hearth_null(h, log_reply, &log, NULL), 0);
    cr_assert_eq(hearth_warm_fd(h, fd, true, log_reply, &log, NULL), 0);
    close(fd); /* the library has its own */
    cr_assert_eq(hearth_warm_fd(h, 0, true, log_reply, &log, NULL), -EBUSY);
    cr_assert_eq(hearth_null(h, log_reply, &log, &id), 0);
    cr_assert_eq(hearth_finish(h, id, PATIENCE_US), 0);
    cr_assert_eq(log.done, 3);
    cr_assert_eq(atomic_load(&fake.seen), 1, "the descriptor came with the second frame");
    hearth_free(h);
    fake_stop(&fake);
    unlink(path);
}
