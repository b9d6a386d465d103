#include "daemon/serve/runner.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/queue.h"
#include "daemon/serve/pressure.h"
#include "lib/cleanup.h"
#include "lib/thread.h"

/* How often, while busy, CPU and run-queue delay are read. */
#define ACCOUNT_EVERY_US 100000u

/* Messages of one request that can wait at once: submit, two cancels and one unpark, one unpark
 * from before it fell asleep, with a reserve; and room for those of models. */
#define MESSAGES_PER_REQUEST 6u
#define MESSAGES_OF_MODELS   4096u

/* Ids are kept for the whole life of a request; room for so many more at a time. */
#define IDS_GROW 64u

enum message_kind {
    MESSAGE_SUBMIT,
    MESSAGE_CANCEL,
    MESSAGE_UNPARK,
    MESSAGE_ADD_MODEL,
    MESSAGE_REMOVE_MODEL,
    MESSAGE_STOP,
};

struct runner_model {
    /* Reactor's throughout. */
    struct runner *runner;
    struct runner_model *previous, *next; /* all that are not freed */
    void *subject;
    /* Read by both. */
    struct model *model;
    /* The engine thread's until RUNNER_REMOVED. */
    struct lane *lane;
    uint32_t context_tokens; /* its own, or what the KV budget gives */
    struct step_row *rows;   /* max_batch of them, for the open step */
    uint64_t step_us;        /* of the open step so far */
    uint64_t weight_passes;  /* counted so far */
    uint32_t n_requests;     /* lent and not ended, parked and flushing ones included */
    bool removing;
    bool warming;                    /* RUNNER_WARMED is still to come */
    struct runner_model *warms_next; /* its turn to warm comes after this one's */
    struct step_row warm_row;        /* of its first step, while that is open */
    int32_t warm_id;
    char error[FAULT_TEXT_BYTES];
};

struct runner {
    struct runner_options options;
    struct engine *engine;
    struct batcher *batcher;
    struct pressure *pressure;
    struct queue *inbox;
    struct outbox *outbox;
    struct sampler_scratch *scratch;
    pthread_t thread;
    struct runner_model *models; /* the reactor's */
    bool stopping;
    uint32_t n_requests;
    struct request *lent; /* so many, in no order */
    /* Models whose first step is to be computed, one after the other; and how much more of the
     * engine's time they have had than others' steps, since anybody waits for either. */
    struct runner_model *warming;
    uint64_t warm_ahead_us;
    _Atomic uint64_t beat;
    _Atomic bool idle;

    /* Time at work: where the current stretch began. */
    bool busy;
    uint64_t busy_since_us, cpu_at_us, accounted_us;
    int schedstat_fd;
    uint64_t run_delay_at_ns;
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

/* ---- time at work ---- */

static uint64_t now_us(const struct runner *runner)
{
    return clock_now_us(runner->options.clock);
}

static uint64_t thread_cpu_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

/* Time this thread waited for a CPU, from /proc/thread-self/schedstat (its second number). */
static uint64_t run_delay_ns(const struct runner *runner)
{
    char text[96];
    uint64_t on_cpu, delay;
    ssize_t n;

    if (runner->schedstat_fd < 0)
        return 0;
    n = pread(runner->schedstat_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    return sscanf(text, "%" SCNu64 " %" SCNu64, &on_cpu, &delay) == 2 ? delay : 0;
}

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

static void account_busy(struct runner *runner, uint64_t now)
{
    struct metrics *metrics = runner->options.metrics;
    uint64_t cpu = thread_cpu_us(), delay = run_delay_ns(runner);

    metrics_add(metrics, M_ENGINE_BUSY, now - runner->busy_since_us);
    metrics_add(metrics, M_ENGINE_CPU, cpu - runner->cpu_at_us);
    if (delay > runner->run_delay_at_ns)
        metrics_add(metrics, M_ENGINE_RUN_DELAY, (delay - runner->run_delay_at_ns) / 1000);
    runner->busy_since_us = now;
    runner->cpu_at_us = cpu;
    runner->run_delay_at_ns = delay;
    runner->accounted_us = now;
    publish_gauges(runner);
}

static void set_busy(struct runner *runner, bool busy, uint64_t now)
{
    if (busy == runner->busy) {
        if (busy && now - runner->accounted_us >= ACCOUNT_EVERY_US)
            account_busy(runner, now);
        return;
    }
    if (busy) {
        runner->busy_since_us = now;
        runner->cpu_at_us = thread_cpu_us();
        runner->run_delay_at_ns = run_delay_ns(runner);
        runner->accounted_us = now;
    } else {
        account_busy(runner, now);
    }
    runner->busy = busy;
    atomic_store_explicit(&runner->idle, !busy, memory_order_relaxed);
}

/* ---- requests ---- */

static void take_over(struct runner *runner, struct request *request)
{
    request->handed_back = false;
    request->lent_previous = NULL;
    request->lent_next = runner->lent;
    if (runner->lent)
        runner->lent->lent_previous = request;
    runner->lent = request;
    runner->n_requests++;
    request->runner_model->n_requests++;
}

/* The request is the reactor's from here on. */
static void hand_back(struct runner *runner, struct request *request, enum runner_event event)
{
    pressure_unpark(runner->pressure, request);
    request->handed_back = true;
    if (request->lent_previous)
        request->lent_previous->lent_next = request->lent_next;
    else
        runner->lent = request->lent_next;
    if (request->lent_next)
        request->lent_next->lent_previous = request->lent_previous;
    request->runner_model->n_requests--;
    runner->n_requests--;
    outbox_note(runner->outbox, event, request);
}

/* Its stream has no room: it waits for its reader, from now on. */
static void park(struct runner *runner, struct request *request)
{
    pressure_unpark(runner->pressure, request);
    pressure_park(runner->pressure, request);
}

/* Moves the text that may go into the outbox, and hands the request back when that was all. True:
 * there was text. */
static bool pump(struct runner *runner, struct request *request)
{
    const char *text;
    bool moved = false;
    size_t n;

    while ((n = stream_peek(&request->stream, &text)) > 0) {
        if (outbox_text(runner->outbox, RUNNER_TEXT, request, text, n) < 0) {
            request_fail(request, CODE_NO_MEMORY, "the daemon ran out of memory for the text");
            break;
        }
        if (!request->first_token_us)
            request->first_token_us = now_us(runner);
        stream_consume(&request->stream, n);
        moved = true;
    }
    if (!request->ended)
        return moved;
    if (request->reason == END_ERROR || request->reason == END_CANCELLED ||
        stream_drained(&request->stream)) {
        request->ended_us = now_us(runner);
        hand_back(runner, request, RUNNER_ENDED);
    } else if (stream_may_run(&request->stream)) {
        return pump(runner, request) || moved; /* room came meanwhile */
    } else {
        park(runner, request); /* it is marked parked: its reader's credit moves it on */
    }
    return moved;
}

/* The stream could not take a text: -ENOMEM or -EILSEQ. */
static void fail_stream(struct request *request, int error)
{
    if (error == -EILSEQ) {
        request->option = wire_tag_name(TAG_SKIP_BYTES);
        request_fail(request, CODE_BAD_REQUEST,
                     "skip_bytes: the text has no character that ends there; give the number of "
                     "bytes of whole characters that came");
    } else {
        request_fail(request, CODE_NO_MEMORY, "the daemon ran out of memory for the text");
    }
}

/* Nothing more is computed for the request. */
static void finish(struct runner *runner, struct request *request)
{
    int r;

    if (request->ended)
        return;
    request->ended = true;
    batcher_remove(runner->batcher, &request->job);
    pressure_end(runner->pressure, request);
    if (request->reason == END_CANCELLED || request->reason == END_ERROR)
        stream_cut(&request->stream);
    r = stream_finish(&request->stream);
    if (r < 0)
        fail_stream(request, r);
    pump(runner, request);
}

static void finish_with(struct runner *runner, struct request *request, enum end_reason reason)
{
    if (request->reason != END_ERROR)
        request->reason = reason;
    finish(runner, request);
}

static bool prefix_ready(void *userdata, const struct job *job)
{
    (void)userdata;
    return prefix_wait_over(&job_request((struct job *)job)->prefix_wait);
}

static int admit_kv(void *userdata, struct job *job)
{
    struct runner *runner = userdata;
    struct request *request = job_request(job);
    struct metrics *metrics = runner->options.metrics;
    int r = pressure_begin(runner->pressure, request, request->runner_model->model);

    if (r == -ENOSPC)
        request_fail(request, CODE_NO_MEMORY,
                     "a prompt of %u tokens needs more KV memory than there is in all; shorten it "
                     "or raise engine.kv_budget",
                     request->n_prompt);
    else if (r < 0 && r != -EAGAIN && r != -EBUSY && r != -EDQUOT)
        request_fail(request, CODE_NO_MEMORY, "no memory for another sequence");
    if (r < 0 || request->started_us)
        return r;
    request->started_us = now_us(runner);
    if (job->fed > 0) {
        metrics_add(metrics, M_PREFIX_HITS, 1);
        metrics_add(metrics, M_PREFIX_HIT_TOKENS, job->fed);
    }
    return 0;
}

static int grow_kv(void *userdata, struct job *job)
{
    struct runner *runner = userdata;

    return pressure_grow(runner->pressure, job_request(job));
}

/* The deadline cannot be met by what is foreseen. */
static void fail_late(struct runner *runner, struct request *request)
{
    const struct foreseen *foreseen = &request->job.foreseen;
    uint64_t deadline_us = request->job.deadline_us - request->received_us;

    metrics_add(runner->options.metrics, M_DEADLINE_FORESEEN, 1);
    request_fail(request, CODE_DEADLINE,
                 "the deadline of %" PRIu64 " us cannot be met: work before it takes %" PRIu64
                 " us at least and its first token %" PRIu64
                 " us more; allow more time, or ask when less is waiting",
                 deadline_us, foreseen->wait_us, foreseen->own_us);
    finish(runner, request);
}

/* What can be said of the request before it is begun. */
static void set_job(struct runner *runner, struct request *request)
{
    struct job *job = &request->job;

    job->lane = request->runner_model->lane;
    job->known = request->n_ids;
    if (job->arrived_us == 0)
        job->arrived_us = now_us(runner);
    job->most_tokens = request->max_tokens;
    job->least_prompt =
        runner->options.prefix_cache && request->kind == REQUEST_COMPLETE ? 1 : request->n_ids;
}

static void take_submit(struct runner *runner, struct request *request)
{
    struct job *job = &request->job;
    int r;

    take_over(runner, request);
    set_job(runner, request);
    r = job->lane ? batcher_add(runner->batcher, job, now_us(runner)) : -ENOMEM;
    if (r < 0) {
        request_fail(request, CODE_NO_MEMORY, "no memory for another request");
        finish(runner, request);
    } else if (job->deadline_us) {
        job->foreseen = batcher_foresee(job);
        if (foreseen_late(&job->foreseen, job->deadline_us, now_us(runner)))
            fail_late(runner, request);
    }
}

static void take_cancel(struct runner *runner, struct request *request, enum wire_code why)
{
    if (why != CODE_CANCELLED)
        request_fail(request, why, "the daemon is shutting down, or its model is unloaded");
    else if (request->reason != END_ERROR)
        request->reason = END_CANCELLED;
    if (request->ended)
        pump(runner, request); /* text that still waited for credit is not wanted any more */
    else if (request->job.chunk == 0)
        finish(runner, request);
    /* else: it is in the open step, whose end finishes it before the next step is composed */
}

static void take_unpark(struct runner *runner, struct request *request)
{
    /* Text that comes out now had to wait for credit. */
    metrics_add(runner->options.metrics, M_FRAMES_WAITED, pump(runner, request));
    if (request->handed_back || request->ended)
        return;
    if (stream_may_run(&request->stream)) {
        pressure_unpark(runner->pressure, request);
        batcher_unpark(runner->batcher, &request->job, now_us(runner));
    } else if (request->job.state == JOB_PARKED) {
        park(runner, request);
    }
}

/* ---- models ---- */

static void remove_if_empty(struct runner *runner, struct runner_model *rm)
{
    if (!rm->removing || rm->n_requests > 0 || (rm->lane && lane_step_open(rm->lane)))
        return;
    rm->lane = lane_free(rm->lane);
    engine_forget_prefixes(runner->engine, rm->model);
    rm->removing = false;
    outbox_note(runner->outbox, RUNNER_REMOVED, rm);
}

/* Its first step is over, or there will be none; and so it is with the memory it had. */
static void warm_end(struct runner *runner, struct runner_model *rm, int r)
{
    struct runner_model **at = &runner->warming;

    while (*at != rm)
        at = &(*at)->warms_next;
    *at = rm->warms_next;
    rm->warming = false;
    if (rm->warm_row.sequence) {
        rm->warm_row.sequence = sequence_free(rm->warm_row.sequence);
        batcher_room_came(runner->batcher);
    }
    if (r == -ENOSPC)
        snprintf(rm->error, sizeof(rm->error),
                 "one page of its KV cache is larger than engine.kv_budget; raise the budget");
    else if (r < 0)
        snprintf(rm->error, sizeof(rm->error), "its first step failed: %s", strerror(-r));
    outbox_note(runner->outbox, RUNNER_WARMED, rm);
}

/* Nobody wants its first step any more. */
static void warm_abandon(struct runner *runner, struct runner_model *rm)
{
    if (rm->warm_row.sequence)
        engine_step_abandon(runner->engine, rm->model);
    warm_end(runner, rm, 0);
}

/* One token through the model: touches every weight once and shows that it computes. Where there is
 * no memory for that, warm_end() has been called. */
static bool warm_begin(struct runner *runner, struct runner_model *rm)
{
    int32_t bos = tokenizer_bos(model_tokenizer(rm->model));
    int r;

    rm->warm_id = bos >= 0 ? bos : 0;
    rm->warm_row = (struct step_row){.tokens = &rm->warm_id, .n_tokens = 1, .wants = ROW_LOGITS};
    r = sequence_new(runner->engine, rm->model, 1, &rm->warm_row.sequence);
    if (r == 0)
        r = engine_step_begin(runner->engine, rm->model, &rm->warm_row, 1);
    if (r < 0) /* -EAGAIN: KV memory is all in use, and the first request shows it */
        warm_end(runner, rm, r == -EAGAIN ? 0 : r);
    return r == 0;
}

/* The next slice of the first step of the model whose turn it is. */
static void warm(struct runner *runner, uint64_t now)
{
    struct runner_model *rm = runner->warming;

    if (!rm->warm_row.sequence && !warm_begin(runner, rm))
        return;
    if (engine_step_slice(runner->engine, rm->model) == 0) {
        engine_step_end(runner->engine, rm->model);
        warm_end(runner, rm, 0);
    }
    runner->warm_ahead_us += now_us(runner) - now;
}

static void take_add_model(struct runner *runner, struct runner_model *rm)
{
    struct runner_model **at = &runner->warming;
    int r = lane_new(runner->batcher, rm, &rm->lane);

    rm->context_tokens = engine_context_tokens(runner->engine, rm->model);
    while (*at)
        at = &(*at)->warms_next;
    *at = rm;
    rm->warming = true;
    if (r < 0)
        warm_end(runner, rm, r);
}

static void take_remove_model(struct runner *runner, struct runner_model *rm)
{
    if (rm->warming)
        warm_abandon(runner, rm);
    rm->removing = true;
    remove_if_empty(runner, rm);
}

/* ---- steps ---- */

/* Of `n` tokens from `from` on, those below `end`. */
static uint32_t below(uint32_t from, uint32_t n, uint32_t end)
{
    return from < end ? MIN(n, end - from) : 0;
}

/* The engine's rows of the batch; how many of their columns are a prompt's, and how many were
 * computed before. */
static void fill_rows(struct runner_model *rm, const struct batch *batch, uint64_t *ret_n_prompt,
                      uint64_t *ret_n_again)
{
    uint64_t n_prompt = 0, n_again = 0;

    for (uint32_t i = 0; i < batch->n_jobs; i++) {
        struct job *job = batch->jobs[i];
        struct request *request = job_request(job);
        bool last = job->fed + job->chunk == job->known;
        rm->rows[i] = (struct step_row){
            .sequence = request->sequence,
            .tokens = request->ids + job->fed,
            .n_tokens = job->chunk,
            .wants = request->kind == REQUEST_EMBED ? ROW_POOLED
                     : last                         ? ROW_LOGITS
                                                    : ROW_NOTHING,
        };
        uint32_t again = below(job->fed, job->chunk, request->kv.n_computed);
        n_again += again;
        n_prompt += below(job->fed + again, job->chunk - again, request->n_prompt);
    }
    *ret_n_prompt = n_prompt;
    *ret_n_again = n_again;
}

/* The engine does not take the step: the requests that it says are why end, and the others are in
 * the next. */
static void fail_step(struct runner *runner, struct runner_model *rm, const struct batch *batch,
                      int error)
{
    bool named = false;

    batcher_abandon(runner->batcher, rm->lane);
    for (uint32_t i = 0; i < batch->n_jobs; i++)
        named |= rm->rows[i].error < 0;
    for (uint32_t i = 0; i < batch->n_jobs; i++) {
        struct request *request = job_request(batch->jobs[i]);
        if (named && rm->rows[i].error == 0)
            continue;
        request_fail(request, CODE_INTERNAL, "the engine could not begin a step: %s",
                     strerror(-error));
        finish(runner, request);
    }
    remove_if_empty(runner, rm);
}

static const enum metric_id reason_metric[_BATCH_REASON_MAX] = {
    [BATCH_IDLE] = M_STEPS_IDLE,           [BATCH_GATHERED] = M_STEPS_GATHERED,
    [BATCH_CONTINUED] = M_STEPS_CONTINUED, [BATCH_FULL] = M_STEPS_FULL,
    [BATCH_MIN_BATCH] = M_STEPS_MIN_BATCH, [BATCH_MAX_DELAY] = M_STEPS_MAX_DELAY,
    [BATCH_DEADLINE] = M_STEPS_DEADLINE,
};

static int begin_step(struct runner *runner, struct runner_model *rm, const struct batch *batch)
{
    struct metrics *metrics = runner->options.metrics;
    uint64_t n_prompt, n_again;
    int r;

    fill_rows(rm, batch, &n_prompt, &n_again);
    r = engine_step_begin(runner->engine, rm->model, rm->rows, batch->n_jobs);
    if (r < 0) {
        fail_step(runner, rm, batch, r);
        return r;
    }
    rm->step_us = 0;
    metrics_add(metrics, M_STEPS, 1);
    metrics_add(metrics, reason_metric[batch->reason], 1);
    metrics_add(metrics, M_STEP_ROWS, batch->n_jobs);
    metrics_add(metrics, M_STEP_RUNNABLE, batch->n_runnable);
    metrics_add(metrics, M_STEP_COLUMNS, batch->n_columns);
    metrics_add(metrics, M_PROMPT_TOKENS, n_prompt);
    metrics_add(metrics, M_RECOMPUTED_TOKENS, n_again);
    if (batch->n_jobs > metrics_get(metrics, M_STEP_ROWS_MAX))
        metrics_set(metrics, M_STEP_ROWS_MAX, batch->n_jobs);
    return 0;
}

static int append_id(struct request *request, int32_t id)
{
    if (request->n_ids == request->ids_capacity) {
        int32_t *ids = reallocarray(request->ids, request->ids_capacity + IDS_GROW, sizeof(*ids));
        if (!ids)
            return -ENOMEM;
        request->ids = ids;
        request->ids_capacity += IDS_GROW;
    }
    request->ids[request->n_ids++] = id;
    request->job.known++;
    return 0;
}

/* Takes in the token that was sampled: true when the request goes on. */
static bool take_token(struct runner *runner, struct request *request, int32_t id)
{
    const struct model *model = request->runner_model->model;
    const struct tokenizer *tokenizer = model_tokenizer(model);
    struct gguf_string piece;
    int r;

    if (!request->ignore_eos && tokenizer_is_end(tokenizer, id)) {
        finish_with(runner, request, END_STOP);
        return false;
    }
    piece = tokenizer_piece(tokenizer, id);
    r = append_id(request, id);
    if (r == 0)
        r = stream_push(&request->stream, piece.bytes, piece.len);
    if (r < 0) {
        fail_stream(request, r);
        finish(runner, request);
        return false;
    }
    if (r > 0)
        finish_with(runner, request, END_STOP);
    else if (request->n_ids - request->n_prompt >= request->max_tokens)
        finish_with(runner, request, END_LENGTH);
    else if (request->n_ids >= request->runner_model->context_tokens)
        finish_with(runner, request, END_CONTEXT);
    return !request->ended;
}

static void take_vector(struct runner *runner, struct request *request, const float *values)
{
    uint32_t n = model_info(request->runner_model->model)->n_embd;

    request->vector = malloc(n * sizeof(float));
    if (request->vector) {
        memcpy(request->vector, values, n * sizeof(float));
        request->n_vector = n;
    } else {
        request_fail(request, CODE_NO_MEMORY, "the daemon ran out of memory for the vector");
    }
    finish_with(runner, request, END_STOP);
}

/* What a step gave one of its requests. */
static void take_row(struct runner *runner, struct request *request, struct step_row *row)
{
    const struct model_info *info = model_info(request->runner_model->model);
    uint32_t n_recent;
    int32_t id;

    if (request->reason == END_CANCELLED || request->reason == END_ERROR) {
        finish(runner, request);
        return;
    }
    if (request->job.fed < request->job.known)
        return; /* a prompt's middle */
    if (request->kind == REQUEST_EMBED) {
        take_vector(runner, request, row->ret_values);
        return;
    }
    n_recent = MIN(request->n_ids, SAMPLER_PENALTY_WINDOW);
    id = sampler_pick(&request->params, engine_kernels(runner->engine), row->ret_values,
                      info->n_vocab, request->ids + request->n_ids - n_recent, n_recent,
                      request->n_ids, &runner->scratch);
    if (id < 0) {
        request_fail(request, CODE_NO_MEMORY, "the daemon ran out of memory for sampling");
        finish(runner, request);
        return;
    }
    metrics_add(runner->options.metrics, M_COMPLETION_TOKENS, 1);
    if (!take_token(runner, request, id))
        return;
    pump(runner, request);
    if (!stream_may_run(&request->stream)) {
        metrics_add(runner->options.metrics, M_PARKS, 1);
        batcher_park(runner->batcher, &request->job);
        park(runner, request);
    }
}

static void end_step(struct runner *runner, struct runner_model *rm, const struct batch *batch)
{
    struct engine_step_stats stats;

    engine_step_end(runner->engine, rm->model);
    model_step_stats(rm->model, &stats);
    metrics_add(runner->options.metrics, M_WEIGHT_PASSES, stats.weight_passes - rm->weight_passes);
    rm->weight_passes = stats.weight_passes;
    batcher_close(runner->batcher, rm->lane, rm->step_us);
    for (uint32_t i = 0; i < batch->n_jobs; i++)
        take_row(runner, job_request(batch->jobs[i]), &rm->rows[i]);
    pressure_step_over(runner->pressure);
    remove_if_empty(runner, rm);
}

static void refuse_and_expire(struct runner *runner, uint64_t now)
{
    struct job *job;

    while ((job = batcher_refused(runner->batcher))) {
        if (job_request(job)->reason == END_ERROR) /* noted where it was refused */
            finish(runner, job_request(job));
        else
            fail_late(runner, job_request(job));
    }
    while ((job = batcher_expired(runner->batcher, now))) {
        metrics_add(runner->options.metrics, M_DEADLINE_PASSED, 1);
        request_fail(job_request(job), CODE_DEADLINE, "the deadline passed before the end");
        finish(runner, job_request(job));
    }
}

/* Hands back those whose readers have been away for long; when there may be one next. */
static uint64_t put_to_sleep(struct runner *runner, uint64_t now)
{
    struct request *request;
    uint64_t next_us;

    while ((request = pressure_overdue(runner->pressure, now, &next_us))) {
        pressure_end(runner->pressure, request);
        batcher_remove(runner->batcher, &request->job);
        hand_back(runner, request, RUNNER_ASLEEP);
    }
    return next_us;
}

/* One slice of the lane's step, which is composed and begun where none is open. */
static void work(struct runner *runner, struct lane *lane, uint64_t now)
{
    struct runner_model *rm = lane_subject(lane);
    const struct batch *batch;
    uint64_t end;
    bool more;

    if (!lane_step_open(lane)) {
        if (!batcher_compose(runner->batcher, lane, now, &batch))
            return;
        if (begin_step(runner, rm, batch) < 0)
            return;
    }
    more = engine_step_slice(runner->engine, rm->model) > 0;
    end = now_us(runner);
    batcher_charge(runner->batcher, lane, end - now);
    runner->warm_ahead_us -= MIN(runner->warm_ahead_us, end - now);
    rm->step_us += end - now;
    if (!more)
        end_step(runner, rm, batcher_batch(lane));
}

/* ---- the thread ---- */

static void take_about(struct runner *runner, const struct message *message)
{
    struct request *request = message->subject;

    if (request->handed_back && message->kind != MESSAGE_SUBMIT) {
        outbox_note(runner->outbox, RUNNER_LATE, request);
        return;
    }
    request->messages_taken++;
    if (message->kind == MESSAGE_SUBMIT)
        take_submit(runner, request);
    else if (message->kind == MESSAGE_CANCEL)
        take_cancel(runner, request, message->number);
    else
        take_unpark(runner, request);
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
        case MESSAGE_ADD_MODEL: take_add_model(runner, subject); break;
        case MESSAGE_REMOVE_MODEL: take_remove_model(runner, subject); break;
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
    if (batcher_n_running(runner->batcher) + batcher_n_waiting(runner->batcher) == 0)
        set_busy(runner, false, now);
    ppoll(&pollfd, 1, wait_us == UINT64_MAX ? NULL : &ts, NULL);
    queue_clear_wakeup(runner->inbox);
}

static void *runner_main(void *argument)
{
    struct runner *runner = argument;

    runner->schedstat_fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    for (;;) {
        uint64_t now, wake_us, sleep_us;
        struct lane *lane;
        atomic_fetch_add_explicit(&runner->beat, 1, memory_order_relaxed);
        take_inbox(runner);
        if (runner->stopping)
            break;
        now = now_us(runner);
        refuse_and_expire(runner, now);
        sleep_us = put_to_sleep(runner, now);
        lane = batcher_pick(runner->batcher, now, &wake_us);
        if (!lane)
            runner->warm_ahead_us = 0;
        if (lane || runner->warming) {
            set_busy(runner, true, now);
            /* Who warms has half of the time while others have work. */
            if (runner->warming && runner->warm_ahead_us == 0)
                warm(runner, now);
            else
                work(runner, lane, now);
            outbox_flush(runner->outbox);
        } else {
            bool flushed;
            publish_gauges(runner);
            flushed = outbox_flush(runner->outbox);
            wait_for_work(runner, now, MIN(wake_us, sleep_us), flushed);
        }
    }
    if (runner->schedstat_fd >= 0)
        close(runner->schedstat_fd);
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
        .admit = admit_kv,
        .ready = prefix_ready,
        .grow = grow_kv,
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
        warm_abandon(runner, runner->warming);
    for (struct runner_model *rm = runner->models; rm; rm = rm->next)
        if (rm->lane && lane_step_open(rm->lane)) {
            engine_step_abandon(runner->engine, rm->model);
            batcher_abandon(runner->batcher, rm->lane);
        }
    while (runner->lent)
        take_cancel(runner, runner->lent, CODE_SHUTTING_DOWN);
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
