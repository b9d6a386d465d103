#include "daemon/engine/sampler.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

/* Logits are kept within this, so that differences stay finite. */
#define LOGIT_BOUND 1e30f

/* A token that may be drawn. */
struct candidate {
    float logit;
    int32_t id;
    double weight; /* e^((logit - largest) / temperature) */
};

struct sampler_scratch {
    uint32_t room;
    struct candidate candidates[];
};

struct sampler_scratch *sampler_scratch_free(struct sampler_scratch *scratch)
{
    free(scratch);
    return NULL;
}

static int scratch_reach(struct sampler_scratch **scratch, uint32_t n)
{
    struct sampler_scratch *larger;

    if (*scratch && (*scratch)->room >= n)
        return 0;
    larger = malloc(sizeof(*larger) + n * sizeof(larger->candidates[0]));
    if (!larger)
        return -ENOMEM;
    free(*scratch);
    larger->room = n;
    *scratch = larger;
    return 0;
}

/* ---- the penalty ---- */

static void penalise(float *logits, uint32_t n_vocab, const int32_t *recent, size_t n,
                     float penalty)
{
    if (n > SAMPLER_PENALTY_WINDOW) {
        recent += n - SAMPLER_PENALTY_WINDOW;
        n = SAMPLER_PENALTY_WINDOW;
    }
    for (size_t i = 0; i < n; i++) {
        bool seen = recent[i] < 0 || (uint32_t)recent[i] >= n_vocab;

        for (size_t k = 0; k < i && !seen; k++)
            seen = recent[k] == recent[i];
        if (seen)
            continue;
        float *logit = &logits[recent[i]];
        *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
    }
}

/* ---- selection ---- */

/* Larger logits first, lower ids first among equals: the order of everything here. */
static bool before(const struct candidate *a, const struct candidate *b)
{
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

/* Puts a candidate into the hole at `at` of a heap whose top is the last in order (`worst_top`) or
 * the first. */
static void heap_sink(struct candidate *heap, uint32_t n, uint32_t at, struct candidate c,
                      bool worst_top)
{
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child]) != worst_top)
            child++;
        if (before(&heap[child], &c) == worst_top)
            break;
        heap[at] = heap[child];
    }
    heap[at] = c;
}

static void heap_make(struct candidate *heap, uint32_t n, bool worst_top)
{
    for (uint32_t i = n / 2; i-- > 0;)
        heap_sink(heap, n, i, heap[i], worst_top);
}

/* A logit as candidates carry it; false: it cannot be drawn (NaN, minus infinity). */
static bool logit_clean(float logit, float *ret)
{
    if (!(logit > -INFINITY))
        return false;
    *ret = MAX(MIN(logit, LOGIT_BOUND), -LOGIT_BOUND);
    return true;
}

/* The k first in order of all logits, sorted; returns how many there are. One pass over the
 * vocabulary with a heap of k whose top is the one to beat. */
static uint32_t select_top(const float *logits, uint32_t n_vocab, uint32_t k,
                           struct candidate *candidates)
{
    uint32_t n = 0;
    struct candidate c;

    for (uint32_t id = 0; id < n_vocab; id++) {
        /* ids rise: an equal logit comes later in order and cannot push one out */
        if (n == k && !(logits[id] > candidates[0].logit))
            continue;
        if (!logit_clean(logits[id], &c.logit))
            continue;
        c.id = (int32_t)id;
        if (n < k) {
            candidates[n++] = c;
            if (n == k)
                heap_make(candidates, n, true);
        } else if (c.logit > candidates[0].logit) {
            heap_sink(candidates, n, 0, c, true);
        }
    }
    if (n < k)
        heap_make(candidates, n, true);
    for (uint32_t left = n; left > 1; left--) {
        c = candidates[left - 1];
        candidates[left - 1] = candidates[0];
        heap_sink(candidates, left - 1, 0, c, true);
    }
    return n;
}

/* All that can be drawn, in order of ids. */
static uint32_t select_all(const float *logits, uint32_t n_vocab, struct candidate *candidates)
{
    uint32_t n = 0;

    for (uint32_t id = 0; id < n_vocab; id++) {
        if (logit_clean(logits[id], &candidates[n].logit))
            candidates[n++].id = (int32_t)id;
    }
    return n;
}

/* Sets the weights and returns their sum. */
static double weigh(struct candidate *candidates, uint32_t n, float temperature)
{
    float largest = -INFINITY;
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        largest = MAX(largest, candidates[i].logit);
    for (uint32_t i = 0; i < n; i++) {
        candidates[i].weight = exp(((double)candidates[i].logit - largest) / temperature);
        sum += candidates[i].weight;
    }
    return sum;
}

/* Sorted candidates: the shortest head whose weights reach top_p of the sum. */
static uint32_t cut_top_p_sorted(const struct candidate *candidates, uint32_t n, double sum,
                                 float top_p)
{
    double reached = 0;

    for (uint32_t i = 0; i < n; i++) {
        reached += candidates[i].weight;
        if (reached >= top_p * sum)
            return i + 1;
    }
    return n;
}

/* Unsorted ones: takes the first in order from a heap until top_p is reached; they end up at the
 * front, in order. The heap shrinks from its end, so what is taken gathers behind it backwards. */
static uint32_t cut_top_p(struct candidate *candidates, uint32_t n, double sum, float top_p)
{
    double reached = 0;
    uint32_t left = n, taken;

    heap_make(candidates, n, false);
    while (left > 0) {
        struct candidate first = candidates[0], last = candidates[left - 1];

        reached += first.weight;
        left--;
        if (left > 0)
            heap_sink(candidates, left, 0, last, false);
        candidates[left] = first;
        if (reached >= top_p * sum)
            break;
    }
    taken = n - left;
    for (uint32_t i = left, k = n - 1; i < k; i++, k--) {
        struct candidate swap = candidates[i];

        candidates[i] = candidates[k];
        candidates[k] = swap;
    }
    memmove(candidates, candidates + left, taken * sizeof(*candidates));
    return taken;
}

/* Keeps those at least min_p times as likely as the likeliest, whose weight is 1. */
static uint32_t cut_min_p(struct candidate *candidates, uint32_t n, float min_p)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < n; i++)
        if (candidates[i].weight >= min_p)
            candidates[kept++] = candidates[i];
    return kept;
}

/* ---- the draw ---- */

/* A 64-bit finaliser (two multiplications between shifts): every bit of the result depends on
 * every bit of the argument. */
static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* In [0, 1), from seed and position alone. */
static double draw(uint64_t seed, uint64_t position)
{
    uint64_t bits = mix(mix(seed + UINT64_C(0x9e3779b97f4a7c15)) +
                        (position + 1) * UINT64_C(0x9e3779b97f4a7c15));

    return (double)(bits >> 11) * 0x1p-53;
}

static int32_t pick_drawn(const struct candidate *candidates, uint32_t n, double u)
{
    double sum = 0, reached = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += candidates[i].weight;
    for (uint32_t i = 0; i < n; i++) {
        reached += candidates[i].weight;
        if (reached > u * sum)
            return candidates[i].id;
    }
    /* only where rounding left u * sum at the sum itself */
    for (uint32_t i = n; i-- > 0;)
        if (candidates[i].weight > 0)
            return candidates[i].id;
    return candidates[0].id;
}

int32_t sampler_pick(const struct sampler_params *params, const struct kernel_table *kernels,
                     float *logits, uint32_t n_vocab, const int32_t *recent, size_t n_recent,
                     uint64_t position, struct sampler_scratch **scratch)
{
    bool top_k = params->top_k > 0 && params->top_k < n_vocab;
    struct candidate *candidates;
    uint32_t n;
    double sum;

    if (params->repeat_penalty > 0 && params->repeat_penalty != 1)
        penalise(logits, n_vocab, recent, n_recent, params->repeat_penalty);
    if (!(params->temperature > 0) || params->top_k == 1)
        return (int32_t)kernels->argmax(logits, n_vocab);
    if (scratch_reach(scratch, top_k ? params->top_k : n_vocab) < 0)
        return -ENOMEM;
    candidates = (*scratch)->candidates;
    n = top_k ? select_top(logits, n_vocab, params->top_k, candidates)
              : select_all(logits, n_vocab, candidates);
    if (n == 0)
        return (int32_t)kernels->argmax(logits, n_vocab);
    sum = weigh(candidates, n, params->temperature);
    if (params->top_p < 1)
        n = top_k ? cut_top_p_sorted(candidates, n, sum, params->top_p)
                  : cut_top_p(candidates, n, sum, params->top_p);
    if (params->min_p > 0)
        n = cut_min_p(candidates, n, MIN(params->min_p, 1.0f));
    return pick_drawn(candidates, n, draw(params->seed, position));
}
