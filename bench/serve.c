/* hearth-bench serve: load on a running daemon, and what came of it. */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/arguments.h"
#include "bench/bench.h"
#include "bench/daemon.h"
#include "bench/load.h"
#include "bench/memory.h"
#include "bench/plot.h"
#include "bench/prompts.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"
#include "lib/wire.h"

struct serve {
    struct load_options load;
    const char *prompt, *prompts_path, *json_path, *plot_path;
    size_t distinct;
    bool memory;
    char socket_path[HEARTH_PATH_BYTES];
    pid_t pid;
    uint64_t rss_peak_bytes;
    bool show_progress;
    struct plot_point *points; /* with --plot: PLOT_POINTS_MAX of them */
    size_t n_points;
};

struct figures {
    struct load_result result;
    uint64_t rss_idle_bytes, rss_peak_bytes;
    double cpu_s;
    double memory_per_request_bytes; /* negative: not measured */
    double pool_reuse, batch_efficiency, engine_efficiency, credit_wait_ratio;
};

/* ---- arguments ---- */

static int parse_kind(const char *text, enum load_kind *ret_kind)
{
    static const char *const names[] = {
        [LOAD_COMPLETE] = "complete", [LOAD_EMBED] = "embed", [LOAD_NULL] = "null"};

    for (size_t i = 0; i < ELEMENTSOF(names); i++)
        if (strcmp(text, names[i]) == 0) {
            *ret_kind = (enum load_kind)i;
            return 0;
        }
    return -EINVAL;
}

enum option_value {
    OPT_SOCKET = 256,
    OPT_MODEL,
    OPT_CONNECTIONS,
    OPT_IN_FLIGHT,
    OPT_RATE,
    OPT_DURATION,
    OPT_WARMUP,
    OPT_PROMPT,
    OPT_PROMPTS,
    OPT_DISTINCT,
    OPT_MAX_TOKENS,
    OPT_STREAM,
    OPT_FRESH,
    OPT_KIND,
    OPT_MEMORY,
    OPT_JSON,
    OPT_PLOT,
    OPT_HELP,
};

static int take_option(struct serve *serve, int option, const char *value)
{
    struct load_options *load = &serve->load;
    double number = 0;
    int r = 0;

    switch ((enum option_value)option) {
    case OPT_SOCKET: load->socket_path = value; break;
    case OPT_MODEL: load->model = value; break;
    case OPT_CONNECTIONS:
        r = parse_number(value, 1, 100000, &number);
        load->connections = (uint32_t)number;
        break;
    case OPT_IN_FLIGHT:
        r = parse_number(value, 1, 10000, &number);
        load->in_flight = (uint32_t)number;
        break;
    case OPT_RATE: r = parse_number(value, 0.001, 1e7, &load->rate); break;
    case OPT_DURATION: r = parse_duration(value, &load->duration_us); break;
    case OPT_WARMUP: r = parse_duration(value, &load->warmup_us); break;
    case OPT_PROMPT: serve->prompt = value; break;
    case OPT_PROMPTS: serve->prompts_path = value; break;
    case OPT_DISTINCT:
        r = parse_number(value, 1, PROMPTS_MAX, &number);
        serve->distinct = (size_t)number;
        break;
    case OPT_MAX_TOKENS:
        r = parse_number(value, 1, 1e6, &number);
        load->max_tokens = (uint64_t)number;
        break;
    case OPT_STREAM: load->stream = true; break;
    case OPT_FRESH: load->fresh = true; break;
    case OPT_KIND: r = parse_kind(value, &load->kind); break;
    case OPT_MEMORY: serve->memory = true; break;
    case OPT_JSON: serve->json_path = value; break;
    case OPT_PLOT: serve->plot_path = value; break;
    case OPT_HELP: break;
    }
    if (r < 0)
        fprintf(stderr, "hearth-bench: %s is not a value for this option\n", value);
    return r;
}

static int parse_arguments(int argc, char **argv, struct serve *serve)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, OPT_SOCKET},
        {"model", required_argument, NULL, OPT_MODEL},
        {"connections", required_argument, NULL, OPT_CONNECTIONS},
        {"in-flight", required_argument, NULL, OPT_IN_FLIGHT},
        {"rate", required_argument, NULL, OPT_RATE},
        {"duration", required_argument, NULL, OPT_DURATION},
        {"warmup", required_argument, NULL, OPT_WARMUP},
        {"prompt", required_argument, NULL, OPT_PROMPT},
        {"prompts", required_argument, NULL, OPT_PROMPTS},
        {"distinct", required_argument, NULL, OPT_DISTINCT},
        {"max-tokens", required_argument, NULL, OPT_MAX_TOKENS},
        {"stream", no_argument, NULL, OPT_STREAM},
        {"fresh", no_argument, NULL, OPT_FRESH},
        {"kind", required_argument, NULL, OPT_KIND},
        {"memory", no_argument, NULL, OPT_MEMORY},
        {"json", required_argument, NULL, OPT_JSON},
        {"plot", required_argument, NULL, OPT_PLOT},
        {"help", no_argument, NULL, OPT_HELP},
        {0}};
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
        if (option == '?' || take_option(serve, option, optarg) < 0)
            return BENCH_USAGE;
        if (option == OPT_HELP) {
            printf("usage: hearth-bench serve %s\n", bench_serve.usage);
            return -1;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "hearth-bench: unexpected argument %s\n", argv[optind]);
        return BENCH_USAGE;
    }
    return 0;
}

/* ---- measuring ---- */

static int make_prompts(struct serve *serve, struct prompts *prompts, char message[320])
{
    int r;

    if (serve->load.kind == LOAD_NULL)
        r = prompts_one(prompts, "");
    else if (serve->prompts_path)
        r = prompts_file(prompts, serve->prompts_path, message);
    else if (serve->distinct > 0)
        r = prompts_distinct(prompts, serve->distinct, 1, serve->socket_path, serve->load.model,
                             message);
    else
        r = prompts_one(prompts, serve->prompt);
    serve->load.prompts = prompts->texts;
    serve->load.n_prompts = prompts->n;
    return r;
}

static void on_progress(void *userdata, double elapsed_s, uint64_t requests)
{
    struct serve *serve = userdata;
    uint64_t rss = daemon_rss_bytes(serve->pid);

    serve->rss_peak_bytes = MAX(serve->rss_peak_bytes, rss);
    if (serve->points && elapsed_s >= 0 && serve->n_points < PLOT_POINTS_MAX)
        serve->points[serve->n_points++] = (struct plot_point){elapsed_s, requests};
    if (serve->show_progress)
        fprintf(stderr, "\r%7.1f s  %llu requests ", elapsed_s, (unsigned long long)requests);
}

static double ratio(double part, double whole)
{
    return whole > 0 ? part / whole : 1;
}

static int measure(struct serve *serve, struct figures *figures, char message[320])
{
    struct daemon_counters before, after;
    double cpu_s;
    int r = daemon_counters(serve->socket_path, &before, message);

    if (r < 0)
        return r;
    figures->rss_idle_bytes = serve->rss_peak_bytes = daemon_rss_bytes(serve->pid);
    cpu_s = daemon_cpu_s(serve->pid);
    r = load_run(&serve->load, &figures->result);
    if (r < 0) {
        snprintf(message, 320, "%s", figures->result.message);
        return r;
    }
    figures->cpu_s = daemon_cpu_s(serve->pid) - cpu_s;
    figures->rss_peak_bytes = serve->rss_peak_bytes;
    r = daemon_counters(serve->socket_path, &after, message);
    figures->pool_reuse =
        ratio(after.requests_reused - before.requests_reused, after.requests - before.requests);
    figures->batch_efficiency =
        ratio(after.step_rows - before.step_rows, after.step_runnable - before.step_runnable);
    figures->engine_efficiency = ratio(after.engine_cpu_s - before.engine_cpu_s,
                                       after.engine_busy_s - before.engine_busy_s -
                                           (after.engine_run_delay_s - before.engine_run_delay_s));
    figures->credit_wait_ratio =
        after.frames > before.frames
            ? (after.frames_waited - before.frames_waited) / (after.frames - before.frames)
            : 0;
    return r;
}

/* ---- telling ---- */

static json_t *json_latency(const struct histogram *h)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:I}", "p50", histogram_percentile(h, 50), "p90",
                     histogram_percentile(h, 90), "p99", histogram_percentile(h, 99), "p999",
                     histogram_percentile(h, 99.9), "max", (json_int_t)h->max_us);
}

static json_t *json_codes(const struct load_result *result)
{
    json_t *codes = json_object();

    for (uint32_t i = 0; i < LOAD_CODES; i++)
        if (result->codes[i] > 0)
            json_object_set_new(codes, i < _CODE_MAX ? wire_code_name((enum wire_code)i) : "lost",
                                json_integer((json_int_t)result->codes[i]));
    return codes;
}

static json_t *json_figures(const struct figures *f)
{
    const struct load_result *r = &f->result;
    json_t *root = json_pack(
        "{s:I, s:I, s:f, s:f, s:f, s:o, s:o, s:I, s:I, s:f, s:o, s:f, s:f, s:f, s:f, s:o}",
        "requests", (json_int_t)r->requests, "errors", (json_int_t)r->errors, "duration_s",
        r->duration_s, "requests_per_s", (double)r->requests / r->duration_s, "tokens_per_s",
        (double)r->tokens / r->duration_s, "latency_us", json_latency(&r->latency),
        "first_token_us", json_latency(&r->first_token), "rss_idle_bytes",
        (json_int_t)f->rss_idle_bytes, "rss_peak_bytes", (json_int_t)f->rss_peak_bytes, "cpu_s",
        f->cpu_s, "memory_per_request_bytes",
        f->memory_per_request_bytes < 0 ? json_null() : json_real(f->memory_per_request_bytes),
        "pool_reuse", f->pool_reuse, "batch_efficiency", f->batch_efficiency, "engine_efficiency",
        f->engine_efficiency, "credit_wait_ratio", f->credit_wait_ratio, "codes", json_codes(r));

    return root;
}

static void print_latency(const char *name, const struct histogram *h)
{
    printf("%-22s p50 %.0f  p90 %.0f  p99 %.0f  p99.9 %.0f  max %llu\n", name,
           histogram_percentile(h, 50), histogram_percentile(h, 90), histogram_percentile(h, 99),
           histogram_percentile(h, 99.9), (unsigned long long)h->max_us);
}

static void print_figures(const struct figures *f)
{
    const struct load_result *r = &f->result;

    printf("%-22s %llu in %.1f s, %llu errors\n", "requests", (unsigned long long)r->requests,
           r->duration_s, (unsigned long long)r->errors);
    printf("%-22s %.0f\n", "requests/s", (double)r->requests / r->duration_s);
    printf("%-22s %.0f\n", "tokens/s", (double)r->tokens / r->duration_s);
    print_latency("latency, us", &r->latency);
    print_latency("first token, us", &r->first_token);
    printf("%-22s idle %.1f MiB, peak %.1f MiB\n", "daemon's memory",
           (double)f->rss_idle_bytes / 1048576, (double)f->rss_peak_bytes / 1048576);
    printf("%-22s %.2f s\n", "daemon's CPU", f->cpu_s);
    if (f->memory_per_request_bytes >= 0)
        printf("%-22s %.0f bytes\n", "memory a request", f->memory_per_request_bytes);
    printf("%-22s %.4f\n%-22s %.4f\n%-22s %.4f\n%-22s %.4f\n", "pool reuse", f->pool_reuse,
           "batch efficiency", f->batch_efficiency, "engine efficiency", f->engine_efficiency,
           "credit waits", f->credit_wait_ratio);
    if (r->errors > 0)
        printf("%-22s %s\n", "first error", r->message);
}

static int report(const struct serve *serve, const struct figures *figures)
{
    json_t *root;
    int r = 0;

    print_figures(figures);
    if (!serve->json_path)
        return 0;
    root = json_figures(figures);
    if (!root || json_dump_file(root, serve->json_path, JSON_INDENT(2)) < 0)
        r = bench_fail("cannot write %s", serve->json_path);
    json_decref(root);
    return r;
}

static int draw(const struct serve *serve, const struct figures *figures)
{
    const struct load_options *load = &serve->load;
    char title[256], message[320] = "";
    struct plot plot = {.title = title,
                        .latency = &figures->result.latency,
                        .first_token = load->max_tokens > 1 ? &figures->result.first_token : NULL,
                        .points = serve->points,
                        .n_points = serve->n_points};

    snprintf(title, sizeof(title), "%.100s, %u connections%s%s, %s%.0f requests/s",
             load->kind == LOAD_NULL ? "null" : load->model, load->connections,
             load->fresh ? ", one a request" : "", load->stream ? ", streamed" : "",
             load->rate > 0 ? "open loop at " : "",
             (double)figures->result.requests / figures->result.duration_s);
    return plot_write(&plot, serve->plot_path, message) < 0 ? bench_fail("%s", message)
                                                            : BENCH_DONE;
}

static int serve_run(struct serve *serve, struct figures *figures)
{
    struct prompts prompts = {0};
    char message[320] = "";
    int r = hearth_socket_path(serve->load.socket_path, serve->socket_path);

    if (r == 0)
        r = daemon_pid(serve->socket_path, &serve->pid, message);
    if (r == -ENOENT || r == -ECONNREFUSED) {
        bench_fail("%s", message);
        return BENCH_NO_DAEMON;
    }
    serve->load.socket_path = serve->socket_path;
    if (r == 0 && serve->load.kind != LOAD_NULL)
        r = daemon_warm(serve->socket_path, serve->load.model, message);
    if (r == 0)
        r = make_prompts(serve, &prompts, message);
    figures->memory_per_request_bytes = -1;
    if (r == 0)
        r = measure(serve, figures, message);
    if (serve->show_progress)
        fputs("\r                              \r", stderr);
    if (r == 0 && serve->memory)
        r = memory_per_request(&serve->load, serve->pid, &figures->memory_per_request_bytes,
                               message);
    prompts_done(&prompts);
    return r < 0 ? bench_fail("%s", message[0] ? message : strerror(-r)) : BENCH_DONE;
}

static int run(int argc, char **argv)
{
    struct serve serve = {.load = {.model = "ember",
                                   .connections = 64,
                                   .in_flight = 1,
                                   .duration_us = 10000000,
                                   .warmup_us = 2000000,
                                   .max_tokens = 1,
                                   .seed = 1,
                                   .progress = on_progress},
                          .prompt = "Once upon a time",
                          .show_progress = isatty(STDERR_FILENO)};
    struct figures *figures;
    int r = parse_arguments(argc, argv, &serve);

    if (r < 0)
        return BENCH_DONE;
    if (r > 0)
        return bench_usage(&bench_serve);
    serve.load.userdata = &serve;
    figures = calloc(1, sizeof(*figures));
    if (serve.plot_path)
        serve.points = calloc(PLOT_POINTS_MAX, sizeof(*serve.points));
    if (!figures || (serve.plot_path && !serve.points))
        r = bench_fail("out of memory");
    else
        r = serve_run(&serve, figures);
    if (r == BENCH_DONE)
        r = report(&serve, figures);
    if (r == BENCH_DONE && serve.plot_path)
        r = draw(&serve, figures);
    free(serve.points);
    free(figures);
    return r;
}

const struct bench_command bench_serve = {
    .name = "serve",
    .usage = "[--socket PATH] [--model NAME] [--connections 64] [--in-flight 1] [--rate R] "
             "[--duration 10s] [--warmup 2s] [--prompt TEXT | --prompts FILE | --distinct N] "
             "[--max-tokens 1] [--stream] [--fresh] [--kind complete|embed|null] [--memory] "
             "[--json FILE] [--plot FOLDER|FILE.png|FILE.svg]",
    .help = "Puts load on a running daemon and prints rates, latencies, memory and ratios.",
    .run = run,
};
