/* llama: RMS norms, rotary positions in adjacent pairs, grouped attention, a gated SiLU.
 * Source of the names: the GGUF specification's list of standardised keys and tensors. */
#include <errno.h>
#include <stdio.h>

#include "daemon/engine/arch.h"
#include "daemon/engine/step.h"

static int llama_read(const struct gguf *gguf, struct hparams *hparams, struct fault *ret_fault)
{
    uint32_t n_experts = 0;
    int r;

    r = gguf_get_u32(gguf, "llama.expert_count", &n_experts, ret_fault);
    if (r < 0 && r != -ENOENT)
        return r;
    if (n_experts > 0)
        return fault_set(ret_fault, -ENOTSUP,
                         "the model has %u experts a layer; this version knows dense models alone",
                         n_experts);
    hparams->rope_adjacent = true;
    return arch_read_decoder(gguf, "llama", hparams, ret_fault);
}

/* A layer's tensor name. */
struct layer_name {
    char text[64];
};

static struct layer_name name_of(uint32_t layer, const char *suffix)
{
    struct layer_name name;

    snprintf(name.text, sizeof(name.text), "blk.%u.%s.weight", layer, suffix);
    return name;
}

static int llama_plan_layer(struct plan *plan, const struct hparams *h, struct layer_weights *layer,
                            uint32_t i)
{
    struct layer_name q = name_of(i, "attn_q"), k = name_of(i, "attn_k"), v = name_of(i, "attn_v");
    const char *const names[3] = {q.text, k.text, v.text};
    uint32_t n_q = h->n_heads * h->head_dim, n_kv = h->n_kv_heads * h->head_dim;
    const uint32_t rows[3] = {n_q, n_kv, n_kv};
    int r;

    r = plan_vector(plan, &layer->attn_norm, name_of(i, "attn_norm").text, h->n_embd);
    if (r == 0)
        r = plan_qkv(plan, layer, names, rows, h->n_embd);
    if (r == 0)
        r = plan_matrix(plan, &layer->attn_output, name_of(i, "attn_output").text, h->n_embd, n_q);
    if (r == 0)
        r = plan_vector(plan, &layer->ffn_norm, name_of(i, "ffn_norm").text, h->n_embd);
    if (r == 0)
        r = plan_matrix(plan, &layer->ffn_gate, name_of(i, "ffn_gate").text, h->n_ff, h->n_embd);
    if (r == 0)
        r = plan_matrix(plan, &layer->ffn_up, name_of(i, "ffn_up").text, h->n_ff, h->n_embd);
    if (r == 0)
        r = plan_matrix(plan, &layer->ffn_down, name_of(i, "ffn_down").text, h->n_embd, h->n_ff);
    return r;
}

static int llama_plan(struct plan *plan, const struct hparams *h, struct weights *weights)
{
    int r;

    r = plan_matrix(plan, &weights->embedding, "token_embd.weight", h->n_vocab, h->n_embd);
    if (r < 0)
        return r;
    weights->tied = !plan_has(plan, "output.weight");
    if (!weights->tied)
        r = plan_matrix(plan, &weights->output, "output.weight", h->n_vocab, h->n_embd);
    if (r == 0)
        r = plan_vector(plan, &weights->output_norm, "output_norm.weight", h->n_embd);
    if (r == 0 && plan_has(plan, "rope_freqs.weight"))
        r = plan_vector(plan, &weights->rope_factors, "rope_freqs.weight", h->n_rot / 2);
    for (uint32_t i = 0; i < h->n_layers && r == 0; i++)
        r = llama_plan_layer(plan, h, &weights->layers[i], i);
    return r;
}

static void llama_layer(struct step *step, uint32_t index)
{
    const struct layer_weights *layer = step_layer(step, index);

    step_norm(step, layer->attn_norm);
    step_project_qkv(step, layer);
    step_rotate_and_store(step, index);
    if (!step_keep_wanted(step, index))
        return;
    step_attend(step, index);
    step_project_attention(step, &layer->attn_output);
    step_norm(step, layer->ffn_norm);
    step_feed_forward(step, &layer->ffn_gate, &layer->ffn_up, &layer->ffn_down);
}

const struct arch arch_llama = {
    .name = "llama",
    .read = llama_read,
    .plan = llama_plan,
    .layer = llama_layer,
};
