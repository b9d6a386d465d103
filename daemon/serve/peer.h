/* A peer: one connected client as the serving side sees it: who it is, what it asked for, and a
 * buffer of frames on their way to it.
 *
 * Embedded in the connection, which owns the socket. Serving writes frames into `out` and calls
 * peer->wants_flush(); the connection sends them at the end of the wake-up. Thread: the reactor. */
#ifndef HEARTH_SERVE_PEER_H
#define HEARTH_SERVE_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/wire.h"

struct account_entry;
struct request;

/* Groups of a peer that are looked at. */
#define PEER_MAX_GROUPS 256u

struct peer {
    uid_t uid; /* by SO_PEERCRED */
    gid_t gid;
    pid_t pid;
    int fd;      /* for SO_PEERGROUPS */
    int file_fd; /* a descriptor that came with the frame being taken; -1: none */
    uint64_t file_bytes;
    bool file_refused; /* one came with it and was not received: the user has another on its way */
    uint64_t number;   /* of the connection, its own for good */
    bool status_only;  /* came through the status socket */
    bool congested;    /* its unsent output has reached limits.stream_buffer */
    uint32_t n_requests;
    uint64_t n_requests_ever;
    struct request *requests; /* live ones */
    /* With batching.preserve_order (answer_order.h): those whose answers go in order, and the next
     * peer with answers whose turn has come. */
    struct request *line_head, *line_tail;
    struct peer *next_due;
    bool line_due;
    struct account_entry *account;
    struct wire_buffer out;
    size_t out_sent; /* bytes of it that the socket has taken */
    /* The request whose `tokens` frame is the output's end and was written in this wake-up: more of
     * its text makes that frame longer. */
    const struct request *tail;
    void (*wants_flush)(struct peer *peer);
};

static inline size_t peer_unsent(const struct peer *peer)
{
    return peer->out.len - peer->out_sent;
}

#endif
