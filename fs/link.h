/* The link: hearthfs's connections to the daemon.
 *
 * One connection to the status socket is kept and feeds the mirror; looking there never starts a
 * daemon. Orders (load, unload) go over it as well. An order to load while no daemon runs connects
 * to the main socket first, which makes an activated daemon start. Nothing here blocks: attempts to
 * connect run on connectors, replies arrive through link_dispatch().
 *
 * Hides: connecting again, what a lost connection means, the way of an order. Bounds: one
 * connection and one attempt a socket; LINK_ORDERS_MAX orders; each order ends within
 * LINK_START_US. Thread: the caller's. */
#ifndef HEARTH_FS_LINK_H
#define HEARTH_FS_LINK_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fs/mirror.h"

#define LINK_ORDERS_MAX 1024u
/* How long an order may take: of a daemon that runs, and of one that has to be started. */
#define LINK_ORDER_US 1000000u
#define LINK_START_US 10000000u
/* How long an attempt at the status socket may take (nobody waits for it that long). */
#define LINK_KNOCK_US 10000000u
/* A daemon just started is looked for at the status socket this often. */
#define LINK_RETRY_US 50000u
/* Descriptors link_poll() asks for at most. */
#define LINK_FDS_MAX 3u

struct link;
struct link_order;

/* `error`: 0, or the negative errno that write(2) shall return. */
typedef void (*link_order_fn)(void *userdata, int error);

/* Borrows the mirror. `socket_path`: the main socket's. */
int link_new(const char *socket_path, struct mirror *mirror, struct link **ret_link);
/* Orders that have not ended are dropped: their functions are not called. */
struct link *link_free(struct link *link);

/* Fills in what to poll for; returns how many. */
size_t link_poll(const struct link *link, struct pollfd ret_fds[LINK_FDS_MAX]);
/* When link_step() has to be called next, whatever poll says; UINT64_MAX: never. */
uint64_t link_due_us(const struct link *link, uint64_t now_us);
/* Takes what has arrived. */
void link_dispatch(struct link *link, uint64_t now_us);
/* Does what is needed so that values asked for at `since_us` or later come (0: nobody needs any),
 * and moves the orders on. */
void link_step(struct link *link, uint64_t since_us, uint64_t now_us);

/* Loads or unloads a model. `fn` is called once, from link_dispatch() or link_step(), unless the
 * order is dropped before. -EAGAIN beyond LINK_ORDERS_MAX, -ENOMEM. */
int link_order(struct link *link, bool load, const char *model, link_order_fn fn, void *userdata,
               uint64_t now_us, struct link_order **ret_order);
/* Nobody waits for it any more; the daemon is asked to forget it. */
void link_drop(struct link *link, struct link_order *order);

/* The errno that stands for a code of the daemon's. */
int link_code_errno(const char *code);

#endif
