#include "daemon/engine/plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

/* Tensors that some converters write and no computation reads. */
#define IGNORED_SUFFIX ".attn_rot_embd"

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

/* Every tensor of the file has its place. */
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

static int compare_items(const void *a, const void *b)
{
    const struct plan_item *x = a, *y = b;

    return (x->sources[0]->offset > y->sources[0]->offset) -
           (x->sources[0]->offset < y->sources[0]->offset);
}

int plan_finish(struct plan *plan)
{
    int r = plan_check_complete(plan);

    if (r == 0)
        qsort(plan->items, plan->n_items, sizeof(plan->items[0]), compare_items);
    return r;
}

static size_t round_up(size_t bytes)
{
    return (bytes + KERNEL_ALIGN - 1) & ~(size_t)(KERNEL_ALIGN - 1);
}

size_t plan_item_bytes(const struct plan_item *item)
{
    return round_up(item->tensor ? item->tensor->bytes : item->sources[0]->bytes);
}

uint64_t plan_item_file_bytes(const struct plan_item *item)
{
    uint64_t bytes = 0;

    for (uint32_t k = 0; k < item->n_sources; k++)
        bytes += item->sources[k]->bytes;
    return bytes;
}

void plan_done(struct plan *plan)
{
    free(plan->items);
}
