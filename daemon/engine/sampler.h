/* Sampler: one token out of a row of logits.
 *
 * Order: repetition penalty, temperature, top-k, top-p, min-p, then a draw. The random number is a
 * hash of (seed, position), so a token depends on its own request alone; ties break by token id.
 *
 * Hides: selection algorithms and the hash. Thread: no state beyond the caller's scratch. */
#ifndef HEARTH_ENGINE_SAMPLER_H
#define HEARTH_ENGINE_SAMPLER_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/kernels.h"

/* Tokens the repetition penalty looks back on. */
#define SAMPLER_PENALTY_WINDOW 64u

struct sampler_params {
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* 0: off */
    float top_p;          /* >= 1: off */
    float min_p;          /* 0: off */
    float repeat_penalty; /* 1: off; a positive logit is divided, a negative multiplied */
    uint64_t seed;
};

struct sampler_scratch; /* grows to the largest vocabulary seen */
struct sampler_scratch *sampler_scratch_free(struct sampler_scratch *scratch);

/* Picks a token. `logits` (n_vocab floats) may be changed. recent: the last n_recent tokens of
 * prompt and completion (at most SAMPLER_PENALTY_WINDOW are looked at, the newest last).
 * `position`: index of the token to be picked within its sequence. Returns the id, or -ENOMEM. */
int32_t sampler_pick(const struct sampler_params *params, const struct kernel_table *kernels,
                     float *logits, uint32_t n_vocab, const int32_t *recent, size_t n_recent,
                     uint64_t position, struct sampler_scratch **scratch);

#endif
