/* Frames as bytes: what is written, what is read back, and what hostile bytes must not do. */
#include <criterion/criterion.h>
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/wire.h"

static void expect_option(struct wire_reader *reader, uint16_t tag, struct wire_option *ret_option)
{
    cr_assert_eq(wire_reader_next(reader, ret_option), 1);
    cr_assert_eq(ret_option->tag, tag, "tag %u, not %u", ret_option->tag, tag);
}

Test(wire, a_frame_has_exactly_these_bytes)
{
    static const uint8_t golden[] = {/* body_len 38, type 2, flags 0, id */
                                     0x26, 0, 0, 0, 2, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1,
                                     /* model "m" */
                                     16, 0, 0, 0, 1, 0, 0, 0, 'm',
                                     /* max_tokens 300 */
                                     22, 0, 0, 0, 4, 0, 0, 0, 0x2c, 1, 0, 0,
                                     /* stop "x": bit 0x8000 */
                                     29, 0x80, 0, 0, 1, 0, 0, 0, 'x',
                                     /* prompt "" */
                                     17, 0, 0, 0, 0, 0, 0, 0};
    struct wire_buffer buffer = {0};
    wire_begin(&buffer, WIRE_COMPLETE, 0x0102030405060708);
    wire_put_text(&buffer, TAG_MODEL, "m");
    wire_put_number(&buffer, TAG_MAX_TOKENS, 300);
    wire_put_text(&buffer, TAG_STOP, "x");
    wire_put_bytes(&buffer, TAG_PROMPT, NULL, 0);
    cr_assert_eq(wire_end(&buffer), 0);
    cr_assert_arr_eq(buffer.data, golden, sizeof(golden));
    cr_assert_eq(buffer.len, sizeof(golden));
    wire_buffer_done(&buffer);
    cr_assert_null(buffer.data);
}

Test(wire, numbers_and_reals_come_back_as_they_went)
{
    static const uint64_t numbers[] = {0, 1, 255, 65536, UINT32_MAX, 1ull << 32, UINT64_MAX};
    static const float reals[] = {0.0f, -0.0f, 0.8f, 1e-30f, -FLT_MAX, FLT_TRUE_MIN};
    struct wire_buffer buffer = {0};
    wire_begin(&buffer, WIRE_DONE, 1);
    for (size_t i = 0; i < ELEMENTSOF(numbers); i++)
        wire_put_number(&buffer, TAG_SEED, numbers[i]);
    for (size_t i = 0; i < ELEMENTSOF(reals); i++)
        wire_put_real(&buffer, TAG_TEMPERATURE, reals[i]);
    cr_assert_eq(wire_end(&buffer), 0);

    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, buffer.data + WIRE_HEADER_BYTES, buffer.len - WIRE_HEADER_BYTES);
    for (size_t i = 0; i < ELEMENTSOF(numbers); i++) {
        uint64_t value;
        expect_option(&reader, TAG_SEED, &option);
        cr_assert_eq(option.len, numbers[i] > UINT32_MAX ? 8 : 4);
        cr_assert_eq(wire_option_number(&option, &value), 0);
        cr_assert_eq(value, numbers[i]);
    }
    for (size_t i = 0; i < ELEMENTSOF(reals); i++) {
        float value;
        expect_option(&reader, TAG_TEMPERATURE, &option);
        cr_assert_eq(wire_option_real(&option, &value), 0);
        cr_assert_eq(memcmp(&value, &reals[i], sizeof(value)), 0);
    }
    cr_assert_eq(wire_reader_next(&reader, &option), 0);
    cr_assert_eq(wire_reader_next(&reader, &option), 0, "the end stays the end");
    wire_buffer_done(&buffer);
}

Test(wire, numbers_of_one_two_four_and_eight_bytes_are_read_others_refused)
{
    static const uint8_t bytes[9] = {0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89};
    static const uint64_t expected[9] = {
        [1] = 0x81, [2] = 0x8281, [4] = 0x84838281, [8] = 0x8887868584838281};
    for (uint32_t len = 0; len <= 9; len++) {
        struct wire_option option = {.tag = TAG_SEED, .len = len, .value = bytes};
        uint64_t value = 42;
        bool good = len < 9 && expected[len] != 0;
        cr_assert_eq(wire_option_number(&option, &value), good ? 0 : -EINVAL, "%u bytes", len);
        cr_assert_eq(value, good ? expected[len] : 42, "written only on success");
    }
}

Test(wire, a_real_must_be_finite_and_of_four_bytes)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    float value = 7;
    for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
        struct wire_option option = {.len = 4, .value = (const uint8_t *)&bad[i]};
        cr_assert_eq(wire_option_real(&option, &value), -EINVAL);
    }
    static const uint8_t zeros[8];
    for (uint32_t len = 0; len <= 8; len++) {
        struct wire_option option = {.len = len, .value = zeros};
        cr_assert_eq(wire_option_real(&option, &value), len == 4 ? 0 : -EINVAL);
    }
    cr_assert_eq(value, 0);
}

Test(wire, a_header_is_read_and_reserved_flags_are_refused)
{
    uint8_t bytes[WIRE_HEADER_BYTES] = {1, 2, 3, 4, 68, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80};
    struct wire_header header = {0};
    cr_assert_eq(wire_header_read(bytes, &header), 0);
    cr_assert_eq(header.body_len, 0x04030201);
    cr_assert_eq(header.type, WIRE_GOAWAY);
    cr_assert_eq(header.id, 0x8000000000000001);
    for (int bit = 0; bit < 16; bit++) {
        bytes[6] = (uint8_t)((1u << bit) & 0xff);
        bytes[7] = (uint8_t)((1u << bit) >> 8);
        cr_assert_eq(wire_header_read(bytes, &header), -EBADMSG, "bit %d", bit);
    }
}

Test(wire, an_option_never_reaches_past_its_body)
{
    static const struct {
        const char *what;
        uint8_t bytes[12];
        size_t len;
    } cases[] = {
        {"half a head", {16, 0, 0}, 3},
        {"a head but for one byte", {16, 0, 0, 0, 0, 0, 0}, 7},
        {"one byte missing", {16, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4}, 12},
        {"the largest length", {16, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4}, 12},
        {"a length that wraps with the head", {16, 0, 0, 0, 0xf8, 0xff, 0xff, 0xff, 1}, 9},
        {"reserved, low byte", {16, 0, 1, 0, 1, 0, 0, 0, 1}, 9},
        {"reserved, high byte", {16, 0, 0, 1, 1, 0, 0, 0, 1}, 9},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        /* In memory of exactly that size, so that a sanitizer sees any step outside. */
        _cleanup_free_ uint8_t *body = malloc(cases[i].len);
        memcpy(body, cases[i].bytes, cases[i].len);
        struct wire_reader reader;
        struct wire_option option;
        wire_reader_init(&reader, body, cases[i].len);
        cr_assert_eq(wire_reader_next(&reader, &option), -EBADMSG, "%s", cases[i].what);
    }
}

Test(wire, an_empty_body_has_no_options)
{
    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, NULL, 0);
    cr_assert_eq(wire_reader_next(&reader, &option), 0);
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* A body that is random, or begins as a sound one and goes wrong somewhere. */
static void random_fill(uint8_t *body, size_t len, uint64_t *random)
{
    for (size_t i = 0; i < len; i++)
        body[i] = (uint8_t)random_next(random);
    for (size_t at = 0; at + 8 <= len && random_next(random) % 8 != 0;) {
        size_t value = random_next(random) % 24;
        memset(body + at + 2, 0, 6);
        body[at + 4] = (uint8_t)value;
        at += 8 + value;
    }
}

Test(wire, random_bodies_are_never_read_outside)
{
    uint64_t random = 0x9e3779b97f4a7c15, options = 0;
    for (int round = 0; round < 20000; round++) {
        size_t len = random_next(&random) % 96;
        _cleanup_free_ uint8_t *body = malloc(len ? len : 1);
        random_fill(body, len, &random);
        struct wire_reader reader;
        struct wire_option option;
        int r;
        wire_reader_init(&reader, body, len);
        while ((r = wire_reader_next(&reader, &option)) == 1) {
            uint64_t number;
            float real;
            cr_assert(option.value >= body && option.value + option.len <= body + len);
            wire_option_number(&option, &number);
            wire_option_real(&option, &real);
            wire_utf8_valid(option.value, option.len);
            wire_option_is(&option, "ready");
            wire_tag_name(option.tag);
            options++;
        }
        cr_assert(r == 0 || r == -EBADMSG);
    }
    cr_assert_gt(options, 10000, "only %lu options were reached", (unsigned long)options);
}

Test(wire, utf8_is_valid_where_unicode_says_so)
{
    static const struct {
        const char *bytes;
        bool valid;
    } cases[] = {
        {"", true},
        {"plain text of more than eight bytes", true},
        {"\x7f", true},
        {"\xc2\x80", true},         /* first of two bytes */
        {"\xdf\xbf", true},         /* last */
        {"\xe0\xa0\x80", true},     /* first of three */
        {"\xed\x9f\xbf", true},     /* before the surrogates */
        {"\xee\x80\x80", true},     /* behind them */
        {"\xef\xbf\xbf", true},     /* last of three */
        {"\xf0\x90\x80\x80", true}, /* first of four */
        {"\xf4\x8f\xbf\xbf", true}, /* U+10FFFF */
        {"12345678\xc3\xa4"
         "12345678",
         true},
        {"\x80", false}, /* a continuation alone */
        {"\xbf", false},
        {"\xc0\x80", false}, /* U+0000 in two bytes */
        {"\xc1\xbf", false}, /* overlong */
        {"\xe0\x9f\xbf", false},
        {"\xf0\x8f\xbf\xbf", false},
        {"\xed\xa0\x80", false}, /* surrogates */
        {"\xed\xbf\xbf", false},
        {"\xf4\x90\x80\x80", false}, /* beyond U+10FFFF */
        {"\xf5\x80\x80\x80", false},
        {"\xff", false},
        {"\xc2", false}, /* cut */
        {"\xe2\x82", false},
        {"\xf0\x9f\x98", false},
        {"\xc2"
         "a",
         false}, /* continuation missing inside */
        {"\xe2\x82"
         "a",
         false},
        {"\xe2"
         "a\x82",
         false},
        {"\xf0\x9f"
         "a\x80",
         false},
        {"1234567\x80"
         "12345678",
         false},
        {"12345678"
         "1234567\xc3",
         false},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        size_t len = strlen(cases[i].bytes);
        _cleanup_free_ uint8_t *exact = malloc(len ? len : 1);
        memcpy(exact, cases[i].bytes, len);
        cr_assert_eq(wire_utf8_valid(exact, len), cases[i].valid, "case %zu", i);
    }
}

Test(wire, utf8_with_a_nul_is_refused_wherever_it_stands)
{
    for (size_t len = 1; len <= 24; len++)
        for (size_t at = 0; at < len; at++) {
            uint8_t text[24];
            memset(text, 'a', sizeof(text));
            cr_assert(wire_utf8_valid(text, len));
            text[at] = 0;
            cr_assert_not(wire_utf8_valid(text, len), "NUL at %zu of %zu", at, len);
        }
}

/* The definition in the other direction: encode every code point, and compare over all two-byte and
 * all three-byte strings of a lead with what encoding can produce. */
Test(wire, utf8_accepts_exactly_what_encodes_a_code_point)
{
    static bool two[0x10000], three[0x1000000];
    for (uint32_t c = 0x80; c < 0x800; c++)
        two[(0xc0 | c >> 6) << 8 | (0x80 | (c & 0x3f))] = true;
    for (uint32_t c = 0x800; c < 0x10000; c++)
        if (c < 0xd800 || c > 0xdfff)
            three[(0xe0 | c >> 12) << 16 | (0x80 | ((c >> 6) & 0x3f)) << 8 | (0x80 | (c & 0x3f))] =
                true;
    for (uint32_t v = 0x8000; v < 0x10000; v++) {
        uint8_t bytes[2] = {(uint8_t)(v >> 8), (uint8_t)v};
        cr_assert_eq(wire_utf8_valid(bytes, 2), two[v], "%04x", v);
    }
    for (uint32_t v = 0xe00000; v < 0xf00000; v++) {
        uint8_t bytes[3] = {(uint8_t)(v >> 16), (uint8_t)(v >> 8), (uint8_t)v};
        if (wire_utf8_valid(bytes, 3) != three[v])
            cr_assert_fail("%06x", v);
    }
    for (uint32_t c = 0x10000; c < 0x110000; c++) {
        uint8_t bytes[4] = {(uint8_t)(0xf0 | c >> 18), (uint8_t)(0x80 | ((c >> 12) & 0x3f)),
                            (uint8_t)(0x80 | ((c >> 6) & 0x3f)), (uint8_t)(0x80 | (c & 0x3f))};
        if (!wire_utf8_valid(bytes, 4))
            cr_assert_fail("U+%X", c);
    }
}

Test(wire, every_code_has_a_word_of_its_own)
{
    for (int code = 0; code < _CODE_MAX; code++) {
        const char *name = wire_code_name((enum wire_code)code);
        cr_assert_not_null(name);
        cr_assert_eq(wire_code_from_name(name, strlen(name)), code);
        cr_assert_eq(wire_code_from_name(name, strlen(name) - 1), -EINVAL);
    }
    cr_assert_str_eq(wire_code_name(CODE_NO_SUCH_MODEL), "no-such-model");
    cr_assert_str_eq(wire_code_name((enum wire_code)99), "internal");
    cr_assert_eq(wire_code_from_name("", 0), -EINVAL);
}

Test(wire, tags_and_types_are_known_by_name_only_as_they_are)
{
    cr_assert_str_eq(wire_tag_name(TAG_MAX_TOKENS), "max_tokens");
    cr_assert_str_eq(wire_tag_name(TAG_STOP), "stop");
    cr_assert_str_eq(wire_tag_name(TAG_ON_BEHALF_OF), "on-behalf-of");
    cr_assert_null(wire_tag_name(TAG_STOP & ~WIRE_TAG_CRITICAL), "its critical bit is part of it");
    cr_assert_null(wire_tag_name(TAG_MODEL | WIRE_TAG_CRITICAL));
    cr_assert_null(wire_tag_name(0));
    cr_assert_str_eq(wire_type_name(WIRE_COMPLETE), "complete");
    cr_assert_str_eq(wire_type_name(WIRE_GOAWAY), "goaway");
    cr_assert_null(wire_type_name(0));
    cr_assert_null(wire_type_name(40));
    for (uint32_t i = 0; i <= UINT16_MAX; i++) {
        const char *tag = wire_tag_name((uint16_t)i), *type = wire_type_name((uint16_t)i);
        cr_assert((tag == NULL || *tag) && (type == NULL || *type));
    }
}

Test(wire, several_frames_share_a_buffer_as_it_grows)
{
    struct wire_buffer buffer = {0};
    char text[700];
    memset(text, 't', sizeof(text));
    for (uint64_t id = 1; id <= 50; id++) {
        wire_begin(&buffer, WIRE_TOKENS, id);
        wire_put_bytes(&buffer, TAG_TEXT, text, (size_t)id * 13);
        cr_assert_eq(wire_end(&buffer), 0);
    }
    size_t at = 0;
    for (uint64_t id = 1; id <= 50; id++) {
        struct wire_header header;
        struct wire_reader reader;
        struct wire_option option;
        cr_assert_eq(wire_header_read(buffer.data + at, &header), 0);
        cr_assert_eq(header.id, id);
        wire_reader_init(&reader, buffer.data + at + WIRE_HEADER_BYTES, header.body_len);
        expect_option(&reader, TAG_TEXT, &option);
        cr_assert_eq(option.len, id * 13);
        at += WIRE_HEADER_BYTES + header.body_len;
    }
    cr_assert_eq(at, buffer.len);
    wire_buffer_done(&buffer);
}

Test(wire, an_impossible_option_takes_its_frame_out_and_leaves_the_others)
{
    struct wire_buffer buffer = {0};
    wire_begin(&buffer, WIRE_NULL, 1);
    cr_assert_eq(wire_end(&buffer), 0);
    size_t before = buffer.len;
    wire_begin(&buffer, WIRE_COMPLETE, 2);
    wire_put_bytes(&buffer, TAG_PROMPT, "", (size_t)UINT32_MAX + 1);
    cr_assert_eq(wire_end(&buffer), -EMSGSIZE);
    cr_assert_eq(buffer.len, before);
    wire_begin(&buffer, WIRE_NULL, 3);
    cr_assert_eq(wire_end(&buffer), 0);
    cr_assert_eq(buffer.len, 2 * before);
    wire_buffer_done(&buffer);
}

Test(wire, a_failed_allocation_is_remembered)
{
    struct wire_buffer buffer = {0};
    wire_begin(&buffer, WIRE_NULL, 1);
    cr_assert_eq(wire_end(&buffer), 0);
    size_t before = buffer.len;
    wire_begin(&buffer, WIRE_NULL, 2);
    wire_append(&buffer, "", SIZE_MAX - 8); /* no machine has this */
    wire_put_number(&buffer, TAG_SEED, 1);
    cr_assert(buffer.failed);
    cr_assert_eq(wire_end(&buffer), -ENOMEM);
    cr_assert_eq(buffer.len, before, "what was whole stays");
    wire_buffer_done(&buffer);
    cr_assert_not(buffer.failed);
}

Test(wire, a_word_is_compared_whole)
{
    struct wire_option option = {.len = 5, .value = (const uint8_t *)"ready to go"};
    cr_assert(wire_option_is(&option, "ready"));
    cr_assert_not(wire_option_is(&option, "read"));
    cr_assert_not(wire_option_is(&option, "ready "));
    option.len = 0;
    cr_assert(wire_option_is(&option, ""));
}

/* ---- docs/protocol.md says what the code does ---- */

static char *read_contract(void)
{
    const char *root = getenv("HEARTH_SOURCE_ROOT");
    char path[4096];
    if (!root)
        return NULL;
    snprintf(path, sizeof(path), "%s/docs/protocol.md", root);
    FILE *file = fopen(path, "r");
    cr_assert_not_null(file, "%s", path);
    char *text = calloc(1, 1 << 20);
    size_t n = fread(text, 1, (1 << 20) - 1, file);
    cr_assert(n > 0 && feof(file));
    fclose(file);
    return text;
}

Test(wire, the_contract_lists_every_type_option_and_code)
{
    _cleanup_free_ char *text = read_contract();
    char row[128];
    if (!text)
        cr_skip_test("HEARTH_SOURCE_ROOT is not set");
    for (uint32_t i = 0; i <= UINT16_MAX; i++) {
        const char *type = wire_type_name((uint16_t)i), *tag = wire_tag_name((uint16_t)i);
        if (type) {
            snprintf(row, sizeof(row), "\n| %u | `%s` |", i, type);
            cr_assert_not_null(strstr(text, row), "%s", row);
        }
        if (tag) {
            snprintf(row, sizeof(row), "\n| %u%s | `%s` |", i & ~WIRE_TAG_CRITICAL,
                     i & WIRE_TAG_CRITICAL ? " + 0x8000" : "", tag);
            cr_assert_not_null(strstr(text, row), "%s", row);
        }
    }
    for (int code = 0; code < _CODE_MAX; code++) {
        snprintf(row, sizeof(row), "\n| `%s` | ", wire_code_name((enum wire_code)code));
        cr_assert_not_null(strstr(text, row), "%s", row);
    }
}

/* The bytes of a block of the example: pairs of hexadecimal digits, up to the words of each line.
 */
static size_t example_bytes(const char *block, uint8_t *bytes, size_t size)
{
    size_t n = 0;
    for (const char *line = block; strncmp(line, "```", 3) != 0; line += strcspn(line, "\n") + 1) {
        const char *at = line + strspn(line, " ");
        /* The words stand in columns of their own, behind at least three blanks. */
        while (isxdigit((unsigned char)*at) && sscanf(at, "%2hhx", &bytes[n]) == 1 &&
               (at[2] == ' ' || at[2] == '\n')) {
            cr_assert_lt(++n, size);
            at += 2;
            if (strspn(at, " ") > 2)
                break;
            at += strspn(at, " ");
        }
    }
    return n;
}

Test(wire, the_contracts_example_is_what_is_written)
{
    _cleanup_free_ char *text = read_contract();
    uint8_t bytes[1024];
    struct wire_buffer buffer = {0};
    if (!text)
        cr_skip_test("HEARTH_SOURCE_ROOT is not set");
    const char *section = strstr(text, "## An example, byte by byte");
    cr_assert_not_null(section);
    size_t n = example_bytes(strstr(section, "```\n") + 4, bytes, sizeof(bytes));

    wire_append(&buffer, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(&buffer, WIRE_HELLO, 0);
    wire_put_text(&buffer, TAG_VERSION, "0.1");
    wire_put_text(&buffer, TAG_CLIENT, "doc");
    cr_assert_eq(wire_end(&buffer), 0);
    wire_begin(&buffer, WIRE_COMPLETE, 1);
    wire_put_text(&buffer, TAG_MODEL, "ember");
    wire_put_text(&buffer, TAG_PROMPT, "Once upon a time");
    wire_put_number(&buffer, TAG_MAX_TOKENS, 4);
    wire_put_real(&buffer, TAG_TEMPERATURE, 0);
    wire_put_number(&buffer, TAG_SEED, 7);
    cr_assert_eq(wire_end(&buffer), 0);
    cr_assert_eq(n, buffer.len, "%zu bytes in the document, %zu written", n, buffer.len);
    cr_assert_arr_eq(bytes, buffer.data, n);
    wire_buffer_done(&buffer);
}
