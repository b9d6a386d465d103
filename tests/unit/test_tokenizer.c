#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bench/gguf_writer.h"
#include "daemon/engine/tokenizer.h"
#include "lib/cleanup.h"
#include "tests/support/gguf_make.h"

#define KEY(name) "tokenizer.ggml." name

DEFINE_CLEANUP(struct tokenizer *, tokenizer_free)
#define _cleanup_tokenizer_ _cleanup_(tokenizer_freep)

enum type {
    NORMAL = 1,
    UNKNOWN = 2,
    CONTROL = 3,
    ADDED = 4,
    UNUSED = 5,
    BYTE = 6,
};

struct word {
    const char *text;
    enum type type;
    float score;
};

/* --- vocabularies made on the spot --- */

static int open_writer(struct gguf_writer *w, struct tokenizer **ret, struct fault *ret_fault)
{
    _cleanup_free_ uint8_t *header = NULL;
    size_t len;
    cr_assert_eq(gguf_writer_finish(w, &header, &len), 0);
    gguf_writer_free(w);
    struct gguf_source source = memory_source(header, len);
    struct gguf *gguf = NULL;
    int r = gguf_open(&source, &gguf, ret_fault);
    if (r == 0)
        r = tokenizer_new(gguf, ret, ret_fault);
    gguf_free(gguf);
    return r;
}

static struct tokenizer *opened(struct gguf_writer *w)
{
    struct tokenizer *t = NULL;
    struct fault fault = {""};
    int r = open_writer(w, &t, &fault);
    cr_assert_eq(r, 0, "%d: %s", r, fault.text);
    return t;
}

/* tokens, scores and types of a vocabulary; keys may be added. */
static struct gguf_writer *written(const char *model, const struct word *words, size_t n)
{
    struct gguf_writer *w = NULL;
    cr_assert_eq(gguf_writer_new(3, &w), 0);
    _cleanup_free_ const char **texts = calloc(n + 1, sizeof(*texts));
    _cleanup_free_ float *scores = calloc(n + 1, sizeof(*scores));
    _cleanup_free_ int32_t *types = calloc(n + 1, sizeof(*types));
    for (size_t i = 0; i < n; i++) {
        texts[i] = words[i].text;
        scores[i] = words[i].score;
        types[i] = words[i].type;
    }
    gguf_put_string(w, KEY("model"), model);
    gguf_put_strings(w, KEY("tokens"), texts, n);
    gguf_put_f32s(w, KEY("scores"), scores, n);
    gguf_put_i32s(w, KEY("token_type"), types, n);
    return w;
}

/* Words behind <unk>, <s>, </s> and the 256 byte tokens: word i has id 259 + i. */
enum { FIRST_WORD = 259 };

static struct gguf_writer *llama(const struct word *words, size_t n)
{
    static char bytes[256][8];
    _cleanup_free_ struct word *all = calloc(FIRST_WORD + n, sizeof(*all));
    all[0] = (struct word){"<unk>", UNKNOWN, 0};
    all[1] = (struct word){"<s>", CONTROL, 0};
    all[2] = (struct word){"</s>", CONTROL, 0};
    for (int b = 0; b < 256; b++) {
        snprintf(bytes[b], sizeof(bytes[b]), "<0x%02X>", (unsigned)b);
        all[3 + b] = (struct word){bytes[b], BYTE, 0};
    }
    memcpy(all + FIRST_WORD, words, n * sizeof(*words));
    struct gguf_writer *w = written("llama", all, FIRST_WORD + n);
    gguf_put_u32(w, KEY("bos_token_id"), 1);
    gguf_put_u32(w, KEY("eos_token_id"), 2);
    return w;
}

/* A byte in GPT-2's alphabet: the printable ones of Latin-1 for themselves, the others from U+0100
 * on, counted. */
static const char *in_alphabet(int byte, char to[static 3])
{
    int c = 0, others = 0;
    for (int b = 0; b <= byte; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        c = printable ? b : 0x100 + others;
        others += !printable;
    }
    if (c < 0x80)
        snprintf(to, 3, "%c", c);
    else
        snprintf(to, 3, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 0x3f));
    return to;
}

/* The 256 bytes (byte b has id b), then words. */
static struct gguf_writer *gpt2(const char *pre, const struct word *words, size_t n,
                                const char *const *merges, size_t n_merges)
{
    static char bytes[256][3];
    _cleanup_free_ struct word *all = calloc(256 + n, sizeof(*all));
    for (int b = 0; b < 256; b++)
        all[b] = (struct word){in_alphabet(b, bytes[b]), NORMAL, 0};
    if (n > 0)
        memcpy(all + 256, words, n * sizeof(*words));
    struct gguf_writer *w = written("gpt2", all, 256 + n);
    if (pre)
        gguf_put_string(w, KEY("pre"), pre);
    gguf_put_strings(w, KEY("merges"), merges, n_merges);
    return w;
}

/* --- looking at results --- */

/* Ids of the text, as "1 2 3". */
static const char *ids_of(const struct tokenizer *t, const char *text, size_t len)
{
    static char line[4096];
    _cleanup_free_ int32_t *ids = NULL;
    size_t n = 0, at = 0;
    cr_assert_eq(tokenizer_encode(t, text, len, &ids, &n), 0);
    line[0] = '\0';
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(line + at, sizeof(line) - at, i ? " %d" : "%d", ids[i]);
    return line;
}

#define expect_ids(t, text, expected)                                             \
    do {                                                                          \
        const char *_got = ids_of(t, text, sizeof(text) - 1);                     \
        cr_expect_str_eq(_got, expected, "%s: %s, not %s", text, _got, expected); \
    } while (0)

/* The text that the ids' pieces make (malloc'd). */
static char *decoded(const struct tokenizer *t, const int32_t *ids, size_t n, size_t *ret_len)
{
    size_t len = 0;
    for (size_t i = 0; i < n; i++)
        len += tokenizer_piece(t, ids[i]).len;
    char *text = malloc(len + 1);
    *ret_len = len;
    len = 0;
    for (size_t i = 0; i < n; i++) {
        struct gguf_string piece = tokenizer_piece(t, ids[i]);
        memcpy(text + len, piece.bytes, piece.len);
        len += piece.len;
    }
    return text;
}

/* Encodes, and expects the pieces to make the same bytes again. */
static size_t expect_round_trip(const struct tokenizer *t, const char *text, size_t len)
{
    _cleanup_free_ int32_t *ids = NULL;
    size_t n = 0, back_len;
    cr_assert_eq(tokenizer_encode(t, text, len, &ids, &n), 0);
    _cleanup_free_ char *back = decoded(t, ids, n, &back_len);
    cr_expect(back_len == len && memcmp(back, text, len) == 0, "%zu bytes became %zu", len,
              back_len);
    return n;
}

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* --- golden data --- */

static void golden_path(char *to, size_t size, const char *name)
{
    const char *root = getenv("HEARTH_GOLDEN");
    snprintf(to, size, "%s/tokenizer/%s", root ? root : "../shared/golden", name);
    struct stat st;
    if (stat(to, &st) < 0)
        cr_skip_test("golden data is missing: %s", to);
}

static struct tokenizer *golden_tokenizer(const char *path)
{
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    cr_assert(fd >= 0 && fstat(fd, &st) == 0);
    struct gguf_source source = {.fd = fd, .size = (uint64_t)st.st_size};
    struct gguf *gguf = NULL;
    struct tokenizer *t = NULL;
    struct fault fault = {""};
    cr_assert_eq(gguf_open(&source, &gguf, &fault), 0, "%s", fault.text);
    cr_assert_eq(tokenizer_new(gguf, &t, &fault), 0, "%s", fault.text);
    gguf_free(gguf);
    return t;
}

static char *file_text(const char *path)
{
    FILE *f = fopen(path, "re");
    cr_assert_not_null(f, "%s", path);
    char *text = NULL;
    size_t room = 0;
    ssize_t n = getdelim(&text, &room, EOF, f);
    cr_assert_geq(n, 0);
    fclose(f);
    return text;
}

/* NAME.inp and NAME.out: texts between lines of a separator, ids a line. */
static void expect_golden_texts(const char *name)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char path[3][512], file[64];
    static const char *const endings[] = {"gguf", "inp", "out"};
    for (size_t i = 0; i < 3; i++) {
        snprintf(file, sizeof(file), "%s.%s", name, endings[i]);
        golden_path(path[i], sizeof(path[i]), file);
    }
    _cleanup_tokenizer_ struct tokenizer *t = golden_tokenizer(path[0]);
    _cleanup_free_ char *texts = file_text(path[1]), *lines = file_text(path[2]);
    int n_texts = 0;
    char *text = texts, *rest = lines, *end;
    for (; (end = strstr(text, separator)); n_texts++, text = end + strlen(separator)) {
        char *expected = strsep(&rest, "\n");
        cr_assert_not_null(expected);
        expected += strspn(expected, " ");
        const char *got = ids_of(t, text, (size_t)(end - text));
        size_t n = strlen(got);
        cr_expect(strncmp(got, expected, n) == 0 && expected[n + strspn(expected + n, " ")] == '\0',
                  "text %d: %s, not %s", n_texts, got, expected);
    }
    cr_expect_eq(n_texts, 46);
}

/* NAME.extra.jsonl: {"text", "ids"} a line. */
static void expect_golden_extra(const char *name)
{
    char path[2][512], file[64];
    snprintf(file, sizeof(file), "%s.gguf", name);
    golden_path(path[0], sizeof(path[0]), file);
    snprintf(file, sizeof(file), "%s.extra.jsonl", name);
    golden_path(path[1], sizeof(path[1]), file);
    _cleanup_tokenizer_ struct tokenizer *t = golden_tokenizer(path[0]);
    FILE *f = fopen(path[1], "re");
    cr_assert_not_null(f);
    _cleanup_free_ char *line = NULL;
    size_t room = 0;
    int n_lines = 0;
    while (getline(&line, &room, f) > 0) {
        json_t *json = json_loads(line, 0, NULL);
        json_t *text = json_object_get(json, "text"), *expected = json_object_get(json, "ids");
        _cleanup_free_ int32_t *ids = NULL;
        size_t n = 0, same = 0;
        cr_assert_eq(
            tokenizer_encode(t, json_string_value(text), json_string_length(text), &ids, &n), 0);
        while (same < n && same < json_array_size(expected) &&
               ids[same] == json_integer_value(json_array_get(expected, same)))
            same++;
        cr_expect(same == n && n == json_array_size(expected), "line %d differs from id %zu on",
                  n_lines, same);
        json_decref(json);
        n_lines++;
    }
    fclose(f);
    cr_expect_eq(n_lines, 100);
}

Test(tokenizer, golden_texts_of_llama_have_the_reference_ids)
{
    expect_golden_texts("llama-spm");
}

Test(tokenizer, golden_extra_texts_of_llama_have_the_reference_ids)
{
    expect_golden_extra("llama-spm");
}

Test(tokenizer, golden_texts_of_gpt2_have_the_reference_ids)
{
    expect_golden_texts("gpt-2");
}

Test(tokenizer, golden_extra_texts_of_gpt2_have_the_reference_ids)
{
    expect_golden_extra("gpt-2");
}

Test(tokenizer, golden_story_is_read_and_written_as_the_reference_does)
{
    char path[2][512];
    golden_path(path[0], sizeof(path[0]), "../models/stories260K-f32.gguf");
    golden_path(path[1], sizeof(path[1]), "../models/stories260K-f32.json");
    _cleanup_tokenizer_ struct tokenizer *t = golden_tokenizer(path[0]);
    json_t *json = json_load_file(path[1], 0, NULL);
    json_t *cases = json_object_get(json, "cases"), *item;
    size_t i, n_stories = 0;
    json_array_foreach(cases, i, item)
    {
        json_t *prompt = json_object_get(item, "prompt_text");
        json_t *prompt_ids = json_object_get(item, "prompt_ids");
        json_t *story_ids = json_object_get(item, "greedy_ids");
        json_t *story = json_object_get(item, "greedy_text");
        if (!prompt || !story)
            continue;
        _cleanup_free_ int32_t *ids = NULL;
        size_t n = 0, len;
        cr_assert_eq(
            tokenizer_encode(t, json_string_value(prompt), json_string_length(prompt), &ids, &n),
            0);
        cr_assert_eq(n + 1, json_array_size(prompt_ids), "story %zu", i);
        cr_expect_eq(json_integer_value(json_array_get(prompt_ids, 0)), tokenizer_bos(t));
        for (size_t k = 0; k < n; k++)
            cr_expect_eq(ids[k], json_integer_value(json_array_get(prompt_ids, k + 1)));
        _cleanup_free_ int32_t *told = calloc(json_array_size(story_ids) + 1, sizeof(*told));
        for (size_t k = 0; k < json_array_size(story_ids); k++)
            told[k] = (int32_t)json_integer_value(json_array_get(story_ids, k));
        _cleanup_free_ char *text = decoded(t, told, json_array_size(story_ids), &len);
        cr_expect(len == json_string_length(story) &&
                      memcmp(text, json_string_value(story), len) == 0,
                  "story %zu: %.*s", i, (int)len, text);
        n_stories++;
    }
    json_decref(json);
    cr_expect_gt(n_stories, 0);
}

/* --- llama --- */

static const struct word small[] = {
    {"a", NORMAL, -10},           /* 259 */
    {"b", NORMAL, -11},           /* 260 */
    {"\u2581", NORMAL, -12},      /* 261 */
    {"ab", NORMAL, -1},           /* 262 */
    {"ba", NORMAL, -2},           /* 263 */
    {"aa", NORMAL, -2},           /* 264 */
    {"\u2581a", NORMAL, -3},      /* 265 */
    {"\u2581\u2581", NORMAL, -4}, /* 266 */
    {"é", NORMAL, -5},            /* 267 */
};

Test(tokenizer, llama_merges_the_best_score_first_and_the_leftmost_on_ties)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(small, ELEMENTSOF(small)));
    expect_ids(t, "b", "261 260");
    expect_ids(t, "ab", "261 262");
    expect_ids(t, "a", "265");
    expect_ids(t, "bab", "261 260 262");
    expect_ids(t, "baaa", "261 263 264");
    expect_ids(t, "baa", "261 263 259");
    expect_ids(t, "  b", "266 261 260");
    expect_ids(t, "", "");
    expect_ids(t, "é", "261 267");
}

Test(tokenizer, llama_writes_unknown_characters_as_byte_tokens)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(small, ELEMENTSOF(small)));
    expect_ids(t, "a\n", "265 13");
    expect_ids(t,
               "\u65e5"
               "b",
               "261 233 154 168 260");
}

Test(tokenizer, llama_without_byte_tokens_writes_unknown)
{
    static const struct word words[] = {
        {"<unk>", UNKNOWN, 0}, {"\u2581", NORMAL, -1}, {"a", NORMAL, -2}, {"<0x41>", BYTE, 0}};
    _cleanup_tokenizer_ struct tokenizer *t = opened(written("llama", words, ELEMENTSOF(words)));
    expect_ids(t,
               "aXA\u65e5"
               "a",
               "1 2 0 0 0 2");
    expect_ids(t, "a\xff", "1 2 0");
}

Test(tokenizer, llama_obeys_the_files_word_on_blanks)
{
    struct gguf_writer *w = llama(small, ELEMENTSOF(small));
    gguf_put_bool(w, KEY("add_space_prefix"), false);
    _cleanup_tokenizer_ struct tokenizer *without = opened(w);
    expect_ids(without, "a", "259");
    expect_ids(without, " a", "265");

    w = llama(small, ELEMENTSOF(small));
    gguf_put_bool(w, KEY("remove_extra_whitespaces"), true);
    _cleanup_tokenizer_ struct tokenizer *trimming = opened(w);
    expect_ids(trimming, "  a   b  ", "265 261 260");
    expect_ids(trimming, "   ", "");
}

Test(tokenizer, llama_takes_the_files_blank_in_text_for_a_blank)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(small, ELEMENTSOF(small)));
    expect_ids(t,
               "b\u2581"
               "a",
               "261 260 265");
    /* cut off, it is bytes like any other */
    expect_ids(t, "b\xe2\x96", "261 260 229 153");
}

Test(tokenizer, names_of_special_tokens_in_text_are_plain_text)
{
    static const struct word words[] = {
        {"<", NORMAL, -1},  {"s", NORMAL, -1},   {">", NORMAL, -1},    {"<s", NORMAL, -1},
        {"<0", NORMAL, -1}, {"<0x", NORMAL, -1}, {"<0x4", NORMAL, -1}, {"<0x41", NORMAL, -1},
    };
    struct gguf_writer *w = llama(words, ELEMENTSOF(words));
    gguf_put_bool(w, KEY("add_space_prefix"), false);
    _cleanup_tokenizer_ struct tokenizer *t = opened(w);
    /* each is one merge away from the special token */
    expect_ids(t, "<s>", "262 261");
    expect_ids(t, "<0x41>", "266 261");

    static const struct word more[] = {{"<|end|>", CONTROL, 0}};
    _cleanup_tokenizer_ struct tokenizer *bytes = opened(gpt2("llama-bpe", more, 1, NULL, 0));
    expect_ids(bytes, "<|end|>", "60 124 101 110 100 124 62");
}

/* The rule in its plainest form: look at all pairs, merge the best, again. */
static size_t merge_plainly(const struct word *words, size_t n_words, const char *text, size_t len,
                            int32_t *ids)
{
    struct {
        size_t at, len;
    } parts[64];
    size_t n = 0;
    for (; n < len; n++)
        parts[n].at = n, parts[n].len = 1;
    for (;;) {
        size_t best = n;
        float best_score = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t k = 0; k < n_words; k++)
                if (strlen(words[k].text) == parts[i].len + parts[i + 1].len &&
                    memcmp(words[k].text, text + parts[i].at, strlen(words[k].text)) == 0 &&
                    (best == n || words[k].score > best_score))
                    best = i, best_score = words[k].score;
        if (best == n)
            break;
        parts[best].len += parts[best + 1].len;
        memmove(&parts[best + 1], &parts[best + 2], (n - best - 2) * sizeof(parts[0]));
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        ids[i] = 3 + (uint8_t)text[parts[i].at];
        for (size_t k = 0; k < n_words; k++)
            if (strlen(words[k].text) == parts[i].len &&
                memcmp(words[k].text, text + parts[i].at, parts[i].len) == 0)
                ids[i] = FIRST_WORD + (int32_t)k;
    }
    return n;
}

Test(tokenizer, llama_agrees_with_the_plain_rule_on_random_vocabularies)
{
    enum { WORDS = 24, TEXT = 48 };
    uint32_t state = 7;
    for (int round = 0; round < 300; round++) {
        char texts[WORDS][6];
        struct word words[WORDS];
        size_t n_words = 0;
        for (size_t i = 0; i < WORDS; i++) {
            size_t len = 1 + next_random(&state) % 5;
            for (size_t c = 0; c < len; c++)
                texts[i][c] = (char)('a' + next_random(&state) % 4);
            texts[i][len] = '\0';
            bool twice = false;
            for (size_t k = 0; k < n_words; k++)
                twice = twice || strcmp(words[k].text, texts[i]) == 0;
            if (!twice)
                words[n_words++] =
                    (struct word){texts[i], NORMAL, (float)(next_random(&state) % 7)};
        }
        struct gguf_writer *w = llama(words, n_words);
        gguf_put_bool(w, KEY("add_space_prefix"), false);
        _cleanup_tokenizer_ struct tokenizer *t = opened(w);
        for (int k = 0; k < 20; k++) {
            char text[TEXT];
            size_t len = 1 + next_random(&state) % TEXT;
            for (size_t c = 0; c < len; c++)
                text[c] = (char)('a' + next_random(&state) % 5);
            int32_t expected[TEXT];
            size_t n_expected = merge_plainly(words, n_words, text, len, expected), n;
            _cleanup_free_ int32_t *ids = NULL;
            cr_assert_eq(tokenizer_encode(t, text, len, &ids, &n), 0);
            cr_assert_eq(n, n_expected, "round %d: %.*s", round, (int)len, text);
            cr_assert_eq(memcmp(ids, expected, n * sizeof(*ids)), 0, "round %d: %.*s", round,
                         (int)len, text);
        }
    }
}

/* --- gpt2 --- */

static const struct word pairs[] = {
    {"ab", NORMAL, 0},      /* 256 */
    {"bc", NORMAL, 0},      /* 257 */
    {"abc", NORMAL, 0},     /* 258 */
    {"\u0120a", NORMAL, 0}, /* 259: a blank and a */
    {"abcd", NORMAL, 0},    /* 260: no merge makes it */
    {"<|go|>", CONTROL, 0}, /* 261 */
    {"<tool>", ADDED, 0},   /* 262 */
    {"<tool>x", ADDED, 0},  /* 263 */
    {"日本", ADDED, 0},     /* 264: not in the alphabet */
};
static const char *const pair_merges[] = {"b c", "a b", "\u0120 a", "a bc", "a b"};

Test(tokenizer, gpt2_merges_in_the_order_of_the_files_list)
{
    _cleanup_tokenizer_ struct tokenizer *t =
        opened(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    expect_ids(t, "ab", "256");
    expect_ids(t, "abc", "258"); /* b c goes first, then a bc */
    expect_ids(t, "abab", "256 256");
    expect_ids(t, " a", "259");
    expect_ids(t, " ab", "32 256"); /* a b before blank a */
    expect_ids(t, "abcd", "258 100");
    expect_ids(t, "", "");
}

Test(tokenizer, gpt2_takes_whole_words_where_its_rule_says_so)
{
    _cleanup_tokenizer_ struct tokenizer *t =
        opened(gpt2("llama-bpe", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    expect_ids(t, "abcd", "260");
    expect_ids(t, "abcdd", "258 100 100");
}

Test(tokenizer, added_tokens_are_found_first_the_longest_of_them)
{
    _cleanup_tokenizer_ struct tokenizer *t =
        opened(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    expect_ids(t, "ab<tool>ab", "256 262 256");
    expect_ids(t, "<tool>x<tool><tool", "263 262 60 116 111 111 108");
    expect_ids(t, "a日本a", "97 264 97");
    expect_ids(t, "<|go|>", "60 124 103 111 124 62");

    static const struct word words[] = {
        {"\u2581", NORMAL, -1}, {"a", NORMAL, -2}, {"\n\n", ADDED, -3}, {"\n\n\n", ADDED, -4}};
    _cleanup_tokenizer_ struct tokenizer *lines = opened(llama(words, ELEMENTSOF(words)));
    /* each piece after an added token begins anew, with its blank */
    expect_ids(lines, "a\n\n\n\na", "259 260 262 259 13 260");
    expect_ids(lines, "\n\n\n\n\n", "262 261");
}

Test(tokenizer, malformed_utf8_becomes_the_tokens_of_its_bytes)
{
    static const char *const texts[] = {
        "\xff",     "a\x80",        "\xc0\x80",       "\xed\xa0\x80", "\xf4\x90\x80\x80",
        "\xe2\x82", "\xf0\x9f\x92", "ab\xff\x61\x62", "\xc3(",
    };
    _cleanup_tokenizer_ struct tokenizer *bytes =
        opened(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    struct gguf_writer *w = llama(small, ELEMENTSOF(small));
    gguf_put_bool(w, KEY("add_space_prefix"), false);
    _cleanup_tokenizer_ struct tokenizer *words = opened(w);
    for (size_t i = 0; i < ELEMENTSOF(texts); i++) {
        expect_round_trip(bytes, texts[i], strlen(texts[i]));
        expect_round_trip(words, texts[i], strlen(texts[i]));
    }
    expect_ids(bytes, "ab\xff\x61\x62", "256 255 256");
    expect_ids(words, "ab\xff\x61\x62", "262 258 262");
}

Test(tokenizer, any_bytes_come_back_from_their_pieces)
{
    _cleanup_tokenizer_ struct tokenizer *bytes =
        opened(gpt2("qwen2", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    struct gguf_writer *w = llama(small, ELEMENTSOF(small));
    gguf_put_bool(w, KEY("add_space_prefix"), false);
    _cleanup_tokenizer_ struct tokenizer *words = opened(w);
    uint32_t state = 99;
    for (int round = 0; round < 2000; round++) {
        char text[200];
        size_t len = next_random(&state) % sizeof(text);
        for (size_t i = 0; i < len; i++)
            text[i] = (char)(round % 2 ? next_random(&state)
                                       : "ab \n\xe2\x82\xac\xc3"[next_random(&state) % 8]);
        cr_expect_leq(expect_round_trip(bytes, text, len), len);
        cr_expect_leq(expect_round_trip(words, text, len), len);
    }
}

/* --- long texts --- */

static void fill(char *text, size_t len, int kind)
{
    static const char prose[] = "ab cab. It's 1234, a b\n\n  ba! ";
    uint32_t state = 3;
    for (size_t i = 0; i < len; i++) {
        uint32_t random = next_random(&state);
        text[i] = (char)(kind == 0   ? 'a'
                         : kind == 1 ? random
                         : kind == 2 ? 'a' + random % 26
                         : kind == 3 ? ' '
                         : kind == 4 ? '\n'
                                     : prose[i % (sizeof(prose) - 1)]);
    }
}

Test(tokenizer, a_megabyte_of_anything_is_encoded_and_comes_back)
{
    enum { KINDS = 6 };
    size_t len = 1u << 20;
    _cleanup_free_ char *text = malloc(len);
    struct gguf_writer *w = llama(small, ELEMENTSOF(small));
    gguf_put_bool(w, KEY("add_space_prefix"), false);
    _cleanup_tokenizer_ struct tokenizer *words = opened(w);
    for (int kind = 0; kind < KINDS; kind++) {
        fill(text, len, kind);
        expect_round_trip(words, text, len);
    }
    static const char *const rules[] = {"gpt-2", "llama-bpe", "qwen2", "starcoder"};
    for (size_t r = 0; r < ELEMENTSOF(rules); r++) {
        _cleanup_tokenizer_ struct tokenizer *t =
            opened(gpt2(rules[r], pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
        for (int kind = 0; kind < KINDS; kind++) {
            fill(text, len, kind);
            expect_round_trip(t, text, len);
        }
    }
}

Test(tokenizer, a_text_beyond_the_bounds_is_e2big)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(gpt2("qwen2", NULL, 0, NULL, 0));
    _cleanup_free_ int32_t *ids = NULL;
    size_t n = 77, len = 24u << 20;
    /* longer than the tokenizer takes: refused before it is looked at */
    cr_expect_eq(tokenizer_encode(t, "", (size_t)1 << 40, &ids, &n), -E2BIG);
    /* one run of blanks that exceeds PCRE2's match limit */
    _cleanup_free_ char *text = malloc(len);
    memset(text, ' ', len);
    cr_expect_eq(tokenizer_encode(t, text, len, &ids, &n), -E2BIG);
    cr_expect_null(ids);
    cr_expect_eq(n, 77);
}

/* --- pieces and special ids --- */

Test(tokenizer, pieces_are_what_a_token_adds_to_a_text)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(small, ELEMENTSOF(small)));
    static const struct {
        int32_t id;
        const char *text;
        size_t len;
    } pieces[] = {
        {0, "", 0},       {1, "", 0},     {2, "", 0},         {3, "\0", 1},       {13, "\n", 1},
        {258, "\xff", 1}, {262, "ab", 2}, {265, " a", 2},     {266, "  ", 2},     {267, "é", 2},
        {268, "", 0},     {-1, "", 0},    {INT32_MAX, "", 0}, {INT32_MIN, "", 0},
    };
    for (size_t i = 0; i < ELEMENTSOF(pieces); i++) {
        struct gguf_string piece = tokenizer_piece(t, pieces[i].id);
        cr_expect(piece.bytes && piece.len == pieces[i].len &&
                      memcmp(piece.bytes, pieces[i].text, piece.len) == 0,
                  "piece %d", pieces[i].id);
    }
    _cleanup_tokenizer_ struct tokenizer *b =
        opened(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), pair_merges, ELEMENTSOF(pair_merges)));
    for (int32_t id = 0; id < 256; id++)
        cr_expect(tokenizer_piece(b, id).len == 1 && (uint8_t)tokenizer_piece(b, id).bytes[0] == id,
                  "byte %d", id);
    cr_expect_eq(tokenizer_piece(b, 259).len, 2);
    cr_expect_eq(memcmp(tokenizer_piece(b, 259).bytes, " a", 2), 0);
    cr_expect_eq(tokenizer_piece(b, 261).len, 0);
    cr_expect_eq(tokenizer_piece(b, 264).len, strlen("日本"));
}

Test(tokenizer, end_tokens_come_from_keys_and_from_control_tokens_of_known_name)
{
    static const struct word words[] = {
        {"x", NORMAL, 0},              /* 256: the file's eot */
        {"<|im_end|>", CONTROL, 0},    /* 257 */
        {"<|endoftext|>", CONTROL, 0}, /* 258: the file's eos */
        {"<|eot_id|>", NORMAL, 0},     /* 259: text could make it */
        {"<end_of_turn>", CONTROL, 0}, /* 260 */
        {"<|im_start|>", CONTROL, 0},  /* 261 */
    };
    struct gguf_writer *w = gpt2("qwen2", words, ELEMENTSOF(words), NULL, 0);
    gguf_put_u32(w, KEY("eos_token_id"), 258);
    gguf_put_u32(w, KEY("eot_token_id"), 256);
    _cleanup_tokenizer_ struct tokenizer *t = opened(w);
    cr_expect_eq(tokenizer_eos(t), 258);
    cr_expect_eq(tokenizer_bos(t), -1);
    for (int32_t id = -2; id < 300; id++) {
        bool expected = id == 256 || id == 257 || id == 258 || id == 260;
        cr_expect_eq(tokenizer_is_end(t, id), expected, "token %d", id);
    }
}

Test(tokenizer, bos_is_added_as_the_file_says_or_as_is_usual_for_the_kind)
{
    static const struct {
        const char *pre; /* NULL: llama */
        int key;         /* -1: absent */
        bool bos, expected;
    } cases[] = {
        {NULL, -1, true, true},        {NULL, 0, true, false},
        {NULL, -1, false, false},      {"gpt-2", -1, true, false},
        {"qwen2", 1, true, true},      {"llama-bpe", -1, true, true},
        {"llama-bpe", 0, true, false}, {"llama-bpe", 1, false, false},
    };
    static const struct word words[] = {{"<unk>", UNKNOWN, 0}, {"<s>", CONTROL, 0}};
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct gguf_writer *w = cases[i].pre ? gpt2(cases[i].pre, NULL, 0, NULL, 0)
                                             : written("llama", words, ELEMENTSOF(words));
        /* 2^32 - 1 is how some files say "none" */
        gguf_put_u32(w, KEY("bos_token_id"), cases[i].bos ? 1 : UINT32_MAX);
        if (cases[i].key >= 0)
            gguf_put_bool(w, KEY("add_bos_token"), cases[i].key);
        _cleanup_tokenizer_ struct tokenizer *t = opened(w);
        cr_expect_eq(tokenizer_adds_bos(t), cases[i].expected, "case %zu", i);
        cr_expect_eq(tokenizer_bos(t), cases[i].bos ? 1 : -1);
    }
}

/* --- malformed vocabularies --- */

struct bad {
    const char *what;
    void (*write)(struct gguf_writer *w);
    int error;
    const char *says;
};

static const char *const three[] = {"<unk>", "a", "b"};
static const int32_t three_types[] = {2, 1, 1};
static const float three_scores[] = {0, -1, -2};

static void put_llama(struct gguf_writer *w)
{
    gguf_put_string(w, KEY("model"), "llama");
    gguf_put_strings(w, KEY("tokens"), three, 3);
}

static void no_keys(struct gguf_writer *w)
{
    (void)w;
}

static void model_is_a_number(struct gguf_writer *w)
{
    gguf_put_u32(w, KEY("model"), 3);
}

static void kind_is_bert(struct gguf_writer *w)
{
    gguf_put_string(w, KEY("model"), "bert");
}

static void kind_is_escapes(struct gguf_writer *w)
{
    gguf_put_string(w, KEY("model"), "\x1b[2J");
}

static void no_tokens(struct gguf_writer *w)
{
    gguf_put_string(w, KEY("model"), "llama");
}

static void empty_vocabulary(struct gguf_writer *w)
{
    no_tokens(w);
    gguf_put_strings(w, KEY("tokens"), NULL, 0);
}

static void tokens_are_numbers(struct gguf_writer *w)
{
    no_tokens(w);
    gguf_put_i32s(w, KEY("tokens"), three_types, 3);
}

static void ten_million_tokens(struct gguf_writer *w)
{
    no_tokens(w);
    gguf_begin_strings(w, KEY("tokens"), 10000000);
    for (uint32_t i = 0; i < 10000000; i++)
        gguf_add_string(w, "", 0);
}

static void three_million_tokens(struct gguf_writer *w)
{
    no_tokens(w);
    gguf_begin_strings(w, KEY("tokens"), 3000000);
    for (uint32_t i = 0; i < 3000000; i++)
        gguf_add_string(w, "", 0);
}

static void no_scores(struct gguf_writer *w)
{
    put_llama(w);
    gguf_put_i32s(w, KEY("token_type"), three_types, 3);
}

static void few_scores(struct gguf_writer *w)
{
    no_scores(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 2);
}

static void score_is_nan(struct gguf_writer *w)
{
    no_scores(w);
    gguf_put_f32s(w, KEY("scores"), (float[]){0, NAN, 1}, 3);
}

static void many_types(struct gguf_writer *w)
{
    put_llama(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 3);
    gguf_put_i32s(w, KEY("token_type"), (int32_t[]){2, 1, 1, 1}, 4);
}

static void type_out_of_range(struct gguf_writer *w)
{
    put_llama(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 3);
    gguf_put_i32s(w, KEY("token_type"), (int32_t[]){2, 1, 7}, 3);
}

static void byte_token_without_a_byte(struct gguf_writer *w)
{
    put_llama(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 3);
    gguf_put_i32s(w, KEY("token_type"), (int32_t[]){2, 1, 6}, 3);
}

static void no_bytes_and_no_unknown(struct gguf_writer *w)
{
    put_llama(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 3);
    gguf_put_i32s(w, KEY("token_type"), (int32_t[]){1, 1, 1}, 3);
}

static void put_whole_llama(struct gguf_writer *w)
{
    no_scores(w);
    gguf_put_f32s(w, KEY("scores"), three_scores, 3);
}

static void bos_out_of_range(struct gguf_writer *w)
{
    put_whole_llama(w);
    gguf_put_u32(w, KEY("bos_token_id"), 3);
}

static void eos_out_of_range(struct gguf_writer *w)
{
    put_whole_llama(w);
    gguf_put_u32(w, KEY("eos_token_id"), 0x80000000u);
}

static void unknown_out_of_range(struct gguf_writer *w)
{
    put_whole_llama(w);
    gguf_put_u32(w, KEY("unknown_token_id"), 1000);
}

static void add_bos_is_text(struct gguf_writer *w)
{
    put_whole_llama(w);
    gguf_put_string(w, KEY("add_bos_token"), "yes");
}

static void space_prefix_is_text(struct gguf_writer *w)
{
    put_whole_llama(w);
    gguf_put_string(w, KEY("add_space_prefix"), "yes");
}

static void added_token_too_long(struct gguf_writer *w)
{
    char text[300];
    memset(text, 'x', sizeof(text));
    no_tokens(w);
    gguf_begin_strings(w, KEY("tokens"), 2);
    gguf_add_string(w, "<unk>", 5);
    gguf_add_string(w, text, sizeof(text));
    gguf_put_i32s(w, KEY("token_type"), (int32_t[]){2, 4}, 2);
}

static void token_too_long(struct gguf_writer *w)
{
    static char text[5000];
    memset(text, 'x', sizeof(text));
    no_tokens(w);
    gguf_begin_strings(w, KEY("tokens"), 1);
    gguf_add_string(w, text, sizeof(text));
}

static void expect_refused(struct gguf_writer *w, const struct bad *bad)
{
    struct tokenizer *t = NULL;
    struct fault fault = {""};
    int r = open_writer(w, &t, &fault);
    cr_expect_eq(r, bad->error, "%s: %d %s", bad->what, r, fault.text);
    cr_expect_null(t);
    cr_expect(strstr(fault.text, bad->says), "%s: %s", bad->what, fault.text);
    cr_expect_null(strchr(fault.text, '\x1b'), "%s", bad->what);
}

Test(tokenizer, malformed_llama_vocabularies_are_errors_with_a_sentence)
{
    static const struct bad bad[] = {
        {"no keys", no_keys, -EBADMSG, "no tokenizer.ggml.model"},
        {"model is a number", model_is_a_number, -EBADMSG, "tokenizer.ggml.model"},
        {"kind is bert", kind_is_bert, -ENOTSUP, "\"bert\" is not supported"},
        {"kind is an escape", kind_is_escapes, -ENOTSUP, "is not supported"},
        {"no tokens", no_tokens, -EBADMSG, "no tokenizer.ggml.tokens"},
        {"empty vocabulary", empty_vocabulary, -EBADMSG, "0 tokens"},
        {"tokens are numbers", tokens_are_numbers, -EBADMSG, "tokenizer.ggml.tokens"},
        {"ten million tokens", ten_million_tokens, -EBADMSG, "10000000"},
        {"three million tokens", three_million_tokens, -EBADMSG, "3000000 tokens"},
        {"no scores", no_scores, -EBADMSG, "tokenizer.ggml.scores"},
        {"few scores", few_scores, -EBADMSG, "2 scores for 3 tokens"},
        {"a score is not a number", score_is_nan, -EBADMSG, "is not a number"},
        {"many types", many_types, -EBADMSG, "4 token types for 3 tokens"},
        {"type out of range", type_out_of_range, -EBADMSG, "token 2 has type 7"},
        {"byte token", byte_token_without_a_byte, -EBADMSG, "token 2 is a byte token"},
        {"no bytes", no_bytes_and_no_unknown, -EBADMSG, "neither all 256 byte tokens"},
        {"bos out of range", bos_out_of_range, -EBADMSG, "bos_token_id is 3"},
        {"eos out of range", eos_out_of_range, -EBADMSG, "eos_token_id is 2147483648"},
        {"unknown out of range", unknown_out_of_range, -EBADMSG, "unknown_token_id is 1000"},
        {"add_bos is text", add_bos_is_text, -EBADMSG, "add_bos_token"},
        {"space prefix is text", space_prefix_is_text, -EBADMSG, "add_space_prefix"},
        {"token too long", token_too_long, -EBADMSG, "token 0 has 5000 bytes"},
        {"added token too long", added_token_too_long, -EBADMSG, "has 300 bytes"},
    };
    for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
        struct gguf_writer *w = NULL;
        cr_assert_eq(gguf_writer_new(3, &w), 0);
        bad[i].write(w);
        expect_refused(w, &bad[i]);
    }
}

Test(tokenizer, malformed_gpt2_vocabularies_are_errors_with_a_sentence)
{
    static const struct {
        const char *merge, *says;
    } merges[] = {
        {"a z", "merge 1, \"a z\""}, {"zz a", "merge 1"}, {"ab", "merge 1"},   {"", "merge 1"},
        {" a", "merge 1"},           {"a ", "merge 1"},   {"a  b", "merge 1"}, {"日 本", "merge 1"},
        {"\x1b[2J x", "merge 1"},
    };
    for (size_t i = 0; i < ELEMENTSOF(merges); i++) {
        const char *const list[] = {"a b", merges[i].merge};
        expect_refused(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), list, 2),
                       &(struct bad){merges[i].merge, NULL, -EBADMSG, merges[i].says});
    }
    expect_refused(written("gpt2", pairs, ELEMENTSOF(pairs)),
                   &(struct bad){"no pre", NULL, -ENOTSUP, "names no pre-tokenizer"});
    _cleanup_free_ const char **many = calloc(1100000, sizeof(*many));
    for (size_t i = 0; i < 1100000; i++)
        many[i] = "a b";
    expect_refused(gpt2("gpt-2", pairs, ELEMENTSOF(pairs), many, 1100000),
                   &(struct bad){"many merges", NULL, -EBADMSG, "1100000 merges"});
    expect_refused(gpt2("default", NULL, 0, NULL, 0),
                   &(struct bad){"pre default", NULL, -ENOTSUP, "\"default\" is not supported"});
    struct gguf_writer *w = written("gpt2", pairs, ELEMENTSOF(pairs));
    gguf_put_string(w, KEY("pre"), "gpt-2");
    expect_refused(w, &(struct bad){"bytes missing", NULL, -EBADMSG, "no token for byte 0x00"});
    w = written("gpt2", (const struct word[]){{"?", UNKNOWN, 0}}, 1);
    gguf_put_string(w, KEY("pre"), "gpt-2");
    expect_refused(w, &(struct bad){"no merges", NULL, -EBADMSG, "tokenizer.ggml.merges"});
}

Test(tokenizer, odd_vocabularies_load_and_work)
{
    static const struct word words[] = {
        {"", NORMAL, 0},     {"ab", NORMAL, -5},
        {"ab", NORMAL, -1},  {"a", NORMAL, -9},
        {"b", NORMAL, -9},   {"\xff\xfe", NORMAL, 0},
        {"a b", NORMAL, 0},  {"\u2581", NORMAL, -INFINITY},
        {"", ADDED, 0},      {"", CONTROL, 0},
        {"<0x61>", BYTE, 0}, {"c", UNUSED, -3},
    };
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(words, ELEMENTSOF(words)));
    expect_ids(t, "ab", "266 261"); /* of two equal tokens the later */
    expect_ids(t, "a b", "266 262 266 263");
    expect_ids(t, "\xff\xfe", "266 258 257");
    cr_expect_eq(tokenizer_piece(t, 264).len, 2); /* bytes that are no text are still a piece */
    cr_expect_eq(tokenizer_n_vocab(t), FIRST_WORD + ELEMENTSOF(words));
}

Test(tokenizer, byte_tokens_are_known_without_types)
{
    static const char *const texts[] = {"<unk>", "<s>", "</s>", "a", "<0x41>", "<0xZZ>"};
    struct gguf_writer *w = NULL;
    cr_assert_eq(gguf_writer_new(3, &w), 0);
    gguf_put_string(w, KEY("model"), "llama");
    gguf_put_strings(w, KEY("tokens"), texts, 5);
    gguf_put_f32s(w, KEY("scores"), (float[]){0, 0, 0, -1, 0}, 5);
    _cleanup_tokenizer_ struct tokenizer *t = opened(w);
    cr_expect_eq(tokenizer_piece(t, 1).len, 0);
    cr_expect_eq(tokenizer_piece(t, 4).len, 1);
    cr_expect(tokenizer_is_end(t, 2));
    expect_ids(t, "aQ", "0 3 0");
}

Test(tokenizer, memory_is_counted_and_stays_near_the_vocabulary)
{
    _cleanup_tokenizer_ struct tokenizer *t = opened(llama(small, ELEMENTSOF(small)));
    size_t bytes = tokenizer_bytes(t);
    cr_expect_gt(bytes, 268 * 8);
    cr_expect_lt(bytes, 64 * 1024);
    cr_expect_null(tokenizer_free(NULL));
}
