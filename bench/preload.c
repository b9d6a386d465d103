#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "bench/bench.h"
#include "bench/simulation.h"
#include "lib/cleanup.h"

/* The policy's constants were chosen on seeds from 1001 on; these were only ever measured. */
#define FIRST_SEED 1u
#define N_SEEDS    10u

/* Steps of size in which the best fixed set is looked for. */
#define FIXED_STEPS 4096u

struct report {
    json_t *rows;
    struct outcome sum[_POLICY_MAX]; /* over the seeds of a trace */
    double fixed_hits;               /* share, summed over seeds */
    uint32_t n_seeds;
};

static void add_row(struct report *report, const struct trace *trace, enum policy policy,
                    const struct outcome *o)
{
    struct outcome *sum = &report->sum[policy];
    json_t *accuracy =
        o->predicted ? json_real((double)o->predicted_used / (double)o->predicted) : json_null();

    json_array_append_new(report->rows,
                          json_pack("{s:s, s:I, s:s, s:I, s:I, s:o, s:I, s:f}", "trace",
                                    trace->name, "seed", (json_int_t)trace->seed, "policy",
                                    policy_name(policy), "requests", (json_int_t)o->requests,
                                    "hits", (json_int_t)o->hits, "accuracy", accuracy, "wasted",
                                    (json_int_t)o->wasted, "cost_s", o->cost_s));
    sum->requests += o->requests;
    sum->hits += o->hits;
    sum->predicted += o->predicted;
    sum->predicted_used += o->predicted_used;
    sum->wasted += o->wasted;
    sum->cost_s += o->cost_s;
}

/* The share of requests that the best set would find, if it were there from the beginning and never
 * changed: a knapsack over the requests counted, in steps of the budget (sizes rounded up). */
static double best_fixed_set(const struct trace *trace)
{
    size_t best[FIXED_STEPS + 1] = {0}, count[PREDICTOR_MAX_MODELS] = {0};
    double step = (double)simulation_budget(trace) / FIXED_STEPS;

    for (size_t i = 0; i < trace->n_requests; i++)
        count[trace->requests[i].model]++;
    for (uint32_t m = 0; m < trace->n_models; m++) {
        size_t steps = (size_t)((double)trace->bytes[m] / step) + 1;
        for (size_t room = FIXED_STEPS; room >= steps; room--)
            best[room] = MAX(best[room], best[room - steps] + count[m]);
    }
    return (double)best[FIXED_STEPS] / (double)trace->n_requests;
}

/* The adversary asks LRU first: what it asked there stands for its future and its habits, which
 * clairvoyant and informed are told. */
static int record_adversary(struct trace *trace)
{
    _cleanup_free_ uint32_t *asked = calloc(trace->n_requests, sizeof(*asked));
    struct outcome outcome;
    int r = asked ? simulate(trace, POLICY_LRU, asked, &outcome) : -ENOMEM;

    if (r < 0)
        return r;
    for (size_t i = 0; i < trace->n_requests; i++)
        trace->requests[i].model = asked[i];
    trace_count_matrix(trace);
    return 0;
}

static int run_trace(struct report *report, struct trace *trace)
{
    bool adaptive = trace->adaptive;
    int r = adaptive ? record_adversary(trace) : 0;

    for (enum policy policy = 0; policy < _POLICY_MAX && r == 0; policy++) {
        struct outcome outcome;
        trace->adaptive = adaptive && policy != POLICY_CLAIRVOYANT;
        r = simulate(trace, policy, NULL, &outcome);
        if (r == 0)
            add_row(report, trace, policy, &outcome);
    }
    report->fixed_hits += adaptive ? 0 : best_fixed_set(trace);
    report->n_seeds++;
    return r;
}

static void print_trace(const struct report *report, const char *name, bool fixed)
{
    for (enum policy policy = 0; policy < _POLICY_MAX; policy++) {
        const struct outcome *o = &report->sum[policy];
        printf("%-10s %-12s %6.3f %10.1f", name, policy_name(policy),
               (double)o->hits / (double)o->requests, o->cost_s / report->n_seeds);
        if (o->predicted)
            printf(" %9.1f %8.3f %8.1f\n", (double)o->predicted / report->n_seeds,
                   (double)o->predicted_used / (double)o->predicted,
                   (double)o->wasted / report->n_seeds);
        else
            printf(" %9s %8s %8s\n", "-", "-", "-");
    }
    if (fixed)
        printf("%-10s %-12s %6.3f\n", name, "(fixed set)", report->fixed_hits / report->n_seeds);
}

static int run_file(struct report *report, const char *path)
{
    struct trace *trace = trace_read(path);
    int r;

    if (!trace)
        return BENCH_FAILED;
    r = run_trace(report, trace);
    if (r == 0)
        print_trace(report, trace->name, true);
    trace_free(trace);
    return r < 0 ? bench_fail("%s", strerror(-r)) : BENCH_DONE;
}

static int run_made(struct report *report, uint32_t first_seed)
{
    int r = 0;

    for (enum trace_kind kind = 0; kind < _TRACE_MAX && r == 0; kind++) {
        *report = (struct report){.rows = report->rows};
        for (uint64_t seed = first_seed; seed < first_seed + N_SEEDS && r == 0; seed++) {
            struct trace *trace = trace_make(kind, seed);
            r = trace ? run_trace(report, trace) : -ENOMEM;
            trace_free(trace);
        }
        if (r == 0)
            print_trace(report, trace_kind_name(kind), kind != TRACE_ADVERSARY);
    }
    return r < 0 ? bench_fail("%s", strerror(-r)) : BENCH_DONE;
}

static int run(int argc, char **argv)
{
    const char *file = NULL, *json = NULL;
    struct report report = {0};
    uint32_t first_seed = FIRST_SEED;
    char more;
    int exit_code;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0 && i + 1 < argc)
            json = argv[++i];
        else if (strcmp(argv[i], "--trace") == 0 && i + 1 < argc)
            file = argv[++i];
        else if (strcmp(argv[i], "--first-seed") == 0 && i + 1 < argc &&
                 sscanf(argv[i + 1], "%9u%c", &first_seed, &more) == 1)
            i++;
        else
            return bench_usage(&bench_preload);
    }
    report.rows = json_array();
    printf("%-10s %-12s %6s %10s %9s %8s %8s\n", "trace", "policy", "hits", "cost s", "predicted",
           "accuracy", "wasted");
    exit_code = file ? run_file(&report, file) : run_made(&report, first_seed);
    if (exit_code == BENCH_DONE && json && json_dump_file(report.rows, json, JSON_INDENT(1)) < 0)
        exit_code = bench_fail("cannot write %s", json);
    json_decref(report.rows);
    return exit_code;
}

const struct bench_command bench_preload = {
    .name = "preload",
    .usage = "[--trace FILE] [--first-seed N] [--json FILE]",
    .help = "Prediction and residency against LRU and the future, in virtual time.",
    .run = run,
};
