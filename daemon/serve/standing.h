/* Requests that stand: holds, reloads and subscriptions, from their acknowledgement to their end.
 *
 * They are live requests like any other (one id, one end, `cancel`), but nothing runs for them and
 * nobody waits for their end: they count neither as work that a drain waits for nor, holds apart,
 * as activity. Hides their list. Thread: the reactor. */
#ifndef HEARTH_SERVE_STANDING_H
#define HEARTH_SERVE_STANDING_H

#include "daemon/serve/service_internal.h"

void standing_hold(struct service *service, struct peer *peer, uint64_t id,
                   const struct request_options *options);
void standing_reload(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options);
void standing_subscribe(struct service *service, struct peer *peer, uint64_t id,
                        const struct request_options *options);

/* What can be had again when something else of the user's ends (-EDQUOT, -EBUSY) is refused as
 * `busy`; all else as `no-memory`. */
#define STANDING_RETRY_US 1000000u
void standing_refuse(struct service *service, struct peer *peer, uint64_t id, int r,
                     const struct fault *fault);

/* The connection of a subscription has room again. */
void standing_resume(struct service *service, struct request *request);
/* Takes one that ends off the list and lets go of what it has; service_remove_request() does it. */
void standing_leave(struct service *service, struct request *request);
/* The model is lost to its holds: they end. */
void standing_lost(struct service *service, const struct model_entry *entry, enum wire_code code,
                   const char *sentence);
/* A look through the directories is over. */
void standing_looked(struct service *service);
/* The daemon is going: holds and reloads end (the first time), and subscriptions, too (`all`). */
void standing_end(struct service *service, bool all);

#endif
