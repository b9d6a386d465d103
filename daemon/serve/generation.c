#include "daemon/serve/generation.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/serve/answer_order.h"
#include "daemon/serve/asleep.h"
#include "daemon/serve/events.h"
#include "daemon/serve/files.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

/* Texts up to this may be tokenized on the reactor: well below its bound of 0.2 ms a user. */
#define TEXT_ON_REACTOR_BYTES 1024u

/* ---- its beginning ---- */

static int copy_input(struct service *service, struct request *request,
                      const struct request_options *options, struct refusal *refusal)
{
    size_t bytes = options->ids ? 4 * options->n_ids : options->prompt_bytes;

    if (!admission_resize_input(service->admission, request->account, &request->input_bytes, bytes))
        return refusal_input(refusal);
    if (options->ids) {
        request->ids = malloc(MAX(bytes, (size_t)1));
        if (request->ids && bytes > 0)
            memcpy(request->ids, options->ids, bytes);
        request->n_ids = request->n_prompt = request->ids_capacity = (uint32_t)options->n_ids;
    } else {
        request->text = malloc(MAX(bytes, (size_t)1));
        if (request->text && bytes > 0)
            memcpy(request->text, options->prompt, bytes);
        request->text_bytes = bytes;
    }
    if (!request->ids && !request->text)
        return refusal_set(refusal, CODE_NO_MEMORY, NULL, "no memory for the prompt");
    return 0;
}

static uint64_t next_seed(struct service *service)
{
    /* splitmix64's increment and finaliser (Steele, Lea, Flood 2014). */
    uint64_t z = service->seed_state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int fill_request(struct service *service, struct request *request,
                        const struct request_options *options, struct refusal *refusal)
{
    const struct config *config = service->options.config;
    uint64_t credit = options->has_credit ? options->credit : config->streaming.credit;

    request->params = options->params;
    if (!options->has_seed)
        request->params.seed = next_seed(service);
    request->max_tokens = request->kind == REQUEST_EMBED ? 0 : options->max_tokens;
    request->ignore_eos = options->ignore_eos;
    request->keep_alive_us = options->keep_alive_us;
    request->has_fingerprint = options->has_fingerprint;
    request->fingerprint = options->fingerprint;
    request->job.priority = options->priority;
    if (options->deadline_us)
        request->job.deadline_us = request->received_us + options->deadline_us;
    if (options->stops.n > 0) {
        request->stops = malloc(sizeof(*request->stops));
        if (!request->stops)
            return refusal_set(refusal, CODE_NO_MEMORY, NULL, "no memory for the request");
        *request->stops = options->stops;
    }
    stream_init(&request->stream, credit, config->limits.stream_buffer,
                !options->stream || !config->streaming.enabled, options->skip_bytes,
                request->stops);
    return copy_input(service, request, options, refusal);
}

void generation_begin(struct service *service, struct peer *peer, uint64_t id,
                      enum request_kind kind, const struct request_options *options)
{
    const char *name = options->model[0] ? options->model : service->options.config->default_model;
    struct model_entry *entry = files_find_model(service, peer, options, name);
    struct refusal refusal;
    struct request *request;

    if (!options->prompt == !options->ids) {
        refusal_set(&refusal, CODE_BAD_REQUEST, "prompt",
                    "a prompt or ids are needed, one of the two");
        reply_refusal(peer, id, &refusal);
        return;
    }
    request = service_enter(service, peer, id, kind);
    if (!request)
        return;
    answer_order_join(service, request);
    metrics_add(service->options.metrics, M_GENERATIONS, 1);
    if (fill_request(service, request, options, &refusal) < 0) {
        service_refuse(service, peer, id, &refusal);
        service_remove_request(service, request);
    } else if (entry) {
        waiting_want(service, request, entry);
    } else {
        waiting_look(service, request, name);
    }
}

/* ---- on to the engine ---- */

static void reply_ids(const struct request *request)
{
    struct wire_buffer *out;

    if (!request->peer || request->reason == END_ERROR)
        return;
    out = reply_begin(request->peer, WIRE_ITEM, request->key.id);
    wire_put_bytes(out, TAG_IDS, request->ids, request->n_ids * sizeof(int32_t));
    reply_end(request->peer);
}

/* Ends a request that never came to the engine. */
static void end_unstarted(struct service *service, struct request *request)
{
    request->ended_us = service_now_us(service);
    if (request->kind == REQUEST_TOKENIZE)
        reply_ids(request);
    generation_end(service, request);
}

static bool check_ids(struct request *request)
{
    const struct model_info *info = model_info(request->model->model);

    if (request->n_prompt == 0)
        request_fail(request, CODE_BAD_REQUEST, "the prompt has no tokens");
    else if (request->n_prompt > info->context_tokens)
        request_fail(request, CODE_CONTEXT_FULL,
                     "the prompt has %u tokens and the context of %s is %u; shorten it",
                     request->n_prompt, request->model->name, info->context_tokens);
    for (uint32_t i = 0; i < request->n_prompt && request->reason != END_ERROR; i++)
        if (request->ids[i] < 0 || (uint32_t)request->ids[i] >= info->n_vocab)
            request_fail(request, CODE_BAD_REQUEST,
                         "id %d is outside the vocabulary of %s, which has %u tokens",
                         request->ids[i], request->model->name, info->n_vocab);
    return request->reason != END_ERROR;
}

void generation_count_ids(struct service *service, struct request *request)
{
    size_t bytes = request->ids_capacity * sizeof(*request->ids);
    struct refusal refusal;

    if (!request->ids ||
        admission_resize_input(service->admission, request->account, &request->input_bytes, bytes))
        return;
    refusal_input(&refusal);
    request_fail(request, refusal.code, "%s", refusal.sentence);
}

/* The ids are there, or a failure: on to the engine thread, or back to the client. */
static void have_ids(struct service *service, struct request *request)
{
    if (request->expelled)
        request_fail(request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
    generation_count_ids(service, request);
    if (request->cancelled && request->reason != END_ERROR)
        request->reason = END_CANCELLED;
    if (request->reason == END_ERROR || request->reason == END_CANCELLED || !request->peer ||
        request->kind == REQUEST_TOKENIZE || !check_ids(request)) {
        end_unstarted(service, request);
        return;
    }
    request->stage = STAGE_ENGINE;
    request->runner_model = request->model->attachment;
    if (request->submitted_us == 0)
        request->submitted_us = service_now_us(service);
    if (runner_submit(service->runner, request) < 0) {
        request_fail(request, CODE_BUSY, "the engine's queue is full; try again shortly");
        end_unstarted(service, request);
    }
}

void generation_tokenized(void *userdata, struct request *request)
{
    have_ids(userdata, request);
}

/* Short texts are tokenized at once, while the wake-up has time for its user's. */
static bool tokenized_here(struct service *service, struct request *request)
{
    struct text_spent *spent = &request->account->text_spent;

    if (request->text_bytes > TEXT_ON_REACTOR_BYTES)
        return false;
    if (!text_budget_allows(&service->text_budget, spent)) {
        metrics_add(service->options.metrics, M_TEXTS_DEFERRED, 1);
        return false;
    }
    request_tokenize(request, request->model->model, request->kind == REQUEST_TOKENIZE);
    request->submitted_us = service_now_us(service);
    text_budget_spend(&service->text_budget, spent, request->submitted_us - request->ready_us);
    return true;
}

void generation_start(struct service *service, struct request *request)
{
    if (request->ready_us == 0) {
        request->ready_us = service_now_us(service);
        request->model->requests++; /* one that was asleep is none again */
    }
    registry_use(service->registry, request->model, request->job.uid);
    request->stage = STAGE_TOKENIZING;
    if (request->has_fingerprint && request->fingerprint != request->model->fingerprint) {
        request->option = wire_tag_name(TAG_FINGERPRINT);
        request_fail(
            request, CODE_BAD_REQUEST,
            "fingerprint: the model or the daemon has changed since, and what was streamed "
            "before cannot be continued");
        have_ids(service, request);
    } else if (!request->text) {
        have_ids(service, request);
    } else if (tokenized_here(service, request)) {
        have_ids(service, request);
    } else if (text_thread_submit(service->text_thread, request) < 0) {
        request_fail(request, CODE_BUSY, "too many texts wait to be tokenized; try again shortly");
        have_ids(service, request);
    }
}

/* ---- text and credit ---- */

bool generation_text(struct service *service, struct request *request, const char *text, size_t len)
{
    struct metrics *metrics = service->options.metrics;
    struct peer *peer = request->peer;
    bool room = true;

    metrics_add(metrics, M_STREAM_BYTES, len);
    if (peer) {
        bool own =
            reply_tokens(request, text, len, service->options.kernels->name,
                         request->model ? request->model->fingerprint : request->fingerprint);
        metrics_add(metrics, M_FRAMES, own);
        room = peer_unsent(peer) < service->options.config->limits.stream_buffer;
        peer->congested |= !room;
    }
    return stream_delivered(&request->stream, len, room);
}

void generation_unpark(struct service *service, struct request *request)
{
    if (request->stage == STAGE_ENGINE)
        runner_unpark(service->runner, request);
    else if (request->stage == STAGE_ASLEEP)
        asleep_stir(service, request);
}

void generation_credit(struct service *service, struct request *request,
                       const struct request_options *options)
{
    if (stream_grant(&request->stream, options->credit))
        generation_unpark(service, request);
}

/* ---- its end, asked for ---- */

void generation_cancel(struct service *service, struct request *request)
{
    if (request->cancelled)
        return;
    request->cancelled = true;
    if (request->stage == STAGE_ENGINE) {
        runner_cancel(service->runner, request, CODE_CANCELLED);
    } else if (request->stage == STAGE_LOADING) {
        request->reason = END_CANCELLED;
        waiting_end(service, request);
    } else if (request->stage == STAGE_ASLEEP) {
        request->reason = END_CANCELLED;
        asleep_end(service, request);
    }
    /* STAGE_TOKENIZING: have_ids() sees it */
}

void generation_expel(struct service *service, const struct model_entry *entry)
{
    struct request *request, *next;

    HASH_ITER (hh, service->requests, request, next) {
        if (entry && request->model != entry)
            continue;
        /* What waits for the model's next load, stands or is answered runs on nothing. */
        if (request->stage == STAGE_ENGINE && !request->expelled) {
            request->expelled = true;
            runner_cancel(service->runner, request, CODE_SHUTTING_DOWN);
        } else if (request->stage == STAGE_TOKENIZING) {
            request->expelled = true; /* have_ids() sees it */
        } else if (request->stage == STAGE_ASLEEP) {
            request_fail(request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
            asleep_end(service, request);
        }
    }
}

/* ---- endings ---- */

static void count_ending(struct service *service, const struct request *request)
{
    struct metrics *metrics = service->options.metrics;
    uint64_t now = service_now_us(service);

    metrics_add(metrics, request->reason == END_ERROR ? M_GENERATIONS_FAILED : M_GENERATIONS_DONE,
                1);
    metrics_add(metrics, M_CANCELLED, request->reason == END_CANCELLED);
    metrics_observe_us(metrics, M_LATENCY, now - request->received_us);
    if (request->first_token_us)
        metrics_observe_us(metrics, M_FIRST_TOKEN, request->first_token_us - request->received_us);
}

static void reply_vector(const struct request *request)
{
    struct wire_buffer *out;

    if (!request->peer || !request->vector || request->reason == END_ERROR)
        return;
    out = reply_begin(request->peer, WIRE_ITEM, request->key.id);
    wire_put_bytes(out, TAG_VECTOR, request->vector, request->n_vector * sizeof(float));
    reply_end(request->peer);
}

void generation_unuse_model(struct service *service, struct request *request)
{
    struct model_entry *entry = request->model;
    uint32_t n_generated = request->n_ids - request->n_prompt;

    entry->tokens += n_generated - request->n_counted;
    request->n_counted = n_generated;
    request->model = NULL;
    registry_unuse(service->registry, entry, request->job.uid, request->keep_alive_us);
}

void generation_end(struct service *service, struct request *request)
{
    uint64_t fingerprint = request->model ? request->model->fingerprint : request->fingerprint;

    if (request->stage == STAGE_ANSWERED)
        metrics_set(service->options.metrics, M_ANSWERS_KEPT, --service->n_kept);
    else if (request->kind == REQUEST_EMBED)
        reply_vector(request);
    if (answer_order_keep(service, request))
        return;
    if (request->reason == END_ERROR && request->code == CODE_BUSY && request->sentence)
        events_busy(service->events, request->job.uid, request->sentence);
    reply_ended(request, service->options.kernels->name, fingerprint);
    count_ending(service, request);
    service_retire(service, request);
    if (request->model)
        generation_unuse_model(service, request);
    service_release(service, request);
}
