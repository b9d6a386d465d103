#include "bench/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/bench.h"
#include "bench/random.h"
#include "lib/cleanup.h"
#include "lib/wire.h"

#define MADE_REQUESTS 5000u
#define MADE_MODELS   20u
#define CHAIN_KEPT    0.9
#define GAP_MIN_S     5.0
#define GAP_MAX_S     30.0
#define SIZE_MIN_GB   0.25
#define SIZE_MAX_GB   4.0

/* Bounds of a file. */
#define FILE_REQUESTS  1000000u
#define FILE_MAX_S     1e12
#define FILE_MAX_BYTES (UINT64_C(1) << 50) /* of a model */

const char *trace_kind_name(enum trace_kind kind)
{
    static const char *const names[] = {
        [TRACE_CHAIN] = "chain",   [TRACE_HABIT] = "habit",         [TRACE_ZIPF] = "zipf",
        [TRACE_RANDOM] = "random", [TRACE_ADVERSARY] = "adversary",
    };
    return names[kind];
}

/* ---- chance ---- */

static double draw_unit(uint64_t *state)
{
    return (double)(random_next(state) >> 11) * 0x1p-53;
}

static uint32_t draw_below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(draw_unit(state) * n);
}

static void shuffle(uint64_t *state, uint32_t *items, uint32_t n)
{
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = draw_below(state, i), t = items[j];
        items[j] = items[i - 1];
        items[i - 1] = t;
    }
}

/* ---- made ---- */

/* A chain through all models: each is followed by the next of a shuffled circle, or by anyone. */
static void chain_matrix(uint64_t *state, float *matrix)
{
    uint32_t circle[MADE_MODELS];

    for (uint32_t i = 0; i < MADE_MODELS; i++)
        circle[i] = i;
    shuffle(state, circle, MADE_MODELS);
    for (uint32_t i = 0; i < MADE_MODELS; i++) {
        float *row = matrix + circle[i] * MADE_MODELS;
        for (uint32_t m = 0; m < MADE_MODELS; m++)
            row[m] = (float)(1 - CHAIN_KEPT) / MADE_MODELS;
        row[circle[(i + 1) % MADE_MODELS]] += (float)CHAIN_KEPT;
    }
}

/* The same for every row: what came before does not matter. */
static void frequency_matrix(uint64_t *state, bool zipf, float *matrix)
{
    uint32_t by_rank[MADE_MODELS];
    double sum = 0;

    for (uint32_t i = 0; i < MADE_MODELS; i++)
        by_rank[i] = i;
    shuffle(state, by_rank, MADE_MODELS);
    for (uint32_t i = 0; i < MADE_MODELS; i++)
        sum += zipf ? 1.0 / (i + 1) : 1;
    for (uint32_t i = 0; i < MADE_MODELS; i++)
        for (uint32_t row = 0; row < MADE_MODELS; row++)
            matrix[row * MADE_MODELS + by_rank[i]] = (float)((zipf ? 1.0 / (i + 1) : 1) / sum);
}

static uint32_t draw_model(uint64_t *state, const float *row)
{
    double u = draw_unit(state);
    uint32_t m = 0;

    while (m + 1 < MADE_MODELS && u >= row[m])
        u -= row[m++];
    return m;
}

static void make_matrices(struct trace *trace, enum trace_kind kind, uint64_t *state)
{
    bool pattern = kind == TRACE_CHAIN || kind == TRACE_HABIT;

    if (pattern)
        chain_matrix(state, trace->matrix[0]);
    else
        frequency_matrix(state, kind == TRACE_ZIPF, trace->matrix[0]);
    if (kind == TRACE_HABIT)
        chain_matrix(state, trace->matrix[1]);
    else
        memcpy(trace->matrix[1], trace->matrix[0],
               sizeof(*trace->matrix[0]) * MADE_MODELS * MADE_MODELS);
}

static struct trace *trace_new(uint32_t n_models, size_t n_requests)
{
    struct trace *trace = calloc(1, sizeof(*trace));

    if (!trace)
        return NULL;
    trace->n_models = n_models;
    trace->n_requests = n_requests;
    trace->requests = calloc(n_requests, sizeof(*trace->requests));
    for (uint32_t h = 0; h < 2; h++)
        trace->matrix[h] = calloc((size_t)n_models * n_models, sizeof(*trace->matrix[h]));
    if (!trace->requests || !trace->matrix[0] || !trace->matrix[1])
        return trace_free(trace);
    return trace;
}

struct trace *trace_make(enum trace_kind kind, uint64_t seed)
{
    struct trace *trace = trace_new(MADE_MODELS, MADE_REQUESTS);
    uint64_t state = seed * 1000003u + (uint64_t)kind;
    double at_s = 0;
    uint32_t model;

    if (!trace)
        return NULL;
    trace->name = trace_kind_name(kind);
    trace->seed = seed;
    trace->adaptive = kind == TRACE_ADVERSARY;
    for (uint32_t m = 0; m < MADE_MODELS; m++)
        trace->bytes[m] =
            (uint64_t)(SIZE_MIN_GB * 1e9 * pow(SIZE_MAX_GB / SIZE_MIN_GB, draw_unit(&state)));
    make_matrices(trace, kind, &state);
    model = draw_below(&state, MADE_MODELS);
    for (size_t i = 0; i < MADE_REQUESTS; i++) {
        const float *matrix = trace->matrix[i >= MADE_REQUESTS / 2];
        at_s += GAP_MIN_S + (GAP_MAX_S - GAP_MIN_S) * draw_unit(&state);
        model = draw_model(&state, matrix + model * MADE_MODELS);
        trace->requests[i] = (struct trace_request){(uint64_t)(at_s * 1e6), model};
    }
    return trace;
}

/* ---- read ---- */

/* The model's number; -1: too many. */
static int file_model(struct trace *trace, const char *name, uint64_t bytes)
{
    uint32_t m = 0;

    while (m < trace->n_models && strcmp(trace->names[m], name) != 0)
        m++;
    if (m == PREDICTOR_MAX_MODELS)
        return -1;
    if (m == trace->n_models) {
        trace->names[m] = strdup(name);
        if (!trace->names[m])
            return -1;
        trace->n_models++;
    }
    trace->bytes[m] = bytes;
    return (int)m;
}

static bool read_line(struct trace *trace, const char *line, const char **ret_why)
{
    char name[WIRE_MAX_MODEL_NAME + 1], more;
    struct trace_request *request = &trace->requests[trace->n_requests];
    double at_s;
    uint64_t bytes;
    int model;

    if (sscanf(line, "%lf %128s %" SCNu64 " %c", &at_s, name, &bytes, &more) != 3 || bytes == 0 ||
        bytes > FILE_MAX_BYTES || !(at_s >= 0 && at_s <= FILE_MAX_S)) {
        *ret_why = "expected `seconds model bytes`";
        return false;
    }
    *request = (struct trace_request){.at_us = (uint64_t)(at_s * 1e6)};
    if (trace->n_requests > 0 && request->at_us < request[-1].at_us) {
        *ret_why = "the times must not go back";
        return false;
    }
    model = file_model(trace, name, bytes);
    if (model < 0) {
        *ret_why = "too many models";
        return false;
    }
    request->model = (uint32_t)model;
    trace->n_requests++;
    return true;
}

static bool read_lines(struct trace *trace, FILE *in, const char *path)
{
    char line[512];
    const char *why = NULL;

    for (uint32_t number = 1; fgets(line, sizeof(line), in); number++) {
        const char *text = line + strspn(line, " \t\r\n");
        if (!*text || *text == '#')
            continue;
        if (trace->n_requests == FILE_REQUESTS)
            why = "too many requests";
        if (why || !read_line(trace, text, &why)) {
            bench_fail("%s:%u: %s", path, number, why);
            return false;
        }
    }
    if (trace->n_requests == 0)
        bench_fail("%s holds no request", path);
    return trace->n_requests > 0;
}

struct trace *trace_read(const char *path)
{
    struct trace *trace;
    FILE *in = fopen(path, "re");
    bool good;

    if (!in) {
        bench_fail("cannot read %s: %s", path, strerror(errno));
        return NULL;
    }
    trace = trace_new(PREDICTOR_MAX_MODELS, FILE_REQUESTS);
    if (!trace) {
        bench_fail("no memory for %s", path);
        fclose(in);
        return NULL;
    }
    trace->name = "file";
    trace->n_models = 0;
    trace->n_requests = 0;
    good = read_lines(trace, in, path);
    fclose(in);
    if (good)
        trace_count_matrix(trace);
    return good ? trace : trace_free(trace);
}

void trace_count_matrix(struct trace *trace)
{
    uint32_t n = trace->n_models;
    float *matrix = trace->matrix[0];

    memset(matrix, 0, sizeof(*matrix) * n * n);
    for (size_t i = 1; i < trace->n_requests; i++)
        matrix[trace->requests[i - 1].model * n + trace->requests[i].model] += 1;
    for (uint32_t row = 0; row < n; row++) {
        float sum = 0;
        for (uint32_t m = 0; m < n; m++)
            sum += matrix[row * n + m];
        for (uint32_t m = 0; m < n && sum > 0; m++)
            matrix[row * n + m] /= sum;
    }
    memcpy(trace->matrix[1], matrix, sizeof(*matrix) * n * n);
}

struct trace *trace_free(struct trace *trace)
{
    if (!trace)
        return NULL;
    for (uint32_t m = 0; m < PREDICTOR_MAX_MODELS; m++)
        free(trace->names[m]);
    free(trace->matrix[0]);
    free(trace->matrix[1]);
    free(trace->requests);
    free(trace);
    return NULL;
}
