#include "daemon/net/connection_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/log.h"
#include "lib/cleanup.h"

/* Output buffers beyond this are given back when they are empty. */
#define KEEP_OUT_BYTES 4096u

/* Connections accepted in one wake-up, so that a storm of them holds up nobody. */
#define ACCEPT_BATCH 64u

/* Slots kept for reuse. */
#define SPARE_SLOTS 1024u

/* Time limits of a peer: its hello, output it does not read, and the last sentence to one that is
 * being closed. */
#define HELLO_US 2000000u
#define STUCK_US 30000000u
#define CLOSE_US 2000000u

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

/* For --verbose. */
static void log_life(const struct connection *c, const char *what)
{
    log_write(LOG_DEBUG,
              &(struct log_fields){.connection = (unsigned long)c->peer.number,
                                   .uid = (long)c->peer.uid,
                                   .has_uid = 1},
              "connection %llu of uid %u%s %s", (unsigned long long)c->peer.number, c->peer.uid,
              c->peer.status_only ? " to the status socket" : "", what);
}

void connection_close(struct connection *c)
{
    struct connections *connections = c->owner;

    if (c->closed)
        return;
    c->closed = true;
    log_life(c, "is over");
    close(c->peer.fd); /* leaves the epoll set */
    take_reserve(connections);
    connections->accepts = true;
    service_peer_gone(connections->options.service, &c->peer);
    input_drop(c);
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
    if (unsent < connection_out_bound(c)) {
        c->output_deadline_us = c->phase == PHASE_CLOSING ? c->output_deadline_us : 0;
        /* What was read already comes first, a bound of output at a time: writable or not, the
         * next wake-up sees it. */
        if (c->phase != PHASE_CLOSING)
            events |= c->backlog ? EPOLLOUT : EPOLLIN;
        if (c->peer.congested && unsent < connection_out_bound(c) / 2)
            service_peer_drained(connections->options.service, &c->peer);
    } else if (!c->output_deadline_us) {
        c->output_deadline_us = connections_now_us(connections) + STUCK_US;
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
    if (c->peer.out_sent > connection_out_bound(c) && c->peer.out_sent > out->len / 2) {
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

void connection_end(struct connection *c)
{
    c->phase = PHASE_CLOSING;
    input_drop(c);
    c->output_deadline_us = connections_now_us(c->owner) + CLOSE_US;
    c->owner->n_deadlines++;
    metrics_add(c->owner->options.metrics, M_CONNECTIONS_BROKEN, 1);
    wants_flush(&c->peer);
}

void connection_refuse(struct connection *c, uint64_t id, const struct refusal *refusal)
{
    log_write(LOG_NOTICE,
              &(struct log_fields){.code = wire_code_name(refusal->code),
                                   .connection = (unsigned long)c->peer.number,
                                   .uid = (long)c->peer.uid,
                                   .has_uid = 1},
              "connection %llu of uid %u is closed: %s", (unsigned long long)c->peer.number,
              c->peer.uid, refusal->sentence);
    if (c->phase == PHASE_MAGIC) /* else it has been said */
        wire_append(&c->peer.out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    service_refuse(c->owner->options.service, &c->peer, id, refusal);
    connection_end(c);
}

/* ---- events ---- */

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
        input_read(c);
    if (c->closed || !(events & EPOLLOUT))
        return;
    if (c->backlog && !connection_is_full(c))
        input_take_backlog(c);
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
    c->input_deadline_us = connections_now_us(connections) + HELLO_US;
    connections->n_deadlines++;
    c->next = connections->live;
    if (c->next)
        c->next->previous = c;
    connections->live = c;
    connections->n_live++;
    metrics_add(metrics, M_CONNECTIONS_TOTAL, 1);
    log_life(c, "has come");
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

void connections_tick(struct connections *connections)
{
    uint64_t now = connections_now_us(connections);
    struct connection *c, *next;

    take_reserve(connections);
    connections->accepts = true;
    if (connections->n_deadlines == 0)
        return;
    connections->n_deadlines = 0;
    for (c = connections->live; c; c = next) {
        next = c->next;
        check_deadlines(c, now);
        connections->n_deadlines += !c->closed && (c->input_deadline_us || c->output_deadline_us);
    }
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
