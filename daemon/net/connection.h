/* Connections: slots, frames in, frames out.
 *
 * A slot owns memory only while a frame is incomplete or output waits; slots are used again. Reads
 * go through one shared buffer; what is written during a wake-up goes out at its end with one
 * system call a connection. Whoever does not read, is not read from.
 *
 * Hides sockets, partial frames, the handshake, time limits of peers. Thread: the reactor. */
#ifndef HEARTH_NET_CONNECTION_H
#define HEARTH_NET_CONNECTION_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/serve/service.h"

struct connections;

struct connections_options {
    int epoll_fd; /* members are added with their slot as data.ptr */
    const struct config *config;
    struct service *service;
    struct metrics *metrics;
    const struct clock *clock;
    const char *status_path;
};

int connections_new(const struct connections_options *options,
                    struct connections **ret_connections);
struct connections *connections_free(struct connections *connections);

/* Accepts what waits on a listening socket, up to a bound; the rest the next time. */
void connections_accept(struct connections *connections, int listen_fd, bool status_only);
/* False while nobody can be accepted or turned away, for want of descriptors: listening sockets are
 * not to be waited for then, or they would wake the loop without end. True again when a connection
 * has gone, and at each tick. */
bool connections_accepts(const struct connections *connections);
/* A member of the epoll set has an event. */
void connections_event(struct connections *connections, void *slot, uint32_t events);
/* At the end of a wake-up: sends what was written, gives closed slots back. */
void connections_flush(struct connections *connections);
/* Time limits: call every CONNECTIONS_TICK_US. */
#define CONNECTIONS_TICK_US 250000u
void connections_tick(struct connections *connections);
/* Tells every peer that no new requests are taken, those too that have yet to say hello. */
void connections_goaway(struct connections *connections, const char *why);
/* Closes those that have no live request and nothing unsent. */
void connections_close_idle(struct connections *connections);
/* Bytes that still wait to be sent, over all. */
bool connections_all_sent(const struct connections *connections);

#endif
