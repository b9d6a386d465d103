/* Streams that are asleep: their readers have been away for streaming.park_timeout.
 *
 * The engine thread has handed such a request back: it holds no KV memory, and its model counts it
 * as no use, so that it may be evicted. What it keeps is its ids, its text that has not been read,
 * and its place in the limits. Credit first takes the text that is there; when that has gone the
 * request is lent again, after its model has been loaded where it left, and computed again with the
 * same tokens.
 *
 * Hides what a request is without the engine thread. Thread: the reactor's. */
#ifndef HEARTH_SERVE_ASLEEP_H
#define HEARTH_SERVE_ASLEEP_H

#include "daemon/serve/service_internal.h"

/* RUNNER_ASLEEP has come for it. */
void asleep_begin(struct service *service, struct request *request);
/* Its stream may have been granted room. It may end, and be freed. */
void asleep_stir(struct service *service, struct request *request);
/* It ends: cancelled by its client, or with what request_fail() noted. It is freed. */
void asleep_end(struct service *service, struct request *request);

#endif
