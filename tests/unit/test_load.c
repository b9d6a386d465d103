/* One load: how its bytes are read, from good disks and bad ones, and what it takes. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/model.h"
#include "daemon/model/load_task.h"
#include "lib/cleanup.h"
#include "tests/support/engine_run.h"
#include "tests/support/gguf_make.h"
#include "tests/support/read_fault.h"

static const struct clock real_clock = {.now_us = clock_monotonic_us};

struct bench {
    char dir[32], path[64];
    struct metrics *metrics;
    struct loader_options options;
    struct model *expected; /* the same file, loaded from memory */
};

static struct model *load_from_memory(const char *path, const struct kernel_table *kernels)
{
    struct model_load_options options = {.kernels = kernels};
    struct stat st;
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct model *model = NULL;
    uint8_t *bytes;

    cr_assert(fd >= 0 && fstat(fd, &st) == 0);
    bytes = malloc((size_t)st.st_size);
    cr_assert_eq(read(fd, bytes, (size_t)st.st_size), st.st_size);
    cr_assert_eq(
        model_load(&(struct gguf_source){.fd = -1, .memory = bytes, .size = (uint64_t)st.st_size},
                   &options, NULL, &model, NULL),
        0);
    free(bytes);
    return model;
}

/* On a file system that knows O_DIRECT, where there is one. */
static void build(struct bench *bench, const struct model_plan *plan)
{
    *bench = (struct bench){.dir = "/var/tmp/hearth-load-XXXXXX"};
    cr_assert_not_null(mkdtemp(bench->dir));
    snprintf(bench->path, sizeof(bench->path), "%s/one.gguf", bench->dir);
    cr_assert_eq(make_model_file(plan, bench->path, NULL), 0);
    cr_assert_eq(metrics_new(&bench->metrics), 0);
    bench->options =
        (struct loader_options){.retries = 3, .metrics = bench->metrics, .clock = &real_clock};
    cr_assert_eq(kernels_choose("scalar", &bench->options.kernels, NULL), 0);
    bench->expected = load_from_memory(bench->path, bench->options.kernels);
}

static void leave(struct bench *bench)
{
    model_free(bench->expected);
    metrics_free(bench->metrics);
    unlink(bench->path);
    rmdir(bench->dir);
}

static struct load_task *load(struct bench *bench)
{
    struct load_task *task = load_task_new(TASK_LOAD, NULL);

    task->path = strdup(bench->path);
    load_sync(&bench->options, task);
    return task;
}

/* Loaded well: the very bytes that the memory's load has. */
static void expect_same(const struct bench *bench, const struct load_task *task, const char *how)
{
    cr_assert_eq(task->error, 0, "%s: %s", how, task->fault.text);
    cr_assert_eq(task->model->arena.bytes, bench->expected->arena.bytes);
    cr_assert_eq(memcmp(task->model->arena.memory, bench->expected->arena.memory,
                        bench->expected->arena.bytes),
                 0, "%s: other weights", how);
}

static float *logits_of(struct model *model, uint32_t n_vocab)
{
    static const int32_t ids[] = {1, 5, 260, 30, 411};
    struct engine *engine = test_engine(model->kernels, 1, false);
    struct sequence *sequence = test_sequence(engine, model, ELEMENTSOF(ids));
    float *logits = malloc(n_vocab * sizeof(*logits));

    memcpy(logits, test_feed(engine, model, sequence, ids, ELEMENTSOF(ids), ELEMENTSOF(ids)),
           n_vocab * sizeof(*logits));
    sequence_free(sequence);
    engine_free(engine);
    return logits;
}

static void expect_same_logits(struct model *a, struct model *b)
{
    uint32_t n = model_info(a)->n_vocab;
    _cleanup_free_ float *of_a = logits_of(a, n), *of_b = logits_of(b, n);

    cr_assert_eq(memcmp(of_a, of_b, n * sizeof(float)), 0, "other logits");
}

static struct model_plan plan_of(enum plan_type type)
{
    struct model_plan plan = model_plan_default();

    plan.type = type;
    return plan;
}

Test(load, every_way_of_reading_gives_the_same_weights)
{
    static const struct {
        const char *how;
        bool no_direct, no_nowait, nothing_cached, short_reads, interrupted;
    } ways[] = {
        {"what is cached", false, false, false, false, false},
        {"nothing is cached", false, false, true, false, false},
        {"O_DIRECT is refused", true, false, true, false, false},
        {"no telling what is cached", false, true, false, false, false},
        {"short reads, direct", false, false, true, true, false},
        {"short reads, cached", true, true, false, true, false},
        {"interrupted", false, false, true, false, true},
    };

    for (enum plan_type type = 0; type < PLAN_N_TYPES; type++) {
        struct model_plan plan = plan_of(type);
        struct bench bench;

        build(&bench, &plan);
        for (size_t i = 0; i < ELEMENTSOF(ways); i++) {
            struct load_task *task;
            atomic_store(&read_faults.no_direct, ways[i].no_direct);
            atomic_store(&read_faults.no_nowait, ways[i].no_nowait);
            atomic_store(&read_faults.nothing_cached, ways[i].nothing_cached);
            atomic_store(&read_faults.short_reads, ways[i].short_reads);
            atomic_store(&read_faults.interrupted, ways[i].interrupted);
            task = load(&bench);
            expect_same(&bench, task, ways[i].how);
            load_task_free(task);
        }
        memset(&read_faults, 0, sizeof(read_faults));
        leave(&bench);
    }
}

Test(load, what_is_not_cached_goes_past_the_cache_and_is_counted)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;
    struct load_task *task;

    build(&bench, &plan);
    atomic_store(&read_faults.nothing_cached, true);
    task = load(&bench);
    expect_same(&bench, task, "uncached");
    if (atomic_load(&read_faults.n_direct) == 0)
        cr_skip_test("/var/tmp is on a file system without O_DIRECT");
    cr_assert_eq(atomic_load(&task->progress.direct_bytes),
                 atomic_load(&task->progress.done_bytes));
    cr_assert_eq(metrics_get(bench.metrics, M_LOAD_DIRECT_BYTES),
                 metrics_get(bench.metrics, M_LOAD_BYTES));
    load_task_free(task);
    leave(&bench);
}

Test(load, a_file_by_descriptor_is_read_through_the_cache_alone)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;
    struct load_task *task = load_task_new(TASK_LOAD, NULL);

    build(&bench, &plan);
    task->fd = open(bench.path, O_RDONLY | O_CLOEXEC);
    atomic_store(&read_faults.nothing_cached, true);
    load_sync(&bench.options, task);
    expect_same(&bench, task, "by descriptor");
    cr_assert_eq(atomic_load(&read_faults.n_direct), 0);
    cr_assert(fcntl(task->fd, F_GETFD) >= 0, "the descriptor stays the task's");
    load_task_free(task);
    leave(&bench);
}

Test(load, io_errors_are_tried_again_and_the_load_goes_on_where_it_was)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;

    build(&bench, &plan);
    for (int spare = 0; spare < 6; spare += 5) { /* in the header, and among the weights */
        struct load_task *task;
        uint64_t before = metrics_get(bench.metrics, M_LOAD_RETRIES);
        atomic_store(&read_faults.nothing_cached, true);
        atomic_store(&read_faults.spare, spare);
        atomic_store(&read_faults.eio, 2);
        task = load(&bench);
        expect_same(&bench, task, "after two errors");
        cr_assert_eq(metrics_get(bench.metrics, M_LOAD_RETRIES) - before, 2);
        cr_assert_eq(atomic_load(&task->progress.done_bytes),
                     atomic_load(&task->progress.total_bytes));
        load_task_free(task);
    }
    leave(&bench);
}

Test(load, io_errors_that_stay_fail_the_load_with_a_sentence)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;
    struct load_task *task;

    build(&bench, &plan);
    bench.options.retries = 1;
    atomic_store(&read_faults.nothing_cached, true);
    atomic_store(&read_faults.spare, 5);
    atomic_store(&read_faults.eio, 1000);
    task = load(&bench);
    cr_assert_eq(task->error, -EIO);
    cr_assert_null(task->model);
    cr_assert_not_null(strstr(task->fault.text, "cannot be read"), "%s", task->fault.text);
    cr_assert_eq(metrics_get(bench.metrics, M_LOADS_FAILED), 1);
    cr_assert_eq(metrics_get(bench.metrics, M_LOAD_RETRIES), 1);
    load_task_free(task);
    leave(&bench);
}

/* What happens to the file while its weights are packed. */
static const char *victim;
static void (*misfortune)(const char *path);
static const struct kernel_table *plain;
static struct kernel_table meddling;

static void pack_meddling(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows,
                          const void *rows)
{
    if (misfortune)
        misfortune(victim);
    misfortune = NULL;
    plain->pack(tensor, row_begin, n_rows, rows);
}

static void cut(const char *path)
{
    cr_assert_eq(truncate(path, 4096), 0);
}

static void vanish(const char *path)
{
    cr_assert_eq(unlink(path), 0);
}

static struct load_task *load_while(struct bench *bench, void (*what)(const char *path))
{
    plain = bench->options.kernels;
    meddling = *plain;
    meddling.pack = pack_meddling;
    bench->options.kernels = &meddling;
    victim = bench->path;
    misfortune = what;
    return load(bench);
}

Test(load, a_file_that_is_cut_off_meanwhile_fails_the_load)
{
    for (int uncached = 0; uncached < 2; uncached++) {
        struct model_plan plan = plan_of(PLAN_F32);
        struct bench bench;
        struct load_task *task;

        build(&bench, &plan);
        atomic_store(&read_faults.nothing_cached, uncached == 1);
        task = load_while(&bench, cut);
        cr_assert_eq(task->error, -EBADMSG);
        cr_assert_not_null(strstr(task->fault.text, "shorter"), "%s", task->fault.text);
        load_task_free(task);
        leave(&bench);
    }
}

Test(load, a_file_that_is_deleted_meanwhile_is_loaded_to_its_end)
{
    struct model_plan plan = plan_of(PLAN_F32);
    struct bench bench;
    struct load_task *task;

    build(&bench, &plan);
    task = load_while(&bench, vanish);
    cr_assert_eq(task->error, 0, "%s", task->fault.text);
    cr_assert_eq(task->model->arena.bytes, bench.expected->arena.bytes);
    load_task_free(task);
    leave(&bench);
}

Test(load, rows_that_come_from_several_tensors_are_put_together)
{
    /* Heads so small that the parts of q, k and v meet inside a group of rows. */
    struct model_plan plan = tiny_model_plan();
    struct bench bench;
    struct load_task *task;

    plan.dim = 40;
    plan.heads = 5;
    plan.kv_heads = 1;
    build(&bench, &plan);
    atomic_store(&read_faults.nothing_cached, true);
    task = load(&bench);
    expect_same(&bench, task, "fused");
    load_task_free(task);
    leave(&bench);
}

/* The highest resident size since it was last reset, bytes. */
static uint64_t peak_bytes(void)
{
    char line[256];
    unsigned long kib = 0;
    FILE *status = fopen("/proc/self/status", "re");

    while (status && fgets(line, sizeof(line), status))
        if (sscanf(line, "VmHWM: %lu", &kib) == 1)
            break;
    if (status)
        fclose(status);
    return (uint64_t)kib << 10;
}

static bool reset_peak(void)
{
    FILE *file = fopen("/proc/self/clear_refs", "we");
    bool ok = file && fputs("5", file) >= 0;

    return file && fclose(file) == 0 && ok;
}

/* VmHWM moves by pages counted in batches for each CPU, and huge pages round sizes up. */
#define PEAK_SLACK (64u << 20)

Test(load, the_peak_is_the_final_size_and_at_most_64_mib)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;
    struct load_task *task;
    uint64_t before, peak;

    plan.dim = 2048;
    plan.heads = 32;
    plan.kv_heads = 4;
    plan.ff = 5632;
    plan.layers = 3;
    build(&bench, &plan);
    bench.expected = model_free(bench.expected);
    if (!reset_peak())
        cr_skip_test("/proc/self/clear_refs cannot be written");
    before = peak_bytes();
    atomic_store(&read_faults.nothing_cached, true);
    task = load(&bench);
    peak = peak_bytes();
    cr_assert_eq(task->error, 0, "%s", task->fault.text);
    cr_assert(model_info(task->model)->weight_bytes > 100u << 20);
    cr_assert(peak - before <= model_info(task->model)->weight_bytes +
                                   model_info(task->model)->other_bytes + PEAK_SLACK,
              "%lu MiB more than before for %lu MiB of weights",
              (unsigned long)(peak - before) >> 20,
              (unsigned long)model_info(task->model)->weight_bytes >> 20);
    load_task_free(task);
    leave(&bench);
}

/* What comes after another model in its memory is not told from what comes into new memory: neither
 * by its weights, padding included, nor by what it computes. */
Test(load, memory_of_a_predecessor_changes_nothing)
{
    for (enum plan_type type = 0; type < PLAN_N_TYPES; type++) {
        struct model_plan plan = plan_of(type);
        struct load_task *first, *second = load_task_new(TASK_LOAD, NULL);
        struct load_task *release = load_task_new(TASK_FREE, NULL);
        struct bench bench;
        size_t bytes;

        plan.vocab += 3; /* rows in a group that is not full */
        build(&bench, &plan);
        first = load(&bench);
        bytes = first->model->arena.bytes;
        memset(first->model->arena.memory, 0xa5, bytes);
        release->model = TAKE_PTR(first->model);
        release->keep_bytes = SIZE_MAX;
        load_task_release(release);
        cr_assert_not_null(release->legacy);
        atomic_store(&second->legacy, load_task_take_legacy(release));
        second->path = strdup(bench.path);
        load_sync(&bench.options, second);
        expect_same(&bench, second, "recycled");
        expect_same_logits(bench.expected, second->model);
        cr_expect_null(second->legacy);
        cr_expect_eq(metrics_get(bench.metrics, M_LOAD_RECYCLED_BYTES),
                     bytes & ~(uint64_t)((2 << 20) - 1));
        load_task_free(release);
        load_task_free(first);
        load_task_free(second);
        leave(&bench);
    }
}

/* A load that ends early leaves what it has taken to nobody, and what it has not to its caller. */
Test(load, memory_of_a_predecessor_goes_with_a_load_that_fails)
{
    struct model_plan plan = plan_of(PLAN_Q8_0);
    struct bench bench;

    build(&bench, &plan);
    for (int begun = 0; begun < 2; begun++) {
        struct load_task *task = load_task_new(TASK_LOAD, NULL);
        struct arena arena;

        cr_assert_eq(arena_init(&arena, 4 << 20, true, NULL), 0);
        atomic_store(&task->legacy, arena_leave(&arena, SIZE_MAX));
        task->path = strdup(bench.path);
        if (begun)
            cr_assert_eq(load_task_begin(&bench.options, task), 0);
        load_task_conclude(&bench.options, task, -ECANCELED);
        cr_expect_eq(task->legacy == NULL, begun);
        cr_expect_eq(metrics_get(bench.metrics, M_LOAD_RECYCLED_BYTES), 0);
        load_task_free(task);
    }
    leave(&bench);
}

/* Mappings that the kernel keeps this flag for ("hg": huge pages, "nh": none). */
static int count_flag(const char *flag)
{
    char line[512], word[8];
    FILE *maps = fopen("/proc/self/smaps", "re");
    int n = 0;

    cr_assert_not_null(maps);
    snprintf(word, sizeof(word), " %s", flag);
    while (fgets(line, sizeof(line), maps))
        n += strncmp(line, "VmFlags:", 8) == 0 && strstr(line, word);
    fclose(maps);
    return n;
}

Test(load, memory_comes_in_small_pages_while_steps_run)
{
    struct engine_pulse pulse = {0};
    struct bench bench;
    struct model_plan plan = plan_of(PLAN_Q8_0);

    build(&bench, &plan);
    bench.options.pulse = &pulse;
    if (count_flag("hg") == 0)
        cr_skip_test("this kernel has no huge pages");
    for (int busy = 0; busy < 2; busy++) {
        struct load_task *task = load_task_new(TASK_LOAD, NULL);
        struct load_hand hand = {0};
        int none = count_flag("nh");

        atomic_store(&pulse.beat, busy ? 1 : 0); /* odd: a slice runs */
        task->path = strdup(bench.path);
        cr_assert_eq(load_task_begin(&bench.options, task), 0);
        cr_expect_eq(count_flag("nh"), none + busy);
        while (load_task_slice(&bench.options, task, &hand, &task->fault) > 0)
            ;
        load_hand_done(&hand);
        load_task_conclude(&bench.options, task, 0);
        expect_same(&bench, task, busy ? "in small pages" : "in huge pages");
        cr_expect_eq(count_flag("nh"), none, "the kernel is not to gather them later");
        load_task_free(task);
    }
    leave(&bench);
}
