#include "daemon/serve/orders.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/serve/files.h"
#include "daemon/serve/questions.h"
#include "daemon/serve/standing.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

/* Longest order that waits for a look: a name, values and an identity. */
#define ORDER_MAX_BYTES 4096u

/* ---- those that wait for a look ---- */

static bool may_wait(const struct service *service, const struct wire_header *header,
                     const struct request_options *options)
{
    return (header->type == WIRE_WARM || header->type == WIRE_HOLD || header->type == WIRE_SET) &&
           header->body_len <= ORDER_MAX_BYTES && options->model[0] && !service->draining;
}

bool order_waits(struct service *service, struct peer *peer, const struct wire_header *header,
                 const uint8_t *body, const struct request_options *options)
{
    struct request *request;

    /* A file that came along stays with its frame alone: it is answered at once. */
    if (peer->file_fd >= 0 || peer->file_refused)
        return false;
    if (!may_wait(service, header, options) || registry_find(service->registry, options->model) ||
        !registry_rescan(service->registry, false))
        return false;
    request = service_enter(service, peer, header->id, REQUEST_ORDER);
    if (!request)
        return true;
    request->order = header->type;
    request->text = malloc(header->body_len);
    request->text_bytes = header->body_len;
    request->wanted_name = strdup(options->model);
    if (!request->text || !request->wanted_name) {
        service_remove_request(service, request);
        return false;
    }
    memcpy(request->text, body, header->body_len);
    waiting_begin(service, request, NULL);
    return true;
}

void order_again(struct service *service, struct request *request)
{
    _cleanup_free_ char *body = TAKE_PTR(request->text);
    size_t len = request->text_bytes;
    struct peer *peer = request->peer;
    uint64_t id = request->key.id;
    uint16_t type = request->order;
    struct request_options options;
    struct refusal refusal;

    service_remove_request(service, request);
    if (admission_parse(type, (const uint8_t *)body, len, &options, &refusal) < 0)
        return; /* it was read before */
    service_dispatch(service, peer, type, id, &options);
}

void order_cancel(struct service *service, struct request *request)
{
    struct wire_buffer *out = reply_begin(request->peer, WIRE_DONE, request->key.id);

    wire_put_text(out, TAG_REASON, "cancelled");
    reply_end(request->peer);
    service_remove_request(service, request);
}

/* ---- for a model ---- */

struct model_entry *order_named_model(struct service *service, struct peer *peer, uint64_t id,
                                      const struct request_options *options, uint32_t *ret_uid)
{
    struct refusal refusal;
    struct model_entry *entry;

    if (rights_acting_uid(peer, options, ret_uid, &refusal) < 0) {
        reply_refusal(peer, id, &refusal);
        return NULL;
    }
    if (!options->model[0]) {
        refusal_set(&refusal, CODE_BAD_REQUEST, "model", "a model is needed");
        reply_refusal(peer, id, &refusal);
        return NULL;
    }
    entry = files_find_model(service, peer, options, options->model);
    if (!entry)
        reply_error(peer, id, CODE_NO_SUCH_MODEL,
                    "there is no model %s; 'hearth models' lists those there are", options->model);
    return entry;
}

static void follow_load(struct service *service, struct peer *peer, uint64_t id,
                        struct model_entry *entry, const struct request_options *options)
{
    struct request *request = service_enter(service, peer, id, REQUEST_WARM);

    if (!request)
        return;
    if (options->deadline_us)
        request->job.deadline_us = request->received_us + options->deadline_us;
    question_progress(request, entry);
    waiting_begin(service, request, entry);
}

void order_follow(struct service *service, struct peer *peer, uint64_t id,
                  struct model_entry *entry, const struct request_options *options)
{
    if (options->wait && entry->state != MODEL_READY) {
        follow_load(service, peer, id, entry, options);
        return;
    }
    question_reply_model(peer, id, entry); /* its name */
    reply_done(peer, id);
}

void order_warm(struct service *service, struct peer *peer, uint64_t id,
                const struct request_options *options)
{
    struct model_entry *entry;
    uint32_t uid;
    int r;

    if (peer->file_fd >= 0) {
        files_warm(service, peer, id, options);
        return;
    }
    if (peer->file_refused) {
        struct refusal refusal;
        refusal_busy(&refusal, STANDING_RETRY_US,
                     "the file was not taken: another one of this user is being read, or the "
                     "daemon ends; wait for that");
        service_refuse(service, peer, id, &refusal);
        return;
    }
    entry = order_named_model(service, peer, id, options, &uid);
    if (!entry)
        return;
    r = registry_want_for(service->registry, entry, LOAD_WARM, uid,
                          rights_is_admin(service->rights, peer, options));
    if (r < 0) {
        reply_error(peer, id, entry->code, "%s", entry->error);
        return;
    }
    entry->wanted = true;
    if (r > 0 && options->wait)
        follow_load(service, peer, id, entry, options);
    else
        reply_done(peer, id);
}

/* ---- against it, and what is set ---- */

/* Whether the user may have it unloaded; if not, a refusal is sent. */
static bool may_unload(struct service *service, struct peer *peer, uint64_t id,
                       const struct request_options *options, const struct model_entry *entry,
                       uint32_t uid)
{
    const char *why = NULL;

    if (rights_is_admin(service->rights, peer, options))
        return true;
    if (entry->pinned)
        why = "is pinned";
    else if (registry_held_by_others(service->registry, entry, uid))
        why = "is held by somebody else";
    else if (registry_used_by_others(service->registry, entry, uid))
        why = "was used by somebody else within the last minute";
    if (why)
        reply_error(peer, id, CODE_FORBIDDEN, "%s %s: an administrator may unload it", entry->name,
                    why);
    return !why;
}

void order_unload(struct service *service, struct peer *peer, uint64_t id,
                  const struct request_options *options)
{
    struct model_entry *entry;
    uint32_t uid;

    entry = order_named_model(service, peer, id, options, &uid);
    if (!entry)
        return;
    if (!may_unload(service, peer, id, options, entry, uid))
        return;
    registry_dismiss(service->registry, entry);
    reply_done(peer, id);
}

void order_set(struct service *service, struct peer *peer, uint64_t id,
               const struct request_options *options)
{
    uint32_t uid;
    struct model_entry *entry = order_named_model(service, peer, id, options, &uid);
    bool admin = rights_is_admin(service->rights, peer, options);

    if (!entry)
        return;
    if ((options->has_pinned || options->has_keep_alive) && !admin) {
        reply_error(peer, id, CODE_FORBIDDEN, "only an administrator may set pinned or keep_alive");
        return;
    }
    if (options->has_preload && !options->preload &&
        !may_unload(service, peer, id, options, entry, uid))
        return;
    /* First what may fail, so that an error means that nothing was set. */
    if (options->has_preload && options->preload) {
        if (registry_want_for(service->registry, entry, LOAD_WARM, uid, admin) < 0) {
            reply_error(peer, id, entry->code, "%s", entry->error);
            return;
        }
        entry->wanted = true;
    }
    if (options->has_pinned)
        registry_set_pinned(service->registry, entry, options->pinned);
    if (options->has_keep_alive)
        registry_set_keep_alive(service->registry, entry, options->keep_alive_us);
    if (options->has_preload && !options->preload)
        registry_dismiss(service->registry, entry);
    reply_done(peer, id);
}
