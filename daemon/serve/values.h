/* Values: a pushed copy of what models, metrics and the daemon's status say, for readers such as
 * hearthfs that answer many questions from it.
 *
 * A push carries what has changed since the last one: an item a model, an item a section, and the
 * status as its end. It comes at once where the last is VALUES_PACE_US ago, else when it is, and
 * only after something has happened; the timer sleeps meanwhile. A push is made once for all
 * readers. One that has not read its last push is passed over, and gets everything when it has.
 * While nobody is subscribed nothing is made, kept or timed.
 *
 * Hides the timer, the digests of what was said last. Thread: the reactor. */
#ifndef HEARTH_SERVE_VALUES_H
#define HEARTH_SERVE_VALUES_H

#include <stdint.h>

#include "daemon/serve/request.h"

struct service;
struct values;

#define VALUES_PACE_US 100000u

int values_new(struct service *service, struct values **ret_values);
/* Nobody may be subscribed. Returns NULL. */
struct values *values_free(struct values *values);
/* Readable when a push is due. */
int values_fd(const struct values *values);
void values_dispatch(struct values *values);

/* The request gets everything at the next push, which is soon. -ENOMEM. */
int values_subscribe(struct values *values, struct request *request);
void values_unsubscribe(struct values *values, struct request *request);
/* Its connection has room again. */
void values_resume(struct values *values, struct request *request);
/* Something has happened that may have changed a value. Cheap; cheaper while nobody reads. */
void values_touch(struct values *values);

#endif
