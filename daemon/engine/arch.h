/* Architectures: what differs between families of models.
 *
 * An architecture is a table: how it reads its hyperparameters, which tensors it plans for, and how
 * one layer turns the step's columns. Loading, memory and stepping are common and know only this
 * table; a new family is a new arch_<name>.c and a line in arch.c.
 *
 * Hides: key names, tensor names, the order of operations inside a layer. */
#ifndef HEARTH_ENGINE_ARCH_H
#define HEARTH_ENGINE_ARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"
#include "daemon/engine/kernels.h"
#include "lib/fault.h"

/* Bounds of what a file may claim; well beyond any model, well within 32-bit products. */
#define ARCH_MAX_LAYERS  1024u
#define ARCH_MAX_HEADS   1024u
#define ARCH_MAX_WIDTH   (1u << 20) /* n_embd, n_ff, head_dim */
#define ARCH_MAX_VOCAB   (1u << 24)
#define ARCH_MAX_CONTEXT (1u << 24)
#define ARCH_NAME_BYTES  32u

struct hparams {
    uint32_t n_vocab; /* the tokenizer's */
    uint32_t n_embd, n_layers, n_heads, n_kv_heads, head_dim, n_ff;
    uint32_t context_tokens; /* what the model was made for */
    float norm_eps;
    float attention_scale;
    uint32_t n_rot; /* dimensions of a head that are rotated */
    bool rope_adjacent;
    float rope_base;
    float rope_position_scale; /* linear scaling: positions are multiplied by it */
};

/* A layer's weights. Matrices that multiply the same columns and have the same type are one
 * tensor: qkv[] has one to three parts, stored one below the other in `qkv` rows of a column. */
struct layer_weights {
    float *attn_norm, *ffn_norm;
    struct tensor qkv[3];
    uint32_t qkv_row[3]; /* where the part begins in the column */
    uint32_t n_qkv;
    struct tensor attn_output, ffn_gate, ffn_up, ffn_down;
};

struct weights {
    struct tensor embedding;
    struct tensor output; /* the embedding again where tied */
    bool tied;
    float *output_norm;
    float *rope_factors; /* frequencies are divided by them; NULL: none */
    struct layer_weights *layers;
};

struct plan;
struct step;

struct arch {
    const char *name; /* general.architecture */
    /* Reads and checks. -EBADMSG with a sentence naming the key; -ENOTSUP for a feature that would
     * change the answer and is not there. hparams->n_vocab is set before. */
    int (*read)(const struct gguf *gguf, struct hparams *hparams, struct fault *ret_fault);
    /* Names every tensor with its shape; weights->layers is allocated. */
    int (*plan)(struct plan *plan, const struct hparams *hparams, struct weights *weights);
    /* Carries the step's columns through layer `index`. */
    void (*layer)(struct step *step, uint32_t index);
};

/* NULL: not known. */
const struct arch *arch_find(struct gguf_string name);
/* "llama, ...": for the sentence that refuses another. */
const char *arch_names(void);

/* The keys that all decoders of the llama line share, under the prefix `name`. */
int arch_read_decoder(const struct gguf *gguf, const char *name, struct hparams *hparams,
                      struct fault *ret_fault);

/* ---- planning: every call claims tensors of the file; -EBADMSG where one is missing or has
 * another shape, -ENOTSUP where its type is not supported ---- */

bool plan_has(const struct plan *plan, const char *name);
int plan_matrix(struct plan *plan, struct tensor *tensor, const char *name, uint32_t rows,
                uint32_t cols);
/* A vector of n floats, kept as F32. */
int plan_vector(struct plan *plan, float **ret_vector, const char *name, uint32_t n);
/* The three projections of a layer; those of one type that follow each other are fused. */
int plan_qkv(struct plan *plan, struct layer_weights *layer, const char *const names[3],
             const uint32_t rows[3], uint32_t cols);

extern const struct arch arch_llama;

#endif
