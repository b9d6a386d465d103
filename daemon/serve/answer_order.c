#include "daemon/serve/answer_order.h"

#include <stdlib.h>

#include "daemon/serve/generation.h"

void answer_order_join(struct service *service, struct request *request)
{
    struct peer *peer = request->peer;

    if (!service->options.config->batching.preserve_order)
        return;
    request->in_line = true;
    request->line_previous = peer->line_tail;
    if (peer->line_tail)
        peer->line_tail->line_next = request;
    else
        peer->line_head = request;
    peer->line_tail = request;
}

static void make_due(struct service *service, struct peer *peer)
{
    if (peer->line_due)
        return;
    peer->line_due = true;
    peer->next_due = service->lines_due;
    service->lines_due = peer;
}

static void drop_due(struct service *service, struct peer *peer)
{
    struct peer **at = &service->lines_due;

    if (!peer->line_due)
        return;
    while (*at != peer)
        at = &(*at)->next_due;
    *at = peer->next_due;
    peer->line_due = false;
}

void answer_order_leave(struct service *service, struct request *request)
{
    struct peer *peer = request->peer;

    if (!request->in_line)
        return;
    request->in_line = false;
    if (request->line_previous)
        request->line_previous->line_next = request->line_next;
    else
        peer->line_head = request->line_next;
    if (request->line_next)
        request->line_next->line_previous = request->line_previous;
    else
        peer->line_tail = request->line_previous;
    request->line_previous = request->line_next = NULL;
    if (!peer->line_head)
        drop_due(service, peer);
    else if (peer->line_head->stage == STAGE_ANSWERED)
        make_due(service, peer);
}

bool answer_order_keep(struct service *service, struct request *request)
{
    if (!request->in_line || !request->line_previous || request->stage == STAGE_ANSWERED)
        return false;
    if (request->model) {
        request->fingerprint = request->model->fingerprint;
        generation_unuse_model(service, request);
    }
    service_release_input(service, request);
    free(request->ids);
    request->ids = NULL;
    free(request->vector);
    request->vector = NULL;
    stream_done(&request->stream);
    request->stage = STAGE_ANSWERED;
    metrics_set(service->options.metrics, M_ANSWERS_KEPT, ++service->n_kept);
    return true;
}

bool answer_order_settle(struct service *service)
{
    struct peer *peer;
    bool any = service->lines_due != NULL;

    while ((peer = service->lines_due)) {
        service->lines_due = peer->next_due;
        peer->line_due = false;
        while (peer->line_head && peer->line_head->stage == STAGE_ANSWERED) {
            /* Its leaving the line makes the peer due again where the next one has ended too. */
            generation_end(service, peer->line_head);
        }
    }
    return any;
}
