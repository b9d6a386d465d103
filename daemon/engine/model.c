#include "daemon/engine/model.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "lib/cleanup.h"

DEFINE_CLEANUP(struct gguf *, gguf_free)
DEFINE_CLEANUP(struct model *, model_free)

/* One pread of a load, and how long a cancelled load may go on. */
#define PIECE_BYTES (1u << 20)
/* Tensors that some converters write and no computation reads. */
#define IGNORED_SUFFIX ".attn_rot_embd"

/* One packed tensor or vector and the tensors of the file it is made of, one below the other. */
struct plan_item {
    struct tensor *tensor; /* or: */
    float **vector;
    const struct gguf_tensor *sources[3];
    uint32_t n_sources;
};

struct plan {
    const struct gguf *gguf;
    const struct kernel_table *kernels;
    struct fault *fault;
    struct plan_item *items;
    size_t n_items, n_room;
};

static void plan_donep(struct plan *plan)
{
    free(plan->items);
}

/* ---- planning ---- */

static int plan_push(struct plan *plan, const struct plan_item *item)
{
    if (plan->n_items == plan->n_room) {
        size_t room = MAX(2 * plan->n_room, (size_t)64);
        struct plan_item *items = realloc(plan->items, room * sizeof(*items));

        if (!items)
            return fault_set(plan->fault, -ENOMEM, "no memory for the plan of a load");
        plan->items = items;
        plan->n_room = room;
    }
    plan->items[plan->n_items++] = *item;
    return 0;
}

bool plan_has(const struct plan *plan, const char *name)
{
    return gguf_find(plan->gguf, name) != NULL;
}

/* The tensor of that name, if it has that shape. */
static int plan_find(struct plan *plan, const char *name, uint64_t cols, uint64_t rows,
                     const struct gguf_tensor **ret)
{
    const struct gguf_tensor *tensor = gguf_find(plan->gguf, name);

    if (!tensor)
        return fault_set(plan->fault, -EBADMSG, "the model lacks the tensor %s", name);
    if (tensor->dims[0] != cols || tensor->dims[1] != rows || tensor->dims[2] != 1 ||
        tensor->dims[3] != 1)
        return fault_set(plan->fault, -EBADMSG,
                         "tensor %s is %llu x %llu x %llu x %llu; the model's keys make it %llu x "
                         "%llu",
                         name, (unsigned long long)tensor->dims[0],
                         (unsigned long long)tensor->dims[1], (unsigned long long)tensor->dims[2],
                         (unsigned long long)tensor->dims[3], (unsigned long long)cols,
                         (unsigned long long)rows);
    *ret = tensor;
    return 0;
}

static int plan_check_type(const struct plan *plan, const struct gguf_tensor *tensor)
{
    const char *name = gguf_type_name(tensor->type);

    if (!plan->kernels->supports(tensor->type))
        return fault_set(plan->fault, -ENOTSUP,
                         "tensor %.*s is of type %s (%d), which this version does not compute with",
                         (int)MIN(tensor->name.len, 64u), tensor->name.bytes,
                         name ? name : "unknown", (int)tensor->type);
    if (gguf_row_bytes(tensor->type, tensor->dims[0]) == 0)
        return fault_set(plan->fault, -EBADMSG,
                         "tensor %.*s has rows of %llu elements, no multiple of %s's block",
                         (int)MIN(tensor->name.len, 64u), tensor->name.bytes,
                         (unsigned long long)tensor->dims[0], name ? name : "its type");
    return 0;
}

/* A matrix of `rows` x `cols` made of the n tensors given. */
static int plan_add_matrix(struct plan *plan, struct tensor *tensor,
                           const struct gguf_tensor *const *sources, uint32_t n, uint32_t rows,
                           uint32_t cols)
{
    struct plan_item item = {.tensor = tensor, .n_sources = n};

    *tensor = (struct tensor){.type = sources[0]->type, .rows = rows, .cols = cols};
    tensor->bytes = plan->kernels->packed_bytes(tensor->type, rows, cols);
    if (tensor->bytes == 0)
        return fault_set(plan->fault, -ENOTSUP, "tensor %.*s has a shape that cannot be packed",
                         (int)MIN(sources[0]->name.len, 64u), sources[0]->name.bytes);
    memcpy(item.sources, sources, n * sizeof(sources[0]));
    return plan_push(plan, &item);
}

int plan_matrix(struct plan *plan, struct tensor *tensor, const char *name, uint32_t rows,
                uint32_t cols)
{
    const struct gguf_tensor *source = NULL;
    int r;

    r = plan_find(plan, name, cols, rows, &source);
    if (r == 0)
        r = plan_check_type(plan, source);
    return r < 0 ? r : plan_add_matrix(plan, tensor, &source, 1, rows, cols);
}

int plan_qkv(struct plan *plan, struct layer_weights *layer, const char *const names[3],
             const uint32_t rows[3], uint32_t cols)
{
    const struct gguf_tensor *sources[3] = {0};
    uint32_t row = 0;
    int r = 0;

    for (uint32_t i = 0; i < 3 && r == 0; i++) {
        r = plan_find(plan, names[i], cols, rows[i], &sources[i]);
        if (r == 0)
            r = plan_check_type(plan, sources[i]);
    }
    for (uint32_t i = 0, end; i < 3 && r == 0; i = end) {
        uint32_t n_rows = 0, part = layer->n_qkv++;

        for (end = i; end < 3 && sources[end]->type == sources[i]->type; end++)
            n_rows += rows[end];
        layer->qkv_row[part] = row;
        row += n_rows;
        r = plan_add_matrix(plan, &layer->qkv[part], sources + i, end - i, n_rows, cols);
    }
    return r;
}

int plan_vector(struct plan *plan, float **ret_vector, const char *name, uint32_t n)
{
    struct plan_item item = {.vector = ret_vector, .n_sources = 1};
    int r;

    r = plan_find(plan, name, n, 1, &item.sources[0]);
    if (r < 0)
        return r;
    if (item.sources[0]->type != GGUF_F32)
        return fault_set(plan->fault, -ENOTSUP, "tensor %s is a vector of another type than F32",
                         name);
    return plan_push(plan, &item);
}

static bool plan_claims(const struct plan *plan, const struct gguf_tensor *tensor)
{
    for (size_t i = 0; i < plan->n_items; i++)
        for (uint32_t k = 0; k < plan->items[i].n_sources; k++)
            if (plan->items[i].sources[k] == tensor)
                return true;
    return false;
}

static bool is_ignored(const struct gguf_tensor *tensor)
{
    return memmem(tensor->name.bytes, tensor->name.len, IGNORED_SUFFIX, strlen(IGNORED_SUFFIX));
}

/* Every tensor of the file has its place: one that nothing reads (a bias, say) would silently
 * change the answers. */
static int plan_check_complete(const struct plan *plan)
{
    uint64_t n_claimed = 0, n_ignored = 0, n = gguf_n_tensors(plan->gguf);

    for (size_t i = 0; i < plan->n_items; i++)
        n_claimed += plan->items[i].n_sources;
    for (uint64_t i = 0; i < n; i++)
        n_ignored += is_ignored(gguf_tensor_at(plan->gguf, i));
    for (uint64_t i = 0; i < n && n_claimed + n_ignored < n; i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(plan->gguf, i);

        if (!is_ignored(tensor) && !plan_claims(plan, tensor))
            return fault_set(plan->fault, -ENOTSUP,
                             "this version does not know what tensor %.*s is for",
                             (int)MIN(tensor->name.len, 64u), tensor->name.bytes);
    }
    return 0;
}

/* ---- memory ---- */

static size_t round_up(size_t bytes)
{
    return (bytes + KERNEL_ALIGN - 1) & ~(size_t)(KERNEL_ALIGN - 1);
}

static size_t item_bytes(const struct plan_item *item)
{
    return round_up(item->tensor ? item->tensor->bytes : item->sources[0]->bytes);
}

/* One mapping for everything that is packed. */
static int model_map(struct model *model, const struct plan *plan)
{
    size_t used = 0;

    for (size_t i = 0; i < plan->n_items; i++)
        if (__builtin_add_overflow(model->arena_bytes, item_bytes(&plan->items[i]),
                                   &model->arena_bytes))
            return fault_set(plan->fault, -ENOMEM, "the weights do not fit into memory");
    model->arena =
        mmap(NULL, model->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (model->arena == MAP_FAILED) {
        model->arena = NULL;
        return fault_set(plan->fault, -ENOMEM, "no memory for weights of %zu bytes",
                         model->arena_bytes);
    }
    /* fewer TLB misses; refused, it is only slower */
    (void)madvise(model->arena, model->arena_bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct plan_item *item = &plan->items[i];

        if (item->tensor)
            item->tensor->data = model->arena + used;
        else
            *item->vector = (float *)(model->arena + used);
        used += item_bytes(item);
    }
    return 0;
}

/* ---- reading ---- */

struct load {
    const struct plan *plan;
    struct model_progress *progress; /* may be NULL */
    uint8_t *buffer;
    size_t buffer_bytes;
};

/* Between pieces: counts, lets others work, and hears of being cancelled. */
static int load_pace(const struct load *load, uint64_t bytes)
{
    struct model_progress *progress = load->progress;

    if (!progress)
        return 0;
    atomic_fetch_add(&progress->done_bytes, bytes);
    if (progress->pause)
        progress->pause(progress->pause_userdata);
    if (atomic_load(&progress->cancel))
        return fault_set(load->plan->fault, -ECANCELED, "the load was cancelled");
    return 0;
}

/* Bytes of one tensor, in pieces. */
static int load_bytes(const struct load *load, const struct gguf_tensor *source, uint64_t offset,
                      uint8_t *to, size_t len)
{
    while (len > 0) {
        size_t piece = MIN(len, (size_t)PIECE_BYTES);
        int r = gguf_read(load->plan->gguf, source, offset, to, piece, load->plan->fault);

        if (r < 0)
            return r == -ENODATA ? -EBADMSG : r;
        r = load_pace(load, piece);
        if (r < 0)
            return r;
        offset += piece;
        to += piece;
        len -= piece;
    }
    return 0;
}

/* Rows [begin, begin + n) of an item's sources, one below the other, into the buffer. */
static int load_rows(const struct load *load, const struct plan_item *item, uint32_t begin,
                     uint32_t n)
{
    uint64_t row_bytes = gguf_row_bytes(item->tensor->type, item->tensor->cols);
    uint8_t *to = load->buffer;
    uint64_t first = 0;

    for (uint32_t k = 0; k < item->n_sources && n > 0; k++) {
        uint64_t rows = item->sources[k]->dims[1];

        if (begin < first + rows) {
            uint32_t count = (uint32_t)MIN(first + rows - begin, (uint64_t)n);
            int r = load_bytes(load, item->sources[k], (begin - first) * row_bytes, to,
                               count * row_bytes);

            if (r < 0)
                return r;
            to += count * row_bytes;
            begin += count;
            n -= count;
        }
        first += rows;
    }
    return 0;
}

/* Rows of an item that are read and packed at once: whole groups, about one piece. */
static uint32_t rows_at_once(const struct tensor *tensor)
{
    uint64_t row_bytes = gguf_row_bytes(tensor->type, tensor->cols);
    uint64_t groups = PIECE_BYTES / (row_bytes * KERNEL_ROW_GROUP);
    uint64_t rows = MAX(groups, (uint64_t)1) * KERNEL_ROW_GROUP;

    return (uint32_t)MIN(rows, (uint64_t)tensor->rows);
}

static int load_item(const struct load *load, const struct plan_item *item)
{
    struct tensor *tensor = item->tensor;
    uint32_t at_once;
    int r;

    if (!tensor)
        return load_bytes(load, item->sources[0], 0, (uint8_t *)*item->vector,
                          item->sources[0]->bytes);
    at_once = rows_at_once(tensor);
    for (uint32_t row = 0, n; row < tensor->rows; row += n) {
        n = MIN(at_once, tensor->rows - row);
        r = load_rows(load, item, row, n);
        if (r < 0)
            return r;
        load->plan->kernels->pack(tensor, row, n, load->buffer);
    }
    return 0;
}

static int compare_items(const void *a, const void *b)
{
    const struct plan_item *x = a, *y = b;

    return (x->sources[0]->offset > y->sources[0]->offset) -
           (x->sources[0]->offset < y->sources[0]->offset);
}

/* Reads everything, in the order of the file. */
static int load_all(struct load *load, size_t n_items)
{
    uint64_t total = 0;
    int r = 0;

    for (size_t i = 0; i < n_items; i++) {
        const struct plan_item *item = &load->plan->items[i];

        for (uint32_t k = 0; k < item->n_sources; k++)
            total += item->sources[k]->bytes;
        if (item->tensor)
            load->buffer_bytes =
                MAX(load->buffer_bytes, rows_at_once(item->tensor) *
                                            gguf_row_bytes(item->tensor->type, item->tensor->cols));
    }
    if (load->progress)
        atomic_store(&load->progress->total_bytes, total);
    load->buffer = malloc(load->buffer_bytes);
    if (!load->buffer)
        return fault_set(load->plan->fault, -ENOMEM, "no memory to read weights through");
    for (size_t i = 0; i < n_items && r == 0; i++)
        r = load_item(load, &load->plan->items[i]);
    free(load->buffer);
    return r;
}

/* ---- what is derived ---- */

/* The matrices' types, those with most bytes first. */
static void info_types(struct model_info *info, const struct plan *plan)
{
    struct {
        enum gguf_type type;
        uint64_t bytes;
    } types[16] = {0}, swap;
    size_t n = 0, k, used = 0;

    for (size_t i = 0; i < plan->n_items; i++) {
        const struct plan_item *item = &plan->items[i];

        if (!item->tensor)
            continue;
        for (k = 0; k < n && types[k].type != item->tensor->type; k++)
            ;
        if (k == ELEMENTSOF(types))
            continue;
        n = MAX(n, k + 1);
        types[k].type = item->tensor->type;
        types[k].bytes += item->tensor->bytes;
    }
    for (size_t i = 1; i < n; i++)
        for (k = i; k > 0 && types[k].bytes > types[k - 1].bytes; k--) {
            swap = types[k];
            types[k] = types[k - 1];
            types[k - 1] = swap;
        }
    for (k = 0; k < n && used < sizeof(info->types); k++)
        used += (size_t)snprintf(info->types + used, sizeof(info->types) - used, "%s%s",
                                 k ? " " : "", gguf_type_name(types[k].type));
}

/* general.name with everything but printable ASCII replaced: it goes to terminals and files. */
static void info_name(struct model_info *info, const struct gguf *gguf)
{
    struct gguf_string name = {0};

    if (gguf_get_string(gguf, "general.name", &name, NULL) < 0)
        return;
    name.len = MIN(name.len, sizeof(info->name) - 1);
    for (size_t i = 0; i < name.len; i++)
        info->name[i] = name.bytes[i] >= ' ' && name.bytes[i] <= '~' ? name.bytes[i] : '?';
}

static void model_describe(struct model *model, const struct plan *plan)
{
    const struct hparams *h = &model->hparams;
    struct model_info *info = &model->info;
    struct kv_shape f16 = {.n_kv_heads = h->n_kv_heads, .head_dim = h->head_dim};

    snprintf(info->architecture, sizeof(info->architecture), "%s", model->arch->name);
    info_name(info, plan->gguf);
    info_types(info, plan);
    info->n_vocab = h->n_vocab;
    info->n_embd = h->n_embd;
    info->n_layers = h->n_layers;
    info->n_heads = h->n_heads;
    info->n_kv_heads = h->n_kv_heads;
    info->head_dim = h->head_dim;
    info->n_ff = h->n_ff;
    info->context_tokens = model->context_tokens;
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct plan_item *item = &plan->items[i];

        for (uint32_t k = 0; k < item->n_sources; k++)
            info->n_params += item->sources[k]->dims[0] * item->sources[k]->dims[1];
        info->n_matrices += item->tensor && item->tensor != &model->weights.embedding;
    }
    info->n_matrices += model->weights.tied;
    info->weight_bytes = model->arena_bytes;
    info->other_bytes = tokenizer_bytes(model->tokenizer) + sizeof(*model) +
                        h->n_layers * sizeof(struct layer_weights);
    info->kv_token_bytes = model->kernels->kv_page_bytes(&f16) / KV_TILE * h->n_layers;
    info->header_hash = gguf_header_hash(plan->gguf);
}

/* The most that any matrix's prepared columns take. */
static void model_measure_prepared(struct model *model, const struct plan *plan)
{
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct tensor *tensor = plan->items[i].tensor;

        if (tensor)
            model->prepared_bytes =
                MAX(model->prepared_bytes,
                    model->kernels->prepared_bytes(tensor->type, tensor->cols, ENGINE_MAX_COLUMNS));
    }
}

static int model_make_frequencies(struct model *model, struct fault *ret_fault)
{
    const struct hparams *h = &model->hparams;
    uint32_t n = h->n_rot / 2;

    model->rope_frequencies = calloc(n, sizeof(double));
    if (!model->rope_frequencies)
        return fault_set(ret_fault, -ENOMEM, "no memory for a model's tables");
    for (uint32_t i = 0; i < n; i++) {
        double frequency = pow(h->rope_base, -2.0 * i / h->n_rot) * h->rope_position_scale;

        if (model->weights.rope_factors)
            frequency /= model->weights.rope_factors[i];
        model->rope_frequencies[i] = frequency;
    }
    return 0;
}

/* ---- the whole ---- */

/* What the header says: architecture, vocabulary, hyperparameters. */
static int model_read_header(struct model *model, const struct gguf *gguf, uint32_t context_tokens,
                             struct fault *ret_fault)
{
    struct gguf_string name;
    int r;

    r = gguf_get_string(gguf, "general.architecture", &name, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG, "the model lacks the key general.architecture");
    if (r < 0)
        return r;
    model->arch = arch_find(name);
    if (!model->arch) {
        char clean[ARCH_NAME_BYTES] = "";

        for (size_t i = 0; i < MIN(name.len, sizeof(clean) - 1); i++)
            clean[i] = isprint((unsigned char)name.bytes[i]) ? name.bytes[i] : '?';
        return fault_set(ret_fault, -ENOTSUP,
                         "the architecture \"%s\" is not supported; this version knows %s", clean,
                         arch_names());
    }
    r = tokenizer_new(gguf, &model->tokenizer, ret_fault);
    if (r < 0)
        return r;
    model->hparams.n_vocab = tokenizer_n_vocab(model->tokenizer);
    if (model->hparams.n_vocab == 0 || model->hparams.n_vocab > ARCH_MAX_VOCAB)
        return fault_set(ret_fault, -EBADMSG, "a vocabulary of %u tokens", model->hparams.n_vocab);
    r = model->arch->read(gguf, &model->hparams, ret_fault);
    if (r < 0)
        return r;
    model->context_tokens = model->hparams.context_tokens;
    if (context_tokens > 0)
        model->context_tokens = MIN(model->context_tokens, context_tokens);
    return 0;
}

/* The weights: planned, mapped, read. */
static int model_read_weights(struct model *model, struct plan *plan,
                              struct model_progress *progress)
{
    struct load load = {.plan = plan, .progress = progress, .buffer_bytes = PIECE_BYTES};
    int r;

    model->weights.layers = calloc(model->hparams.n_layers, sizeof(struct layer_weights));
    if (!model->weights.layers)
        return fault_set(plan->fault, -ENOMEM, "no memory for %u layers", model->hparams.n_layers);
    r = model->arch->plan(plan, &model->hparams, &model->weights);
    if (r == 0)
        r = plan_check_complete(plan);
    if (r < 0)
        return r;
    qsort(plan->items, plan->n_items, sizeof(plan->items[0]), compare_items);
    r = model_map(model, plan);
    if (r == 0)
        r = load_all(&load, plan->n_items);
    if (model->weights.tied)
        model->weights.output = model->weights.embedding;
    return r;
}

int model_load(const struct gguf_source *source, const struct model_load_options *options,
               struct model_progress *progress, struct model **ret_model, struct fault *ret_fault)
{
    _cleanup_(gguf_freep) struct gguf *gguf = NULL;
    _cleanup_(model_freep) struct model *model = NULL;
    _cleanup_(plan_donep) struct plan plan = {.kernels = options->kernels, .fault = ret_fault};
    int r;

    r = gguf_open(source, &gguf, ret_fault);
    if (r < 0)
        return r;
    plan.gguf = gguf;
    model = calloc(1, sizeof(*model));
    if (!model)
        return fault_set(ret_fault, -ENOMEM, "no memory for a model");
    model->kernels = options->kernels;
    r = model_read_header(model, gguf, options->context_tokens, ret_fault);
    if (r == 0)
        r = model_read_weights(model, &plan, progress);
    if (r == 0)
        r = model_make_frequencies(model, ret_fault);
    if (r < 0)
        return r;
    model_measure_prepared(model, &plan);
    model_describe(model, &plan);
    *ret_model = TAKE_PTR(model);
    return 0;
}

struct model *model_free(struct model *model)
{
    if (!model)
        return NULL;
    model_drop_sequences(model);
    step_done(&model->step);
    free(model->rope.values);
    free(model->rope_frequencies);
    if (model->arena)
        munmap(model->arena, model->arena_bytes);
    free(model->weights.layers);
    tokenizer_free(model->tokenizer);
    free(model);
    return NULL;
}

const struct model_info *model_info(const struct model *model)
{
    return &model->info;
}

const struct tokenizer *model_tokenizer(const struct model *model)
{
    return model->tokenizer;
}
