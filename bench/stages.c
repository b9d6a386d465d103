/* hearth-bench stages: what each of the four systems brings, measured in one go.
 *
 * Starts a hearthd of its own for each stage. 48 clients stay on model A, 16 alternate between B
 * and C, and the memory budget fits A and one of the two. "Off" is the same code at its limit: a
 * connection for each request, a batch of one, one final frame, loading in the foreground.
 *
 * The models have random weights in Q8_0, and shapes in which each system has something to do:
 * A (32 million parameters) does not fit a processor's cache, so that its weights come from memory,
 * as those of every model do that is worth its answers: that is what a batch shares. Its requests
 * ask for one token, so that a connection is still a part of what each costs. B and C (520 million)
 * take a good part of a second to load, and their answers have a first token to wait for.
 *
 * With --small the models are tiny: that shows nothing but that it runs.
 *
 * With --pairs N all stages run N times in turn, and each step is told by the median of its ratios
 * to the stage before it in the same round, with an interval. */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/daemon.h"
#include "bench/load.h"
#include "bench/memory.h"
#include "bench/arguments.h"
#include "bench/model_maker.h"
#include "bench/own_daemon.h"
#include "bench/pairs.h"
#include "bench/prompts.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

#define STEADY_CLIENTS      48u
#define ALTERNATING_CLIENTS 16u
#define TURN_US             2000000u
#define WARMUP_US           1000000u
#define N_PROMPTS           2000u
#define N_STAGES            5u
#define ROUNDS_MAX          100u
#define DURATION_US         8000000u

/* What the two kinds of clients ask for: one token of A, a longer answer of B or C. */
#define STEADY_TOKENS      1u
#define ALTERNATING_TOKENS 8u

struct stage {
    const char *name;
    bool pooling, batching, streaming, async;
};

static const struct stage stages[N_STAGES] = {
    {"everything off", false, false, false, false}, {"+ pooling", true, false, false, false},
    {"+ batching", true, true, false, false},       {"+ streaming", true, true, true, false},
    {"+ async loading", true, true, true, true},
};

/* One run of a stage. The first token is that of the alternating clients' longer answers, the
 * steady p99 that of the 48. */
struct row {
    double requests_per_s, p50_us, p99_us, first_token_p50_us, steady_p99_us;
    double steady_per_s, alternating_per_s;
    double memory_per_request_bytes; /* negative: not measured */
    uint64_t errors;
};

struct bench {
    struct own_daemon daemon;
    uint64_t budget_bytes;
    struct prompts prompts;
    uint64_t duration_us, warmup_us;
    uint32_t n_rounds;
    bool small; /* tiny models and no memory phase: to see that it runs */
    const char *json_path;
    struct row rows[N_STAGES][ROUNDS_MAX];
};

/* ---- models ---- */

static int to_file(void *userdata, const void *bytes, size_t len)
{
    return fwrite(bytes, 1, len, userdata) == len ? 0 : -EIO;
}

static struct model_plan plan_of(bool large, bool small, uint64_t seed)
{
    struct model_plan plan = model_plan_default();

    plan.type = PLAN_Q8_0;
    plan.dim = large ? 1280 : 768;
    plan.layers = large ? 28 : 5;
    plan.heads = large ? 20 : 12;
    plan.kv_heads = 4;
    plan.ff = large ? 3456 : 2048;
    plan.vocab = large ? 32000 : 1024;
    plan.context = 256;
    plan.tied = true;
    plan.seed = seed;
    if (small) {
        plan.layers = large ? 4 : 1;
        plan.dim = large ? 512 : 64;
        plan.heads = large ? 8 : 4;
        plan.ff = large ? 1024 : 128;
        plan.vocab = 1024;
    }
    return plan;
}

static int make_model(const struct bench *bench, const char *name, bool large, uint64_t seed)
{
    struct model_plan plan = plan_of(large, bench->small, seed);
    struct fault fault = {{0}};
    char path[160];
    FILE *file;
    int r;

    snprintf(path, sizeof(path), "%s/%s.gguf", bench->daemon.models, name);
    file = fopen(path, "we");
    if (!file)
        return bench_fail("cannot write %s: %s", path, strerror(errno));
    r = model_make(&plan, to_file, file, &fault);
    /* What is still to be written would disturb the first round. */
    if (r == 0 && (fflush(file) != 0 || fdatasync(fileno(file)) < 0))
        r = -EIO;
    if (fclose(file) != 0 && r == 0)
        r = -EIO;
    return r < 0 ? bench_fail("cannot make %s: %s", path, fault.text) : 0;
}

static uint64_t model_bytes(const struct bench *bench, const char *name)
{
    char path[160];
    struct stat st;

    snprintf(path, sizeof(path), "%s/%s.gguf", bench->daemon.models, name);
    return stat(path, &st) < 0 ? 0 : (uint64_t)st.st_size;
}

static int make_models(struct bench *bench)
{
    int r;

    if (isatty(STDERR_FILENO))
        fprintf(stderr, "making the models\r");
    r = make_model(bench, "a", false, 1);

    if (r == 0)
        r = make_model(bench, "b", true, 2);
    if (r == 0)
        r = make_model(bench, "c", true, 3);
    /* A and one of the two with what a load asks for beyond its file, a quarter on top being KV's.
     */
    bench->budget_bytes = (model_bytes(bench, "a") + model_bytes(bench, "b") * 13 / 10) * 4 / 3;
    return r;
}

/* ---- one stage ---- */

static int start_daemon(struct bench *bench, const struct stage *stage)
{
    char yaml[256];

    snprintf(yaml, sizeof(yaml),
             "memory_budget: %lluKiB\nengine: {prefix_cache: no}\nbatching: {enabled: %s}\n"
             "streaming: {enabled: %s}\nloading: {async: %s, prediction: off}\n",
             (unsigned long long)bench->budget_bytes >> 10, stage->batching ? "yes" : "no",
             stage->streaming ? "yes" : "no", stage->async ? "yes" : "no");
    return own_daemon_start(&bench->daemon, yaml);
}

struct group {
    struct load_options load;
    struct load_result result;
    pthread_t thread;
    int error;
};

static void *group_main(void *argument)
{
    struct group *group = argument;

    group->error = load_run(&group->load, &group->result);
    return NULL;
}

static struct load_options group_load(const struct bench *bench, const struct stage *stage)
{
    return (struct load_options){.socket_path = bench->daemon.socket_path,
                                 .model = "a",
                                 .connections = STEADY_CLIENTS,
                                 .in_flight = 1,
                                 .duration_us = bench->duration_us,
                                 .warmup_us = bench->warmup_us,
                                 .max_tokens = STEADY_TOKENS,
                                 .stream = stage->streaming,
                                 .fresh = !stage->pooling,
                                 .prompts = bench->prompts.texts,
                                 .n_prompts = bench->prompts.n,
                                 .seed = 1};
}

static int run_groups(const struct bench *bench, const struct stage *stage, struct group *steady,
                      struct group *alternating, char message[320])
{
    int r;

    steady->load = alternating->load = group_load(bench, stage);
    alternating->load.model = "b";
    alternating->load.other_model = "c";
    alternating->load.turn_us = TURN_US;
    alternating->load.connections = ALTERNATING_CLIENTS;
    alternating->load.max_tokens = ALTERNATING_TOKENS;
    r = -pthread_create(&steady->thread, NULL, group_main, steady);
    if (r < 0)
        return r;
    group_main(alternating);
    pthread_join(steady->thread, NULL);
    r = steady->error < 0 ? steady->error : alternating->error;
    if (r < 0)
        snprintf(message, 320, "%s",
                 steady->error < 0 ? steady->result.message : alternating->result.message);
    return r;
}

static void fill_row(const struct stage *stage, struct group *groups, struct row *row)
{
    struct load_result *steady = &groups[0].result, *other = &groups[1].result;

    row->errors = steady->errors + other->errors;
    if (row->errors > 0)
        fprintf(stderr, "%s: first error: %s%s\n", stage->name, steady->message, other->message);
    row->steady_p99_us = histogram_percentile(&steady->latency, 99);
    row->first_token_p50_us = histogram_percentile(&other->first_token, 50);
    row->steady_per_s = (double)steady->requests / steady->duration_s;
    row->alternating_per_s = (double)other->requests / other->duration_s;
    row->requests_per_s = row->steady_per_s + row->alternating_per_s;
    histogram_merge(&steady->latency, &other->latency);
    row->p50_us = histogram_percentile(&steady->latency, 50);
    row->p99_us = histogram_percentile(&steady->latency, 99);
}

/* `memory`: with the phase that measures it. */
static int run_stage(struct bench *bench, const struct stage *stage, bool memory,
                     struct row *ret_row, char message[320])
{
    struct group *groups = calloc(2, sizeof(*groups));
    struct load_options load;
    int r = groups ? daemon_warm(bench->daemon.socket_path, "a", message) : -ENOMEM;

    if (r == 0 && bench->prompts.n == 0)
        r = prompts_distinct(&bench->prompts, N_PROMPTS, 1, bench->daemon.socket_path, "a",
                             message);
    if (r == 0)
        r = run_groups(bench, stage, &groups[0], &groups[1], message);
    if (r == 0)
        fill_row(stage, groups, ret_row);
    load = group_load(bench, stage);
    ret_row->memory_per_request_bytes = -1;
    if (r == 0 && memory)
        r = memory_per_request(&load, bench->daemon.pid, &ret_row->memory_per_request_bytes,
                               message);
    free(groups);
    return r;
}

/* ---- what is told ---- */

/* A figure of a row, by which a step may be told. */
struct figure {
    const char *key;
    size_t offset;
};

#define FIGURE(field)                       \
    {                                       \
#field, offsetof(struct row, field) \
    }

static const struct figure figures[] = {
    FIGURE(requests_per_s),     FIGURE(p50_us),        FIGURE(p99_us),
    FIGURE(first_token_p50_us), FIGURE(steady_p99_us), FIGURE(steady_per_s),
    FIGURE(alternating_per_s),
};

enum { BY_RATE = 0, BY_FIRST_TOKEN = 3, BY_STEADY_P99 = 4 };

static double value_of(const struct row *row, size_t figure)
{
    double value;

    memcpy(&value, (const char *)row + figures[figure].offset, sizeof(value));
    return value;
}

/* A stage's medians over all rounds. */
static struct row medians(const struct bench *bench, size_t stage)
{
    struct row row = bench->rows[stage][0];
    double values[ROUNDS_MAX];

    row.errors = 0;
    for (size_t f = 0; f < ELEMENTSOF(figures); f++) {
        for (uint32_t i = 0; i < bench->n_rounds; i++)
            values[i] = value_of(&bench->rows[stage][i], f);
        values[0] = median_of(values, bench->n_rounds);
        memcpy((char *)&row + figures[f].offset, values, sizeof(*values));
    }
    for (uint32_t i = 0; i < bench->n_rounds; i++)
        row.errors += bench->rows[stage][i].errors;
    return row;
}

/* The ratio of one stage to another, round by round. */
static struct pairs_summary compared(const struct bench *bench, size_t from, size_t to,
                                     size_t figure)
{
    struct pairs pairs = {0};
    struct pairs_summary summary;

    for (uint32_t i = 0; i < bench->n_rounds; i++)
        if (pairs_add(&pairs, value_of(&bench->rows[from][i], figure),
                      value_of(&bench->rows[to][i], figure)) < 0)
            break;
    summary = pairs_summary(&pairs);
    pairs_done(&pairs);
    return summary;
}

static void print_row(const char *stage, const struct row *row, double first_per_s)
{
    char memory[32] = "-";

    if (row->memory_per_request_bytes >= 0)
        snprintf(memory, sizeof(memory), "%.0f", row->memory_per_request_bytes);
    printf("%-18s %10.0f %10.0f %10.0f %12.0f %12.0f %10s %6.2f %6llu\n", stage,
           row->requests_per_s, row->p50_us, row->p99_us, row->first_token_p50_us,
           row->steady_p99_us, memory, row->requests_per_s / first_per_s,
           (unsigned long long)row->errors);
    fflush(stdout);
}

static void print_heads(void)
{
    printf("%-18s %10s %10s %10s %12s %12s %10s %6s %6s\n", "stage", "requests/s", "p50 us",
           "p99 us", "1st token us", "A's p99 us", "bytes/req", "gain", "errors");
}

static void print_step(const struct bench *bench, size_t from, size_t to, size_t figure,
                       const char *what)
{
    struct pairs_summary s = compared(bench, from, to, figure);

    printf("%-18s %-24s %.3f  [%.3f, %.3f]\n", to - from > 1 ? "everything on" : stages[to].name,
           what, s.median, s.low, s.high);
}

static void print_steps(const struct bench *bench)
{
    struct pairs_summary s = compared(bench, 0, 1, BY_RATE);

    printf("\nratios to the stage before, %zu pairs, median and interval of %.1f %%\n", s.n,
           100 * s.confidence);
    for (size_t i = 1; i < N_STAGES; i++)
        print_step(bench, i - 1, i, BY_RATE, "requests/s");
    print_step(bench, 2, 3, BY_FIRST_TOKEN, "first token p50");
    print_step(bench, 3, 4, BY_STEADY_P99, "the 48 clients' p99");
    print_step(bench, 0, N_STAGES - 1, BY_RATE, "requests/s, against off");
}

static json_t *json_step(const struct bench *bench, size_t from, size_t to)
{
    json_t *step = json_object();

    for (size_t f = 0; f < ELEMENTSOF(figures); f++) {
        struct pairs_summary s = compared(bench, from, to, f);
        json_object_set_new(
            step, figures[f].key,
            json_pack("{s:f, s:f, s:f}", "median", s.median, "low", s.low, "high", s.high));
    }
    return step;
}

static json_t *json_memory(const struct row *row)
{
    return row->memory_per_request_bytes < 0 ? json_null()
                                             : json_real(row->memory_per_request_bytes);
}

static int write_json(const struct bench *bench)
{
    double first_per_s = medians(bench, 0).requests_per_s;
    json_t *root = json_array();
    int r;

    for (size_t i = 0; i < N_STAGES; i++) {
        struct row row = medians(bench, i);
        json_array_append_new(
            root,
            json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:o, s:f, s:I, s:I, s:o, s:o}",
                      "stage", stages[i].name, "requests_per_s", row.requests_per_s, "p50_us",
                      row.p50_us, "p99_us", row.p99_us, "first_token_p50_us",
                      row.first_token_p50_us, "steady_p99_us", row.steady_p99_us, "steady_per_s",
                      row.steady_per_s, "alternating_per_s", row.alternating_per_s,
                      "memory_per_request_bytes", json_memory(&row), "gain",
                      row.requests_per_s / first_per_s, "errors", (json_int_t)row.errors, "pairs",
                      (json_int_t)bench->n_rounds, "to_previous",
                      json_step(bench, i > 0 ? i - 1 : 0, i), "to_first", json_step(bench, 0, i)));
    }
    r = json_dump_file(root, bench->json_path, JSON_INDENT(2));
    json_decref(root);
    return r < 0 ? bench_fail("cannot write %s", bench->json_path) : BENCH_DONE;
}

/* ---- all of them ---- */

static int run_round(struct bench *bench, uint32_t round)
{
    for (size_t i = 0; i < N_STAGES; i++) {
        struct row *row = &bench->rows[i][round];
        char message[320] = "";
        int r = start_daemon(bench, &stages[i]);
        if (r == BENCH_DONE &&
            run_stage(bench, &stages[i], round == 0 && !bench->small, row, message) < 0)
            r = bench_fail("%s: %s", stages[i].name, message);
        own_daemon_stop(&bench->daemon);
        if (r != BENCH_DONE)
            return r;
        if (round == 0)
            print_row(stages[i].name, row, bench->rows[0][0].requests_per_s);
        else if (isatty(STDERR_FILENO))
            fprintf(stderr, "\rround %u of %u, %-20s ", round + 1, bench->n_rounds, stages[i].name);
    }
    return BENCH_DONE;
}

static int run_all(struct bench *bench)
{
    int r = BENCH_DONE;

    print_heads();
    for (uint32_t round = 0; round < bench->n_rounds && r == BENCH_DONE; round++)
        r = run_round(bench, round);
    if (bench->n_rounds == 1 || r != BENCH_DONE)
        return r;
    printf("\nmedians of %u rounds\n", bench->n_rounds);
    print_heads();
    for (size_t i = 0; i < N_STAGES; i++) {
        struct row row = medians(bench, i);
        print_row(stages[i].name, &row, medians(bench, 0).requests_per_s);
    }
    print_steps(bench);
    return r;
}

/* 0; a negative number: --help was asked for; BENCH_USAGE. */
static int parse_arguments(int argc, char **argv, struct bench *bench)
{
    static const struct option options[] = {
        {"json", required_argument, NULL, 'j'},     {"pairs", required_argument, NULL, 'p'},
        {"duration", required_argument, NULL, 'd'}, {"small", no_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},           {0}};
    double number = 0;
    int option, r = 0;

    while (r == 0 && (option = getopt_long(argc, argv, "", options, NULL)) >= 0)
        switch (option) {
        case 'j': bench->json_path = optarg; break;
        case 'p':
            r = parse_number(optarg, 1, ROUNDS_MAX, &number);
            bench->n_rounds = (uint32_t)number;
            break;
        case 'd': r = parse_duration(optarg, &bench->duration_us); break;
        case 's':
            bench->small = true;
            bench->warmup_us = WARMUP_US / 10;
            break;
        case 'h': return -1;
        default: return BENCH_USAGE;
        }
    if (r < 0)
        fprintf(stderr, "hearth-bench: %s is not a value for this option\n", optarg);
    return r < 0 || optind < argc || bench->duration_us == 0 ? BENCH_USAGE : 0;
}

static int run(int argc, char **argv)
{
    struct bench *bench = calloc(1, sizeof(*bench));
    int r;

    if (!bench)
        return bench_fail("out of memory");
    bench->duration_us = DURATION_US;
    bench->warmup_us = WARMUP_US;
    bench->n_rounds = 1;
    r = parse_arguments(argc, argv, bench);
    if (r != 0) {
        free(bench);
        if (r > 0)
            return bench_usage(&bench_stages);
        printf("usage: hearth-bench stages %s\n", bench_stages.usage);
        return BENCH_DONE;
    }
    r = own_daemon_new(&bench->daemon);
    if (r == BENCH_DONE)
        r = make_models(bench);
    if (r == BENCH_DONE)
        r = run_all(bench);
    if (r == BENCH_DONE && bench->json_path)
        r = write_json(bench);
    own_daemon_done(&bench->daemon);
    prompts_done(&bench->prompts);
    free(bench);
    return r;
}

const struct bench_command bench_stages = {
    .name = "stages",
    .usage = "[--pairs N] [--duration 8s] [--small] [--json FILE]",
    .help = "Starts its own hearthd and measures what pooling, batching, streaming and async "
            "loading bring.",
    .run = run,
};
