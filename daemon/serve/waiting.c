#include "daemon/serve/waiting.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/serve/asleep.h"
#include "daemon/serve/generation.h"
#include "daemon/serve/orders.h"
#include "daemon/serve/questions.h"
#include "daemon/serve/standing.h"
#include "lib/cleanup.h"

/* ---- lines ---- */

static struct model_waiters *waiters_of(struct service *service, struct model_entry *entry)
{
    struct model_waiters *waiters;

    if (!entry)
        return &service->unknown;
    HASH_FIND_PTR(service->waiters, &entry, waiters);
    return waiters;
}

static struct model_waiters *waiters_new(struct service *service, struct model_entry *entry)
{
    struct model_waiters *waiters = calloc(1, sizeof(*waiters));

    if (!waiters)
        return NULL;
    waiters->entry = entry;
    HASH_ADD_PTR(service->waiters, entry, waiters);
    if (!hash_added(&waiters->hh))
        free(TAKE_PTR(waiters));
    return waiters;
}

void waiting_leave(struct service *service, struct request *request)
{
    struct model_waiters *waiters = waiters_of(service, request->model);

    if (request->model_previous)
        request->model_previous->model_next = request->model_next;
    else
        waiters->head = request->model_next;
    if (request->model_next)
        request->model_next->model_previous = request->model_previous;
    else
        waiters->tail = request->model_previous;
    request->model_previous = request->model_next = NULL;
    if (!waiters->head && request->model) {
        HASH_DEL(service->waiters, waiters);
        free(waiters);
    }
}

void waiting_begin(struct service *service, struct request *request, struct model_entry *entry)
{
    struct model_waiters *waiters = waiters_of(service, entry);

    if (!waiters) {
        waiters = waiters_new(service, entry);
        if (!waiters) {
            reply_error(request->peer, request->key.id, CODE_NO_MEMORY, "no memory to wait");
            service_remove_request(service, request);
            return;
        }
    }
    request->model = entry;
    request->stage = STAGE_LOADING;
    request->model_previous = waiters->tail;
    if (waiters->tail)
        waiters->tail->model_next = request;
    else
        waiters->head = request;
    waiters->tail = request;
    if (request->job.deadline_us)
        service->next_deadline_us = MIN(service->next_deadline_us, request->job.deadline_us);
}

void waiting_end(struct service *service, struct request *request)
{
    if (request->stage == STAGE_LOADING)
        waiting_leave(service, request);
    request->stage = STAGE_NEW;
    request->model = NULL;
    request->ended_us = service_now_us(service);
    generation_end(service, request);
}

void waiting_refuse(struct service *service, struct request *request, enum wire_code code,
                    const char *sentence)
{
    if (request_is_order(request->kind)) {
        reply_error(request->peer, request->key.id, code, "%s", sentence);
        service_remove_request(service, request);
        return;
    }
    request_fail(request, code, "%s", sentence);
    waiting_end(service, request);
}

/* ---- to the model ---- */

void waiting_bring(struct service *service, struct request *request, struct model_entry *entry)
{
    int r = registry_want_for(service->registry, entry, LOAD_INTERACTIVE, request->job.uid, false);

    if (r < 0) {
        request_fail(request, entry->code, "%s", entry->error);
        waiting_end(service, request);
        return;
    }
    if (r == 0) {
        request->model = entry;
        generation_start(service, request);
        return;
    }
    waiting_begin(service, request, entry);
}

void waiting_want(struct service *service, struct request *request, struct model_entry *entry)
{
    registry_asked(service->registry, entry);
    waiting_bring(service, request, entry);
}

static void no_such_model(struct service *service, struct request *request, const char *name)
{
    request_fail(request, CODE_NO_SUCH_MODEL,
                 "there is no model %s; 'hearth models' lists those there are", name);
    waiting_end(service, request);
}

void waiting_look(struct service *service, struct request *request, const char *name)
{
    if (registry_rescan(service->registry, false))
        request->wanted_name = strdup(name);
    if (request->wanted_name)
        waiting_begin(service, request, NULL);
    else
        no_such_model(service, request, name);
}

/* ---- news of models ---- */

/* The first of the model's line; NULL: nobody waits. */
static struct request *next_waiter(struct service *service, struct model_entry *entry)
{
    struct model_waiters *waiters = waiters_of(service, entry);

    return waiters ? waiters->head : NULL;
}

void waiting_ready(struct service *service, struct model_entry *entry)
{
    struct request *request;

    if (!next_waiter(service, entry))
        return;
    registry_begin_line(entry);
    while ((request = next_waiter(service, entry))) {
        if (request->kind == REQUEST_WARM) {
            question_progress(request, entry);
            reply_done(request->peer, request->key.id);
            service_remove_request(service, request);
            continue;
        }
        waiting_leave(service, request);
        generation_start(service, request);
    }
    registry_end_line(service->registry, entry);
}

void waiting_lost(struct service *service, struct model_entry *entry, enum wire_code code,
                  const char *sentence)
{
    struct request *request;

    standing_lost(service, entry, code, sentence);
    while ((request = next_waiter(service, entry)))
        waiting_refuse(service, request, code, sentence);
}

void waiting_progress(struct service *service, struct model_entry *entry)
{
    struct model_waiters *waiters = waiters_of(service, entry);

    for (struct request *r = waiters ? waiters->head : NULL; r; r = r->model_next)
        if (r->kind == REQUEST_WARM)
            question_progress(r, entry);
}

void waiting_looked(struct service *service)
{
    struct request *request;

    while ((request = service->unknown.head)) {
        /* Nobody's file has come meanwhile: their names are given, not looked for. */
        struct model_entry *entry = registry_find(service->registry, request->wanted_name);
        if (request->kind == REQUEST_ORDER) {
            order_again(service, request);
            continue;
        }
        if (!entry || entry->file) {
            no_such_model(service, request, request->wanted_name);
            continue;
        }
        waiting_leave(service, request);
        request->stage = STAGE_NEW;
        waiting_want(service, request, entry);
    }
}

void waiting_expire(struct service *service, uint64_t now)
{
    struct request *request, *next;

    if (now < service->next_deadline_us)
        return;
    service->next_deadline_us = UINT64_MAX;
    HASH_ITER (hh, service->requests, request, next) {
        if (!request->job.deadline_us ||
            (request->stage != STAGE_LOADING && request->stage != STAGE_ASLEEP))
            continue;
        if (request->job.deadline_us <= now && request->stage == STAGE_ASLEEP) {
            request_fail(request, CODE_DEADLINE, "the deadline passed before the end");
            asleep_end(service, request);
        } else if (request->job.deadline_us <= now)
            waiting_refuse(service, request, CODE_DEADLINE,
                           "the deadline passed while the model was being loaded");
        else
            service->next_deadline_us = MIN(service->next_deadline_us, request->job.deadline_us);
    }
}
