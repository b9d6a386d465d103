#include "daemon/model/async_loader.h"

#include <assert.h>
#include <errno.h>
#include <linux/ioprio.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/model/pacer.h"
#include "lib/cleanup.h"
#include "lib/thread.h"

/* A read that hangs (a dead network disk) does not hang the end of the daemon longer than this. */
#define LOADER_STOP_S 2

/* Most threads of normal priority: `loading.max_concurrent` is bounded by the configuration well
 * below. */
#define LOADER_MAX_THREADS 64u

enum thread_role {
    THREAD_NORMAL,
    THREAD_IDLE, /* of idle priority: loads that nobody waits for */
    THREAD_OWN,  /* of one task, and ends with it */
};

struct loader_thread {
    struct loader *loader;
    enum thread_role role;
    pthread_t thread;
    struct load_task *task; /* that it works at */
    struct load_task *sole; /* THREAD_OWN: until it has taken it */
    bool abandoned;
    struct load_hand hand; /* its own */
    struct loader_thread *next;
};

struct loader {
    struct loader_options options;
    struct pacer pacer;
    _Atomic uint32_t
        n_wanting;        /* tasks that wait for a normal thread: helpers go when there are any */
    pthread_mutex_t lock; /* guards all below, and the tasks' loader fields */
    pthread_cond_t wake;  /* there may be something to do */
    pthread_cond_t ended; /* a thread has ended */
    struct load_task *waiting[_LOAD_PRIORITY_MAX];
    struct loader_thread *threads, *over; /* alive; ended, to be joined */
    uint32_t n_waiting_loads, n_abandoned, n_own;
    bool stopping;
};

/* ---- what there is to do ---- */

/* Loads that have begun and are not over: each is found by its threads, or waits to go on. */
struct census {
    uint32_t all;     /* those with a thread of their own, too */
    uint32_t running; /* without these */
    uint32_t urgent;  /* of the running those that somebody waits for */
    uint32_t of_uid;  /* of these, for one user alone */
};

static bool counted_before(const struct loader *loader, const struct loader_thread *until)
{
    for (const struct loader_thread *t = loader->threads; t != until; t = t->next)
        if (t->task == until->task && !t->abandoned)
            return true;
    return false;
}

static struct census take_census(const struct loader *loader, uint32_t uid)
{
    struct census census = {0};

    for (const struct loader_thread *t = loader->threads; t; t = t->next) {
        const struct load_task *task = t->abandoned ? NULL : t->task;

        if (!task || task->kind != TASK_LOAD || counted_before(loader, t))
            continue;
        census.all++;
        if (task->own)
            continue;
        census.running++;
        if (load_is_idle(task->priority))
            continue;
        census.urgent++;
        census.of_uid += uid != LOAD_FOR_MANY && task->uid == uid;
    }
    return census;
}

static void publish(const struct loader *loader)
{
    metrics_set(loader->options.metrics, M_LOADS_QUEUED, loader->n_waiting_loads);
    metrics_set(loader->options.metrics, M_LOADS_RUNNING, take_census(loader, LOAD_FOR_MANY).all);
}

static bool is_cancelled(const struct load_task *task)
{
    return atomic_load(&task->progress.cancel);
}

/* Whether a waiting task may begin, or go on, on a thread of that role. */
static bool may_run(const struct loader *loader, const struct load_task *task,
                    enum thread_role role)
{
    const struct loader_options *options = &loader->options;
    struct census census;

    if (loader->stopping)
        return true;
    if (is_cancelled(task))
        return role == THREAD_NORMAL;
    if (load_is_idle(task->priority) != (role == THREAD_IDLE))
        return false;
    if (task->kind != TASK_LOAD)
        return true;
    census = take_census(loader, task->uid);
    if (role == THREAD_IDLE)
        return census.running < options->max_concurrent;
    return census.urgent < options->max_concurrent &&
           (options->per_uid == 0 || census.of_uid < options->per_uid);
}

static void unlist(struct loader *loader, struct load_task *task)
{
    struct load_task **at = &loader->waiting[task->priority];

    while (*at != task)
        at = &(*at)->next;
    *at = task->next;
    task->next = NULL;
    task->listed = false;
    loader->n_waiting_loads -= task->kind == TASK_LOAD;
    if (!load_is_idle(task->priority))
        atomic_fetch_sub(&loader->n_wanting, 1);
}

/* Behind those of its rank, or before them: one that had begun goes on first. */
static void enlist(struct loader *loader, struct load_task *task)
{
    struct load_task **at = &loader->waiting[task->priority];
    bool first = task->stage != LOAD_WAITS;

    while (*at && ((*at)->rank > task->rank || ((*at)->rank == task->rank && !first)))
        at = &(*at)->next;
    task->next = *at;
    *at = task;
    task->listed = true;
    loader->n_waiting_loads += task->kind == TASK_LOAD;
    if (!load_is_idle(task->priority))
        atomic_fetch_add(&loader->n_wanting, 1);
    pthread_cond_broadcast(&loader->wake); /* only some threads may take it */
}

static struct load_task *take_waiting(struct loader *loader, enum thread_role role)
{
    for (uint32_t i = 0; i < _LOAD_PRIORITY_MAX; i++)
        for (struct load_task *task = loader->waiting[i]; task; task = task->next)
            if (may_run(loader, task, role)) {
                unlist(loader, task);
                return task;
            }
    return NULL;
}

/* A load under way that another pair of hands would speed up, the most urgent one. */
static struct load_task *find_helpable(const struct loader *loader)
{
    struct load_task *best = NULL;

    for (const struct loader_thread *t = loader->threads; t; t = t->next) {
        struct load_task *task = t->abandoned ? NULL : t->task;

        if (!task || task->kind != TASK_LOAD || task->own || load_is_idle(task->priority) ||
            task->stage != LOAD_PIECES || is_cancelled(task) ||
            atomic_load(&task->n_hands) >= LOADER_HANDS || !model_load_wants_hands(task->load))
            continue;
        if (!best || task->priority < best->priority)
            best = task;
    }
    return best;
}

/* An urgent load takes the place of one that nobody waits for: that one goes on later. */
static void make_place(struct loader *loader)
{
    if (take_census(loader, LOAD_FOR_MANY).running < loader->options.max_concurrent)
        return;
    for (struct loader_thread *t = loader->threads; t; t = t->next)
        if (t->role == THREAD_IDLE && t->task)
            atomic_store(&t->task->step_back, true);
}

static struct load_task *take(struct loader *loader, struct loader_thread *self)
{
    struct load_task *task;

    if (self->role == THREAD_OWN)
        return TAKE_PTR(self->sole);
    task = take_waiting(loader, self->role);
    if (self->role != THREAD_NORMAL)
        return task;
    if (task && task->kind == TASK_LOAD)
        make_place(loader);
    /* Nobody helps while others wait: they may be able to begin at any moment. */
    if (!task && !loader->stopping && atomic_load(&loader->n_wanting) == 0)
        task = find_helpable(loader);
    return task;
}

/* ---- working at a load ---- */

/* Whether the thread has something better to do than the next piece of this load. */
static bool should_leave(const struct loader *loader, const struct loader_thread *self,
                         const struct load_task *task, bool helping)
{
    if (self->role == THREAD_IDLE)
        return atomic_load(&task->step_back);
    return helping && atomic_load(&loader->n_wanting) > 0;
}

static int work_pieces(struct loader *loader, struct loader_thread *self, struct load_task *task,
                       bool helping, struct fault *ret_fault)
{
    struct pace pace = {0};
    int r = 1;

    pace_begin(&loader->pacer, &pace);
    while (r > 0 && !should_leave(loader, self, task, helping)) {
        r = load_task_slice(&loader->options, task, &self->hand, ret_fault);
        if (r > 0 && self->role != THREAD_IDLE)
            pace_keep(&loader->pacer, &pace, clock_now_us(loader->options.clock) - task->began_us,
                      &task->progress.cancel);
    }
    metrics_add(loader->options.metrics, M_LOAD_RESTED, pace.rested_us);
    return r;
}

/* The first thread at a load begins it; with the lock, which is given back meanwhile. */
static int begin(struct loader *loader, struct load_task *task)
{
    int r;

    task->stage = LOAD_BEGINS;
    pthread_mutex_unlock(&loader->lock);
    atomic_store(&task->started, true);
    if (loader->options.begun)
        loader->options.begun(loader->options.userdata, task);
    r = load_task_begin(&loader->options, task);
    pthread_mutex_lock(&loader->lock);
    if (r == 0) {
        task->stage = LOAD_PIECES;
        pthread_cond_broadcast(&loader->wake); /* for helpers */
    }
    return r;
}

/* With the lock. True when the task is over: nobody else is at it, and it is in no list; this hand
 * stays with it until it is concluded, as that may hang, too. */
static bool leave(struct loader *loader, struct load_task *task, int result)
{
    if (atomic_load(&task->n_hands) > 1) {
        atomic_fetch_sub(&task->n_hands, 1);
        return false;
    }
    if (result >= 0 && task->error == 0 && !is_cancelled(task) && task->load &&
        !model_load_is_whole(task->load)) {
        atomic_fetch_sub(&task->n_hands, 1);
        task->idle = false;
        enlist(loader, task); /* handed over */
        return false;
    }
    task->stage = LOAD_OVER;
    return true;
}

/* With the lock, which is given back meanwhile. True when the load is over. */
static bool work_load(struct loader *loader, struct loader_thread *self, struct load_task *task)
{
    struct fault fault = {0};
    bool helping = atomic_fetch_add(&task->n_hands, 1) > 0;
    int r = 0;

    if (self->role == THREAD_IDLE)
        atomic_store(&task->step_back, false);
    task->idle = self->role == THREAD_IDLE;
    if (task->stage == LOAD_WAITS)
        r = begin(loader, task);
    if (r == 0) {
        pthread_mutex_unlock(&loader->lock);
        r = work_pieces(loader, self, task, helping, &fault);
        pthread_mutex_lock(&loader->lock);
        if (r < 0 && task->error == 0)
            task->fault = fault;
    }
    if (r < 0 && task->error == 0)
        task->error = r;
    if (r < 0)
        atomic_store(&task->progress.cancel, true); /* the others leave at their next piece */
    return leave(loader, task, r);
}

/* Ends a load: closes its files and gives back what it does not leave behind, without the lock. */
static void conclude(struct loader *loader, struct loader_thread *self, struct load_task *task)
{
    bool given_up;

    load_task_conclude(&loader->options, task,
                       task->error < 0      ? task->error
                       : is_cancelled(task) ? -ECANCELED
                                            : 0);
    pthread_mutex_lock(&loader->lock);
    given_up = self->abandoned;
    pthread_mutex_unlock(&loader->lock);
    if (given_up && task->error == 0) { /* in its last steps; nobody takes the model any more */
        task->model = model_free(task->model);
        task->error = -ECANCELED;
    }
}

/* Runs a whole task of another kind, without the lock. */
static void run_plain(struct loader *loader, struct load_task *task)
{
    atomic_store(&task->started, true);
    if (loader->options.begun)
        loader->options.begun(loader->options.userdata, task);
    if (task->kind == TASK_FREE)
        load_task_release(task);
    else
        task->call(task);
}

/* A thread is free of its task: abandoned ones end. */
static void work(struct loader *loader, struct loader_thread *self, struct load_task *task)
{
    bool over = true;

    self->task = task;
    publish(loader);
    if (task->kind == TASK_LOAD)
        over = work_load(loader, self, task);
    else
        atomic_fetch_add(&task->n_hands, 1);
    if (over) {
        pthread_mutex_unlock(&loader->lock);
        if (task->kind == TASK_LOAD)
            conclude(loader, self, task);
        else
            run_plain(loader, task);
        pthread_mutex_lock(&loader->lock);
        atomic_fetch_sub(&task->n_hands, 1);
    }
    self->task = NULL;
    loader->n_own -= self->role == THREAD_OWN;
    publish(loader);
    pthread_cond_broadcast(&loader->wake); /* there may be a place for another now */
    if (!over)
        return;
    pthread_mutex_unlock(&loader->lock);
    loader->options.done(loader->options.userdata, task);
    pthread_mutex_lock(&loader->lock);
}

/* ---- threads ---- */

static void become_idle(void)
{
    struct sched_param none = {0};

    /* Neither can fail for want of a right: both only lower. Refused by a sandbox, the load is
     * merely felt a little. */
    (void)sched_setscheduler(0, SCHED_IDLE, &none);
    (void)syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0));
}

/* With the lock: takes itself from the list of the living. */
static void thread_over(struct loader_thread *self)
{
    struct loader *loader = self->loader;
    struct loader_thread **at = &loader->threads;

    while (*at != self)
        at = &(*at)->next;
    *at = self->next;
    self->next = loader->over;
    loader->over = self;
    loader->n_abandoned -= self->abandoned && self->role != THREAD_OWN;
    pthread_cond_broadcast(&loader->ended);
}

static void *thread_main(void *argument)
{
    struct loader_thread *self = argument;
    struct loader *loader = self->loader;

    if (self->role == THREAD_IDLE)
        become_idle();
    pthread_mutex_lock(&loader->lock);
    while (!self->abandoned) {
        struct load_task *task = take(loader, self);

        if (task)
            work(loader, self, task);
        else if (loader->stopping || self->role == THREAD_OWN)
            break;
        else
            pthread_cond_wait(&loader->wake, &loader->lock);
    }
    load_hand_done(&self->hand);
    thread_over(self);
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

/* Joins those that have ended; without the lock. */
static void reap(struct loader *loader)
{
    struct loader_thread *thread;

    pthread_mutex_lock(&loader->lock);
    thread = TAKE_PTR(loader->over);
    pthread_mutex_unlock(&loader->lock);
    while (thread) {
        struct loader_thread *next = thread->next;

        pthread_join(thread->thread, NULL);
        free(thread);
        thread = next;
    }
}

/* With the lock. `sole`: for a thread of a task's own. */
static int start_thread(struct loader *loader, enum thread_role role, struct load_task *sole)
{
    struct loader_thread *self = calloc(1, sizeof(*self));
    int r;

    if (!self)
        return -ENOMEM;
    *self = (struct loader_thread){
        .loader = loader, .role = role, .sole = sole, .next = loader->threads};
    r = thread_start(&self->thread, role == THREAD_IDLE ? "hearth-preload" : "hearth-loader",
                     thread_main, self);
    if (r < 0) {
        free(self);
        return r;
    }
    loader->threads = self;
    loader->n_own += role == THREAD_OWN;
    return 0;
}

/* ---- life ---- */

static int start_threads(struct loader *loader, struct fault *ret_fault)
{
    uint32_t n = MAX(loader->options.max_concurrent, LOADER_HANDS);
    int r = 0;

    pthread_mutex_lock(&loader->lock);
    for (uint32_t i = 0; i < MIN(n, LOADER_MAX_THREADS) && r == 0; i++)
        r = start_thread(loader, THREAD_NORMAL, NULL);
    if (r == 0)
        r = start_thread(loader, THREAD_IDLE, NULL);
    pthread_mutex_unlock(&loader->lock);
    return r == 0 ? 0 : fault_set(ret_fault, r, "cannot start a loader thread: %s", strerror(-r));
}

int loader_new(const struct loader_options *options, struct loader **ret_loader,
               struct fault *ret_fault)
{
    struct loader *loader = calloc(1, sizeof(*loader));
    int r;

    if (!loader)
        return fault_set(ret_fault, -ENOMEM, "no memory for the loader");
    loader->options = *options;
    loader->options.max_concurrent = MAX(options->max_concurrent, 1u);
    loader->pacer.pulse = options->pulse;
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->wake, NULL);
    pthread_cond_init(&loader->ended, NULL);
    r = start_threads(loader, ret_fault);
    if (r < 0) {
        loader_free(loader);
        return r;
    }
    *ret_loader = loader;
    return 0;
}

static void cancel_all(struct loader *loader)
{
    loader->stopping = true;
    for (struct loader_thread *t = loader->threads; t; t = t->next)
        if (t->task)
            atomic_store(&t->task->progress.cancel, true);
    for (uint32_t i = 0; i < _LOAD_PRIORITY_MAX; i++)
        for (struct load_task *task = loader->waiting[i]; task; task = task->next)
            atomic_store(&task->progress.cancel, true);
    pthread_cond_broadcast(&loader->wake);
}

struct loader *loader_free(struct loader *loader)
{
    struct timespec until;
    int r = 0;

    if (!loader)
        return NULL;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LOADER_STOP_S;
    pthread_mutex_lock(&loader->lock);
    cancel_all(loader);
    while (loader->threads && r == 0)
        r = pthread_cond_timedwait(&loader->ended, &loader->lock, &until);
    if (loader->threads) {
        /* Stuck in a read: it keeps what it uses, and the process's end takes it along. */
        pthread_mutex_unlock(&loader->lock);
        return loader;
    }
    pthread_mutex_unlock(&loader->lock);
    reap(loader);
    pthread_cond_destroy(&loader->ended);
    pthread_cond_destroy(&loader->wake);
    pthread_mutex_destroy(&loader->lock);
    free(loader);
    return NULL;
}

/* ---- the reactor's side ---- */

/* Ends a task that no thread has seen. A file that may hang stays open: the caller of all this
 * cannot wait for its closing. */
static void end_unbegun(struct loader *loader, struct load_task *task, int error)
{
    int fd = task->own ? TAKE_FD(task->fd) : -1;

    if (task->kind == TASK_LOAD)
        load_task_conclude(&loader->options, task, error);
    else
        task->error = error;
    task->fd = fd >= 0 ? fd : task->fd;
    loader->options.done(loader->options.userdata, task);
}

void loader_submit(struct loader *loader, struct load_task *task)
{
    int r = 0;

    if (task->own)
        reap(loader);
    pthread_mutex_lock(&loader->lock);
    if (!task->own)
        enlist(loader, task);
    else
        r = loader->n_own < LOADER_MAX_OWN ? start_thread(loader, THREAD_OWN, task) : -EAGAIN;
    publish(loader);
    pthread_mutex_unlock(&loader->lock);
    if (r < 0) {
        fault_set(&task->fault, r, "too many files are being loaded at once; try again shortly");
        end_unbegun(loader, task, r);
    }
}

bool loader_promote(struct loader *loader, struct load_task *task, enum load_priority priority)
{
    bool handed_over = true;

    pthread_mutex_lock(&loader->lock);
    if (priority < task->priority) {
        bool was_listed = task->listed;

        if (was_listed)
            unlist(loader, task);
        task->priority = priority;
        if (was_listed)
            enlist(loader, task);
        if (task->idle && !load_is_idle(priority)) {
            handed_over = task->stage != LOAD_BEGINS;
            atomic_store(&task->step_back, true);
            metrics_add(loader->options.metrics, M_LOADS_PROMOTED, 1);
            pthread_cond_broadcast(&loader->wake); /* others may take its pieces at once */
        }
    }
    pthread_mutex_unlock(&loader->lock);
    return handed_over;
}

void loader_share(struct loader *loader, struct load_task *task)
{
    pthread_mutex_lock(&loader->lock);
    task->uid = LOAD_FOR_MANY;
    pthread_cond_broadcast(&loader->wake);
    pthread_mutex_unlock(&loader->lock);
}

void loader_cancel(struct loader *loader, struct load_task *task)
{
    bool unbegun;

    pthread_mutex_lock(&loader->lock);
    unbegun = task->listed && task->kind == TASK_LOAD && task->stage == LOAD_WAITS;
    atomic_store(&task->progress.cancel, true);
    if (unbegun)
        unlist(loader, task);
    publish(loader);
    pthread_cond_broadcast(&loader->wake);
    pthread_mutex_unlock(&loader->lock);
    if (unbegun)
        end_unbegun(loader, task, -ECANCELED);
}

void loader_abandon(struct loader *loader, struct load_task *task)
{
    struct loader_thread *next;

    reap(loader);
    pthread_mutex_lock(&loader->lock);
    atomic_store(&task->progress.cancel, true);
    for (struct loader_thread *t = loader->threads; t; t = next) {
        next = t->next; /* a new one comes before all of them */
        if (t->task != task || t->abandoned ||
            (t->role != THREAD_OWN && loader->n_abandoned == LOADER_MAX_ABANDONED))
            continue;
        if (t->role != THREAD_OWN && start_thread(loader, t->role, NULL) < 0)
            continue; /* it stays one of ours */
        t->abandoned = true;
        loader->n_abandoned += t->role != THREAD_OWN;
        metrics_add(loader->options.metrics, M_LOADER_ABANDONED, 1);
    }
    publish(loader);
    pthread_mutex_unlock(&loader->lock);
}
