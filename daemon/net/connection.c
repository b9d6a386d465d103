#include "daemon/net/connection.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "daemon/log.h"
#include "lib/cleanup.h"

/* One read takes at most this much; shared by all connections. */
#define READ_BYTES (256u * 1024)

/* Output buffers beyond this are given back when they are empty. */
#define KEEP_OUT_BYTES 4096u

/* Connections accepted in one wake-up, so that a storm of them holds up nobody. */
#define ACCEPT_BATCH 64u

/* Slots kept for reuse. */
#define SPARE_SLOTS 1024u

/* Time limits of a peer: its hello, a frame it has begun, output it does not read, and the last
 * sentence to one that is being closed. */
#define HELLO_US 2000000u
#define FRAME_US 10000000u
#define STUCK_US 30000000u
#define CLOSE_US 2000000u

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

static uint64_t now_us(const struct connections *connections)
{
    return clock_now_us(connections->options.clock);
}

/* ---- life ---- */

/* Where it cannot be had, others have taken the last descriptors; it is tried again when some may
 * be free. */
static void take_reserve(struct connections *connections)
{
    if (connections->reserve_fd < 0)
        connections->reserve_fd = fcntl(connections->options.epoll_fd, F_DUPFD_CLOEXEC, 0);
}

int connections_new(const struct connections_options *options, struct connections **ret_connections)
{
    struct connections *connections = calloc(1, sizeof(*connections));

    if (!connections)
        return -ENOMEM;
    connections->options = *options;
    connections->reserve_fd = -1;
    connections->accepts = true;
    take_reserve(connections);
    connections->buffer = malloc(READ_BYTES);
    if (!connections->buffer) {
        connections_free(connections);
        return -ENOMEM;
    }
    *ret_connections = connections;
    return 0;
}

static void publish(const struct connections *connections)
{
    metrics_set(connections->options.metrics, M_CONNECTIONS, connections->n_live);
    metrics_set(connections->options.metrics, M_SLOTS, connections->n_slots);
}

static struct connection *slot_get(struct connections *connections)
{
    struct connection *c = connections->spare;

    if (c) {
        connections->spare = c->next;
        connections->n_spare--;
        metrics_add(connections->options.metrics, M_SLOTS_REUSED, 1);
        memset(c, 0, sizeof(*c));
        return c;
    }
    c = calloc(1, sizeof(*c));
    connections->n_slots += c != NULL;
    return c;
}

static void slot_put(struct connections *connections, struct connection *c)
{
    if (connections->n_spare == SPARE_SLOTS) {
        connections->n_slots--;
        free(c);
        return;
    }
    c->next = connections->spare;
    connections->spare = c;
    connections->n_spare++;
}

static void partial_drop(struct connection *c)
{
    free(c->partial);
    c->partial = NULL;
    c->partial_len = c->partial_need = 0;
    if (c->held_bytes > 0)
        admission_release_input(service_admission(c->owner->options.service), c->peer.account,
                                c->held_bytes);
    c->held_bytes = 0;
}

/* Gives up what came along and was not taken. */
static void passed_drop(struct connection *c)
{
    int fds[] = {TAKE_FD(c->passed_fd), TAKE_FD(c->peer.file_fd)};

    for (size_t i = 0; i < ELEMENTSOF(fds); i++)
        if (fds[i] >= 0)
            service_drop_file(c->owner->options.service, c->peer.uid, fds[i]);
    c->passed = PASSED_NONE;
}

static void backlog_drop(struct connection *c)
{
    if (!c->backlog)
        return;
    free(c->backlog);
    c->backlog = NULL;
    admission_release_input(service_admission(c->owner->options.service), c->peer.account,
                            c->backlog_len);
    c->backlog_len = 0;
}

/* Ends a connection; its slot is given back at the end of the wake-up. */
static void connection_close(struct connection *c)
{
    struct connections *connections = c->owner;

    if (c->closed)
        return;
    c->closed = true;
    close(c->peer.fd); /* leaves the epoll set */
    take_reserve(connections);
    connections->accepts = true;
    service_peer_gone(connections->options.service, &c->peer);
    passed_drop(c);
    partial_drop(c);
    backlog_drop(c);
    admission_disconnect(service_admission(connections->options.service), c->peer.account);
    wire_buffer_done(&c->peer.out);
    if (c->previous)
        c->previous->next = c->next;
    else
        connections->live = c->next;
    if (c->next)
        c->next->previous = c->previous;
    connections->n_live--;
    if (!c->dirty) { /* else connections_flush() finds it */
        c->next_dirty = connections->closed;
        connections->closed = c;
    }
    publish(connections);
}

struct connections *connections_free(struct connections *connections)
{
    if (!connections)
        return NULL;
    while (connections->live)
        connection_close(connections->live);
    connections_flush(connections);
    while (connections->spare) {
        struct connection *c = connections->spare;
        connections->spare = c->next;
        free(c);
    }
    if (connections->reserve_fd >= 0)
        close(connections->reserve_fd);
    free(connections->goaway);
    free(connections->buffer);
    free(connections);
    return NULL;
}

uint32_t connections_n(const struct connections *connections)
{
    return connections->n_live;
}

/* ---- output ---- */

static void want_events(struct connection *c, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};

    if (c->events == events)
        return;
    if (epoll_ctl(c->owner->options.epoll_fd, EPOLL_CTL_MOD, c->peer.fd, &event) == 0)
        c->events = events;
}

static void wants_flush(struct peer *peer)
{
    struct connection *c = (struct connection *)peer;

    if (c->dirty || c->closed)
        return;
    c->dirty = true;
    c->next_dirty = c->owner->dirty;
    c->owner->dirty = c;
}

/* The bound of unsent output, from which on nothing more is read. */
static uint64_t out_bound(const struct connection *c)
{
    return c->owner->options.config->limits.stream_buffer;
}

/* What is read and written next follows from how much is unsent. */
static void settle(struct connection *c)
{
    struct connections *connections = c->owner;
    size_t unsent = peer_unsent(&c->peer);
    uint32_t events = 0;

    if (unsent == 0) {
        c->peer.out.len = c->peer.out_sent = 0;
        if (c->peer.out.capacity > KEEP_OUT_BYTES || c->peer.n_requests == 0)
            wire_buffer_done(&c->peer.out);
        c->output_deadline_us = 0;
        if (c->phase == PHASE_CLOSING) {
            connection_close(c);
            return;
        }
    }
    if (unsent < out_bound(c)) {
        c->output_deadline_us = c->phase == PHASE_CLOSING ? c->output_deadline_us : 0;
        /* What was read already comes first, a bound of output at a time: writable or not, the
         * next wake-up sees it. */
        if (c->phase != PHASE_CLOSING)
            events |= c->backlog ? EPOLLOUT : EPOLLIN;
        if (c->peer.congested && unsent < out_bound(c) / 2)
            service_peer_drained(connections->options.service, &c->peer);
    } else if (!c->output_deadline_us) {
        c->output_deadline_us = now_us(connections) + STUCK_US;
        connections->n_deadlines++;
    }
    if (unsent > 0)
        events |= EPOLLOUT;
    want_events(c, events);
}

static void connection_send(struct connection *c)
{
    struct wire_buffer *out = &c->peer.out;

    c->peer.tail = NULL; /* what is sent cannot grow */
    if (out->failed) {
        log_warning("connection %llu is closed: no memory for its output",
                    (unsigned long long)c->peer.number);
        connection_close(c);
        return;
    }
    while (peer_unsent(&c->peer) > 0) {
        ssize_t n = send(c->peer.fd, out->data + c->peer.out_sent, peer_unsent(&c->peer),
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN) {
            connection_close(c);
            return;
        }
        if (n < 0)
            break;
        c->peer.out_sent += (size_t)n;
    }
    /* What was sent must not pile up in front of what was not. */
    if (c->peer.out_sent > out_bound(c) && c->peer.out_sent > out->len / 2) {
        memmove(out->data, out->data + c->peer.out_sent, peer_unsent(&c->peer));
        out->len -= c->peer.out_sent;
        c->peer.out_sent = 0;
    }
    settle(c);
}

void connections_flush(struct connections *connections)
{
    struct connection *c;

    /* Sending may free room and thereby write more; the list is taken from its head. */
    while ((c = connections->dirty)) {
        connections->dirty = c->next_dirty;
        c->dirty = false;
        if (!c->closed) {
            connection_send(c);
        } else {
            c->next_dirty = connections->closed;
            connections->closed = c;
        }
    }
    while ((c = connections->closed)) {
        connections->closed = c->next_dirty;
        slot_put(connections, c);
    }
}

bool connections_all_sent(const struct connections *connections)
{
    for (const struct connection *c = connections->live; c; c = c->next)
        if (peer_unsent(&c->peer) > 0)
            return false;
    return true;
}

/* A last sentence, then the end. */
static void connection_end(struct connection *c)
{
    c->phase = PHASE_CLOSING;
    passed_drop(c);
    partial_drop(c);
    backlog_drop(c);
    c->output_deadline_us = now_us(c->owner) + CLOSE_US;
    c->owner->n_deadlines++;
    metrics_add(c->owner->options.metrics, M_CONNECTIONS_BROKEN, 1);
    wants_flush(&c->peer);
}

static void connection_refuse(struct connection *c, uint64_t id, const struct refusal *refusal)
{
    log_write(LOG_NOTICE,
              &(struct log_fields){.code = wire_code_name(refusal->code),
                                   .connection = (unsigned long)c->peer.number,
                                   .uid = (long)c->peer.uid,
                                   .has_uid = 1},
              "connection %llu of uid %u is closed: %s", (unsigned long long)c->peer.number,
              c->peer.uid, refusal->sentence);
    service_refuse(c->owner->options.service, &c->peer, id, refusal);
    connection_end(c);
}

/* ---- input ---- */

static bool looks_like_http(const uint8_t *bytes, size_t len)
{
    static const char *const methods[] = {"GET ", "POST", "HEAD", "PUT ", "OPTI", "DELE", "PATC"};

    for (size_t i = 0; i < ELEMENTSOF(methods); i++)
        if (len >= 4 && memcmp(bytes, methods[i], 4) == 0)
            return true;
    return false;
}

/* A peer that does not speak the protocol is told so in a way it may show to somebody. */
static void not_hearth(struct connection *c, const uint8_t *bytes, size_t len)
{
    static const char sentence[] =
        "This socket speaks Hearth's own protocol, not HTTP or text; use the hearth command or "
        "libhearth.\n";
    char text[512];
    int n;

    if (looks_like_http(bytes, len))
        n = snprintf(text, sizeof(text),
                     "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n"
                     "Content-Length: %zu\r\nConnection: close\r\n\r\n%s",
                     sizeof(sentence) - 1, sentence);
    else
        n = snprintf(text, sizeof(text), "%s", sentence);
    wire_append(&c->peer.out, text, (size_t)n);
    connection_end(c);
}

static void say_hello(struct connection *c)
{
    const struct config *config = c->owner->options.config;
    struct wire_buffer *out = &c->peer.out;

    wire_append(out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    reply_begin(&c->peer, WIRE_HELLO, 0);
    wire_put_text(out, TAG_VERSION, HEARTH_VERSION);
    wire_put_number(out, TAG_PID, (uint64_t)getpid());
    wire_put_number(out, TAG_FRAME_LIMIT, config->limits.frame);
    wire_put_number(out, TAG_CREDIT, config->streaming.credit);
    wire_put_text(out, TAG_STATUS_PATH, c->owner->options.status_path);
    reply_end(&c->peer);
}

static void take_hello(struct connection *c, const struct wire_header *header, const uint8_t *body)
{
    struct refusal refusal = {.code = CODE_BAD_FRAME};
    struct wire_reader reader;
    struct wire_option option;
    int r;

    if (header->type != WIRE_HELLO || header->id != 0) {
        refusal_set(&refusal, CODE_BAD_FRAME, NULL, "the first frame must be hello, with id 0");
        connection_refuse(c, header->id, &refusal);
        return;
    }
    wire_reader_init(&reader, body, header->body_len);
    while ((r = wire_reader_next(&reader, &option)) > 0)
        ;
    if (r < 0) {
        refusal_set(&refusal, CODE_BAD_FRAME, NULL, "an option's length runs past its frame");
        connection_refuse(c, 0, &refusal);
        return;
    }
    c->phase = PHASE_OPEN;
    c->input_deadline_us = 0;
    /* The status socket goes on answering. */
    if (c->owner->goaway && !c->peer.status_only)
        reply_goaway(&c->peer, c->owner->goaway);
}

static void take_frame(struct connection *c, const struct wire_header *header, const uint8_t *body)
{
    struct refusal refusal;

    if (c->phase == PHASE_HELLO)
        take_hello(c, header, body); /* what came with it is dropped */
    else if (service_frame(c->owner->options.service, &c->peer, header, body, &refusal) < 0)
        connection_refuse(c, header->id, &refusal);
}

/* The frame that ends the bytes with which a descriptor came. */
static void take_frame_with(struct connection *c, const struct wire_header *header,
                            const uint8_t *body)
{
    c->peer.file_fd = TAKE_FD(c->passed_fd);
    c->peer.file_refused = c->passed == PASSED_REFUSED;
    c->passed = PASSED_NONE;
    take_frame(c, header, body);
    c->peer.file_refused = false;
    if (!c->closed)
        passed_drop(c);
}

/* Checks a header: the bytes of the whole frame, or 0 once the connection is ending. */
static size_t check_header(struct connection *c, const uint8_t *bytes,
                           struct wire_header *ret_header)
{
    uint64_t limit = c->owner->options.config->limits.frame;
    struct refusal refusal;

    if (wire_header_read(bytes, ret_header) < 0)
        refusal_set(&refusal, CODE_BAD_FRAME, NULL, "a reserved field of the header is not zero");
    else if (ret_header->body_len > limit)
        refusal_set(&refusal, CODE_TOO_LARGE, NULL,
                    "a frame of %u bytes is more than limits.frame, %llu", ret_header->body_len,
                    (unsigned long long)limit);
    else
        return WIRE_HEADER_BYTES + ret_header->body_len;
    connection_refuse(c, ret_header->id, &refusal);
    return 0;
}

/* Its replies wait unread, up to their bound: it is not listened to. */
static bool is_full(const struct connection *c)
{
    return peer_unsent(&c->peer) >= out_bound(c);
}

/* Takes whole units (the magic, frames) from the bytes, while there is room for replies; the number
 * of bytes used. *ret_need: bytes of the unit that is incomplete; 0: there was no room. */
static size_t take_units(struct connection *c, const uint8_t *bytes, size_t len, size_t *ret_need)
{
    size_t used = 0;

    *ret_need = 0;
    while (c->phase != PHASE_CLOSING && !c->closed && !is_full(c)) {
        struct wire_header header;
        size_t left = len - used, need = WIRE_HEADER_BYTES;
        if (c->phase == PHASE_MAGIC) {
            if (memcmp(bytes, WIRE_MAGIC, MIN(left, WIRE_MAGIC_BYTES)) != 0) {
                not_hearth(c, bytes, left);
                break;
            }
            need = WIRE_MAGIC_BYTES;
            if (left >= need) {
                used += need;
                c->phase = PHASE_HELLO;
                say_hello(c);
                continue;
            }
        } else if (left >= WIRE_HEADER_BYTES) {
            need = check_header(c, bytes + used, &header);
            if (need == 0)
                break;
            if (left >= need) {
                if (left == need && c->passed != PASSED_NONE)
                    take_frame_with(c, &header, bytes + used + WIRE_HEADER_BYTES);
                else
                    take_frame(c, &header, bytes + used + WIRE_HEADER_BYTES);
                used += need;
                continue;
            }
        }
        *ret_need = need;
        break;
    }
    return used;
}

/* There is no room for the frame that has begun: it is refused and its bytes are passed over. */
static void pass_over(struct connection *c, const uint8_t *header_bytes, size_t have, size_t need)
{
    struct wire_header header;
    struct refusal refusal;

    if (wire_header_read(header_bytes, &header) < 0)
        return;
    refusal_input(&refusal);
    service_refuse(c->owner->options.service, &c->peer, header.id, &refusal);
    passed_drop(c);
    c->skip_bytes = need - have;
}

/* Keeps the beginning of an incomplete unit. */
static void keep_partial(struct connection *c, const uint8_t *bytes, size_t len, size_t need)
{
    struct admission *admission = service_admission(c->owner->options.service);
    uint8_t *partial;

    if (need > WIRE_HEADER_BYTES && !admission_hold_input(admission, c->peer.account, need)) {
        pass_over(c, bytes, len, need);
        return;
    }
    partial = malloc(need);
    if (!partial) {
        if (need > WIRE_HEADER_BYTES)
            admission_release_input(admission, c->peer.account, need);
        connection_close(c);
        return;
    }
    memcpy(partial, bytes, len);
    c->partial = partial;
    c->partial_len = len;
    c->partial_need = need;
    c->held_bytes = need > WIRE_HEADER_BYTES ? need : 0;
}

/* A frame that has begun must end in time, however slowly its bytes drip. */
static void set_input_deadline(struct connection *c)
{
    if (c->phase != PHASE_OPEN)
        return;
    if (!c->partial && c->skip_bytes == 0) {
        c->input_deadline_us = 0;
    } else if (!c->input_deadline_us) {
        c->input_deadline_us = now_us(c->owner) + FRAME_US;
        c->owner->n_deadlines++;
    }
}

/* Keeps what was read and cannot be taken now, behind what is kept already. */
static void keep_backlog(struct connection *c, const uint8_t *bytes, size_t len)
{
    struct refusal refusal;
    uint8_t *backlog;

    if (!admission_hold_input(service_admission(c->owner->options.service), c->peer.account, len)) {
        refusal_busy(&refusal, CONNECTIONS_TICK_US,
                     "requests keep coming while their replies are not read, and there is no room "
                     "to keep them (limits.input_bytes, input_bytes_per_uid)");
        connection_refuse(c, 0, &refusal);
        return;
    }
    backlog = realloc(c->backlog, c->backlog_len + len);
    if (!backlog) {
        admission_release_input(service_admission(c->owner->options.service), c->peer.account, len);
        connection_close(c);
        return;
    }
    memcpy(backlog + c->backlog_len, bytes, len);
    c->backlog = backlog;
    c->backlog_len += len;
}

static void take_bytes(struct connection *c, const uint8_t *bytes, size_t len)
{
    size_t used, need;

    if (c->backlog || is_full(c)) {
        keep_backlog(c, bytes, len);
        return;
    }
    if (c->skip_bytes > 0) {
        size_t skip = MIN(c->skip_bytes, len);
        c->skip_bytes -= skip;
        bytes += skip;
        len -= skip;
    }
    if (len == 0)
        return;
    used = take_units(c, bytes, len, &need);
    if (c->closed || c->phase == PHASE_CLOSING)
        return;
    if (used < len && need == 0)
        keep_backlog(c, bytes + used, len - used);
    else if (used < len)
        keep_partial(c, bytes + used, len - used, need);
}

/* There is room for replies again. */
static void take_backlog(struct connection *c)
{
    uint8_t *bytes = TAKE_PTR(c->backlog);
    size_t len = c->backlog_len;

    c->backlog_len = 0;
    admission_release_input(service_admission(c->owner->options.service), c->peer.account, len);
    take_bytes(c, bytes, len);
    free(bytes);
    if (c->closed)
        return;
    set_input_deadline(c);
    wants_flush(&c->peer); /* what is asked of epoll may be something else now */
}

/* The incomplete unit is complete, or its header now says how long it will be. */
static void complete_partial(struct connection *c)
{
    uint8_t *bytes = TAKE_PTR(c->partial);
    size_t len = c->partial_len;

    partial_drop(c);
    take_bytes(c, bytes, len);
    free(bytes);
    if (!c->closed && c->phase == PHASE_OPEN && !c->partial)
        c->input_deadline_us = 0; /* the next frame has a limit of its own */
}

/* Bytes that follow what is kept. */
static void feed(struct connection *c, const uint8_t *bytes, size_t len)
{
    while (len > 0 && c->partial && !c->closed) {
        size_t part = MIN(len, c->partial_need - c->partial_len);
        memcpy(c->partial + c->partial_len, bytes, part);
        c->partial_len += part;
        bytes += part;
        len -= part;
        if (c->partial_len == c->partial_need)
            complete_partial(c);
    }
    if (len > 0 && !c->closed && c->phase != PHASE_CLOSING)
        take_bytes(c, bytes, len);
}

/* Takes the descriptor that came along: false when there were several. Room is given for one, and
 * only where one may be taken: the kernel lets go of all others. */
static bool take_passed(struct connection *c, struct msghdr *message, bool had_room)
{
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(message);

    if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
        memcpy(&c->passed_fd, CMSG_DATA(cmsg), sizeof(c->passed_fd));
        c->passed = PASSED_FILE;
    }
    if (!(message->msg_flags & MSG_CTRUNC))
        return true;
    if (had_room || c->passed != PASSED_NONE)
        return false;
    c->passed = PASSED_REFUSED;
    return true;
}

/* As readv(); -EBADMSG where more came along than may. */
static ssize_t receive(struct connection *c, struct iovec *iov, size_t n_iov)
{
    _Alignas(struct cmsghdr) char control[CMSG_LEN(sizeof(int))];
    bool room = c->passed == PASSED_NONE && service_takes_file(c->owner->options.service, &c->peer);
    struct msghdr message = {.msg_iov = iov,
                             .msg_iovlen = n_iov,
                             .msg_control = room ? control : NULL,
                             .msg_controllen = room ? sizeof(control) : 0};
    ssize_t n = recvmsg(c->peer.fd, &message, MSG_CMSG_CLOEXEC);

    if (n < 0)
        return -errno;
    return take_passed(c, &message, room) ? n : -EBADMSG;
}

static void refuse_passed(struct connection *c)
{
    struct refusal refusal;

    refusal_set(&refusal, CODE_BAD_FRAME, NULL, "one descriptor at most goes with a warm frame");
    connection_refuse(c, 0, &refusal);
}

static void connection_read(struct connection *c)
{
    uint8_t *buffer = c->owner->buffer;
    size_t room = c->partial ? c->partial_need - c->partial_len : 0;
    /* What is missing of a frame goes where its beginning is, and what follows it comes along. */
    struct iovec iov[2] = {{c->partial ? c->partial + c->partial_len : NULL, room},
                           {buffer, READ_BYTES}};
    ssize_t n = room > 0 ? receive(c, iov, 2) : receive(c, iov + 1, 1);

    if (n == -EAGAIN || n == -EINTR)
        return;
    if (n == -EBADMSG) {
        refuse_passed(c);
        return;
    }
    if (n <= 0) {
        connection_close(c);
        return;
    }
    if (room > 0) {
        size_t part = MIN((size_t)n, room);
        c->partial_len += part;
        n -= (ssize_t)part;
        if (part == room)
            complete_partial(c);
    }
    feed(c, buffer, (size_t)n);
    if (!c->closed)
        set_input_deadline(c);
}

void connections_event(struct connections *connections, void *slot, uint32_t events)
{
    struct connection *c = slot;

    assert(c->owner == connections);
    if (c->closed)
        return;
    /* A peer that hung up while it is not being read from is gone all the same. */
    if ((events & (EPOLLHUP | EPOLLERR)) && !(c->events & EPOLLIN))
        connection_close(c);
    else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        connection_read(c);
    if (c->closed || !(events & EPOLLOUT))
        return;
    if (c->backlog && !is_full(c))
        take_backlog(c);
    else
        wants_flush(&c->peer);
}

/* ---- accepting ---- */

static void turn_away(int fd, const struct refusal *refusal)
{
    struct wire_buffer out = {0};
    ssize_t n;

    wire_append(&out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(&out, WIRE_ERROR, 0);
    wire_put_text(&out, TAG_CODE, wire_code_name(refusal->code));
    wire_put_text(&out, TAG_SENTENCE, refusal->sentence);
    wire_put_number(&out, TAG_RETRY_AFTER_US, refusal->retry_after_us);
    wire_end(&out);
    n = send(fd, out.data, out.len, MSG_NOSIGNAL | MSG_DONTWAIT);
    (void)n; /* a courtesy */
    wire_buffer_done(&out);
    close(fd);
}

static bool read_credentials(int fd, struct ucred *ret_credentials)
{
    socklen_t len = sizeof(*ret_credentials);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, ret_credentials, &len) == 0;
}

static void connection_open(struct connections *connections, int fd, bool status_only)
{
    struct metrics *metrics = connections->options.metrics;
    struct epoll_event event = {.events = EPOLLIN};
    struct refusal refusal;
    struct account_entry *account;
    struct connection *c;
    struct ucred credentials;

    if (!read_credentials(fd, &credentials)) {
        close(fd);
        return;
    }
    account = admission_connect(service_admission(connections->options.service), credentials.uid,
                                &refusal);
    if (!account) {
        metrics_add(metrics, M_CONNECTIONS_REFUSED, 1);
        service_peer_refused(connections->options.service, credentials.uid, &refusal);
        turn_away(fd, &refusal);
        return;
    }
    c = slot_get(connections);
    event.data.ptr = c;
    if (!c || epoll_ctl(connections->options.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        admission_disconnect(service_admission(connections->options.service), account);
        if (c)
            slot_put(connections, c);
        close(fd);
        return;
    }
    c->owner = connections;
    c->events = EPOLLIN;
    c->passed_fd = -1;
    c->peer = (struct peer){.uid = credentials.uid,
                            .gid = credentials.gid,
                            .pid = credentials.pid,
                            .fd = fd,
                            .file_fd = -1,
                            .number = ++connections->n_ever,
                            .status_only = status_only,
                            .account = account,
                            .wants_flush = wants_flush};
    c->input_deadline_us = now_us(connections) + HELLO_US;
    connections->n_deadlines++;
    c->next = connections->live;
    if (c->next)
        c->next->previous = c;
    connections->live = c;
    connections->n_live++;
    metrics_add(metrics, M_CONNECTIONS_TOTAL, 1);
    publish(connections);
}

/* Descriptors are out: the reserve is spent to tell one client so. False: there is none. */
static bool turn_away_without_descriptor(struct connections *connections, int listen_fd)
{
    struct ucred credentials;
    struct refusal refusal;
    int fd;

    if (connections->reserve_fd < 0)
        return false;
    close(TAKE_FD(connections->reserve_fd));
    fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
        refusal_busy(&refusal, CONNECTIONS_TICK_US,
                     "the daemon is out of file descriptors; raise its LimitNOFILE");
        metrics_add(connections->options.metrics, M_CONNECTIONS_REFUSED, 1);
        if (read_credentials(fd, &credentials))
            service_peer_refused(connections->options.service, credentials.uid, &refusal);
        turn_away(fd, &refusal);
    }
    take_reserve(connections);
    return fd >= 0;
}

void connections_accept(struct connections *connections, int listen_fd, bool status_only)
{
    take_reserve(connections);
    for (uint32_t i = 0; i < ACCEPT_BATCH; i++) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            connection_open(connections, fd, status_only);
        } else if (errno == EMFILE || errno == ENFILE) {
            connections->accepts = turn_away_without_descriptor(connections, listen_fd);
            return;
        } else if (errno != ECONNABORTED && errno != EINTR) {
            connections->accepts = errno == EAGAIN; /* else the kernel's memory is out */
            return;
        }
    }
}

bool connections_accepts(const struct connections *connections)
{
    return connections->accepts;
}

/* ---- time and ends ---- */

static void check_deadlines(struct connection *c, uint64_t now)
{
    struct refusal refusal;

    if (c->output_deadline_us && now >= c->output_deadline_us) {
        log_info("connection %llu is closed: it does not read", (unsigned long long)c->peer.number);
        metrics_add(c->owner->options.metrics, M_CONNECTIONS_BROKEN, c->phase != PHASE_CLOSING);
        connection_close(c);
    } else if (c->input_deadline_us && now >= c->input_deadline_us) {
        c->input_deadline_us = 0;
        if (c->phase == PHASE_OPEN)
            refusal_set(&refusal, CODE_BAD_FRAME, NULL,
                        "a frame was begun and not finished within 10 s");
        else
            refusal_set(&refusal, CODE_BAD_FRAME, NULL, "no hello came within 2 s");
        connection_refuse(c, 0, &refusal);
    }
}

bool connections_tick(struct connections *connections)
{
    uint64_t now = now_us(connections);
    struct connection *c, *next;

    take_reserve(connections);
    connections->accepts = true;
    if (connections->n_deadlines == 0)
        return false;
    connections->n_deadlines = 0;
    for (c = connections->live; c; c = next) {
        next = c->next;
        check_deadlines(c, now);
        connections->n_deadlines += !c->closed && (c->input_deadline_us || c->output_deadline_us);
    }
    return connections->n_deadlines > 0;
}

void connections_goaway(struct connections *connections, const char *why)
{
    free(connections->goaway);
    connections->goaway = strdup(why); /* without memory only those that are open are told */
    for (struct connection *c = connections->live; c; c = c->next)
        if (c->phase == PHASE_OPEN)
            reply_goaway(&c->peer, why);
}

void connections_close_idle(struct connections *connections)
{
    struct connection *c, *next;

    for (c = connections->live; c; c = next) {
        next = c->next;
        if (c->peer.n_requests == 0 && peer_unsent(&c->peer) == 0 && !c->backlog)
            connection_close(c);
    }
}
