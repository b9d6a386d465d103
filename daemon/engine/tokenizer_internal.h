/* What the files of the tokenizer share: the vocabulary in memory, and one encoding under way.
 *
 * The bytes that each token stands for lie one after another in an arena; a hash index over the
 * same bytes finds a token by its text, so no text is kept twice. Private to daemon/engine/
 * tokenizer*.c and its tests. */
#ifndef HEARTH_ENGINE_TOKENIZER_INTERNAL_H
#define HEARTH_ENGINE_TOKENIZER_INTERNAL_H

#include "daemon/engine/pretokenizer.h"
#include "daemon/engine/tokenizer.h"
#include "daemon/engine/tokenizer_merge.h"

/* The largest vocabularies in use have about 300,000 entries, their longest tokens a few hundred
 * bytes. */
#define TOKENIZER_MAX_VOCAB       (1u << 20)
#define TOKENIZER_MAX_MERGES      (1u << 20)
#define TOKENIZER_MAX_TOKEN_BYTES 4096u
/* Added tokens are looked for at every position of a text: this bounds the work there. */
#define TOKENIZER_MAX_ADDED_BYTES 256u
/* A text of one call; offsets are 32 bits wide. */
#define TOKENIZER_MAX_TEXT_BYTES (1u << 28)

enum tokenizer_kind {
    TOKENIZER_LLAMA,
    TOKENIZER_GPT2,
};

/* tokenizer.ggml.token_type, as in the file. */
enum token_type {
    TOKEN_UNDEFINED = 0,
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_ADDED = 4, /* "user defined": found in a text before anything is merged */
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
    TOKEN_TYPE_MAX = 6,
};

struct token_slot {
    uint32_t tag; /* upper half of the hash */
    int32_t id;   /* -1: free */
};

/* Two neighbours that merge (gpt2). */
struct merge_slot {
    uint32_t left, right; /* ids; left == UINT32_MAX: free */
    uint32_t rank;
    int32_t id;
};

struct tokenizer {
    enum tokenizer_kind kind;
    uint32_t n_vocab;
    int32_t bos, eos, unknown; /* -1: none */
    bool adds_bos;

    char *arena;      /* the tokens' bytes */
    uint32_t *at;     /* n_vocab + 1 offsets into the arena */
    uint8_t *type;    /* enum token_type, n_vocab */
    uint64_t *is_end; /* a bit a token */
    size_t arena_bytes;

    struct token_slot *slots; /* open addressing, a power of two of them */
    uint32_t slot_mask;
    uint64_t hash_seed;
    uint32_t max_indexed_bytes; /* the longest text that the index holds */
    int32_t byte_id[256];       /* the token of a single byte, or -1 */

    int32_t *added; /* added tokens in order of their bytes */
    uint32_t n_added;
    uint32_t added_from[257]; /* those that begin with byte b: added_from[b] .. [b + 1] */

    /* llama */
    uint32_t *order;    /* a token's rank among merges: better score, lower number */
    uint64_t *joins;    /* 65,536 bits: some token has byte b right after byte a (a << 8 | b) */
    int32_t ascii[128]; /* the token of one ASCII character, or -1 */
    bool space_prefix, trim_spaces, has_bytes;

    /* gpt2 */
    struct merge_slot *merges; /* open addressing */
    uint32_t merge_mask;
    struct pretokenizer *pretokenizer;
    bool whole_words; /* a word that is a token needs no merging ("ignore merges") */

    size_t heap_bytes;
};

/* One encoding: where ids go, and the scratch memory. */
struct encoder {
    const struct tokenizer *tokenizer;
    const char *text; /* of the piece that is being merged */
    int32_t *ids;     /* big enough for the worst case, see tokenizer_encode() */
    size_t n_ids;
    struct pretokenizer_run run;
    struct merger merger;
};

static inline void encoder_put(struct encoder *e, int32_t id)
{
    e->ids[e->n_ids++] = id;
}

/* The token with exactly these bytes, or -1. */
int32_t tokenizer_find(const struct tokenizer *t, const char *bytes, size_t len);
/* Zeroed memory that tokenizer_bytes() counts; NULL when there is none. */
void *tokenizer_take(struct tokenizer *t, size_t n, size_t size);

/* A kind's part: decode one token of the file into at most `len` bytes at `to` (returns how many)
 * and say whether text may find it by these bytes; load what only this kind has, once the
 * vocabulary is indexed; encode a piece of text without added tokens. */
size_t spm_decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                  bool *ret_indexed);
int spm_load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault);
int spm_encode(struct encoder *e, const char *text, size_t len, bool after_token);

size_t bpe_decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                  bool *ret_indexed);
int bpe_load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault);
int bpe_encode(struct encoder *e, const char *text, size_t len);

#endif
