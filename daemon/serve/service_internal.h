/* What the files of the service share: the requests' way (service.c, waiting.c) and the questions
 * about models and state (questions.c). */
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
    struct request *requests; /* all live ones, by (peer, id) */
    uint32_t n_requests;
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
/* Takes it out and frees it. */
void service_remove_request(struct service *service, struct request *request);
/* It goes on to its model, which is ready. */
void service_start(struct service *service, struct request *request);
/* Its ids count as its user's input while it has them, instead of its text: they may be larger than
 * that was, and those of a stream that sleeps are kept as long as its reader stays away. The
 * request is not lent. Where they are too much it has failed. */
void service_count_ids(struct service *service, struct request *request);
/* Text of the request goes to its client. True: a parked stream may go on. */
bool service_text(struct service *service, struct request *request, const char *text, size_t len);
/* Its model counts it as a use no longer. */
void service_unuse_model(struct service *service, struct request *request);
/* Tells its client how it ended, and frees it once nobody knows it any more. */
void service_end(struct service *service, struct request *request);

/* Requests that are answered from what is known (questions.c); the options are parsed. */
void question_models(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options);
void question_status(struct service *service, struct peer *peer, uint64_t id);
void question_metrics(struct service *service, struct peer *peer, uint64_t id,
                      const struct request_options *options);
void question_warm(struct service *service, struct peer *peer, uint64_t id,
                   const struct request_options *options);
void question_unload(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options);
/* The items that `models`, `metrics` and `status` consist of, as frames of a buffer. */
void question_put_model(struct wire_buffer *out, uint64_t id, const struct model_entry *entry);
void question_put_section(struct service *service, struct wire_buffer *out, uint64_t id,
                          const char *name);
void question_put_status(struct service *service, struct wire_buffer *out, uint64_t id);
/* Answers a `warm` that was taken: its progress with `wait`, else one item. */
void question_follow(struct service *service, struct peer *peer, uint64_t id,
                     struct model_entry *entry, const struct request_options *options);
/* One progress item of a `warm` that waits. */
void question_progress(struct request *request, const struct model_entry *entry);
/* The model that the request names and the user it acts for, or NULL and a refusal sent. */
struct model_entry *question_named_model(struct service *service, struct peer *peer, uint64_t id,
                                         const struct request_options *options, uint32_t *ret_uid);

/* Carries a request out, or refuses it. */
void service_dispatch(struct service *service, struct peer *peer, uint16_t type, uint64_t id,
                      const struct request_options *options);

/* Orders about models (orders.c). */
/* Whether the order has to wait for a look through the directories, for it names a model that is
 * not known; then it has been taken, and order_again() carries it out. */
bool order_waits(struct service *service, struct peer *peer, const struct wire_header *header,
                 const uint8_t *body, const struct request_options *options);
/* The look is over. The request is gone afterwards. */
void order_again(struct service *service, struct request *request);
void order_set(struct service *service, struct peer *peer, uint64_t id,
               const struct request_options *options);
/* Whether the user may have it unloaded; if not, a refusal is sent. */
bool order_may_unload(struct service *service, struct peer *peer, uint64_t id,
                      const struct request_options *options, const struct model_entry *entry,
                      uint32_t uid);
/* Unloads it; its holds end first. */
void order_unload(struct service *service, struct model_entry *entry);

#endif
