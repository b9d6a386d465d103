/* Arbitrary bytes as a whole model file, or as a small vocabulary and a text to encode with it.
 *
 * Whatever loads must keep its promises: at most two ids a byte and one more, every id in range,
 * and (where the vocabulary can spell every byte) pieces that make the text again.
 *
 * For libFuzzer: clang -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -I.
 * tests/fuzz/fuzz_tokenizer.c daemon/engine/{gguf,tokenizer,tokenizer_spm,tokenizer_bpe,
 * pretokenizer}.c bench/gguf_writer.c -lpcre2-8 */
#include <stdlib.h>
#include <string.h>

#include "bench/gguf_writer.h"
#include "daemon/engine/tokenizer.h"

#define KEY(name) "tokenizer.ggml." name

/* The first byte of an input. */
enum {
    IS_FILE = 1,
    IS_GPT2 = 2,
    ONLY_LETTERS = 4,
    NO_PREFIX = 8,
    TRIMS = 16,
    RULE_SHIFT = 5,
};

enum { MAX_WORDS = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *at;
    size_t left;
};

static uint8_t take(struct input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->at++;
}

/* Encodes and checks; `exact`: the pieces must make the text. */
static void encode(const struct tokenizer *t, const char *text, size_t len, bool exact)
{
    int32_t *ids = NULL;
    size_t n = 0, at = 0;
    if (tokenizer_encode(t, text, len, &ids, &n) < 0)
        return;
    if (n > 2 * len + 1)
        abort();
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= tokenizer_n_vocab(t))
            abort();
        struct gguf_string piece = tokenizer_piece(t, ids[i]);
        if (exact && (piece.len > len - at || memcmp(piece.bytes, text + at, piece.len) != 0))
            abort();
        at += exact ? piece.len : 0;
        tokenizer_is_end(t, ids[i]);
    }
    if (exact && at != len)
        abort();
    free(ids);
}

static void load(const uint8_t *bytes, size_t size, const char *text, size_t len, bool exact)
{
    struct gguf_source source = {.fd = -1, .memory = bytes, .size = size};
    struct gguf *gguf = NULL;
    struct tokenizer *t = NULL;
    struct fault fault = {""};
    if (gguf_open(&source, &gguf, &fault) == 0 && tokenizer_new(gguf, &t, &fault) == 0) {
        gguf_free(gguf);
        gguf = NULL; /* the tokenizer must not need it any more */
        encode(t, text, len, exact);
    } else if (fault.text[0] == '\0') {
        abort();
    }
    tokenizer_free(t);
    gguf_free(gguf);
}

/* A byte token, or a byte in GPT-2's alphabet. */
static void add_byte(struct gguf_writer *w, int byte, bool is_gpt2)
{
    static const char digits[] = "0123456789ABCDEF";
    int others = 0, c = 0;
    for (int b = 0; b <= byte; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        c = printable ? b : 0x100 + others;
        others += !printable;
    }
    char one[] = {(char)c};
    char two[] = {(char)(0xc0 | c >> 6), (char)(0x80 | (c & 0x3f))};
    char hex[] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
    if (!is_gpt2)
        gguf_add_string(w, hex, sizeof(hex));
    else if (c < 0x80)
        gguf_add_string(w, one, sizeof(one));
    else
        gguf_add_string(w, two, sizeof(two));
}

/* The text, a length's worth of the input; small letters where the input asks for them, so that
 * merges are met often. */
static size_t take_text(struct input *in, uint8_t flags, char *to, size_t len)
{
    size_t n = 0;
    for (; n < len && in->left > 0; n++) {
        uint8_t byte = take(in);
        to[n] = (char)(flags & ONLY_LETTERS ? "abcd "[byte % 5] : byte);
    }
    return n;
}

static void add_words(struct gguf_writer *w, struct input *in, uint8_t flags, int32_t *types,
                      float *scores, uint32_t n_words)
{
    bool is_gpt2 = flags & IS_GPT2;
    gguf_begin_strings(w, KEY("tokens"), 256 + n_words);
    for (int b = 0; b < 256; b++) {
        add_byte(w, b, is_gpt2);
        types[b] = is_gpt2 ? 1 : 6;
    }
    for (uint32_t i = 0; i < n_words; i++) {
        char text[16];
        uint8_t head = take(in);
        size_t len = take_text(in, flags, text, head % 8);
        gguf_add_string(w, text, len);
        /* Added tokens too, but none that would come out of nowhere. */
        types[256 + i] = head & 0x80 ? 4 : head & 0x40 ? 3 : 1;
        scores[256 + i] = (float)(head >> 3 & 7);
    }
}

static void add_merges(struct gguf_writer *w, struct input *in, uint8_t flags, uint32_t n_merges)
{
    gguf_begin_strings(w, KEY("merges"), n_merges);
    for (uint32_t i = 0; i < n_merges; i++) {
        char text[16];
        gguf_add_string(w, text, take_text(in, flags, text, take(in) % 8));
    }
}

static void make(struct input *in, uint8_t flags)
{
    static const char *const rules[] = {"gpt-2", "llama-bpe", "qwen2", "starcoder"};
    int32_t types[256 + MAX_WORDS] = {0};
    float scores[256 + MAX_WORDS] = {0};
    uint32_t n_words = take(in) % MAX_WORDS;
    struct gguf_writer *w = NULL;
    if (gguf_writer_new(3, &w) < 0)
        return;
    gguf_put_string(w, KEY("model"), flags & IS_GPT2 ? "gpt2" : "llama");
    add_words(w, in, flags, types, scores, n_words);
    gguf_put_i32s(w, KEY("token_type"), types, 256 + n_words);
    if (flags & IS_GPT2) {
        gguf_put_string(w, KEY("pre"), rules[flags >> RULE_SHIFT & 3]);
        add_merges(w, in, flags, take(in) % 16);
    } else {
        gguf_put_f32s(w, KEY("scores"), scores, 256 + n_words);
        gguf_put_bool(w, KEY("add_space_prefix"), !(flags & NO_PREFIX));
        gguf_put_bool(w, KEY("remove_extra_whitespaces"), flags & TRIMS);
    }
    uint8_t *bytes = NULL;
    size_t size;
    if (gguf_writer_finish(w, &bytes, &size) == 0) {
        char *text = malloc(in->left + 1);
        size_t len = text ? take_text(in, flags, text, in->left) : 0;
        bool has_blank_char = text && memmem(text, len, "\xe2\x96\x81", 3);
        bool exact = flags & IS_GPT2 || (flags & NO_PREFIX && !(flags & TRIMS) && !has_blank_char);
        load(bytes, size, text ? text : "", len, exact);
        free(text);
    }
    free(bytes);
    gguf_writer_free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "Once upon a time, \xe6\x97\xa5\xff 12'll\n\n  x";
    struct input in = {.at = data, .left = size};
    uint8_t flags = take(&in);
    if (flags & IS_FILE)
        load(in.at, in.left, text, sizeof(text) - 1, false);
    else
        make(&in, flags);
    return 0;
}
