#include <errno.h>
#include <inttypes.h>

#include "daemon/serve/runner_internal.h"
#include "lib/cleanup.h"

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

void runner_park(struct runner *runner, struct request *request)
{
    pressure_unpark(runner->pressure, request);
    pressure_park(runner->pressure, request);
}

bool runner_pump(struct runner *runner, struct request *request)
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
            request->first_token_us = runner_now_us(runner);
        stream_consume(&request->stream, n);
        moved = true;
    }
    if (!request->ended)
        return moved;
    if (request->reason == END_ERROR || request->reason == END_CANCELLED ||
        stream_drained(&request->stream)) {
        request->ended_us = runner_now_us(runner);
        hand_back(runner, request, RUNNER_ENDED);
    } else if (stream_may_run(&request->stream)) {
        return runner_pump(runner, request) || moved; /* room came meanwhile */
    } else {
        runner_park(runner, request); /* it is marked parked: its reader's credit moves it on */
    }
    return moved;
}

void runner_fail_stream(struct request *request, int error)
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

void runner_finish(struct runner *runner, struct request *request)
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
        runner_fail_stream(request, r);
    runner_pump(runner, request);
}

void runner_finish_with(struct runner *runner, struct request *request, enum end_reason reason)
{
    if (request->reason != END_ERROR)
        request->reason = reason;
    runner_finish(runner, request);
}

bool runner_prefix_ready(void *userdata, const struct job *job)
{
    (void)userdata;
    return prefix_wait_over(&job_request((struct job *)job)->prefix_wait);
}

int runner_admit_kv(void *userdata, struct job *job)
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
    request->started_us = runner_now_us(runner);
    if (job->fed > 0) {
        metrics_add(metrics, M_PREFIX_HITS, 1);
        metrics_add(metrics, M_PREFIX_HIT_TOKENS, job->fed);
    }
    return 0;
}

int runner_grow_kv(void *userdata, struct job *job)
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
    runner_finish(runner, request);
}

/* What can be said of the request before it is begun. */
static void set_job(struct runner *runner, struct request *request)
{
    struct job *job = &request->job;

    job->lane = request->runner_model->lane;
    job->known = request->n_ids;
    if (job->arrived_us == 0)
        job->arrived_us = runner_now_us(runner);
    job->most_tokens = request->max_tokens;
    job->least_prompt =
        runner->options.prefix_cache && request->kind == REQUEST_COMPLETE ? 1 : request->n_ids;
}

void runner_take(struct runner *runner, struct request *request)
{
    struct job *job = &request->job;
    int r;

    take_over(runner, request);
    set_job(runner, request);
    r = job->lane ? batcher_add(runner->batcher, job) : -ENOMEM;
    if (r < 0) {
        request_fail(request, CODE_NO_MEMORY, "no memory for another request");
        runner_finish(runner, request);
    } else if (job->deadline_us) {
        job->foreseen = batcher_foresee(job);
        if (foreseen_late(&job->foreseen, job->deadline_us, runner_now_us(runner)))
            fail_late(runner, request);
    }
}

void runner_take_cancel(struct runner *runner, struct request *request, enum wire_code why)
{
    if (why != CODE_CANCELLED)
        request_fail(request, why, "the daemon is shutting down, or its model is unloaded");
    else if (request->reason != END_ERROR)
        request->reason = END_CANCELLED;
    if (request->ended)
        runner_pump(runner, request); /* text that still waited for credit is not wanted any more */
    else if (request->job.chunk == 0)
        runner_finish(runner, request);
    /* else: it is in the open step, whose end finishes it before the next step is composed */
}

void runner_take_unpark(struct runner *runner, struct request *request)
{
    /* Text that comes out now had to wait for credit. */
    metrics_add(runner->options.metrics, M_FRAMES_WAITED, runner_pump(runner, request));
    if (request->handed_back || request->ended)
        return;
    if (stream_may_run(&request->stream)) {
        pressure_unpark(runner->pressure, request);
        batcher_unpark(runner->batcher, &request->job);
    } else if (request->job.state == JOB_PARKED) {
        runner_park(runner, request);
    }
}

void runner_refuse_and_expire(struct runner *runner, uint64_t now)
{
    struct job *job;

    while ((job = batcher_refused(runner->batcher))) {
        if (job_request(job)->reason == END_ERROR) /* noted where it was refused */
            runner_finish(runner, job_request(job));
        else
            fail_late(runner, job_request(job));
    }
    while ((job = batcher_expired(runner->batcher, now))) {
        metrics_add(runner->options.metrics, M_DEADLINE_PASSED, 1);
        request_fail(job_request(job), CODE_DEADLINE, "the deadline passed before the end");
        runner_finish(runner, job_request(job));
    }
}

uint64_t runner_put_to_sleep(struct runner *runner, uint64_t now)
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
