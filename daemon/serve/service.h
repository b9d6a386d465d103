/* The service: what the daemon does for its clients, between the frames below and the models above.
 *
 * Takes whole frames from the connections, keeps every live request, brings requests to their
 * models, texts to the engine and answers back. Hides admission, the registry, the engine thread
 * and the tokenizer thread. Thread: the reactor. */
#ifndef HEARTH_SERVE_SERVICE_H
#define HEARTH_SERVE_SERVICE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "daemon/config.h"
#include "daemon/metrics/metrics.h"
#include "daemon/serve/admission.h"
#include "daemon/serve/peer.h"
#include "lib/clock.h"

struct service;

struct service_options {
    const struct config *config;
    const struct kernel_table *kernels;
    struct metrics *metrics;
    const struct clock *clock;
    const char *names_path, *history_path; /* see registry_options */
};

int service_new(const struct service_options *options, struct service **ret_service,
                struct fault *ret_fault);
/* After service_shut_down() said true, or in a hurry. Returns NULL. */
struct service *service_free(struct service *service);

/* Descriptors to wait for, each with what to call when it is readable. */
#define SERVICE_SOURCES 4u
struct service_source {
    int fd;
    void (*dispatch)(struct service *service);
};
void service_sources(struct service *service, struct service_source ret_sources[SERVICE_SOURCES]);

/* A connection has come (its hello is done) or gone. */
struct admission *service_admission(struct service *service);
/* One was turned away with `busy`. */
void service_peer_refused(struct service *service, uint32_t uid, const struct refusal *refusal);
/* Answers with a refusal, and makes it known where it is `busy`. */
void service_refuse(struct service *service, struct peer *peer, uint64_t id,
                    const struct refusal *refusal);
void service_peer_gone(struct service *service, struct peer *peer);
/* The peer's output went below its bound again: its streams may go on. */
void service_peer_drained(struct service *service, struct peer *peer);
/* Whether a file's descriptor of that peer may be received now; and the end of one that was. */
bool service_takes_file(const struct service *service, const struct peer *peer);
void service_drop_file(struct service *service, uint32_t uid, int fd);
/* One frame of a peer; a descriptor that came with it is in peer->file_fd, and is the caller's to
 * drop where it still is afterwards. 0; -EBADMSG: the frame is malformed, the connection must end
 * (a sentence in the refusal). */
int service_frame(struct service *service, struct peer *peer, const struct wire_header *header,
                  const uint8_t *body, struct refusal *ret_refusal);

/* A wake-up of the reactor begins. */
void service_wake(struct service *service);
/* At the end of a wake-up, before output is sent: what others in it have made due. True: something
 * was written, and sending it may make more due. */
bool service_settle(struct service *service);

/* Time limits: call when service_due_us() (of the clock) has come. */
void service_tick(struct service *service);
uint64_t service_due_us(const struct service *service);
/* SIGHUP: look through the directories again. */
void service_reload(struct service *service);
/* Whether the engine thread does its work (for the watchdog); call every few seconds. */
bool service_alive(struct service *service);
/* Nothing runs, waits, loads or is kept for later: the daemon may exit when it is idle. */
bool service_idle(const struct service *service);

/* No new requests from now on; those that wait for a load are told so. */
void service_drain(struct service *service);
/* Ends what still runs with `shutting-down`. */
void service_expel_all(struct service *service);
/* Requests that something runs for, or that wait to be answered. */
uint32_t service_n_requests(const struct service *service);
/* Unloads all models; true once that is done. */
bool service_shut_down(struct service *service);

/* "running" or "draining", and a one-line summary for STATUS=. */
const char *service_state(const struct service *service);
void service_write_summary(struct service *service, FILE *out);

#endif
