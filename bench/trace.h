/* A trace: who is asked for when. The shapes that `hearth-bench preload` simulates, made from a
 * seed, or one read from a file.
 *
 * Hides the generators. A trace of the adversary has times alone: it asks for what the policy has
 * just evicted, so the simulation fills in its models. */
#ifndef HEARTH_BENCH_TRACE_H
#define HEARTH_BENCH_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/model/predictor.h"

enum trace_kind { TRACE_CHAIN, TRACE_HABIT, TRACE_ZIPF, TRACE_RANDOM, TRACE_ADVERSARY, _TRACE_MAX };

struct trace_request {
    uint64_t at_us;
    uint32_t model;
};

struct trace {
    const char *name;
    uint64_t seed;
    bool adaptive; /* models are not in it */
    uint32_t n_models;
    size_t n_requests;
    struct trace_request *requests;
    uint64_t bytes[PREDICTOR_MAX_MODELS];
    char *names[PREDICTOR_MAX_MODELS]; /* of a file's; else NULL */
    /* How likely each follows each, in the first half of the requests and in the second. */
    float *matrix[2];
};

const char *trace_kind_name(enum trace_kind kind);
/* NULL: no memory. */
struct trace *trace_make(enum trace_kind kind, uint64_t seed);
/* Lines of `seconds model bytes`, blanks between, `#` for comments. NULL after saying why. */
struct trace *trace_read(const char *path);
/* Counts the matrix from the requests. */
void trace_count_matrix(struct trace *trace);
struct trace *trace_free(struct trace *trace);

#endif
