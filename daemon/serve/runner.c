#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/serve/runner_internal.h"
#include "lib/cleanup.h"
#include "lib/thread.h"

/* Messages of one request that can wait at once: submit, two cancels and one unpark, one unpark
 * from before it fell asleep, with a reserve; and room for those of models. */
#define MESSAGES_PER_REQUEST 6u
#define MESSAGES_OF_MODELS   4096u
/* Bytes of what a model keeps are said in. */
#define KEPT_UNIT 4096u

enum message_kind {
    MESSAGE_SUBMIT,
    MESSAGE_CANCEL,
    MESSAGE_UNPARK,
    MESSAGE_ADD_MODEL,
    MESSAGE_REMOVE_MODEL,
    MESSAGE_SHRINK_MODEL,
    MESSAGE_STOP,
};

/* ---- the reactor's side ---- */

static int send_message(struct runner *runner, uint32_t kind, void *subject, uint32_t number)
{
    struct message message = {.kind = kind, .subject = subject, .number = number};

    return queue_push(runner->inbox, &message);
}

/* Every message about a request is counted: those that reach the engine thread after it has handed
 * the request back are answered by RUNNER_LATE, and only then is nobody left who knows it. */
static int send_about(struct runner *runner, uint32_t kind, struct request *request,
                      uint32_t number)
{
    int r = send_message(runner, kind, request, number);

    request->messages_sent += r == 0;
    return r;
}

int runner_submit(struct runner *runner, struct request *request)
{
    return send_about(runner, MESSAGE_SUBMIT, request, 0);
}

void runner_cancel(struct runner *runner, struct request *request, enum wire_code why)
{
    int r = send_about(runner, MESSAGE_CANCEL, request, why);

    assert(r == 0); /* the inbox has room for each request's messages */
    (void)r;
}

void runner_unpark(struct runner *runner, struct request *request)
{
    int r = send_about(runner, MESSAGE_UNPARK, request, 0);

    assert(r == 0);
    (void)r;
}

int runner_add_model(struct runner *runner, struct model *model, void *subject,
                     struct runner_model **ret_model)
{
    struct runner_model *rm = calloc(1, sizeof(*rm));
    int r;

    if (!rm)
        return -ENOMEM;
    rm->runner = runner;
    rm->model = model;
    rm->subject = subject;
    rm->rows = calloc(runner->options.max_batch, sizeof(*rm->rows));
    rm->next = runner->models;
    if (rm->next)
        rm->next->previous = rm;
    runner->models = rm;
    r = rm->rows ? send_message(runner, MESSAGE_ADD_MODEL, rm, 0) : -ENOMEM;
    if (r < 0) {
        runner_model_free(rm);
        return r;
    }
    *ret_model = rm;
    return 0;
}

int runner_remove_model(struct runner *runner, struct runner_model *model)
{
    return send_message(runner, MESSAGE_REMOVE_MODEL, model, 0);
}

void runner_shrink_model(struct runner *runner, struct runner_model *model, uint64_t kept_bytes)
{
    (void)send_message(runner, MESSAGE_SHRINK_MODEL, model,
                       (uint32_t)MIN(kept_bytes / KEPT_UNIT, (uint64_t)UINT32_MAX));
}

void *runner_model_subject(const struct runner_model *model)
{
    return model->subject;
}

const char *runner_model_error(const struct runner_model *model)
{
    return model->error[0] ? model->error : NULL;
}

struct runner_model *runner_model_free(struct runner_model *model)
{
    if (!model)
        return NULL;
    if (model->previous)
        model->previous->next = model->next;
    else
        model->runner->models = model->next;
    if (model->next)
        model->next->previous = model->previous;
    free(model->rows);
    free(model);
    return NULL;
}

struct outbox *runner_outbox(const struct runner *runner)
{
    return runner->outbox;
}

uint64_t runner_beat(const struct runner *runner, bool *ret_idle)
{
    *ret_idle = atomic_load_explicit(&runner->idle, memory_order_relaxed);
    return atomic_load_explicit(&runner->beat, memory_order_relaxed);
}

/* ---- the thread ---- */

/* What batching.adaptive does. */
static void publish_width(const struct runner *runner)
{
    struct metrics *metrics = runner->options.metrics;
    uint64_t narrowed, widened;

    metrics_set(metrics, M_STEP_WIDTH, batcher_width(runner->batcher, &narrowed, &widened));
    metrics_set(metrics, M_NARROWED, narrowed);
    metrics_set(metrics, M_WIDENED, widened);
}

static void publish_gauges(struct runner *runner)
{
    struct metrics *metrics = runner->options.metrics;
    struct engine_kv_stats kv;
    struct pressure_stats held;

    engine_kv_stats(runner->engine, &kv);
    metrics_set(metrics, M_KV_USED, kv.used_bytes);
    pressure_stats(runner->pressure, &held);
    metrics_set(metrics, M_KV_UID_MAX, held.most_uid_bytes);
    metrics_set(metrics, M_KV_PARKED, held.parked_bytes);
    metrics_set(metrics, M_PREFIX_BYTES, kv.prefix_bytes);
    metrics_set(metrics, M_KV_BUDGET, kv.budget_bytes);
    metrics_set(metrics, M_STREAMS, runner->n_requests);
    metrics_set(metrics, M_STREAMS_PARKED, batcher_n_parked(runner->batcher));
    metrics_set(metrics, M_RUNNING, batcher_n_running(runner->batcher));
    metrics_set(metrics, M_WAITING, batcher_n_waiting(runner->batcher));
    metrics_set(metrics, M_HELD, batcher_n_held(runner->batcher));
    metrics_set(metrics, M_HELD_EVER, batcher_held_ever(runner->batcher));
    if (runner->options.adaptive_us > 0)
        publish_width(runner);
}

static bool has_work(const struct runner *runner)
{
    return batcher_n_running(runner->batcher) + batcher_n_waiting(runner->batcher) > 0;
}

static void set_busy(struct runner *runner, bool busy, uint64_t now)
{
    if (worktime_set(&runner->worktime, busy, now))
        publish_gauges(runner);
    atomic_store_explicit(&runner->idle, !busy, memory_order_relaxed);
}

static void take_about(struct runner *runner, const struct message *message)
{
    struct request *request = message->subject;

    if (request->handed_back && message->kind != MESSAGE_SUBMIT) {
        outbox_note(runner->outbox, RUNNER_LATE, request);
        return;
    }
    request->messages_taken++;
    if (message->kind == MESSAGE_SUBMIT)
        runner_take(runner, request);
    else if (message->kind == MESSAGE_CANCEL)
        runner_take_cancel(runner, request, message->number);
    else
        runner_take_unpark(runner, request);
}

static void take_inbox(struct runner *runner)
{
    const struct message *messages;
    size_t n = queue_take(runner->inbox, &messages);

    for (size_t i = 0; i < n; i++) {
        void *subject = messages[i].subject;
        switch ((enum message_kind)messages[i].kind) {
        case MESSAGE_SUBMIT:
        case MESSAGE_CANCEL:
        case MESSAGE_UNPARK: take_about(runner, &messages[i]); break;
        case MESSAGE_ADD_MODEL: runner_take_model(runner, subject); break;
        case MESSAGE_REMOVE_MODEL: runner_drop_model(runner, subject); break;
        case MESSAGE_SHRINK_MODEL:
            runner_shrink(runner, subject, (uint64_t)messages[i].number * KEPT_UNIT);
            break;
        case MESSAGE_STOP: runner->stopping = true; break;
        }
    }
}

static void wait_for_work(struct runner *runner, uint64_t now, uint64_t wake_us, bool flushed)
{
    struct pollfd pollfd = {.fd = queue_fd(runner->inbox), .events = POLLIN};
    uint64_t wait_us = wake_us == UINT64_MAX ? UINT64_MAX : wake_us - MIN(wake_us, now);
    struct timespec ts;

    if (!flushed)
        wait_us = MIN(wait_us, 10000u);
    ts = (struct timespec){.tv_sec = (time_t)(wait_us / 1000000u),
                           .tv_nsec = (long)(wait_us % 1000000u) * 1000};
    if (!has_work(runner))
        set_busy(runner, false, now);
    ppoll(&pollfd, 1, wait_us == UINT64_MAX ? NULL : &ts, NULL);
    queue_clear_wakeup(runner->inbox);
}

static void *runner_main(void *argument)
{
    struct runner *runner = argument;

    worktime_begin(&runner->worktime, runner->options.metrics);
    for (;;) {
        uint64_t now, wake_us, sleep_us;
        struct lane *lane;
        atomic_fetch_add_explicit(&runner->beat, 1, memory_order_relaxed);
        take_inbox(runner);
        if (runner->stopping)
            break;
        now = runner_now_us(runner);
        runner_refuse_and_expire(runner, now);
        sleep_us = runner_put_to_sleep(runner, now);
        lane = batcher_pick(runner->batcher, now, &wake_us);
        if (!lane)
            runner->warm_ahead_us = 0;
        if (lane || runner->warming) {
            set_busy(runner, true, now);
            /* Who warms has half of the time while others have work. */
            if (runner->warming && runner->warm_ahead_us == 0)
                runner_warm(runner, now);
            else
                runner_work(runner, lane, now);
            if (!has_work(runner)) /* before those learn of it who ask for the figures then */
                publish_gauges(runner);
            outbox_flush(runner->outbox);
        } else {
            bool flushed;
            publish_gauges(runner);
            flushed = outbox_flush(runner->outbox);
            wait_for_work(runner, now, MIN(wake_us, sleep_us), flushed);
        }
    }
    worktime_end(&runner->worktime);
    return NULL;
}

static int start_thread(struct runner *runner, struct fault *ret_fault)
{
    int r = thread_start(&runner->thread, "hearth-engine", runner_main, runner);

    if (r < 0)
        return fault_set(ret_fault, r, "cannot start the engine thread: %s", strerror(-r));
    return 0;
}

static void runner_done(struct runner *runner)
{
    runner->batcher = batcher_free(runner->batcher);
    runner->engine = engine_free(runner->engine);
    runner->pressure = pressure_free(runner->pressure);
    runner->inbox = queue_free(runner->inbox);
    runner->outbox = outbox_free(runner->outbox);
    runner->scratch = sampler_scratch_free(runner->scratch);
    free(runner);
}

static int new_pressure(struct runner *runner)
{
    struct pressure_options options = {
        .engine = runner->engine,
        .batcher = runner->batcher,
        .metrics = runner->options.metrics,
        .clock = runner->options.clock,
        .per_uid_bytes = runner->options.kv_per_uid_bytes,
        .park_timeout_us = runner->options.park_timeout_us,
        .prefix_cache = runner->options.prefix_cache,
        .share_with_all = runner->options.share_with_all,
    };

    return pressure_new(&options, &runner->pressure);
}

int runner_new(const struct runner_options *options, struct runner **ret_runner,
               struct fault *ret_fault)
{
    struct runner *runner = calloc(1, sizeof(*runner));
    struct batcher_options batching;
    size_t max_messages = options->max_requests * MESSAGES_PER_REQUEST + MESSAGES_OF_MODELS;
    int r;

    if (!runner)
        return fault_set(ret_fault, -ENOMEM, "no memory for the engine thread");
    runner->options = *options;
    runner->options.max_batch = MIN(options->max_batch, ENGINE_MAX_ROWS);
    batching = (struct batcher_options){
        .max_batch = runner->options.max_batch,
        .min_batch = options->min_batch,
        .max_delay_us = options->max_delay_us,
        .chunk_target_us = options->chunk_target_us,
        .max_columns = ENGINE_MAX_COLUMNS,
        .adaptive_us = options->adaptive_us,
        .admit = runner_admit_kv,
        .ready = runner_prefix_ready,
        .grow = runner_grow_kv,
        .userdata = runner,
    };
    atomic_init(&runner->idle, true);
    metrics_set(options->metrics, M_STEP_WIDTH, ENGINE_MAX_COLUMNS);
    r = engine_new(&options->engine, &runner->engine, ret_fault);
    if (r == 0) {
        r = batcher_new(&batching, &runner->batcher);
        if (r == 0)
            r = new_pressure(runner);
        if (r == 0)
            r = queue_new(max_messages, &runner->inbox);
        if (r == 0)
            r = outbox_new(max_messages, &runner->outbox); /* a message has one answer at most */
        if (r < 0)
            fault_set(ret_fault, r, "cannot set up the engine thread: %s", strerror(-r));
    }
    if (r == 0)
        r = start_thread(runner, ret_fault);
    if (r < 0) {
        runner_done(runner);
        return r;
    }
    *ret_runner = runner;
    return 0;
}

/* The thread is gone, wherever it was: nothing is computed any more, and nobody holds anything. */
static void end_all(struct runner *runner)
{
    while (runner->warming)
        runner_warm_abandon(runner, runner->warming);
    for (struct runner_model *rm = runner->models; rm; rm = rm->next)
        if (rm->lane && lane_step_open(rm->lane)) {
            engine_step_abandon(runner->engine, rm->model);
            batcher_abandon(runner->batcher, rm->lane);
        }
    while (runner->lent)
        runner_take_cancel(runner, runner->lent, CODE_SHUTTING_DOWN);
    while (runner->models) {
        struct runner_model *rm = runner->models;

        rm->lane = lane_free(rm->lane);
        engine_forget_prefixes(runner->engine, rm->model);
        runner_model_free(rm);
    }
}

struct runner *runner_free(struct runner *runner)
{
    int r;

    if (!runner)
        return NULL;
    r = send_message(runner, MESSAGE_STOP, NULL, 0);
    assert(r == 0); /* the inbox has room for it */
    (void)r;
    pthread_join(runner->thread, NULL);
    end_all(runner);
    runner_done(runner);
    return NULL;
}
