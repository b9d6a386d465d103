/* Golden: whole models against the exact logits, greedy texts and likelihoods of the reference
 * data, under every kernel variant that the machine has. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/engine_run.h"
#include "tests/support/golden.h"

#include "lib/cleanup.h"

static const char *const models[] = {
    "stories260K-f32", "stories260K-f16", "tiny-random-f16",  "syn-llama-f32",  "syn-llama-f16",
    "syn-llama-q8_0",  "syn-llama-q4_0",  "syn-llama-q4_k_m", "syn-llama-q6_k",
};

#define CASES 6
/* The scalar variant is the oracle, not the fast one: of the synthetic models it takes prompts up
 * to this long, and of the small ones all. */
#define SCALAR_PROMPT_TOKENS 100u

struct golden {
    char name[64];
    json_t *json;
    struct gguf_source source;
    struct model *model;
    struct engine *engine;
    uint32_t n_vocab;
};

static void golden_open(struct golden *g, const struct kernel_table *kernels, const char *name,
                        bool kv_f32)
{
    char path[128];

    snprintf(g->name, sizeof(g->name), "%s", name);
    snprintf(path, sizeof(path), "models/%s.json", name);
    g->json = golden_json(path);
    snprintf(path, sizeof(path), "models/%s.gguf", name);
    g->source = golden_source(path);
    g->model = test_model(kernels, g->source);
    g->engine = test_engine(kernels, 1, kv_f32);
    g->n_vocab = model_info(g->model)->n_vocab;
    cr_assert_eq(g->n_vocab, json_integer_value(json_object_get(g->json, "n_vocab")));
}

static void golden_close(struct golden *g)
{
    model_free(g->model);
    engine_free(g->engine);
    free((void *)g->source.memory);
    json_decref(g->json);
}

static const json_t *golden_case(const struct golden *g, size_t index)
{
    return json_array_get(json_object_get(g->json, "cases"), index);
}

/* How many of a model's cases, whose prompts get longer and longer, this variant takes. */
static size_t cases_of(const struct golden *g)
{
    size_t n = 0;

    if (engine_kernels(g->engine) != &kernels_scalar || strncmp(g->name, "syn-", 4) != 0)
        return CASES;
    while (n < CASES && json_array_size(json_object_get(golden_case(g, n), "prompt_ids")) <=
                            SCALAR_PROMPT_TOKENS)
        n++;
    return n;
}

static double number(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

/* The last position's logits of one case, its whole prompt in one step. */
static void check_logits(struct golden *g, size_t index, double floor)
{
    const json_t *c = golden_case(g, index);
    double limit = fmax(1.5 * number(c, "peer_nmse"), floor), nmse;
    struct sequence *sequence;
    char path[128];
    uint32_t n;
    _cleanup_free_ int32_t *ids = golden_ids(json_object_get(c, "prompt_ids"), &n);
    _cleanup_free_ float *exact = NULL;

    snprintf(path, sizeof(path), "models/%s",
             json_string_value(json_object_get(c, "exact_logits_file")));
    exact = golden_floats(path, g->n_vocab);
    sequence = test_sequence(g->engine, g->model, n);
    nmse = golden_nmse(test_feed(g->engine, g->model, sequence, ids, n, ENGINE_MAX_COLUMNS), exact,
                       g->n_vocab);
    cr_expect(nmse <= limit, "%s, case %zu: NMSE %.2e is above %.2e", g->name, index, nmse, limit);
    sequence_free(sequence);
}

static void check_all_logits(const char *variant, bool kv_f32)
{
    const struct kernel_table *kernels = test_kernels(variant);
    struct golden g;

    for (size_t m = 0; m < ELEMENTSOF(models); m++) {
        golden_open(&g, kernels, models[m], kv_f32);
        for (size_t i = 0; i < cases_of(&g); i++)
            check_logits(&g, i, kv_f32 ? 1e-9 : 5e-7);
        golden_close(&g);
    }
}

/* Whether the reference's choice at a step is one that any engine of its precision makes: the
 * margin is above 0.05, and above three times the error that the quantised peer itself has there
 * (the synthetic models have random weights, their logits lie close together). */
static bool is_firm(const json_t *c, uint32_t step)
{
    double margin = json_number_value(json_array_get(json_object_get(c, "greedy_margins"), step));

    return margin > fmax(0.05, 3 * number(c, "peer_max_abs_err")) ||
           step < number(c, "well_conditioned_steps");
}

/* All cases side by side, fed the reference's ids; at every firm step the choice is the same. */
static void check_greedy(struct golden *g)
{
    struct step_row rows[CASES] = {0};
    int32_t *prompts[CASES], *greedy[CASES];
    uint32_t steps = 0, compared = 0;
    size_t n = cases_of(g);

    for (size_t i = 0; i < n; i++) {
        const json_t *c = golden_case(g, i);

        prompts[i] = golden_ids(json_object_get(c, "prompt_ids"), &rows[i].n_tokens);
        greedy[i] = golden_ids(json_object_get(c, "greedy_ids"), &steps);
        rows[i].sequence = test_sequence(g->engine, g->model, rows[i].n_tokens + steps);
        rows[i].tokens = prompts[i];
        rows[i].wants = ROW_LOGITS;
    }
    for (uint32_t step = 0; step < steps; step++) {
        test_step(g->engine, g->model, rows, (uint32_t)n);
        for (size_t i = 0; i < n; i++) {
            const json_t *c = golden_case(g, i);
            bool firm = is_firm(c, step);
            uint32_t id = engine_kernels(g->engine)->argmax(rows[i].ret_values, g->n_vocab);

            if (firm)
                cr_expect_eq(id, (uint32_t)greedy[i][step], "%s, case %zu, step %u", g->name, i,
                             step);
            compared += firm;
            rows[i].tokens = &greedy[i][step];
            rows[i].n_tokens = 1;
        }
    }
    cr_expect_gt(compared, n, "%s: hardly a step to compare", g->name);
    for (size_t i = 0; i < n; i++) {
        sequence_free(rows[i].sequence);
        free(prompts[i]);
        free(greedy[i]);
    }
}

static void check_all_greedy(const char *variant)
{
    const struct kernel_table *kernels = test_kernels(variant);
    struct golden g;

    for (size_t m = 0; m < ELEMENTSOF(models); m++) {
        golden_open(&g, kernels, models[m], false);
        check_greedy(&g);
        golden_close(&g);
    }
}

/* Mean of -ln p(next id) over the text, a token a step. */
static double mean_nll(struct golden *g)
{
    const json_t *nll = json_object_get(g->json, "nll");
    uint32_t n;
    _cleanup_free_ int32_t *ids = golden_ids(json_object_get(nll, "ids"), &n);
    struct step_row row = {.n_tokens = 1, .wants = ROW_LOGITS};
    double total = 0;

    row.sequence = test_sequence(g->engine, g->model, n);
    for (uint32_t i = 0; i + 1 < n; i++) {
        double sum = 0;

        row.tokens = &ids[i];
        test_step(g->engine, g->model, &row, 1);
        for (uint32_t k = 0; k < g->n_vocab; k++)
            sum += exp((double)row.ret_values[k] - row.ret_values[ids[i + 1]]);
        total += log(sum);
    }
    sequence_free(row.sequence);
    return total / (n - 1);
}

static void check_nll(const char *variant)
{
    static const char *const stories[] = {"stories260K-f32", "stories260K-f16"};
    const struct kernel_table *kernels = test_kernels(variant);
    struct golden g;

    for (size_t m = 0; m < ELEMENTSOF(stories); m++) {
        golden_open(&g, kernels, stories[m], false);
        double expected = number(json_object_get(g.json, "nll"), "exact_mean_nll");
        double found = mean_nll(&g);

        cr_expect(fabs(found - expected) < 1e-4, "%s: %.6f, not %.6f", g.name, found, expected);
        golden_close(&g);
    }
}

#define GOLDEN_TESTS(variant)                               \
    Test(golden, logits_are_within_limits_f32_kv_##variant) \
    {                                                       \
        check_all_logits(#variant, true);                   \
    }                                                       \
    Test(golden, logits_are_within_limits_f16_kv_##variant) \
    {                                                       \
        check_all_logits(#variant, false);                  \
    }                                                       \
    Test(golden, greedy_ids_are_the_references_##variant)   \
    {                                                       \
        check_all_greedy(#variant);                         \
    }                                                       \
    Test(golden, likelihood_is_the_references_##variant)    \
    {                                                       \
        check_nll(#variant);                                \
    }

GOLDEN_TESTS(scalar)
GOLDEN_TESTS(avx2)
GOLDEN_TESTS(avx512)

/* The table of defects: what must be refused is, in a sentence; what loads can be stepped. */
static void check_bad(const struct kernel_table *kernels, const char *file, const char *expect)
{
    struct model_load_options options = {.kernels = kernels};
    struct model *model = NULL;
    struct fault fault = {0};
    char path[128];
    int r;

    snprintf(path, sizeof(path), "bad/%s", file);
    struct gguf_source source = golden_source(path);
    r = model_load(&source, &options, NULL, &model, &fault);
    if (strcmp(expect, "reject") == 0) {
        cr_expect(r == -EBADMSG || r == -ENOTSUP, "%s: %d", file, r);
        cr_expect(strlen(fault.text) > 10, "%s: \"%s\"", file, fault.text);
    } else if (strcmp(expect, "load") == 0) {
        cr_expect_eq(r, 0, "%s: %s", file, fault.text);
    }
    if (r == 0) {
        struct engine *engine = test_engine(kernels, 1, false);
        struct sequence *sequence = test_sequence(engine, model, 4);
        const int32_t ids[] = {1, 262, 263, 264};

        cr_expect_not_null(test_feed(engine, model, sequence, ids, ELEMENTSOF(ids), 4));
        sequence_free(sequence);
        model_free(model);
        engine_free(engine);
    }
    free((void *)source.memory);
}

Test(golden, every_bad_file_ends_as_its_index_says)
{
    const struct kernel_table *kernels = test_kernels("scalar");
    json_t *index = golden_json("bad/index.json"), *entry;
    size_t i;

    json_array_foreach(index, i, entry)
    {
        check_bad(kernels, json_string_value(json_object_get(entry, "file")),
                  json_string_value(json_object_get(entry, "expect")));
    }
    cr_expect_geq(i, 20);
    json_decref(index);
}
