/* hearth-bench stages: what each of the four systems brings, measured in one go.
 *
 * Starts a hearthd of its own for each stage. 48 clients stay on model A, 16 alternate between B
 * and C, and the memory budget fits A and one of the two. "Off" is the same code at its limit: a
 * connection for each request, a batch of one, one final frame, loading in the foreground. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/daemon.h"
#include "bench/load.h"
#include "bench/memory.h"
#include "bench/model_maker.h"
#include "bench/prompts.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

#define STEADY_CLIENTS      48u
#define ALTERNATING_CLIENTS 16u
#define TURN_US             2000000u
#define WARMUP_US           1000000u
#define DURATION_US         8000000u
#define TOKENS              16u
#define START_LIMIT_MS      10000
#define N_PROMPTS           2000u

struct stage {
    const char *name;
    bool pooling, batching, streaming, async;
};

static const struct stage stages[] = {
    {"everything off", false, false, false, false}, {"+ pooling", true, false, false, false},
    {"+ batching", true, true, false, false},       {"+ streaming", true, true, true, false},
    {"+ async loading", true, true, true, true},
};

struct row {
    const char *stage;
    double requests_per_s, p50_us, p99_us, first_token_p50_us, steady_p99_us;
    double memory_per_request_bytes;
    uint64_t errors;
};

struct bench {
    char dir[64];
    char socket_path[HEARTH_PATH_BYTES];
    uint64_t budget_bytes;
    struct prompts prompts;
    pid_t pid;
};

/* ---- models ---- */

static int to_file(void *userdata, const void *bytes, size_t len)
{
    return fwrite(bytes, 1, len, userdata) == len ? 0 : -EIO;
}

static int make_model(const struct bench *bench, const char *name, bool large, uint64_t seed)
{
    struct model_plan plan = model_plan_default();
    struct fault fault = {{0}};
    char path[128];
    FILE *file;
    int r;

    plan.type = large ? PLAN_Q8_0 : PLAN_F16;
    plan.dim = large ? 512 : 128;
    plan.layers = large ? 8 : 3;
    plan.heads = 8;
    plan.kv_heads = 4;
    plan.ff = large ? 2048 : 256;
    plan.vocab = 1024;
    plan.context = 256;
    plan.seed = seed;
    snprintf(path, sizeof(path), "%s/models/%s.gguf", bench->dir, name);
    file = fopen(path, "we");
    if (!file)
        return bench_fail("cannot write %s: %s", path, strerror(errno));
    r = model_make(&plan, to_file, file, &fault);
    if (fclose(file) != 0 && r == 0)
        r = -EIO;
    return r < 0 ? bench_fail("cannot make %s: %s", path, fault.text) : 0;
}

static uint64_t model_bytes(const struct bench *bench, const char *name)
{
    char path[128];
    struct stat st;

    snprintf(path, sizeof(path), "%s/models/%s.gguf", bench->dir, name);
    return stat(path, &st) < 0 ? 0 : (uint64_t)st.st_size;
}

/* ---- the daemon ---- */

static int write_config(const struct bench *bench, const struct stage *stage, char path[128])
{
    FILE *file;

    snprintf(path, 128, "%s/hearth.yaml", bench->dir);
    file = fopen(path, "we");
    if (!file)
        return bench_fail("cannot write %s: %s", path, strerror(errno));
    fprintf(file,
            "memory_budget: %lluKiB\nengine: {prefix_cache: no}\nbatching: {enabled: %s}\n"
            "streaming: {enabled: %s}\nloading: {async: %s, prediction: off}\n",
            (unsigned long long)bench->budget_bytes >> 10, stage->batching ? "yes" : "no",
            stage->streaming ? "yes" : "no", stage->async ? "yes" : "no");
    return fclose(file) == 0 ? 0 : bench_fail("cannot write %s", path);
}

/* The hearthd of the same build, else the installed one. */
static void find_daemon(char path[4096])
{
    ssize_t n = readlink("/proc/self/exe", path, 4000);
    char *slash;

    path[n > 0 ? n : 0] = 0;
    for (int i = 0; i < 2; i++)
        if ((slash = strrchr(path, '/')))
            *slash = 0;
    strcat(path, "/daemon/hearthd");
    if (access(path, X_OK) < 0)
        strcpy(path, "hearthd");
}

static int start_daemon(struct bench *bench, const struct stage *stage)
{
    char config[128], models[128], log[128], program[4096], message[320];
    pid_t pid;
    int r = write_config(bench, stage, config);

    if (r != 0)
        return r;
    find_daemon(program);
    snprintf(models, sizeof(models), "%s/models", bench->dir);
    snprintf(log, sizeof(log), "%s/log", bench->dir);
    bench->pid = fork();
    if (bench->pid < 0)
        return bench_fail("cannot start hearthd: %s", strerror(errno));
    if (bench->pid == 0) {
        int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd >= 0)
            dup2(fd, STDERR_FILENO);
        execlp(program, "hearthd", "--config", config, "--socket", bench->socket_path, "--models",
               models, NULL);
        _exit(127);
    }
    for (int ms = 0; ms < START_LIMIT_MS; ms += 10) {
        if (daemon_pid(bench->socket_path, &pid, message) == 0)
            return 0;
        usleep(10000);
    }
    return bench_fail("hearthd does not answer on %s; its log is %s", bench->socket_path, log);
}

static void stop_daemon(struct bench *bench)
{
    if (bench->pid <= 0)
        return;
    kill(bench->pid, SIGTERM);
    waitpid(bench->pid, NULL, 0);
    bench->pid = 0;
}

/* ---- one stage ---- */

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
    return (struct load_options){.socket_path = bench->socket_path,
                                 .model = "a",
                                 .connections = STEADY_CLIENTS,
                                 .in_flight = 1,
                                 .duration_us = DURATION_US,
                                 .warmup_us = WARMUP_US,
                                 .max_tokens = TOKENS,
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

static int run_stage(struct bench *bench, const struct stage *stage, struct row *ret_row,
                     char message[320])
{
    struct group *groups = calloc(2, sizeof(*groups));
    struct load_options memory = group_load(bench, stage);
    int r = groups ? daemon_warm(bench->socket_path, "a", message) : -ENOMEM;

    if (r == 0 && bench->prompts.n == 0)
        r = prompts_distinct(&bench->prompts, N_PROMPTS, 1, bench->socket_path, "a", message);
    if (r == 0)
        r = run_groups(bench, stage, &groups[0], &groups[1], message);
    if (r == 0) {
        struct load_result *all = &groups[1].result;
        ret_row->stage = stage->name;
        ret_row->steady_p99_us = histogram_percentile(&groups[0].result.latency, 99);
        ret_row->errors = all->errors + groups[0].result.errors;
        histogram_merge(&all->latency, &groups[0].result.latency);
        histogram_merge(&all->first_token, &groups[0].result.first_token);
        ret_row->requests_per_s =
            (double)(all->requests + groups[0].result.requests) / all->duration_s;
        ret_row->p50_us = histogram_percentile(&all->latency, 50);
        ret_row->p99_us = histogram_percentile(&all->latency, 99);
        ret_row->first_token_p50_us = histogram_percentile(&all->first_token, 50);
        if (ret_row->errors > 0)
            fprintf(stderr, "%s: first error: %s%s\n", stage->name, groups[0].result.message,
                    all->message);
        memory.prompts = bench->prompts.texts;
        memory.n_prompts = bench->prompts.n;
        r = memory_per_request(&memory, bench->pid, &ret_row->memory_per_request_bytes, message);
    }
    free(groups);
    return r;
}

/* ---- all of them ---- */

static void print_row(const struct row *row, const struct row *first)
{
    printf("%-18s %10.0f %10.0f %10.0f %12.0f %12.0f %12.0f %6.2f %6llu\n", row->stage,
           row->requests_per_s, row->p50_us, row->p99_us, row->first_token_p50_us,
           row->steady_p99_us, row->memory_per_request_bytes,
           row->requests_per_s / first->requests_per_s, (unsigned long long)row->errors);
    fflush(stdout);
}

static int write_json(const struct row *rows, size_t n, const char *path)
{
    json_t *root = json_array();
    int r;

    for (size_t i = 0; i < n; i++)
        json_array_append_new(
            root, json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I}", "stage", rows[i].stage,
                            "requests_per_s", rows[i].requests_per_s, "p50_us", rows[i].p50_us,
                            "p99_us", rows[i].p99_us, "first_token_p50_us",
                            rows[i].first_token_p50_us, "steady_p99_us", rows[i].steady_p99_us,
                            "memory_per_request_bytes", rows[i].memory_per_request_bytes, "gain",
                            rows[i].requests_per_s / rows[0].requests_per_s, "errors",
                            (json_int_t)rows[i].errors));
    r = json_dump_file(root, path, JSON_INDENT(2));
    json_decref(root);
    return r < 0 ? bench_fail("cannot write %s", path) : BENCH_DONE;
}

static int run_all(struct bench *bench, struct row *rows)
{
    printf("%-18s %10s %10s %10s %12s %12s %12s %6s %6s\n", "stage", "requests/s", "p50 us",
           "p99 us", "1st token us", "A's p99 us", "bytes/req", "gain", "errors");
    for (size_t i = 0; i < ELEMENTSOF(stages); i++) {
        char message[320] = "";
        int r = start_daemon(bench, &stages[i]);
        if (r == 0 && run_stage(bench, &stages[i], &rows[i], message) < 0)
            r = bench_fail("%s: %s", stages[i].name, message);
        stop_daemon(bench);
        if (r != 0)
            return r;
        print_row(&rows[i], &rows[0]);
    }
    return BENCH_DONE;
}

static int make_place(struct bench *bench)
{
    char models[128];
    int r;

    strcpy(bench->dir, "/tmp/hearth-stages-XXXXXX");
    if (!mkdtemp(bench->dir))
        return bench_fail("cannot make a folder: %s", strerror(errno));
    snprintf(models, sizeof(models), "%s/models", bench->dir);
    if (mkdir(models, 0755) < 0)
        return bench_fail("cannot make %s: %s", models, strerror(errno));
    snprintf(bench->socket_path, sizeof(bench->socket_path), "%s/s", bench->dir);
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

static void remove_place(const struct bench *bench)
{
    static const char *const names[] = {"models/a.gguf", "models/b.gguf", "models/c.gguf", "models",
                                        "hearth.yaml",   "log",           "s.models",      ""};
    char path[128];

    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        snprintf(path, sizeof(path), "%s/%s", bench->dir, names[i]);
        remove(path);
    }
}

static int run(int argc, char **argv)
{
    static const struct option options[] = {
        {"json", required_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    struct row rows[ELEMENTSOF(stages)] = {0};
    const char *json_path = NULL;
    struct bench bench = {0};
    int option, r;

    while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
        if (option == 'h') {
            printf("usage: hearth-bench stages %s\n", bench_stages.usage);
            return BENCH_DONE;
        }
        if (option != 'j')
            return bench_usage(&bench_stages);
        json_path = optarg;
    }
    if (optind < argc)
        return bench_usage(&bench_stages);
    r = make_place(&bench);
    if (r == 0)
        r = run_all(&bench, rows);
    if (r == BENCH_DONE && json_path)
        r = write_json(rows, ELEMENTSOF(stages), json_path);
    remove_place(&bench);
    prompts_done(&bench.prompts);
    return r;
}

const struct bench_command bench_stages = {
    .name = "stages",
    .usage = "[--json FILE]",
    .help = "Starts its own hearthd and measures what pooling, batching, streaming and async "
            "loading bring.",
    .run = run,
};
