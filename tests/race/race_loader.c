/* The loader under ThreadSanitizer: loads of every priority that are promoted, shared, cancelled
 * and abandoned at odd moments, beside an engine that works now and then. Each task must come back
 * exactly once, with a model or with a reason. */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/async_loader.h"
#include "daemon/model/builtin.h"
#include "daemon/queue.h"
#include "lib/cleanup.h"

#define N_TASKS 300u
#define AT_ONCE 12u

static const struct clock real_clock = {.now_us = clock_monotonic_us};

struct world {
    struct loader *loader;
    struct queue *done; /* as the registry has it */
    struct load_task *live[AT_ONCE];
    struct model *idle; /* loaded, and next to be released */
    uint32_t n_live, n_back, n_loaded, n_abandoned;
    struct engine_pulse pulse;
    _Atomic bool over;
    unsigned random;
};

static unsigned next_random(struct world *world, unsigned bound)
{
    world->random = world->random * 1103515245u + 12345u;
    return world->random / 65536 % bound;
}

static void on_done(void *userdata, struct load_task *task)
{
    struct world *world = userdata;
    struct message message = {.subject = task};

    if (queue_push(world->done, &message) < 0)
        abort();
}

static void nothing(struct load_task *task)
{
    (void)task;
}

/* An engine that computes for a while and rests for a while. */
static void *engine_main(void *userdata)
{
    struct world *world = userdata;

    for (unsigned i = 0; !atomic_load(&world->over); i++) {
        pulse_beat(&world->pulse);
        usleep(i % 8 ? 200 : 5000);
    }
    return NULL;
}

/* What a larger model than the built-in one leaves. */
static struct arena_legacy *leave_something(void)
{
    struct arena arena;

    if (arena_init(&arena, 4u << 20, false, NULL) < 0)
        abort();
    memset(arena.memory, 0xa5, arena.bytes);
    return arena_leave(&arena, SIZE_MAX);
}

static struct load_task *new_task(struct world *world)
{
    static const enum task_kind kinds[] = {TASK_LOAD, TASK_LOAD, TASK_LOAD, TASK_CALL, TASK_FREE};
    struct load_task *task = load_task_new(kinds[next_random(world, ELEMENTSOF(kinds))], NULL);

    assert(task);
    task->priority = next_random(world, _LOAD_PRIORITY_MAX);
    task->memory = builtin_bytes();
    task->memory_bytes = builtin_size();
    task->rank = (int32_t)next_random(world, 3);
    task->uid = next_random(world, 3);
    task->own = task->kind == TASK_LOAD && next_random(world, 8) == 0;
    task->call = nothing;
    if (task->kind == TASK_FREE)
        task->model = TAKE_PTR(world->idle);
    if (task->kind != TASK_CALL && next_random(world, 2) == 0)
        atomic_store(&task->legacy, leave_something());
    return task;
}

/* What the reactor may do to a task that has not come back. */
static void meddle(struct world *world, struct load_task *task)
{
    switch (next_random(world, 12)) {
    case 0: loader_cancel(world->loader, task); break;
    case 1:
        if (task->kind == TASK_LOAD && world->n_abandoned < LOADER_MAX_ABANDONED) {
            loader_abandon(world->loader, task);
            world->n_abandoned++;
        }
        break;
    case 2: loader_share(world->loader, task); break;
    case 6:
        if (task->kind == TASK_LOAD)
            arena_legacy_free(load_task_take_legacy(task));
        break;
    case 3:
    case 4:
    case 5:
        if (task->kind == TASK_LOAD && !task->own)
            loader_promote(world->loader, task, next_random(world, 2));
        break;
    default: usleep(next_random(world, 2000)); break;
    }
}

static void take_back(struct world *world)
{
    const struct message *messages;
    size_t n = queue_take(world->done, &messages);

    queue_clear_wakeup(world->done);
    for (size_t i = 0; i < n; i++) {
        struct load_task *task = messages[i].subject;
        uint32_t at = 0;
        while (world->live[at] != task)
            at++;
        assert(at < world->n_live);
        world->live[at] = world->live[--world->n_live];
        assert(task->kind != TASK_LOAD || (task->error == 0) == (task->model != NULL));
        assert(task->error == 0 || task->error == -ECANCELED);
        world->n_loaded += task->model != NULL;
        world->n_back++;
        if (!world->idle)
            world->idle = TAKE_PTR(task->model);
        load_task_free(task);
    }
}

int main(void)
{
    struct world world = {.random = 42};
    struct metrics *metrics = NULL;
    struct loader_options options = {.max_concurrent = 2,
                                     .per_uid = 1,
                                     .clock = &real_clock,
                                     .pulse = &world.pulse,
                                     .done = on_done,
                                     .userdata = &world};
    pthread_t engine;
    uint32_t submitted = 0;

    assert(metrics_new(&metrics) == 0);
    options.metrics = metrics;
    assert(kernels_choose(NULL, &options.kernels, NULL) == 0);
    assert(queue_new(N_TASKS, &world.done) == 0);
    assert(loader_new(&options, &world.loader, NULL) == 0);
    assert(pthread_create(&engine, NULL, engine_main, &world) == 0);
    while (world.n_back < N_TASKS) {
        if (submitted < N_TASKS && world.n_live < AT_ONCE) {
            struct load_task *task = new_task(&world);
            world.live[world.n_live++] = task;
            submitted++;
            loader_submit(world.loader, task);
        } else if (world.n_live > 0 && submitted < N_TASKS) {
            meddle(&world, world.live[next_random(&world, world.n_live)]);
        } else {
            usleep(1000);
        }
        take_back(&world);
    }
    assert(!loader_free(world.loader));
    atomic_store(&world.over, true);
    pthread_join(engine, NULL);
    model_free(world.idle);
    queue_free(world.done);
    metrics_free(metrics);
    printf("%u tasks, %u loaded, %u abandoned\n", world.n_back, world.n_loaded, world.n_abandoned);
    return 0;
}
