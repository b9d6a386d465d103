/* The engine thread: what one request's failure, a model's warming, a cancel and a sudden end do to
 * everything else. The thread is a real one; where it must stand still for a look, a kernel of its
 * engine waits for the test. */
#include <poll.h>
#include <semaphore.h>
#include <stdlib.h>

#include "tests/support/engine_run.h"
#include "tests/support/gguf_make.h"

#include "daemon/engine/kv.h"
#include "daemon/serve/runner.h"
#include "lib/cleanup.h"

#define MOST_MODELS 2u
#define WAIT_MS     30000

/* The width of the model that is small, and of the one that warms beside it. */
#define SMALL_DIM 64u
#define LARGE_DIM 128u

struct world {
    struct kernel_table kernels;
    struct clock clock;
    struct metrics *metrics;
    struct runner *runner;
    uint8_t *bytes[MOST_MODELS];
    struct model *models[MOST_MODELS];
    struct runner_model *runner_models[MOST_MODELS];
    uint32_t n_models, n_warmed, n_removed, n_shrunk, n_ended, n_texts;
};

/* ---- where the engine thread is looked at ---- */

static void (*plain_norm)(const float *x, const float *weight, uint32_t n, float eps, float *y);

/* A gate within a step: the engine thread says that it is there and waits to go on. */
static sem_t at_gate, go_on;
static _Atomic bool gate_shut;

/* Steps of the small model when a layer of the large one began: the first and the last time. */
static const struct metrics *watched;
static _Atomic uint64_t steps_at_first, steps_at_last, n_large;

static void watching_norm(const float *x, const float *weight, uint32_t n, float eps, float *y)
{
    if (n == LARGE_DIM && watched) {
        uint64_t steps = metrics_get(watched, M_STEPS);
        if (atomic_fetch_add(&n_large, 1) == 0)
            atomic_store(&steps_at_first, steps);
        atomic_store(&steps_at_last, steps);
    }
    if (atomic_exchange(&gate_shut, false)) {
        sem_post(&at_gate);
        while (sem_wait(&go_on) < 0)
            ;
    }
    plain_norm(x, weight, n, eps, y);
}

/* From one step into the next: its kernels run many times in each. */
static void stop_in_next_step(const struct world *world)
{
    uint64_t steps = metrics_get(world->metrics, M_STEPS);

    do {
        atomic_store(&gate_shut, true);
        sem_post(&go_on);
        while (sem_wait(&at_gate) < 0)
            ;
    } while (metrics_get(world->metrics, M_STEPS) == steps);
}

/* ---- the world ---- */

static struct world *world_new(const struct runner_options *changes)
{
    static struct world the_world;
    struct world *world = &the_world;
    struct runner_options options = *changes;
    struct fault fault = {0};

    *world =
        (struct world){.kernels = *test_kernels("scalar"), .clock = {.now_us = clock_monotonic_us}};
    plain_norm = world->kernels.rms_norm;
    world->kernels.rms_norm = watching_norm;
    sem_init(&at_gate, 0, 0);
    sem_init(&go_on, 0, 0);
    cr_assert_eq(metrics_new(&world->metrics), 0);
    options.engine.kernels = &world->kernels;
    options.engine.threads = 1;
    if (options.engine.kv_budget_bytes == 0)
        options.engine.kv_budget_bytes = TEST_KV_BYTES;
    options.max_batch = 32;
    options.min_batch = MAX(options.min_batch, 1u);
    options.chunk_target_us = 20000;
    options.kv_per_uid_bytes = options.engine.kv_budget_bytes;
    options.park_timeout_us = 60000000;
    options.max_requests = 64;
    options.metrics = world->metrics;
    options.clock = &world->clock;
    cr_assert_eq(runner_new(&options, &world->runner, &fault), 0, "%s", fault.text);
    return world;
}

static struct runner_model *add_model(struct world *world, const struct model_plan *plan)
{
    struct runner_model **at = &world->runner_models[world->n_models];
    struct fault fault = {0};
    size_t len;

    cr_assert_lt(world->n_models, MOST_MODELS);
    cr_assert_eq(make_model_bytes(plan, &world->bytes[world->n_models], &len, &fault), 0, "%s",
                 fault.text);
    world->models[world->n_models] =
        test_model(&world->kernels, memory_source(world->bytes[world->n_models], len));
    cr_assert_eq(runner_add_model(world->runner, world->models[world->n_models], NULL, at), 0);
    world->n_models++;
    return *at;
}

/* What the engine thread has to say, waited for. */
static void take(struct world *world)
{
    struct pollfd pollfd = {.fd = outbox_fd(runner_outbox(world->runner)), .events = POLLIN};
    const struct outbox_batch *batch;

    cr_assert_eq(poll(&pollfd, 1, WAIT_MS), 1, "the engine thread says nothing");
    batch = outbox_take(runner_outbox(world->runner));
    for (size_t i = 0; i < batch->n_events; i++) {
        const struct outbox_event *event = &batch->events[i];
        struct request *request = event->subject;
        switch ((enum runner_event)event->kind) {
        case RUNNER_TEXT:
            world->n_texts++;
            if (stream_delivered(&request->stream, event->text_bytes, true))
                runner_unpark(world->runner, request);
            break;
        case RUNNER_ENDED: world->n_ended++; break;
        case RUNNER_ASLEEP: cr_assert_fail("nobody is away for so long"); break;
        case RUNNER_LATE: request->late++; break;
        case RUNNER_WARMED:
            cr_assert_null(runner_model_error(event->subject), "%s",
                           runner_model_error(event->subject));
            world->n_warmed++;
            break;
        case RUNNER_REMOVED: world->n_removed++; break;
        case RUNNER_SHRUNK: world->n_shrunk++; break;
        }
    }
}

static void wait_for(struct world *world, const uint32_t *n, uint32_t reached)
{
    while (*n < reached)
        take(world);
}

static struct runner_model *small_model(struct world *world, uint32_t context)
{
    struct model_plan plan = tiny_model_plan();
    struct runner_model *model;

    plan.context = context;
    model = add_model(world, &plan);
    wait_for(world, &world->n_warmed, world->n_models);
    return model;
}

static struct request *request_for(struct runner_model *model, uint32_t n_prompt,
                                   uint32_t max_tokens, uint64_t credit)
{
    struct request *request = request_new();

    cr_assert(request);
    request->ids = calloc(n_prompt, sizeof(*request->ids));
    cr_assert(request->ids);
    for (uint32_t i = 0; i < n_prompt; i++)
        request->ids[i] = (int32_t)(260 + i % 100);
    request->n_ids = request->n_prompt = request->ids_capacity = n_prompt;
    request->max_tokens = max_tokens;
    request->ignore_eos = true;
    request->params = (struct sampler_params){.top_p = 1, .repeat_penalty = 1};
    request->runner_model = model;
    stream_init(&request->stream, credit, 1u << 20, false, 0, NULL);
    return request;
}

static struct request *lend(struct world *world, struct request *request)
{
    cr_assert_eq(runner_submit(world->runner, request), 0);
    return request;
}

/* The engine thread stands in the middle of the request's first step when this returns. */
static struct request *lend_and_stop(struct world *world, struct request *request)
{
    atomic_store(&gate_shut, true);
    lend(world, request);
    while (sem_wait(&at_gate) < 0)
        ;
    return request;
}

/* Cancels the only one there was, if its end has not come by itself before. */
static void cancel_and_free(struct world *world, struct request *request)
{
    runner_cancel(world->runner, request, CODE_CANCELLED);
    wait_for(world, &world->n_ended, 1);
    while (request->messages_sent != request->messages_taken + request->late)
        take(world);
    request_free(request);
}

/* Ends the thread, whatever it is at. */
static void end_thread(struct world *world)
{
    world->runner = runner_free(world->runner);
    for (uint32_t i = 0; i < world->n_models; i++) {
        model_free(world->models[i]);
        free(world->bytes[i]);
    }
}

static void world_free(struct world *world)
{
    for (uint32_t i = 0; i < world->n_models; i++)
        cr_assert_eq(runner_remove_model(world->runner, world->runner_models[i]), 0);
    wait_for(world, &world->n_removed, world->n_models);
    for (uint32_t i = 0; i < world->n_models; i++)
        runner_model_free(world->runner_models[i]);
    end_thread(world);
    metrics_free(world->metrics);
}

/* ---- failures ---- */

/* Four requests share a step, and one has an id that the model does not: it fails, and the others
 * have what they would have had alone. */
Test(runner, a_row_that_fails_fails_alone)
{
    struct world *world =
        world_new(&(struct runner_options){.min_batch = 4, .max_delay_us = 10000000});
    struct runner_model *model = small_model(world, 128);
    struct request *requests[4], *bad;

    for (uint32_t i = 0; i < 4; i++)
        requests[i] = request_for(model, 5 + i, 12, 1u << 20);
    bad = requests[2];
    bad->ids[3] = 1000000;
    for (uint32_t i = 0; i < 4; i++)
        lend(world, requests[i]);
    wait_for(world, &world->n_ended, 4);
    cr_expect(bad->reason == END_ERROR && bad->code == CODE_INTERNAL, "reason %d, code %d",
              bad->reason, bad->code);
    cr_expect_eq(bad->n_ids, bad->n_prompt, "nothing was generated for it");
    for (uint32_t i = 0; i < 4; i++) {
        if (requests[i] == bad)
            continue;
        cr_expect_eq(requests[i]->reason, END_LENGTH, "request %u: %s", i, requests[i]->sentence);
        cr_expect_eq(requests[i]->n_ids, requests[i]->n_prompt + 12);
    }
    cr_expect_eq(metrics_get(world->metrics, M_STEPS), 12, "%lu steps",
                 metrics_get(world->metrics, M_STEPS));
    for (uint32_t i = 0; i < 4; i++)
        request_free(requests[i]);
    world_free(world);
}

/* ---- a sudden end ---- */

/* Whatever is lent when the thread ends (in a step, parked for its reader, waiting for memory, all
 * but delivered) has ended then, holds nothing and is the caller's. */
Test(runner, its_end_ends_what_is_lent)
{
    struct world *world = world_new(&(struct runner_options){.prefix_cache = true});
    struct runner_model *model = small_model(world, 4096);
    struct request *requests[] = {
        request_for(model, 40, 4000, 1u << 20), /* runs */
        request_for(model, 30, 4000, 3),        /* parked */
        request_for(model, 20, 2, 1),           /* computed, its text waits for credit */
        request_for(model, 10, 4000, 1u << 20), /* in the step in which the end comes */
        request_for(model, 10, 4000, 1u << 20), /* only just lent */
    };
    uint32_t n = ELEMENTSOF(requests);

    lend_and_stop(world, requests[0]);
    for (uint32_t i = 1; i + 2 < n; i++)
        lend(world, requests[i]);
    while (!atomic_load(&requests[1]->stream.parked) || !atomic_load(&requests[2]->stream.parked))
        stop_in_next_step(world);
    for (uint32_t i = n - 2; i < n; i++)
        lend(world, requests[i]);
    stop_in_next_step(world);
    sem_post(&go_on);
    end_thread(world);
    for (uint32_t i = 0; i < n; i++) {
        cr_expect(requests[i]->ended && requests[i]->handed_back, "request %u has not ended", i);
        cr_expect(requests[i]->reason == END_ERROR && requests[i]->code == CODE_SHUTTING_DOWN,
                  "request %u: reason %d", i, requests[i]->reason);
        cr_expect_null(requests[i]->sequence);
        request_free(requests[i]);
    }
    metrics_free(world->metrics);
}

/* The same with a model that is warming, and one that is to be removed. */
Test(runner, it_ends_while_models_come_and_go)
{
    struct world *world = world_new(&(struct runner_options){0});
    struct model_plan plan = tiny_model_plan();
    struct runner_model *model = small_model(world, 4096);
    struct request *request = lend_and_stop(world, request_for(model, 10, 4000, 1u << 20));

    plan.dim = LARGE_DIM;
    plan.layers = 8;
    add_model(world, &plan);
    cr_assert_eq(runner_remove_model(world->runner, model), 0);
    stop_in_next_step(world);
    sem_post(&go_on);
    end_thread(world);
    cr_expect_eq(request->code, CODE_SHUTTING_DOWN);
    request_free(request);
    metrics_free(world->metrics);
}

/* ---- warming ---- */

/* While a large model has its first step, the steps of a small one go on between its slices. */
Test(runner, a_model_that_warms_stops_nobody)
{
    struct world *world = world_new(&(struct runner_options){0});
    struct model_plan plan = tiny_model_plan();
    struct runner_model *small = small_model(world, 8192);
    struct request *request = lend_and_stop(world, request_for(small, 5, 8000, 1u << 20));

    watched = world->metrics;
    plan.dim = LARGE_DIM;
    plan.layers = 12;
    add_model(world, &plan);
    sem_post(&go_on);
    wait_for(world, &world->n_warmed, 2);
    cr_expect_eq(n_large, 12 * 2 + 1, "%lu norms", n_large);
    cr_expect_gt(steps_at_last, steps_at_first, "nothing else ran while the model warmed");
    cancel_and_free(world, request);
    world_free(world);
}

/* A cancel is seen, too, and a model may be let go again before its first step is over. */
Test(runner, a_model_that_warms_can_be_let_go)
{
    struct world *world = world_new(&(struct runner_options){0});
    struct model_plan plan = tiny_model_plan();
    struct request *request =
        lend_and_stop(world, request_for(small_model(world, 8192), 5, 8000, 1u << 20));

    plan.layers = 12;
    cr_assert_eq(runner_remove_model(world->runner, add_model(world, &plan)), 0);
    runner_cancel(world->runner, request, CODE_CANCELLED);
    sem_post(&go_on);
    wait_for(world, &world->n_ended, 1);
    wait_for(world, &world->n_removed, 1);
    cr_expect_eq(world->n_warmed, 2, "it says first how its warming went");
    request_free(request);
    runner_model_free(world->runner_models[1]);
    cr_assert_eq(runner_remove_model(world->runner, world->runner_models[0]), 0);
    wait_for(world, &world->n_removed, 2);
    runner_model_free(world->runner_models[0]);
    end_thread(world);
    metrics_free(world->metrics);
}

/* ---- scratch ---- */

/* One that has work again by the time it is asked keeps its scratch; the asker is answered. */
Test(runner, a_model_at_work_is_not_shrunk)
{
    struct world *world = world_new(&(struct runner_options){0});
    struct runner_model *model = small_model(world, 128);
    struct request *request = lend_and_stop(world, request_for(model, 20, 30, 1u << 20));

    runner_shrink_model(world->runner, model, 0);
    stop_in_next_step(world);
    cr_expect(request->job.chunk && !request->ended);
    sem_post(&go_on);
    wait_for(world, &world->n_ended, 1);
    cr_expect_eq(request->reason, END_LENGTH);
    runner_shrink_model(world->runner, model, 0);
    wait_for(world, &world->n_shrunk, 2);
    request_free(request);
    world_free(world);
}

/* ---- cancels ---- */

/* A request is cancelled while it is in a step: the next step is without it, and has one in its
 * place that had no KV memory while it held its own. */
Test(runner, a_cancel_in_a_step_frees_its_memory_before_the_next)
{
    struct world *world =
        world_new(&(struct runner_options){.engine.kv_budget_bytes = KV_SLAB_BYTES});
    struct model_plan plan = tiny_model_plan();
    struct runner_model *model;
    struct request *first, *second, *waiting;
    uint64_t rows, steps;

    plan.dim = 512; /* 31 tiles of 16 tokens in all */
    plan.kv_heads = plan.heads;
    plan.type = PLAN_Q8_0;
    plan.context = 496;
    model = add_model(world, &plan);
    wait_for(world, &world->n_warmed, 1);
    first = lend_and_stop(world, request_for(model, 320, 100, 1u << 20));
    second = lend(world, request_for(model, 20, 100, 1u << 20));
    while (!first->job.chunk || !second->job.chunk || first->job.fed < 320)
        stop_in_next_step(world);
    waiting = lend(world, request_for(model, 300, 2, 1u << 20));
    stop_in_next_step(world);
    rows = metrics_get(world->metrics, M_STEP_ROWS);
    steps = metrics_get(world->metrics, M_STEPS);
    cr_expect(first->job.chunk && second->job.chunk && !waiting->job.admitted);
    runner_cancel(world->runner, first, CODE_CANCELLED);
    stop_in_next_step(world);
    cr_expect_eq(metrics_get(world->metrics, M_STEPS), steps + 1);
    cr_expect_eq(metrics_get(world->metrics, M_STEP_ROWS), rows + 2);
    cr_expect(!first->job.chunk && second->job.chunk && waiting->job.chunk);
    cr_expect_null(first->sequence);
    cr_expect(first->ended && first->reason == END_CANCELLED);
    sem_post(&go_on);
    wait_for(world, &world->n_ended, 3);
    cr_expect_eq(metrics_get(world->metrics, M_PREEMPTIONS), 0);
    request_free(first);
    request_free(second);
    request_free(waiting);
    world_free(world);
}
