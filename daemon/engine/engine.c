#include "daemon/engine/engine.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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
    prefix_cache_done(&engine->prefixes);
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
        .used_bytes = kv_pool_used_bytes(engine->pool) - engine->prefixes.unused_bytes,
        .prefix_bytes = engine->prefixes.unused_bytes,
        .sequences = engine->n_sequences,
    };
}

/* ---- sequences ---- */

static struct kv_shape kv_shape_of(const struct engine *engine, const struct model *model)
{
    return (struct kv_shape){
        .n_kv_heads = model->hparams.n_kv_heads,
        .head_dim = model->hparams.head_dim,
        .f32 = engine->options.kv_f32,
    };
}

/* A model's pages come from the engine whose sequences or prefixes it has; it may go to another
 * when it has no sequences. */
static int model_bind(struct model *model, struct engine *engine)
{
    if (model->engine == engine && (model->n_sequences > 0 || model->n_prefixes > 0))
        return 0;
    if (model->n_sequences > 0 || model->kernels != engine->options.kernels)
        return -EINVAL;
    if (model->n_prefixes > 0)
        prefix_forget(&model->engine->prefixes, model);
    model->engine = engine;
    model->kv_shape = kv_shape_of(engine, model);
    kv_space_init(&model->kv, engine->pool, model->kernels->kv_page_bytes(&model->kv_shape));
    return 0;
}

/* Room for the pointers of n_tiles; those it has stay, in places that may be others. */
static int sequence_widen(struct sequence *sequence, uint32_t n_tiles)
{
    uint32_t n_layers = sequence->model->hparams.n_layers, stride;
    void **pages;

    if (n_tiles <= sequence->tile_stride)
        return 0;
    stride = MAX(n_tiles, 2 * sequence->tile_stride);
    pages = realloc(sequence->pages, (size_t)stride * n_layers * sizeof(*pages));
    if (!pages)
        return -ENOMEM;
    for (uint32_t layer = n_layers; layer-- > 1;)
        memmove(pages + (size_t)layer * stride, pages + (size_t)layer * sequence->tile_stride,
                sequence->n_tiles * sizeof(*pages));
    model_count_scratch(sequence->model,
                        (uint64_t)(stride - sequence->tile_stride) * n_layers * sizeof(*pages));
    sequence->pages = pages;
    sequence->tile_stride = stride;
    return 0;
}

static uint64_t bytes_of_tiles(const struct model *model, uint32_t n_tiles)
{
    return (uint64_t)n_tiles * model->hparams.n_layers * model->kv.page_bytes;
}

static void give_tiles(struct sequence *sequence, uint32_t first, uint32_t n_tiles)
{
    struct model *model = sequence->model;

    if (first == n_tiles)
        return; /* one that could not begin has no room for pages */
    for (uint32_t layer = model->hparams.n_layers; layer-- > 0;)
        kv_give(&model->kv, n_tiles - first,
                sequence->pages + (size_t)layer * sequence->tile_stride + first);
    sequence->account->bytes -= bytes_of_tiles(model, n_tiles - first);
}

/* Pages of all layers for the tiles from n_tiles on: all or none. */
static int take_tiles(struct sequence *sequence, uint32_t n_tiles)
{
    struct model *model = sequence->model;
    uint32_t first = sequence->n_tiles;

    for (uint32_t layer = 0; layer < model->hparams.n_layers; layer++) {
        void **pages = sequence->pages + (size_t)layer * sequence->tile_stride + first;
        int r = kv_take(&model->kv, n_tiles - first, pages);
        if (r < 0) {
            while (layer-- > 0)
                kv_give(&model->kv, n_tiles - first,
                        sequence->pages + (size_t)layer * sequence->tile_stride + first);
            return r;
        }
    }
    sequence->account->bytes += bytes_of_tiles(model, n_tiles - first);
    sequence->n_tiles = n_tiles;
    return 0;
}

static uint32_t tiles_of(uint32_t n_tokens)
{
    return n_tokens / KV_TILE + (n_tokens % KV_TILE > 0);
}

/* Whether the whole budget would hold so many positions of the model. */
static bool budget_holds(const struct model *model, uint32_t n_tokens)
{
    return (uint64_t)tiles_of(n_tokens) * model->hparams.n_layers <= kv_space_most(&model->kv);
}

uint64_t engine_kv_bytes(const struct engine *engine, const struct model *model, uint32_t n_tokens)
{
    struct kv_shape shape = kv_shape_of(engine, model);

    return (uint64_t)tiles_of(MIN(n_tokens, model->context_tokens)) * model->hparams.n_layers *
           model->kernels->kv_page_bytes(&shape);
}

uint32_t engine_context_tokens(const struct engine *engine, const struct model *model)
{
    struct kv_shape shape = kv_shape_of(engine, model);
    struct kv_space space;
    uint64_t n_tiles;

    kv_space_init(&space, engine->pool, model->kernels->kv_page_bytes(&shape));
    n_tiles = kv_space_most(&space) / model->hparams.n_layers;
    return n_tiles < model->context_tokens / KV_TILE ? (uint32_t)n_tiles * KV_TILE
                                                     : model->context_tokens;
}

int sequence_reserve(struct sequence *sequence, uint32_t n_tokens)
{
    struct model *model = sequence->model;
    uint32_t reserved = MIN(MAX(n_tokens, 1u), model->context_tokens);
    uint32_t n_tiles = tiles_of(reserved);
    uint64_t bytes;
    int r = step_reserve(sequence->engine, model, reserved);

    if (r < 0)
        return r;
    if (n_tiles > sequence->n_tiles) {
        if (!budget_holds(model, reserved))
            return -ENOSPC;
        r = sequence_widen(sequence, n_tiles);
        if (r < 0)
            return r;
        bytes = bytes_of_tiles(model, n_tiles - sequence->n_tiles);
        while ((r = take_tiles(sequence, n_tiles)) == -EAGAIN)
            if (!prefix_reclaim(&sequence->engine->prefixes, bytes))
                return r;
        if (r < 0)
            return r;
    }
    sequence->reserved_tokens = MAX(sequence->reserved_tokens, reserved);
    return 0;
}

uint32_t sequence_room(const struct sequence *sequence)
{
    return MIN(sequence->n_tiles * KV_TILE, sequence->model->context_tokens);
}

uint64_t sequence_bytes(const struct sequence *sequence)
{
    return bytes_of_tiles(sequence->model, sequence->n_tiles);
}

/* ---- shared tiles ---- */

/* The last of the tiles that are there for these ids. -EBUSY: the next is being computed. */
static int prefix_look(const struct engine *engine, const struct model *model,
                       const struct sequence_start *start, struct prefix **ret_last,
                       struct prefix_wait *ret_wait)
{
    struct prefix *last = NULL, *next;
    const struct prefix *pending = NULL;
    uint64_t hash;

    for (uint32_t at = 0; at + KV_TILE < start->n_ids; at += KV_TILE) {
        next = prefix_find(&engine->prefixes, model, start->owner, pending ? pending : last,
                           start->ids + at, &hash);
        if (!next)
            break;
        if (next->maker)
            pending = next;
        else
            last = next;
    }
    if (pending) {
        *ret_wait = (struct prefix_wait){
            .maker = pending->maker, .serial = pending->maker->serial, .tile = pending->tile};
        return -EBUSY;
    }
    *ret_last = last;
    return 0;
}

bool prefix_wait_over(const struct prefix_wait *wait)
{
    return wait->maker->serial != wait->serial || wait->maker->n_shared_done > wait->tile;
}

/* The tiles up to `last` are the sequence's beginning. */
static int attach_prefix(struct sequence *sequence, struct prefix *last)
{
    struct prefix_cache *cache = &sequence->engine->prefixes;
    uint32_t n_layers = sequence->model->hparams.n_layers, n_tiles = last->tile + 1;
    int r = sequence_widen(sequence, n_tiles);

    if (r < 0)
        return r;
    for (struct prefix *p = last; p; p = p->parent) {
        prefix_use(cache, p, sequence->account);
        for (uint32_t layer = 0; layer < n_layers; layer++)
            sequence->pages[(size_t)layer * sequence->tile_stride + p->tile] = p->pages[layer];
    }
    sequence->prefix = last;
    sequence->n_tiles = sequence->n_shared = sequence->n_shared_done = n_tiles;
    sequence->length = n_tiles * KV_TILE;
    return 0;
}

/* The next tile of the sequence's own becomes a prefix. False: it stays its own. */
static bool share_tile(struct sequence *sequence, const int32_t *ids, uint64_t hash,
                       const struct sequence *maker)
{
    struct prefix *prefix = prefix_insert(
        &sequence->engine->prefixes, sequence->model, sequence->owner, sequence->prefix, ids, hash,
        maker, sequence->account, sequence->pages + sequence->n_shared, sequence->tile_stride);

    if (!prefix)
        return false;
    sequence->prefix = prefix;
    sequence->n_shared++;
    return true;
}

/* Says which whole tiles the sequence is going to compute. */
static void announce(struct sequence *sequence, const int32_t *ids, uint32_t n_ids)
{
    uint64_t hash;

    n_ids = MIN(n_ids, sequence->reserved_tokens);
    while ((sequence->n_shared + 1) * KV_TILE <= n_ids) {
        const int32_t *tile = ids + sequence->n_shared * KV_TILE;

        if (prefix_find(&sequence->engine->prefixes, sequence->model, sequence->owner,
                        sequence->prefix, tile, &hash) ||
            !share_tile(sequence, tile, hash, sequence))
            return;
    }
}

void sequence_publish(struct sequence *sequence)
{
    uint32_t n_done = MIN(sequence->length / KV_TILE, sequence->n_shared);

    for (struct prefix *p = sequence->prefix; p && p->maker; p = p->parent)
        if (p->tile < n_done)
            p->maker = NULL;
    sequence->n_shared_done = n_done;
}

/* The whole tiles that are still its own become prefixes, or are let go for ones that are there
 * already. */
static void keep_tiles(struct sequence *sequence, const int32_t *ids)
{
    struct prefix_cache *cache = &sequence->engine->prefixes;
    uint32_t n_tiles = sequence->length / KV_TILE;

    if (sequence->n_shared_done < sequence->n_shared)
        return;
    while (sequence->n_shared < n_tiles) {
        const int32_t *tile = ids + sequence->n_shared * KV_TILE;
        uint64_t hash;
        struct prefix *there =
            prefix_find(cache, sequence->model, sequence->owner, sequence->prefix, tile, &hash);
        if (!there) {
            if (!share_tile(sequence, tile, hash, NULL))
                return;
            continue;
        }
        if (there->maker)
            return;
        give_tiles(sequence, sequence->n_shared, sequence->n_shared + 1);
        prefix_use(cache, there, sequence->account);
        sequence->prefix = there;
        sequence->n_shared++;
    }
}

/* ---- begin and end ---- */

/* An idle sequence, or a new one. */
static struct sequence *sequence_find(struct model *model)
{
    struct sequence *sequence = model->idle;

    if (sequence) {
        model->idle = sequence->next_idle;
        return sequence;
    }
    sequence = calloc(1, sizeof(*sequence));
    if (!sequence)
        return NULL;
    sequence->model = model;
    model_count_scratch(model, sizeof(*sequence));
    return sequence;
}

/* It is idle again; its pages have gone. */
static void sequence_rest(struct sequence *sequence)
{
    struct model *model = sequence->model;

    sequence->serial = 0;
    sequence->n_tiles = 0;
    sequence->next_idle = model->idle;
    model->idle = sequence;
}

static void let_go(struct sequence *sequence)
{
    give_tiles(sequence, sequence->n_shared, sequence->n_tiles);
    prefix_let_go(&sequence->engine->prefixes, sequence->prefix);
    sequence->prefix = NULL;
}

/* Where its hidden states add up; kept when it is idle. */
static int make_pool(struct sequence *sequence)
{
    size_t bytes = sequence->model->hparams.n_embd * sizeof(float);

    if (sequence->pooled)
        return 0;
    sequence->pooled = malloc(bytes);
    if (!sequence->pooled)
        return -ENOMEM;
    model_count_scratch(sequence->model, bytes);
    return 0;
}

int sequence_begin(struct engine *engine, struct model *model, const struct sequence_start *start,
                   struct sequence **ret_sequence, struct prefix_wait *ret_wait)
{
    struct prefix *last = NULL;
    struct sequence *sequence;
    int r;

    r = model_bind(model, engine);
    if (r < 0)
        return r;
    if (!budget_holds(model,
                      MIN(MAX(start->reserve_tokens, start->most_tokens), model->context_tokens)))
        return -ENOSPC;
    if (start->share) {
        r = prefix_look(engine, model, start, &last, ret_wait);
        if (r < 0)
            return r;
    }
    sequence = sequence_find(model);
    if (!sequence)
        return -ENOMEM;
    sequence->engine = engine;
    sequence->serial = ++engine->n_begun;
    sequence->length = sequence->pooled_length = sequence->reserved_tokens = 0;
    sequence->n_tiles = sequence->n_shared = sequence->n_shared_done = 0;
    sequence->prefix = NULL;
    sequence->shares = start->share;
    sequence->pools = start->pools;
    sequence->owner = start->owner;
    sequence->account = start->account ? start->account : &engine->nobody;
    if (start->pools)
        r = make_pool(sequence);
    if (r == 0 && last)
        r = attach_prefix(sequence, last);
    if (r == 0)
        r = sequence_reserve(sequence, start->reserve_tokens);
    if (r < 0) {
        let_go(sequence);
        sequence_rest(sequence);
        return r;
    }
    model->n_sequences++;
    engine->n_sequences++;
    if (start->share)
        announce(sequence, start->ids, start->n_ids);
    *ret_sequence = sequence;
    return 0;
}

int sequence_new(struct engine *engine, struct model *model, uint32_t reserve_tokens,
                 struct sequence **ret_sequence)
{
    struct sequence_start start = {.reserve_tokens = reserve_tokens, .pools = true};

    return sequence_begin(engine, model, &start, ret_sequence, NULL);
}

struct sequence *sequence_free(struct sequence *sequence)
{
    if (!sequence)
        return NULL;
    assert(!sequence->in_step);
    let_go(sequence);
    sequence->engine->n_sequences--;
    sequence->model->n_sequences--;
    sequence_rest(sequence);
    return NULL;
}

struct sequence *sequence_retire(struct sequence *sequence, const int32_t *ids)
{
    if (sequence && sequence->shares)
        keep_tiles(sequence, ids);
    return sequence_free(sequence);
}

void engine_forget_prefixes(struct engine *engine, struct model *model)
{
    if (model->engine == engine && model->n_prefixes > 0)
        prefix_forget(&engine->prefixes, model);
}

void engine_shrink_scratch(struct model *model, uint64_t kept_bytes)
{
    assert(model->n_sequences == 0);
    step_shrink(&model->step, kept_bytes);
}

uint32_t sequence_length(const struct sequence *sequence)
{
    return sequence->length;
}

void model_drop_sequences(struct model *model)
{
    struct sequence *next;

    assert(model->n_sequences == 0);
    if (model->n_prefixes > 0)
        prefix_forget(&model->engine->prefixes, model);
    for (struct sequence *sequence = model->idle; sequence; sequence = next) {
        next = sequence->next_idle;
        free(sequence->pages);
        free(sequence->pooled);
        free(sequence);
    }
    model->idle = NULL;
}

/* ---- rotary table ---- */

int rope_reserve(struct model *model, uint32_t n_positions)
{
    struct rope_table *table = &model->rope;
    uint32_t room = MIN(MAX(2 * table->n_room, MAX(n_positions, 64u)), model->context_tokens);
    float *values;

    if (n_positions <= table->n_room)
        return 0;
    values = realloc(table->values, (size_t)room * model->hparams.n_rot * sizeof(float));
    if (!values)
        return -ENOMEM;
    model_count_scratch(model,
                        (uint64_t)(room - table->n_room) * model->hparams.n_rot * sizeof(float));
    table->values = values;
    table->n_room = room;
    return 0;
}

void rope_reach(struct model *model, uint32_t n_positions)
{
    struct rope_table *table = &model->rope;
    uint32_t n_rot = model->hparams.n_rot;

    assert(n_positions <= table->n_room);
    for (uint32_t p = table->n_positions; p < n_positions; p++) {
        float *cosines = table->values + (size_t)p * n_rot, *sines = cosines + n_rot / 2;

        for (uint32_t i = 0; i < n_rot / 2; i++) {
            double angle = p * model->rope_frequencies[i];

            cosines[i] = (float)cos(angle);
            sines[i] = (float)sin(angle);
        }
    }
    table->n_positions = MAX(table->n_positions, n_positions);
}
