#include "daemon/serve/standing.h"

#include <errno.h>
#include <string.h>

#include "daemon/serve/events.h"
#include "daemon/serve/orders.h"
#include "daemon/serve/values.h"

/* Subscriptions of a user at once: to events, which share their memory, and to values, each of
 * which costs copies of every push; and subscriptions to values of all. */
#define EVENTS_PER_UID 64u
#define VALUES_PER_UID 8u
#define VALUES_IN_ALL  64u

/* From now on the request stands. */
static struct request *stand(struct service *service, struct peer *peer, uint64_t id,
                             enum request_kind kind, uint32_t uid)
{
    struct request *request = service_enter(service, peer, id, kind);

    if (!request)
        return NULL;
    request->job.uid = uid;
    request->stage = STAGE_STANDING;
    request->model_next = service->standing;
    if (service->standing)
        service->standing->model_previous = request;
    service->standing = request;
    service->n_standing++;
    metrics_set(service->options.metrics, M_QUEUE, service_n_requests(service));
    return request;
}

void standing_leave(struct service *service, struct request *request)
{
    if (request->model_previous)
        request->model_previous->model_next = request->model_next;
    else
        service->standing = request->model_next;
    if (request->model_next)
        request->model_next->model_previous = request->model_previous;
    service->n_standing--;
    if (request->kind == REQUEST_HOLD && request->model)
        registry_release(service->registry, request->model, request->job.uid);
    else if (request->reader && request->values)
        values_unsubscribe(service->values, request);
    else if (request->reader)
        events_unsubscribe(service->events, request);
}

static void end_with(struct service *service, struct request *request, enum wire_code code,
                     const char *sentence)
{
    reply_error(request->peer, request->key.id, code, "%s", sentence);
    service_remove_request(service, request);
}

/* ---- holds ---- */

void standing_refuse(struct service *service, struct peer *peer, uint64_t id, int r,
                     const struct fault *fault)
{
    struct refusal refusal;

    if (r == -EDQUOT || r == -EBUSY)
        refusal_busy(&refusal, STANDING_RETRY_US, "%s", fault->text);
    else
        refusal_set(&refusal, CODE_NO_MEMORY, NULL, "%s", fault->text);
    service_refuse(service, peer, id, &refusal);
}

static void reply_held(const struct request *request)
{
    const struct model_entry *entry = request->model;
    struct wire_buffer *out = reply_begin(request->peer, WIRE_ITEM, request->key.id);

    wire_put_text(out, TAG_MODEL, entry->name);
    wire_put_text(out, TAG_STATE, model_state_name(entry->state));
    wire_put_number(out, TAG_HOLDS, entry->holds);
    reply_end(request->peer);
}

void standing_hold(struct service *service, struct peer *peer, uint64_t id,
                   const struct request_options *options)
{
    uint32_t uid;
    struct model_entry *entry = order_named_model(service, peer, id, options, &uid);
    bool admin = rights_is_admin(service->rights, peer, options);
    struct request *request;
    struct fault fault;
    int r;

    if (!entry)
        return;
    request = stand(service, peer, id, REQUEST_HOLD, uid);
    if (!request)
        return;
    r = registry_hold(service->registry, entry, uid, !admin, &fault);
    if (r < 0) {
        standing_refuse(service, peer, id, r, &fault);
        service_remove_request(service, request);
        return;
    }
    /* A load that fails at once tells it like all that wait, and ends it. */
    request->model = entry;
    r = registry_want_for(service->registry, entry, LOAD_WARM, uid, admin);
    if (r < 0 && service_find_request(service, peer, id))
        end_with(service, request, entry->code, entry->error);
    else if (r >= 0)
        reply_held(request);
}

/* The first that stands of what `which` says. What an end sets free may end others at once, so each
 * is looked for anew. */
static struct request *find_standing(const struct service *service,
                                     bool (*which)(const struct request *request, const void *what),
                                     const void *what)
{
    struct request *request = service->standing;

    while (request && !which(request, what))
        request = request->model_next;
    return request;
}

static bool holds_model(const struct request *request, const void *entry)
{
    return request->kind == REQUEST_HOLD && request->model == entry;
}

void standing_lost(struct service *service, const struct model_entry *entry, enum wire_code code,
                   const char *sentence)
{
    struct request *request;

    if (entry->holds == 0)
        return;
    while ((request = find_standing(service, holds_model, entry)))
        end_with(service, request, code, sentence);
}

/* ---- reload ---- */

void standing_reload(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options)
{
    struct request *request;
    uint64_t look;

    if (!rights_is_admin(service->rights, peer, options)) {
        reply_error(peer, id, CODE_FORBIDDEN, "only an administrator may have it look again");
        return;
    }
    request = stand(service, peer, id, REQUEST_RELOAD, peer->uid);
    if (!request)
        return;
    request->look = UINT64_MAX;
    look = registry_look(service->registry);
    if (look > 0)
        request->look = look;
    else
        end_with(service, request, CODE_NO_MEMORY, "no memory for a look through the directories");
}

static bool waits_for_look(const struct request *request, const void *looks_done)
{
    return request->kind == REQUEST_RELOAD && request->look <= *(const uint64_t *)looks_done;
}

void standing_looked(struct service *service)
{
    uint64_t done = registry_looks_done(service->registry);
    struct request *request;

    while ((request = find_standing(service, waits_for_look, &done))) {
        reply_done(request->peer, request->key.id);
        service_remove_request(service, request);
    }
}

/* ---- subscriptions ---- */

static bool has_subscription_left(const struct service *service, uint32_t uid, bool values)
{
    uint32_t n = 0, in_all = 0;

    for (const struct request *r = service->standing; r; r = r->model_next) {
        if (r->kind != REQUEST_SUBSCRIBE || r->values != values)
            continue;
        n += r->job.uid == uid;
        in_all++;
    }
    return values ? n < VALUES_PER_UID && in_all < VALUES_IN_ALL : n < EVENTS_PER_UID;
}

void standing_subscribe(struct service *service, struct peer *peer, uint64_t id,
                        const struct request_options *options)
{
    uint32_t uid = options->on_behalf ? options->uid : peer->uid;
    bool values = strcmp(options->name, "values") == 0;
    struct refusal refusal;
    struct request *request;
    int r;

    if (!values && options->name[0] && strcmp(options->name, "events") != 0) {
        refusal_set(&refusal, CODE_BAD_REQUEST, "name", "name: expected events or values");
        reply_refusal(peer, id, &refusal);
        return;
    }
    if (!has_subscription_left(service, uid, values)) {
        refusal_busy(&refusal, STANDING_RETRY_US, "too many subscriptions; end one");
        service_refuse(service, peer, id, &refusal);
        return;
    }
    request = stand(service, peer, id, REQUEST_SUBSCRIBE, uid);
    if (!request)
        return;
    request->values = values;
    r = values ? values_subscribe(service->values, request)
               : events_subscribe(service->events, request, service_state(service));
    if (r < 0)
        end_with(service, request, CODE_NO_MEMORY, "no memory for a subscription");
}

void standing_resume(struct service *service, struct request *request)
{
    if (!request->reader)
        return;
    if (request->values)
        values_resume(service->values, request);
    else
        events_resume(service->events, request);
}

/* ---- the end ---- */

static bool ends_now(const struct request *request, const void *all)
{
    return *(const bool *)all || request->kind != REQUEST_SUBSCRIBE;
}

void standing_end(struct service *service, bool all)
{
    struct request *request;

    while ((request = find_standing(service, ends_now, &all)))
        end_with(service, request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
}
