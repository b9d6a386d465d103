/* The async loader: who runs, in what order, on which thread, and how a load ends. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/model/async_loader.h"
#include "daemon/model/builtin.h"
#include "lib/cleanup.h"
#include "tests/support/gate.h"
#include "tests/support/gguf_make.h"

#define WAIT_MS 20000
#define MANY    96

static const struct clock real_clock = {.now_us = clock_monotonic_us};

/* ---- a world with a loader in it ---- */

struct world {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct load_task *begun[MANY], *done[MANY];
    size_t n_begun, n_done;
    struct loader_options options;
    struct metrics *metrics;
    struct loader *loader;
    struct gate *begin_gate; /* where each task waits when it has begun; NULL: nowhere */
};

static void on_begun(void *userdata, struct load_task *task)
{
    struct world *world = userdata;

    pthread_mutex_lock(&world->lock);
    world->begun[world->n_begun++] = task;
    pthread_mutex_unlock(&world->lock);
    if (world->begin_gate)
        pass_gate(world->begin_gate);
}

static void on_done(void *userdata, struct load_task *task)
{
    struct world *world = userdata;

    pthread_mutex_lock(&world->lock);
    world->done[world->n_done++] = task;
    pthread_cond_signal(&world->more);
    pthread_mutex_unlock(&world->lock);
}

static void wait_done(struct world *world, size_t n)
{
    pthread_mutex_lock(&world->lock);
    while (world->n_done < n)
        pthread_cond_wait(&world->more, &world->lock);
    pthread_mutex_unlock(&world->lock);
}

static void wait_begun(struct world *world, size_t n)
{
    size_t begun = 0;

    for (int ms = 0; ms < WAIT_MS && begun < n; ms++) {
        pthread_mutex_lock(&world->lock);
        begun = world->n_begun;
        pthread_mutex_unlock(&world->lock);
        usleep(1000);
    }
    cr_assert(begun >= n, "%zu tasks begun, %zu wanted", begun, n);
}

/* Packing as ever, but the n-th piece of all and those after it wait at the gate; and which threads
 * packed is remembered. */
static struct gate packing_gate = GATE_SHUT;
static struct kernel_table gated;
static const struct kernel_table *plain;
static _Atomic int pieces_before_gate, n_packed, n_packed_idle;

static void pack_gated(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows)
{
    if (atomic_fetch_sub(&pieces_before_gate, 1) <= 0)
        pass_gate(&packing_gate);
    plain->pack(tensor, row_begin, n_rows, rows);
    atomic_fetch_add(&n_packed, 1);
    atomic_fetch_add(&n_packed_idle, sched_getscheduler(0) == SCHED_IDLE);
}

static struct world *build(uint32_t max_concurrent, int pieces)
{
    struct world *world = calloc(1, sizeof(*world));

    pthread_mutex_init(&world->lock, NULL);
    pthread_cond_init(&world->more, NULL);
    cr_assert_eq(metrics_new(&world->metrics), 0);
    cr_assert_eq(kernels_choose("scalar", &plain, NULL), 0);
    gated = *plain;
    gated.pack = pack_gated;
    atomic_store(&pieces_before_gate, pieces);
    world->options = (struct loader_options){.kernels = &gated,
                                             .max_concurrent = max_concurrent,
                                             .metrics = world->metrics,
                                             .clock = &real_clock,
                                             .begun = on_begun,
                                             .done = on_done,
                                             .userdata = world};
    return world;
}

static struct world *start(struct world *world)
{
    cr_assert_eq(loader_new(&world->options, &world->loader, NULL), 0);
    return world;
}

static void leave(struct world *world)
{
    cr_assert_null(loader_free(world->loader), "a thread is stuck");
    for (size_t i = 0; i < world->n_done; i++)
        load_task_free(world->done[i]);
    metrics_free(world->metrics);
    free(world);
}

static struct load_task *builtin_task(enum load_priority priority)
{
    struct load_task *task = load_task_new(TASK_LOAD, NULL);

    task->priority = priority;
    task->memory = builtin_bytes();
    task->memory_bytes = builtin_size();
    return task;
}

static struct load_task *file_task(const char *path)
{
    struct load_task *task = load_task_new(TASK_LOAD, NULL);

    task->path = strdup(path);
    return task;
}

static void stand_at_gate(struct load_task *task)
{
    pass_gate(task->subject);
}

static struct load_task *gate_task(struct gate *gate)
{
    struct load_task *task = load_task_new(TASK_CALL, gate);

    task->call = stand_at_gate;
    return task;
}

/* Keeps all threads of normal priority busy; they are at the gate when it returns. How many. */
static uint32_t block_threads(struct world *world, struct gate *gate)
{
    uint32_t n = MAX(world->options.max_concurrent, LOADER_HANDS);

    for (uint32_t i = 0; i < n; i++)
        loader_submit(world->loader, gate_task(gate));
    wait_at_gate(gate, (int)n);
    return n;
}

static uint64_t metric(const struct world *world, enum metric_id id)
{
    return metrics_get(world->metrics, id);
}

#define ALL_OPEN 1000000 /* no piece waits */

/* ---- loads ---- */

Test(async_loader, loads_a_model_and_tells_its_progress)
{
    struct world *world = start(build(1, ALL_OPEN));
    struct load_task *task = builtin_task(LOAD_WARM);

    loader_submit(world->loader, task);
    wait_done(world, 1);
    cr_assert_eq(task->error, 0, "%s", task->fault.text);
    cr_assert_not_null(task->model);
    cr_assert(atomic_load(&task->progress.total_bytes) > 0);
    cr_assert_eq(atomic_load(&task->progress.done_bytes), atomic_load(&task->progress.total_bytes));
    cr_assert_eq(metric(world, M_LOADS_DONE), 1);
    cr_assert_eq(metric(world, M_LOAD_BYTES), atomic_load(&task->progress.total_bytes));
    leave(world);
}

Test(async_loader, a_missing_file_a_directory_and_a_fifo_are_told)
{
    struct world *world = start(build(1, ALL_OPEN));
    struct load_task *missing = file_task("/nonexistent/model.gguf"), *directory = file_task("/");
    struct load_task *fifo;
    char path[] = "/tmp/hearth-fifo-XXXXXX";

    cr_assert(mkdtemp(path) != NULL);
    rmdir(path);
    cr_assert_eq(mkfifo(path, 0600), 0);
    fifo = file_task(path);
    loader_submit(world->loader, missing);
    loader_submit(world->loader, directory);
    loader_submit(world->loader, fifo);
    wait_done(world, 3);
    cr_assert_eq(missing->error, -ENOENT);
    cr_assert_not_null(strstr(missing->fault.text, "/nonexistent/model.gguf"));
    cr_assert_eq(directory->error, -EBADMSG);
    cr_assert_eq(fifo->error, -EBADMSG);
    cr_assert_eq(metric(world, M_LOADS_FAILED), 3);
    unlink(path);
    leave(world);
}

/* ---- order ---- */

Test(async_loader, the_most_urgent_begins_first_then_the_higher_rank_then_the_older)
{
    struct gate gate = GATE_SHUT;
    struct world *world = start(build(1, ALL_OPEN));
    struct load_task *tasks[6];
    static const struct {
        enum load_priority priority;
        int32_t rank;
    } asked[6] = {{LOAD_WARM, 0},        {LOAD_WARM, 5},        {LOAD_WARM, 0},
                  {LOAD_INTERACTIVE, 0}, {LOAD_INTERACTIVE, 9}, {LOAD_WARM, 0}};
    static const int order[6] = {4, 3, 2, 1, 0, 5}; /* task 2 is made interactive */
    uint32_t n = block_threads(world, &gate);

    for (int i = 0; i < 6; i++) {
        tasks[i] = builtin_task(asked[i].priority);
        tasks[i]->rank = asked[i].rank;
        loader_submit(world->loader, tasks[i]);
    }
    cr_assert_eq(metric(world, M_LOADS_QUEUED), 6);
    cr_assert(loader_promote(world->loader, tasks[2], LOAD_INTERACTIVE));
    cr_assert(loader_promote(world->loader, tasks[3], LOAD_WARM), "nobody becomes less urgent");
    open_gate(&gate);
    wait_done(world, n + 6);
    for (int i = 0; i < 6; i++)
        cr_expect_eq(world->begun[n + i], tasks[order[i]], "place %d", i);
    leave(world);
}

Test(async_loader, as_many_load_at_once_as_may)
{
    struct world *world = start(build(3, 0));
    struct load_task *tasks[5];
    int begun = 0;

    for (int i = 0; i < 5; i++)
        loader_submit(world->loader, tasks[i] = builtin_task(LOAD_WARM));
    wait_begun(world, 3);
    wait_at_gate(&packing_gate, 3);
    for (int i = 0; i < 5; i++)
        begun += atomic_load(&tasks[i]->started);
    cr_assert_eq(begun, 3);
    cr_assert_eq(metric(world, M_LOADS_RUNNING), 3);
    cr_assert_eq(metric(world, M_LOADS_QUEUED), 2);
    open_gate(&packing_gate);
    wait_done(world, 5);
    leave(world);
}

Test(async_loader, one_user_alone_has_no_more_than_a_share)
{
    struct world *world = build(3, 0);
    struct load_task *tasks[3];

    world->options.per_uid = 1;
    start(world);
    for (int i = 0; i < 3; i++) {
        tasks[i] = builtin_task(LOAD_INTERACTIVE);
        tasks[i]->uid = i < 2 ? 7 : 8;
        loader_submit(world->loader, tasks[i]);
    }
    wait_at_gate(&packing_gate, 2);
    cr_assert(atomic_load(&tasks[0]->started));
    cr_assert_not(atomic_load(&tasks[1]->started), "a second one of the user 7");
    cr_assert(atomic_load(&tasks[2]->started));
    loader_share(world->loader, tasks[1]); /* somebody else waits for it, too */
    wait_at_gate(&packing_gate, 3);
    cr_assert(atomic_load(&tasks[1]->started));
    open_gate(&packing_gate);
    wait_done(world, 3);
    leave(world);
}

Test(async_loader, threads_share_a_load_while_nobody_else_waits)
{
    struct world *world = start(build(LOADER_HANDS + 1, 0));
    struct load_task *first = builtin_task(LOAD_WARM), *second = builtin_task(LOAD_WARM);

    loader_submit(world->loader, first);
    wait_at_gate(&packing_gate, LOADER_HANDS);
    cr_assert_eq(atomic_load(&first->n_hands), LOADER_HANDS, "no more than that");
    loader_submit(world->loader, second);
    wait_at_gate(&packing_gate, LOADER_HANDS + 1);
    cr_assert(atomic_load(&second->started));
    open_gate(&packing_gate);
    wait_done(world, 2);
    cr_assert_eq(first->error, 0);
    cr_assert_eq(second->error, 0);
    leave(world);
}

/* ---- idle priority and promotion ---- */

Test(async_loader, what_nobody_waits_for_runs_at_idle_priority)
{
    struct world *world = start(build(3, ALL_OPEN));
    struct load_task *task = builtin_task(LOAD_PRELOAD);

    loader_submit(world->loader, task);
    wait_done(world, 1);
    cr_assert_eq(task->error, 0);
    cr_assert_eq(atomic_load(&n_packed_idle), atomic_load(&n_packed));
    leave(world);
}

Test(async_loader, a_promoted_load_goes_on_where_it_was_at_normal_priority)
{
    struct world *world = start(build(3, 3));
    struct load_task *task = builtin_task(LOAD_PREDICTED), *other = builtin_task(LOAD_WARM);
    int pieces;

    loader_submit(world->loader, task);
    wait_at_gate(&packing_gate, 1);
    cr_assert(loader_promote(world->loader, task, LOAD_INTERACTIVE));
    wait_at_gate(&packing_gate, 2); /* a normal thread has come to it already */
    open_gate(&packing_gate);
    wait_done(world, 1);
    cr_assert_eq(task->error, 0, "%s", task->fault.text);
    cr_assert_eq(atomic_load(&task->progress.done_bytes), atomic_load(&task->progress.total_bytes));
    cr_assert_eq(metric(world, M_LOADS_PROMOTED), 1);
    cr_assert_eq(metric(world, M_LOADS), 1, "it was not begun again");
    cr_assert_eq(atomic_load(&n_packed_idle), 4, "those before, and the one under way");
    pieces = atomic_load(&n_packed);
    loader_submit(world->loader, other);
    wait_done(world, 2);
    cr_assert_eq(atomic_load(&n_packed), 2 * pieces, "no piece was packed twice");
    leave(world);
}

Test(async_loader, a_load_promoted_in_its_beginning_had_better_begin_anew)
{
    struct gate gate = GATE_SHUT;
    struct world *world = build(3, ALL_OPEN);
    struct load_task *task = builtin_task(LOAD_PRELOAD);

    world->begin_gate = &gate;
    start(world);
    loader_submit(world->loader, task);
    wait_at_gate(&gate, 1);
    cr_assert_not(loader_promote(world->loader, task, LOAD_INTERACTIVE));
    loader_cancel(world->loader, task);
    open_gate(&gate);
    wait_done(world, 1);
    cr_assert_eq(task->error, -ECANCELED);
    leave(world);
}

Test(async_loader, an_urgent_load_takes_the_place_of_a_preload_which_goes_on_later)
{
    struct world *world = start(build(1, 2));
    struct load_task *preload = builtin_task(LOAD_PRELOAD), *urgent = builtin_task(LOAD_WARM);
    uint64_t done;

    loader_submit(world->loader, preload);
    wait_at_gate(&packing_gate, 1);
    done = atomic_load(&preload->progress.done_bytes);
    loader_submit(world->loader, urgent);
    wait_at_gate(&packing_gate, 2);
    cr_assert(atomic_load(&urgent->started));
    open_gate(&packing_gate);
    wait_done(world, 2);
    cr_assert_eq(preload->error, 0);
    cr_assert_eq(urgent->error, 0);
    cr_assert(done > 0);
    cr_assert_eq(metric(world, M_LOADS), 2, "the preload went on where it was");
    leave(world);
}

/* ---- the engine first ---- */

Test(async_loader, a_load_rests_while_the_engine_works_and_only_then)
{
    for (uint32_t beat = 0; beat < 2; beat++) {
        struct engine_pulse pulse = {.beat = beat};
        struct world *world = build(3, ALL_OPEN);
        struct model_plan plan = model_plan_default();
        char path[] = "/tmp/hearth-paced-XXXXXX";
        struct load_task *task;

        close(mkstemp(path));
        plan.vocab = 20000;
        cr_assert_eq(make_model_file(&plan, path, NULL), 0);
        world->options.pulse = &pulse;
        start(world);
        task = file_task(path);
        loader_submit(world->loader, task);
        wait_done(world, 1);
        cr_assert_eq(task->error, 0, "%s", task->fault.text);
        cr_expect_eq(metric(world, M_LOAD_RESTED) > 0, beat == 1, "beat %u", beat);
        unlink(path);
        leave(world);
    }
}

/* ---- cancelling ---- */

Test(async_loader, a_load_that_waits_is_cancelled_at_once)
{
    struct gate gate = GATE_SHUT;
    struct world *world = start(build(1, ALL_OPEN));
    struct load_task *task = builtin_task(LOAD_WARM);
    uint32_t n = block_threads(world, &gate);

    loader_submit(world->loader, task);
    loader_cancel(world->loader, task);
    cr_assert_eq(world->n_done, 1, "though no thread is free");
    cr_assert_eq(task->error, -ECANCELED);
    cr_assert_eq(metric(world, M_LOADS_CANCELLED), 1);
    cr_assert_eq(metric(world, M_LOADS_FAILED), 0);
    cr_assert_eq(metric(world, M_LOADS_QUEUED), 0);
    open_gate(&gate);
    wait_done(world, 1 + n);
    leave(world);
}

Test(async_loader, a_running_load_is_cancelled_at_its_next_piece)
{
    for (enum load_priority priority = LOAD_INTERACTIVE; priority < _LOAD_PRIORITY_MAX;
         priority++) {
        struct world *world = start(build(3, 2));
        struct load_task *task = builtin_task(priority);

        shut_gate(&packing_gate);
        loader_submit(world->loader, task);
        wait_at_gate(&packing_gate, 1);
        loader_cancel(world->loader, task);
        open_gate(&packing_gate);
        wait_done(world, 1);
        cr_expect_eq(task->error, -ECANCELED);
        cr_expect_null(task->model);
        leave(world);
    }
}

Test(async_loader, a_load_that_was_set_aside_can_be_cancelled)
{
    struct gate gate = GATE_SHUT;
    struct world *world = start(build(1, 2));
    struct load_task *preload = builtin_task(LOAD_PRELOAD), *urgent = builtin_task(LOAD_WARM);

    loader_submit(world->loader, preload);
    wait_at_gate(&packing_gate, 1);
    world->begin_gate = &gate;
    loader_submit(world->loader, urgent);
    wait_at_gate(&gate, 1);
    open_gate(&packing_gate);
    for (int ms = 0; ms < WAIT_MS && atomic_load(&preload->n_hands) > 0; ms++)
        usleep(1000);
    cr_assert_eq(world->n_done, 0, "it waits for the urgent one's end");
    loader_cancel(world->loader, preload);
    wait_done(world, 1);
    cr_assert_eq(preload->error, -ECANCELED);
    open_gate(&gate);
    wait_done(world, 2);
    cr_assert_eq(urgent->error, 0);
    leave(world);
}

Test(async_loader, the_end_of_the_loader_ends_what_waits_and_what_runs)
{
    struct world *world = start(build(1, ALL_OPEN));

    for (int i = 0; i < 12; i++)
        loader_submit(world->loader, builtin_task((enum load_priority)(i % _LOAD_PRIORITY_MAX)));
    cr_assert_null(loader_free(TAKE_PTR(world->loader)));
    cr_assert_eq(world->n_done, 12, "each task comes back");
    leave(world);
}

/* ---- stuck reads ---- */

Test(async_loader, a_stuck_load_is_abandoned_and_others_go_on)
{
    struct world *world = start(build(1, 0));
    struct load_task *stuck = builtin_task(LOAD_WARM), *next = builtin_task(LOAD_WARM);

    loader_submit(world->loader, stuck);
    wait_at_gate(&packing_gate, LOADER_HANDS); /* both threads are in it */
    loader_submit(world->loader, next);
    atomic_store(&pieces_before_gate, ALL_OPEN); /* the next one finds a good disk */
    loader_abandon(world->loader, stuck);
    wait_done(world, 1);
    cr_assert_eq(world->done[0], next);
    cr_assert_eq(next->error, 0, "%s", next->fault.text);
    cr_assert_eq(metric(world, M_LOADER_ABANDONED), LOADER_HANDS);
    open_gate(&packing_gate);
    wait_done(world, 2);
    cr_assert_eq(stuck->error, -ECANCELED);
    leave(world);
}

Test(async_loader, no_more_threads_are_abandoned_than_may)
{
    struct world *world = start(build(1, 0));
    uint32_t n = 2 * LOADER_MAX_ABANDONED;

    for (uint32_t i = 0; i < n; i++) {
        struct load_task *task = builtin_task(LOAD_WARM);
        loader_submit(world->loader, task);
        if (metric(world, M_LOADER_ABANDONED) == LOADER_MAX_ABANDONED)
            continue; /* no thread is left: they wait */
        wait_at_gate(&packing_gate, (int)(LOADER_HANDS * (i + 1)));
        loader_abandon(world->loader, task);
    }
    cr_assert_eq(metric(world, M_LOADER_ABANDONED), LOADER_MAX_ABANDONED);
    atomic_store(&pieces_before_gate, ALL_OPEN);
    open_gate(&packing_gate);
    wait_done(world, n);
    leave(world);
}

Test(async_loader, the_end_does_not_wait_for_a_stuck_read)
{
    struct world *world = start(build(1, 0));
    struct loader *left;

    loader_submit(world->loader, builtin_task(LOAD_WARM));
    wait_at_gate(&packing_gate, 1);
    left = loader_free(world->loader);
    cr_assert_eq(left, world->loader, "it lives on, as its thread uses it");
    open_gate(&packing_gate);
    leave(world);
}

Test(async_loader, a_task_of_its_own_needs_no_thread_of_the_others)
{
    struct gate gate = GATE_SHUT;
    struct world *world = start(build(1, ALL_OPEN));
    struct load_task *own = builtin_task(LOAD_WARM);
    uint32_t n = block_threads(world, &gate);

    own->own = true;
    loader_submit(world->loader, own);
    wait_done(world, 1);
    cr_assert_eq(own->error, 0, "%s", own->fault.text);
    open_gate(&gate);
    wait_done(world, 1 + n);
    leave(world);
}

Test(async_loader, threads_of_their_own_are_bounded)
{
    struct world *world = start(build(1, 0));
    struct load_task *task = NULL;

    for (uint32_t i = 0; i <= LOADER_MAX_OWN; i++) {
        task = builtin_task(LOAD_WARM);
        task->own = true;
        loader_submit(world->loader, task);
    }
    cr_assert_eq(task->error, -EAGAIN);
    cr_assert_not_null(strstr(task->fault.text, "try again"));
    wait_at_gate(&packing_gate, (int)LOADER_MAX_OWN);
    open_gate(&packing_gate);
    wait_done(world, LOADER_MAX_OWN + 1);
    leave(world);
}
