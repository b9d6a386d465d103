#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "bench/bench.h"
#include "lib/cleanup.h"

static const struct bench_command *const commands[] = {
    &bench_engine,  &bench_ids,   &bench_load,  &bench_logits,
    &bench_preload, &bench_reads, &bench_serve, &bench_stages,
};

static int help(FILE *to)
{
    fprintf(to, "usage: hearth-bench COMMAND ...\n\n");
    for (size_t i = 0; i < ELEMENTSOF(commands); i++)
        fprintf(to, "  %s %s\n      %s\n", commands[i]->name, commands[i]->usage,
                commands[i]->help);
    return to == stdout ? BENCH_DONE : BENCH_USAGE;
}

/* Ten thousand connections are as many files: what is allowed, is used. */
static void allow_files(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return help(stderr);
    allow_files();
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0)
        return help(stdout);
    if (strcmp(argv[1], "--version") == 0) {
        printf("hearth-bench %s\n", HEARTH_VERSION);
        return BENCH_DONE;
    }
    for (size_t i = 0; i < ELEMENTSOF(commands); i++)
        if (strcmp(argv[1], commands[i]->name) == 0)
            return commands[i]->run(argc - 1, argv + 1);
    fprintf(stderr, "hearth-bench: no command %s\n", argv[1]);
    return help(stderr);
}
