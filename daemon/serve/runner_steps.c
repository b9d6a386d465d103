#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/runner_internal.h"
#include "lib/cleanup.h"

/* Ids are kept for the whole life of a request; room for so many more at a time. */
#define IDS_GROW 64u

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
        runner_finish(runner, request);
    }
    runner_let_model_go(runner, rm);
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
        runner_finish_with(runner, request, END_STOP);
        return false;
    }
    piece = tokenizer_piece(tokenizer, id);
    r = append_id(request, id);
    if (r == 0)
        r = stream_push(&request->stream, piece.bytes, piece.len);
    if (r < 0) {
        runner_fail_stream(request, r);
        runner_finish(runner, request);
        return false;
    }
    if (r > 0)
        runner_finish_with(runner, request, END_STOP);
    else if (request->n_ids - request->n_prompt >= request->max_tokens)
        runner_finish_with(runner, request, END_LENGTH);
    else if (request->n_ids >= request->runner_model->context_tokens)
        runner_finish_with(runner, request, END_CONTEXT);
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
    runner_finish_with(runner, request, END_STOP);
}

/* What a step gave one of its requests. */
static void take_row(struct runner *runner, struct request *request, struct step_row *row)
{
    const struct model_info *info = model_info(request->runner_model->model);
    uint32_t n_recent;
    int32_t id;

    if (request->reason == END_CANCELLED || request->reason == END_ERROR) {
        runner_finish(runner, request);
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
        runner_finish(runner, request);
        return;
    }
    metrics_add(runner->options.metrics, M_COMPLETION_TOKENS, 1);
    if (!take_token(runner, request, id))
        return;
    runner_pump(runner, request);
    if (!stream_may_run(&request->stream)) {
        metrics_add(runner->options.metrics, M_PARKS, 1);
        batcher_park(runner->batcher, &request->job);
        runner_park(runner, request);
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
    runner_let_model_go(runner, rm);
}

void runner_work(struct runner *runner, struct lane *lane, uint64_t now)
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
    end = runner_now_us(runner);
    batcher_charge(lane, end - now);
    runner->warm_ahead_us -= MIN(runner->warm_ahead_us, end - now);
    rm->step_us += end - now;
    if (!more)
        end_step(runner, rm, batcher_batch(lane));
}
