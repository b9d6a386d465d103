/* Model maker: a whole GGUF model of any shape with random weights, for benchmarks and tests.
 *
 * A plan says what to make; the same plan gives the same bytes on every machine. Weights have a
 * standard deviation of 1/sqrt(row length), norms lie around 1. Bytes go to the caller's sink in
 * the order of the file, in pieces; memory stays bounded by the header and one piece.
 *
 * Hides: each architecture's keys and tensors, the mixes of types, the random numbers.
 * Thread: pure but for the sink. */
#ifndef HEARTH_BENCH_MODEL_MAKER_H
#define HEARTH_BENCH_MODEL_MAKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bench/vocabulary.h"
#include "lib/fault.h"

enum plan_arch {
    PLAN_LLAMA,
    PLAN_QWEN2,
    PLAN_QWEN3,
    PLAN_GEMMA3,
    PLAN_BERT,
    PLAN_N_ARCHS,
};

/* Types of the matrices; what is one-dimensional is always F32. */
enum plan_type {
    PLAN_F32,
    PLAN_F16,
    PLAN_BF16,
    PLAN_Q8_0,
    PLAN_Q4_0,
    PLAN_Q4_K,
    PLAN_Q6_K,
    PLAN_Q4_K_M, /* Q4_K, and Q6_K for the output and in half of the layers for v and down */
    PLAN_N_TYPES,
};

struct model_plan {
    enum plan_arch arch;
    enum plan_type type;
    enum vocabulary_kind vocabulary;
    uint32_t dim, layers, heads, kv_heads, ff;
    uint32_t vocab, context; /* tokens */
    bool tied;               /* the output is the token embedding (gemma3 always) */
    uint64_t seed;
};

/* 256 wide, 4 layers, 3,000 tokens: 4.1 million parameters in Q8_0. */
struct model_plan model_plan_default(void);
/* By the name that files and command lines use ("qwen2", "q4_k_m", "gpt2"), letter case ignored;
 * -EINVAL. */
int plan_arch_from_name(const char *name, enum plan_arch *ret_arch);
int plan_type_from_name(const char *name, enum plan_type *ret_type);
int plan_vocabulary_from_name(const char *name, enum vocabulary_kind *ret_kind);
/* -EINVAL with a sentence for a plan that no model can have. */
int model_plan_check(const struct model_plan *plan, struct fault *ret_fault);

/* Takes the next `len` bytes of the file; a negative errno ends the making. */
typedef int (*model_sink)(void *userdata, const void *bytes, size_t len);

/* -EINVAL (as model_plan_check()), -ENOMEM, or the sink's error. A matrix whose rows the type's
 * blocks do not divide becomes Q8_0 or, where that does not fit either, F16. */
int model_make(const struct model_plan *plan, model_sink sink, void *userdata,
               struct fault *ret_fault);
/* The same into a file that is open for writing; it stays the caller's. */
int model_make_to_fd(const struct model_plan *plan, int fd, struct fault *ret_fault);

#endif
