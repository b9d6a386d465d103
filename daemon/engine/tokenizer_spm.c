/* The `llama` kind: SentencePiece's byte-pair model.
 *
 * A blank is part of a word and written ▁ in the file; here tokens and text both hold a plain
 * blank, and a ▁ in the text counts as a blank, as it does for SentencePiece. Neighbours merge in
 * the order of their token's score. A character that no token covers becomes its bytes' tokens, or
 * the unknown token where the file has no byte tokens. So does each byte that is not part of
 * well-formed UTF-8. */
#include <inttypes.h>
#include <string.h>

#include "daemon/engine/tokenizer_internal.h"
#include "daemon/engine/utf8.h"
#include "lib/cleanup.h"

#define KEY(name) "tokenizer.ggml." name

#define BLANK       "\u2581"
#define BLANK_BYTES 3u

/* Texts up to this size are prepared on the stack. */
#define STACK_TEXT_BYTES 1024u

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return -1;
}

/* "<0x41>" is 0x41; -1 for anything else. */
static int byte_of(struct gguf_string token)
{
    if (token.len != 6 || memcmp(token.bytes, "<0x", 3) != 0 || token.bytes[5] != '>')
        return -1;
    int high = hex_digit(token.bytes[3]), low = hex_digit(token.bytes[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

static bool begins_with_blank(const char *text, size_t left)
{
    return left >= BLANK_BYTES && text[0] == BLANK[0] && memcmp(text, BLANK, BLANK_BYTES) == 0;
}

/* Each ▁ becomes a blank; returns the bytes written, never more than were read. */
static size_t blanks_from_file(const char *from, size_t len, char *to)
{
    size_t n = 0;
    for (size_t at = 0; at < len;) {
        if (begins_with_blank(from + at, len - at)) {
            to[n++] = ' ';
            at += BLANK_BYTES;
        } else {
            to[n++] = from[at++];
        }
    }
    return n;
}

size_t spm_decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                  bool *ret_indexed)
{
    (void)t;
    if (type == TOKEN_BYTE) {
        int byte = byte_of(token);
        *ret_indexed = false;
        if (byte < 0)
            return 0;
        to[0] = (char)byte;
        return 1;
    }
    /* Text has no plain blank once prepared, and only whole characters merge. */
    *ret_indexed = !memchr(token.bytes, ' ', token.len) && utf8_valid(token.bytes, token.len);
    return blanks_from_file(token.bytes, token.len, to);
}

static int load_byte_tokens(struct tokenizer *t, struct fault *ret_fault)
{
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (t->type[i] != TOKEN_BYTE)
            continue;
        if (t->at[i + 1] == t->at[i])
            return fault_set(ret_fault, -EBADMSG,
                             "tokenizer: token %" PRIu32
                             " is a byte token, but its text is not of the form <0x41>; convert "
                             "the model again",
                             i);
        t->byte_id[(uint8_t)t->arena[t->at[i]]] = (int32_t)i;
    }
    t->has_bytes = true;
    for (int b = 0; b < 256; b++)
        t->has_bytes = t->has_bytes && t->byte_id[b] >= 0;
    if (!t->has_bytes && t->unknown < 0)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: the vocabulary has neither all 256 byte tokens nor an unknown "
                         "token, so most text cannot be encoded; convert the model again");
    return 0;
}

/* Numbers that sort as the scores do (none is a NaN), the best first; adding 0 makes -0 a 0. */
static uint32_t order_of(float score)
{
    float value = score + 0.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ~ascending;
}

static int load_scores(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    _cleanup_free_ float *scores = NULL;
    uint64_t n;
    int r = gguf_get_f32s(gguf, KEY("scores"), &scores, &n, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: a llama vocabulary needs " KEY(
                             "scores") ", and the file has none; convert the model again");
    if (r < 0)
        return r;
    if (n != t->n_vocab)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: %" PRIu64 " scores for %" PRIu32
                         " tokens; the file is damaged, convert the model again",
                         n, t->n_vocab);
    t->order = tokenizer_take(t, t->n_vocab, sizeof(*t->order));
    if (!t->order)
        return -ENOMEM;
    for (uint32_t i = 0; i < t->n_vocab; i++)
        t->order[i] = order_of(scores[i]);
    return 0;
}

/* Which bytes stand side by side, across a character's border, inside some token that text can
 * reach. Where two characters of a text never do, no token spans them, and the text can be cut
 * there without changing any merge: words stay short even in a long text. */
static int load_joins(struct tokenizer *t)
{
    t->joins = tokenizer_take(t, 65536 / 64, sizeof(*t->joins));
    if (!t->joins)
        return -ENOMEM;
    for (uint32_t i = 0; i <= t->slot_mask; i++) {
        int32_t id = t->slots[i].id;
        if (id < 0)
            continue;
        for (uint32_t at = t->at[id] + 1; at < t->at[id + 1]; at++) {
            uint8_t left = (uint8_t)t->arena[at - 1], right = (uint8_t)t->arena[at];
            if ((right & 0xc0) == 0x80)
                continue;
            uint32_t pair = (uint32_t)left << 8 | right;
            t->joins[pair / 64] |= 1ull << (pair % 64);
        }
    }
    return 0;
}

static int load_flag(const struct gguf *gguf, const char *key, bool *value, struct fault *ret_fault)
{
    int r = gguf_get_bool(gguf, key, value, ret_fault);
    return r == -ENOENT ? 0 : r;
}

int spm_load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    int r = load_scores(t, gguf, ret_fault);
    if (r >= 0)
        r = load_byte_tokens(t, ret_fault);
    if (r >= 0)
        r = load_joins(t);
    t->space_prefix = true;
    if (r >= 0)
        r = load_flag(gguf, KEY("add_space_prefix"), &t->space_prefix, ret_fault);
    if (r >= 0)
        r = load_flag(gguf, KEY("remove_extra_whitespaces"), &t->trim_spaces, ret_fault);
    for (int c = 0; r >= 0 && c < 128; c++) {
        char text = (char)c;
        t->ascii[c] = tokenizer_find(t, &text, 1);
    }
    return r;
}

/* --- encoding --- */

static inline bool lookup(const void *context, const struct merge_symbol *left,
                          const struct merge_symbol *right, uint32_t *ret_order, int32_t *ret_id)
{
    const struct encoder *e = context;
    int32_t id = tokenizer_find(e->tokenizer, e->text + left->at, left->len + right->len);
    if (id < 0)
        return false;
    *ret_order = e->tokenizer->order[id];
    *ret_id = id;
    return true;
}

/* What no token covers. */
static void put_bytes(struct encoder *e, const char *bytes, size_t len)
{
    const struct tokenizer *t = e->tokenizer;
    if (!t->has_bytes) {
        encoder_put(e, t->unknown);
        return;
    }
    for (size_t i = 0; i < len; i++)
        encoder_put(e, t->byte_id[(uint8_t)bytes[i]]);
}

/* Merges the symbols gathered so far and puts out their tokens. */
static void flush(struct encoder *e)
{
    struct merger *m = &e->merger;
    if (m->n_symbols == 0)
        return;
    if (m->n_symbols > 1)
        merger_run(m, lookup, e);
    for (uint32_t i = 0; i != MERGE_NONE; i = m->symbols[i].next) {
        const struct merge_symbol *s = &m->symbols[i];
        if (s->id >= 0)
            encoder_put(e, s->id);
        else
            put_bytes(e, e->text + s->at, s->len);
    }
    m->n_symbols = 0;
}

static inline bool may_join(const struct tokenizer *t, const char *right)
{
    uint32_t pair = (uint32_t)(uint8_t)right[-1] << 8 | (uint8_t)right[0];
    return t->joins[pair / 64] >> (pair % 64) & 1;
}

static int encode_prepared(struct encoder *e, const char *text, size_t len)
{
    const struct tokenizer *t = e->tokenizer;
    e->text = text;
    e->merger.n_symbols = 0;
    for (size_t at = 0; at < len;) {
        unsigned n = utf8_char_bytes(text + at, len - at);
        if (n == 0) {
            flush(e);
            put_bytes(e, text + at, 1);
            at++;
            continue;
        }
        if (e->merger.n_symbols > 0 && !may_join(t, text + at))
            flush(e);
        int32_t id = n == 1 ? t->ascii[(uint8_t)text[at]] : tokenizer_find(t, text + at, n);
        int r = merger_add(&e->merger, (uint32_t)at, n, id);
        if (r < 0)
            return r;
        at += n;
    }
    flush(e);
    return 0;
}

/* Blanks at the ends go, a run of them becomes one. In place. */
static size_t trim(char *text, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        if (text[i] != ' ' || (n > 0 && text[n - 1] != ' '))
            text[n++] = text[i];
    if (n > 0 && text[n - 1] == ' ')
        n--;
    return n;
}

int spm_encode(struct encoder *e, const char *text, size_t len, bool after_token)
{
    const struct tokenizer *t = e->tokenizer;
    char on_stack[STACK_TEXT_BYTES];
    _cleanup_free_ char *on_heap = NULL;
    char *prepared = on_stack;
    if (len + 1 > sizeof(on_stack)) {
        prepared = on_heap = malloc(len + 1);
        if (!prepared)
            return -ENOMEM;
    }
    size_t n = blanks_from_file(text, len, prepared + 1);
    if (t->trim_spaces)
        n = trim(prepared + 1, n);
    if (n == 0)
        return 0;
    prepared[0] = ' ';
    bool prefix = t->space_prefix && after_token;
    return encode_prepared(e, prefix ? prepared : prepared + 1, prefix ? n + 1 : n);
}
