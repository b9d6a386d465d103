/* The inside of one connection, shared by the files that make it up: client.c (socket, dispatch,
 * credit), request.c (what goes out), reply.c (what comes in) and pool.c. Not installed, not
 * exported.
 *
 * A request's id is `generation << 32 | index + 1` of its slot: an id is found in one step, a slot
 * is used again at once, and an id never comes twice on a connection before 2^32 uses of its slot.
 *
 * Hides: nothing from those four files; everything here from the rest. Thread: the connection's. */
#ifndef HEARTH_LIB_CLIENT_H
#define HEARTH_LIB_CLIENT_H

#include "lib/fault.h"
#include "lib/hearth.h"
#include "lib/wire.h"

/* Largest body taken from a daemon. The buffer grows with what has arrived, not with what a header
 * claims. */
#define CLIENT_MAX_FRAME_BYTES (64u << 20)
/* Bounds on what waits: bytes not yet sent, and live requests. */
#define CLIENT_MAX_QUEUED_BYTES (64u << 20)
#define CLIENT_MAX_REQUESTS     (1u << 20)
/* Smallest initial credit that always lets a stream move: the longest UTF-8 sequence. */
#define CLIENT_MIN_CREDIT_BYTES 4u
#define CLIENT_VERSION_BYTES    64u
#define CLIENT_MAX_CLIENT_NAME  64u

/* One live request, or a free slot (`id` 0). */
struct request {
    uint64_t id;
    hearth_reply_fn fn;
    void *userdata;
    uint64_t credit_step;     /* grant back once this much was delivered; 0: never by itself */
    uint64_t credit_consumed; /* delivered since the last grant, bytes of text */
    uint32_t generation;      /* of the slot; survives its uses */
    uint32_t next_free;
    bool cancelled; /* `cancel` was queued */
};

/* Aligned copies of the arrays of one reply; grows to the largest seen. */
struct reply_scratch {
    void *data;
    size_t capacity;
};

struct hearth {
    int fd;
    int error;         /* 0, or the negative errno the connection was lost with */
    bool write_broken; /* nothing can be sent any more; what the daemon still said is read first */
    bool going_away;   /* the daemon sent goaway */
    bool unparsed;     /* `in` may hold a whole frame that no dispatch has seen */
    bool dispatching;  /* callbacks may be running */
    bool doomed;       /* freed while in use: destroyed when `uses` falls to 0 */
    unsigned uses;     /* public calls now on the stack */

    /* Received bytes: in[0..in_len), and always one byte more for a terminator. */
    uint8_t *in;
    size_t in_len, in_capacity;
    struct wire_buffer out;
    size_t out_sent;
    int passing_fd;                 /* goes with the frame out[passing_at..passing_end); -1: none */
    size_t passing_at, passing_end;

    struct request *requests;
    uint32_t n_requests, requests_capacity; /* slots ever used, allocated */
    uint32_t first_free;                    /* index of a free slot, UINT32_MAX: none */
    size_t live;
    uint64_t requests_sent;
    struct reply_scratch scratch;

    uint64_t frame_limit, initial_credit; /* from the daemon's hello */
    int64_t pid;
    char version[CLIENT_VERSION_BYTES];
    char path[HEARTH_PATH_BYTES]; /* the main socket, for sentences */
    struct fault message;

    uint8_t *acting; /* value of on-behalf-of, malloc'd; NULL: requests are this program's own */
    size_t acting_bytes;

    void *pool_entry; /* pool.c's note on this connection; NULL outside a pool */
};

uint64_t client_now_us(void);

/* Takes a slot and begins its frame: -ESHUTDOWN, -ENOBUFS, -ENOMEM or the loss. On success the
 * caller puts options and calls client_request_end(), which may take all of it back. */
int client_request_begin(struct hearth *h, uint16_t type, hearth_reply_fn fn, void *userdata,
                         struct request **ret_request);
int client_request_end(struct hearth *h, struct request *request, uint64_t *ret_id);

/* The frame just ended takes a copy of the descriptor along: -EBUSY while another one waits. */
int client_pass_fd(struct hearth *h, int fd);

/* Reads the options of a reply into *reply, whose `kind` and `id` stay. `body` has `len` bytes and
 * one writable byte after them; text is terminated in place, arrays are copied to `scratch`.
 * -EBADMSG: malformed, with the sentence in ret_fault; -ENOMEM. */
int reply_parse(uint8_t *body, size_t len, struct reply_scratch *scratch,
                struct hearth_reply *reply, struct fault *ret_fault);

/* Whether the next user may have it: no request, no byte either way, no end in sight. */
bool client_is_reusable(const struct hearth *h);

#endif
