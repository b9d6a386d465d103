/* Orders about models: `warm`, `unload` and `set`, and the wait of those that name a model which a
 * look through the directories may bring.
 *
 * Hides who may have a model unloaded, and what an order is while it waits. Thread: the reactor. */
#ifndef HEARTH_SERVE_ORDERS_H
#define HEARTH_SERVE_ORDERS_H

#include "daemon/serve/service_internal.h"

void order_warm(struct service *service, struct peer *peer, uint64_t id,
                const struct request_options *options);
void order_unload(struct service *service, struct peer *peer, uint64_t id,
                  const struct request_options *options);
void order_set(struct service *service, struct peer *peer, uint64_t id,
               const struct request_options *options);
/* Answers a `warm` that was taken: its progress with `wait`, else one item. */
void order_follow(struct service *service, struct peer *peer, uint64_t id,
                  struct model_entry *entry, const struct request_options *options);
/* The model that the request names and the user it acts for, or NULL and a refusal sent. */
struct model_entry *order_named_model(struct service *service, struct peer *peer, uint64_t id,
                                      const struct request_options *options, uint32_t *ret_uid);

/* Whether the order has to wait for a look through the directories, for it names a model that is
 * not known; then it has been taken (or refused), and order_again() carries it out. */
bool order_waits(struct service *service, struct peer *peer, const struct wire_header *header,
                 const uint8_t *body, const struct request_options *options);
/* The look is over. The request is gone afterwards. */
void order_again(struct service *service, struct request *request);
/* Its client wants the end of one that waits or stands. It is gone afterwards. */
void order_cancel(struct service *service, struct request *request);

#endif
