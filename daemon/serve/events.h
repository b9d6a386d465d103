/* Events: what happens to models and to the daemon, told to those who subscribed.
 *
 * An event is a JSON object on one line. The last NEWS_EVENTS_KEPT of them are kept in a ring, and each
 * reader is a place in it, so a slow one costs no memory of its own: one that has fallen behind by
 * more gets a single `lost` with the number and goes on with the oldest kept. While nobody reads,
 * nothing is written and nothing kept. No text of a prompt or an answer ever gets here.
 *
 * Hides the ring, the JSON, the pace of repeated events. Thread: the reactor. */
#ifndef HEARTH_SERVE_EVENTS_H
#define HEARTH_SERVE_EVENTS_H

#include <stdint.h>

#include "lib/clock.h"
#include "daemon/model/registry.h"
#include "daemon/serve/request.h"

/* Refusals with `busy` are told at most so often, with their number. */
#define EVENTS_BUSY_US 1000000u

struct events;

/* `room_bytes`: of a connection's unsent output (limits.stream_buffer); readers take a part. */
int events_new(const struct clock *clock, uint64_t room_bytes, struct events **ret_events);
/* Nobody may be subscribed. Returns NULL. */
struct events *events_free(struct events *events);

/* From now on the request gets them; the first tells the daemon's state. -ENOMEM. */
int events_subscribe(struct events *events, struct request *request, const char *daemon_state);
void events_unsubscribe(struct events *events, struct request *request);
/* Its connection has room again. */
void events_resume(struct events *events, struct request *request);

/* What happens. A model's state has changed; it has failed, with entry->code and entry->error. */
void events_state(struct events *events, const struct model_entry *entry);
void events_evicted(struct events *events, const struct eviction *eviction);
/* It is loaded before anybody asks, or with a dry run would be. */
void events_predicted(struct events *events, const struct model_entry *entry, bool dry_run);
/* "draining". */
void events_daemon(struct events *events, const char *state);
/* A request or connection of that user was refused with `busy`. */
void events_busy(struct events *events, uint32_t uid, const char *sentence);
/* Tells what was held back; call at least once a second. */
void events_tick(struct events *events);

#endif
