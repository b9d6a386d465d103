/* The load generator: many connections in one thread that sleeps whenever there is nothing to do.
 *
 * Closed loop: every connection keeps `in_flight` requests under way. Open loop: requests leave at
 * the times of a Poisson process whatever the answers do, and their latency counts from the time
 * they were meant to leave. Hides epoll, the schedule, what a request is made of. */
#ifndef HEARTH_BENCH_LOAD_H
#define HEARTH_BENCH_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bench/histogram.h"

enum load_kind { LOAD_COMPLETE, LOAD_EMBED, LOAD_NULL };

/* Error codes counted apart; the rest is counted as the last. */
#define LOAD_CODES 14u

struct load_options {
    const char *socket_path;
    const char *model;
    const char *other_model; /* NULL: none; takes turns with `model`, each for turn_us */
    uint64_t turn_us;
    enum load_kind kind;
    uint32_t connections;
    uint32_t in_flight; /* a connection, closed loop */
    double rate;        /* requests/s in all, open loop; 0: closed */
    uint64_t duration_us, warmup_us;
    uint64_t max_tokens;
    bool stream; /* the text comes as it is generated */
    bool fresh;  /* a connection of its own for each request */
    char **prompts;
    size_t n_prompts;
    uint64_t seed;
    bool abandon;             /* what is in flight at the end is not waited for, and no error */
    const _Atomic bool *stop; /* NULL: none; true ends the measurement early (connections kept) */
    /* Called about ten times a second from the loop. */
    void (*progress)(void *userdata, double elapsed_s, uint64_t requests);
    void *userdata;
};

struct load_result {
    uint64_t requests, errors, tokens;
    double duration_s;
    struct histogram latency, first_token;
    uint64_t codes[LOAD_CODES]; /* by enum wire_code; the last: a lost connection */
    char message[320];          /* of the first error */
};

/* Connects, runs warm-up and measurement, closes. 0; a negative errno with a sentence in
 * ret_result->message when no connection could be made. */
int load_run(const struct load_options *options, struct load_result *ret_result);

#endif
