/* A step's columns on their way through a model, and the operations an architecture's layer is
 * written in.
 *
 * A column is one token of one sequence. All columns of all rows go through each matrix together.
 * After the last layer's keys and values are stored, only columns whose hidden state somebody wants
 * are carried on: nothing reads the others.
 *
 * Hides: activation memory, preparation of activations, the compute team, counting.
 * Thread: the engine thread. */
#ifndef HEARTH_ENGINE_STEP_H
#define HEARTH_ENGINE_STEP_H

#include "daemon/engine/arch.h"
#include "daemon/engine/engine.h"

struct column {
    struct sequence *sequence;
    uint32_t position;
    uint32_t source; /* its place in qkv: its own number until columns are dropped */
    uint32_t row;
    bool wanted;
};

struct step {
    struct model *model;
    struct engine *engine;
    bool open, team;
    struct step_row *rows; /* the caller's */
    uint32_t n_rows;
    uint32_t n_columns; /* carried now */
    uint32_t stage;     /* next layer; n_layers: the output; beyond: done */
    uint32_t n_begun;   /* columns it began with */
    struct column columns[ENGINE_MAX_COLUMNS];

    /* Activations for ENGINE_MAX_COLUMNS columns, one mapping made with the first sequence, touched
     * as far as steps are wide. */
    uint8_t *memory;
    size_t memory_bytes;
    /* Of any step since they were touched last from the beginning. */
    uint32_t most_columns, most_logits;

    float *x;         /* n_embd: the residual stream */
    float *h;         /* n_embd: normalised */
    float *out;       /* n_embd: what a block adds; at the end pooled vectors */
    float *qkv;       /* (n_heads + 2 n_kv_heads) * head_dim */
    float *attended;  /* n_heads * head_dim */
    float *gate, *up; /* n_ff */
    void *prepared;
    float *logits; /* ENGINE_MAX_ROWS x logits_stride */
    size_t logits_stride;
};

static inline uint32_t qkv_rows(const struct hparams *h)
{
    return (h->n_heads + 2 * h->n_kv_heads) * h->head_dim;
}

const struct layer_weights *step_layer(const struct step *step, uint32_t index);

/* h = RMS norm of x */
void step_norm(struct step *step, const float *weight);
/* qkv = the three projections of h */
void step_project_qkv(struct step *step, const struct layer_weights *layer);
/* Rotates q and k in place and stores k and v in the sequences' pages of this layer. */
void step_rotate_and_store(struct step *step, uint32_t layer);
/* In the last layer drops columns that nobody wants; false when none is left to carry. */
bool step_keep_wanted(struct step *step, uint32_t layer);
/* attended = attention of q over the sequence's positions up to the column's own */
void step_attend(struct step *step, uint32_t layer);
/* x += projection of attended */
void step_project_attention(struct step *step, const struct tensor *projection);
/* x += down(silu(gate(h)) * up(h)) */
void step_feed_forward(struct step *step, const struct tensor *gate, const struct tensor *up,
                       const struct tensor *down);

/* What a token, and a row whose logits are wanted, take of a step's activations. */
uint64_t step_token_bytes(const struct model *model);
uint64_t step_logits_bytes(const struct model *model);
/* Memory for steps of the model on the engine whose rows end at n_positions at most, kept for all
 * that follow: activations, attention's scratch, room in the rotary table. -ENOMEM. */
int step_reserve(struct engine *engine, struct model *model, uint32_t n_positions);
/* Gives the activations' memory back where it is more than so much; no step may be open. */
void step_shrink(struct step *step, uint64_t kept_bytes);
/* Unmaps the activations. */
void step_done(struct step *step);

#endif
