/* The engine thread, the outbox, streams and the loader under ThreadSanitizer: requests that are
 * submitted, granted credit, cancelled and left alone at odd moments, beside loads that come and
 * are cancelled. Each request must end exactly once, and all KV memory must come back. */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/async_loader.h"
#include "daemon/model/builtin.h"
#include "daemon/serve/runner.h"
#include "lib/cleanup.h"

#define N_REQUESTS 400u
#define AT_ONCE    48u
#define N_LOADS    12u
#define TOKENS     12u

static const struct clock real_clock = {.now_us = clock_monotonic_us};

struct world {
    struct runner *runner;
    struct runner_model *model;
    struct metrics *metrics;
    struct request *live[AT_ONCE];
    uint32_t n_live, n_ended, n_cancelled;
    bool warmed, removed;
    struct load_task *loads[N_LOADS]; /* freed at the end: they may be cancelled at any moment */
    _Atomic uint32_t loads_done;
    unsigned random;
};

static void on_load_done(void *userdata, struct load_task *task)
{
    struct world *world = userdata;

    assert(task->error == 0 || task->error == -ECANCELED);
    assert((task->error == 0) == (task->model != NULL));
    atomic_fetch_add(&world->loads_done, 1);
}

/* Evenly distributed below `bound`. */
static unsigned next_random(struct world *world, unsigned bound)
{
    world->random = world->random * 1103515245u + 12345u;
    return world->random / 65536 % bound;
}

static void cancel(struct world *world, struct request *request)
{
    if (request->cancelled)
        return;
    request->cancelled = true;
    runner_cancel(world->runner, request, CODE_CANCELLED);
    world->n_cancelled++;
}

static void submit(struct world *world)
{
    struct request *request = request_new();
    uint32_t n = 1 + next_random(world, 40);

    assert(request);
    request->ids = malloc(n * sizeof(int32_t));
    for (uint32_t i = 0; i < n; i++)
        request->ids[i] = (int32_t)(260 + next_random(world, 700));
    request->n_ids = request->n_prompt = request->ids_capacity = n;
    request->max_tokens = TOKENS;
    request->ignore_eos = true;
    request->params = (struct sampler_params){
        .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .repeat_penalty = 1, .seed = n};
    request->job.uid = next_random(world, 3);
    request->runner_model = world->model;
    /* Some have credit for all, some for a little, some for nothing at first. */
    stream_init(&request->stream, next_random(world, 4) ? 1u << 20 : 3, 1u << 16, false, 0, NULL);
    assert(runner_submit(world->runner, request) == 0);
    world->live[world->n_live++] = request;
    if (next_random(world, 8) == 0)
        cancel(world, request);
    else if (stream_grant(&request->stream, 1u << 20))
        runner_unpark(world->runner, request);
}

/* Frees it once all messages about it are answered. */
static void release(struct request *request)
{
    request->over = true;
    if (request->messages_sent == request->messages_taken + request->late)
        request_free(request);
}

static void ended(struct world *world, struct request *request)
{
    assert(request->handed_back);
    assert(request->reason == END_CANCELLED || request->reason == END_LENGTH);
    if (request->reason == END_LENGTH)
        assert(request->n_ids == request->n_prompt + TOKENS);
    for (uint32_t i = 0;; i++) {
        assert(i < world->n_live); /* it ends once */
        if (world->live[i] != request)
            continue;
        world->live[i] = world->live[--world->n_live];
        break;
    }
    world->n_ended++;
    release(request);
}

static void take(struct world *world)
{
    struct pollfd pollfd = {.fd = outbox_fd(runner_outbox(world->runner)), .events = POLLIN};
    const struct outbox_batch *batch;

    assert(poll(&pollfd, 1, 30000) > 0);
    batch = outbox_take(runner_outbox(world->runner));
    for (size_t i = 0; i < batch->n_events; i++) {
        const struct outbox_event *event = &batch->events[i];
        struct request *request = event->subject;
        switch ((enum runner_event)event->kind) {
        case RUNNER_TEXT:
            if (stream_delivered(&request->stream, event->text_bytes, true))
                runner_unpark(world->runner, request);
            if (stream_grant(&request->stream, 1))
                runner_unpark(world->runner, request);
            break;
        case RUNNER_ENDED: ended(world, request); break;
        case RUNNER_LATE:
            request->late++;
            if (request->over)
                release(request);
            break;
        case RUNNER_ASLEEP: assert(false); break;
        case RUNNER_WARMED:
            assert(!runner_model_error(event->subject));
            world->warmed = true;
            break;
        case RUNNER_REMOVED: world->removed = true; break;
        }
    }
}

/* Whatever may happen to a live request or load at any moment. */
static void disturb(struct world *world, struct loader *loader)
{
    struct load_task *load = world->loads[next_random(world, N_LOADS)];
    struct request *request = world->n_live ? world->live[next_random(world, world->n_live)] : NULL;

    if (request && next_random(world, 8) == 0)
        cancel(world, request);
    else if (request && stream_grant(&request->stream, 1))
        runner_unpark(world->runner, request);
    if (next_random(world, 4) == 0)
        loader_cancel(loader, load);
    else
        loader_promote(loader, load, next_random(world, _LOAD_PRIORITY_MAX));
}

static struct model *load_builtin(const struct kernel_table *kernels)
{
    struct gguf_source source = {.fd = -1, .memory = builtin_bytes(), .size = builtin_size()};
    struct model_load_options options = {.kernels = kernels};
    struct model *model = NULL;
    int r = model_load(&source, &options, NULL, &model, NULL);

    assert(r == 0);
    return model;
}

static void submit_loads(struct loader *loader, struct world *world)
{
    for (uint32_t i = 0; i < N_LOADS; i++) {
        struct load_task *task = load_task_new(TASK_LOAD, NULL);
        task->priority = i % _LOAD_PRIORITY_MAX;
        task->memory = builtin_bytes();
        task->memory_bytes = builtin_size();
        world->loads[i] = task;
        loader_submit(loader, task);
    }
}

int main(void)
{
    struct world world = {.random = 1};
    struct runner_options options = {.max_batch = 16,
                                     .min_batch = 1,
                                     .chunk_target_us = 20000,
                                     .max_requests = N_REQUESTS,
                                     .clock = &real_clock};
    struct loader_options loading = {
        .max_concurrent = 2, .clock = &real_clock, .done = on_load_done, .userdata = &world};
    struct loader *loader;
    struct model *model;
    uint32_t n_loaded = 0;

    assert(metrics_new(&world.metrics) == 0);
    assert(kernels_choose(NULL, &options.engine.kernels, NULL) == 0);
    options.engine.threads = 2;
    options.engine.kv_budget_bytes = 8u << 20;
    options.metrics = loading.metrics = world.metrics;
    loading.kernels = options.engine.kernels;
    assert(runner_new(&options, &world.runner, NULL) == 0);
    assert(loader_new(&loading, &loader, NULL) == 0);
    model = load_builtin(options.engine.kernels);
    assert(runner_add_model(world.runner, model, NULL, &world.model) == 0);
    while (!world.warmed)
        take(&world);
    submit_loads(loader, &world);
    for (uint32_t n = 0; n < N_REQUESTS || world.n_live > 0;) {
        while (n < N_REQUESTS && world.n_live < AT_ONCE) {
            submit(&world);
            n++;
        }
        disturb(&world, loader);
        take(&world);
    }
    assert(world.n_ended == N_REQUESTS);
    assert(runner_remove_model(world.runner, world.model) == 0);
    while (!world.removed)
        take(&world);
    runner_model_free(world.model);
    loader_free(loader);
    assert(atomic_load(&world.loads_done) == N_LOADS);
    for (uint32_t i = 0; i < N_LOADS; i++) {
        n_loaded += world.loads[i]->error == 0;
        load_task_free(world.loads[i]);
    }
    runner_free(world.runner);
    model_free(model);
    metrics_free(world.metrics);
    printf("%u requests, %u cancelled; %u loads, %u loaded\n", world.n_ended, world.n_cancelled,
           N_LOADS, n_loaded);
    return 0;
}
