/* Orders about models that are carried out at once: `set`, and the rights that it and `unload`
 * need. */
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/standing.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

/* Longest order that waits for a look: a name, values and an identity. */
#define ORDER_MAX_BYTES 4096u

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

bool order_may_unload(struct service *service, struct peer *peer, uint64_t id,
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

void order_unload(struct service *service, struct model_entry *entry)
{
    registry_dismiss(service->registry, entry);
}

void order_set(struct service *service, struct peer *peer, uint64_t id,
               const struct request_options *options)
{
    uint32_t uid;
    struct model_entry *entry = question_named_model(service, peer, id, options, &uid);
    bool admin = rights_is_admin(service->rights, peer, options);

    if (!entry)
        return;
    if ((options->has_pinned || options->has_keep_alive) && !admin) {
        reply_error(peer, id, CODE_FORBIDDEN, "only an administrator may set pinned or keep_alive");
        return;
    }
    if (options->has_preload && !options->preload &&
        !order_may_unload(service, peer, id, options, entry, uid))
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
        order_unload(service, entry);
    reply_done(peer, id);
}
