/* hearth-bench reads: how many small files a second can be opened, read and closed.
 *
 * For the files of a hearthfs, but any will do. Each reader is a thread that goes round the files:
 * open(2), one read(2) (or as many as the end takes), close(2). Turns of equal length, each a row,
 * so that what the machine does beside it shows. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench/arguments.h"
#include "bench/bench.h"
#include "bench/histogram.h"
#include "lib/cleanup.h"

#define READERS_MAX  1024u
#define TURNS_MAX    1000u
#define BUFFER_BYTES 65536u

struct reads {
    char **files;
    size_t n_files;
    uint32_t n_readers, n_turns;
    uint64_t turn_us;
    bool to_end;
    const char *json_path;
    atomic_bool over; /* relaxed: set by the main thread when a turn's time is up */
};

/* One thread's; read by the main thread after it has ended. */
struct reader {
    pthread_t thread;
    struct reads *reads;
    size_t first; /* the file it begins with */
    int error;    /* negative errno */
    const char *failed;
    struct histogram latency;
};

static uint64_t now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

static int read_once(const char *path, bool to_end)
{
    char buffer[BUFFER_BYTES];
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0)
        return -errno;
    do
        n = read(fd, buffer, sizeof(buffer));
    while (n > 0 && to_end);
    return n < 0 ? -errno : 0;
}

static void *run_reader(void *userdata)
{
    struct reader *reader = userdata;
    struct reads *reads = reader->reads;
    size_t at = reader->first;

    while (!atomic_load_explicit(&reads->over, memory_order_relaxed)) {
        const char *path = reads->files[at++ % reads->n_files];
        uint64_t began_us = now_us();
        reader->error = read_once(path, reads->to_end);
        if (reader->error < 0) {
            reader->failed = path;
            break;
        }
        histogram_add(&reader->latency, now_us() - began_us);
    }
    return NULL;
}

/* ---- a turn ---- */

static void sleep_us(uint64_t us)
{
    struct timespec left = {.tv_sec = (time_t)(us / 1000000u),
                            .tv_nsec = (long)(us % 1000000u) * 1000};

    while (nanosleep(&left, &left) < 0 && errno == EINTR)
        continue;
}

/* Starts as many readers as can be; how many. */
static uint32_t start_readers(struct reads *reads, struct reader *readers)
{
    uint32_t n = 0;

    for (; n < reads->n_readers; n++) {
        readers[n].reads = reads;
        readers[n].first = n;
        if (pthread_create(&readers[n].thread, NULL, run_reader, &readers[n]) != 0)
            break;
    }
    return n;
}

static int run_turn(struct reads *reads, struct histogram *ret_latency, double *ret_s)
{
    _cleanup_free_ struct reader *readers = calloc(reads->n_readers, sizeof(*readers));
    uint64_t began_us = now_us();
    uint32_t n;
    int r = BENCH_DONE;

    if (!readers)
        return bench_fail("out of memory");
    atomic_store_explicit(&reads->over, false, memory_order_relaxed);
    n = start_readers(reads, readers);
    if (n == reads->n_readers)
        sleep_us(reads->turn_us);
    else
        r = bench_fail("cannot start %u threads", reads->n_readers);
    atomic_store_explicit(&reads->over, true, memory_order_relaxed);
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(readers[i].thread, NULL);
        histogram_merge(ret_latency, &readers[i].latency);
        if (readers[i].error < 0 && r == BENCH_DONE)
            r = bench_fail("cannot read %s: %s", readers[i].failed, strerror(-readers[i].error));
    }
    *ret_s = (double)(now_us() - began_us) / 1e6;
    return r;
}

static int run_turns(struct reads *reads, json_t *rows)
{
    _cleanup_free_ struct histogram *latency = malloc(sizeof(*latency));
    int r = latency ? BENCH_DONE : bench_fail("out of memory");

    printf("%7s %12s %9s %9s %9s\n", "readers", "reads/s", "p50 us", "p99 us", "max us");
    for (uint32_t turn = 0; turn < reads->n_turns && r == BENCH_DONE; turn++) {
        double s = 0, per_s, p50, p99;

        *latency = (struct histogram){0};
        r = run_turn(reads, latency, &s);
        if (r != BENCH_DONE)
            break;
        per_s = (double)latency->count / s;
        p50 = histogram_percentile(latency, 50);
        p99 = histogram_percentile(latency, 99);
        printf("%7u %12.0f %9.0f %9.0f %9llu\n", reads->n_readers, per_s, p50, p99,
               (unsigned long long)latency->max_us);
        fflush(stdout);
        json_array_append_new(rows,
                              json_pack("{s:i, s:f, s:f, s:f, s:I}", "readers",
                                        (int)reads->n_readers, "reads_per_s", per_s, "p50_us", p50,
                                        "p99_us", p99, "max_us", (json_int_t)latency->max_us));
    }
    return r;
}

/* ---- the command ---- */

enum { OPT_READERS = 1, OPT_TURNS, OPT_DURATION, OPT_TO_END, OPT_JSON, OPT_HELP };

/* 0, BENCH_USAGE, or -1 where help was asked for. */
static int parse_arguments(int argc, char **argv, struct reads *reads)
{
    static const struct option options[] = {{"readers", required_argument, NULL, OPT_READERS},
                                            {"turns", required_argument, NULL, OPT_TURNS},
                                            {"duration", required_argument, NULL, OPT_DURATION},
                                            {"to-end", no_argument, NULL, OPT_TO_END},
                                            {"json", required_argument, NULL, OPT_JSON},
                                            {"help", no_argument, NULL, OPT_HELP},
                                            {0}};
    double number = 0;
    int option, r = 0;

    while (r == 0 && (option = getopt_long(argc, argv, "", options, NULL)) >= 0)
        switch (option) {
        case OPT_READERS:
            r = parse_number(optarg, 1, READERS_MAX, &number);
            reads->n_readers = (uint32_t)number;
            break;
        case OPT_TURNS:
            r = parse_number(optarg, 1, TURNS_MAX, &number);
            reads->n_turns = (uint32_t)number;
            break;
        case OPT_DURATION: r = parse_duration(optarg, &reads->turn_us); break;
        case OPT_TO_END: reads->to_end = true; break;
        case OPT_JSON: reads->json_path = optarg; break;
        case OPT_HELP: return -1;
        default: return BENCH_USAGE;
        }
    if (r < 0)
        fprintf(stderr, "hearth-bench: %s is not a value for this option\n", optarg);
    if (r < 0 || optind >= argc)
        return BENCH_USAGE;
    reads->files = argv + optind;
    reads->n_files = (size_t)(argc - optind);
    return 0;
}

static int run(int argc, char **argv)
{
    struct reads reads = {.n_readers = 1, .n_turns = 5, .turn_us = 1000000};
    json_t *rows;
    int r = parse_arguments(argc, argv, &reads);

    if (r < 0)
        printf("usage: hearth-bench reads %s\n", bench_reads.usage);
    if (r != 0)
        return r < 0 ? BENCH_DONE : bench_usage(&bench_reads);
    rows = json_array();
    r = run_turns(&reads, rows);
    if (r == BENCH_DONE && reads.json_path &&
        json_dump_file(rows, reads.json_path, JSON_INDENT(1)) < 0)
        r = bench_fail("cannot write %s", reads.json_path);
    json_decref(rows);
    return r;
}

const struct bench_command bench_reads = {
    .name = "reads",
    .usage = "[--readers 1] [--turns 5] [--duration 1s] [--to-end] [--json FILE] FILE...",
    .help = "Opens, reads and closes small files as often as can be, as of a hearthfs.",
    .run = run,
};
