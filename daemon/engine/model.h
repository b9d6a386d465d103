/* A model inside the engine: what loading makes and what its steps keep with it.
 *
 * For the engine's own files; everybody else knows `struct model` by engine.h alone. Loading fills
 * the first half, which never changes again. The second half belongs to the engine thread: idle
 * sequences, the model's pages, its rotary table, its activations. */
#ifndef HEARTH_ENGINE_MODEL_H
#define HEARTH_ENGINE_MODEL_H

#include "daemon/engine/arch.h"
#include "daemon/engine/arena.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/kv.h"
#include "daemon/engine/prefix.h"
#include "daemon/engine/step.h"
#include "daemon/engine/team.h"

struct engine {
    struct engine_options options;
    struct kv_pool *pool;
    struct team *team;
    uint64_t n_sequences;
    uint64_t n_begun;         /* sequences so far */
    struct kv_account nobody; /* of sequences without a payer */
    struct prefix_cache prefixes;
    /* one block of attention scratch a thread, grown as contexts ask for it */
    uint8_t *scratch;
    size_t scratch_bytes; /* of one thread */
};

struct sequence {
    struct engine *engine;
    struct model *model;
    struct sequence *next_idle;
    uint32_t length, reserved_tokens;
    uint32_t n_tiles;     /* of its reservation */
    uint32_t tile_stride; /* pages[layer * tile_stride + tile] */
    void **pages;
    uint64_t serial; /* the engine's count when it began; 0: idle */
    bool shares;
    uint32_t owner;
    struct kv_account *account; /* never NULL */
    struct prefix *prefix;      /* the last of its first n_shared tiles, which it only uses */
    uint32_t n_shared;          /* the others' pages are its own */
    uint32_t n_shared_done;     /* of these, computed */
    bool in_step;
    uint32_t pooled_length; /* positions that `pooled` sums */
    bool pools;
    float *pooled; /* n_embd; NULL until it was one that pools */
};

/* Cosines and sines of the positions seen so far: n_rot / 2 of each a position. */
struct rope_table {
    float *values;
    uint32_t n_positions, n_room;
};

struct model {
    const struct kernel_table *kernels;
    const struct arch *arch;
    struct hparams hparams;
    uint32_t context_tokens; /* the least of model's, option's */
    struct weights weights;
    struct tokenizer *tokenizer;
    struct model_info info;
    struct arena arena;       /* packed weights and vectors */
    size_t prepared_bytes;    /* the most that prepared columns of one step take */
    double *rope_frequencies; /* n_rot / 2 */

    /* the engine thread's */
    struct engine *engine; /* that has sequences of it */
    uint32_t n_sequences;
    uint32_t n_prefixes;   /* kept of it */
    struct sequence *idle; /* freed ones, without pages */
    struct kv_shape kv_shape;
    struct kv_space kv;
    struct rope_table rope;
    struct step step;
    struct engine_step_stats stats;
    /* Of activations, rotary table and sequences. Any thread reads it, as it does kv.used_bytes. */
    _Atomic uint64_t scratch_bytes, activation_bytes /* of these */;
};

struct plan;

/* What a loaded model is asked for, from its plan and its weights: the last step of a load. */
int model_derive(struct model *model, const struct plan *plan, struct fault *ret_fault);

/* Room in the table for n_positions (at most the context). -ENOMEM. */
int rope_reserve(struct model *model, uint32_t n_positions);
/* Makes the table reach n_positions, for which there is room. */
void rope_reach(struct model *model, uint32_t n_positions);
static inline const float *rope_cosines(const struct model *model, uint32_t position)
{
    return model->rope.values + (size_t)position * model->hparams.n_rot;
}

/* So much more, or less (modulo 2^64); by the engine thread alone. */
static inline void model_count(_Atomic uint64_t *counter, uint64_t bytes)
{
    uint64_t so_far = atomic_load_explicit(counter, memory_order_relaxed);

    atomic_store_explicit(counter, so_far + bytes, memory_order_relaxed);
}

static inline void model_count_scratch(struct model *model, uint64_t bytes)
{
    model_count(&model->scratch_bytes, bytes);
}

/* Lets others have the tiles of its prompt that are computed now. */
void sequence_publish(struct sequence *sequence);

/* Frees what the engine thread kept with the model; no sequence may be left. */
void model_drop_sequences(struct model *model);

#endif
