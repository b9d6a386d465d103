/* hearth-bench load: how long a model's file takes to be ready, cold and warm, against the disk's
 * own rate; and what others notice of it.
 *
 * Starts a hearthd of its own with the file as its only model beside ember. Everything is repeated
 * in interleaved pairs: raw read, cold load, warm load; then ember under load alone and while the
 * file loads. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "bench/arguments.h"
#include "bench/bench.h"
#include "bench/daemon.h"
#include "bench/load.h"
#include "bench/own_daemon.h"
#include "bench/pairs.h"
#include "lib/cleanup.h"

#define MODEL_NAME       "model"
#define OTHER_MODEL      "ember"
#define READ_BYTES       (4u << 20)
#define READ_ALIGN       4096u
#define OTHERS_WARMUP_US 300000u
#define OTHERS_MOST_US   120000000u /* bound of one window */
#define OTHERS_LEAST_S   0.3        /* and the least length: quick loads repeat in it */
/* More than this share of the file still cached: it cannot be read cold. */
#define CACHED_MOST 0.02

struct loading {
    const char *path, *json_path;
    uint32_t n_pairs, connections;
    bool others_cached; /* the file is in the page cache while others are measured */
    bool not_cold;      /* said so */
    int fd;
    uint64_t file_bytes;
    struct own_daemon daemon;
    char *prompt;
};

/* Of every repetition, and what they come to. */
struct measured {
    double raw_s[PAIRS_MAX], cold_s[PAIRS_MAX], cached_raw_s[PAIRS_MAX], warm_s[PAIRS_MAX];
    double cold_cpu_s[PAIRS_MAX], warm_cpu_s[PAIRS_MAX]; /* the daemon's */
    double peak_bytes[PAIRS_MAX], final_bytes[PAIRS_MAX], busy_s[PAIRS_MAX];
    double alone_p99_us[PAIRS_MAX], alone_per_s[PAIRS_MAX];
    struct pairs cold_to_raw, p99, throughput;
    uint64_t errors;
};

static double now_s(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static void say(const char *what, uint32_t pair, uint32_t n)
{
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%-40s pair %u of %u ", what, pair + 1, n);
}

/* ---- the page cache and the disk ---- */

/* The share of the file that is in the page cache; 0 when nobody can tell. */
static double cached_share(int fd, uint64_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (bytes + page - 1) / page, cached = 0;
    _cleanup_free_ unsigned char *pages = malloc(n);
    void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);

    if (map == MAP_FAILED)
        return 0;
    if (pages && mincore(map, bytes, pages) == 0)
        for (size_t i = 0; i < n; i++)
            cached += pages[i] & 1;
    munmap(map, bytes);
    return (double)cached / (double)n;
}

static void make_cold(struct loading *loading)
{
    double share;

    fdatasync(loading->fd);
    posix_fadvise(loading->fd, 0, 0, POSIX_FADV_DONTNEED);
    share = cached_share(loading->fd, loading->file_bytes);
    if (share <= CACHED_MOST || loading->not_cold)
        return;
    loading->not_cold = true;
    fprintf(stderr,
            "hearth-bench: %.0f %% of %s stay in the page cache: what is called cold here is not\n",
            100 * share, loading->path);
}

/* Reads the file once from its beginning to its end; -errno. */
static int read_all(const char *path, int flags, double *ret_s)
{
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    _cleanup_free_ void *buffer = aligned_alloc(READ_ALIGN, READ_BYTES);
    double began = now_s();
    ssize_t n = 1;

    if (fd < 0 || !buffer)
        return fd < 0 ? -errno : -ENOMEM;
    while (n > 0)
        if ((n = read(fd, buffer, READ_BYTES)) < 0 && errno != EINTR)
            return -errno;
    *ret_s = now_s() - began;
    return 0;
}

/* From the disk, past the page cache where the file system can. */
static int read_raw(struct loading *loading, double *ret_s)
{
    int r;

    make_cold(loading);
    r = read_all(loading->path, O_DIRECT, ret_s);
    if (r == -EINVAL) {
        make_cold(loading);
        r = read_all(loading->path, 0, ret_s);
    }
    return r < 0 ? bench_fail("cannot read %s: %s", loading->path, strerror(-r)) : BENCH_DONE;
}

/* ---- loads ---- */

static int timed_load(struct loading *loading, double *ret_s, double *ret_cpu_s)
{
    char message[320] = "";
    double cpu_s = daemon_cpu_s(loading->daemon.pid), began = now_s();

    if (daemon_warm(loading->daemon.socket_path, MODEL_NAME, message) < 0)
        return bench_fail("%s", message);
    *ret_s = now_s() - began;
    *ret_cpu_s = daemon_cpu_s(loading->daemon.pid) - cpu_s;
    return BENCH_DONE;
}

static int unload(struct loading *loading)
{
    char message[320] = "";

    if (daemon_unload(loading->daemon.socket_path, MODEL_NAME, message) < 0)
        return bench_fail("%s", message);
    return BENCH_DONE;
}

static int cold_load(struct loading *loading, struct measured *m, uint32_t i)
{
    pid_t pid = loading->daemon.pid;
    uint64_t before = daemon_rss_bytes(pid);
    int r;

    make_cold(loading);
    daemon_reset_peak(pid);
    r = timed_load(loading, &m->cold_s[i], &m->cold_cpu_s[i]);
    m->peak_bytes[i] = (double)daemon_peak_bytes(pid) - (double)before;
    m->final_bytes[i] = (double)daemon_rss_bytes(pid) - (double)before;
    return r;
}

static int measure_loads(struct loading *loading, struct measured *m)
{
    int r = BENCH_DONE;

    for (uint32_t i = 0; i < loading->n_pairs && r == BENCH_DONE; i++) {
        say("raw read, cold load, warm load", i, loading->n_pairs);
        r = read_raw(loading, &m->raw_s[i]);
        if (r == BENCH_DONE)
            r = cold_load(loading, m, i);
        if (r == BENCH_DONE)
            r = unload(loading);
        if (r == BENCH_DONE && read_all(loading->path, 0, &m->cached_raw_s[i]) == 0)
            read_all(loading->path, 0, &m->cached_raw_s[i]);
        if (r == BENCH_DONE)
            r = timed_load(loading, &m->warm_s[i], &m->warm_cpu_s[i]);
        if (r == BENCH_DONE)
            r = unload(loading);
        if (r == BENCH_DONE && pairs_add(&m->cold_to_raw, m->raw_s[i], m->cold_s[i]) < 0)
            r = bench_fail("out of memory");
    }
    return r;
}

/* ---- others meanwhile ---- */

/* ember under load, in a thread, until it is stopped. */
struct others {
    struct load_options load;
    struct load_result result;
    _Atomic bool stop;
    pthread_t thread;
    int error;
};

static void *others_main(void *argument)
{
    struct others *others = argument;

    others->error = load_run(&others->load, &others->result);
    return NULL;
}

/* Loads the model, again and again where that is too quick to notice; leaves it loaded. */
static int load_meanwhile(struct loading *loading, double *ret_first_s)
{
    double began = now_s(), took_s, cpu_s;
    int r = timed_load(loading, ret_first_s, &cpu_s);

    while (r == BENCH_DONE && now_s() - began < OTHERS_LEAST_S) {
        r = unload(loading);
        if (r == BENCH_DONE && !loading->others_cached)
            make_cold(loading);
        if (r == BENCH_DONE)
            r = timed_load(loading, &took_s, &cpu_s);
    }
    return r;
}

/* One window: as long as the load of the model takes, or as `alone_s` says where nothing loads. */
static int window(struct loading *loading, struct others *others, double alone_s, double *ret_s)
{
    int r = BENCH_DONE;

    others->load = (struct load_options){.socket_path = loading->daemon.socket_path,
                                         .model = OTHER_MODEL,
                                         .connections = loading->connections,
                                         .in_flight = 1,
                                         .duration_us = OTHERS_MOST_US,
                                         .warmup_us = OTHERS_WARMUP_US,
                                         .max_tokens = 1,
                                         .prompts = &loading->prompt,
                                         .n_prompts = 1,
                                         .seed = 1,
                                         .stop = &others->stop};
    atomic_store(&others->stop, false);
    if (pthread_create(&others->thread, NULL, others_main, others) != 0)
        return bench_fail("cannot start a thread");
    usleep(OTHERS_WARMUP_US);
    *ret_s = alone_s;
    if (alone_s > 0)
        usleep((useconds_t)(alone_s * 1e6));
    else
        r = load_meanwhile(loading, ret_s);
    atomic_store(&others->stop, true);
    pthread_join(others->thread, NULL);
    if (r == BENCH_DONE && others->error < 0)
        r = bench_fail("%s", others->result.message);
    return r;
}

static double rate_of(const struct others *others)
{
    return others->result.duration_s > 0
               ? (double)others->result.requests / others->result.duration_s
               : 0;
}

/* A pair's two windows, the undisturbed one first in every other. */
static int one_pair(struct loading *loading, struct measured *m, uint32_t i, struct others *alone,
                    struct others *beside)
{
    double alone_s = fmax(m->warm_s[0], OTHERS_LEAST_S), spent_s;
    int r = BENCH_DONE;

    for (uint32_t half = 0; half < 2 && r == BENCH_DONE; half++) {
        if (half == i % 2) {
            r = window(loading, alone, i > 0 ? fmax(m->busy_s[i - 1], OTHERS_LEAST_S) : alone_s,
                       &spent_s);
            continue;
        }
        if (loading->others_cached)
            read_all(loading->path, 0, &spent_s);
        else
            make_cold(loading);
        r = window(loading, beside, 0, &m->busy_s[i]);
        if (r == BENCH_DONE)
            r = unload(loading);
    }
    if (r != BENCH_DONE)
        return r;
    m->errors += alone->result.errors + beside->result.errors;
    m->alone_p99_us[i] = histogram_percentile(&alone->result.latency, 99);
    m->alone_per_s[i] = rate_of(alone);
    if (pairs_add(&m->p99, m->alone_p99_us[i], histogram_percentile(&beside->result.latency, 99)) <
            0 ||
        pairs_add(&m->throughput, rate_of(alone), rate_of(beside)) < 0)
        return bench_fail("out of memory");
    return BENCH_DONE;
}

static int measure_others(struct loading *loading, struct measured *m)
{
    struct others *both = calloc(2, sizeof(*both));
    char message[320] = "";
    int r = BENCH_DONE;

    if (!both)
        return bench_fail("out of memory");
    if (daemon_warm(loading->daemon.socket_path, OTHER_MODEL, message) < 0)
        r = bench_fail("%s", message);
    for (uint32_t i = 0; i < loading->n_pairs && r == BENCH_DONE; i++) {
        say("others alone, others beside a load", i, loading->n_pairs);
        r = one_pair(loading, m, i, &both[0], &both[1]);
    }
    free(both);
    return r;
}

/* ---- telling ---- */

static void print_ratio(const char *name, const struct pairs *pairs)
{
    struct pairs_summary s = pairs_summary(pairs);

    printf("%-34s %.3f  [%.3f, %.3f], %zu pairs, %.1f %%\n", name, s.median, s.low, s.high, s.n,
           100 * s.confidence);
}

static json_t *json_interval(const struct pairs *pairs)
{
    struct pairs_summary s = pairs_summary(pairs);

    return json_pack("[f, f]", s.low, s.high);
}

struct medians {
    double raw_s, cold_s, cold_cpu_s, cached_raw_s, warm_s, warm_cpu_s, peak, final, busy_s;
};

static struct medians medians(struct measured *m, uint32_t n)
{
    return (struct medians){.raw_s = median_of(m->raw_s, n),
                            .cold_s = median_of(m->cold_s, n),
                            .cold_cpu_s = median_of(m->cold_cpu_s, n),
                            .cached_raw_s = median_of(m->cached_raw_s, n),
                            .warm_s = median_of(m->warm_s, n),
                            .warm_cpu_s = median_of(m->warm_cpu_s, n),
                            .peak = median_of(m->peak_bytes, n),
                            .final = median_of(m->final_bytes, n),
                            .busy_s = median_of(m->busy_s, n)};
}

static void print_measured(const struct loading *loading, struct measured *m)
{
    struct medians all = medians(m, loading->n_pairs);
    double bytes = (double)loading->file_bytes;

    printf("%-34s %.1f MiB\n", "file", bytes / 1048576);
    printf("%-34s %.3f s (%.2f GB/s)\n", "raw read from the disk", all.raw_s,
           bytes / all.raw_s / 1e9);
    printf("%-34s %.3f s, %.2f s of CPU\n", "cold load", all.cold_s, all.cold_cpu_s);
    print_ratio("cold load / raw read", &m->cold_to_raw);
    printf("%-34s %.3f s (%.2f GB/s)\n", "raw read, cached", all.cached_raw_s,
           bytes / all.cached_raw_s / 1e9);
    printf("%-34s %.3f s, %.2f s of CPU\n", "warm load", all.warm_s, all.warm_cpu_s);
    printf("%-34s peak %.1f MiB, then %.1f MiB\n", "memory of the load", all.peak / 1048576,
           all.final / 1048576);
    printf("%-34s p99 %.0f us, %.0f requests/s\n", "others alone",
           median_of(m->alone_p99_us, loading->n_pairs),
           median_of(m->alone_per_s, loading->n_pairs));
    printf("%-34s %.3f s, the file %s\n", "load beside others", all.busy_s,
           loading->others_cached ? "cached" : "cold");
    print_ratio("others' p99, beside / alone", &m->p99);
    print_ratio("others' requests/s, beside / alone", &m->throughput);
    printf("%-34s %llu\n", "others' errors", (unsigned long long)m->errors);
}

/* A ratio's median and interval under two keys. */
static void put_ratio(json_t *root, const char *key, const char *interval_key,
                      const struct pairs *pairs)
{
    json_object_set_new(root, key, json_real(pairs_summary(pairs).median));
    json_object_set_new(root, interval_key, json_interval(pairs));
}

static json_t *json_measured(const struct loading *loading, struct measured *m)
{
    struct medians all = medians(m, loading->n_pairs);
    json_t *root =
        json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:I, s:I}", "cold_s",
                  all.cold_s, "cold_cpu_s", all.cold_cpu_s, "warm_s", all.warm_s, "warm_cpu_s",
                  all.warm_cpu_s, "raw_read_s", all.raw_s, "cached_read_s", all.cached_raw_s,
                  "busy_load_s", all.busy_s, "peak_bytes", (json_int_t)all.peak, "final_bytes",
                  (json_int_t)all.final, "file_bytes", (json_int_t)loading->file_bytes, "pairs",
                  (json_int_t)loading->n_pairs, "errors", (json_int_t)m->errors);

    put_ratio(root, "others_p99_ratio", "others_p99_interval", &m->p99);
    put_ratio(root, "others_throughput_ratio", "others_throughput_interval", &m->throughput);
    put_ratio(root, "cold_to_raw_ratio", "cold_to_raw_interval", &m->cold_to_raw);
    return root;
}

static int report(const struct loading *loading, struct measured *m)
{
    json_t *root;
    int r = BENCH_DONE;

    print_measured(loading, m);
    if (!loading->json_path)
        return BENCH_DONE;
    root = json_measured(loading, m);
    if (!root || json_dump_file(root, loading->json_path, JSON_INDENT(2)) < 0)
        r = bench_fail("cannot write %s", loading->json_path);
    json_decref(root);
    return r;
}

/* ---- arguments ---- */

enum { OPT_JSON = 256, OPT_PAIRS, OPT_CONNECTIONS, OPT_CACHED, OPT_HELP };

/* 0; a negative number: --help was asked for; BENCH_USAGE. */
static int parse_arguments(int argc, char **argv, struct loading *loading)
{
    static const struct option options[] = {
        {"json", required_argument, NULL, OPT_JSON},
        {"pairs", required_argument, NULL, OPT_PAIRS},
        {"connections", required_argument, NULL, OPT_CONNECTIONS},
        {"cached", no_argument, NULL, OPT_CACHED},
        {"help", no_argument, NULL, OPT_HELP},
        {0}};
    double number = 0;
    int option, r = 0;

    while (r == 0 && (option = getopt_long(argc, argv, "", options, NULL)) >= 0)
        switch (option) {
        case OPT_JSON: loading->json_path = optarg; break;
        case OPT_PAIRS:
            r = parse_number(optarg, 1, PAIRS_MAX, &number);
            loading->n_pairs = (uint32_t)number;
            break;
        case OPT_CONNECTIONS:
            r = parse_number(optarg, 1, 10000, &number);
            loading->connections = (uint32_t)number;
            break;
        case OPT_CACHED: loading->others_cached = true; break;
        case OPT_HELP: return -1;
        default: return BENCH_USAGE;
        }
    if (r < 0)
        fprintf(stderr, "hearth-bench: %s is not a value for this option\n", optarg);
    if (r < 0 || optind + 1 != argc)
        return BENCH_USAGE;
    loading->path = argv[optind];
    return 0;
}

static int start(struct loading *loading)
{
    char link[160], yaml[256];
    _cleanup_free_ char *path = realpath(loading->path, NULL);
    struct gguf_source source;
    int r;

    loading->fd = bench_open(loading->path, &source);
    if (loading->fd < 0)
        return BENCH_FAILED;
    loading->file_bytes = source.size;
    r = own_daemon_new(&loading->daemon);
    if (r != BENCH_DONE)
        return r;
    snprintf(link, sizeof(link), "%s/" MODEL_NAME ".gguf", loading->daemon.models);
    if (!path || symlink(path, link) < 0)
        return bench_fail("cannot link %s: %s", loading->path, strerror(errno));
    /* Room for it twice and for its working memory: what is measured is loading, not making room.
     */
    snprintf(yaml, sizeof(yaml), "memory_budget: %lluMiB\nloading: {prediction: off}\n",
             (unsigned long long)(loading->file_bytes >> 19) + 1024);
    return own_daemon_start(&loading->daemon, yaml);
}

static int run(int argc, char **argv)
{
    struct loading loading = {.n_pairs = 3, .connections = 16, .fd = -1};
    struct measured *measured;
    int r = parse_arguments(argc, argv, &loading);

    if (r < 0)
        printf("usage: hearth-bench load %s\n", bench_load.usage);
    if (r != 0)
        return r < 0 ? BENCH_DONE : bench_usage(&bench_load);
    measured = calloc(1, sizeof(*measured));
    loading.prompt = strdup("Once upon a time");
    r = measured && loading.prompt ? start(&loading) : bench_fail("out of memory");
    if (r == BENCH_DONE)
        r = measure_loads(&loading, measured);
    if (r == BENCH_DONE)
        r = measure_others(&loading, measured);
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%60s\r", "");
    if (r == BENCH_DONE)
        r = report(&loading, measured);
    own_daemon_done(&loading.daemon);
    if (loading.fd >= 0)
        close(loading.fd);
    free(loading.prompt);
    if (measured) {
        pairs_done(&measured->cold_to_raw);
        pairs_done(&measured->p99);
        pairs_done(&measured->throughput);
    }
    free(measured);
    return r;
}

const struct bench_command bench_load = {
    .name = "load",
    .usage = "MODEL [--pairs 3] [--connections 16] [--cached] [--json FILE]",
    .help = "Starts its own hearthd and measures how long a model file takes to be ready, and what "
            "others notice.",
    .run = run,
};
