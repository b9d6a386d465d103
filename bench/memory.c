#include "bench/memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "bench/daemon.h"
#include "lib/cleanup.h"

/* Requests in flight, and how long each level is kept up. */
#define MEMORY_LEVEL_1 1000u
#define MEMORY_LEVEL_2 2000u
#define MEMORY_US      2000000u

/* What is seen of one level. */
struct level {
    const char *socket_path;
    pid_t pid;
    uint64_t rss_bytes;
    double kv_bytes;
};

static void on_level(void *userdata, double elapsed_s, uint64_t requests)
{
    struct level *level = userdata;
    struct daemon_counters counters;
    char message[320];

    (void)elapsed_s;
    (void)requests;
    level->rss_bytes = MAX(level->rss_bytes, daemon_rss_bytes(level->pid));
    if (daemon_counters(level->socket_path, &counters, message) == 0)
        level->kv_bytes = MAX(level->kv_bytes, counters.kv_used_bytes);
}

static int run_level(const struct load_options *what, pid_t pid, uint32_t in_flight,
                     struct level *ret_level, char message[320])
{
    struct load_options load = *what;
    struct load_result *result = calloc(1, sizeof(*result));
    int r;

    if (!result)
        return -ENOMEM;
    load.rate = 0;
    load.fresh = false;
    load.abandon = true; /* a batch of one would take its time over two thousand */
    load.connections = MIN(what->connections, in_flight);
    load.in_flight = in_flight / load.connections;
    load.warmup_us = 0;
    load.duration_us = MEMORY_US;
    load.progress = on_level;
    load.userdata = ret_level;
    *ret_level = (struct level){.socket_path = what->socket_path, .pid = pid};
    r = load_run(&load, result);
    if (r < 0 || result->errors > 0) {
        snprintf(message, 320, "%s", result->message);
        r = r < 0 ? r : -EIO;
    }
    free(result);
    return r;
}

int memory_per_request(const struct load_options *load, pid_t pid, double *ret_bytes,
                       char ret_message[320])
{
    struct level one, two;
    int r = run_level(load, pid, MEMORY_LEVEL_1, &one, ret_message);

    if (r == 0)
        r = run_level(load, pid, MEMORY_LEVEL_2, &two, ret_message);
    if (r < 0)
        return r;
    *ret_bytes =
        MAX(0.0, ((double)two.rss_bytes - (double)one.rss_bytes - (two.kv_bytes - one.kv_bytes)) /
                     (MEMORY_LEVEL_2 - MEMORY_LEVEL_1));
    return 0;
}
