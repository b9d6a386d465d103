/* What the files of the service share: its state, and what all kinds of requests need of service.c.
 * What a kind of its own does stands in that file's header. Thread: the reactor. */
#ifndef HEARTH_SERVE_SERVICE_INTERNAL_H
#define HEARTH_SERVE_SERVICE_INTERNAL_H

#include "daemon/model/registry.h"
#include "daemon/serve/rights.h"
#include "daemon/serve/runner.h"
#include "daemon/serve/service.h"
#include "daemon/serve/text_thread.h"

/* What the service keeps of a model that is loaded or waited for. */
struct model_waiters {
    struct model_entry *entry; /* NULL: those that wait for a look through the directories */
    struct request *head, *tail;
    UT_hash_handle hh;
};

struct service {
    struct service_options options;
    struct admission *admission;
    struct rights *rights;
    struct registry *registry;
    struct runner *runner;
    struct engine_pulse pulse; /* the engine thread writes it, loader threads read it */
    struct text_thread *text_thread;
    struct text_budget text_budget;
    struct request *requests; /* all live ones, by (connection, id) */
    struct request *over;     /* those that are over, until the engine thread knows them no more */
    struct request *standing; /* of them, those that stand (standing.h) */
    uint32_t n_standing;
    uint32_t n_asleep;      /* of them, those that are asleep (asleep.h) */
    struct peer *lines_due; /* with answers whose turn has come (answer_order.h) */
    uint32_t n_kept;        /* answers that are kept for their turn */
    struct events *events;
    struct values *values;
    struct model_waiters *waiters; /* by entry */
    struct model_waiters unknown;  /* requests for names that a new look may bring */
    uint64_t next_deadline_us;     /* the earliest of those that wait; UINT64_MAX: none */
    uint64_t tick_due_us;          /* the next look at what has no time of its own */
    uint64_t seed_state;
    uint64_t started_us;
    struct config_memory memory;
    uint64_t last_beat;
    bool draining;
};

static inline uint64_t service_now_us(const struct service *service)
{
    return clock_now_us(service->options.clock);
}

struct request *service_find_request(struct service *service, const struct peer *peer, uint64_t id);
/* A new request among the live ones, with its place in the queue; NULL: it was refused. */
struct request *service_enter(struct service *service, struct peer *peer, uint64_t id,
                              enum request_kind kind);
/* Takes it out and frees it: retires and releases it. */
void service_remove_request(struct service *service, struct request *request);
/* The client's side of it is over: its id is free. What the engine thread still knows stays. */
void service_retire(struct service *service, struct request *request);
/* Frees it, now or with the last answer to messages that came too late for it. */
void service_release(struct service *service, struct request *request);
/* Its text or ids count no longer; service_retire() does it. */
void service_release_input(struct service *service, struct request *request);

/* Carries a request out, or refuses it (frames.c). */
void service_dispatch(struct service *service, struct peer *peer, uint16_t type, uint64_t id,
                      const struct request_options *options);

#endif
