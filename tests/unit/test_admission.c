/* Admission: what a request's options must be, and how much each user may have open. */
#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/admission.h"
#include "tests/support/alloc_fail.h"

#define UNKNOWN_TAG          0x0777u
#define UNKNOWN_CRITICAL_TAG (WIRE_TAG_CRITICAL | 0x0777u)

/* A request's body, option by option. */
struct body {
    struct wire_buffer buffer;
};

static void begin(struct body *body)
{
    *body = (struct body){0};
    wire_begin(&body->buffer, WIRE_COMPLETE, 1);
}

static int parse(struct body *body, uint16_t type, struct request_options *ret_options,
                 struct refusal *ret_refusal)
{
    cr_assert_eq(wire_end(&body->buffer), 0);
    return admission_parse(type, body->buffer.data + WIRE_HEADER_BYTES,
                           body->buffer.len - WIRE_HEADER_BYTES, ret_options, ret_refusal);
}

static void done(struct body *body)
{
    wire_buffer_done(&body->buffer);
}

/* Parses one option alone. */
static int parse_one(uint16_t type, uint16_t tag, const void *value, size_t len,
                     struct request_options *ret_options, struct refusal *ret_refusal)
{
    struct body body;
    int r;

    begin(&body);
    wire_put_bytes(&body.buffer, tag, value, len);
    r = parse(&body, type, ret_options, ret_refusal);
    done(&body);
    return r;
}

Test(admission, without_options_the_defaults_hold)
{
    struct request_options options;
    struct refusal refusal;

    cr_assert_eq(admission_parse(WIRE_COMPLETE, NULL, 0, &options, &refusal), 0);
    cr_assert_str_empty(options.model);
    cr_assert_null(options.prompt);
    cr_assert_null(options.ids);
    cr_assert(options.stream);
    cr_assert_not(options.has_credit);
    cr_assert_eq(options.max_tokens, 256);
    cr_assert_float_eq(options.params.temperature, 0.8, 1e-6);
    cr_assert_eq(options.params.top_k, 40);
    cr_assert_float_eq(options.params.top_p, 0.95, 1e-6);
    cr_assert_float_eq(options.params.min_p, 0.05, 1e-6);
    cr_assert_float_eq(options.params.repeat_penalty, 1.0, 1e-6);
    cr_assert_not(options.has_seed);
    cr_assert_eq(options.stops.n, 0);
    cr_assert_not(options.ignore_eos);
    cr_assert_eq(options.deadline_us, 0);
    cr_assert_eq(options.priority, 0);
    cr_assert_eq(options.skip_bytes, 0);
}

static void put_every_option(struct wire_buffer *buffer)
{
    wire_put_text(buffer, TAG_MODEL, "stories-15M");
    wire_put_text(buffer, TAG_PROMPT, "Once");
    wire_put_number(buffer, TAG_STREAM, 0);
    wire_put_number(buffer, TAG_CREDIT, 1ull << 40);
    wire_put_number(buffer, TAG_MAX_TOKENS, 7);
    wire_put_real(buffer, TAG_TEMPERATURE, 0);
    wire_put_number(buffer, TAG_TOP_K, 0);
    wire_put_real(buffer, TAG_TOP_P, 1);
    wire_put_real(buffer, TAG_MIN_P, 0);
    wire_put_real(buffer, TAG_REPEAT_PENALTY, 1.5f);
    wire_put_number(buffer, TAG_SEED, UINT64_MAX);
    wire_put_text(buffer, TAG_STOP, "\n\n");
    wire_put_text(buffer, TAG_STOP, "END");
    wire_put_number(buffer, TAG_IGNORE_EOS, 1);
    wire_put_number(buffer, TAG_DEADLINE_US, 5000000);
    wire_put_number(buffer, TAG_PRIORITY, 1);
    wire_put_number(buffer, TAG_SKIP_BYTES, 99);
    wire_put_bytes(buffer, TAG_FINGERPRINT, "\1\2\3\4\5\6\7\x08", 8);
}

Test(admission, every_option_is_read)
{
    struct request_options options;
    struct refusal refusal;
    struct body body;

    begin(&body);
    put_every_option(&body.buffer);
    cr_assert_eq(parse(&body, WIRE_COMPLETE, &options, &refusal), 0);
    cr_assert_str_eq(options.model, "stories-15M");
    cr_assert_eq(options.prompt_bytes, 4);
    cr_assert_arr_eq(options.prompt, "Once", 4);
    cr_assert_not(options.stream);
    cr_assert(options.has_credit);
    cr_assert_eq(options.credit, 1ull << 40);
    cr_assert_eq(options.max_tokens, 7);
    cr_assert_float_eq(options.params.temperature, 0, 1e-6);
    cr_assert_eq(options.params.top_k, 0);
    cr_assert_float_eq(options.params.top_p, 1, 1e-6);
    cr_assert_float_eq(options.params.min_p, 0, 1e-6);
    cr_assert_float_eq(options.params.repeat_penalty, 1.5, 1e-6);
    cr_assert(options.has_seed);
    cr_assert_eq(options.params.seed, UINT64_MAX);
    cr_assert_eq(options.stops.n, 2);
    cr_assert_eq(options.stops.len[0], 2);
    cr_assert_arr_eq(options.stops.text[1], "END", 3);
    cr_assert(options.ignore_eos);
    cr_assert_eq(options.deadline_us, 5000000);
    cr_assert_eq(options.priority, 1);
    cr_assert_eq(options.skip_bytes, 99);
    cr_assert(options.has_fingerprint);
    cr_assert_eq(options.fingerprint, 0x0807060504030201u);
    done(&body);
}

#define VALUE(text) text, sizeof(text) - 1

Test(admission, a_bad_value_names_its_option)
{
    static const struct {
        uint16_t tag;
        const char *value;
        size_t len;
        const char *option;
    } cases[] = {
        {TAG_MODEL, VALUE("../etc/passwd"), "model"},
        {TAG_MODEL, VALUE(""), "model"},
        {TAG_MODEL, VALUE("a\0b"), "model"},
        {TAG_IDS, VALUE("\1\0\0\0\2"), "ids"},
        {TAG_STREAM, VALUE("\2"), "stream"},
        {TAG_STREAM, VALUE(""), "stream"},
        {TAG_CREDIT, VALUE("\1\2\3"), "credit"},
        {TAG_MAX_TOKENS, VALUE("\0\0\0\0"), "max_tokens"},
        {TAG_MAX_TOKENS, VALUE("\x41\x42\x0f\0"), "max_tokens"}, /* 1000001 */
        {TAG_TEMPERATURE, VALUE("\0\0\x80\xbf"), "temperature"}, /* -1 */
        {TAG_TEMPERATURE, VALUE("\0\0\xc0\x7f"), "temperature"}, /* not a number */
        {TAG_TEMPERATURE, VALUE("\0\0\x80\x7f"), "temperature"}, /* infinite */
        {TAG_TEMPERATURE, VALUE("\0\0\xca\x42"), "temperature"}, /* 101 */
        {TAG_TEMPERATURE, VALUE("\0\0"), "temperature"},
        {TAG_TOP_K, VALUE("\xff\xff\xff\xff"), "top_k"},
        {TAG_TOP_P, VALUE("\0\0\xc0\x3f"), "top_p"}, /* 1.5 */
        {TAG_MIN_P, VALUE("\0\0\x80\xbf"), "min_p"},
        {TAG_REPEAT_PENALTY, VALUE("\0\0\0\0"), "repeat_penalty"},
        {TAG_SEED, VALUE("seed!"), "seed"},
        {TAG_STOP, VALUE(""), "stop"},
        {TAG_STOP, VALUE("\xff"), "stop"},
        {TAG_STOP, VALUE("a\0b"), "stop"},
        {TAG_IGNORE_EOS, VALUE("\2"), "ignore_eos"},
        {TAG_DEADLINE_US, VALUE("\0\0\0\0"), "deadline_us"},
        {TAG_DEADLINE_US, VALUE("\xff\xff\xff\xff\xff\xff\xff\xff"), "deadline_us"},
        {TAG_PRIORITY, VALUE("\2"), "priority"},
        {TAG_SKIP_BYTES, VALUE("\1\2\3\4\5"), "skip_bytes"},
        {TAG_FINGERPRINT, VALUE("short"), "fingerprint"},
        {TAG_WAIT, VALUE("\7"), "wait"},
        {TAG_NAME, VALUE("\xc3"), "name"},
        {TAG_ON_BEHALF_OF, VALUE("\1\0\0"), "on-behalf-of"},
        {TAG_ON_BEHALF_OF, VALUE(""), "on-behalf-of"},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct request_options options;
        struct refusal refusal = {.sentence = ""};
        int r = parse_one(WIRE_COMPLETE, cases[i].tag, cases[i].value, cases[i].len, &options,
                          &refusal);
        cr_expect_eq(r, -EINVAL, "case %zu (%s) was taken", i, cases[i].option);
        if (r != -EINVAL)
            continue;
        cr_expect_eq(refusal.code, CODE_BAD_REQUEST);
        cr_expect_str_eq(refusal.option, cases[i].option);
        cr_expect(strncmp(refusal.sentence, cases[i].option, strlen(cases[i].option)) == 0, "%s",
                  refusal.sentence);
        cr_expect_not_null(strstr(refusal.sentence, "expected"), "%s", refusal.sentence);
    }
}

Test(admission, numbers_come_in_any_width_up_to_their_bounds)
{
    static const struct {
        const char *value;
        size_t len;
        uint32_t expected;
    } cases[] = {
        {VALUE("\1"), 1},
        {VALUE("\0\1"), 256},
        {VALUE("\x40\x42\x0f\0"), 1000000},
        {VALUE("\x40\x42\x0f\0\0\0\0\0"), 1000000},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct request_options options;
        struct refusal refusal;
        cr_expect_eq(parse_one(WIRE_COMPLETE, TAG_MAX_TOKENS, cases[i].value, cases[i].len,
                               &options, &refusal),
                     0);
        cr_expect_eq(options.max_tokens, cases[i].expected);
    }
}

Test(admission, stop_strings_are_bounded)
{
    struct request_options options;
    struct refusal refusal;
    struct body body;
    char text[STREAM_MAX_STOP_BYTES + 1];

    memset(text, 's', sizeof(text));
    cr_assert_eq(parse_one(WIRE_CHAT, TAG_STOP, text, STREAM_MAX_STOP_BYTES, &options, &refusal),
                 0);
    cr_assert_eq(options.stops.len[0], STREAM_MAX_STOP_BYTES);
    cr_assert_eq(
        parse_one(WIRE_CHAT, TAG_STOP, text, STREAM_MAX_STOP_BYTES + 1, &options, &refusal),
        -EINVAL);
    for (uint32_t n = STREAM_MAX_STOPS; n <= STREAM_MAX_STOPS + 1; n++) {
        begin(&body);
        for (uint32_t i = 0; i < n; i++)
            wire_put_text(&body.buffer, TAG_STOP, "s");
        cr_expect_eq(parse(&body, WIRE_COMPLETE, &options, &refusal),
                     n <= STREAM_MAX_STOPS ? 0 : -EINVAL);
        done(&body);
    }
    cr_assert_str_eq(refusal.option, "stop");
}

Test(admission, unknown_options_are_skipped_unless_they_must_be_understood)
{
    struct request_options options;
    struct refusal refusal;

    cr_assert_eq(parse_one(WIRE_COMPLETE, UNKNOWN_TAG, "x", 1, &options, &refusal), 0);
    cr_assert_eq(parse_one(WIRE_COMPLETE, UNKNOWN_CRITICAL_TAG, "x", 1, &options, &refusal),
                 -EINVAL);
    cr_assert_eq(refusal.code, CODE_BAD_REQUEST);
    cr_assert_not_null(strstr(refusal.sentence, "0x8777"), "%s", refusal.sentence);
}

Test(admission, options_that_must_be_understood_are_refused_where_they_mean_nothing)
{
    static const struct {
        uint16_t type, tag;
        int expected;
    } cases[] = {
        {WIRE_COMPLETE, TAG_DEADLINE_US, 0},
        {WIRE_CHAT, TAG_DEADLINE_US, 0},
        {WIRE_EMBED, TAG_DEADLINE_US, 0},
        {WIRE_TOKENIZE, TAG_DEADLINE_US, 0},
        {WIRE_WARM, TAG_DEADLINE_US, 0},
        {WIRE_STATUS, TAG_DEADLINE_US, -EINVAL},
        {WIRE_UNLOAD, TAG_DEADLINE_US, -EINVAL},
        {WIRE_COMPLETE, TAG_SKIP_BYTES, 0},
        {WIRE_EMBED, TAG_SKIP_BYTES, -EINVAL},
        {WIRE_TOKENIZE, TAG_STOP, -EINVAL},
        {WIRE_CHAT, TAG_STOP, 0},
        {WIRE_EMBED, TAG_STOP, -EINVAL},
        {WIRE_CREDIT, TAG_STOP, -EINVAL},
        {WIRE_GOAWAY, TAG_STOP, -EINVAL},
        {UINT16_MAX, TAG_STOP, -EINVAL},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct request_options options;
        struct refusal refusal;
        int r = parse_one(cases[i].type, cases[i].tag, "ssss", 4, &options, &refusal);
        cr_expect_eq(r, cases[i].expected, "case %zu: %d", i, r);
        if (r < 0)
            cr_expect_str_eq(refusal.option, wire_tag_name(cases[i].tag));
    }
}

Test(admission, the_first_refusal_stands_and_a_malformed_rest_still_ends_the_connection)
{
    struct request_options options;
    struct refusal refusal;
    struct body body;

    begin(&body);
    wire_put_number(&body.buffer, TAG_STREAM, 5);
    wire_put_number(&body.buffer, TAG_PRIORITY, 5);
    cr_assert_eq(parse(&body, WIRE_COMPLETE, &options, &refusal), -EINVAL);
    cr_assert_str_eq(refusal.option, "stream");
    cr_assert_eq(admission_parse(WIRE_COMPLETE, body.buffer.data + WIRE_HEADER_BYTES,
                                 body.buffer.len - WIRE_HEADER_BYTES - 1, &options, &refusal),
                 -EBADMSG);
    done(&body);
}

/* Every cut of a good body, and every byte of it bent: never more than the bytes given are read
 * (the copy has exactly their size, which a sanitizer watches), and what is taken keeps its bounds.
 */
Test(admission, hostile_bodies_are_refused_or_taken_whole)
{
    struct request_options options;
    struct refusal refusal;
    struct body body;
    size_t len, n_malformed = 0;

    begin(&body);
    put_every_option(&body.buffer);
    cr_assert_eq(wire_end(&body.buffer), 0);
    len = body.buffer.len - WIRE_HEADER_BYTES;
    for (size_t cut = 0; cut < len; cut++) {
        uint8_t *copy = malloc(cut ? cut : 1);
        int r;
        memcpy(copy, body.buffer.data + WIRE_HEADER_BYTES, cut);
        r = admission_parse(WIRE_COMPLETE, copy, cut, &options, &refusal);
        cr_assert(r == 0 || r == -EBADMSG, "cut at %zu: %d", cut, r);
        n_malformed += r == -EBADMSG;
        free(copy);
    }
    cr_assert_eq(n_malformed, len - 18, "only a cut between two of the 18 options is well formed");
    for (size_t at = 0; at < len; at++) {
        uint8_t *copy = malloc(len);
        memcpy(copy, body.buffer.data + WIRE_HEADER_BYTES, len);
        for (unsigned bit = 0; bit < 8; bit++) {
            int r;
            copy[at] ^= (uint8_t)(1u << bit);
            r = admission_parse(WIRE_COMPLETE, copy, len, &options, &refusal);
            cr_assert(r == 0 || r == -EBADMSG || r == -EINVAL);
            if (r == 0) {
                cr_assert(isfinite(options.params.temperature));
                cr_assert_leq(options.stops.n, STREAM_MAX_STOPS);
                cr_assert(options.max_tokens >= 1 && options.max_tokens <= 1000000);
            }
            copy[at] ^= (uint8_t)(1u << bit);
        }
        free(copy);
    }
    done(&body);
}

Test(admission, another_user_is_named_with_his_groups)
{
    uint32_t ids[2 + PEER_MAX_GROUPS] = {1000, 100, 27};
    struct request_options options;
    struct refusal refusal;

    struct body body;

    begin(&body);
    wire_put_bytes(&body.buffer, TAG_ON_BEHALF_OF, ids, 12);
    cr_assert_eq(parse(&body, WIRE_HOLD, &options, &refusal), 0);
    cr_assert(options.on_behalf);
    cr_assert_eq(options.uid, 1000);
    cr_assert_eq(options.n_gids, 2);
    cr_assert_arr_eq(options.gids, (uint8_t *)(ids + 1), 8);
    done(&body); /* the groups are a view into it */
    cr_assert_eq(
        parse_one(WIRE_HOLD, TAG_ON_BEHALF_OF, ids, 4 * (1 + PEER_MAX_GROUPS), &options, &refusal),
        0);
    cr_assert_eq(parse_one(WIRE_HOLD, TAG_ON_BEHALF_OF, ids, sizeof(ids), &options, &refusal),
                 -EINVAL);
}

/* ---- accounts ---- */

struct house {
    struct config *config;
    struct admission *admission;
};

static void build_house(struct house *house)
{
    cr_assert_eq(config_new(&house->config), 0);
    house->config->limits.connections = 3;
    house->config->limits.connections_per_uid = 2;
    house->config->limits.queue = 5;
    house->config->limits.queue_per_uid = 3;
    house->config->limits.input_bytes = 1000;
    house->config->limits.input_bytes_per_uid = 600;
    cr_assert_eq(admission_new(house->config, &house->admission), 0);
}

static void leave_house(struct house *house)
{
    admission_free(house->admission);
    config_free(house->config);
}

Test(admission, a_user_there_is_no_memory_for_is_refused_and_nothing_is_counted)
{
    struct account_entry *account = NULL;
    struct refusal refusal;
    struct house house;
    unsigned refused = 0;

    build_house(&house);
    for (unsigned n = 1; !account; n++) {
        alloc_fail_at(n);
        account = admission_connect(house.admission, 1000, &refusal);
        cr_assert_eq(alloc_fail_done(), !account);
        cr_assert(account || refusal.code == CODE_NO_MEMORY);
        cr_assert_eq(admission_n_connections(house.admission), account != NULL);
        refused += !account;
    }
    cr_assert_geq(refused, 3, "the account, the table and its buckets");
    admission_disconnect(house.admission, account);
    leave_house(&house);
}

Test(admission, connections_are_limited_for_the_user_and_for_the_house)
{
    struct house house;
    struct account_entry *a, *b;
    struct refusal refusal;

    build_house(&house);
    a = admission_connect(house.admission, 1000, &refusal);
    cr_assert_not_null(a);
    cr_assert_eq(admission_connect(house.admission, 1000, &refusal), a, "one account a user");
    cr_assert_null(admission_connect(house.admission, 1000, &refusal));
    cr_assert_eq(refusal.code, CODE_BUSY);
    cr_assert(refusal.retry_after_us > 0);
    cr_assert_not_null(strstr(refusal.sentence, "limits.connections_per_uid is 2"));
    b = admission_connect(house.admission, 1001, &refusal);
    cr_assert_not_null(b);
    cr_assert_null(admission_connect(house.admission, 1002, &refusal));
    cr_assert_not_null(strstr(refusal.sentence, "limits.connections is 3"));
    cr_assert_eq(admission_n_connections(house.admission), 3);
    admission_disconnect(house.admission, a);
    cr_assert_not_null(admission_connect(house.admission, 1002, &refusal));
    leave_house(&house);
}

Test(admission, the_queue_is_limited_for_the_user_and_for_the_house)
{
    struct house house;
    struct account_entry *a, *b;
    struct refusal refusal;

    build_house(&house);
    a = admission_connect(house.admission, 1000, &refusal);
    b = admission_connect(house.admission, 1001, &refusal);
    for (int i = 0; i < 3; i++)
        cr_assert_eq(admission_enter(house.admission, a, &refusal), 0);
    cr_assert_eq(admission_enter(house.admission, a, &refusal), -EINVAL);
    cr_assert_eq(refusal.code, CODE_BUSY);
    cr_assert(refusal.retry_after_us > 0);
    cr_assert_not_null(strstr(refusal.sentence, "limits.queue_per_uid is 3"));
    cr_assert_eq(admission_enter(house.admission, b, &refusal), 0, "another user has his own");
    cr_assert_eq(admission_enter(house.admission, b, &refusal), 0);
    cr_assert_eq(admission_enter(house.admission, b, &refusal), -EINVAL);
    cr_assert_not_null(strstr(refusal.sentence, "limits.queue is 5"));
    cr_assert_eq(admission_n_requests(house.admission), 5);
    admission_leave(house.admission, a);
    cr_assert_eq(admission_enter(house.admission, b, &refusal), 0);
    leave_house(&house);
}

Test(admission, input_is_limited_for_the_user_and_for_the_house)
{
    struct house house;
    struct account_entry *a, *b;
    struct refusal refusal;

    build_house(&house);
    a = admission_connect(house.admission, 1000, &refusal);
    b = admission_connect(house.admission, 1001, &refusal);
    cr_assert(admission_hold_input(house.admission, a, 600));
    cr_assert_not(admission_hold_input(house.admission, a, 1));
    cr_assert(admission_hold_input(house.admission, a, 0));
    cr_assert_not(admission_hold_input(house.admission, b, 401), "the house has 400 left");
    cr_assert(admission_hold_input(house.admission, b, 400));
    cr_assert_not(admission_hold_input(house.admission, b, SIZE_MAX), "no sum runs over");
    admission_release_input(house.admission, a, 600);
    cr_assert(admission_hold_input(house.admission, b, 200));
    cr_assert_not(admission_hold_input(house.admission, b, 1));
    leave_house(&house);
}

/* Or it would be refused for ever. */
Test(admission, whoever_holds_nothing_else_may_hold_what_is_larger_than_the_bound)
{
    struct house house;
    struct account_entry *a, *b;
    struct refusal refusal;
    size_t held = 0, more = 0;

    build_house(&house);
    a = admission_connect(house.admission, 1000, &refusal);
    b = admission_connect(house.admission, 1001, &refusal);
    cr_assert(admission_resize_input(house.admission, a, &held, 500));
    cr_assert(admission_resize_input(house.admission, a, &held, 5000), "it is his only one");
    cr_assert_not(admission_resize_input(house.admission, a, &more, 1));
    cr_assert_not(admission_resize_input(house.admission, b, &more, 1), "the house is full of it");
    cr_assert_eq(more, 0);
    cr_assert(admission_resize_input(house.admission, a, &held, 300), "less is always allowed");
    cr_assert_eq(held, 300);
    cr_assert(admission_resize_input(house.admission, a, &more, 300));
    cr_assert_not(admission_resize_input(house.admission, a, &more, 301));
    cr_assert_eq(a->input_bytes, 600);
    admission_release_input(house.admission, a, 600);
    cr_assert_eq(a->input_bytes, 0);
    cr_assert_eq(refusal_input(&refusal), -EINVAL);
    cr_assert(refusal.code == CODE_BUSY && refusal.retry_after_us > 0);
    leave_house(&house);
}

/* What a user still has open outlives his connections, and nothing outlives all of it. */
Test(admission, an_account_lasts_as_long_as_something_is_open)
{
    struct house house;
    struct account_entry *a, *other;
    struct refusal refusal;

    build_house(&house);
    a = admission_connect(house.admission, 1000, &refusal);
    cr_assert_eq(admission_enter(house.admission, a, &refusal), 0);
    cr_assert(admission_hold_input(house.admission, a, 10));
    admission_disconnect(house.admission, a);
    other = admission_connect(house.admission, 1001, &refusal);
    cr_assert_eq(admission_connect(house.admission, 1000, &refusal), a, "he is known still");
    cr_assert_eq(a->n_requests, 1);
    admission_disconnect(house.admission, a);
    admission_release_input(house.admission, a, 10);
    admission_leave(house.admission, a);
    cr_assert_eq(admission_n_requests(house.admission), 0);
    a = admission_connect(house.admission, 1000, &refusal);
    cr_assert_eq(a->n_connections, 1);
    cr_assert_eq(a->n_requests, 0);
    cr_assert_eq(a->input_bytes, 0);
    cr_assert_eq(other->n_connections, 1);
    leave_house(&house);
}
