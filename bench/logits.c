/* `logits`: the last position's logits as the engine computes them, for comparing with others'. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/bench.h"
#include "lib/cleanup.h"

#define KV_BYTES (UINT64_C(8) << 30) /* address space; touched as far as the prompt reaches */

/* "1,2,3" */
static int parse_ids(const char *text, int32_t **ret_ids, uint32_t *ret_n)
{
    _cleanup_free_ int32_t *ids = calloc(strlen(text) / 2 + 1, sizeof(*ids));
    uint32_t n = 0;
    char *end;

    if (!ids)
        return -ENOMEM;
    for (;; text = end + 1) {
        long id = strtol(text, &end, 10);

        if (end == text || id < 0 || id > INT_MAX)
            return -EINVAL;
        ids[n++] = (int32_t)id;
        if (*end == '\0')
            break;
        if (*end != ',')
            return -EINVAL;
    }
    *ret_ids = TAKE_PTR(ids);
    *ret_n = n;
    return 0;
}

/* Feeds the ids in the widest steps there are; the last row's values. */
static int feed(struct engine *engine, struct model *model, struct sequence *sequence,
                const int32_t *ids, uint32_t n, const float **ret_values)
{
    struct step_row row = {.sequence = sequence};
    int r;

    for (uint32_t i = 0; i < n; i += row.n_tokens) {
        row.tokens = ids + i;
        row.n_tokens = MIN(n - i, ENGINE_MAX_COLUMNS);
        row.wants = i + row.n_tokens == n ? ROW_LOGITS : ROW_NOTHING;
        r = engine_step_begin(engine, model, &row, 1);
        if (r < 0)
            return r;
        while (engine_step_slice(engine, model) > 0)
            ;
        engine_step_end(engine, model);
    }
    *ret_values = row.ret_values;
    return 0;
}

static int print_logits(const struct bench_model *m, const struct engine_options *options,
                        const int32_t *ids, uint32_t n)
{
    const struct model_info *info = model_info(m->model);
    struct engine *engine = NULL;
    struct sequence *sequence = NULL;
    const float *values = NULL;
    struct fault fault = {0};
    int r, exit_code = BENCH_DONE;

    if (n > info->context_tokens)
        return bench_fail("%u ids do not fit a context of %u", n, info->context_tokens);
    r = engine_new(options, &engine, &fault);
    if (r < 0)
        return bench_fail("%s", fault.text);
    r = sequence_new(engine, m->model, n, &sequence);
    if (r == 0)
        r = feed(engine, m->model, sequence, ids, n, &values);
    if (r < 0)
        exit_code = bench_fail(r == -EINVAL ? "an id is outside the vocabulary of %u"
                                            : "the step failed (vocabulary %u)",
                               info->n_vocab);
    else if (fwrite(values, sizeof(float), info->n_vocab, stdout) != info->n_vocab ||
             fflush(stdout) != 0)
        exit_code = bench_fail("cannot write to stdout: %s", strerror(errno));
    sequence_free(sequence);
    engine_free(engine);
    return exit_code;
}

static int run(int argc, char **argv)
{
    struct engine_options options = {.threads = 1, .kv_budget_bytes = KV_BYTES};
    const char *path = NULL, *list = NULL;
    _cleanup_free_ int32_t *ids = NULL;
    struct bench_model m;
    uint32_t n = 0;
    int r;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--kv") == 0 && i + 1 < argc &&
            (strcmp(argv[i + 1], "f32") == 0 || strcmp(argv[i + 1], "f16") == 0))
            options.kv_f32 = strcmp(argv[++i], "f32") == 0;
        else if (strcmp(argv[i], "--ids") == 0 && i + 1 < argc)
            list = argv[++i];
        else if (argv[i][0] != '-' && !path)
            path = argv[i];
        else
            return bench_usage(&bench_logits);
    }
    if (!path || !list || parse_ids(list, &ids, &n) < 0)
        return bench_usage(&bench_logits);
    r = bench_model_load(path, &m);
    if (r != 0)
        return r;
    options.kernels = m.kernels;
    r = print_logits(&m, &options, ids, n);
    bench_model_done(&m);
    return r;
}

const struct bench_command bench_logits = {
    .name = "logits",
    .usage = "MODEL [--kv f32|f16] --ids 1,2,3",
    .help = "Logits after the last id, little-endian float32 on stdout.",
    .run = run,
};
