#include "bench/vocabulary.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

#define N_LETTERS 26u
/* Longest piece, in symbols: 27 * 26^4 of them are more than VOCABULARY_MAX_TOKENS. */
#define MAX_SYMBOLS 5u
/* A symbol is at most 3 bytes of UTF-8. */
#define PIECE_BYTES (MAX_SYMBOLS * 3u)

#define N_LLAMA_SPECIAL 3u
#define N_BYTES         256u
#define N_BERT_SPECIAL  5u

/* Numbers of token types in the file. */
enum {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_BYTE = 6,
};

/* The marks before a word: U+2581 and the byte alphabet's name of a blank, U+0120. */
static const char word_mark[] = "\xe2\x96\x81";
static const char blank_mark[] = "\xc4\xa0";

/* Every printable ASCII character, letters by their frequency in English first. */
static const char letters[] = "etaoinshrdlcumwfgypbvkjxqz";
static const char others[] =
    "ETAOINSHRDLCUMWFGYPBVKJXQZ.,'\"!?-0123456789:;()#$%&*+/<=>@[\\]^_`{|}~";
/* What of `others` a lower-cased text can hold. */
static const char *const lower_others = others + N_LETTERS;

static_assert(sizeof(letters) == N_LETTERS + 1, "each letter once");
static_assert(sizeof(others) == 94 - N_LETTERS + 1, "the rest of printable ASCII once");

struct piece {
    char bytes[PIECE_BYTES];
    size_t len;
    size_t prefix_len; /* all but its last symbol, which is one letter */
};

/* The piece of a number: length by length, the first symbol (a mark or a letter) turning fastest.
 */
static struct piece piece_at(uint32_t number, const char *mark)
{
    struct piece piece = {.len = 0};
    uint64_t of_this_length = (N_LETTERS + 1) * N_LETTERS, rest = number;
    uint32_t symbols = 2, first;

    while (rest >= of_this_length) {
        rest -= of_this_length;
        of_this_length *= N_LETTERS;
        symbols++;
    }
    assert(symbols <= MAX_SYMBOLS);
    first = (uint32_t)(rest % (N_LETTERS + 1));
    rest /= N_LETTERS + 1;
    if (first == 0) {
        piece.len = strlen(mark);
        memcpy(piece.bytes, mark, piece.len);
    } else {
        piece.bytes[piece.len++] = letters[first - 1];
    }
    for (uint32_t i = 1; i < symbols; i++, rest /= N_LETTERS)
        piece.bytes[piece.len++] = letters[rest % N_LETTERS];
    piece.prefix_len = piece.len - 1;
    return piece;
}

static void add_piece(struct gguf_writer *writer, uint32_t number, const char *mark)
{
    struct piece piece = piece_at(number, mark);

    gguf_add_string(writer, piece.bytes, piece.len);
}

static void add_text(struct gguf_writer *writer, const char *text)
{
    gguf_add_string(writer, text, strlen(text));
}

/* ---- llama ---- */

/* Characters, then pieces: the id-th token after the bytes. */
static void add_llama_token(struct gguf_writer *writer, uint32_t i)
{
    const uint32_t n_others = sizeof(others) - 1;

    if (i == 0)
        add_text(writer, word_mark);
    else if (i <= N_LETTERS)
        gguf_add_string(writer, &letters[i - 1], 1);
    else if (i <= N_LETTERS + n_others)
        gguf_add_string(writer, &others[i - 1 - N_LETTERS], 1);
    else
        add_piece(writer, i - 1 - N_LETTERS - n_others, word_mark);
}

static int write_llama(uint32_t n, struct gguf_writer *writer)
{
    const uint32_t n_fixed = N_LLAMA_SPECIAL + N_BYTES;
    _cleanup_free_ float *scores = calloc(n, sizeof(*scores));
    _cleanup_free_ int32_t *types = calloc(n, sizeof(*types));

    if (!scores || !types)
        return -ENOMEM;
    gguf_put_string(writer, "tokenizer.ggml.model", "llama");
    gguf_put_string(writer, "tokenizer.ggml.pre", "default");
    gguf_begin_strings(writer, "tokenizer.ggml.tokens", n);
    add_text(writer, "<unk>");
    add_text(writer, "<s>");
    add_text(writer, "</s>");
    for (uint32_t i = 0; i < N_BYTES; i++) {
        char name[8];
        snprintf(name, sizeof(name), "<0x%02X>", i);
        add_text(writer, name);
    }
    for (uint32_t i = n_fixed; i < n; i++)
        add_llama_token(writer, i - n_fixed);
    for (uint32_t i = 0; i < n; i++) {
        types[i] = i == 0 ? TOKEN_UNKNOWN : i < 3 ? TOKEN_CONTROL : TOKEN_BYTE;
        if (i < n_fixed)
            continue;
        types[i] = TOKEN_NORMAL;
        scores[i] = -(float)(i - n_fixed);
    }
    gguf_put_f32s(writer, "tokenizer.ggml.scores", scores, n);
    gguf_put_i32s(writer, "tokenizer.ggml.token_type", types, n);
    gguf_put_u32(writer, "tokenizer.ggml.bos_token_id", 1);
    gguf_put_u32(writer, "tokenizer.ggml.eos_token_id", 2);
    gguf_put_u32(writer, "tokenizer.ggml.unknown_token_id", 0);
    gguf_put_bool(writer, "tokenizer.ggml.add_bos_token", true);
    gguf_put_bool(writer, "tokenizer.ggml.add_eos_token", false);
    return 0;
}

/* ---- gpt2 ---- */

/* Printable bytes of Latin-1 stand for themselves in the byte alphabet, all others for the code
 * points from 256 on, in their order. */
static bool stands_for_itself(uint32_t byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

static void add_code_point(struct gguf_writer *writer, uint32_t code)
{
    char utf8[2] = {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 0x3f))};
    char ascii = (char)code;

    if (code < 0x80)
        gguf_add_string(writer, &ascii, 1);
    else
        gguf_add_string(writer, utf8, 2);
}

static void add_byte_alphabet(struct gguf_writer *writer)
{
    uint32_t next = 256;

    for (uint32_t byte = 0; byte < N_BYTES; byte++) {
        if (stands_for_itself(byte))
            add_code_point(writer, byte);
    }
    for (uint32_t byte = 0; byte < N_BYTES; byte++) {
        if (!stands_for_itself(byte))
            add_code_point(writer, next++);
    }
}

static int write_gpt2(uint32_t n, struct gguf_writer *writer)
{
    const uint32_t n_pieces = n - N_BYTES - 1;
    _cleanup_free_ int32_t *types = calloc(n, sizeof(*types));

    if (!types)
        return -ENOMEM;
    gguf_put_string(writer, "tokenizer.ggml.model", "gpt2");
    gguf_put_string(writer, "tokenizer.ggml.pre", "gpt-2");
    gguf_begin_strings(writer, "tokenizer.ggml.tokens", n);
    add_byte_alphabet(writer);
    for (uint32_t i = 0; i < n_pieces; i++)
        add_piece(writer, i, blank_mark);
    add_text(writer, "<|endoftext|>");
    for (uint32_t i = 0; i < n; i++)
        types[i] = i == n - 1 ? TOKEN_CONTROL : TOKEN_NORMAL;
    gguf_put_i32s(writer, "tokenizer.ggml.token_type", types, n);
    gguf_begin_strings(writer, "tokenizer.ggml.merges", n_pieces);
    for (uint32_t i = 0; i < n_pieces; i++) {
        struct piece piece = piece_at(i, blank_mark);
        char merge[PIECE_BYTES + 1];
        memcpy(merge, piece.bytes, piece.prefix_len);
        merge[piece.prefix_len] = ' ';
        merge[piece.prefix_len + 1] = piece.bytes[piece.prefix_len];
        gguf_add_string(writer, merge, piece.len + 1);
    }
    gguf_put_u32(writer, "tokenizer.ggml.bos_token_id", n - 1);
    gguf_put_u32(writer, "tokenizer.ggml.eos_token_id", n - 1);
    gguf_put_bool(writer, "tokenizer.ggml.add_bos_token", false);
    return 0;
}

/* ---- bert ---- */

/* A character that begins a word, and the same inside one; a marked letter is a piece already. */
static void add_bert_characters(struct gguf_writer *writer)
{
    for (const char *c = lower_others; *c; c++) {
        char marked[4];
        memcpy(marked, word_mark, 3);
        marked[3] = *c;
        gguf_add_string(writer, marked, sizeof(marked));
        gguf_add_string(writer, c, 1);
    }
    for (const char *c = letters; *c; c++)
        gguf_add_string(writer, c, 1);
}

static uint32_t n_bert_fixed(void)
{
    return N_BERT_SPECIAL + 2 * (uint32_t)strlen(lower_others) + N_LETTERS;
}

static int write_bert(uint32_t n, struct gguf_writer *writer)
{
    _cleanup_free_ int32_t *types = calloc(n, sizeof(*types));

    if (!types)
        return -ENOMEM;
    gguf_put_string(writer, "tokenizer.ggml.model", "bert");
    gguf_put_string(writer, "tokenizer.ggml.pre", "bert-bge");
    gguf_begin_strings(writer, "tokenizer.ggml.tokens", n);
    add_text(writer, "[PAD]");
    add_text(writer, "[UNK]");
    add_text(writer, "[CLS]");
    add_text(writer, "[SEP]");
    add_text(writer, "[MASK]");
    add_bert_characters(writer);
    for (uint32_t i = 0; i < n - n_bert_fixed(); i++)
        add_piece(writer, i, word_mark);
    for (uint32_t i = 0; i < n; i++)
        types[i] = i < N_BERT_SPECIAL ? TOKEN_CONTROL : TOKEN_NORMAL;
    gguf_put_i32s(writer, "tokenizer.ggml.token_type", types, n);
    gguf_put_u32(writer, "tokenizer.ggml.padding_token_id", 0);
    gguf_put_u32(writer, "tokenizer.ggml.unknown_token_id", 1);
    gguf_put_u32(writer, "tokenizer.ggml.cls_token_id", 2);
    gguf_put_u32(writer, "tokenizer.ggml.seperator_token_id", 3); /* the format's own spelling */
    gguf_put_u32(writer, "tokenizer.ggml.mask_token_id", 4);
    gguf_put_u32(writer, "tokenizer.ggml.token_type_count", 2);
    return 0;
}

uint32_t vocabulary_least(enum vocabulary_kind kind)
{
    switch (kind) {
    case VOCABULARY_LLAMA: return N_LLAMA_SPECIAL + N_BYTES + 1;
    case VOCABULARY_GPT2: return N_BYTES + 1;
    default: return n_bert_fixed();
    }
}

int vocabulary_write(enum vocabulary_kind kind, uint32_t n, struct gguf_writer *writer)
{
    assert(n >= vocabulary_least(kind) && n <= VOCABULARY_MAX_TOKENS);
    switch (kind) {
    case VOCABULARY_LLAMA: return write_llama(n, writer);
    case VOCABULARY_GPT2: return write_gpt2(n, writer);
    default: return write_bert(n, writer);
    }
}
