#include "daemon/serve/service.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/log.h"
#include "daemon/serve/answer_order.h"
#include "daemon/serve/asleep.h"
#include "daemon/serve/events.h"
#include "daemon/serve/generation.h"
#include "daemon/serve/standing.h"
#include "daemon/serve/values.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

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

void service_refuse(struct service *service, struct peer *peer, uint64_t id,
                    const struct refusal *refusal)
{
    if (refusal->code == CODE_BUSY)
        events_busy(service->events, peer->uid, refusal->sentence);
    reply_refusal(peer, id, refusal);
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

void service_release_input(struct service *service, struct request *request)
{
    if (request->input_bytes > 0)
        admission_release_input(service->admission, request->account, request->input_bytes);
    request->input_bytes = 0;
}

void service_retire(struct service *service, struct request *request)
{
    HASH_DEL(service->requests, request);
    metrics_set(service->options.metrics, M_QUEUE, service_n_requests(service));
    leave_peer(service, request);
    service_release_input(service, request);
    admission_leave(service->admission, request->account);
}

/* Among those that wait for RUNNER_LATE; no client has it in its list any more. */
static void keep_over(struct service *service, struct request *request)
{
    if (request->over)
        return;
    request->over = true;
    request->peer_previous = NULL;
    request->peer_next = service->over;
    if (service->over)
        service->over->peer_previous = request;
    service->over = request;
}

static void leave_over(struct service *service, struct request *request)
{
    if (request->peer_previous)
        request->peer_previous->peer_next = request->peer_next;
    else
        service->over = request->peer_next;
    if (request->peer_next)
        request->peer_next->peer_previous = request->peer_previous;
}

void service_release(struct service *service, struct request *request)
{
    bool known = request->messages_sent != request->messages_taken + request->late;

    if (known) {
        keep_over(service, request);
        return;
    }
    if (request->over)
        leave_over(service, request);
    request_free(request);
}

void service_remove_request(struct service *service, struct request *request)
{
    if (request->stage == STAGE_LOADING)
        waiting_leave(service, request);
    else if (request->stage == STAGE_STANDING)
        standing_leave(service, request);
    else if (request->stage == STAGE_ANSWERED)
        metrics_set(service->options.metrics, M_ANSWERS_KEPT, --service->n_kept);
    service_retire(service, request);
    service_release(service, request);
}

/* ---- what the registry tells ---- */

/* What a stream that is continued elsewhere or later must find again. */
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

static void on_expel(void *userdata, struct model_entry *entry)
{
    entry->deadline_us = UINT64_MAX; /* once */
    generation_expel(userdata, entry);
}

static void on_shrink(void *userdata, struct model_entry *entry, uint64_t kept_bytes)
{
    struct service *service = userdata;

    runner_shrink_model(service->runner, entry->attachment, kept_bytes);
}

/* ---- peers ---- */

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
        generation_cancel(service, request);
    }
}

void service_peer_drained(struct service *service, struct peer *peer)
{
    struct request *request = peer->requests, *next;

    peer->congested = false;
    for (; request; request = next) {
        uint64_t next_id = request->peer_next ? request->peer_next->key.id : 0;
        bool wakes = request->stage == STAGE_ASLEEP;
        next = request->peer_next;
        if (request->stage == STAGE_STANDING)
            standing_resume(service, request);
        else if (stream_delivered(&request->stream, 0, true))
            generation_unpark(service, request);
        /* Where the model of one that wakes cannot be had, all that wait for it have ended. Then
         * from the beginning, at most once for each that has: who was told is not parked any more.
         */
        if (wakes && next && service_find_request(service, peer, next_id) != next)
            next = peer->requests;
    }
}

/* ---- news from the other threads ---- */

static void on_text(struct service *service, struct request *request, const char *text, size_t len)
{
    if (generation_text(service, request, text, len))
        runner_unpark(service->runner, request);
}

static void on_late(struct service *service, struct request *request)
{
    request->late++;
    if (request->over)
        service_release(service, request);
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
        case RUNNER_ENDED: generation_end(service, event->subject); break;
        case RUNNER_ASLEEP: asleep_begin(service, event->subject); break;
        case RUNNER_LATE: on_late(service, event->subject); break;
        case RUNNER_WARMED: on_warmed(service, event->subject); break;
        case RUNNER_REMOVED: on_removed(service, event->subject); break;
        case RUNNER_SHRUNK: registry_shrunk(service->registry); break;
        }
    }
}

static void dispatch_registry(struct service *service)
{
    registry_dispatch(service->registry);
}

static void dispatch_texts(struct service *service)
{
    text_thread_take(service->text_thread, generation_tokenized, service);
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

void service_tick(struct service *service)
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
    service->tick_due_us = now + (loading ? TICK_US : 10 * TICK_US);
}

uint64_t service_due_us(const struct service *service)
{
    uint64_t due_us = MIN(service->tick_due_us, service->next_deadline_us);

    return MIN(due_us, registry_due_us(service->registry));
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
    generation_expel(service, NULL);
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
    return HASH_COUNT(service->requests) - service->n_standing;
}

bool service_shut_down(struct service *service)
{
    return registry_shut_down(service->registry);
}

/* ---- what is said of it ---- */

const char *service_state(const struct service *service)
{
    return service->draining ? "draining" : "running";
}

void service_write_summary(struct service *service, FILE *out)
{
    fprintf(out, "%" PRIu64 " of %zu models ready, %u connections, %u requests",
            metrics_get(service->options.metrics, M_MODELS_READY),
            registry_n_models(service->registry), admission_n_connections(service->admission),
            service_n_requests(service));
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
                .shrink = on_shrink,
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
    for (request = service->over; request; request = next) {
        next = request->peer_next;
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
