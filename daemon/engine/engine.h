/* The engine: models, sequences and steps.
 *
 * A model is a GGUF file's weights, repacked into memory, with its tokenizer; immutable once
 * loaded. A sequence is one text's place in one model: its KV pages and its length. A step advances
 * many sequences of one model at once: ragged rows, no padding, each weight matrix passed over
 * exactly once. A step is cut at layer boundaries (begin, slice..., end), so that its caller can
 * turn to something else between slices.
 *
 * Hides: architectures, layouts, the KV pool's pages, the compute team. Knows nobody above it.
 * Threads: model_load() on any thread. Engine, sequences and steps belong to the engine thread.
 * model_info(), model_tokenizer() and model_memory(): any thread while the model lives. */
#ifndef HEARTH_ENGINE_ENGINE_H
#define HEARTH_ENGINE_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/arena.h"
#include "daemon/engine/gguf.h"
#include "daemon/engine/kernels.h"
#include "daemon/engine/pulse.h"
#include "daemon/engine/tokenizer.h"

struct engine;
struct model;
struct sequence;

/* Most columns (tokens) and rows (sequences) of one step; longer prompts take several steps. */
#define ENGINE_MAX_COLUMNS 1024u
#define ENGINE_MAX_ROWS    512u

struct engine_options {
    const struct kernel_table *kernels;
    uint32_t threads; /* compute team, the engine thread included; 1: alone, 0: the CPUs allowed */
    uint64_t kv_budget_bytes;   /* all KV pages of all models together */
    bool kv_f32;                /* reference runs; else F16 */
    struct engine_pulse *pulse; /* tells others when steps run; NULL: nobody */
};

int engine_new(const struct engine_options *options, struct engine **ret_engine,
               struct fault *ret_fault);
struct engine *engine_free(struct engine *engine);
const struct kernel_table *engine_kernels(const struct engine *engine);
/* The compute team's size: options.threads, cut to the CPUs this process may run on. */
uint32_t engine_threads(const struct engine *engine);

/* ---- models ---- */

/* Shared with whoever shows progress; the loader's thread writes, any thread reads and cancels. */
struct model_progress {
    _Atomic uint64_t done_bytes;   /* of the file's tensor data */
    _Atomic uint64_t total_bytes;  /* known after the header */
    _Atomic uint64_t direct_bytes; /* of done_bytes, read past the page cache; set at the end */
    /* Of the weights' memory, what a predecessor left; set at the end. */
    _Atomic uint64_t recycled_bytes;
    _Atomic bool cancel; /* asks the load to end with -ECANCELED, before its next piece */
    /* Called by a loading thread between pieces; may be NULL. */
    void (*pause)(void *userdata);
    void *pause_userdata;
};

struct model_load_options {
    const struct kernel_table *kernels;
    uint32_t context_tokens; /* 0: the model's own */
    uint64_t max_bytes;      /* of packed weights: -ENOMEM beyond; 0: no bound */
    bool direct;             /* read what is not cached past the page cache */
    /* NULL: nobody computes meanwhile. Where steps run, new memory is taken in small pages:
     * clearing a huge one keeps a CPU for milliseconds. */
    const struct engine_pulse *pulse;
    /* What a predecessor left; NULL: nothing. The load takes it when it knows its size, by
     * exchange, so that somebody else may take it back until then. */
    struct arena_legacy *_Atomic *legacy;
};

struct model_info {
    char architecture[32];
    char name[128]; /* general.name, cleaned for display */
    char types[64]; /* types of the matrices by bytes: "Q4_K Q6_K F32" */
    uint32_t n_vocab, n_embd, n_layers, n_heads, n_kv_heads, head_dim, n_ff;
    uint32_t context_tokens;
    uint32_t n_matrices; /* as packed (some are fused): what a step passes over */
    uint64_t n_params;
    uint64_t weight_bytes;   /* memory of packed weights */
    uint64_t other_bytes;    /* tokenizer, tables */
    uint64_t kv_token_bytes; /* F16 KV of one position */
    /* What the widest step takes of scratch: so much a token, and a row whose logits are wanted. */
    uint64_t step_token_bytes, step_logits_bytes;
    uint64_t header_hash;
};

/* Reads and packs a whole model. -EBADMSG (malformed file), -ENOTSUP (architecture, type or
 * tokenizer that is not supported, named), -EIO, -ENOMEM, -ECANCELED. */
int model_load(const struct gguf_source *source, const struct model_load_options *options,
               struct model_progress *progress, struct model **ret_model, struct fault *ret_fault);

/* The same step by step, so that threads can take turns at a load or share it: a load is a row of
 * pieces (about a megabyte each), and whoever has time takes the next. Between the pieces it
 * belongs to nobody. */
struct model_load;

/* A thread's buffer for whatever loads it works at, and the piece it has taken; zeroed at first. */
struct load_hand {
    const struct model_load *load;
    uint8_t *buffer;
    size_t bytes;
    uint32_t piece;
    bool has_piece;
};
void load_hand_done(struct load_hand *hand);

/* Reads the header, the vocabulary, and plans; the source and `progress` must outlive the load. */
int model_load_begin(const struct gguf_source *source, const struct model_load_options *options,
                     struct model_progress *progress, struct model_load **ret_load,
                     struct fault *ret_fault);
/* Reads and packs one piece: 1; 0: none is left to take. After an error the piece stays the hand's,
 * which may try it again or give the load up. Any number of threads at once. */
int model_load_slice(struct model_load *load, struct load_hand *hand, struct fault *ret_fault);
/* Some piece has not been taken yet. */
bool model_load_wants_hands(const struct model_load *load);
/* All pieces are done: model_load_end() may be called. */
bool model_load_is_whole(const struct model_load *load);
/* The model; the load is only good for freeing then. Nobody may be at a slice. */
int model_load_end(struct model_load *load, struct model **ret_model, struct fault *ret_fault);
/* Nobody may be at a slice. Returns NULL. */
struct model_load *model_load_free(struct model_load *load);

struct model *model_free(struct model *model);
/* The same, but leaves up to `most` bytes of the weights' memory to a successor; NULL: none. */
struct arena_legacy *model_free_leaving(struct model *model, size_t most);
const struct model_info *model_info(const struct model *model);
const struct tokenizer *model_tokenizer(const struct model *model);

/* Memory that the engine has for the model now, beside what model_info tells. */
struct model_memory {
    /* Activations as far as its widest steps have touched them, its rotary table, and the tables of
     * its sequences: kept until it is freed, but for what engine_shrink_scratch() gives back. */
    uint64_t scratch_bytes;
    uint64_t activation_bytes; /* of these, what a model at rest can give back */
    uint64_t kv_bytes;         /* pages of its sequences and of the prefixes kept of it */
};
/* Any thread while the model lives. */
void model_memory(const struct model *model, struct model_memory *ret_memory);
/* Gives the activations of a model without sequences back where they are more than that; the next
 * steps touch them anew (engine thread). */
void engine_shrink_scratch(struct model *model, uint64_t kept_bytes);

/* Gives back the prefixes kept of a model without sequences (engine thread). */
void engine_forget_prefixes(struct engine *engine, struct model *model);

/* ---- sequences ---- */

/* A new, empty sequence with KV pages and all other memory of steps reserved for `reserve_tokens`
 * positions (capped at the context); unused prefixes give way. It may pool. -EAGAIN: not now, pages
 * are out; -ENOSPC: the whole budget would not do; -ENOMEM;
 * -EINVAL: the model was loaded for other kernels, or has sequences in another engine. */
int sequence_new(struct engine *engine, struct model *model, uint32_t reserve_tokens,
                 struct sequence **ret_sequence);
/* What one payer holds, counted by the engine: the pages of his sequences; a shared tile once, at
 * who made it or, where nobody used it any more, took it up again. Outlives the engine. */
struct kv_account {
    uint64_t bytes;
};

/* How a sequence begins that shares what it has in common with others of its owner. */
struct sequence_start {
    uint32_t reserve_tokens;    /* as for sequence_new() */
    uint32_t most_tokens;       /* it may grow to: -ENOSPC when the whole budget would not do */
    bool share;                 /* look for the ids' prefix, and let others have what it computes */
    bool pools;                 /* its steps may ask for ROW_POOLED */
    uint32_t owner;             /* with whom it shares: a uid, or one number for all */
    struct kv_account *account; /* who pays for its pages; NULL: nobody */
    const int32_t *ids;         /* what it will be fed first, not longer than the reservation; only
                                   read in the call */
    uint32_t n_ids;
};

/* A tile that another sequence is computing. */
struct prefix_wait {
    const struct sequence *maker;
    uint64_t serial; /* of its use as that sequence */
    uint32_t tile;
};

/* As sequence_new(). With `share` the longest prefix of the ids that is there, in whole tiles and
 * without the last id, is the new sequence's already: sequence_length() says how far. -EBUSY:
 * another sequence is computing a tile that this one could have; *ret_wait tells which. */
int sequence_begin(struct engine *engine, struct model *model, const struct sequence_start *start,
                   struct sequence **ret_sequence, struct prefix_wait *ret_wait);
/* The tile is there, or never will be: sequence_begin() has something new to say. While the model
 * lives. */
bool prefix_wait_over(const struct prefix_wait *wait);
/* Pages, and what else steps need, for n_tokens positions in all (capped at the context). -EAGAIN,
 * -ENOSPC, -ENOMEM: it is as it was. */
int sequence_reserve(struct sequence *sequence, uint32_t n_tokens);
/* Positions it has pages for, at most the context; and their bytes, shared ones included. */
uint32_t sequence_room(const struct sequence *sequence);
uint64_t sequence_bytes(const struct sequence *sequence);
/* Gives the pages back; what others computed or could use stays while nobody needs the memory.
 * `ids`: those of all its positions; only read when it shares. Returns NULL. */
struct sequence *sequence_retire(struct sequence *sequence, const int32_t *ids);
/* Gives the pages back (those of its prompt stay as in sequence_retire()). Returns NULL. */
struct sequence *sequence_free(struct sequence *sequence);
/* Positions stored so far. */
uint32_t sequence_length(const struct sequence *sequence);

struct engine_kv_stats {
    uint64_t budget_bytes, used_bytes; /* used: reserved by sequences */
    uint64_t prefix_bytes;             /* kept prefixes that no sequence uses */
    uint64_t sequences;
};
void engine_kv_stats(const struct engine *engine, struct engine_kv_stats *ret_stats);
/* Bytes of the pages for n_tokens positions (capped at the context) of the model. */
uint64_t engine_kv_bytes(const struct engine *engine, const struct model *model, uint32_t n_tokens);
/* Positions that a sequence can have at most: the model's context, or what the budget gives. */
uint32_t engine_context_tokens(const struct engine *engine, const struct model *model);

/* ---- steps ---- */

enum row_wants {
    ROW_NOTHING, /* a prompt's middle chunk */
    ROW_LOGITS,  /* logits after the row's last token */
    /* The mean of all the sequence's normalised hidden states so far, L2-normalised. A prompt in
     * chunks asks for it with every chunk, the first too: others drop what it would need. */
    ROW_POOLED,
};

struct step_row {
    struct sequence *sequence; /* each at most once a step */
    const int32_t *tokens;     /* valid until engine_step_end() */
    uint32_t n_tokens;         /* >= 1 */
    enum row_wants wants;
    /* Set by engine_step_end(): n_vocab logits (may be changed by the sampler) or n_embd floats,
     * valid until the model's next step; NULL for ROW_NOTHING. */
    float *ret_values;
    /* Set by engine_step_begin(): why this row cannot take part, negative; 0: it could. */
    int error;
};

/* Begins a step of one model. At most one step a model is open (-EBUSY); steps of different models
 * may be open at once. -EINVAL: rows whose `error` says so (a token outside the vocabulary, a
 * sequence of another model or twice, one that would outgrow its reservation, ROW_POOLED after a
 * chunk without it or of one that does not pool), or, where none does, no row or more than
 * ENGINE_MAX_ROWS, or more than ENGINE_MAX_COLUMNS columns. Nothing has changed then. Takes no
 * memory: sequences brought what their steps need. */
int engine_step_begin(struct engine *engine, struct model *model, struct step_row *rows,
                      uint32_t n_rows);
/* Computes the next slice (a layer, at last the output): 1 when there is more, 0 when done. */
int engine_step_slice(struct engine *engine, struct model *model);
/* Ends it: sequences have grown by their rows, ret_values are set. */
void engine_step_end(struct engine *engine, struct model *model);
/* Gives up an open step wherever it is. Its sequences are only good for freeing then. */
void engine_step_abandon(struct engine *engine, struct model *model);

struct engine_step_stats {
    uint64_t steps, columns, rows;
    /* Matrices passed over: model_info.n_matrices x steps, whatever the batch. A step in which no
     * row wants values ends after the last layer's keys and values, and counts what it did; nor is
     * the output matrix passed over where no row wants logits. */
    uint64_t weight_passes;
    uint64_t padded_columns; /* columns computed and thrown away by kernels */
};
void model_step_stats(const struct model *model, struct engine_step_stats *ret_stats);

#endif
