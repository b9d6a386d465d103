/* The `gpt2` kind: byte-level byte-pair encoding.
 *
 * The file writes every byte as a printable character (GPT-2's alphabet); here tokens hold the
 * bytes themselves. A text is cut into words by the pre-tokenizer, then neighbouring bytes of each
 * word merge in the order of the file's list of merges. Bytes that are not part of well-formed
 * UTF-8 never join a word: each becomes the token of that byte, so no byte of a text is lost. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "daemon/engine/quote.h"
#include "daemon/engine/tokenizer_internal.h"
#include "daemon/engine/utf8.h"
#include "lib/cleanup.h"

#define KEY(name) "tokenizer.ggml." name

#define FREE_SLOT UINT32_MAX

/* --- GPT-2's alphabet --- */

/* The byte that a character stands for, or -1. Printable Latin-1 stands for itself; the other 68
 * bytes, in their order, are the characters from U+0100 on. */
static int alphabet_byte(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff))
        return (int)c;
    if (c >= 0x100 && c <= 0x120)
        return (int)(c - 0x100); /* 0x00 .. 0x20 */
    if (c >= 0x121 && c <= 0x142)
        return (int)(c - 0x121 + 0x7f); /* 0x7f .. 0xa0 */
    return c == 0x143 ? 0xad : -1;
}

/* Reads the character at `text`: all of the alphabet has one or two bytes. Returns the bytes it
 * takes, and in ret_byte the byte it stands for or -1. */
static unsigned alphabet_next(const char *text, size_t left, int *ret_byte)
{
    unsigned n = utf8_char_bytes(text, left);
    *ret_byte = -1;
    if (n == 1)
        *ret_byte = alphabet_byte((uint8_t)text[0]);
    else if (n == 2)
        *ret_byte = alphabet_byte(((uint32_t)text[0] & 0x1f) << 6 | ((uint32_t)text[1] & 0x3f));
    return n ? n : 1;
}

/* Writes the bytes that the text stands for; what is not of the alphabet stays as it is, and the
 * answer is false. */
static bool decode_alphabet(const char *text, size_t len, char *to, size_t *ret_len)
{
    bool pure = true;
    size_t n = 0;
    for (size_t at = 0; at < len;) {
        int byte;
        unsigned step = alphabet_next(text + at, len - at, &byte);
        if (byte >= 0) {
            to[n++] = (char)byte;
        } else {
            memcpy(to + n, text + at, step);
            n += step;
            pure = false;
        }
        at += step;
    }
    *ret_len = n;
    return pure;
}

size_t bpe_decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                  bool *ret_indexed)
{
    (void)t;
    if (type == TOKEN_ADDED) {
        *ret_indexed = true;
        memcpy(to, token.bytes, token.len);
        return token.len;
    }
    size_t n;
    *ret_indexed = decode_alphabet(token.bytes, token.len, to, &n);
    return n;
}

/* --- merges --- */

static inline uint32_t merge_hash(uint32_t left, uint32_t right, uint64_t seed)
{
    uint64_t h = (((uint64_t)left << 32 | right) ^ seed) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32) ^ (uint32_t)(h >> 11);
}

static inline struct merge_slot *merge_slot_of(const struct tokenizer *t, uint32_t left,
                                               uint32_t right)
{
    uint32_t i = merge_hash(left, right, t->hash_seed) & t->merge_mask;
    for (;; i = (i + 1) & t->merge_mask) {
        struct merge_slot *slot = &t->merges[i];
        if ((slot->left == left && slot->right == right) || slot->left == FREE_SLOT)
            return slot;
    }
}

/* The three tokens of a merge "left right"; false when one of them is no token. `bytes` has room
 * for the whole of it. */
static bool find_merge(const struct tokenizer *t, struct gguf_string merge, char *bytes,
                       int32_t *ret_left, int32_t *ret_right, int32_t *ret_whole)
{
    const char *blank = memchr(merge.bytes, ' ', merge.len);
    if (!blank || blank == merge.bytes)
        return false;
    size_t left_len = (size_t)(blank - merge.bytes);
    size_t n_left, n_right;
    if (!decode_alphabet(merge.bytes, left_len, bytes, &n_left) ||
        !decode_alphabet(blank + 1, merge.len - left_len - 1, bytes + n_left, &n_right) ||
        n_right == 0)
        return false;
    *ret_left = tokenizer_find(t, bytes, n_left);
    *ret_right = tokenizer_find(t, bytes + n_left, n_right);
    *ret_whole = tokenizer_find(t, bytes, n_left + n_right);
    return *ret_left >= 0 && *ret_right >= 0 && *ret_whole >= 0;
}

static int add_merges(struct tokenizer *t, const struct gguf_string *merges, uint32_t n,
                      struct fault *ret_fault)
{
    size_t longest = 0;
    for (uint32_t i = 0; i < n; i++)
        longest = MAX(longest, merges[i].len);
    _cleanup_free_ char *bytes = malloc(longest + 1);
    if (!bytes)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++) {
        int32_t left, right, whole;
        char shown[QUOTE_BYTES];
        if (!find_merge(t, merges[i], bytes, &left, &right, &whole))
            return fault_set(ret_fault, -EBADMSG,
                             "tokenizer: merge %" PRIu32
                             ", \"%s\", is not two tokens that make a third; convert the model "
                             "again",
                             i, quote(merges[i], shown));
        struct merge_slot *slot = merge_slot_of(t, (uint32_t)left, (uint32_t)right);
        if (slot->left != FREE_SLOT)
            continue; /* said before: the first counts */
        *slot = (struct merge_slot){
            .left = (uint32_t)left,
            .right = (uint32_t)right,
            .rank = i,
            .id = whole,
        };
    }
    return 0;
}

static int load_merges(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    uint64_t n;
    int r = gguf_get_array(gguf, KEY("merges"), &n, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: a gpt2 vocabulary needs " KEY(
                             "merges") ", and the file has none; convert the model again");
    if (r < 0)
        return r;
    if (n > TOKENIZER_MAX_MERGES)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: the file has %" PRIu64 " merges, at most %u are allowed", n,
                         TOKENIZER_MAX_MERGES);
    _cleanup_free_ struct gguf_string *merges = NULL;
    r = gguf_get_strings(gguf, KEY("merges"), &merges, &n, ret_fault);
    if (r < 0)
        return r;
    size_t n_slots = 16;
    while (n_slots < n + n / 2)
        n_slots *= 2;
    t->merges = tokenizer_take(t, n_slots, sizeof(*t->merges));
    if (!t->merges)
        return -ENOMEM;
    for (size_t i = 0; i < n_slots; i++)
        t->merges[i].left = FREE_SLOT;
    t->merge_mask = (uint32_t)n_slots - 1;
    return add_merges(t, merges, (uint32_t)n, ret_fault);
}

static int load_bytes(struct tokenizer *t, struct fault *ret_fault)
{
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        int32_t id = tokenizer_find(t, &byte, 1);
        if (id < 0)
            id = t->unknown;
        if (id < 0)
            return fault_set(
                ret_fault, -EBADMSG,
                "tokenizer: the vocabulary has no token for byte 0x%02x and no unknown "
                "token; convert the model again",
                (unsigned)b);
        t->byte_id[b] = id;
    }
    return 0;
}

int bpe_load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    struct gguf_string name;
    int r = gguf_get_string(gguf, KEY("pre"), &name, ret_fault);
    if (r == -ENOENT)
        name = (struct gguf_string){.bytes = "", .len = 0};
    else if (r < 0)
        return r;
    r = pretokenizer_new(name, NULL, &t->pretokenizer, ret_fault);
    if (r < 0)
        return r;
    t->heap_bytes += pretokenizer_bytes(t->pretokenizer);
    t->whole_words = pretokenizer_takes_whole_words(t->pretokenizer);
    r = load_bytes(t, ret_fault);
    if (r >= 0)
        r = load_merges(t, gguf, ret_fault);
    return r;
}

/* --- encoding --- */

static inline bool lookup(const void *context, const struct merge_symbol *left,
                          const struct merge_symbol *right, uint32_t *ret_order, int32_t *ret_id)
{
    const struct encoder *e = context;
    const struct merge_slot *slot =
        merge_slot_of(e->tokenizer, (uint32_t)left->id, (uint32_t)right->id);
    if (slot->left == FREE_SLOT)
        return false;
    *ret_order = slot->rank;
    *ret_id = slot->id;
    return true;
}

static int encode_word(struct encoder *e, const char *word, size_t len)
{
    const struct tokenizer *t = e->tokenizer;
    struct merger *m = &e->merger;
    if (t->whole_words) {
        int32_t id = tokenizer_find(t, word, len);
        if (id >= 0) {
            encoder_put(e, id);
            return 0;
        }
    }
    m->n_symbols = 0;
    for (size_t i = 0; i < len; i++) {
        int r = merger_add(m, (uint32_t)i, 1, t->byte_id[(uint8_t)word[i]]);
        if (r < 0)
            return r;
    }
    merger_run(m, lookup, e);
    for (uint32_t i = 0; i != MERGE_NONE; i = m->symbols[i].next)
        encoder_put(e, m->symbols[i].id);
    return 0;
}

/* A stretch of well-formed text. */
static int encode_words(struct encoder *e, const char *text, size_t len, bool ascii)
{
    const struct tokenizer *t = e->tokenizer;
    if (!e->run.match_data) {
        int r = pretokenizer_begin(t->pretokenizer, &e->run);
        if (r < 0)
            return r;
    }
    for (size_t at = 0; at < len;) {
        size_t end;
        int r = pretokenizer_word(t->pretokenizer, &e->run, text, len, at, ascii, &end);
        if (r >= 0)
            r = encode_word(e, text + at, end - at);
        if (r < 0)
            return r;
        at = end;
    }
    return 0;
}

int bpe_encode(struct encoder *e, const char *text, size_t len)
{
    for (size_t at = 0; at < len;) {
        size_t from = at;
        bool ascii = true;
        unsigned n = 0;
        while (at < len && (n = utf8_char_bytes(text + at, len - at)) > 0) {
            ascii = ascii && n == 1;
            at += n;
        }
        if (at > from) {
            int r = encode_words(e, text + from, at - from, ascii);
            if (r < 0)
                return r;
        }
        for (; at < len && utf8_char_bytes(text + at, len - at) == 0; at++)
            encoder_put(e, e->tokenizer->byte_id[(uint8_t)text[at]]);
    }
    return 0;
}
