/* `engine`: tokens a second of prefill and of batched generation, without daemon or socket. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "lib/clock.h"
#include "lib/cleanup.h"

#define KV_BYTES   (UINT64_C(4) << 30) /* address space */
#define MEASURE_US 500000u             /* a row is measured for at least this long */
#define PROMPT     5u                  /* tokens of a prefill's rows */
#define GENERATED  32u                 /* tokens a generating row grows to before it starts anew */

static const uint32_t batches[] = {1, 8, 64};

struct run {
    struct engine *engine;
    struct model *model;
    uint32_t threads, batch;
    bool decode;
    struct sequence *sequences[ENGINE_MAX_ROWS];
    struct step_row rows[ENGINE_MAX_ROWS];
    int32_t tokens[PROMPT];
};

/* Fresh sequences for every row. */
static int run_renew(struct run *run)
{
    int r = 0;

    for (uint32_t i = 0; i < run->batch && r == 0; i++) {
        run->sequences[i] = sequence_free(run->sequences[i]);
        r = sequence_new(run->engine, run->model, PROMPT + GENERATED, &run->sequences[i]);
    }
    return r;
}

static int run_step(struct run *run, uint32_t n_tokens)
{
    int r;

    for (uint32_t i = 0; i < run->batch; i++)
        run->rows[i] = (struct step_row){
            .sequence = run->sequences[i],
            .tokens = run->tokens,
            .n_tokens = n_tokens,
            .wants = ROW_LOGITS,
        };
    r = engine_step_begin(run->engine, run->model, run->rows, run->batch);
    if (r < 0)
        return r;
    while (engine_step_slice(run->engine, run->model) > 0)
        ;
    engine_step_end(run->engine, run->model);
    return 0;
}

/* Steps for MEASURE_US; prompts are fed anew each time, generated texts when they are long. */
static int run_measure(struct run *run, double *ret_tokens_per_s, double *ret_steps_per_s)
{
    struct clock clock = {clock_monotonic_us};
    uint64_t begin = 0, took = 0, tokens = 0, steps = 0;
    uint32_t length = run->decode ? GENERATED : 0;
    int r = 0;

    while (r == 0 && took < MEASURE_US) {
        if (!run->decode || length + 1 > GENERATED) {
            r = run_renew(run);
            if (r == 0 && run->decode)
                r = run_step(run, PROMPT);
            length = 0;
        }
        begin = clock_now_us(&clock);
        if (r == 0)
            r = run_step(run, run->decode ? 1 : PROMPT);
        took += clock_now_us(&clock) - begin;
        tokens += run->batch * (run->decode ? 1 : PROMPT);
        length++;
        steps++;
    }
    for (uint32_t i = 0; i < run->batch; i++)
        run->sequences[i] = sequence_free(run->sequences[i]);
    *ret_tokens_per_s = (double)tokens * 1e6 / (double)took;
    *ret_steps_per_s = (double)steps * 1e6 / (double)took;
    return r;
}

/* All rows of one team size, printed and added to the array. */
static int measure_threads(const struct bench_model *m, uint32_t threads, json_t *to)
{
    struct engine_options options = {
        .kernels = m->kernels, .threads = threads, .kv_budget_bytes = KV_BYTES};
    struct run run = {.model = m->model, .threads = threads};
    double weight_bytes = (double)model_info(m->model)->weight_bytes;
    struct fault fault = {0};
    double tokens, steps;
    int r;

    r = engine_new(&options, &run.engine, &fault);
    if (r < 0)
        return bench_fail("%s", fault.text);
    for (uint32_t i = 0; i < PROMPT; i++)
        run.tokens[i] = (int32_t)(i % model_info(m->model)->n_vocab);
    for (uint32_t k = 0; k < 2 * ELEMENTSOF(batches) && r == 0; k++) {
        run.decode = k >= ELEMENTSOF(batches);
        run.batch = batches[k % ELEMENTSOF(batches)];
        r = run_measure(&run, &tokens, &steps);
        if (r < 0)
            break;
        printf("%7u %6u %8s %12.0f %15.3f\n", threads, run.batch, run.decode ? "decode" : "prefill",
               tokens, steps * weight_bytes / 1e9);
        json_array_append_new(to, json_pack("{s:i, s:i, s:s, s:f, s:f}", "threads", (int)threads,
                                            "batch", (int)run.batch, "phase",
                                            run.decode ? "decode" : "prefill", "tokens_per_s",
                                            tokens, "weight_bytes_per_s", steps * weight_bytes));
    }
    engine_free(run.engine);
    return r < 0 ? bench_fail("a step failed: %s", strerror(-r)) : BENCH_DONE;
}

static int run(int argc, char **argv)
{
    const char *path = NULL, *json = NULL;
    struct bench_model m;
    json_t *rows;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    int exit_code;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0 && i + 1 < argc)
            json = argv[++i];
        else if (argv[i][0] != '-' && !path)
            path = argv[i];
        else
            return bench_usage(&bench_engine);
    }
    if (!path)
        return bench_usage(&bench_engine);
    exit_code = bench_model_load(path, &m);
    if (exit_code != BENCH_DONE)
        return exit_code;
    rows = json_array();
    printf("kernels %s, prompts of %u tokens, %s\n", m.kernels->name, PROMPT,
           model_info(m.model)->types);
    printf("threads  batch    phase     tokens/s  weights GB/s\n");
    for (uint32_t t = 1; t <= (uint32_t)cpus && exit_code == BENCH_DONE; t *= 2)
        exit_code = measure_threads(&m, t, rows);
    if (exit_code == BENCH_DONE && json && json_dump_file(rows, json, JSON_INDENT(1)) < 0)
        exit_code = bench_fail("cannot write %s", json);
    json_decref(rows);
    bench_model_done(&m);
    return exit_code;
}

const struct bench_command bench_engine = {
    .name = "engine",
    .usage = "MODEL [--json FILE]",
    .help = "Tokens a second by threads and batch, in prefill and decode.",
    .run = run,
};
