/* Merging: neighbours grow together, the best pair first, until no pair is left.
 *
 * The one algorithm that both kinds of tokenizer share. A piece of text is a list of symbols (one
 * a character or a byte); a lookup says which two neighbours may become one token and in which
 * order; a heap hands out the pairs, the lowest order first and on ties the leftmost. A pair whose
 * symbols have changed since it was queued is recognised by its length and dropped. O(n log n).
 *
 * Hides the list, the heap and their memory: texts up to MERGE_INLINE symbols live on the stack of
 * whoever holds the merger, longer ones in one heap block that is kept until merger_done().
 * Thread: the caller's. */
#ifndef HEARTH_ENGINE_TOKENIZER_MERGE_H
#define HEARTH_ENGINE_TOKENIZER_MERGE_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MERGE_INLINE 96u
#define MERGE_NONE   UINT32_MAX

struct merge_symbol {
    uint32_t at;   /* first byte in the text */
    uint32_t len;  /* bytes; 0 once swallowed by its left neighbour */
    int32_t id;    /* token, -1: none has this text */
    uint32_t prev; /* MERGE_NONE at the ends */
    uint32_t next;
};

struct merge_pair {
    uint64_t key;   /* order in the upper half, the left symbol's index in the lower */
    uint32_t bytes; /* of both symbols when the pair was queued */
    int32_t id;     /* what they become */
};

/* Every merge takes one pair off and puts at most two on, and n symbols merge at most n-1 times:
 * n-1 pairs at first, never more than 2n. */
#define MERGE_PAIRS_PER_SYMBOL 2u

struct merger {
    struct merge_symbol *symbols;
    struct merge_pair *pairs;
    uint32_t n_symbols;
    uint32_t n_pairs;
    uint32_t capacity; /* symbols */
    struct merge_symbol inline_symbols[MERGE_INLINE];
    struct merge_pair inline_pairs[MERGE_INLINE * MERGE_PAIRS_PER_SYMBOL];
};

static inline void merger_init(struct merger *m)
{
    m->symbols = m->inline_symbols;
    m->pairs = m->inline_pairs;
    m->n_symbols = 0;
    m->n_pairs = 0;
    m->capacity = MERGE_INLINE;
}

static inline void merger_done(struct merger *m)
{
    if (m->symbols != m->inline_symbols) {
        free(m->symbols);
        free(m->pairs);
    }
}

static inline int merger_grow(struct merger *m)
{
    uint32_t capacity = m->capacity * 2;
    bool is_inline = m->symbols == m->inline_symbols;
    struct merge_symbol *symbols =
        realloc(is_inline ? NULL : m->symbols, capacity * sizeof(*symbols));
    if (!symbols)
        return -ENOMEM;
    if (is_inline) {
        memcpy(symbols, m->inline_symbols, m->n_symbols * sizeof(*symbols));
        m->pairs = NULL;
    }
    m->symbols = symbols;
    /* No pair is queued while symbols are added. */
    free(m->pairs);
    m->pairs = malloc(sizeof(*m->pairs) * capacity * MERGE_PAIRS_PER_SYMBOL);
    if (!m->pairs)
        return -ENOMEM;
    m->capacity = capacity;
    return 0;
}

/* Appends a symbol to the list. Offsets are below 2^31, so the capacity cannot wrap. -ENOMEM. */
static inline int merger_add(struct merger *m, uint32_t at, uint32_t len, int32_t id)
{
    if (m->n_symbols == m->capacity) {
        int r = merger_grow(m);
        if (r < 0)
            return r;
    }
    uint32_t i = m->n_symbols++;
    m->symbols[i] = (struct merge_symbol){
        .at = at,
        .len = len,
        .id = id,
        .prev = i == 0 ? MERGE_NONE : i - 1,
        .next = MERGE_NONE,
    };
    if (i > 0)
        m->symbols[i - 1].next = i;
    return 0;
}

static inline void merge_heap_down(struct merge_pair *heap, uint32_t n, uint32_t i)
{
    struct merge_pair moving = heap[i];
    for (uint32_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && heap[child + 1].key < heap[child].key)
            child++;
        if (moving.key <= heap[child].key)
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moving;
}

static inline void merge_heap_up(struct merge_pair *heap, uint32_t i)
{
    struct merge_pair moving = heap[i];
    while (i > 0 && moving.key < heap[(i - 1) / 2].key) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = moving;
}

static inline struct merge_pair merge_heap_pop(struct merger *m)
{
    struct merge_pair top = m->pairs[0];
    m->pairs[0] = m->pairs[--m->n_pairs];
    if (m->n_pairs > 0)
        merge_heap_down(m->pairs, m->n_pairs, 0);
    return top;
}

/* Whether `left` and `right` may become one; the order (lower goes first) and the token if so. */
typedef bool merge_lookup_fn(const void *context, const struct merge_symbol *left,
                             const struct merge_symbol *right, uint32_t *ret_order,
                             int32_t *ret_id);

/* Puts the pair that begins at `left` at the end of the array; the caller restores the heap. */
static inline __attribute__((always_inline)) bool
merger_try_pair(struct merger *m, uint32_t left, merge_lookup_fn *lookup, const void *context)
{
    const struct merge_symbol *l = &m->symbols[left];
    const struct merge_symbol *r = &m->symbols[l->next];
    uint32_t order;
    int32_t id;
    if (!lookup(context, l, r, &order, &id))
        return false;
    m->pairs[m->n_pairs++] = (struct merge_pair){
        .key = (uint64_t)order << 32 | left,
        .bytes = l->len + r->len,
        .id = id,
    };
    return true;
}

/* Merges until nothing merges. Afterwards the symbols reachable from index 0 through `next` are
 * the result. Inlined, so that the lookup is a direct call. */
static inline __attribute__((always_inline)) void
merger_run(struct merger *m, merge_lookup_fn *lookup, const void *context)
{
    m->n_pairs = 0;
    for (uint32_t i = 0; i + 1 < m->n_symbols; i++)
        merger_try_pair(m, i, lookup, context);
    for (uint32_t i = m->n_pairs / 2; i-- > 0;)
        merge_heap_down(m->pairs, m->n_pairs, i);

    while (m->n_pairs > 0) {
        struct merge_pair best = merge_heap_pop(m);
        uint32_t left = (uint32_t)best.key;
        struct merge_symbol *l = &m->symbols[left];
        if (l->len == 0 || l->next == MERGE_NONE)
            continue;
        struct merge_symbol *r = &m->symbols[l->next];
        if (l->len + r->len != best.bytes)
            continue;
        l->len = best.bytes;
        l->id = best.id;
        l->next = r->next;
        r->len = 0;
        if (l->next != MERGE_NONE) {
            m->symbols[l->next].prev = left;
            if (merger_try_pair(m, left, lookup, context))
                merge_heap_up(m->pairs, m->n_pairs - 1);
        }
        if (l->prev != MERGE_NONE && merger_try_pair(m, l->prev, lookup, context))
            merge_heap_up(m->pairs, m->n_pairs - 1);
    }
}

#endif
