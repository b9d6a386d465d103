/* Frames of the service: which type goes where. */
#include <errno.h>

#include "daemon/serve/files.h"
#include "daemon/serve/generation.h"
#include "daemon/serve/orders.h"
#include "daemon/serve/questions.h"
#include "daemon/serve/standing.h"
#include "daemon/serve/values.h"
#include "lib/cleanup.h"

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
    case WIRE_COMPLETE: generation_begin(service, peer, id, REQUEST_COMPLETE, options); break;
    case WIRE_EMBED: generation_begin(service, peer, id, REQUEST_EMBED, options); break;
    case WIRE_TOKENIZE: generation_begin(service, peer, id, REQUEST_TOKENIZE, options); break;
    case WIRE_MODELS: question_models(service, peer, id, options); break;
    case WIRE_WARM: order_warm(service, peer, id, options); break;
    case WIRE_UNLOAD: order_unload(service, peer, id, options); break;
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
    if (header->type == WIRE_CREDIT)
        generation_credit(service, request, options);
    else if (request_is_order(request->kind))
        order_cancel(service, request);
    else
        generation_cancel(service, request);
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
