/* KV memory under pressure, under ThreadSanitizer: two models share a budget of a few sequences;
 * readers of three users grant credit in bits, stay away, come back and cancel at odd moments, so
 * that sequences are parked, preempted, put to sleep and lent again. Each request ends exactly
 * once, what it generated is what it generates alone, and all memory comes back. */
#include <assert.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/builtin.h"
#include "daemon/serve/runner.h"
#include "lib/cleanup.h"

#define N_REQUESTS 120u
#define AT_ONCE    64u
#define N_KINDS    12u
#define N_MODELS   2u
#define MOST_IDS   240u

static const struct clock real_clock = {.now_us = clock_monotonic_us};

/* What a request's number says of it, and the ids it has at its end. */
struct kind {
    uint32_t n_prompt, max_tokens;
    int32_t ids[MOST_IDS];
};

struct world {
    struct runner *runner;
    struct model *models[N_MODELS];
    struct runner_model *runner_models[N_MODELS];
    struct metrics *metrics;
    struct kind kinds[N_KINDS];
    struct request *live[AT_ONCE];
    bool asleep[AT_ONCE]; /* the live one is this thread's */
    uint32_t n_live, n_ended, n_slept, n_warmed, n_removed;
    unsigned random;
};

/* Evenly distributed below `bound`. */
static unsigned next_random(struct world *world, unsigned bound)
{
    world->random = world->random * 1103515245u + 12345u;
    return world->random / 65536 % bound;
}

static uint32_t place_of(const struct world *world, const struct request *request)
{
    uint32_t at = 0;

    while (world->live[at] != request) {
        at++;
        assert(at < world->n_live); /* it ends once */
    }
    return at;
}

static void release(struct request *request)
{
    request->over = true;
    if (request->messages_sent == request->messages_taken + request->late)
        request_free(request);
}

/* The first of a kind says what all others must be. */
static void check_ids(struct world *world, const struct request *request)
{
    struct kind *kind = &world->kinds[request->params.seed % N_KINDS];

    assert(request->n_ids == kind->n_prompt + kind->max_tokens);
    if (kind->ids[0] < 0)
        memcpy(kind->ids, request->ids, request->n_ids * sizeof(*kind->ids));
    assert(memcmp(kind->ids, request->ids, request->n_ids * sizeof(*kind->ids)) == 0);
}

static void ended(struct world *world, struct request *request)
{
    uint32_t at = place_of(world, request);

    assert(request->reason == END_CANCELLED || request->reason == END_LENGTH);
    if (request->reason == END_LENGTH)
        check_ids(world, request);
    world->n_live--;
    world->live[at] = world->live[world->n_live];
    world->asleep[at] = world->asleep[world->n_live];
    world->n_ended++;
    release(request);
}

static void submit(struct world *world, uint32_t which, uint64_t credit)
{
    struct request *request = request_new();
    const struct kind *kind = &world->kinds[which];

    request->ids = malloc(MOST_IDS * sizeof(int32_t));
    for (uint32_t i = 0; i < kind->n_prompt; i++)
        request->ids[i] = (int32_t)(260 + (i * 31 + which) % 700);
    request->n_ids = request->n_prompt = kind->n_prompt;
    request->ids_capacity = MOST_IDS;
    request->max_tokens = kind->max_tokens;
    request->ignore_eos = true;
    request->params = (struct sampler_params){
        .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .repeat_penalty = 1, .seed = which};
    request->job.uid = which % 3;
    request->runner_model = world->runner_models[which % N_MODELS];
    stream_init(&request->stream, credit, 1u << 16, false, 0, NULL);
    assert(runner_submit(world->runner, request) == 0);
    world->asleep[world->n_live] = false;
    world->live[world->n_live++] = request;
}

/* What the service does with one that is asleep and may have room. */
static void stir(struct world *world, struct request *request)
{
    const char *text;
    size_t n;

    while ((n = stream_peek(&request->stream, &text)) > 0) {
        stream_consume(&request->stream, n);
        stream_delivered(&request->stream, n, true);
    }
    if (request->ended && stream_drained(&request->stream)) {
        ended(world, request);
    } else if (stream_may_run(&request->stream)) {
        world->asleep[place_of(world, request)] = false;
        assert(runner_submit(world->runner, request) == 0);
    }
}

static void on_asleep(struct world *world, struct request *request)
{
    world->asleep[place_of(world, request)] = true;
    world->n_slept++;
    if (request->cancelled) {
        request->reason = END_CANCELLED;
        ended(world, request);
    } else if (!atomic_load(&request->stream.parked)) {
        stir(world, request);
    }
}

static void take(struct world *world, int wait_ms)
{
    struct pollfd pollfd = {.fd = outbox_fd(runner_outbox(world->runner)), .events = POLLIN};
    const struct outbox_batch *batch;

    if (poll(&pollfd, 1, wait_ms) == 0) {
        assert(wait_ms < 30000);
        return;
    }
    batch = outbox_take(runner_outbox(world->runner));
    for (size_t i = 0; i < batch->n_events; i++) {
        const struct outbox_event *event = &batch->events[i];
        struct request *request = event->subject;
        switch ((enum runner_event)event->kind) {
        case RUNNER_TEXT:
            if (stream_delivered(&request->stream, event->text_bytes, true))
                runner_unpark(world->runner, request);
            break;
        case RUNNER_ENDED: ended(world, request); break;
        case RUNNER_ASLEEP: on_asleep(world, request); break;
        case RUNNER_LATE:
            request->late++;
            if (request->over)
                release(request);
            break;
        case RUNNER_WARMED: world->n_warmed++; break;
        case RUNNER_REMOVED: world->n_removed++; break;
        }
    }
}

/* A reader does something, or comes back, or goes. */
static void disturb(struct world *world)
{
    uint32_t at = next_random(world, MAX(world->n_live, 1u));
    struct request *request = world->live[at];

    if (world->n_live == 0)
        return;
    if (next_random(world, 60) == 0 && !request->cancelled) {
        request->cancelled = true;
        if (world->asleep[at]) {
            request->reason = END_CANCELLED;
            ended(world, request);
        } else {
            runner_cancel(world->runner, request, CODE_CANCELLED);
        }
    } else if ((atomic_load(&request->stream.parked) || next_random(world, 8) == 0) &&
               stream_grant(&request->stream, 1 + next_random(world, 60))) {
        if (world->asleep[at])
            stir(world, request);
        else
            runner_unpark(world->runner, request);
    }
}

static void make_kinds(struct world *world)
{
    for (uint32_t i = 0; i < N_KINDS; i++) {
        world->kinds[i].n_prompt = 5 + i * 7;
        world->kinds[i].max_tokens = 150 - i * 6;
        world->kinds[i].ids[0] = -1;
    }
    /* Alone, one after the other. */
    for (uint32_t i = 0; i < N_KINDS; i++) {
        submit(world, i, 1u << 20);
        while (world->n_live > 0)
            take(world, 30000);
    }
    assert(metrics_get(world->metrics, M_PREEMPTIONS) == 0);
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

static void begin(struct world *world)
{
    struct runner_options options = {.max_batch = 48,
                                     .min_batch = 1,
                                     .chunk_target_us = 20000,
                                     .kv_per_uid_bytes = 1u << 20,
                                     .park_timeout_us = 1000,
                                     .prefix_cache = true,
                                     .max_requests = N_REQUESTS,
                                     .clock = &real_clock};

    assert(metrics_new(&world->metrics) == 0);
    assert(kernels_choose(NULL, &options.engine.kernels, NULL) == 0);
    options.engine.threads = 2;
    options.engine.kv_budget_bytes = 4u << 20; /* a slab for each model */
    options.metrics = world->metrics;
    assert(runner_new(&options, &world->runner, NULL) == 0);
    for (uint32_t i = 0; i < N_MODELS; i++) {
        world->models[i] = load_builtin(options.engine.kernels);
        assert(runner_add_model(world->runner, world->models[i], NULL, &world->runner_models[i]) ==
               0);
    }
    while (world->n_warmed < N_MODELS)
        take(world, 30000);
}

static void finish(struct world *world)
{
    for (uint32_t i = 0; i < N_MODELS; i++)
        assert(runner_remove_model(world->runner, world->runner_models[i]) == 0);
    while (world->n_removed < N_MODELS)
        take(world, 30000);
    for (uint32_t i = 0; i < N_MODELS; i++)
        runner_model_free(world->runner_models[i]);
    runner_free(world->runner); /* which asserts that no sequence and no page is left */
    for (uint32_t i = 0; i < N_MODELS; i++)
        model_free(world->models[i]);
}

int main(void)
{
    static struct world world = {.random = 7};
    uint32_t n = 0;

    begin(&world);
    make_kinds(&world);
    while (n < N_REQUESTS || world.n_live > 0) {
        while (n < N_REQUESTS && world.n_live < AT_ONCE) {
            submit(&world, next_random(&world, N_KINDS), next_random(&world, 2) ? 1u << 20 : 20);
            n++;
        }
        disturb(&world);
        take(&world, 1);
    }
    finish(&world);
    assert(world.n_ended == N_REQUESTS + N_KINDS);
    assert(world.n_slept > 0 && metrics_get(world.metrics, M_PREEMPTIONS) > 0);
    printf("%u requests; %u slept, %lu gave way, %lu tokens computed again\n", world.n_ended,
           world.n_slept, metrics_get(world.metrics, M_PREEMPTIONS),
           metrics_get(world.metrics, M_RECOMPUTED_TOKENS));
    metrics_free(world.metrics);
    return 0;
}
