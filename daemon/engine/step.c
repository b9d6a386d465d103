#include "daemon/engine/step.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/engine/model.h"
#include "lib/cleanup.h"

/* A team's job is cut into about this many chunks a thread, so that a late one finds work left. */
#define CHUNKS_PER_THREAD 4u
/* Work at these rates is what a barrier is weighed against: one core's memory bandwidth, and its
 * arithmetic (multiply and add) on columns that share a pass. */
#define WEIGHT_BYTES_PER_US 15000u
#define OPERATIONS_PER_US   100000u
/* What memory is counted in; of every processor that this runs on. */
#define PAGE_BYTES 4096u
/* Barriers of one layer. */
#define LAYER_BARRIERS 6u

/* A row that takes less than this keeps those at work who bring rows and fetch what comes of them:
 * some 15 us of the reactor and as much of its clients. Helpers would take their CPU. */
#define TEAM_ROW_US 30u

/* ---- counting memory ---- */

uint64_t step_logits_bytes(const struct model *model)
{
    return ((model->hparams.n_vocab + 15u) & ~15u) * sizeof(float);
}

/* What n columns touch of each kind of activations. */
#define COLUMN_KINDS 8u
static void column_bytes(const struct model *model, uint64_t n, uint64_t ret_bytes[COLUMN_KINDS])
{
    const struct hparams *h = &model->hparams;

    ret_bytes[0] = ret_bytes[1] = ret_bytes[2] = n * h->n_embd * sizeof(float); /* x, h, out */
    ret_bytes[3] = n * qkv_rows(h) * sizeof(float);
    ret_bytes[4] = n * h->n_heads * h->head_dim * sizeof(float); /* attended */
    ret_bytes[5] = ret_bytes[6] = n * h->n_ff * sizeof(float);   /* gate, up */
    ret_bytes[7] = n * model->prepared_bytes / ENGINE_MAX_COLUMNS;
}

uint64_t step_token_bytes(const struct model *model)
{
    uint64_t bytes[COLUMN_KINDS], sum = 0;

    column_bytes(model, 1, bytes);
    for (size_t i = 0; i < COLUMN_KINDS; i++)
        sum += bytes[i];
    return sum;
}

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

/* What columns and rows with logits touch of the activations, in whole pages of each kind. */
static uint64_t touched_bytes(const struct model *model, uint64_t n_columns, uint64_t n_logits)
{
    uint64_t bytes[COLUMN_KINDS], sum = whole_pages(n_logits * step_logits_bytes(model));

    column_bytes(model, n_columns, bytes);
    for (size_t i = 0; i < COLUMN_KINDS; i++)
        sum += whole_pages(bytes[i]);
    return sum;
}

static void count_activations(struct model *model, uint64_t bytes)
{
    model_count_scratch(model, bytes);
    model_count(&model->activation_bytes, bytes);
}

/* Counts what a step touches beyond all before it. */
static void step_touch(struct step *step, uint32_t n_columns, uint32_t n_logits)
{
    struct model *model = step->model;
    uint64_t before;

    if (n_columns <= step->most_columns && n_logits <= step->most_logits)
        return;
    before = touched_bytes(model, step->most_columns, step->most_logits);
    step->most_columns = MAX(step->most_columns, n_columns);
    step->most_logits = MAX(step->most_logits, n_logits);
    count_activations(model, touched_bytes(model, step->most_columns, step->most_logits) - before);
}

/* ---- the team ---- */

struct loop {
    const struct step *step;
    void (*body)(const struct loop *loop, uint32_t begin, uint32_t end, uint32_t thread);
    const void *arg;
    uint32_t n, stride; /* items, items of a chunk */
};

static void loop_chunk(void *arg, uint32_t chunk, uint32_t thread)
{
    const struct loop *loop = arg;
    uint32_t begin = chunk * loop->stride;

    loop->body(loop, begin, MIN(begin + loop->stride, loop->n), thread);
}

/* body over 0..n-1, in chunks that are multiples of `unit` when the team is at it. */
static void step_for(const struct step *step, uint32_t n, uint32_t unit,
                     void (*body)(const struct loop *, uint32_t, uint32_t, uint32_t),
                     const void *arg)
{
    struct loop loop = {.step = step, .body = body, .arg = arg, .n = n, .stride = n};
    uint32_t n_chunks;

    if (!step->team) {
        body(&loop, 0, n, 0);
        return;
    }
    n_chunks = CHUNKS_PER_THREAD * team_threads(step->engine->team);
    loop.stride = ((n + n_chunks - 1) / n_chunks + unit - 1) / unit * unit;
    team_run(step->engine->team, loop_chunk, &loop, (n + loop.stride - 1) / loop.stride);
}

/* ---- products ---- */

/* y[column * y_stride + row] = tensor x columns */
struct product {
    const struct tensor *tensor;
    float *y;
    size_t y_stride;
};

struct product_group {
    const struct product *products;
    uint32_t n, n_columns;
    const void *prepared;
};

/* Rows of a group's products, numbered one after another. Each product's rows are rounded up to
 * whole groups, so that ranges cut at multiples of a group stay so within every product. */
static uint32_t rounded_rows(const struct product *product)
{
    return (product->tensor->rows + KERNEL_ROW_GROUP - 1) / KERNEL_ROW_GROUP * KERNEL_ROW_GROUP;
}

static void multiply_rows(const struct loop *loop, uint32_t begin, uint32_t end, uint32_t thread)
{
    const struct product_group *group = loop->arg;
    const struct kernel_table *kernels = loop->step->model->kernels;
    uint32_t first = 0;

    (void)thread;
    for (uint32_t i = 0; i < group->n; i++) {
        const struct product *p = &group->products[i];
        uint32_t next = first + rounded_rows(p);

        if (begin < next && end > first) {
            uint32_t from = MAX(begin, first) - first;
            uint32_t to = MIN(MIN(end, next) - first, p->tensor->rows);

            kernels->matmul(p->tensor, group->prepared, group->n_columns, p->y, p->y_stride, from,
                            to);
        }
        first = next;
    }
}

/* All products take the columns x; what has the same preparation goes behind one barrier. */
static void step_multiply(struct step *step, const float *x, const struct product *products,
                          uint32_t n)
{
    const struct kernel_table *kernels = step->model->kernels;

    for (uint32_t i = 0, end; i < n; i = end) {
        const struct tensor *tensor = products[i].tensor;
        uint32_t rows = 0;

        for (end = i; end < n; end++) {
            if (!kernels->same_preparation(tensor->type, products[end].tensor->type))
                break;
            rows += rounded_rows(&products[end]);
        }
        kernels->prepare(tensor->type, tensor->cols, step->n_columns, x, step->prepared);
        struct product_group group = {
            .products = products + i,
            .n = end - i,
            .n_columns = step->n_columns,
            .prepared = step->prepared,
        };
        step_for(step, rows, KERNEL_ROW_GROUP, multiply_rows, &group);
    }
    step->model->stats.weight_passes += n;
}

/* ---- the operations of a layer ---- */

const struct layer_weights *step_layer(const struct step *step, uint32_t index)
{
    return &step->model->weights.layers[index];
}

void step_norm(struct step *step, const float *weight)
{
    const struct model *model = step->model;
    uint32_t n = model->hparams.n_embd;

    for (uint32_t i = 0; i < step->n_columns; i++)
        model->kernels->rms_norm(step->x + (size_t)i * n, weight, n, model->hparams.norm_eps,
                                 step->h + (size_t)i * n);
}

void step_project_qkv(struct step *step, const struct layer_weights *layer)
{
    struct product products[3];

    for (uint32_t i = 0; i < layer->n_qkv; i++)
        products[i] = (struct product){&layer->qkv[i], step->qkv + layer->qkv_row[i],
                                       qkv_rows(&step->model->hparams)};
    step_multiply(step, step->h, products, layer->n_qkv);
}

/* This layer's pages of a sequence. */
static void *const *pages_of(const struct sequence *sequence, uint32_t layer)
{
    return sequence->pages + (size_t)layer * sequence->tile_stride;
}

void step_rotate_and_store(struct step *step, uint32_t layer)
{
    const struct model *model = step->model;
    const struct hparams *h = &model->hparams;
    uint32_t n_q = h->n_heads * h->head_dim, n_kv = h->n_kv_heads * h->head_dim;

    for (uint32_t i = 0; i < step->n_columns; i++) {
        const struct column *column = &step->columns[i];
        float *q = step->qkv + (size_t)i * qkv_rows(h);
        const float *cosines = rope_cosines(model, column->position);

        model->kernels->rope(q, h->n_heads + h->n_kv_heads, h->head_dim, h->n_rot, h->rope_adjacent,
                             cosines, cosines + h->n_rot / 2);
        model->kernels->kv_store(&model->kv_shape,
                                 pages_of(column->sequence, layer)[column->position / KV_TILE],
                                 column->position % KV_TILE, q + n_q, q + n_q + n_kv);
    }
}

bool step_keep_wanted(struct step *step, uint32_t layer)
{
    uint32_t n = step->model->hparams.n_embd, kept = 0;

    if (layer + 1 < step->model->hparams.n_layers)
        return true;
    for (uint32_t i = 0; i < step->n_columns; i++) {
        if (!step->columns[i].wanted)
            continue;
        if (kept != i) {
            memcpy(step->x + (size_t)kept * n, step->x + (size_t)i * n, n * sizeof(float));
            step->columns[kept] = step->columns[i];
        }
        kept++;
    }
    step->n_columns = kept;
    return kept > 0;
}

static void attend_columns(const struct loop *loop, uint32_t begin, uint32_t end, uint32_t thread)
{
    const struct step *step = loop->step;
    const struct model *model = step->model;
    const struct hparams *h = &model->hparams;
    uint32_t layer = *(const uint32_t *)loop->arg;
    void *scratch = step->engine->scratch + thread * step->engine->scratch_bytes;

    for (uint32_t i = begin; i < end; i++) {
        const struct column *column = &step->columns[i];

        model->kernels->attend(&model->kv_shape, pages_of(column->sequence, layer),
                               column->position + 1, h->n_heads, h->attention_scale,
                               step->qkv + (size_t)column->source * qkv_rows(h),
                               step->attended + (size_t)i * h->n_heads * h->head_dim, scratch);
    }
}

void step_attend(struct step *step, uint32_t layer)
{
    step_for(step, step->n_columns, 1, attend_columns, &layer);
}

void step_project_attention(struct step *step, const struct tensor *projection)
{
    struct product product = {projection, step->out, step->model->hparams.n_embd};

    step_multiply(step, step->attended, &product, 1);
    step->model->kernels->add(step->x, step->out, step->n_columns * step->model->hparams.n_embd);
}

static void gate_columns(const struct loop *loop, uint32_t begin, uint32_t end, uint32_t thread)
{
    const struct step *step = loop->step;
    uint32_t n = step->model->hparams.n_ff;

    (void)thread;
    for (uint32_t i = begin; i < end; i++)
        step->model->kernels->silu_mul(step->gate + (size_t)i * n, step->up + (size_t)i * n, n);
}

void step_feed_forward(struct step *step, const struct tensor *gate, const struct tensor *up,
                       const struct tensor *down)
{
    const struct hparams *h = &step->model->hparams;
    struct product products[2] = {{gate, step->gate, h->n_ff}, {up, step->up, h->n_ff}};
    struct product product = {down, step->out, h->n_embd};

    step_multiply(step, step->h, products, 2);
    step_for(step, step->n_columns, 1, gate_columns, NULL);
    step_multiply(step, step->gate, &product, 1);
    step->model->kernels->add(step->x, step->out, step->n_columns * h->n_embd);
}

/* ---- the output ---- */

/* Adds a column's hidden state to its sequence's sum, in the order of positions. */
static void pool_column(struct step *step, const struct column *column, const float *h)
{
    struct sequence *sequence = column->sequence;
    uint32_t n = step->model->hparams.n_embd;

    if (column->position == 0)
        memset(sequence->pooled, 0, n * sizeof(float));
    step->model->kernels->add(sequence->pooled, h, n);
}

/* The mean's direction is the sum's: what is left of dividing by both is the sum's length. */
static void pool_finish(const float *sum, uint32_t n, float *ret)
{
    double square = 0;
    float scale;

    for (uint32_t i = 0; i < n; i++)
        square += (double)sum[i] * sum[i];
    scale = square > 0 ? (float)(1 / sqrt(square)) : 0;
    for (uint32_t i = 0; i < n; i++)
        ret[i] = sum[i] * scale;
}

/* Normalises what is left, pools, and multiplies the rows that want logits with the output. */
static void step_output(struct step *step)
{
    struct model *model = step->model;
    uint32_t n = model->hparams.n_embd, n_logits = 0;

    step_norm(step, model->weights.output_norm);
    for (uint32_t i = 0; i < step->n_columns; i++) {
        const struct column *column = &step->columns[i];
        float *h = step->h + (size_t)i * n;

        if (step->rows[column->row].wants == ROW_POOLED)
            pool_column(step, column, h);
        else /* one column a row, never in front of where it is moved to */
            memmove(step->h + (size_t)n_logits++ * n, h, n * sizeof(float));
    }
    if (n_logits == 0)
        return;
    step_touch(step, 0, n_logits);
    struct product product = {&model->weights.output, step->logits, step->logits_stride};
    step->n_columns = n_logits;
    step_multiply(step, step->h, &product, 1);
}

/* ---- begin, slice, end ---- */

struct carve {
    uint8_t *base; /* NULL: only measuring */
    size_t used;
};

static void *carve(struct carve *carve, uint64_t n, size_t size)
{
    void *p = carve->base ? carve->base + carve->used : NULL;

    carve->used += (n * size + KERNEL_ALIGN - 1) & ~(size_t)(KERNEL_ALIGN - 1);
    return p;
}

static void step_carve(struct step *step, struct carve *c)
{
    const struct hparams *h = &step->model->hparams;
    const uint64_t columns = ENGINE_MAX_COLUMNS;

    step->logits_stride = step_logits_bytes(step->model) / sizeof(float);
    step->x = carve(c, columns * h->n_embd, sizeof(float));
    step->h = carve(c, columns * h->n_embd, sizeof(float));
    step->out = carve(c, columns * h->n_embd, sizeof(float));
    step->qkv = carve(c, columns * qkv_rows(h), sizeof(float));
    step->attended = carve(c, columns * h->n_heads * h->head_dim, sizeof(float));
    step->gate = carve(c, columns * h->n_ff, sizeof(float));
    step->up = carve(c, columns * h->n_ff, sizeof(float));
    step->prepared = carve(c, step->model->prepared_bytes, 1);
    step->logits = carve(c, (uint64_t)ENGINE_MAX_ROWS * step->logits_stride, sizeof(float));
}

static int step_map(struct step *step, struct model *model)
{
    struct carve c = {0};
    void *memory;

    if (step->memory)
        return 0;
    step->model = model;
    step_carve(step, &c);
    memory = mmap(NULL, c.used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                  -1, 0);
    if (memory == MAP_FAILED)
        return -ENOMEM;
    /* A huge page would be touched whole by one column. */
    (void)madvise(memory, c.used, MADV_NOHUGEPAGE);
    step->memory = memory;
    step->memory_bytes = c.used;
    c = (struct carve){.base = memory};
    step_carve(step, &c);
    return 0;
}

void step_shrink(struct step *step, uint64_t kept_bytes)
{
    uint64_t bytes;

    assert(!step->open);
    if (!step->memory)
        return;
    bytes = touched_bytes(step->model, step->most_columns, step->most_logits);
    if (bytes <= kept_bytes || madvise(step->memory, step->memory_bytes, MADV_DONTNEED) < 0)
        return;
    step->most_columns = step->most_logits = 0;
    count_activations(step->model, -bytes);
}

void step_done(struct step *step)
{
    if (step->memory)
        munmap(step->memory, step->memory_bytes);
    step->memory = NULL;
}

/* Attention's scratch for the longest row, a block a thread. */
static int scratch_reach(struct engine *engine, const struct model *model, uint32_t n_positions)
{
    size_t bytes = model->kernels->attend_scratch_bytes(model->hparams.n_heads, n_positions);
    uint8_t *scratch;

    if (bytes <= engine->scratch_bytes)
        return 0;
    /* twice what is needed: a growing text asks for it log(context) times */
    bytes = (2 * bytes + KERNEL_ALIGN - 1) & ~(size_t)(KERNEL_ALIGN - 1);
    scratch = aligned_alloc(KERNEL_ALIGN, bytes * team_threads(engine->team));
    if (!scratch)
        return -ENOMEM;
    free(engine->scratch);
    engine->scratch = scratch;
    engine->scratch_bytes = bytes;
    return 0;
}

int step_reserve(struct engine *engine, struct model *model, uint32_t n_positions)
{
    int r = step_map(&model->step, model);

    if (r == 0)
        r = rope_reserve(model, n_positions);
    if (r == 0)
        r = scratch_reach(engine, model, n_positions);
    return r;
}

/* Whether a row may take part: 0 or -EINVAL. */
static int row_check(const struct engine *engine, const struct model *model,
                     const struct step_row *row)
{
    const struct sequence *sequence = row->sequence;

    if (!sequence || sequence->model != model || sequence->engine != engine || sequence->in_step)
        return -EINVAL;
    if (row->n_tokens == 0 || row->n_tokens > sequence->reserved_tokens - sequence->length)
        return -EINVAL;
    for (uint32_t i = 0; i < row->n_tokens; i++)
        if (row->tokens[i] < 0 || (uint32_t)row->tokens[i] >= model->hparams.n_vocab)
            return -EINVAL;
    if (row->wants == ROW_POOLED &&
        (!sequence->pools || sequence->pooled_length != sequence->length))
        return -EINVAL;
    return 0;
}

/* Looks at all rows, whatever is found: columns and the longest reach of those that are good.
 * -EINVAL: some are not. */
static int rows_check(const struct engine *engine, const struct model *model, struct step_row *rows,
                      uint32_t n_rows, uint64_t *ret_n_columns, uint32_t *ret_n_positions)
{
    uint64_t n_columns = 0;
    uint32_t n_positions = 0;
    int r = 0;

    for (uint32_t i = 0; i < n_rows; i++) {
        struct step_row *row = &rows[i];

        row->error = row_check(engine, model, row);
        if (row->error < 0) {
            r = row->error;
            continue;
        }
        row->sequence->in_step = true; /* a second row of it is refused */
        n_columns += row->n_tokens;
        n_positions = MAX(n_positions, row->sequence->length + row->n_tokens);
    }
    for (uint32_t i = 0; i < n_rows; i++)
        if (rows[i].error == 0)
            rows[i].sequence->in_step = false;
    *ret_n_columns = n_columns;
    *ret_n_positions = n_positions;
    return r;
}

/* Whether the team is of use: barriers are far enough apart, in expected time, and rows are not so
 * quick that the other CPUs have enough to do. */
static bool team_pays(const struct engine *engine, const struct model *model, uint32_t n_rows,
                      uint32_t n_columns)
{
    uint64_t layers = model->hparams.n_layers, elements, us;

    if (team_threads(engine->team) == 1)
        return false;
    elements = model->info.n_params - (uint64_t)model->hparams.n_vocab * model->hparams.n_embd;
    us = MAX(model->info.weight_bytes / WEIGHT_BYTES_PER_US,
             2 * elements * n_columns / OPERATIONS_PER_US);
    if (n_rows > 1 && us < (uint64_t)n_rows * TEAM_ROW_US)
        return false;
    return us / (layers * LAYER_BARRIERS) > (uint64_t)4 * team_min_us(engine->team);
}

static void step_fill_columns(struct step *step)
{
    uint32_t n = 0;

    for (uint32_t r = 0; r < step->n_rows; r++) {
        const struct step_row *row = &step->rows[r];

        row->sequence->in_step = true;
        for (uint32_t i = 0; i < row->n_tokens; i++, n++)
            step->columns[n] = (struct column){
                .sequence = row->sequence,
                .position = row->sequence->length + i,
                .source = n,
                .row = r,
                .wanted = row->wants == ROW_POOLED ||
                          (row->wants == ROW_LOGITS && i + 1 == row->n_tokens),
            };
    }
    step->n_columns = step->n_begun = n;
    step_touch(step, n, 0);
}

int engine_step_begin(struct engine *engine, struct model *model, struct step_row *rows,
                      uint32_t n_rows)
{
    struct step *step = &model->step;
    uint64_t n_columns;
    uint32_t n_positions;
    int r;

    if (step->open)
        return -EBUSY;
    if (n_rows == 0 || n_rows > ENGINE_MAX_ROWS)
        return -EINVAL;
    r = rows_check(engine, model, rows, n_rows, &n_columns, &n_positions);
    if (r < 0)
        return r;
    if (n_columns > ENGINE_MAX_COLUMNS)
        return -EINVAL;
    rope_reach(model, n_positions);
    step->engine = engine;
    step->rows = rows;
    step->n_rows = n_rows;
    step->stage = 0;
    step->team = team_pays(engine, model, step->n_rows, (uint32_t)n_columns);
    step->open = true;
    step_fill_columns(step);
    return 0;
}

static void step_embed(struct step *step)
{
    const struct model *model = step->model;
    float *x = step->x;

    for (uint32_t r = 0; r < step->n_rows; r++)
        for (uint32_t i = 0; i < step->rows[r].n_tokens; i++) {
            model->kernels->unpack_row(&model->weights.embedding, (uint32_t)step->rows[r].tokens[i],
                                       x);
            x += model->hparams.n_embd;
        }
}

int engine_step_slice(struct engine *engine, struct model *model)
{
    struct step *step = &model->step;

    assert(step->open && step->engine == engine);
    if (step->stage > model->hparams.n_layers)
        return 0;
    pulse_beat(engine->options.pulse);
    if (step->stage == 0)
        step_embed(step);
    if (step->stage < model->hparams.n_layers)
        model->arch->layer(step, step->stage);
    else if (step->n_columns > 0)
        step_output(step);
    step->stage++;
    pulse_beat(engine->options.pulse);
    return step->stage <= model->hparams.n_layers;
}

void engine_step_end(struct engine *engine, struct model *model)
{
    struct step *step = &model->step;
    uint32_t n = model->hparams.n_embd, n_logits = 0, n_pooled = 0;

    assert(step->open && step->engine == engine && step->stage > model->hparams.n_layers);
    for (uint32_t r = 0; r < step->n_rows; r++) {
        struct step_row *row = &step->rows[r];
        struct sequence *sequence = row->sequence;

        sequence->length += row->n_tokens;
        sequence->in_step = false;
        if (sequence->n_shared_done < sequence->n_shared)
            sequence_publish(sequence);
        row->ret_values = NULL;
        if (row->wants == ROW_LOGITS)
            row->ret_values = step->logits + step->logits_stride * n_logits++;
        if (row->wants != ROW_POOLED)
            continue;
        sequence->pooled_length = sequence->length;
        row->ret_values = step->out + (size_t)n * n_pooled++;
        pool_finish(sequence->pooled, n, row->ret_values);
    }
    model->stats.steps++;
    model->stats.rows += step->n_rows;
    model->stats.columns += step->n_begun;
    step->open = false;
}

void engine_step_abandon(struct engine *engine, struct model *model)
{
    struct step *step = &model->step;

    assert(step->open && step->engine == engine);
    for (uint32_t r = 0; r < step->n_rows; r++)
        step->rows[r].sequence->in_step = false;
    step->open = false;
}

void model_step_stats(const struct model *model, struct engine_step_stats *ret_stats)
{
    *ret_stats = model->stats;
}
