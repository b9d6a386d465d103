/* What is shared within net/: a connection's slot, and what its input (connection_input.c) and the
 * rest of it (connection.c: slots, output, accepting, time limits) ask of each other. Thread: the
 * reactor. */
#ifndef HEARTH_NET_CONNECTION_INTERNAL_H
#define HEARTH_NET_CONNECTION_INTERNAL_H

#include "daemon/net/connection.h"

/* One read takes at most this much; shared by all connections. */
#define READ_BYTES (256u * 1024)

/* A descriptor belongs to the frame that ends the bytes it came with. */
enum passed {
    PASSED_NONE,
    PASSED_FILE,
    PASSED_REFUSED, /* it was not received */
};

enum phase { PHASE_MAGIC, PHASE_HELLO, PHASE_OPEN, PHASE_CLOSING };

struct connection {
    struct peer peer; /* first: serving knows the connection by it */
    struct connections *owner;
    enum phase phase;
    bool dirty;       /* in the list of those to flush */
    bool closed;      /* in the list of those to give back */
    uint32_t events;  /* asked of epoll */
    uint8_t *partial; /* an incomplete magic, header or frame */
    size_t partial_len, partial_need;
    size_t held_bytes;          /* of it, counted as input */
    uint8_t *backlog;           /* input that was read and is not taken while replies wait unread */
    size_t backlog_len;         /* counted as input */
    uint64_t skip_bytes;        /* of a frame there was no room for */
    enum passed passed;         /* what came along and waits for its frame */
    int passed_fd;              /* PASSED_FILE: the descriptor; else -1 */
    uint64_t input_deadline_us; /* 0: none */
    uint64_t output_deadline_us;
    struct connection *previous, *next; /* among the live ones, or the next spare slot */
    struct connection *next_dirty;      /* among those to flush, or those to give back */
};

struct connections {
    struct connections_options options;
    struct connection *live, *spare, *dirty, *closed;
    char *goaway; /* what those are told that have not said hello yet; NULL: nothing */
    uint32_t n_live, n_spare, n_slots;
    uint64_t n_ever;
    uint32_t n_deadlines; /* connections with a time limit running, as of the last look */
    int reserve_fd;  /* given up for a moment to turn a connection away when descriptors are out */
    bool accepts;    /* false: nobody can be accepted, nor turned away; tried again later */
    uint8_t *buffer; /* READ_BYTES */
};

static inline uint64_t connections_now_us(const struct connections *connections)
{
    return clock_now_us(connections->options.clock);
}

/* The bound of unsent output, from which on nothing more is read. */
static inline uint64_t connection_out_bound(const struct connection *c)
{
    return c->owner->options.config->limits.stream_buffer;
}

/* Its replies wait unread, up to their bound: it is not listened to. */
static inline bool connection_is_full(const struct connection *c)
{
    return peer_unsent(&c->peer) >= connection_out_bound(c);
}

/* ---- connection.c ---- */

/* Ends a connection; its slot is given back at the end of the wake-up. */
void connection_close(struct connection *c);
/* A last sentence, then the end. */
void connection_end(struct connection *c);
/* The sentence is the refusal's. */
void connection_refuse(struct connection *c, uint64_t id, const struct refusal *refusal);

/* ---- connection_input.c ---- */

/* Reads what has come, and hands on the frames in it. */
void input_read(struct connection *c);
/* There is room for replies again. */
void input_take_backlog(struct connection *c);
/* Gives up what was kept of its input. */
void input_drop(struct connection *c);

#endif
