/* Sampler: what may be drawn, how often, and that nothing but seed and position decides. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/sampler.h"
#include "lib/cleanup.h"

#define DRAWS 40000u
#define VOCAB 1000u

static const struct sampler_params plain = {
    .temperature = 1, .top_p = 1, .repeat_penalty = 1, .seed = 42};

/* Picks from a copy, so that every draw sees the same logits. */
static int32_t pick(const struct sampler_params *params, const float *logits, uint32_t n,
                    uint64_t position)
{
    static struct sampler_scratch *scratch;
    float copy[VOCAB];

    cr_assert_leq(n, VOCAB);
    memcpy(copy, logits, n * sizeof(float));
    return sampler_pick(params, &kernels_scalar, copy, n, NULL, 0, position, &scratch);
}

/* How often each token comes in `draws` draws. */
static void count(const struct sampler_params *params, const float *logits, uint32_t n,
                  uint32_t draws, uint32_t *ret_counts)
{
    memset(ret_counts, 0, n * sizeof(*ret_counts));
    for (uint32_t i = 0; i < draws; i++) {
        int32_t id = pick(params, logits, n, i);

        cr_assert(id >= 0 && (uint32_t)id < n);
        ret_counts[id]++;
    }
}

/* Chi-square of the counts against softmax(logits / temperature) over the ids in `allowed`. */
static double chi_square(const uint32_t *counts, const float *logits, uint32_t n, float temperature,
                         uint64_t allowed)
{
    double sum = 0, chi = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += allowed >> i & 1 ? exp(logits[i] / temperature) : 0;
    for (uint32_t i = 0; i < n; i++) {
        double expected = allowed >> i & 1 ? DRAWS * exp(logits[i] / temperature) / sum : 0;

        if (expected == 0)
            cr_expect_eq(counts[i], 0, "token %u came %u times", i, counts[i]);
        else
            chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    return chi;
}

static const float eight[] = {1.5f, -0.5f, 0.2f, 2.0f, 1.5f, -1.0f, 0.0f, 0.7f};

Test(sampler, greedy_takes_the_largest_and_the_lowest_id_of_equals)
{
    static const float logits[] = {0, 3, 7, 7, -1, 7};
    struct sampler_params params = plain;

    params.temperature = 0;
    cr_expect_eq(pick(&params, logits, 6, 0), 2);
    params.temperature = 5;
    params.top_k = 1;
    for (uint64_t i = 0; i < 100; i++)
        cr_expect_eq(pick(&params, logits, 6, i), 2);
}

/* 7 degrees of freedom: above 29.9 one time in 10,000; the seeds are fixed. */
Test(sampler, draws_follow_the_distribution_at_any_temperature)
{
    static const float temperatures[] = {0.5f, 1, 2};
    uint32_t counts[8];

    for (size_t t = 0; t < ELEMENTSOF(temperatures); t++)
        for (uint64_t seed = 1; seed <= 3; seed++) {
            struct sampler_params params = plain;
            double chi;

            params.temperature = temperatures[t];
            params.seed = seed;
            count(&params, eight, 8, DRAWS, counts);
            chi = chi_square(counts, eight, 8, temperatures[t], 0xff);
            cr_expect_lt(chi, 29.9, "temperature %g, seed %lu: %.1f", (double)temperatures[t],
                         (unsigned long)seed, chi);
        }
}

/* Seeds that differ little give draws that have nothing in common: one position, many seeds. */
Test(sampler, draws_over_seeds_follow_the_distribution_too)
{
    struct sampler_params params = plain;
    uint32_t counts[8] = {0};

    for (uint32_t i = 0; i < DRAWS; i++) {
        params.seed = i;
        counts[pick(&params, eight, 8, 3)]++;
    }
    cr_expect_lt(chi_square(counts, eight, 8, 1, 0xff), 29.9);
}

Test(sampler, top_k_keeps_k_and_lower_ids_of_equals)
{
    struct sampler_params params = plain;
    uint32_t counts[8];

    params.top_k = 2; /* 3, and of the equal 0 and 4 the first */
    count(&params, eight, 8, DRAWS, counts);
    cr_expect_lt(chi_square(counts, eight, 8, 1, 1 << 3 | 1 << 0), 15.1);
    params.top_k = 5;
    count(&params, eight, 8, DRAWS, counts);
    cr_expect_lt(chi_square(counts, eight, 8, 1, 1 << 3 | 1 << 0 | 1 << 4 | 1 << 7 | 1 << 2), 23.5);
}

static int compare_logits(const void *a, const void *b, void *logits)
{
    float x = ((const float *)logits)[*(const int32_t *)a];
    float y = ((const float *)logits)[*(const int32_t *)b];
    int32_t first = *(const int32_t *)a, second = *(const int32_t *)b;

    return x != y ? (x < y) - (x > y) : (first > second) - (first < second);
}

/* At a temperature that makes everything equally likely, what comes is what was selected: the head
 * of a full sort, many equal logits among it. */
Test(sampler, top_k_selects_what_a_full_sort_would)
{
    static const uint32_t ks[] = {2, 3, 40, 127, 500, 999};
    struct sampler_params params = plain;
    uint32_t counts[VOCAB];
    int32_t order[VOCAB];
    float logits[VOCAB];
    uint64_t state = 5;

    params.temperature = 1e9f;
    for (int32_t i = 0; i < (int32_t)VOCAB; i++) {
        state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
        logits[i] = (float)(state >> 33) / 1e9f;
        logits[i] = roundf(logits[i] * 50) / 50;
        order[i] = i;
    }
    qsort_r(order, VOCAB, sizeof(order[0]), compare_logits, logits);
    for (size_t k = 0; k < ELEMENTSOF(ks); k++) {
        params.top_k = ks[k];
        count(&params, logits, VOCAB, 12 * ks[k] + 100, counts);
        for (uint32_t i = 0; i < VOCAB; i++)
            if (i < ks[k])
                cr_expect(counts[order[i]] > 0, "k %u: place %u never came", ks[k], i);
            else
                cr_expect_eq(counts[order[i]], 0, "k %u: place %u came", ks[k], i);
    }
}

/* 0.4 0.3 0.2 0.1: the shortest head that reaches top_p, with and without top-k before it. */
Test(sampler, top_p_keeps_the_shortest_head_that_reaches_it)
{
    static const float logits[] = {-2.302585f, -0.916291f, -1.609438f, -1.203973f};
    static const struct {
        float top_p;
        uint64_t allowed;
    } cases[] = {{0.0f, 1 << 1},
                 {0.39f, 1 << 1},
                 {0.41f, 1 << 1 | 1 << 3},
                 {0.69f, 1 << 1 | 1 << 3},
                 {0.71f, 1 << 1 | 1 << 3 | 1 << 2},
                 {0.95f, 15},
                 {1.0f, 15}};
    uint32_t counts[4];

    for (size_t c = 0; c < ELEMENTSOF(cases); c++)
        for (uint32_t k = 0; k <= 3; k += 3) {
            struct sampler_params params = plain;
            uint64_t allowed = cases[c].allowed;

            params.top_p = cases[c].top_p;
            params.top_k = k;
            if (k == 3) /* of the three that are left, 0.44 0.33 0.22 */
                allowed = params.top_p < 0.44f   ? 1 << 1
                          : params.top_p < 0.77f ? 1 << 1 | 1 << 3
                                                 : 1 << 1 | 1 << 3 | 1 << 2;
            count(&params, logits, 4, DRAWS, counts);
            cr_expect_lt(chi_square(counts, logits, 4, 1, allowed), 21.1, "top_p %g, top_k %u",
                         (double)params.top_p, k);
        }
}

Test(sampler, min_p_is_relative_to_the_likeliest)
{
    static const float logits[] = {0, -1, -2, -3, -4};
    struct sampler_params params = plain;
    uint32_t counts[5];

    params.min_p = 0.1f; /* e^-2 = 0.135 stays, e^-3 = 0.05 does not */
    count(&params, logits, 5, DRAWS, counts);
    cr_expect_lt(chi_square(counts, logits, 5, 1, 7), 18.5);
    params.temperature = 2; /* before min-p: e^-2 is now that of token 4 */
    count(&params, logits, 5, DRAWS, counts);
    cr_expect_lt(chi_square(counts, logits, 5, 2, 31), 23.6);
    params.min_p = 1;
    count(&params, logits, 5, 100, counts);
    cr_expect_eq(counts[0], 100);
}

static int32_t pick_after(const struct sampler_params *params, float *logits, uint32_t n,
                          const int32_t *recent, size_t n_recent)
{
    struct sampler_scratch *scratch = NULL;
    int32_t id = sampler_pick(params, &kernels_scalar, logits, n, recent, n_recent, 0, &scratch);

    sampler_scratch_free(scratch);
    return id;
}

Test(sampler, the_penalty_divides_and_multiplies_once_a_token)
{
    struct sampler_params params = plain;
    float logits[] = {4, 3, -1, -2, 0};
    static const int32_t recent[] = {0, 2, 0, 2, 0, -5, 99, 4};

    params.temperature = 0;
    params.repeat_penalty = 2;
    cr_expect_eq(pick_after(&params, logits, 5, recent, ELEMENTSOF(recent)), 1);
    cr_expect_float_eq(logits[0], 2, 1e-6);
    cr_expect_float_eq(logits[1], 3, 1e-6);
    cr_expect_float_eq(logits[2], -2, 1e-6);
    cr_expect_float_eq(logits[3], -2, 1e-6);
    cr_expect_float_eq(logits[4], 0, 1e-6);
}

Test(sampler, the_penalty_looks_back_on_its_window_alone)
{
    int32_t recent[SAMPLER_PENALTY_WINDOW + 1] = {1};
    struct sampler_params params = plain;
    float logits[] = {1, 5, 4};

    params.temperature = 0;
    params.repeat_penalty = 3;
    for (size_t i = 1; i < ELEMENTSOF(recent); i++)
        recent[i] = 2;
    cr_expect_eq(pick_after(&params, logits, 3, recent, ELEMENTSOF(recent)), 1);
    cr_expect_float_eq(logits[1], 5, 1e-6);
    pick_after(&params, logits, 3, recent, SAMPLER_PENALTY_WINDOW);
    cr_expect_float_eq(logits[1], 5.0f / 3, 1e-6);
}

/* The penalty comes first: it decides what top-k sees. */
Test(sampler, the_penalty_comes_before_top_k)
{
    static const int32_t recent[] = {0};
    struct sampler_params params = plain;

    params.repeat_penalty = 10;
    params.top_k = 2;
    for (params.seed = 0; params.seed < 200; params.seed++) {
        float logits[] = {3, 2, 2, 0};

        cr_expect_neq(pick_after(&params, logits, 4, recent, 1), 0);
    }
}

Test(sampler, seed_and_position_alone_decide)
{
    struct sampler_params params = plain;
    uint32_t same_seed = 0, same_position = 0;
    float larger[VOCAB] = {0};

    for (uint64_t position = 0; position < 1000; position++) {
        int32_t id = pick(&params, eight, 8, position), next;

        pick(&params, larger, VOCAB, position); /* a request in between, with a larger vocabulary */
        cr_assert_eq(pick(&params, eight, 8, position), id);
        same_position += pick(&params, eight, 8, position + 1) == id;
        params.seed++;
        next = pick(&params, eight, 8, position);
        params.seed--;
        same_seed += next == id;
    }
    /* by chance about a fifth of neighbours are equal */
    cr_expect_lt(same_seed, 400);
    cr_expect_lt(same_position, 400);
}

Test(sampler, nan_and_infinity_are_survived)
{
    const float rows[][4] = {
        {NAN, 1, NAN, 2},
        {INFINITY, 1, 2, 3},
        {-INFINITY, -INFINITY, 5, -INFINITY},
        {INFINITY, INFINITY, -INFINITY, NAN},
        {NAN, NAN, NAN, NAN},
        {-INFINITY, -INFINITY, -INFINITY, -INFINITY},
        {3e38f, -3e38f, 3e38f, 0},
    };
    /* the ids that may come; where nothing can be drawn any id inside the vocabulary */
    static const uint32_t allowed[] = {1 << 1 | 1 << 3, 1, 1 << 2, 3, 15, 15, 5};

    for (size_t i = 0; i < ELEMENTSOF(rows); i++)
        for (uint32_t k = 0; k < 4; k++)
            for (uint64_t position = 0; position < 50; position++) {
                struct sampler_params params = plain;
                int32_t id;

                params.top_k = k == 1 ? 2 : k == 2 ? 3 : 0;
                params.top_p = k == 3 ? 0.9f : 1;
                params.min_p = k == 2 ? 0.05f : 0;
                id = pick(&params, rows[i], 4, position);
                cr_expect(id >= 0 && id < 4 && allowed[i] >> id & 1, "row %zu: %d", i, id);
            }
}

Test(sampler, hostile_parameters_pick_something)
{
    static const float hostile[] = {NAN, INFINITY, -INFINITY, -1, 0, 1e-42f, 1e38f};

    for (size_t t = 0; t < ELEMENTSOF(hostile); t++)
        for (size_t p = 0; p < ELEMENTSOF(hostile); p++) {
            struct sampler_params params = {.temperature = hostile[t],
                                            .top_p = hostile[p],
                                            .min_p = hostile[(t + p) % 7],
                                            .repeat_penalty = hostile[(t + 2 * p) % 7]};
            static const int32_t recent[] = {1, 3};
            float logits[8];
            int32_t id;

            params.top_k = p % 3;
            memcpy(logits, eight, sizeof(logits));
            id = pick_after(&params, logits, 8, recent, 2);
            cr_expect(id >= 0 && id < 8, "%zu %zu: %d", t, p, id);
        }
}
