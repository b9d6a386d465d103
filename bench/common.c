#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/bench.h"
#include "lib/cleanup.h"

int bench_fail(const char *format, ...)
{
    va_list ap;

    fprintf(stderr, "hearth-bench: ");
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    return BENCH_FAILED;
}

int bench_usage(const struct bench_command *command)
{
    fprintf(stderr, "usage: hearth-bench %s %s\n", command->name, command->usage);
    return BENCH_USAGE;
}

int bench_open(const char *path, struct gguf_source *ret_source)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        bench_fail("cannot read %s: %s", path, fd < 0 ? strerror(errno) : "not a regular file");
        if (fd >= 0)
            close(fd);
        return -1;
    }
    *ret_source = (struct gguf_source){.fd = fd, .size = (uint64_t)st.st_size};
    return fd;
}

int bench_model_load(const char *path, struct bench_model *ret_model)
{
    struct model_load_options options = {0};
    struct gguf_source source;
    struct fault fault = {0};
    _cleanup_close_ int fd = -1;

    if (kernels_choose(getenv("HEARTH_CPU"), &options.kernels, &fault) < 0)
        return bench_fail("%s", fault.text);
    fd = bench_open(path, &source);
    if (fd < 0)
        return BENCH_FAILED;
    if (model_load(&source, &options, NULL, &ret_model->model, &fault) < 0)
        return bench_fail("cannot load %s: %s", path, fault.text);
    ret_model->kernels = options.kernels;
    return 0;
}

void bench_model_done(struct bench_model *model)
{
    model->model = model_free(model->model);
}
