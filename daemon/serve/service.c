#include "daemon/serve/service.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/log.h"
#include "daemon/serve/asleep.h"
#include "daemon/serve/events.h"
#include "daemon/serve/files.h"
#include "daemon/serve/service_internal.h"
#include "daemon/serve/standing.h"
#include "daemon/serve/answer_order.h"
#include "daemon/serve/values.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

/* Texts up to this may be tokenized on the reactor: well below its bound of 0.2 ms a user. */
#define TEXT_ON_REACTOR_BYTES 1024u

/* How often loads are looked after and progress is told. */
#define TICK_US 100000u

/* Changes only when the same request may give other tokens than before. */
#define NUMERICS_VERSION 1u

/* ---- live requests ---- */

struct request *service_find_request(struct service *service, const struct peer *peer, uint64_t id)
{
    struct request_key key = {.connection = peer->number, .id = id};
    struct request *request;

    HASH_FIND(hh, service->requests, &key, sizeof(key), request);
    return request;
}

/* Among the live ones; NULL without memory. */
static struct request *new_request(struct service *service, const struct peer *peer, uint64_t id)
{
    struct request *request = request_new();

    if (!request)
        return NULL;
    request->key.connection = peer->number;
    request->key.id = id;
    HASH_ADD(hh, service->requests, key, sizeof(request->key), request);
    return hash_added(&request->hh) ? request : request_free(request);
}

struct request *service_enter(struct service *service, struct peer *peer, uint64_t id,
                              enum request_kind kind)
{
    struct refusal refusal;
    struct request *request;

    if (admission_enter(service->admission, peer->account, &refusal) < 0) {
        service_refuse(service, peer, id, &refusal);
        return NULL;
    }
    request = new_request(service, peer, id);
    if (!request) {
        admission_leave(service->admission, peer->account);
        reply_error(peer, id, CODE_NO_MEMORY, "no memory for another request");
        return NULL;
    }
    request->peer = peer;
    request->account = peer->account;
    request->kind = kind;
    request->received_us = service_now_us(service);
    request->job.uid = peer->uid;
    service->n_requests++;
    metrics_set(service->options.metrics, M_QUEUE, service_n_requests(service));
    request->peer_next = peer->requests;
    if (peer->requests)
        peer->requests->peer_previous = request;
    peer->requests = request;
    peer->n_requests++;
    return request;
}

static void leave_peer(struct service *service, struct request *request)
{
    struct peer *peer = request->peer;

    if (!peer)
        return;
    answer_order_leave(service, request);
    if (request->peer_previous)
        request->peer_previous->peer_next = request->peer_next;
    else
        peer->requests = request->peer_next;
    if (request->peer_next)
        request->peer_next->peer_previous = request->peer_previous;
    peer->n_requests--;
    request->peer = NULL;
}

static void release_input(struct service *service, struct request *request)
{
    if (request->input_bytes > 0)
        admission_release_input(service->admission, request->account, request->input_bytes);
    request->input_bytes = 0;
}

/* The client's side of it is over: its id is free. What the engine thread still knows stays. */
static void retire(struct service *service, struct request *request)
{
    HASH_DEL(service->requests, request);
    service->n_requests--;
    metrics_set(service->options.metrics, M_QUEUE, service_n_requests(service));
    leave_peer(service, request);
    release_input(service, request);
    admission_leave(service->admission, request->account);
}

/* Frees it, now or with the last answer to messages that came too late for it. */
static void release(struct request *request)
{
    if (request->messages_sent == request->messages_taken + request->late)
        request_free(request);
    else
        request->over = true;
}

void service_remove_request(struct service *service, struct request *request)
{
    if (request->stage == STAGE_LOADING)
        waiting_leave(service, request);
    else if (request->stage == STAGE_STANDING)
        standing_leave(service, request);
    else if (request->stage == STAGE_ANSWERED)
        metrics_set(service->options.metrics, M_ANSWERS_KEPT, --service->n_kept);
    retire(service, request);
    release(request);
}

/* ---- endings ---- */

static uint64_t fingerprint_of(const struct service *service, const struct model_entry *entry)
{
    uint64_t parts[] = {entry->identity.size,
                        (uint64_t)entry->identity.mtime.tv_sec,
                        (uint64_t)entry->identity.mtime.tv_nsec,
                        entry->model ? model_info(entry->model)->header_hash : 0,
                        (uint64_t)service->options.config->engine.kv,
                        NUMERICS_VERSION};
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a, 64 bits */
    const char *variant = service->options.kernels->name;

    for (size_t i = 0; i < sizeof(parts); i++)
        hash = (hash ^ ((const uint8_t *)parts)[i]) * 0x100000001b3u;
    for (; *variant; variant++)
        hash = (hash ^ (uint8_t)*variant) * 0x100000001b3u;
    return hash;
}

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

void service_unuse_model(struct service *service, struct request *request)
{
    struct model_entry *entry = request->model;
    uint32_t n_generated = request->n_ids - request->n_prompt;

    entry->tokens += n_generated - request->n_counted;
    request->n_counted = n_generated;
    request->model = NULL;
    registry_unuse(service->registry, entry, request->job.uid, request->keep_alive_us);
}

/* The request has been with its model (registry_use() was called), or has none: tells how it ended,
 * now or when its turn comes. */
void service_end(struct service *service, struct request *request)
{
    uint64_t fingerprint = request->model ? request->model->fingerprint : request->fingerprint;

    if (request->stage == STAGE_ANSWERED)
        metrics_set(service->options.metrics, M_ANSWERS_KEPT, --service->n_kept);
    else if (request->kind == REQUEST_EMBED)
        reply_vector(request);
    release_input(service, request);
    if (answer_order_keep(service, request))
        return;
    if (request->reason == END_ERROR && request->code == CODE_BUSY && request->sentence)
        events_busy(service->events, request->job.uid, request->sentence);
    reply_ended(request, service->options.kernels->name, fingerprint);
    count_ending(service, request);
    retire(service, request);
    if (request->model)
        service_unuse_model(service, request);
    release(request);
}

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
    service_end(service, request);
}

/* ---- on to the engine ---- */

static bool check_ids(const struct service *service, struct request *request)
{
    const struct model_info *info = model_info(request->model->model);
    (void)service;

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

void service_count_ids(struct service *service, struct request *request)
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
    service_count_ids(service, request);
    if (request->cancelled && request->reason != END_ERROR)
        request->reason = END_CANCELLED;
    if (request->reason == END_ERROR || request->reason == END_CANCELLED || !request->peer ||
        request->kind == REQUEST_TOKENIZE || !check_ids(service, request)) {
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

static void on_tokenized(void *userdata, struct request *request)
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

/* The model is ready. */
void service_start(struct service *service, struct request *request)
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

/* ---- waiting for a model ---- */

void service_refuse(struct service *service, struct peer *peer, uint64_t id,
                    const struct refusal *refusal)
{
    if (refusal->code == CODE_BUSY)
        events_busy(service->events, peer->uid, refusal->sentence);
    reply_refusal(peer, id, refusal);
}

static void on_changed(void *userdata, struct model_entry *entry)
{
    struct service *service = userdata;

    values_touch(service->values);
    if (!entry) {
        waiting_looked(service);
        standing_looked(service);
        return;
    }
    log_write(entry->state == MODEL_FAILED ? LOG_WARNING : LOG_INFO,
              &(struct log_fields){
                  .model = entry->name,
                  .code = entry->state == MODEL_FAILED ? wire_code_name(entry->code) : NULL},
              entry->state == MODEL_FAILED ? "model %s is %s: %s" : "model %s is %s", entry->name,
              model_state_name(entry->state), entry->error);
    events_state(service->events, entry);
    switch (entry->state) {
    case MODEL_READY:
        entry->fingerprint = fingerprint_of(service, entry);
        waiting_ready(service, entry);
        break;
    case MODEL_FAILED: waiting_lost(service, entry, entry->code, entry->error); break;
    case MODEL_COLD:
        if (!entry->again)
            waiting_lost(service, entry, CODE_CANCELLED, "the load was ended by an unload");
        break;
    default: waiting_progress(service, entry);
    }
}

static void on_evicted(void *userdata, const struct eviction *eviction)
{
    struct service *service = userdata;

    events_evicted(service->events, eviction);
}

static void on_predicted(void *userdata, const struct model_entry *entry, bool dry_run)
{
    struct service *service = userdata;

    events_predicted(service->events, entry, dry_run);
}

static int on_attach(void *userdata, struct model_entry *entry)
{
    struct service *service = userdata;
    struct runner_model *rm = NULL;
    int r = runner_add_model(service->runner, entry->model, entry, &rm);

    if (r == 0)
        entry->attachment = rm;
    return r;
}

static void on_detach(void *userdata, struct model_entry *entry)
{
    struct service *service = userdata;
    int r = runner_remove_model(service->runner, entry->attachment);

    assert(r == 0); /* the inbox has room for messages of models */
    (void)r;
}

/* Ends what runs on the model, or on all where it is NULL. */
static void expel(struct service *service, const struct model_entry *entry)
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

static void on_expel(void *userdata, struct model_entry *entry)
{
    entry->deadline_us = UINT64_MAX; /* once */
    expel(userdata, entry);
}

/* ---- admission of generations ---- */

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

static void generation(struct service *service, struct peer *peer, uint64_t id,
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

/* ---- notes to a live request ---- */

static void cancel(struct service *service, struct request *request)
{
    if (request->cancelled)
        return;
    request->cancelled = true;
    if (request->stage == STAGE_ENGINE) {
        runner_cancel(service->runner, request, CODE_CANCELLED);
    } else if (request->stage == STAGE_LOADING && !request_is_order(request->kind)) {
        request->reason = END_CANCELLED;
        waiting_end(service, request);
    } else if (request->stage == STAGE_LOADING || request->stage == STAGE_STANDING) {
        struct wire_buffer *out =
            request->peer ? reply_begin(request->peer, WIRE_DONE, request->key.id) : NULL;
        if (out) {
            wire_put_text(out, TAG_REASON, "cancelled");
            reply_end(request->peer);
        }
        service_remove_request(service, request);
    } else if (request->stage == STAGE_ASLEEP) {
        request->reason = END_CANCELLED;
        asleep_end(service, request);
    }
    /* STAGE_TOKENIZING: have_ids() sees it */
}

/* Its parked stream was granted room. */
static void unpark(struct service *service, struct request *request)
{
    if (request->stage == STAGE_ENGINE)
        runner_unpark(service->runner, request);
    else if (request->stage == STAGE_ASLEEP)
        asleep_stir(service, request);
}

static void credit(struct service *service, struct request *request,
                   const struct request_options *options)
{
    if (stream_grant(&request->stream, options->credit))
        unpark(service, request);
}

void service_peer_refused(struct service *service, uint32_t uid, const struct refusal *refusal)
{
    values_touch(service->values);
    if (refusal->code == CODE_BUSY)
        events_busy(service->events, uid, refusal->sentence);
}

void service_peer_gone(struct service *service, struct peer *peer)
{
    values_touch(service->values);
    registry_leave_files(service->registry, peer);
    while (peer->requests) {
        struct request *request = peer->requests;
        /* From here on it has no peer; nobody has the number of its connection again. */
        if (request->stage == STAGE_LOADING || request->stage == STAGE_STANDING ||
            request->stage == STAGE_ANSWERED) {
            if (request->stage == STAGE_LOADING && !request_is_order(request->kind))
                metrics_add(service->options.metrics, M_CANCELLED, 1);
            service_remove_request(service, request);
            continue;
        }
        leave_peer(service, request);
        if (request->stage == STAGE_ASLEEP) {
            cancel(service, request);
            continue;
        }
        if (request->stage == STAGE_ENGINE && !request->cancelled)
            runner_cancel(service->runner, request, CODE_CANCELLED);
        request->cancelled = true;
    }
}

void service_peer_drained(struct service *service, struct peer *peer)
{
    peer->congested = false;
    for (struct request *r = peer->requests, *next; r; r = next) {
        next = r->peer_next; /* one that was asleep may end */
        if (r->stage == STAGE_STANDING)
            standing_resume(service, r);
        else if (stream_delivered(&r->stream, 0, true))
            unpark(service, r);
    }
}

/* ---- frames ---- */

static bool only_on_main_socket(uint16_t type)
{
    return type == WIRE_COMPLETE || type == WIRE_CHAT || type == WIRE_EMBED ||
           type == WIRE_TOKENIZE;
}

/* May begin a load, or waits for a look. */
static bool loads(uint16_t type)
{
    return type == WIRE_WARM || type == WIRE_SET || type == WIRE_HOLD || type == WIRE_RELOAD;
}

void service_dispatch(struct service *service, struct peer *peer, uint16_t type, uint64_t id,
                      const struct request_options *options)
{
    struct refusal refusal;
    uint32_t uid;

    if (rights_acting_uid(peer, options, &uid, &refusal) < 0) {
        reply_refusal(peer, id, &refusal);
        return;
    }
    if (peer->status_only && only_on_main_socket(type)) {
        reply_error(peer, id, CODE_BAD_REQUEST, "%s is not taken on the status socket",
                    wire_type_name(type));
        return;
    }
    if (service->draining && (only_on_main_socket(type) || loads(type))) {
        reply_error(peer, id, CODE_SHUTTING_DOWN, "the daemon is shutting down");
        return;
    }
    switch (type) {
    case WIRE_NULL:
    case WIRE_PING: reply_done(peer, id); break;
    case WIRE_COMPLETE: generation(service, peer, id, REQUEST_COMPLETE, options); break;
    case WIRE_EMBED: generation(service, peer, id, REQUEST_EMBED, options); break;
    case WIRE_TOKENIZE: generation(service, peer, id, REQUEST_TOKENIZE, options); break;
    case WIRE_MODELS: question_models(service, peer, id, options); break;
    case WIRE_WARM: question_warm(service, peer, id, options); break;
    case WIRE_UNLOAD: question_unload(service, peer, id, options); break;
    case WIRE_STATUS: question_status(service, peer, id); break;
    case WIRE_METRICS: question_metrics(service, peer, id, options); break;
    case WIRE_SET: order_set(service, peer, id, options); break;
    case WIRE_HOLD: standing_hold(service, peer, id, options); break;
    case WIRE_RELOAD: standing_reload(service, peer, id, options); break;
    case WIRE_SUBSCRIBE: standing_subscribe(service, peer, id, options); break;
    case WIRE_CHAT:
        reply_error(peer, id, CODE_BAD_REQUEST, "%s is not in this version", wire_type_name(type));
        break;
    default: reply_error(peer, id, CODE_BAD_REQUEST, "frame type %u is not known", type); break;
    }
}

static int malformed(struct refusal *refusal, const char *sentence)
{
    refusal_set(refusal, CODE_BAD_FRAME, NULL, "%s", sentence);
    return -EBADMSG;
}

/* A note about a live request; about one that has ended it is not an error: they cross. */
static int note_frame(struct service *service, struct peer *peer, const struct wire_header *header,
                      const struct request_options *options)
{
    struct request *request = service_find_request(service, peer, header->id);

    if (!request)
        return 0;
    if (header->type == WIRE_CANCEL)
        cancel(service, request);
    else
        credit(service, request, options);
    return 0;
}

int service_frame(struct service *service, struct peer *peer, const struct wire_header *header,
                  const uint8_t *body, struct refusal *ret_refusal)
{
    struct request_options options;
    int r;

    if (header->id == 0)
        return malformed(ret_refusal, "id 0 is the connection's own; a request has another");
    if ((peer->file_fd >= 0 || peer->file_refused) &&
        files_check(peer, header->type, ret_refusal) < 0)
        return -EBADMSG;
    if (header->type == WIRE_CANCEL || header->type == WIRE_CREDIT) {
        r = admission_parse(header->type, body, header->body_len, &options, ret_refusal);
        if (r == -EBADMSG)
            return malformed(ret_refusal, "an option's length runs past its frame");
        return r < 0 ? 0 : note_frame(service, peer, header, &options);
    }
    values_touch(service->values);
    metrics_add(service->options.metrics, M_REQUESTS, 1);
    metrics_add(service->options.metrics, M_REQUESTS_REUSED, peer->n_requests_ever > 0);
    peer->n_requests_ever++;
    if (peer->n_requests > 0 && service_find_request(service, peer, header->id))
        return malformed(ret_refusal, "the id of a live request was used again");
    if ((header->type == WIRE_NULL || header->type == WIRE_PING) && header->body_len == 0) {
        reply_done(peer, header->id);
        return 0;
    }
    r = admission_parse(header->type, body, header->body_len, &options, ret_refusal);
    if (r == -EBADMSG)
        return malformed(ret_refusal, "an option's length runs past its frame");
    if (r < 0)
        reply_refusal(peer, header->id, ret_refusal);
    else if (!order_waits(service, peer, header, body, &options))
        service_dispatch(service, peer, header->type, header->id, &options);
    return 0;
}

/* ---- news from the other threads ---- */

bool service_text(struct service *service, struct request *request, const char *text, size_t len)
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

static void on_text(struct service *service, struct request *request, const char *text, size_t len)
{
    if (service_text(service, request, text, len))
        runner_unpark(service->runner, request);
}

static void on_late(struct request *request)
{
    request->late++;
    if (request->over)
        release(request);
}

static void on_warmed(struct service *service, struct runner_model *rm)
{
    struct model_entry *entry = runner_model_subject(rm);

    if (runner_model_error(rm)) {
        /* The engine thread must let go of it before its memory may. */
        snprintf(entry->error, sizeof(entry->error), "%s", runner_model_error(rm));
        on_detach(service, entry);
        return;
    }
    registry_warmed(service->registry, entry, NULL);
}

static void on_removed(struct service *service, struct runner_model *rm)
{
    struct model_entry *entry = runner_model_subject(rm);

    entry->attachment = runner_model_free(rm);
    if (entry->state == MODEL_WARMING) {
        char error[FAULT_TEXT_BYTES];
        snprintf(error, sizeof(error), "%s", entry->error);
        registry_warmed(service->registry, entry, error);
    } else {
        registry_detached(service->registry, entry);
    }
}

static void dispatch_outbox(struct service *service)
{
    const struct outbox_batch *batch = outbox_take(runner_outbox(service->runner));

    values_touch(service->values);
    for (size_t i = 0; i < batch->n_events; i++) {
        const struct outbox_event *event = &batch->events[i];
        switch ((enum runner_event)event->kind) {
        case RUNNER_TEXT:
            on_text(service, event->subject, batch->text + event->text_at, event->text_bytes);
            break;
        case RUNNER_ENDED: service_end(service, event->subject); break;
        case RUNNER_ASLEEP: asleep_begin(service, event->subject); break;
        case RUNNER_LATE: on_late(event->subject); break;
        case RUNNER_WARMED: on_warmed(service, event->subject); break;
        case RUNNER_REMOVED: on_removed(service, event->subject); break;
        }
    }
}

static void dispatch_registry(struct service *service)
{
    registry_dispatch(service->registry);
}

static void dispatch_texts(struct service *service)
{
    text_thread_take(service->text_thread, on_tokenized, service);
}

static void dispatch_values(struct service *service)
{
    values_dispatch(service->values);
}

void service_sources(struct service *service, struct service_source ret_sources[SERVICE_SOURCES])
{
    ret_sources[0] =
        (struct service_source){outbox_fd(runner_outbox(service->runner)), dispatch_outbox};
    ret_sources[1] = (struct service_source){registry_fd(service->registry), dispatch_registry};
    ret_sources[2] = (struct service_source){text_thread_fd(service->text_thread), dispatch_texts};
    ret_sources[3] = (struct service_source){values_fd(service->values), dispatch_values};
}

/* ---- time ---- */

void service_tick(struct service *service, uint64_t *ret_next_us)
{
    uint64_t now = service_now_us(service);
    struct model_waiters *waiters, *next;
    bool loading = false;

    waiting_expire(service, now);
    registry_tick(service->registry);
    events_tick(service->events);
    HASH_ITER (hh, service->waiters, waiters, next) {
        loading = true;
        waiting_progress(service, waiters->entry);
    }
    /* Without anybody waiting, once a second is enough for the registry's time limits. */
    *ret_next_us = MIN(service->next_deadline_us, now + (loading ? TICK_US : 10 * TICK_US));
}

void service_reload(struct service *service)
{
    registry_look(service->registry);
}

bool service_alive(struct service *service)
{
    bool idle;
    uint64_t beat = runner_beat(service->runner, &idle);
    bool alive = idle || beat != service->last_beat;

    service->last_beat = beat;
    return alive;
}

/* Whether the model is a reason to stay: at work, kept, or to be kept ready. */
static bool keeps_awake(const struct service *service, const struct model_entry *e)
{
    if (e->pinned || e->holds > 0 || (e->config && e->config->preload == PRELOAD_EAGER))
        return true;
    if (e->state == MODEL_READY)
        return registry_keep_alive_us(service->registry, e) > 0;
    return e->state != MODEL_COLD && e->state != MODEL_FAILED;
}

bool service_idle(const struct service *service)
{
    if (service_n_requests(service) > 0)
        return false;
    for (const struct model_entry *e = registry_first(service->registry); e; e = e->hh.next)
        if (keeps_awake(service, e))
            return false;
    return true;
}

/* ---- ending ---- */

void service_drain(struct service *service)
{
    struct request *request, *next;

    service->draining = true;
    events_daemon(service->events, "draining");
    values_touch(service->values);
    standing_end(service, false);
    HASH_ITER (hh, service->requests, request, next) {
        if (request->stage == STAGE_LOADING)
            waiting_refuse(service, request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
    }
}

void service_expel_all(struct service *service)
{
    standing_end(service, true);
    expel(service, NULL);
}

void service_wake(struct service *service)
{
    text_budget_wake(&service->text_budget);
}

bool service_settle(struct service *service)
{
    return answer_order_settle(service);
}

uint32_t service_n_requests(const struct service *service)
{
    return service->n_requests - service->n_standing;
}

bool service_shut_down(struct service *service)
{
    return registry_shut_down(service->registry);
}

/* ---- life ---- */

static int new_runner(struct service *service, struct fault *ret_fault)
{
    const struct config *config = service->options.config;
    struct runner_options options = {
        .engine = {.kernels = service->options.kernels,
                   .threads = config->engine.threads,
                   .kv_budget_bytes = service->memory.kv_bytes,
                   .kv_f32 = config->engine.kv == KV_F32,
                   .pulse = &service->pulse},
        .max_batch = config->batching.enabled ? config->batching.max_batch : 1,
        .min_batch = config->batching.min_batch,
        .max_delay_us = config->batching.max_delay_us,
        .adaptive_us = config->batching.adaptive_us,
        .chunk_target_us = config->engine.chunk_target_us,
        .kv_per_uid_bytes = service->memory.kv_per_uid_bytes,
        .park_timeout_us = config->streaming.park_timeout_us,
        .prefix_cache = config->engine.prefix_cache,
        .share_with_all = config->engine.prefix_sharing == SHARING_ALL,
        .max_requests = config->limits.queue,
        .metrics = service->options.metrics,
        .clock = service->options.clock,
    };

    return runner_new(&options, &service->runner, ret_fault);
}

static int new_registry(struct service *service, struct fault *ret_fault)
{
    const struct config *config = service->options.config;
    struct registry_options options = {
        .config = config,
        .kernels = service->options.kernels,
        .metrics = service->options.metrics,
        .clock = service->options.clock,
        .pulse = &service->pulse,
        .budget_bytes = service->memory.models_bytes,
        .memory_per_uid_bytes = service->memory.models_per_uid_bytes,
        .names_path = service->options.names_path,
        .history_path = service->options.history_path,
        .ops = {.attach = on_attach,
                .detach = on_detach,
                .expel = on_expel,
                .changed = on_changed,
                .evicted = on_evicted,
                .predicted = on_predicted,
                .userdata = service},
    };

    return registry_new(&options, &service->registry, ret_fault);
}

static void start_eager(struct service *service)
{
    for (struct model_entry *e = registry_first(service->registry); e; e = e->hh.next)
        if (e->config && e->config->preload == PRELOAD_EAGER) {
            e->wanted = true;
            registry_want(service->registry, e, LOAD_PRELOAD, false);
        }
}

int service_new(const struct service_options *options, struct service **ret_service,
                struct fault *ret_fault)
{
    const struct config *config = options->config;
    struct service *service = calloc(1, sizeof(*service));
    int r;

    if (!service)
        return fault_set(ret_fault, -ENOMEM, "no memory for the service");
    service->options = *options;
    service->started_us = service_now_us(service);
    service->memory = config_memory_of(config, config_machine_memory());
    service->next_deadline_us = UINT64_MAX;
    if (getrandom(&service->seed_state, sizeof(service->seed_state), GRND_NONBLOCK) < 0)
        service->seed_state = service->started_us;
    r = admission_new(config, &service->admission);
    if (r == 0)
        r = rights_new(config, &service->rights);
    if (r == 0)
        r = events_new(options->clock, config->limits.stream_buffer, &service->events);
    if (r == 0)
        r = values_new(service, &service->values);
    if (r < 0)
        fault_set(ret_fault, r, "no memory for the service");
    if (r == 0)
        r = text_thread_new(config->limits.queue, &service->text_thread, ret_fault);
    if (r == 0)
        r = new_runner(service, ret_fault);
    if (r == 0)
        r = new_registry(service, ret_fault);
    if (r < 0) {
        service_free(service);
        return r;
    }
    start_eager(service);
    *ret_service = service;
    return 0;
}

struct service *service_free(struct service *service)
{
    struct request *request, *next;

    if (!service)
        return NULL;
    /* The threads first: nobody else knows a request then. */
    service->text_thread = text_thread_free(service->text_thread);
    service->runner = runner_free(service->runner);
    HASH_ITER (hh, service->requests, request, next) {
        HASH_DEL(service->requests, request);
        request_free(request);
    }
    service->registry = registry_free(service->registry);
    service->values = values_free(service->values);
    service->events = events_free(service->events);
    service->rights = rights_free(service->rights);
    service->admission = admission_free(service->admission);
    free(service);
    return NULL;
}

struct admission *service_admission(struct service *service)
{
    return service->admission;
}
