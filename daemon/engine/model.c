#include "daemon/engine/model.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/engine/plan.h"
#include "lib/cleanup.h"

/* ---- what is derived from a file ---- */

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
    info->weight_bytes = model->arena.bytes;
    info->other_bytes = tokenizer_bytes(model->tokenizer) + sizeof(*model) +
                        h->n_layers * sizeof(struct layer_weights);
    info->kv_token_bytes = model->kernels->kv_page_bytes(&f16) / KV_TILE * h->n_layers;
    info->step_token_bytes = step_token_bytes(model);
    info->step_logits_bytes = step_logits_bytes(model);
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

int model_derive(struct model *model, const struct plan *plan, struct fault *ret_fault)
{
    int r = model_make_frequencies(model, ret_fault);

    if (r < 0)
        return r;
    model_measure_prepared(model, plan);
    model_describe(model, plan);
    return 0;
}

/* ---- life ---- */

struct model *model_free(struct model *model)
{
    model_free_leaving(model, 0);
    return NULL;
}

struct arena_legacy *model_free_leaving(struct model *model, size_t most)
{
    struct arena_legacy *legacy;

    if (!model)
        return NULL;
    model_drop_sequences(model);
    step_done(&model->step);
    free(model->rope.values);
    free(model->rope_frequencies);
    legacy = arena_leave(&model->arena, most);
    free(model->weights.layers);
    tokenizer_free(model->tokenizer);
    free(model);
    return legacy;
}

const struct model_info *model_info(const struct model *model)
{
    return &model->info;
}

const struct tokenizer *model_tokenizer(const struct model *model)
{
    return model->tokenizer;
}

void model_memory(const struct model *model, struct model_memory *ret_memory)
{
    *ret_memory = (struct model_memory){
        .scratch_bytes = atomic_load_explicit(&model->scratch_bytes, memory_order_relaxed),
        .activation_bytes = atomic_load_explicit(&model->activation_bytes, memory_order_relaxed),
        .kv_bytes = atomic_load_explicit(&model->kv.used_bytes, memory_order_relaxed),
    };
}
