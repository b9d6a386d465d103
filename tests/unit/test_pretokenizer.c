#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "daemon/engine/pretokenizer.h"
#include "lib/cleanup.h"

static struct gguf_string text_of(const char *s)
{
    return (struct gguf_string){.bytes = s, .len = strlen(s)};
}

static struct pretokenizer *made(const char *name, const struct pretokenizer_limits *limits)
{
    struct pretokenizer *p = NULL;
    struct fault fault = {""};
    cr_assert_eq(pretokenizer_new(text_of(name), limits, &p, &fault), 0, "%s", fault.text);
    return p;
}

static bool is_ascii(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (text[i] & 0x80)
            return false;
    return true;
}

/* Cuts the text and joins the words again, with a bar between them. */
static void cut(const struct pretokenizer *p, const char *text, bool ascii, char *to)
{
    struct pretokenizer_run run;
    cr_assert_eq(pretokenizer_begin(p, &run), 0);
    size_t len = strlen(text), n = 0;
    for (size_t at = 0, end; at < len; at = end) {
        cr_assert_eq(pretokenizer_word(p, &run, text, len, at, ascii, &end), 0);
        if (at > 0)
            to[n++] = '|';
        memcpy(to + n, text + at, end - at);
        n += end - at;
    }
    to[n] = '\0';
    pretokenizer_end(&run);
}

static const struct {
    const char *rule, *text, *words;
} cuts[] = {
    {"gpt-2", "Hello world", "Hello| world"},
    {"gpt-2", "I'll we'Ve", "I|'ll| we|'|Ve"},
    {"gpt-2", "a   b  ", "a|  | b|  "},
    {"gpt-2", "x 12345!?", "x| 12345|!?"},
    {"gpt-2", "a\n\n b", "a|\n\n| b"},
    {"llama-bpe", "I'LL we'Ve", "I|'LL| we|'Ve"},
    {"llama-bpe", "1234567 x", "123|456|7| x"},
    {"llama-bpe", "(foo)\n\nbar", "(foo|)\n\n|bar"},
    {"llama-bpe", "a  \n  b", "a|  \n| | b"},
    {"llama-v3", "12345", "123|45"},
    {"smaug-bpe", "12345", "123|45"},
    {"qwen2", "12 x3", "1|2| x|3"},
    {"qwen2", "a \n\n\n", "a| \n\n\n"},
    {"qwen2", "\tfoo", "\tfoo"},
    {"deepseek-r1-qwen", "12", "1|2"},
    {"starcoder", "a  12 b", "a|  |1|2| b"},
    {"starcoder", "a  b", "a| | b"},
    /* 日本 letters, ½ a number, U+0301 a mark, which is neither */
    {"gpt-2", "日本 ½e\u0301", "日本| ½|e|\u0301"},
    /* white space beyond ASCII, and U+180E, which is none any more */
    {"gpt-2", "a\u3000\u3000b", "a|\u3000|\u3000|b"},
    {"gpt-2", "a\u180eb", "a|\u180e|b"},
    /* letters of Unicode 15.0 and 15.1, a number of 15.0: newer than Debian's PCRE2 */
    {"gpt-2", "a\U0001123f", "a\U0001123f"},
    {"gpt-2", "a\U0002ebf0b", "a\U0002ebf0b"},
    {"gpt-2", "1\U00011f50", "1\U00011f50"},
    {"qwen2", "\U0001e030\U00011f50", "\U0001e030|\U00011f50"},
};

Test(pretokenizer, cuts_words_as_each_rule_says)
{
    char words[256];
    for (size_t i = 0; i < ELEMENTSOF(cuts); i++) {
        struct pretokenizer *p = made(cuts[i].rule, NULL);
        cut(p, cuts[i].text, is_ascii(cuts[i].text, strlen(cuts[i].text)), words);
        cr_expect_str_eq(words, cuts[i].words, "%s: '%s', not '%s'", cuts[i].rule, words,
                         cuts[i].words);
        pretokenizer_free(p);
    }
}

Test(pretokenizer, interpreter_finds_the_same_words)
{
    struct pretokenizer_limits limits = pretokenizer_default_limits;
    limits.no_jit = true;
    char words[256];
    for (size_t i = 0; i < ELEMENTSOF(cuts); i++) {
        struct pretokenizer *p = made(cuts[i].rule, &limits);
        cr_assert_not(pretokenizer_is_compiled(p));
        cut(p, cuts[i].text, is_ascii(cuts[i].text, strlen(cuts[i].text)), words);
        cr_expect_str_eq(words, cuts[i].words, "%s: '%s', not '%s'", cuts[i].rule, words,
                         cuts[i].words);
        pretokenizer_free(p);
    }
}

Test(pretokenizer, interprets_where_the_kernel_forbids_writable_code)
{
    /* What MemoryDenyWriteExecute asks for, by its numbers: older headers have no names. */
    enum { SET_MDWE = 65, REFUSE_EXEC_GAIN = 1 };
    if (prctl(SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) != 0)
        cr_skip_test("this kernel cannot forbid writable code (PR_SET_MDWE)");
    char words[256];
    struct pretokenizer *p = made("llama-bpe", NULL);
    cr_expect_not(pretokenizer_is_compiled(p));
    cut(p, "It's 1234 \u65e5", false, words);
    cr_expect_str_eq(words, "It|'s| |123|4| \u65e5");
    pretokenizer_free(p);
}

Test(pretokenizer, the_form_for_ascii_agrees_with_the_one_for_unicode)
{
    static const char *const rules[] = {"gpt-2", "llama-bpe", "qwen2", "starcoder"};
    static const char alphabet[] = "  \n\r\t'sStTreRElLmMdDaz019.,!-\x0b\x1c\x7f";
    uint32_t state = 12345;
    for (size_t r = 0; r < ELEMENTSOF(rules); r++) {
        struct pretokenizer *p = made(rules[r], NULL);
        for (int round = 0; round < 3000; round++) {
            char text[24], ascii[64], unicode[64];
            for (size_t i = 0; i < sizeof(text) - 1; i++) {
                state = state * 1664525u + 1013904223u;
                text[i] = alphabet[(state >> 16) % (sizeof(alphabet) - 1)];
            }
            text[sizeof(text) - 1] = '\0';
            cut(p, text, true, ascii);
            cut(p, text, false, unicode);
            cr_assert_str_eq(ascii, unicode);
        }
        pretokenizer_free(p);
    }
}

Test(pretokenizer, refuses_an_unknown_rule_by_name_and_lists_the_known_ones)
{
    static const char *const names[] = {"default", "no-such", "", " ", "gpt-2 ", "gpt", "\x1b[31m"};
    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        struct pretokenizer *p = NULL;
        struct fault fault = {""};
        cr_expect_eq(pretokenizer_new(text_of(names[i]), NULL, &p, &fault), -ENOTSUP);
        cr_expect_null(p);
        cr_expect(strstr(fault.text, " gpt-2 ") && strstr(fault.text, " qwen2 ") &&
                      strstr(fault.text, " llama-bpe "),
                  "%s", fault.text);
        cr_expect_lt(strlen(fault.text), sizeof(fault.text) - 1, "the sentence is cut");
        cr_expect_null(strchr(fault.text, '\x1b'), "a control character reached the sentence");
    }
    struct fault fault = {""};
    struct pretokenizer *p = NULL;
    cr_expect_eq(pretokenizer_new(text_of("no-such"), NULL, &p, &fault), -ENOTSUP);
    cr_expect(strstr(fault.text, "\"no-such\""), "%s", fault.text);
}

/* A run of blanks with no line end behind it is what costs most: the rule looks for the line end
 * from every place in the run. */
static int match_blanks(const struct pretokenizer_limits *limits, size_t n)
{
    struct pretokenizer *p = made("qwen2", limits);
    _cleanup_free_ char *text = malloc(n + 1);
    memset(text, ' ', n);
    text[n] = 'x';
    struct pretokenizer_run run;
    cr_assert_eq(pretokenizer_begin(p, &run), 0);
    size_t end = 0;
    int r = pretokenizer_word(p, &run, text, n + 1, 0, true, &end);
    if (r == 0)
        cr_expect_eq(end, n - 1);
    pretokenizer_end(&run);
    pretokenizer_free(p);
    return r;
}

Test(pretokenizer, exceeding_the_match_limit_is_e2big)
{
    struct pretokenizer_limits limits = pretokenizer_default_limits;
    limits.no_jit = true;
    limits.match = 1000;
    cr_expect_eq(match_blanks(&limits, 900), 0);
    cr_expect_eq(match_blanks(&limits, 2000), -E2BIG);
    limits.match = 0;
    cr_expect_eq(match_blanks(&limits, 10), -E2BIG);
}

Test(pretokenizer, compiled_code_obeys_the_match_limit_too)
{
    struct pretokenizer_limits limits = pretokenizer_default_limits;
    struct pretokenizer *p = made("qwen2", &limits);
    bool compiled = pretokenizer_is_compiled(p);
    pretokenizer_free(p);
    if (!compiled)
        cr_skip_test("this system does not allow just-in-time compiled code");
    limits.match = 0;
    cr_expect_eq(match_blanks(&limits, 10), -E2BIG);
}

Test(pretokenizer, exceeding_the_depth_or_heap_limit_is_e2big)
{
    struct pretokenizer_limits limits = pretokenizer_default_limits;
    limits.no_jit = true;
    limits.depth = 0;
    cr_expect_eq(match_blanks(&limits, 10), -E2BIG);
    limits = pretokenizer_default_limits;
    limits.no_jit = true;
    limits.heap_kib = 0;
    cr_expect_eq(match_blanks(&limits, 10), -E2BIG);
}

Test(pretokenizer, the_default_limits_leave_room_for_a_megabyte_of_blanks)
{
    struct pretokenizer_limits limits = pretokenizer_default_limits;
    cr_expect_eq(match_blanks(&limits, 1u << 20), 0);
    limits.no_jit = true;
    cr_expect_eq(match_blanks(&limits, 1u << 20), 0);
    cr_expect_eq(match_blanks(&limits, 6u << 20), -E2BIG);
}
