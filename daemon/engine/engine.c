#include "daemon/engine/engine.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "daemon/engine/model.h"
#include "lib/cleanup.h"

int engine_new(const struct engine_options *options, struct engine **ret_engine,
               struct fault *ret_fault)
{
    struct engine *engine = calloc(1, sizeof(*engine));
    int r;

    if (!engine)
        return fault_set(ret_fault, -ENOMEM, "no memory for the engine");
    engine->options = *options;
    r = kv_pool_new(options->kv_budget_bytes, &engine->pool, ret_fault);
    if (r == 0)
        r = team_new(options->threads, &engine->team, ret_fault);
    if (r < 0) {
        engine_free(engine);
        return r;
    }
    *ret_engine = engine;
    return 0;
}

struct engine *engine_free(struct engine *engine)
{
    if (!engine)
        return NULL;
    assert(engine->n_sequences == 0);
    engine->team = team_free(engine->team);
    engine->pool = kv_pool_free(engine->pool);
    free(engine->scratch);
    free(engine);
    return NULL;
}

const struct kernel_table *engine_kernels(const struct engine *engine)
{
    return engine->options.kernels;
}

uint32_t engine_threads(const struct engine *engine)
{
    return team_threads(engine->team);
}

void engine_kv_stats(const struct engine *engine, struct engine_kv_stats *ret_stats)
{
    *ret_stats = (struct engine_kv_stats){
        .budget_bytes = kv_pool_budget_bytes(engine->pool),
        .used_bytes = kv_pool_used_bytes(engine->pool),
        .sequences = engine->n_sequences,
    };
}

/* ---- sequences ---- */

/* A model's pages come from the engine whose sequences it has; it may go to another when it has
 * none. */
static int model_bind(struct model *model, struct engine *engine)
{
    if (model->engine == engine && model->n_sequences > 0)
        return 0;
    if (model->n_sequences > 0 || model->kernels != engine->options.kernels)
        return -EINVAL;
    model->engine = engine;
    model->kv_shape = (struct kv_shape){
        .n_kv_heads = model->hparams.n_kv_heads,
        .head_dim = model->hparams.head_dim,
        .f32 = engine->options.kv_f32,
    };
    kv_space_init(&model->kv, engine->pool, model->kernels->kv_page_bytes(&model->kv_shape));
    return 0;
}

/* An idle sequence, or a new one; with room for n_pages. */
static struct sequence *sequence_find(struct model *model, uint32_t n_pages)
{
    struct sequence *sequence = model->idle;
    void **pages;

    if (!sequence) {
        sequence = calloc(1, sizeof(*sequence));
        if (!sequence)
            return NULL;
        sequence->model = model;
        sequence->next_idle = NULL;
        model->idle = sequence;
    }
    if (n_pages > sequence->n_pages_room) {
        pages = realloc(sequence->pages, n_pages * sizeof(*pages));
        if (!pages)
            return NULL;
        sequence->pages = pages;
        sequence->n_pages_room = n_pages;
    }
    return sequence;
}

int sequence_new(struct engine *engine, struct model *model, uint32_t reserve_tokens,
                 struct sequence **ret_sequence)
{
    uint32_t reserved = MIN(MAX(reserve_tokens, 1u), model->context_tokens);
    uint32_t n_tiles = (reserved + KV_TILE - 1) / KV_TILE;
    uint64_t n_pages = (uint64_t)n_tiles * model->hparams.n_layers;
    struct sequence *sequence;
    int r;

    r = model_bind(model, engine);
    if (r < 0)
        return r;
    if (n_pages * model->kv.page_bytes > kv_pool_budget_bytes(engine->pool))
        return -ENOSPC;
    sequence = sequence_find(model, (uint32_t)n_pages);
    if (!sequence)
        return -ENOMEM;
    r = kv_take(&model->kv, (uint32_t)n_pages, sequence->pages);
    if (r < 0)
        return r;
    model->idle = sequence->next_idle;
    sequence->engine = engine;
    sequence->length = 0;
    sequence->pooled_length = 0;
    sequence->reserved_tokens = reserved;
    sequence->n_tiles = n_tiles;
    sequence->n_pages = (uint32_t)n_pages;
    model->n_sequences++;
    engine->n_sequences++;
    *ret_sequence = sequence;
    return 0;
}

struct sequence *sequence_free(struct sequence *sequence)
{
    struct model *model;

    if (!sequence)
        return NULL;
    assert(!sequence->in_step);
    model = sequence->model;
    kv_give(&model->kv, sequence->n_pages, sequence->pages);
    sequence->n_pages = 0;
    sequence->engine->n_sequences--;
    model->n_sequences--;
    sequence->next_idle = model->idle;
    model->idle = sequence;
    return NULL;
}

uint32_t sequence_length(const struct sequence *sequence)
{
    return sequence->length;
}

void model_drop_sequences(struct model *model)
{
    struct sequence *next;

    assert(model->n_sequences == 0);
    for (struct sequence *sequence = model->idle; sequence; sequence = next) {
        next = sequence->next_idle;
        free(sequence->pages);
        free(sequence->pooled);
        free(sequence);
    }
    model->idle = NULL;
}

/* ---- rotary table ---- */

int rope_reach(struct model *model, uint32_t n_positions)
{
    struct rope_table *table = &model->rope;
    uint32_t n_rot = model->hparams.n_rot;
    float *values;

    if (n_positions <= table->n_positions)
        return 0;
    if (n_positions > table->n_room) {
        uint32_t room = MIN(MAX(2 * table->n_room, MAX(n_positions, 64u)), model->context_tokens);

        values = realloc(table->values, (size_t)room * n_rot * sizeof(float));
        if (!values)
            return -ENOMEM;
        table->values = values;
        table->n_room = room;
    }
    for (uint32_t p = table->n_positions; p < n_positions; p++) {
        float *cosines = table->values + (size_t)p * n_rot, *sines = cosines + n_rot / 2;

        for (uint32_t i = 0; i < n_rot / 2; i++) {
            double angle = p * model->rope_frequencies[i];

            cosines[i] = (float)cos(angle);
            sines[i] = (float)sin(angle);
        }
    }
    table->n_positions = n_positions;
    return 0;
}
