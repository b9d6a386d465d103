#include "daemon/serve/asleep.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/generation.h"
#include "daemon/serve/waiting.h"
#include "lib/cleanup.h"

static void leave(struct service *service, struct request *request)
{
    assert(request->stage == STAGE_ASLEEP);
    request->stage = STAGE_NEW;
    service->n_asleep--;
    metrics_set(service->options.metrics, M_STREAMS_ASLEEP, service->n_asleep);
}

void asleep_end(struct service *service, struct request *request)
{
    leave(service, request);
    request->ended_us = service_now_us(service);
    generation_end(service, request);
}

/* The text that may go. The request is the reactor's, and so is all of its stream. */
static void deliver(struct service *service, struct request *request)
{
    const char *text;
    size_t n;

    while ((n = stream_peek(&request->stream, &text)) > 0) {
        metrics_add(service->options.metrics, M_FRAMES_WAITED, 1);
        generation_text(service, request, text, n);
        stream_consume(&request->stream, n);
    }
}

/* All its text has gone and more is wanted: on to its model. */
static void wake(struct service *service, struct request *request)
{
    struct model_entry *entry = registry_find(service->registry, request->wanted_name);

    if (!entry)
        request_fail(request, CODE_NO_SUCH_MODEL,
                     "%s was removed while the stream's reader was away; 'hearth models' lists "
                     "the models there are",
                     request->wanted_name);
    else if (service->draining && entry->state != MODEL_READY)
        request_fail(request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
    if (request->reason == END_ERROR) {
        asleep_end(service, request);
        return;
    }
    leave(service, request);
    waiting_bring(service, request, entry);
}

void asleep_stir(struct service *service, struct request *request)
{
    deliver(service, request);
    if (request->ended && stream_drained(&request->stream))
        asleep_end(service, request);
    else if (stream_may_run(&request->stream))
        wake(service, request);
    /* else it is marked parked, and sleeps on until it is granted room */
}

/* Its model may go; the stream can be continued only by the same one. */
static void let_model_go(struct service *service, struct request *request)
{
    struct model_entry *entry = request->model;

    free(request->wanted_name);
    request->wanted_name = strdup(entry->name);
    request->has_fingerprint = true;
    request->fingerprint = entry->fingerprint;
    if (!request->wanted_name)
        request_fail(request, CODE_NO_MEMORY, "no memory to keep a stream whose reader is away");
    generation_unuse_model(service, request);
}

void asleep_begin(struct service *service, struct request *request)
{
    request->stage = STAGE_ASLEEP;
    request->runner_model = NULL;
    service->n_asleep++;
    metrics_set(service->options.metrics, M_STREAMS_ASLEEP, service->n_asleep);
    let_model_go(service, request);
    if (request->job.deadline_us)
        service->next_deadline_us = MIN(service->next_deadline_us, request->job.deadline_us);
    if (request->expelled)
        request_fail(request, CODE_SHUTTING_DOWN, "the daemon is shutting down");
    else if (request->cancelled && request->reason != END_ERROR)
        request->reason = END_CANCELLED;
    if (request->reason != END_CANCELLED)
        generation_count_ids(service, request); /* with those that were generated */
    if (request->reason == END_ERROR || request->reason == END_CANCELLED)
        asleep_end(service, request);
    else if (!atomic_load(&request->stream.parked))
        asleep_stir(service, request); /* room came while it was handed back */
}
