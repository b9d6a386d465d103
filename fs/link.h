/* The link: hearthfs's connections to the daemon.
 *
 * One connection to the status socket is kept and feeds the mirror and the events; looking there
 * never starts a daemon. Orders and holds go over it as well, in the name of who gave them: a
 * daemon that runs under our own uid believes us whom we speak for; to any other we speak for
 * ourselves alone, and refuse whoever else asks. An order that may start a daemon (load, hold)
 * connects to the main socket first while none runs, which makes an activated daemon start. Nothing
 * here blocks: attempts to connect run on connectors, replies arrive through link_dispatch().
 *
 * A hold is an order that stays after its acknowledgement. Where the connection ends it is taken
 * again from the next daemon that runs, without starting one, until it is dropped.
 *
 * Hides: connecting again, what a lost connection means, the way of an order, subscriptions.
 * Bounds: one connection and one attempt a socket; LINK_ORDERS_MAX orders, each of which ends
 * within LINK_START_US; LINK_HOLDS_MAX holds. Thread: the caller's. */
#ifndef HEARTH_FS_LINK_H
#define HEARTH_FS_LINK_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fs/caller.h"
#include "fs/events.h"
#include "fs/mirror.h"

#define LINK_ORDERS_MAX 1024u
/* Holds there are, in all and of one uid; the daemon has a limit of its own for each uid. */
#define LINK_HOLDS_MAX         4096u
#define LINK_HOLDS_PER_UID_MAX 1024u
/* How long an order may take: of a daemon that runs, and of one that has to be started. */
#define LINK_ORDER_US 1000000u
#define LINK_START_US 10000000u
/* How long an attempt at the status socket may take (nobody waits for it that long). */
#define LINK_KNOCK_US 10000000u
/* A daemon just started is looked for at the status socket this often. */
#define LINK_RETRY_US 50000u
/* A hold that a daemon on its way out has ended is taken again no sooner than this. */
#define LINK_RETAKE_US 500000u
/* Descriptors link_poll() asks for at most. */
#define LINK_FDS_MAX 3u

enum link_verb { LINK_LOAD, LINK_UNLOAD, LINK_PIN, LINK_KEEP_ALIVE, LINK_HOLD };

struct link_request {
    enum link_verb verb;
    const char *model;
    uint64_t value;              /* LINK_PIN: 1 or 0; LINK_KEEP_ALIVE: microseconds, 0: for ever */
    const struct caller *caller; /* who gives it; copied */
};

struct link;
struct link_order;

/* `error`: 0, or the negative errno that write(2) or open(2) shall return. */
typedef void (*link_order_fn)(void *userdata, int error);

/* Borrows the mirror and the events. `socket_path`: the main socket's. Where that can be, values
 * are asked for in the name of nobody in particular: what only its owner may see is no file. */
int link_new(const char *socket_path, struct mirror *mirror, struct events *events,
             struct link **ret_link);
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

/* What to be told by the daemon from now on, while one runs: values as they change, events. */
void link_want_values(struct link *link, bool wanted);
void link_want_events(struct link *link, bool wanted);
/* 0, or the errno with which the daemon that runs refuses to tell events. */
int link_events_error(const struct link *link);

/* Gives an order. `fn` is called once, from link_dispatch() or link_step(), unless the order is
 * dropped before. A hold that has been acknowledged stays until it is dropped; its function is
 * called a second time, with an error, where the daemon ends it for good. -EAGAIN beyond the
 * bounds, -EINVAL, -ENOMEM. */
int link_order(struct link *link, const struct link_request *request, link_order_fn fn,
               void *userdata, uint64_t now_us, struct link_order **ret_order);
/* Nobody waits for it any more, or lets go of the hold; the daemon is asked to forget it. */
void link_drop(struct link *link, struct link_order *order);

/* The errno that stands for a code of the daemon's. */
int link_code_errno(const char *code);

#endif
