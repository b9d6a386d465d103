/* Engines and steps for tests: what almost every test of the engine does first.
 *
 * Everything that goes wrong here fails the test that asked. Thread: the test's. */
#ifndef HEARTH_TESTS_SUPPORT_ENGINE_RUN_H
#define HEARTH_TESTS_SUPPORT_ENGINE_RUN_H

#include <criterion/criterion.h>
#include <string.h>

#include "daemon/engine/engine.h"

#define TEST_KV_BYTES (UINT64_C(64) << 20)

/* The variant of that name; skips the test on a machine that lacks it. */
static inline const struct kernel_table *test_kernels(const char *name)
{
    const struct kernel_table *kernels = NULL;
    struct fault fault = {0};

    if (kernels_choose(name, &kernels, &fault) < 0)
        cr_skip_test("%s", fault.text);
    return kernels;
}

static inline struct engine *test_engine(const struct kernel_table *kernels, uint32_t threads,
                                         bool kv_f32)
{
    struct engine_options options = {
        .kernels = kernels,
        .threads = threads,
        .kv_budget_bytes = TEST_KV_BYTES,
        .kv_f32 = kv_f32,
    };
    struct engine *engine = NULL;
    struct fault fault = {0};

    cr_assert_eq(engine_new(&options, &engine, &fault), 0, "%s", fault.text);
    return engine;
}

static inline struct model *test_model(const struct kernel_table *kernels,
                                       struct gguf_source source)
{
    struct model_load_options options = {.kernels = kernels};
    struct model *model = NULL;
    struct fault fault = {0};

    cr_assert_eq(model_load(&source, &options, NULL, &model, &fault), 0, "%s", fault.text);
    return model;
}

static inline struct sequence *test_sequence(struct engine *engine, struct model *model,
                                             uint32_t reserve_tokens)
{
    struct sequence *sequence = NULL;

    cr_assert_eq(sequence_new(engine, model, reserve_tokens, &sequence), 0);
    return sequence;
}

/* One whole step. */
static inline void test_step(struct engine *engine, struct model *model, struct step_row *rows,
                             uint32_t n_rows)
{
    int r = engine_step_begin(engine, model, rows, n_rows);

    cr_assert_eq(r, 0, "the step is refused: %s", strerror(-r));
    while (engine_step_slice(engine, model) > 0)
        ;
    engine_step_end(engine, model);
}

/* Feeds ids to a sequence in chunks; the values after the last. */
static inline float *test_feed(struct engine *engine, struct model *model,
                               struct sequence *sequence, const int32_t *ids, uint32_t n,
                               uint32_t chunk)
{
    struct step_row row = {.sequence = sequence};

    for (uint32_t i = 0; i < n; i += row.n_tokens) {
        row.tokens = ids + i;
        row.n_tokens = n - i < chunk ? n - i : chunk;
        row.wants = i + row.n_tokens == n ? ROW_LOGITS : ROW_NOTHING;
        test_step(engine, model, &row, 1);
    }
    return row.ret_values;
}

#endif
