/* hearth-bench: one file per command, a table of them in main.c.
 *
 * Hides nothing; says what a command is and holds what several of them do: open a model file, load
 * it, print why not. Exit codes: 0 done, 1 refused or failed, 2 usage, 3 no daemon. */
#ifndef HEARTH_BENCH_BENCH_H
#define HEARTH_BENCH_BENCH_H

#include "daemon/engine/engine.h"

enum {
    BENCH_DONE = 0,
    BENCH_FAILED = 1,
    BENCH_USAGE = 2,
    BENCH_NO_DAEMON = 3,
};

struct bench_command {
    const char *name;
    const char *usage;                 /* what follows the name */
    const char *help;                  /* a sentence */
    int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns the exit code */
};

extern const struct bench_command bench_logits, bench_ids, bench_engine, bench_load, bench_preload,
    bench_reads, bench_serve, bench_stages;

/* Prints "hearth-bench: " and the sentence on stderr; returns BENCH_FAILED. */
__attribute__((format(printf, 1, 2))) int bench_fail(const char *format, ...);
/* Prints the command's usage on stderr; returns BENCH_USAGE. */
int bench_usage(const struct bench_command *command);

/* A model file with kernels as $HEARTH_CPU says. */
struct bench_model {
    const struct kernel_table *kernels;
    struct model *model;
};

/* 0, or BENCH_FAILED after saying why. */
int bench_model_load(const char *path, struct bench_model *ret_model);
void bench_model_done(struct bench_model *model);

/* Opens a file as a source; -1 after saying why. The descriptor is the caller's. */
int bench_open(const char *path, struct gguf_source *ret_source);

#endif
