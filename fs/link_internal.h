/* What the files of the link share: its state, and the calls from one part to another. Thread: the
 * link's. */
#ifndef HEARTH_FS_LINK_INTERNAL_H
#define HEARTH_FS_LINK_INTERNAL_H

#include "fs/connector.h"
#include "fs/link.h"

/* An order's way: NEW until it is known whether a daemon runs; STARTING while one is being started
 * for it; SENT until the daemon acknowledges; ENDED when it can be freed. A hold goes on: HELD
 * while the daemon keeps it; LOST from a connection's end until it is taken again (then SENT with
 * `retaken`). */
enum order_phase { ORDER_NEW, ORDER_STARTING, ORDER_SENT, ORDER_HELD, ORDER_LOST, ORDER_ENDED };

struct link_order {
    struct link *link;
    enum order_phase phase;
    enum link_verb verb;
    bool retaken;
    char model[MIRROR_NAME_MAX + 1];
    uint64_t value;
    struct caller *caller; /* owned */
    uint64_t id;           /* of the request, when SENT or HELD */
    uint64_t since_us;     /* how fresh the finding that no daemon runs must be; LOST: when next */
    uint64_t deadline_us;
    link_order_fn fn; /* NULL: dropped */
    void *userdata;
    struct link_order *prev, *next;
};

struct part_slot {
    struct link *link;
    enum mirror_part part;
};

/* A subscription. */
struct feed {
    bool wanted;
    uint64_t id; /* 0: not subscribed */
    int error;   /* the daemon of this connection has refused it */
};

struct link {
    char socket_path[HEARTH_PATH_BYTES];
    char status_path[HEARTH_PATH_BYTES];
    struct mirror *mirror;     /* borrowed */
    struct events *events;     /* borrowed */
    struct hearth *hearth;     /* the status connection, NULL while there is none */
    bool speaks_for_others;    /* that daemon runs under our uid */
    struct connector *knock;   /* the attempt at the status socket */
    struct connector *starter; /* the attempt at the main socket */
    struct part_slot slots[_MIRROR_PART_MAX];
    struct feed values, events_feed;
    struct link_order *orders; /* NEW, STARTING, SENT, ENDED */
    struct link_order *holds;  /* HELD, LOST */
    size_t n_orders, n_holds, n_lost;
    uint64_t now_us; /* of the call under way, for the callbacks inside it */
};

/* ---- link.c ---- */

/* What the failed attempt or request says about the daemon. */
void link_fail(struct link *link, int error);
/* From here to link_look_end() what is asked for is what anybody may see. */
void link_look_begin(struct link *link);
void link_look_end(struct link *link);

/* ---- link_orders.c ---- */

/* Moves all orders on; the time since when somebody has to know whether a daemon runs, at least
 * `since_us`. */
uint64_t orders_step(struct link *link, uint64_t since_us);
/* The connection has gone with all that was under way on it. */
void orders_lost(struct link *link);
/* The start of a daemon is over, well (0) or not, for all who wait for it. */
void orders_started(struct link *link, int error);
uint64_t orders_due_us(const struct link *link, uint64_t now_us);
void orders_sweep(struct link *link);
void orders_free(struct link *link);

/* ---- link_feeds.c ---- */

/* Subscribes to what is wanted and not there, ends what is not wanted. */
void feeds_step(struct link *link);
void feeds_lost(struct link *link);
/* Requests on the connection that no goaway has to wait for. */
size_t feeds_standing(const struct link *link);
int feed_values(struct link *link);

#endif
