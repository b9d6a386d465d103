#include "daemon/engine/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/engine/quote.h"
#include "daemon/engine/tokenizer_internal.h"
#include "lib/cleanup.h"

#define KEY(name) "tokenizer.ggml." name

/* 4294967295, a -1 that went through an unsigned field: some converters write it for "none". */
#define NO_TOKEN_U32 UINT32_MAX

/* Tokens that end a turn or a text in the families of models in use, where the file has no key for
 * them. Only tokens of control type count: text cannot make them. */
static const char *const end_texts[] = {
    "<|im_end|>",    "<|eot_id|>",      "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_turn>", "<|end_of_turn|>", "<|end|>",    "<|eot|>",       "<|return|>",
    "<EOT>",         "<|end_of_role|>", "</s>",       "<eos>",
};

void *tokenizer_take(struct tokenizer *t, size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (p)
        t->heap_bytes += n * size;
    return p;
}

/* --- finding a token by its bytes --- */

/* 1 to 7 bytes as a number: different texts of one length never give the same. */
static inline uint64_t load_tail(const char *p, size_t len)
{
    if (len >= 4) {
        uint32_t first, last;
        memcpy(&first, p, sizeof(first));
        memcpy(&last, p + len - sizeof(last), sizeof(last));
        return (uint64_t)last << 32 | first;
    }
    return (uint64_t)(uint8_t)p[0] | (uint64_t)(uint8_t)p[len / 2] << 8 |
           (uint64_t)(uint8_t)p[len - 1] << 16;
}

static inline uint64_t load_8(const char *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Words of 8 bytes folded by wide multiplication. Seeded at random, so that no file can be written
 * whose tokens all meet in one slot. */
static inline uint64_t hash(const char *bytes, size_t len, uint64_t seed)
{
    uint64_t h = seed ^ (len * 0x9e3779b97f4a7c15u);
    for (; len >= 8; len -= 8, bytes += 8)
        h = fold(h ^ load_8(bytes), 0xd6e8feb86659fd93u);
    if (len > 0)
        h = fold(h ^ load_tail(bytes, len), 0xd6e8feb86659fd93u);
    return fold(h, 0xa0761d6478bd642fu);
}

static inline bool has_bytes(const struct tokenizer *t, int32_t id, const char *bytes, size_t len)
{
    return t->at[id + 1] - t->at[id] == len && memcmp(t->arena + t->at[id], bytes, len) == 0;
}

/* The slot that holds the text, or the free one where it would go. */
static inline struct token_slot *slot_of(const struct tokenizer *t, const char *bytes, size_t len,
                                         uint32_t *ret_tag)
{
    uint64_t h = hash(bytes, len, t->hash_seed);
    uint32_t tag = (uint32_t)(h >> 32);
    uint32_t i = (uint32_t)h & t->slot_mask;
    for (;; i = (i + 1) & t->slot_mask) {
        struct token_slot *slot = &t->slots[i];
        if (slot->id < 0 || (slot->tag == tag && has_bytes(t, slot->id, bytes, len))) {
            *ret_tag = tag;
            return slot;
        }
    }
}

int32_t tokenizer_find(const struct tokenizer *t, const char *bytes, size_t len)
{
    if (len > t->max_indexed_bytes)
        return -1;
    uint32_t tag;
    return slot_of(t, bytes, len, &tag)->id;
}

static void index_token(struct tokenizer *t, int32_t id, bool replace)
{
    const char *bytes = t->arena + t->at[id];
    uint32_t len = t->at[id + 1] - t->at[id];
    if (len == 0)
        return;
    uint32_t tag;
    struct token_slot *slot = slot_of(t, bytes, len, &tag);
    if (slot->id >= 0 && !replace)
        return;
    *slot = (struct token_slot){.tag = tag, .id = id};
    t->max_indexed_bytes = MAX(t->max_indexed_bytes, len);
}

/* --- loading --- */

static int load_types(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    t->type = tokenizer_take(t, t->n_vocab, 1);
    if (!t->type)
        return -ENOMEM;
    _cleanup_free_ int32_t *types = NULL;
    uint64_t n;
    int r = gguf_get_i32s(gguf, KEY("token_type"), &types, &n, ret_fault);
    if (r == -ENOENT) {
        memset(t->type, TOKEN_NORMAL, t->n_vocab);
        return 0;
    }
    if (r < 0)
        return r;
    if (n != t->n_vocab)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: %" PRIu64 " token types for %" PRIu32
                         " tokens; the file is damaged, convert the model again",
                         n, t->n_vocab);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (types[i] < 0 || types[i] > TOKEN_TYPE_MAX)
            return fault_set(ret_fault, -EBADMSG,
                             "tokenizer: token %" PRIu32 " has type %" PRId32
                             ", known are 0 to %d; convert the model again",
                             i, types[i], TOKEN_TYPE_MAX);
        t->type[i] = (uint8_t)types[i];
    }
    return 0;
}

static bool is_text(struct gguf_string s, const char *text)
{
    return s.len == strlen(text) && memcmp(s.bytes, text, s.len) == 0;
}

/* Without types a file still has its byte tokens and its unknown token, known by their text. */
static void guess_types(struct tokenizer *t, const struct gguf_string *tokens)
{
    if (t->kind != TOKENIZER_LLAMA)
        return;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (tokens[i].len == 6 && memcmp(tokens[i].bytes, "<0x", 3) == 0)
            t->type[i] = TOKEN_BYTE;
        else if (is_text(tokens[i], "<unk>"))
            t->type[i] = TOKEN_UNKNOWN;
        else if (is_text(tokens[i], "<s>") || is_text(tokens[i], "</s>"))
            t->type[i] = TOKEN_CONTROL;
    }
}

static void mark_end(struct tokenizer *t, int32_t id)
{
    if (id >= 0)
        t->is_end[id / 64] |= 1ull << (id % 64);
}

static void mark_ends_by_text(struct tokenizer *t, const struct gguf_string *tokens)
{
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (t->type[i] != TOKEN_CONTROL)
            continue;
        for (size_t k = 0; k < ELEMENTSOF(end_texts); k++)
            if (is_text(tokens[i], end_texts[k]))
                mark_end(t, (int32_t)i);
    }
}

static size_t decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                     bool *ret_indexed)
{
    if (type == TOKEN_CONTROL || type == TOKEN_UNKNOWN) {
        *ret_indexed = false;
        return 0;
    }
    return t->kind == TOKENIZER_LLAMA ? spm_decode(t, token, type, to, ret_indexed)
                                      : bpe_decode(t, token, type, to, ret_indexed);
}

/* A token never decodes to more bytes than it has in the file. */
static_assert((uint64_t)TOKENIZER_MAX_VOCAB * TOKENIZER_MAX_TOKEN_BYTES <= (uint64_t)UINT32_MAX + 1,
              "offsets into the arena are 32 bits wide");
static int fill_arena(struct tokenizer *t, const struct gguf_string *tokens, uint8_t *indexed,
                      struct fault *ret_fault)
{
    size_t total = 0; /* below 2^32: so many tokens, so long at most */
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (tokens[i].len > TOKENIZER_MAX_TOKEN_BYTES)
            return fault_set(ret_fault, -EBADMSG,
                             "tokenizer: token %" PRIu32 " has %zu bytes, at most %u are allowed",
                             i, tokens[i].len, TOKENIZER_MAX_TOKEN_BYTES);
        total += tokens[i].len;
    }
    _cleanup_free_ char *arena = malloc(total + 1);
    t->at = tokenizer_take(t, (size_t)t->n_vocab + 1, sizeof(*t->at));
    if (!arena || !t->at)
        return -ENOMEM;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        bool in_index = false;
        t->at[i + 1] =
            t->at[i] + (uint32_t)decode(t, tokens[i], t->type[i], arena + t->at[i], &in_index);
        indexed[i] = in_index;
    }
    t->arena_bytes = t->at[t->n_vocab];
    char *fitting = realloc(arena, t->arena_bytes + 1);
    t->arena = fitting ? fitting : arena;
    arena = NULL;
    t->heap_bytes += t->arena_bytes + 1;
    return 0;
}

/* On equal bytes the later token wins, as with other readers of the format, and an added token
 * never hides one that was trained. */
static int fill_index(struct tokenizer *t, const uint8_t *indexed)
{
    size_t n_slots = 16;
    while (n_slots < (size_t)t->n_vocab + t->n_vocab / 2)
        n_slots *= 2;
    t->slots = tokenizer_take(t, n_slots, sizeof(*t->slots));
    if (!t->slots)
        return -ENOMEM;
    for (size_t i = 0; i < n_slots; i++)
        t->slots[i].id = -1;
    t->slot_mask = (uint32_t)n_slots - 1;
    if (getrandom(&t->hash_seed, sizeof(t->hash_seed), GRND_NONBLOCK) != sizeof(t->hash_seed))
        t->hash_seed = (uintptr_t)t ^ 0x5851f42d4c957f2du;
    for (uint32_t i = 0; i < t->n_vocab; i++)
        if (indexed[i] && t->type[i] != TOKEN_ADDED)
            index_token(t, (int32_t)i, true);
    for (uint32_t i = 0; i < t->n_vocab; i++)
        if (indexed[i] && t->type[i] == TOKEN_ADDED)
            index_token(t, (int32_t)i, false);
    return 0;
}

static int compare_bytes(const void *a, const void *b, void *arg)
{
    const struct tokenizer *t = arg;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    uint32_t x_len = t->at[x + 1] - t->at[x], y_len = t->at[y + 1] - t->at[y];
    int r = memcmp(t->arena + t->at[x], t->arena + t->at[y], MIN(x_len, y_len));
    if (r != 0)
        return r;
    if (x_len != y_len)
        return x_len < y_len ? -1 : 1;
    return x < y ? -1 : 1;
}

static bool is_added(const struct tokenizer *t, const struct gguf_string *tokens, uint32_t id)
{
    if (t->type[id] != TOKEN_ADDED || tokens[id].len == 0)
        return false;
    /* With ▁ in it a text can only come to it by merging. */
    return t->kind != TOKENIZER_LLAMA || !memmem(tokens[id].bytes, tokens[id].len, "\u2581", 3);
}

static int load_added(struct tokenizer *t, const struct gguf_string *tokens,
                      struct fault *ret_fault)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (!is_added(t, tokens, i))
            continue;
        if (tokens[i].len > TOKENIZER_MAX_ADDED_BYTES)
            return fault_set(ret_fault, -EBADMSG,
                             "tokenizer: added token %" PRIu32
                             " has %zu bytes, at most %u are allowed",
                             i, tokens[i].len, TOKENIZER_MAX_ADDED_BYTES);
        n++;
    }
    if (n == 0)
        return 0;
    t->added = tokenizer_take(t, n, sizeof(*t->added));
    if (!t->added)
        return -ENOMEM;
    for (uint32_t i = 0; i < t->n_vocab; i++)
        if (is_added(t, tokens, i))
            t->added[t->n_added++] = (int32_t)i;
    qsort_r(t->added, n, sizeof(*t->added), compare_bytes, t);
    uint32_t k = 0;
    for (unsigned b = 0; b < 256; b++) {
        t->added_from[b] = k;
        while (k < n && (uint8_t)t->arena[t->at[t->added[k]]] == b)
            k++;
    }
    t->added_from[256] = n;
    return 0;
}

/* An id of a key: -1 when the key is absent or says "none". */
static int load_id(const struct tokenizer *t, const struct gguf *gguf, const char *key,
                   int32_t *ret_id, struct fault *ret_fault)
{
    uint32_t id;
    int r = gguf_get_u32(gguf, key, &id, ret_fault);
    if (r == -ENOENT || (r == 0 && id == NO_TOKEN_U32)) {
        *ret_id = -1;
        return 0;
    }
    if (r < 0)
        return r;
    if (id >= t->n_vocab)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: %s is %" PRIu32 ", but there are %" PRIu32
                         " tokens; convert the model again",
                         key, id, t->n_vocab);
    *ret_id = (int32_t)id;
    return 0;
}

static int load_special_ids(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    int32_t eot, eom;
    const struct {
        const char *key;
        int32_t *to;
    } ids[] = {
        {KEY("bos_token_id"), &t->bos},
        {KEY("eos_token_id"), &t->eos},
        {KEY("eot_token_id"), &eot},
        {KEY("eom_token_id"), &eom},
        {KEY("unknown_token_id"), &t->unknown},
    };
    for (size_t i = 0; i < ELEMENTSOF(ids); i++) {
        int r = load_id(t, gguf, ids[i].key, ids[i].to, ret_fault);
        if (r < 0)
            return r;
    }
    mark_end(t, t->eos);
    mark_end(t, eot);
    mark_end(t, eom);
    for (uint32_t i = 0; t->unknown < 0 && i < t->n_vocab; i++)
        if (t->type[i] == TOKEN_UNKNOWN)
            t->unknown = (int32_t)i;
    return 0;
}

static int load_bool(const struct gguf *gguf, const char *key, bool otherwise, bool *ret,
                     struct fault *ret_fault)
{
    int r = gguf_get_bool(gguf, key, ret, ret_fault);
    if (r == -ENOENT) {
        *ret = otherwise;
        return 0;
    }
    return r;
}

static int load_kind(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    struct gguf_string name;
    char shown[QUOTE_BYTES];
    int r = gguf_get_string(gguf, KEY("model"), &name, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: the file has no " KEY("model") "; convert the model again");
    if (r < 0)
        return r;
    if (is_text(name, "llama"))
        t->kind = TOKENIZER_LLAMA;
    else if (is_text(name, "gpt2"))
        t->kind = TOKENIZER_GPT2;
    else
        return fault_set(ret_fault, -ENOTSUP,
                         "tokenizer: kind \"%s\" is not supported; known are llama and gpt2",
                         quote(name, shown));
    return 0;
}

static int load_count(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    uint64_t n;
    int r = gguf_get_array(gguf, KEY("tokens"), &n, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: the file has no " KEY("tokens") "; convert the model again");
    if (r < 0)
        return r;
    if (n == 0 || n > TOKENIZER_MAX_VOCAB)
        return fault_set(ret_fault, -EBADMSG,
                         "tokenizer: the vocabulary has %" PRIu64 " tokens, allowed are 1 to %u", n,
                         TOKENIZER_MAX_VOCAB);
    t->n_vocab = (uint32_t)n;
    return 0;
}

static int load_vocabulary(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    int r = load_types(t, gguf, ret_fault);
    if (r < 0)
        return r;
    _cleanup_free_ struct gguf_string *tokens = NULL;
    uint64_t n;
    r = gguf_get_strings(gguf, KEY("tokens"), &tokens, &n, ret_fault);
    if (r < 0)
        return r;
    if (gguf_get_array(gguf, KEY("token_type"), &n, NULL) < 0)
        guess_types(t, tokens);
    t->is_end = tokenizer_take(t, t->n_vocab / 64 + 1, sizeof(*t->is_end));
    _cleanup_free_ uint8_t *indexed = calloc(t->n_vocab, 1);
    if (!t->is_end || !indexed)
        return -ENOMEM;
    mark_ends_by_text(t, tokens);
    r = load_special_ids(t, gguf, ret_fault);
    if (r >= 0)
        r = fill_arena(t, tokens, indexed, ret_fault);
    if (r >= 0)
        r = fill_index(t, indexed);
    if (r >= 0)
        r = load_added(t, tokens, ret_fault);
    return r;
}

static int load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    int r = load_kind(t, gguf, ret_fault);
    if (r >= 0)
        r = load_count(t, gguf, ret_fault);
    if (r >= 0)
        r = load_vocabulary(t, gguf, ret_fault);
    if (r >= 0)
        r = t->kind == TOKENIZER_LLAMA ? spm_load(t, gguf, ret_fault)
                                       : bpe_load(t, gguf, ret_fault);
    if (r < 0)
        return r;
    bool otherwise = t->kind == TOKENIZER_LLAMA || pretokenizer_adds_bos(t->pretokenizer);
    r = load_bool(gguf, KEY("add_bos_token"), otherwise, &t->adds_bos, ret_fault);
    if (r < 0)
        return r;
    t->adds_bos = t->adds_bos && t->bos >= 0;
    return 0;
}

DEFINE_CLEANUP(struct tokenizer *, tokenizer_free)

int tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer,
                  struct fault *ret_fault)
{
    _cleanup_(tokenizer_freep) struct tokenizer *t = calloc(1, sizeof(*t));
    if (!t)
        return fault_set(ret_fault, -ENOMEM, "tokenizer: out of memory");
    t->heap_bytes = sizeof(*t);
    memset(t->byte_id, 0xff, sizeof(t->byte_id));
    memset(t->ascii, 0xff, sizeof(t->ascii));
    int r = load(t, gguf, ret_fault);
    if (r == -ENOMEM)
        return fault_set(ret_fault, -ENOMEM,
                         "tokenizer: out of memory for a vocabulary of %" PRIu32 " tokens",
                         t->n_vocab);
    if (r < 0)
        return r;
    *ret_tokenizer = TAKE_PTR(t);
    return 0;
}

struct tokenizer *tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return NULL;
    pretokenizer_free(t->pretokenizer);
    free(t->merges);
    free(t->joins);
    free(t->order);
    free(t->added);
    free(t->slots);
    free(t->is_end);
    free(t->type);
    free(t->at);
    free(t->arena);
    free(t);
    return NULL;
}

/* --- encoding --- */

/* The longest added token at `text`, or -1: the range of candidates in byte order narrows with
 * every byte, at most TOKENIZER_MAX_ADDED_BYTES of them. */
static int32_t added_at(const struct tokenizer *t, const char *text, size_t left, size_t *ret_len)
{
    uint32_t low = t->added_from[(uint8_t)text[0]];
    uint32_t high = t->added_from[(uint8_t)text[0] + 1];
    int32_t best = -1;
    for (size_t depth = 1; low < high; depth++) {
        int32_t id = t->added[low];
        if (t->at[id + 1] - t->at[id] == depth) {
            best = id;
            *ret_len = depth;
            while (low < high && t->at[t->added[low] + 1] - t->at[t->added[low]] == depth)
                low++;
        }
        if (depth == left)
            break;
        uint8_t byte = (uint8_t)text[depth];
        uint32_t end = high;
        for (uint32_t a = low, b = high; a < b;) {
            uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)t->arena[t->at[t->added[mid]] + depth] < byte)
                low = a = mid + 1;
            else
                b = mid;
        }
        for (uint32_t a = low, b = high; a < b;) {
            uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)t->arena[t->at[t->added[mid]] + depth] > byte)
                end = b = mid;
            else
                a = mid + 1;
        }
        high = end;
    }
    return best;
}

static int encode_plain(struct encoder *e, const char *text, size_t len, bool after_token)
{
    if (len == 0)
        return 0;
    return e->tokenizer->kind == TOKENIZER_LLAMA ? spm_encode(e, text, len, after_token)
                                                 : bpe_encode(e, text, len);
}

/* Added tokens cut the text; what lies between them is encoded for itself. */
static int encode_all(struct encoder *e, const char *text, size_t len)
{
    const struct tokenizer *t = e->tokenizer;
    size_t from = 0;
    bool after_token = true;
    for (size_t at = 0; t->n_added > 0 && at < len;) {
        size_t n;
        int32_t id = added_at(t, text + at, len - at, &n);
        if (id < 0) {
            at++;
            continue;
        }
        int r = encode_plain(e, text + from, at - from, after_token);
        if (r < 0)
            return r;
        encoder_put(e, id);
        after_token = true;
        at += n;
        from = at;
    }
    return encode_plain(e, text + from, len - from, after_token);
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t text_bytes,
                     int32_t **ret_ids, size_t *ret_n)
{
    if (text_bytes > TOKENIZER_MAX_TEXT_BYTES)
        return -E2BIG;
    /* An id a byte; and one for the blank put before each piece that follows an added token. */
    size_t worst = tokenizer->n_added > 0 ? 2 * text_bytes + 1 : text_bytes + 1;
    _cleanup_free_ int32_t *ids = malloc(worst * sizeof(*ids));
    if (!ids)
        return -ENOMEM;
    struct encoder e;
    e.tokenizer = tokenizer;
    e.ids = ids;
    e.n_ids = 0;
    e.run.match_data = NULL;
    merger_init(&e.merger);
    int r = encode_all(&e, text, text_bytes);
    merger_done(&e.merger);
    pretokenizer_end(&e.run);
    if (r < 0)
        return r;
    /* Long texts give back what the worst case took; short ones are not worth a call. */
    if (worst - e.n_ids > 1024) {
        int32_t *fitting = realloc(ids, (e.n_ids + 1) * sizeof(*ids));
        if (fitting)
            ids = fitting;
    }
    *ret_ids = TAKE_PTR(ids);
    *ret_n = e.n_ids;
    return 0;
}

/* --- asking --- */

struct gguf_string tokenizer_piece(const struct tokenizer *tokenizer, int32_t id)
{
    if (id < 0 || (uint32_t)id >= tokenizer->n_vocab)
        return (struct gguf_string){.bytes = "", .len = 0};
    return (struct gguf_string){
        .bytes = tokenizer->arena + tokenizer->at[id],
        .len = tokenizer->at[id + 1] - tokenizer->at[id],
    };
}

uint32_t tokenizer_n_vocab(const struct tokenizer *tokenizer)
{
    return tokenizer->n_vocab;
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->adds_bos;
}

bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id)
{
    if (id < 0 || (uint32_t)id >= tokenizer->n_vocab)
        return false;
    return tokenizer->is_end[id / 64] >> (id % 64) & 1;
}

size_t tokenizer_bytes(const struct tokenizer *tokenizer)
{
    return tokenizer->heap_bytes;
}
