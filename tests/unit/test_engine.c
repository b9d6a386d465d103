/* Engine: the same tokens whatever shares the step, one pass over the weights, KV pages, loads
 * that are refused, cancelled or hostile. All on models made in memory. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/alloc_fail.h"
#include "tests/support/engine_run.h"
#include "tests/support/gguf_make.h"

#include "daemon/engine/kv.h"
#include "lib/cleanup.h"

static const char *const variants[] = {"scalar", "avx2", "avx512"};
static const enum plan_type types[] = {PLAN_F32, PLAN_F16, PLAN_Q8_0, PLAN_Q4_K_M};

static struct gguf_source make_source(const struct model_plan *plan)
{
    struct fault fault = {0};
    uint8_t *bytes = NULL;
    size_t len = 0;

    cr_assert_eq(make_model_bytes(plan, &bytes, &len, &fault), 0, "%s", fault.text);
    return memory_source(bytes, len);
}

/* A tiny model whose rows fit every type's blocks. */
static struct model_plan plan_of(enum plan_type type)
{
    struct model_plan plan = tiny_model_plan();

    plan.type = type;
    if (type == PLAN_Q4_K_M) {
        plan.dim = 256;
        plan.ff = 512;
    }
    return plan;
}

struct bed {
    const struct kernel_table *kernels;
    struct gguf_source source;
    struct model *model;
    struct engine *engine;
    uint32_t n_vocab;
};

static void bed_make(struct bed *bed, const struct kernel_table *kernels,
                     const struct model_plan *plan, uint32_t threads)
{
    bed->kernels = kernels;
    bed->source = make_source(plan);
    bed->model = test_model(kernels, bed->source);
    bed->engine = test_engine(kernels, threads, false);
    bed->n_vocab = model_info(bed->model)->n_vocab;
}

static void bed_done(struct bed *bed)
{
    model_free(bed->model);
    engine_free(bed->engine);
    free((void *)bed->source.memory);
}

static void bed_scalar(struct bed *bed)
{
    struct model_plan plan = tiny_model_plan();

    bed_make(bed, test_kernels("scalar"), &plan, 1);
}

/* A text of its own for every number. */
static void fill_ids(int32_t *ids, uint32_t n, uint32_t text, uint32_t n_vocab)
{
    uint64_t state = text * UINT64_C(0x9e3779b97f4a7c15) + 1;

    for (uint32_t i = 0; i < n; i++) {
        state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
        ids[i] = (int32_t)((state >> 33) % n_vocab);
    }
}

/* ---- the same tokens every time ---- */

#define TEXT 70u /* tokens of the text under test: more than four pages */

/* The reference: the text alone, in one step. */
static float *logits_alone(struct bed *bed, const int32_t *ids, uint32_t n)
{
    struct sequence *sequence = test_sequence(bed->engine, bed->model, n);
    float *logits = test_feed(bed->engine, bed->model, sequence, ids, n, ENGINE_MAX_COLUMNS);
    float *copy = malloc(bed->n_vocab * sizeof(float));

    memcpy(copy, logits, bed->n_vocab * sizeof(float));
    sequence_free(sequence);
    return copy;
}

static bool same(const struct bed *bed, const float *a, const float *b)
{
    return memcmp(a, b, bed->n_vocab * sizeof(float)) == 0;
}

/* Runs a check under every variant the machine has and every kind of weights. */
static void for_all(void (*check)(struct bed *bed, const int32_t *ids, const float *expected))
{
    for (size_t v = 0; v < ELEMENTSOF(variants); v++) {
        const struct kernel_table *kernels;

        if (kernels_choose(variants[v], &kernels, NULL) < 0)
            continue;
        for (size_t t = 0; t < ELEMENTSOF(types); t++) {
            struct model_plan plan = plan_of(types[t]);
            int32_t ids[TEXT];
            struct bed bed;

            bed_make(&bed, kernels, &plan, 1);
            fill_ids(ids, TEXT, 7, bed.n_vocab);
            _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
            check(&bed, ids, expected);
            bed_done(&bed);
        }
    }
}

/* Batches of 1..33 texts of one token more each; ours stands at different places in them. */
static void check_batches(struct bed *bed, const int32_t *ids, const float *expected)
{
    static const uint32_t batches[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33};

    for (size_t b = 0; b < ELEMENTSOF(batches); b++) {
        uint32_t n = batches[b], ours = n / 2;
        int32_t others[33][33];
        struct step_row rows[33];

        for (uint32_t i = 0; i < n; i++) {
            uint32_t length = i == ours ? TEXT : i + 1;

            if (i != ours)
                fill_ids(others[i], length, i + 100, bed->n_vocab);
            rows[i] = (struct step_row){
                .sequence = test_sequence(bed->engine, bed->model, length),
                .tokens = i == ours ? ids : others[i],
                .n_tokens = length,
                .wants = i % 3 == 2 && i != ours ? ROW_NOTHING : ROW_LOGITS,
            };
        }
        test_step(bed->engine, bed->model, rows, n);
        cr_expect(same(bed, rows[ours].ret_values, expected), "%s: batch %u", bed->kernels->name,
                  n);
        for (uint32_t i = 0; i < n; i++)
            sequence_free(rows[i].sequence);
    }
}

Test(engine, same_logits_in_every_batch)
{
    for_all(check_batches);
}

static void check_chunks(struct bed *bed, const int32_t *ids, const float *expected)
{
    for (uint32_t chunk = 1; chunk <= 64; chunk += chunk < 20 ? 1 : 11) {
        struct sequence *sequence = test_sequence(bed->engine, bed->model, TEXT);
        float *logits = test_feed(bed->engine, bed->model, sequence, ids, TEXT, chunk);

        cr_expect(same(bed, logits, expected), "%s: chunks of %u", bed->kernels->name, chunk);
        sequence_free(sequence);
    }
}

Test(engine, same_logits_in_chunks_of_any_size)
{
    for_all(check_chunks);
}

/* Our text generates while prompts of others come and go in the same steps. */
static void check_mixed(struct bed *bed, const int32_t *ids, const float *expected)
{
    struct step_row rows[3] = {0};
    int32_t others[2][24];

    rows[1].sequence = test_sequence(bed->engine, bed->model, TEXT);
    rows[1].wants = ROW_LOGITS;
    for (uint32_t at = 0; at < TEXT; at += rows[1].n_tokens) {
        rows[1].tokens = ids + at;
        rows[1].n_tokens = at == 0 ? 20 : 1;
        for (uint32_t k = 0; k < 2; k++) {
            struct step_row *other = &rows[2 * k];

            other->n_tokens = 1 + (at + 7 * k) % 24;
            fill_ids(others[k], other->n_tokens, at + k, bed->n_vocab);
            other->tokens = others[k];
            other->sequence = test_sequence(bed->engine, bed->model, 24);
            other->wants = ROW_LOGITS;
        }
        test_step(bed->engine, bed->model, rows, 3);
        sequence_free(rows[0].sequence);
        sequence_free(rows[2].sequence);
    }
    cr_expect(same(bed, rows[1].ret_values, expected), "%s", bed->kernels->name);
    sequence_free(rows[1].sequence);
}

Test(engine, same_logits_beside_prompts_of_others)
{
    for_all(check_mixed);
}

/* The team is used from a size on that a tiny model never reaches: one of some 20 MB. */
Test(engine, same_logits_with_every_number_of_threads)
{
    struct model_plan plan = tiny_model_plan();
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    int32_t ids[TEXT];

    plan.type = PLAN_Q8_0;
    plan.dim = 1024;
    plan.heads = 8;
    plan.kv_heads = 4;
    plan.ff = 2048;
    for (size_t v = 0; v < ELEMENTSOF(variants); v++) {
        const struct kernel_table *kernels;
        struct bed bed;

        if (kernels_choose(variants[v], &kernels, NULL) < 0)
            continue;
        bed_make(&bed, kernels, &plan, 1);
        fill_ids(ids, TEXT, 7, bed.n_vocab);
        _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
        for (long threads = 2; threads <= cpus && threads <= 8; threads++) {
            engine_free(bed.engine);
            bed.engine = test_engine(kernels, (uint32_t)threads, false);
            cr_assert_leq(engine_threads(bed.engine), (uint32_t)threads);
            _cleanup_free_ float *logits = logits_alone(&bed, ids, TEXT);
            cr_expect(same(&bed, logits, expected), "%s: %ld threads", kernels->name, threads);
        }
        bed_done(&bed);
    }
}

/* Pages that come back are given out again with whatever they held; so are idle sequences. */
Test(engine, same_logits_on_used_pages)
{
    struct bed bed;
    int32_t ids[TEXT], other[TEXT];

    bed_scalar(&bed);
    fill_ids(ids, TEXT, 7, bed.n_vocab);
    _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
    for (uint32_t round = 0; round < 8; round++) {
        struct sequence *left, *right;

        fill_ids(other, TEXT, 50 + round, bed.n_vocab);
        left = test_sequence(bed.engine, bed.model, 20);
        right = test_sequence(bed.engine, bed.model, TEXT);
        test_feed(bed.engine, bed.model, left, other, 20, 9);
        test_feed(bed.engine, bed.model, right, other, TEXT, 30);
        sequence_free(round % 2 ? left : right);
        _cleanup_free_ float *logits = logits_alone(&bed, ids, TEXT);
        cr_expect(same(&bed, logits, expected), "round %u", round);
        sequence_free(round % 2 ? right : left);
    }
    bed_done(&bed);
}

/* Two models' steps are open at once, slice about. */
Test(engine, same_logits_between_slices_of_another_model)
{
    struct model_plan plan = plan_of(PLAN_F16);
    struct step_row rows[2] = {0};
    struct bed bed, guest;
    int32_t ids[TEXT];
    int more;

    bed_scalar(&bed);
    plan.seed = 99;
    bed_make(&guest, bed.kernels, &plan, 1);
    fill_ids(ids, TEXT, 7, bed.n_vocab);
    _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
    rows[0] = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, TEXT),
                                .tokens = ids,
                                .n_tokens = TEXT,
                                .wants = ROW_LOGITS};
    rows[1] = rows[0];
    rows[1].sequence = test_sequence(bed.engine, guest.model, TEXT);
    cr_assert_eq(engine_step_begin(bed.engine, bed.model, &rows[0], 1), 0);
    cr_assert_eq(engine_step_begin(bed.engine, guest.model, &rows[1], 1), 0);
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, &rows[0], 1), -EBUSY);
    do {
        more = engine_step_slice(bed.engine, bed.model);
        more += engine_step_slice(bed.engine, guest.model);
    } while (more > 0);
    engine_step_end(bed.engine, bed.model);
    engine_step_end(bed.engine, guest.model);
    cr_expect(same(&bed, rows[0].ret_values, expected));
    sequence_free(rows[0].sequence);
    sequence_free(rows[1].sequence);
    bed_done(&guest);
    bed_done(&bed);
}

/* ---- one pass over the weights ---- */

Test(engine, weight_passes_are_matrices_times_steps)
{
    static const enum plan_type mixes[] = {PLAN_F32, PLAN_Q4_K_M};

    for (size_t t = 0; t < ELEMENTSOF(mixes); t++) {
        struct model_plan plan = plan_of(mixes[t]);
        struct engine_step_stats stats;
        struct step_row rows[40];
        struct bed bed;
        int32_t ids[8];

        plan.tied = t == 0;
        bed_make(&bed, test_kernels("scalar"), &plan, 1);
        fill_ids(ids, ELEMENTSOF(ids), 3, bed.n_vocab);
        for (uint32_t i = 0; i < ELEMENTSOF(rows); i++)
            rows[i] = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, 64),
                                        .tokens = ids};
        for (uint32_t step = 0; step < 5; step++) {
            for (uint32_t i = 0; i < ELEMENTSOF(rows); i++) {
                rows[i].n_tokens = 1 + (i + step) % 8;
                rows[i].wants = i > 30 ? ROW_NOTHING : ROW_LOGITS;
            }
            test_step(bed.engine, bed.model, rows, 1 + step * 9);
        }
        model_step_stats(bed.model, &stats);
        cr_expect_eq(stats.steps, 5);
        cr_expect_eq(stats.rows, 1 + 10 + 19 + 28 + 37);
        cr_expect_eq(stats.weight_passes, 5 * model_info(bed.model)->n_matrices);
        for (uint32_t i = 0; i < ELEMENTSOF(rows); i++)
            sequence_free(rows[i].sequence);
        bed_done(&bed);
    }
}

Test(engine, a_step_that_nobody_reads_stops_early)
{
    struct engine_step_stats stats;
    struct step_row row = {.n_tokens = 4, .wants = ROW_NOTHING};
    struct bed bed;
    int32_t ids[4];

    bed_scalar(&bed);
    fill_ids(ids, 4, 3, bed.n_vocab);
    row.sequence = test_sequence(bed.engine, bed.model, 4);
    row.tokens = ids;
    test_step(bed.engine, bed.model, &row, 1);
    cr_expect_null(row.ret_values);
    cr_expect_eq(sequence_length(row.sequence), 4);
    model_step_stats(bed.model, &stats);
    cr_expect_lt(stats.weight_passes, model_info(bed.model)->n_matrices);
    sequence_free(row.sequence);
    bed_done(&bed);
}

/* ---- pooled rows ---- */

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* The pooled vector has length 1, is the same in any chunks, and differs between texts. */
Test(engine, pooled_vectors_are_unit_and_the_same_in_chunks)
{
    static const uint32_t chunks[] = {TEXT, 1, 16, 33};
    float first[64], other[64];
    int32_t ids[TEXT];
    struct bed bed;

    bed_scalar(&bed);
    fill_ids(ids, TEXT, 7, bed.n_vocab);
    for (size_t c = 0; c < ELEMENTSOF(chunks); c++) {
        struct step_row row = {.wants = ROW_POOLED};

        row.sequence = test_sequence(bed.engine, bed.model, TEXT);
        for (uint32_t at = 0; at < TEXT; at += row.n_tokens) {
            row.tokens = ids + at;
            row.n_tokens = MIN(chunks[c], TEXT - at);
            test_step(bed.engine, bed.model, &row, 1);
            if (c == 0 || at > 0)
                continue;
            memcpy(other, row.ret_values, sizeof(other));
        }
        cr_expect_float_eq(dot(row.ret_values, row.ret_values, 64), 1.0, 1e-5);
        if (c == 0)
            memcpy(first, row.ret_values, sizeof(first));
        cr_expect_arr_eq(row.ret_values, first, sizeof(first), "chunks of %u", chunks[c]);
        sequence_free(row.sequence);
    }
    cr_expect_lt(dot(first, other, 64), 0.999);
    bed_done(&bed);
}

Test(engine, pooled_and_logits_rows_share_a_step)
{
    struct step_row rows[3] = {0};
    int32_t ids[TEXT];
    struct bed bed;
    float alone[64];

    bed_scalar(&bed);
    fill_ids(ids, TEXT, 7, bed.n_vocab);
    _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
    for (uint32_t i = 0; i < 3; i++)
        rows[i] = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, TEXT),
                                    .tokens = ids,
                                    .n_tokens = TEXT - (i == 0 ? 5 : 0),
                                    .wants = i == 1 ? ROW_LOGITS : ROW_POOLED};
    test_step(bed.engine, bed.model, rows, 3);
    cr_expect(same(&bed, rows[1].ret_values, expected));
    memcpy(alone, rows[2].ret_values, sizeof(alone));
    sequence_free(rows[2].sequence);
    rows[2].sequence = test_sequence(bed.engine, bed.model, TEXT);
    test_step(bed.engine, bed.model, &rows[2], 1);
    cr_expect_arr_eq(rows[2].ret_values, alone, sizeof(alone));
    for (uint32_t i = 0; i < 3; i++)
        sequence_free(rows[i].sequence);
    bed_done(&bed);
}

/* ---- what a step refuses ---- */

Test(engine, refused_steps_leave_nothing_changed)
{
    struct step_row good, rows[2];
    struct bed bed, guest;
    int32_t ids[TEXT], bad_ids[2] = {0, 0};
    uint64_t used;
    struct engine_kv_stats kv;

    bed_scalar(&bed);
    bed_scalar(&guest);
    fill_ids(ids, TEXT, 7, bed.n_vocab);
    _cleanup_free_ float *expected = logits_alone(&bed, ids, TEXT);
    good = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, TEXT),
                             .tokens = ids,
                             .n_tokens = 40,
                             .wants = ROW_LOGITS};
    test_step(bed.engine, bed.model, &good, 1);
    good.tokens = ids + 40;
    good.n_tokens = TEXT - 40;
    engine_kv_stats(bed.engine, &kv);
    used = kv.used_bytes;

    struct sequence *other = test_sequence(guest.engine, guest.model, 4);
    const struct {
        const char *what;
        struct step_row row;
        uint32_t n_rows;
    } cases[] = {
        {"no rows", good, 0},
        {"the same sequence twice", good, 2},
        {"no tokens", {.sequence = good.sequence, .tokens = ids, .n_tokens = 0}, 1},
        {"beyond the reservation", {.sequence = good.sequence, .tokens = ids, .n_tokens = 31}, 1},
        {"beyond every bound",
         {.sequence = good.sequence, .tokens = ids, .n_tokens = UINT32_MAX},
         1},
        {"a negative token", {.sequence = good.sequence, .tokens = bad_ids, .n_tokens = 2}, 1},
        {"another model's sequence", {.sequence = other, .tokens = ids, .n_tokens = 1}, 1},
        {"no sequence", {.tokens = ids, .n_tokens = 1}, 1},
        {"pooling begun late",
         {.sequence = good.sequence, .tokens = ids, .n_tokens = 1, .wants = ROW_POOLED},
         1},
    };
    bad_ids[1] = -1;
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        rows[0] = rows[1] = cases[i].row;
        cr_expect_eq(engine_step_begin(bed.engine, bed.model, rows, cases[i].n_rows), -EINVAL, "%s",
                     cases[i].what);
    }
    bad_ids[1] = (int32_t)bed.n_vocab;
    rows[0] = good;
    rows[1] = (struct step_row){
        .sequence = test_sequence(bed.engine, bed.model, 2), .tokens = bad_ids, .n_tokens = 2};
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, rows, 2), -EINVAL);
    sequence_free(rows[1].sequence);

    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.used_bytes, used);
    cr_expect_eq(sequence_length(good.sequence), 40);
    test_step(bed.engine, bed.model, &good, 1);
    cr_expect(same(&bed, good.ret_values, expected));
    sequence_free(good.sequence);
    sequence_free(other);
    bed_done(&guest);
    bed_done(&bed);
}

/* Each row that is at fault says so, and none that is not. */
Test(engine, a_refused_step_names_its_bad_rows)
{
    int32_t ids[4] = {1, 2, 3, 4}, bad_ids[2] = {5, -1};
    struct step_row rows[5];
    struct bed bed;

    bed_scalar(&bed);
    for (uint32_t i = 0; i < 5; i++)
        rows[i] = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, 4),
                                    .tokens = ids,
                                    .n_tokens = 2,
                                    .wants = ROW_LOGITS};
    rows[1].tokens = bad_ids;
    rows[3].n_tokens = 5;
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, rows, 5), -EINVAL);
    for (uint32_t i = 0; i < 5; i++)
        cr_expect_eq(rows[i].error, i % 2 ? -EINVAL : 0, "row %u: %d", i, rows[i].error);
    sequence_free(rows[1].sequence);
    sequence_free(rows[3].sequence);
    rows[1] = rows[4];
    test_step(bed.engine, bed.model, rows, 3);
    for (uint32_t i = 0; i < 3; i++)
        sequence_free(rows[i].sequence);
    bed_done(&bed);
}

/* Memory that a step needs comes with its sequences: where there is none, they do not begin or do
 * not grow, and what had begun goes on. */
Test(engine, a_step_takes_no_memory)
{
    struct step_row rows[2] = {{.n_tokens = 1, .wants = ROW_LOGITS},
                               {.n_tokens = 1, .wants = ROW_POOLED}};
    struct model_plan plan = tiny_model_plan();
    struct engine_kv_stats kv;
    int32_t id = 7;
    struct bed bed;
    unsigned n;
    int r;

    plan.context = 2048;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    for (uint32_t i = 0; i < 2; i++) {
        n = 0;
        do {
            alloc_fail_at(++n);
            r = sequence_new(bed.engine, bed.model, 16, &rows[i].sequence);
            cr_assert(r == 0 || r == -ENOMEM);
            engine_kv_stats(bed.engine, &kv);
            cr_expect_eq(kv.sequences, i + (r == 0));
        } while (alloc_fail_done());
        cr_expect_eq(r, 0);
        cr_expect_gt(n, 2, "%u failures", n - 1);
        rows[i].tokens = &id;
    }
    for (uint32_t at = 0; at < 2000; at++) {
        for (uint32_t i = 0; i < 2; i++) {
            n = 0;
            do {
                alloc_fail_at(++n);
                r = sequence_reserve(rows[i].sequence, at + 1);
                cr_assert(r == 0 || r == -ENOMEM);
            } while (alloc_fail_done());
            cr_expect_eq(r, 0);
        }
        alloc_fail_at(1);
        r = engine_step_begin(bed.engine, bed.model, rows, 2);
        cr_assert_eq(r, 0, "at %u", at);
        while (at % 97 == 0 && engine_step_slice(bed.engine, bed.model) > 0)
            ;
        if (at % 97 == 0)
            engine_step_end(bed.engine, bed.model);
        else
            engine_step_abandon(bed.engine, bed.model);
        cr_expect_not(alloc_fail_done());
    }
    for (uint32_t i = 0; i < 2; i++)
        sequence_free(rows[i].sequence);
    bed_done(&bed);
}

Test(engine, columns_and_rows_of_a_step_are_bounded)
{
    static struct step_row rows[ENGINE_MAX_ROWS + 1];
    int32_t ids[3];
    struct bed bed;

    bed_scalar(&bed);
    fill_ids(ids, 3, 7, bed.n_vocab);
    for (uint32_t i = 0; i < ELEMENTSOF(rows); i++)
        rows[i] = (struct step_row){.sequence = test_sequence(bed.engine, bed.model, 3),
                                    .tokens = ids,
                                    .n_tokens = i < ENGINE_MAX_ROWS / 2 ? 1 : 3,
                                    .wants = ROW_LOGITS};
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, rows, ENGINE_MAX_ROWS), 0);
    while (engine_step_slice(bed.engine, bed.model) > 0)
        ;
    engine_step_end(bed.engine, bed.model);
    for (uint32_t i = 0; i < ELEMENTSOF(rows); i++)
        rows[i].n_tokens = i < ENGINE_MAX_ROWS / 2 ? 2 : 0;
    rows[ENGINE_MAX_ROWS].n_tokens = 3;
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, rows, ENGINE_MAX_ROWS + 1), -EINVAL);
    for (uint32_t i = 0; i < ELEMENTSOF(rows); i++)
        sequence_free(rows[i].sequence);
    bed_done(&bed);
}

/* ---- prefixes ---- */

#define LONG_TEXT 72u

static void prefix_bed(struct bed *bed)
{
    struct model_plan plan = tiny_model_plan();

    plan.context = 1024;
    bed_make(bed, test_kernels("scalar"), &plan, 1);
}

static int begin_text(struct bed *bed, uint32_t owner, const int32_t *ids, uint32_t n,
                      struct sequence **ret_sequence, struct prefix_wait *ret_wait)
{
    struct sequence_start start = {
        .reserve_tokens = n, .share = true, .owner = owner, .ids = ids, .n_ids = n};

    return sequence_begin(bed->engine, bed->model, &start, ret_sequence, ret_wait);
}

static struct sequence *begin_shared(struct bed *bed, uint32_t owner, const int32_t *ids,
                                     uint32_t n)
{
    struct sequence *sequence = NULL;
    struct prefix_wait wait;

    cr_assert_eq(begin_text(bed, owner, ids, n, &sequence, &wait), 0);
    return sequence;
}

/* Feeds what the sequence does not have; a copy of the logits after the last. */
static float *finish_text(struct bed *bed, struct sequence *sequence, const int32_t *ids,
                          uint32_t n, uint32_t chunk)
{
    uint32_t have = sequence_length(sequence);
    float *copy = malloc(bed->n_vocab * sizeof(*copy));

    memcpy(copy, test_feed(bed->engine, bed->model, sequence, ids + have, n - have, chunk),
           bed->n_vocab * sizeof(*copy));
    return copy;
}

static uint64_t prefix_bytes(const struct bed *bed)
{
    struct engine_kv_stats kv;

    engine_kv_stats(bed->engine, &kv);
    return kv.prefix_bytes;
}

/* Every length around the tiles: the logits after a hit are those of a text computed whole, and all
 * but the last id's tile is a hit. */
Test(engine, a_kept_prefix_gives_the_same_logits)
{
    int32_t ids[LONG_TEXT];
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    for (uint32_t n = 1; n <= LONG_TEXT; n++) {
        struct sequence *sequence = test_sequence(bed.engine, bed.model, n);
        float *alone = finish_text(&bed, sequence, ids, n, n), *shared;

        sequence_free(sequence);
        for (uint32_t time = 0; time < 2; time++) {
            sequence = begin_shared(&bed, 7, ids, n);
            if (time == 1)
                cr_expect_eq(sequence_length(sequence), (n - 1) / KV_TILE * KV_TILE);
            shared = finish_text(&bed, sequence, ids, n, 5);
            cr_expect_eq(memcmp(alone, shared, bed.n_vocab * sizeof(*alone)), 0, "%u ids", n);
            free(shared);
            sequence_retire(sequence, ids);
        }
        free(alone);
    }
    bed_done(&bed);
}

/* Texts that part in the middle of a tile share the tiles before it. */
Test(engine, texts_that_part_share_what_comes_before)
{
    int32_t ids[LONG_TEXT], other[LONG_TEXT];
    struct sequence *sequence;
    float *alone, *shared;
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    memcpy(other, ids, sizeof(other));
    other[40] = (other[40] + 1) % (int32_t)bed.n_vocab;
    sequence = test_sequence(bed.engine, bed.model, LONG_TEXT);
    alone = finish_text(&bed, sequence, other, LONG_TEXT, LONG_TEXT);
    sequence_free(sequence);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    free(finish_text(&bed, sequence, ids, LONG_TEXT, LONG_TEXT));
    /* while the first still lives */
    struct sequence *second = begin_shared(&bed, 7, other, LONG_TEXT);
    cr_expect_eq(sequence_length(second), 32);
    shared = finish_text(&bed, second, other, LONG_TEXT, 16);
    cr_expect_eq(memcmp(alone, shared, bed.n_vocab * sizeof(*alone)), 0);
    sequence_retire(sequence, ids);
    sequence_retire(second, other);
    free(alone);
    free(shared);
    bed_done(&bed);
}

/* What was generated is a prefix too: the next turn of a chat finds it. */
Test(engine, the_whole_of_an_ended_text_is_kept)
{
    int32_t ids[LONG_TEXT];
    struct sequence *sequence;
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    sequence = begin_shared(&bed, 7, ids, 10);
    cr_expect_eq(sequence_reserve(sequence, 50), 0);
    free(finish_text(&bed, sequence, ids, 50, 1));
    sequence_retire(sequence, ids);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    cr_expect_eq(sequence_length(sequence), 48);
    sequence_free(sequence);
    bed_done(&bed);
}

Test(engine, owners_do_not_see_each_others_prefixes)
{
    int32_t ids[LONG_TEXT];
    struct sequence *sequence;
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    free(finish_text(&bed, sequence, ids, LONG_TEXT, LONG_TEXT));
    sequence_retire(sequence, ids);
    sequence = begin_shared(&bed, 8, ids, LONG_TEXT);
    cr_expect_eq(sequence_length(sequence), 0);
    sequence_free(sequence);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    cr_expect_eq(sequence_length(sequence), 64);
    sequence_free(sequence);
    bed_done(&bed);
}

/* Of two that begin alike the second is told to wait, tile by tile, until the first has computed
 * it or is gone. */
Test(engine, a_prefix_in_the_making_is_waited_for)
{
    struct sequence *maker, *second = NULL;
    struct prefix_wait wait, far;
    int32_t ids[LONG_TEXT], near[LONG_TEXT];
    struct step_row row;
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    memcpy(near, ids, sizeof(near));
    near[20] = (near[20] + 1) % (int32_t)bed.n_vocab;
    maker = begin_shared(&bed, 7, ids, LONG_TEXT);
    cr_expect_eq(begin_text(&bed, 7, near, LONG_TEXT, &second, &wait), -EBUSY);
    cr_expect_eq(begin_text(&bed, 7, ids, LONG_TEXT, &second, &far), -EBUSY);
    cr_expect_not(prefix_wait_over(&wait));
    row = (struct step_row){.sequence = maker, .tokens = ids, .n_tokens = 17};
    test_step(bed.engine, bed.model, &row, 1);
    cr_expect(prefix_wait_over(&wait));
    cr_expect_not(prefix_wait_over(&far));
    cr_assert_eq(begin_text(&bed, 7, near, LONG_TEXT, &second, &wait), 0);
    cr_expect_eq(sequence_length(second), 16);
    maker = sequence_free(maker);
    cr_expect(prefix_wait_over(&far));
    sequence_free(second);
    second = begin_shared(&bed, 7, ids, LONG_TEXT);
    cr_expect_eq(sequence_length(second), 16);
    sequence_free(second);
    bed_done(&bed);
}

/* Prefixes fill what is left of the budget and give way, the one longest unused first, and never
 * its end after its beginning. */
Test(engine, unused_prefixes_give_way)
{
    struct engine_options options = {.threads = 1, .kv_budget_bytes = 2 << 20};
    struct engine_kv_stats kv;
    struct sequence *sequence, *all[64] = {0};
    int32_t ids[4 * KV_TILE];
    uint32_t n_kept = 0, n = ELEMENTSOF(ids), most;
    struct bed bed;

    prefix_bed(&bed);
    engine_free(bed.engine);
    options.kernels = bed.kernels;
    cr_assert_eq(engine_new(&options, &bed.engine, NULL), 0);
    for (uint32_t text = 0; text < 1000; text++) {
        fill_ids(ids, n, text, bed.n_vocab);
        sequence = begin_shared(&bed, 7, ids, n);
        cr_expect_eq(sequence_length(sequence), 0);
        free(finish_text(&bed, sequence, ids, n, n));
        sequence_retire(sequence, ids);
    }
    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.used_bytes, 0);
    cr_expect_gt(kv.prefix_bytes, kv.budget_bytes / 2);
    most = (uint32_t)(kv.budget_bytes / (n * model_info(bed.model)->kv_token_bytes));
    for (uint32_t text = 1000; text-- > 0;) {
        fill_ids(ids, n, text, bed.n_vocab);
        sequence = begin_shared(&bed, 7, ids, n);
        if (sequence_length(sequence) < 3 * KV_TILE) {
            sequence_free(sequence);
            break;
        }
        n_kept++;
        sequence_free(sequence);
    }
    cr_expect_geq(n_kept, most - 1, "%u of the %u latest texts are left", n_kept, most);
    /* sequences get all of it, but for what is less than one of them */
    for (uint32_t i = 0; i < ELEMENTSOF(all); i++)
        if (sequence_new(bed.engine, bed.model, 1024, &all[i]) < 0)
            break;
    cr_expect_eq(prefix_bytes(&bed), 0);
    for (uint32_t i = 0; i < ELEMENTSOF(all); i++)
        sequence_free(all[i]);
    bed_done(&bed);
}

/* A model in another engine, and one that goes before its engine: no page is lost. */
Test(engine, prefixes_go_with_their_model)
{
    struct engine_kv_stats kv;
    struct sequence *sequence;
    struct engine *other;
    int32_t ids[LONG_TEXT];
    struct bed bed;

    prefix_bed(&bed);
    other = test_engine(bed.kernels, 1, false);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    free(finish_text(&bed, sequence, ids, LONG_TEXT, LONG_TEXT));
    sequence_retire(sequence, ids);
    cr_expect_gt(prefix_bytes(&bed), 0);
    sequence = test_sequence(other, bed.model, 4);
    cr_expect_eq(prefix_bytes(&bed), 0);
    sequence_free(sequence);
    sequence = begin_shared(&bed, 7, ids, LONG_TEXT);
    free(finish_text(&bed, sequence, ids, LONG_TEXT, LONG_TEXT));
    sequence_retire(sequence, ids);
    engine_forget_prefixes(bed.engine, bed.model);
    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.prefix_bytes + kv.used_bytes, 0);
    engine_free(other);
    bed_done(&bed);
}

/* Whatever is shared, taken up again or given back: the payers hold together what is used. */
Test(engine, every_page_in_use_has_one_payer)
{
    struct sequence *live[6] = {NULL};
    struct kv_account accounts[2] = {{0}};
    int32_t ids[3][LONG_TEXT];
    struct engine_kv_stats kv;
    struct bed bed;

    prefix_bed(&bed);
    for (uint32_t i = 0; i < 3; i++) {
        fill_ids(ids[i], LONG_TEXT, i == 2 ? 1 : 0, bed.n_vocab);
        ids[1][LONG_TEXT - 8] = 1; /* parts from the first in its fourth tile */
    }
    for (uint32_t round = 0; round < 60; round++) {
        uint32_t at = round % ELEMENTSOF(live), text = at % 3, payer = round % 2;
        struct sequence_start start = {.reserve_tokens = LONG_TEXT - round % 5,
                                       .share = round % 4 > 0,
                                       .owner = round % 8 == 1 ? 1 : 0,
                                       .account = &accounts[payer],
                                       .ids = ids[text],
                                       .n_ids = LONG_TEXT - round % 5};
        struct prefix_wait wait;

        /* Some leave prefixes, some do not, some before they are computed. */
        live[at] = round % 3 ? sequence_free(live[at]) : sequence_retire(live[at], ids[text]);
        if (sequence_begin(bed.engine, bed.model, &start, &live[at], &wait) == 0 && round % 5)
            free(finish_text(&bed, live[at], ids[text], start.n_ids, 16));
        engine_kv_stats(bed.engine, &kv);
        cr_assert_eq(accounts[0].bytes + accounts[1].bytes, kv.used_bytes, "round %u", round);
    }
    for (uint32_t i = 0; i < ELEMENTSOF(live); i++)
        sequence_free(live[i]);
    cr_expect(accounts[0].bytes == 0 && accounts[1].bytes == 0);
    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.used_bytes, 0);
    cr_expect_gt(kv.prefix_bytes, 0);
    bed_done(&bed);
}

/* A text grows past its reservation, page by page, with the logits of one that had it all. */
Test(engine, a_sequence_grows)
{
    struct sequence *whole, *grown;
    int32_t ids[LONG_TEXT];
    float *one, *two;
    struct bed bed;

    prefix_bed(&bed);
    fill_ids(ids, LONG_TEXT, 3, bed.n_vocab);
    whole = test_sequence(bed.engine, bed.model, LONG_TEXT);
    one = finish_text(&bed, whole, ids, LONG_TEXT, LONG_TEXT);
    grown = test_sequence(bed.engine, bed.model, 1);
    for (uint32_t n = 1; n < LONG_TEXT; n++) {
        cr_expect_eq(sequence_reserve(grown, n), 0);
        test_feed(bed.engine, bed.model, grown, ids + n - 1, 1, 1);
        cr_expect_geq(sequence_room(grown), n);
        cr_expect_lt(sequence_room(grown), n + KV_TILE);
    }
    cr_expect_eq(sequence_reserve(grown, LONG_TEXT), 0);
    two = finish_text(&bed, grown, ids, LONG_TEXT, 1);
    cr_expect_eq(memcmp(one, two, bed.n_vocab * sizeof(*one)), 0);
    sequence_free(whole);
    sequence_free(grown);
    free(one);
    free(two);
    bed_done(&bed);
}

/* ---- KV memory ---- */

/* Sequences until the pool is empty; one that goes makes room for one. */
Test(engine, exhausted_pages_are_again_there_when_given_back)
{
    struct sequence *sequences[4096];
    struct model_plan plan = tiny_model_plan();
    struct engine_kv_stats kv;
    uint32_t n = 0;
    struct bed bed;
    int r = 0;

    plan.context = 4096;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    while (n < ELEMENTSOF(sequences)) {
        r = sequence_new(bed.engine, bed.model, 4096, &sequences[n]);
        if (r < 0)
            break;
        n++;
    }
    cr_expect_eq(r, -EAGAIN);
    cr_expect_gt(n, 1);
    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.sequences, n);
    cr_expect_leq(kv.used_bytes, kv.budget_bytes);
    cr_expect_geq(kv.used_bytes, n * 4096 * model_info(bed.model)->kv_token_bytes);
    sequences[0] = sequence_free(sequences[0]);
    cr_expect_eq(sequence_new(bed.engine, bed.model, 4096, &sequences[0]), 0);
    for (uint32_t i = 0; i < n; i++)
        sequence_free(sequences[i]);
    engine_kv_stats(bed.engine, &kv);
    cr_expect_eq(kv.used_bytes, 0);
    cr_expect_eq(kv.sequences, 0);
    bed_done(&bed);
}

static struct model_memory memory_of(const struct model *model)
{
    struct model_memory memory;

    model_memory(model, &memory);
    return memory;
}

/* Two models in one engine, one of which keeps prefixes: each has what is its own. */
Test(engine, each_model_s_memory_is_counted)
{
    struct sequence_start start = {.reserve_tokens = 64, .share = true, .pools = true};
    struct model_plan plan = tiny_model_plan();
    struct sequence *sequence = NULL, *other;
    struct engine_kv_stats kv;
    struct model *second;
    int32_t ids[128];
    struct bed bed;

    bed_scalar(&bed);
    plan.layers++;
    struct gguf_source source = make_source(&plan);
    second = test_model(bed.kernels, source);
    cr_expect_eq(memory_of(second).scratch_bytes + memory_of(second).kv_bytes, 0);
    fill_ids(ids, 128, 1, bed.n_vocab);
    start.ids = ids;
    start.n_ids = 64;
    cr_assert_eq(sequence_begin(bed.engine, bed.model, &start, &sequence, NULL), 0);
    other = test_sequence(bed.engine, second, 128);
    cr_expect_eq(memory_of(bed.model).kv_bytes, sequence_bytes(sequence));
    cr_expect_eq(memory_of(second).kv_bytes, sequence_bytes(other));
    test_feed(bed.engine, bed.model, sequence, ids, 64, 64);
    sequence_retire(sequence, ids);
    sequence_free(other);
    engine_kv_stats(bed.engine, &kv);
    cr_expect_gt(kv.prefix_bytes, 0);
    cr_expect_eq(memory_of(bed.model).kv_bytes, kv.prefix_bytes);
    cr_expect_eq(memory_of(second).kv_bytes, 0);
    engine_forget_prefixes(bed.engine, bed.model);
    cr_expect_eq(memory_of(bed.model).kv_bytes, 0);
    model_free(second);
    free((void *)source.memory);
    bed_done(&bed);
}

/* What of the process's memory is there. */
static uint64_t resident_bytes(void)
{
    unsigned long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");

    cr_assert(statm && fscanf(statm, "%*u %lu", &pages) == 1);
    fclose(statm);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* A width that is new takes memory, and as much as is said; one that was there before takes none.
 */
Test(engine, a_model_s_scratch_is_what_its_widest_step_has_touched)
{
    static const uint32_t widths[] = {1, 50, 500};
    struct model_plan plan = tiny_model_plan();
    struct sequence *sequence;
    int32_t ids[500];
    struct bed bed;

    plan.ff = 2048;
    plan.context = 512;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    fill_ids(ids, 500, 1, bed.n_vocab);
    for (size_t i = 0; i < ELEMENTSOF(widths); i++) {
        sequence = test_sequence(bed.engine, bed.model, 500);
        uint64_t before = memory_of(bed.model).scratch_bytes, here = resident_bytes();
        test_feed(bed.engine, bed.model, sequence, ids, widths[i], widths[i]);
        uint64_t more = memory_of(bed.model).scratch_bytes - before;
        uint64_t step =
            (widths[i] - (i > 0 ? widths[i - 1] : 0)) * model_info(bed.model)->step_token_bytes;
        if (i > 0) /* the first has small things beside, and pages that are not full */
            cr_expect(more > step * 9 / 10 && more < step * 11 / 10,
                      "%lu bytes more at width %u, %lu were foretold", (unsigned long)more,
                      widths[i], (unsigned long)step);
        here = resident_bytes() - here;
        if (widths[i] == 500) /* enough to tell it from all else */
            cr_expect(here > more * 9 / 10 && here < more * 5 / 4, "%lu KiB said, %lu taken",
                      (unsigned long)more >> 10, (unsigned long)here >> 10);
        sequence_free(sequence);
        before = memory_of(bed.model).scratch_bytes;
        sequence = test_sequence(bed.engine, bed.model, 500);
        test_feed(bed.engine, bed.model, sequence, ids, widths[i], widths[i]);
        cr_expect_eq(memory_of(bed.model).scratch_bytes, before, "again at %u", widths[i]);
        sequence_free(sequence);
    }
    bed_done(&bed);
}

#define KEPT (16u << 20)

Test(engine, a_model_at_rest_gives_back_what_wide_steps_took)
{
    struct model_plan plan = tiny_model_plan();
    struct sequence *sequence;
    uint64_t wide, narrow, here;
    float first[64];
    int32_t ids[500];
    struct bed bed;

    plan.ff = 4096;
    plan.context = 512;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    fill_ids(ids, 500, 1, bed.n_vocab);
    for (uint32_t round = 0; round < 2; round++) { /* the second finds zeros where the first was */
        sequence = test_sequence(bed.engine, bed.model, 500);
        float *logits = test_feed(bed.engine, bed.model, sequence, ids, 500, 500);
        if (round > 0)
            cr_expect_arr_eq(logits, first, sizeof(first));
        memcpy(first, logits, sizeof(first));
        sequence_free(sequence);
        wide = memory_of(bed.model).scratch_bytes;
        cr_assert_gt(wide, KEPT, "the test shows nothing");
        here = resident_bytes();
        engine_shrink_scratch(bed.model, KEPT);
        narrow = memory_of(bed.model).scratch_bytes;
        cr_expect_lt(narrow, 1u << 20);
        cr_expect_gt(here - resident_bytes(), (wide - narrow) * 9 / 10);
    }
    sequence = test_sequence(bed.engine, bed.model, 500);
    test_feed(bed.engine, bed.model, sequence, ids, 100, 100);
    sequence_free(sequence);
    narrow = memory_of(bed.model).scratch_bytes;
    engine_shrink_scratch(bed.model, KEPT);
    cr_expect_eq(memory_of(bed.model).scratch_bytes, narrow, "so much it keeps");
    engine_shrink_scratch(bed.model, 0);
    cr_expect_eq(memory_of(bed.model).activation_bytes, 0);
    cr_expect_lt(memory_of(bed.model).scratch_bytes, 1u << 20);
    bed_done(&bed);
}

Test(engine, a_reservation_beyond_the_budget_is_refused_for_good)
{
    struct engine_options options = {.threads = 1, .kv_budget_bytes = 2 << 20};
    struct model_plan plan = tiny_model_plan();
    struct sequence *sequence = NULL;
    struct engine *engine = NULL;
    struct bed bed;

    plan.context = 65536;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    options.kernels = bed.kernels;
    cr_assert_eq(engine_new(&options, &engine, NULL), 0);
    cr_expect_eq(sequence_new(engine, bed.model, 65536, &sequence), -ENOSPC);
    cr_expect_eq(sequence_new(engine, bed.model, 16, &sequence), 0);
    sequence_free(sequence);
    engine_free(engine);
    options.kv_budget_bytes = 1000;
    struct fault fault = {0};
    cr_expect_eq(engine_new(&options, &engine, &fault), -EINVAL);
    cr_expect(strstr(fault.text, "1000"), "%s", fault.text);
    bed_done(&bed);
}

Test(engine, a_reservation_is_capped_at_the_context)
{
    struct sequence *sequence;
    struct step_row row = {.n_tokens = 1};
    int32_t ids[128];
    struct bed bed;

    bed_scalar(&bed);
    fill_ids(ids, 128, 1, bed.n_vocab);
    sequence = test_sequence(bed.engine, bed.model, UINT32_MAX);
    test_feed(bed.engine, bed.model, sequence, ids, 128, 64);
    row.sequence = sequence;
    row.tokens = ids;
    cr_expect_eq(engine_step_begin(bed.engine, bed.model, &row, 1), -EINVAL);
    sequence_free(sequence);
    bed_done(&bed);
}

/* ---- loading ---- */

Test(engine, a_load_tells_what_it_found)
{
    struct model_plan plan = plan_of(PLAN_Q4_K_M);
    const struct model_info *info;
    struct bed bed;

    plan.tied = true;
    bed_make(&bed, test_kernels("scalar"), &plan, 1);
    info = model_info(bed.model);
    cr_expect_str_eq(info->architecture, "llama");
    cr_expect_eq(info->n_vocab, plan.vocab);
    cr_expect_eq(info->n_embd, plan.dim);
    cr_expect_eq(info->n_layers, plan.layers);
    cr_expect_eq(info->n_heads, plan.heads);
    cr_expect_eq(info->n_kv_heads, plan.kv_heads);
    cr_expect_eq(info->n_ff, plan.ff);
    cr_expect_eq(info->context_tokens, plan.context);
    cr_expect(strstr(info->types, "Q4_K") && strstr(info->types, "Q6_K"), "%s", info->types);
    cr_expect_gt(info->weight_bytes, 0);
    cr_expect_gt(info->other_bytes, 0);
    cr_expect_eq(tokenizer_n_vocab(model_tokenizer(bed.model)), plan.vocab);
    bed_done(&bed);
}

Test(engine, a_smaller_context_can_be_asked_for)
{
    struct model_load_options options = {.kernels = test_kernels("scalar"), .context_tokens = 48};
    struct model_plan plan = tiny_model_plan();
    struct gguf_source source = make_source(&plan);
    struct model *model = NULL;

    cr_assert_eq(model_load(&source, &options, NULL, &model, NULL), 0);
    cr_expect_eq(model_info(model)->context_tokens, 48);
    model_free(model);
    options.context_tokens = 1u << 30; /* the model's own is the most it was made for */
    cr_assert_eq(model_load(&source, &options, NULL, &model, NULL), 0);
    cr_expect_eq(model_info(model)->context_tokens, plan.context);
    model_free(model);
    free((void *)source.memory);
}

struct watch {
    struct model_progress *progress;
    uint64_t last;
    uint32_t calls, cancel_at;
};

static void watch_pause(void *userdata)
{
    struct watch *watch = userdata;
    uint64_t done = atomic_load(&watch->progress->done_bytes);

    cr_assert_geq(done, watch->last);
    cr_assert_leq(done, atomic_load(&watch->progress->total_bytes));
    watch->last = done;
    if (++watch->calls == watch->cancel_at)
        atomic_store(&watch->progress->cancel, true);
}

Test(engine, progress_rises_to_the_total)
{
    struct model_load_options options = {.kernels = test_kernels("scalar")};
    struct model_plan plan = plan_of(PLAN_Q4_K_M);
    struct gguf_source source = make_source(&plan);
    struct model_progress progress = {.pause = watch_pause};
    struct watch watch = {.progress = &progress};
    struct model *model = NULL;

    progress.pause_userdata = &watch;
    cr_assert_eq(model_load(&source, &options, &progress, &model, NULL), 0);
    cr_expect_gt(watch.calls, 10);
    cr_expect_gt(atomic_load(&progress.total_bytes), 0);
    cr_expect_eq(atomic_load(&progress.done_bytes), atomic_load(&progress.total_bytes));
    model_free(model);
    free((void *)source.memory);
}

/* Cancelled after any number of pieces a load ends, with nothing left behind. */
Test(engine, a_load_can_be_cancelled_between_pieces)
{
    struct model_load_options options = {.kernels = test_kernels("scalar")};
    struct model_plan plan = tiny_model_plan();
    struct gguf_source source = make_source(&plan);

    for (uint32_t at = 1; at < 12; at++) {
        struct model_progress progress = {.pause = watch_pause};
        struct watch watch = {.progress = &progress, .cancel_at = at};
        struct model *model = NULL;
        struct fault fault = {0};

        progress.pause_userdata = &watch;
        cr_expect_eq(model_load(&source, &options, &progress, &model, &fault), -ECANCELED);
        cr_expect_null(model);
        cr_expect_eq(watch.calls, at);
    }
    free((void *)source.memory);
}

/* A file that became shorter than its header says, at any length. */
Test(engine, truncated_files_are_refused)
{
    struct model_load_options options = {.kernels = test_kernels("scalar")};
    struct model_plan plan = tiny_model_plan();
    struct gguf_source source = make_source(&plan);
    uint64_t size = source.size;

    for (uint64_t left = 0; left < size; left += 1 + size / 97) {
        struct model *model = NULL;
        struct fault fault = {0};

        source.size = left;
        cr_expect_eq(model_load(&source, &options, NULL, &model, &fault), -EBADMSG, "%lu of %lu",
                     (unsigned long)left, (unsigned long)size);
        cr_expect_neq(fault.text[0], '\0');
    }
    free((void *)source.memory);
}

/* Any byte of the header changed: an error or a model that can be stepped, never a crash. */
Test(engine, damaged_headers_are_refused_or_harmless)
{
    struct model_load_options options = {.kernels = test_kernels("scalar")};
    struct model_plan plan = tiny_model_plan();
    struct gguf_source source = make_source(&plan);
    uint8_t *bytes = (uint8_t *)source.memory;
    struct engine *engine = test_engine(options.kernels, 1, false);
    const int32_t ids[] = {1, 2, 3};

    for (size_t at = 0; at < 2200; at++) {
        struct sequence *sequence = NULL;
        struct model *model = NULL;
        uint8_t before = bytes[at];

        bytes[at] ^= (uint8_t)(1u << at % 8);
        if (model_load(&source, &options, NULL, &model, NULL) == 0) {
            if (sequence_new(engine, model, 3, &sequence) == 0)
                test_feed(engine, model, sequence, ids, 3, 3);
            sequence_free(sequence);
            model_free(model);
        }
        bytes[at] = before;
    }
    engine_free(engine);
    free(bytes);
}
