/* One connection: socket, hellos, dispatch, credit, and the end of it all. */
#include "lib/client.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/clock.h"
#include "lib/sized.h"

#define DEFAULT_CONNECT_TIMEOUT_US (15u * 1000000u)
#define INPUT_FIRST_BYTES          (64u << 10)
/* Buffers beyond this go back as soon as they are empty. */
#define BUFFER_KEEP_BYTES (256u << 10)
/* Reads of one dispatch, so that a busy daemon does not keep the caller from its other work. */
#define DISPATCH_MAX_READS  64
#define FIRST_REQUEST_SLOTS 16u
#define NO_SLOT             UINT32_MAX
/* How often a full backlog is tried again while connecting. */
#define BACKLOG_RETRY_US 2000u

static_assert(HEARTH_MESSAGE_BYTES == FAULT_TEXT_BYTES, "a sentence fits either way");
static_assert(HEARTH_PATH_BYTES == sizeof(((struct sockaddr_un *)0)->sun_path),
              "a socket's path is what sockaddr_un holds");

static const struct hearth_options options_defaults = HEARTH_OPTIONS_INIT;

uint64_t client_now_us(void)
{
    return clock_monotonic_us(NULL);
}

static uint64_t deadline_after(uint64_t timeout_us)
{
    uint64_t deadline;
    return __builtin_add_overflow(client_now_us(), timeout_us, &deadline) ? UINT64_MAX : deadline;
}

/* 0 when the descriptor is ready (or has failed), -ETIMEDOUT, -EINTR. */
static int wait_ready(int fd, short events, uint64_t deadline_us)
{
    struct pollfd pfd = {.fd = fd, .events = events};
    struct timespec ts, *timeout = NULL;
    if (deadline_us != UINT64_MAX) {
        uint64_t now = client_now_us();
        uint64_t left = deadline_us > now ? deadline_us - now : 0;
        ts = (struct timespec){.tv_sec = (time_t)(left / 1000000u),
                               .tv_nsec = (long)(left % 1000000u) * 1000};
        timeout = &ts;
    }
    int r = ppoll(&pfd, 1, timeout, NULL);
    if (r < 0)
        return -errno;
    return r == 0 ? -ETIMEDOUT : 0;
}

/* ---- the table of live requests ---- */

static struct request *request_find(struct hearth *h, uint64_t id)
{
    uint32_t index = (uint32_t)id - 1;
    if (id == 0 || index >= h->n_requests || h->requests[index].id != id)
        return NULL;
    return &h->requests[index];
}

static int requests_grow(struct hearth *h)
{
    uint32_t capacity = h->requests_capacity ? h->requests_capacity * 2 : FIRST_REQUEST_SLOTS;
    struct request *requests = reallocarray(h->requests, capacity, sizeof(*requests));
    if (!requests)
        return fault_set(&h->message, -ENOMEM, "no memory for more requests");
    h->requests = requests;
    h->requests_capacity = capacity;
    return 0;
}

static int request_new(struct hearth *h, struct request **ret_request)
{
    uint32_t index = h->first_free, generation = 0;
    if (index != NO_SLOT) {
        h->first_free = h->requests[index].next_free;
        generation = h->requests[index].generation + 1;
    } else {
        if (h->n_requests == h->requests_capacity) {
            int r = requests_grow(h);
            if (r < 0)
                return r;
        }
        index = h->n_requests++;
    }
    struct request *request = &h->requests[index];
    *request = (struct request){
        .id = (uint64_t)generation << 32 | (index + 1),
        .generation = generation,
        .next_free = NO_SLOT,
    };
    h->live++;
    *ret_request = request;
    return 0;
}

static void request_end(struct hearth *h, struct request *request)
{
    assert(request->id != 0 && h->live > 0);
    request->id = 0;
    request->next_free = h->first_free;
    h->first_free = (uint32_t)(request - h->requests);
    h->live--;
}

static size_t queued_bytes(const struct hearth *h)
{
    return h->out.len - h->out_sent;
}

int client_request_begin(struct hearth *h, uint16_t type, hearth_reply_fn fn, void *userdata,
                         struct request **ret_request)
{
    if (h->error)
        return h->error; /* the sentence is that of the loss */
    if (h->doomed)
        return -ECONNRESET;
    if (h->going_away)
        return fault_set(&h->message, -ESHUTDOWN,
                         "the daemon at %s takes no new requests on this connection: connect again",
                         h->path);
    if (h->live >= CLIENT_MAX_REQUESTS || queued_bytes(h) > CLIENT_MAX_QUEUED_BYTES)
        return fault_set(&h->message, -ENOBUFS,
                         "too much waits on this connection: dispatch before the next request");
    int r = request_new(h, ret_request);
    if (r < 0)
        return r;
    (*ret_request)->fn = fn;
    (*ret_request)->userdata = userdata;
    wire_begin(&h->out, type, (*ret_request)->id);
    if (h->acting)
        wire_put_bytes(&h->out, TAG_ON_BEHALF_OF, h->acting, h->acting_bytes);
    return 0;
}

int client_request_end(struct hearth *h, struct request *request, uint64_t *ret_id)
{
    int r = wire_end(&h->out);
    if (r == -ENOMEM) {
        /* Frames queued before are whole and stay; the next request may fare better. */
        h->out.failed = false;
        fault_set(&h->message, r, "no memory for the request");
    } else {
        size_t body_len = r < 0 ? SIZE_MAX : h->out.len - h->out.frame_at - WIRE_HEADER_BYTES;
        if (body_len > h->frame_limit) {
            h->out.len = h->out.frame_at;
            r = fault_set(&h->message, -EMSGSIZE,
                          "the request is larger than the daemon's limit of %" PRIu64
                          " bytes: shorten it, or raise limits.frame",
                          h->frame_limit);
        }
    }
    if (r < 0) {
        request_end(h, request);
        return r;
    }
    h->requests_sent++;
    if (ret_id)
        *ret_id = request->id;
    return 0;
}

static void note(struct hearth *h, uint16_t type, uint64_t id, uint16_t tag, uint64_t number)
{
    wire_begin(&h->out, type, id);
    if (tag)
        wire_put_number(&h->out, tag, number);
    if (wire_end(&h->out) < 0)
        h->out.failed = false;
}

int hearth_cancel(struct hearth *h, uint64_t id)
{
    struct request *request = request_find(h, id);
    if (!request)
        return -ENOENT;
    if (!request->cancelled)
        note(h, WIRE_CANCEL, id, 0, 0);
    request->cancelled = true;
    return 0;
}

int hearth_credit(struct hearth *h, uint64_t id, uint64_t bytes)
{
    if (!request_find(h, id))
        return -ENOENT;
    note(h, WIRE_CREDIT, id, TAG_CREDIT, bytes);
    return 0;
}

/* ---- life and death ---- */

static void hearth_destroy(struct hearth *h)
{
    if (h->fd >= 0)
        close(h->fd);
    if (h->passing_fd >= 0)
        close(h->passing_fd);
    free(h->in);
    wire_buffer_done(&h->out);
    free(h->requests);
    free(h->scratch.data);
    free(h->acting);
    free(h);
}

struct hearth *hearth_free(struct hearth *h)
{
    if (!h)
        return NULL;
    if (h->uses == 0) {
        hearth_destroy(h);
        return NULL;
    }
    /* In a callback: the daemon learns at once, the memory goes when the stack is left. */
    h->doomed = true;
    shutdown(h->fd, SHUT_RDWR);
    return NULL;
}

static void use(struct hearth *h)
{
    h->uses++;
}

/* Returns `r`, or -ECANCELED where a callback freed the connection: `h` must not be touched then.
 */
static int unuse(struct hearth *h, int r)
{
    if (--h->uses > 0 || !h->doomed)
        return r;
    hearth_destroy(h);
    return -ECANCELED;
}

/* Ends every live request with `lost`; requests cannot be started any more. */
static void lose(struct hearth *h, int error)
{
    if (h->error)
        return;
    h->error = error;
    if (h->passing_fd >= 0)
        close(TAKE_FD(h->passing_fd));
    h->out.len = h->out_sent = 0;
    for (uint32_t i = 0; i < h->n_requests && !h->doomed; i++) {
        struct request ended = h->requests[i];
        if (ended.id == 0)
            continue;
        request_end(h, &h->requests[i]);
        struct hearth_reply reply = {
            .kind = HEARTH_ERROR,
            .id = ended.id,
            .code = wire_code_name(CODE_INTERNAL),
            .sentence = h->message.text,
            .lost = true,
        };
        if (ended.fn)
            ended.fn(ended.userdata, &reply);
    }
}

__attribute__((format(printf, 2, 3))) static int protocol_error(struct hearth *h,
                                                                const char *format, ...)
{
    char why[FAULT_TEXT_BYTES / 2];
    va_list ap;
    va_start(ap, format);
    vsnprintf(why, sizeof(why), format, ap);
    va_end(ap);
    return fault_set(&h->message, -EPROTO, "the daemon at %s broke the protocol: %s", h->path, why);
}

/* ---- bytes out ---- */

int client_pass_fd(struct hearth *h, int fd)
{
    if (h->passing_fd >= 0)
        return fault_set(&h->message, -EBUSY,
                         "another file waits to be passed on this connection: dispatch first");
    h->passing_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (h->passing_fd < 0)
        return fault_set(&h->message, -errno, "the file cannot be passed: %s", strerror(errno));
    return 0;
}

static void passing_done(struct hearth *h)
{
    if (h->passing_fd >= 0)
        close(TAKE_FD(h->passing_fd));
}

/* The frame with its descriptor, in a message of its own: it belongs to the bytes it comes with. */
static ssize_t send_passing(struct hearth *h)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {h->out.data + h->out_sent, h->passing_end - h->out_sent};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof(control)};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(cmsg), &h->passing_fd, sizeof(int));
    ssize_t n = sendmsg(h->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
        passing_done(h);
    return n;
}

/* Sends as far as one message may go; *ret_more: that was not all, and there was room. */
static ssize_t send_some(struct hearth *h, bool *ret_more)
{
    size_t end = h->out.len;
    ssize_t n;
    if (h->passing_fd >= 0)
        end = h->out_sent < h->passing_at ? h->passing_at : h->passing_end;
    do
        n = h->passing_fd >= 0 && h->out_sent == h->passing_at
                ? send_passing(h)
                : send(h->fd, h->out.data + h->out_sent, end - h->out_sent,
                       MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    *ret_more = n > 0 && h->out_sent + (size_t)n == end && end < h->out.len;
    return n;
}

/* One send of all that waits. What cannot be sent because the peer is gone is dropped: the loss is
 * declared by the reading side, after the daemon's last words. */
static void flush_out(struct hearth *h)
{
    if (queued_bytes(h) == 0)
        return;
    if (!h->write_broken) {
        bool more = true;
        while (more) {
            ssize_t n = send_some(h, &more);
            if (n >= 0)
                h->out_sent += (size_t)n;
            else if (errno != EAGAIN && errno != EWOULDBLOCK)
                h->write_broken = true;
        }
    }
    if (!h->write_broken && queued_bytes(h) > 0) {
        /* Keeps the front from growing without an end while the socket never drains quite empty. */
        if (h->out_sent > BUFFER_KEEP_BYTES && h->out_sent > h->out.len / 2) {
            memmove(h->out.data, h->out.data + h->out_sent, queued_bytes(h));
            h->passing_at -= MIN(h->passing_at, h->out_sent);
            h->passing_end -= MIN(h->passing_end, h->out_sent);
            h->out.len -= h->out_sent;
            h->out_sent = 0;
        }
        return;
    }
    passing_done(h); /* not sent: nothing can be */
    h->out.len = h->out_sent = 0;
    if (h->out.capacity > BUFFER_KEEP_BYTES)
        wire_buffer_done(&h->out);
}

/* ---- bytes in ---- */

static int input_reserve(struct hearth *h)
{
    if (h->in_len + 1 < h->in_capacity)
        return 0;
    size_t capacity = h->in_capacity ? h->in_capacity * 2 : INPUT_FIRST_BYTES;
    uint8_t *in = realloc(h->in, capacity);
    if (!in)
        return fault_set(&h->message, -ENOMEM, "no memory for a reply of the daemon at %s",
                         h->path);
    h->in = in;
    h->in_capacity = capacity;
    return 0;
}

/* Reads once. The number of bytes, 0 when there are none now, or the loss. `ret_more`: the read
 * filled its room, there may be more. */
static ssize_t input_read(struct hearth *h, bool *ret_more)
{
    int r = input_reserve(h);
    if (r < 0)
        return r;
    size_t room = h->in_capacity - 1 - h->in_len;
    ssize_t n;
    do
        n = recv(h->fd, h->in + h->in_len, room, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    *ret_more = n > 0 && (size_t)n == room;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    if (n <= 0) {
        /* A sentence that the daemon gave for the end is better than ours. */
        if (!h->message.text[0])
            fault_set(&h->message, 0,
                      "the daemon at %s closed the connection: see 'systemctl status hearthd'",
                      h->path);
        return -ECONNRESET;
    }
    h->in_len += (size_t)n;
    return n;
}

/* A whole frame at in[at]: its size with the header; 0: not yet; -EPROTO. */
static ssize_t frame_size(struct hearth *h, size_t at, struct wire_header *ret_header)
{
    if (h->in_len - at < WIRE_HEADER_BYTES)
        return 0;
    if (wire_header_read(h->in + at, ret_header) < 0)
        return protocol_error(h, "a reserved field of a frame is not zero");
    if (ret_header->body_len > CLIENT_MAX_FRAME_BYTES)
        return protocol_error(h, "a frame of %" PRIu32 " bytes, more than the %u taken here",
                              ret_header->body_len, CLIENT_MAX_FRAME_BYTES);
    size_t size = WIRE_HEADER_BYTES + (size_t)ret_header->body_len;
    return h->in_len - at < size ? 0 : (ssize_t)size;
}

static void input_consume(struct hearth *h, size_t bytes)
{
    h->in_len -= bytes;
    if (h->in_len > 0) {
        memmove(h->in, h->in + bytes, h->in_len);
    } else if (h->in_capacity > BUFFER_KEEP_BYTES) {
        free(h->in);
        h->in = NULL;
        h->in_capacity = 0;
    }
}

/* ---- replies ---- */

/* Grants back what was delivered, in halves of the initial credit. */
static void credit_return(struct hearth *h, uint64_t id, size_t text_bytes)
{
    struct request *request = request_find(h, id);
    if (!request || request->credit_step == 0)
        return;
    request->credit_consumed += text_bytes;
    if (request->credit_consumed < request->credit_step)
        return;
    note(h, WIRE_CREDIT, id, TAG_CREDIT, request->credit_consumed);
    request->credit_consumed = 0;
}

/* Frames with id 0 speak about the connection. */
static int handle_connection_frame(struct hearth *h, uint16_t type,
                                   const struct hearth_reply *reply)
{
    if (type == WIRE_GOAWAY)
        h->going_away = true;
    else if (type == WIRE_ERROR)
        fault_set(&h->message, 0, "%s", reply->sentence ? reply->sentence : "no reason given");
    return 0;
}

static int reply_kind(uint16_t type)
{
    switch (type) {
    case WIRE_TOKENS: return HEARTH_TOKENS;
    case WIRE_ITEM: return HEARTH_ITEM;
    case WIRE_DONE: return HEARTH_DONE;
    case WIRE_ERROR: return HEARTH_ERROR;
    default: return -1;
    }
}

/* 1 where a callback has seen it, 0 where nobody is concerned, or the protocol's breach. */
static int handle_frame(struct hearth *h, const struct wire_header *header, uint8_t *body)
{
    int kind = header->id == 0 ? HEARTH_ERROR : reply_kind(header->type);
    struct request *request = request_find(h, header->id);
    if (header->id != 0 && (kind < 0 || !request))
        return 0;
    struct hearth_reply reply = {.kind = (enum hearth_reply_kind)kind, .id = header->id};
    struct fault fault;
    int r = reply_parse(body, header->body_len, &h->scratch, &reply, &fault);
    if (r == -ENOMEM)
        return fault_set(&h->message, r, "%s", fault.text);
    if (r < 0)
        return protocol_error(h, "%s", fault.text);
    if (header->id == 0)
        return handle_connection_frame(h, header->type, &reply);

    struct request seen = *request; /* the callback may move the table */
    bool ends = kind == HEARTH_DONE || kind == HEARTH_ERROR;
    if (ends)
        request_end(h, request);
    if (kind == HEARTH_ERROR && !reply.code)
        reply.code = wire_code_name(CODE_INTERNAL);
    if (kind == HEARTH_ERROR && !reply.sentence)
        reply.sentence = reply.code;
    if (seen.fn)
        seen.fn(seen.userdata, &reply);
    if (kind == HEARTH_TOKENS && !h->doomed)
        credit_return(h, header->id, reply.text_bytes);
    return 1;
}

/* Handles the whole frames that have arrived: how many concerned a request, or the breach. */
static int handle_input(struct hearth *h)
{
    size_t at = 0;
    int handled = 0;
    ssize_t size = 0;
    struct wire_header header;
    while (!h->doomed && (size = frame_size(h, at, &header)) > 0) {
        /* The byte behind the body is the next frame's first: lent as the last text's terminator.
         */
        uint8_t *body = h->in + at + WIRE_HEADER_BYTES, *behind = body + header.body_len;
        uint8_t lent = *behind;
        int r = handle_frame(h, &header, body);
        if (r < 0) {
            size = r;
            break;
        }
        *behind = lent;
        handled += r;
        at += (size_t)size;
    }
    if (size < 0)
        return (int)size;
    if (at > 0)
        input_consume(h, at);
    return handled;
}

static int dispatch(struct hearth *h)
{
    int handled = 0, r = 0;
    bool more = true;
    h->dispatching = true;
    if (h->unparsed) {
        h->unparsed = false;
        handled = r = handle_input(h);
    }
    for (int i = 0; i < DISPATCH_MAX_READS && more && r >= 0 && !h->doomed; i++) {
        ssize_t n = input_read(h, &more);
        if (n == 0)
            break;
        r = n < 0 ? (int)n : handle_input(h);
        if (r > 0)
            handled += r;
    }
    if (r < 0)
        lose(h, r);
    else if (!h->doomed)
        flush_out(h);
    h->dispatching = false;
    return r < 0 ? r : handled;
}

int hearth_dispatch(struct hearth *h)
{
    if (h->dispatching)
        return -EBUSY;
    if (h->error)
        return h->error;
    use(h);
    return unuse(h, dispatch(h));
}

/* Waits until `deadline_us`, dispatches. -ETIMEDOUT; else as hearth_dispatch(). */
static int wait_and_dispatch(struct hearth *h, uint64_t deadline_us)
{
    if (h->dispatching)
        return -EBUSY;
    if (h->error)
        return h->error;
    if (!h->unparsed) {
        flush_out(h);
        int r = wait_ready(h->fd, hearth_events(h), deadline_us);
        if (r < 0)
            return r;
    }
    return dispatch(h);
}

int hearth_wait(struct hearth *h, uint64_t timeout_us)
{
    use(h);
    int r = unuse(h, wait_and_dispatch(h, deadline_after(timeout_us)));
    return r == -ETIMEDOUT ? 0 : r;
}

int hearth_finish(struct hearth *h, uint64_t id, uint64_t timeout_us)
{
    uint64_t deadline_us = deadline_after(timeout_us);
    int r = 0;
    use(h);
    while (r >= 0 && !h->doomed && request_find(h, id))
        r = wait_and_dispatch(h, deadline_us);
    return unuse(h, r < 0 ? r : 0);
}

/* ---- what it says about itself ---- */

int hearth_fd(const struct hearth *h)
{
    return h->fd;
}

short hearth_events(const struct hearth *h)
{
    return queued_bytes(h) > 0 && !h->write_broken ? POLLIN | POLLOUT : POLLIN;
}

size_t hearth_in_flight(const struct hearth *h)
{
    return h->live;
}

bool hearth_going_away(const struct hearth *h)
{
    return h->going_away;
}

const char *hearth_message(const struct hearth *h)
{
    return h->message.text;
}

const char *hearth_daemon_version(const struct hearth *h)
{
    return h->version;
}

int64_t hearth_daemon_pid(const struct hearth *h)
{
    return h->pid;
}

uint64_t hearth_requests_sent(const struct hearth *h)
{
    return h->requests_sent;
}

bool client_is_reusable(const struct hearth *h)
{
    return !h->error && !h->going_away && !h->write_broken && h->uses == 0 && h->live == 0 &&
           h->in_len == 0 && queued_bytes(h) == 0;
}

/* ---- connecting ---- */

static int connect_fault(struct fault *ret_fault, int error, const char *path, uint64_t timeout_us)
{
    switch (error) {
    case -ENOENT:
    case -ENOTDIR:
        return fault_set(ret_fault, -ENOENT,
                         "no daemon at %s: start it with 'systemctl start hearthd.socket' or "
                         "'hearthd --socket %s'",
                         path, path);
    case -ECONNREFUSED:
        return fault_set(ret_fault, error,
                         "nobody listens at %s (left behind by a daemon that is gone): start it "
                         "with 'systemctl start hearthd.socket' or 'hearthd --socket %s'",
                         path, path);
    case -EACCES:
    case -EPERM:
        return fault_set(ret_fault, -EACCES,
                         "no permission to use %s: become a member of the group 'hearth' "
                         "('usermod -aG hearth USER') and log in again",
                         path);
    case -ETIMEDOUT:
        return fault_set(ret_fault, error,
                         "the daemon at %s did not answer within %.1f s: see 'systemctl status "
                         "hearthd'",
                         path, (double)timeout_us / 1e6);
    case -ECONNRESET:
        return fault_set(ret_fault, error,
                         "the daemon at %s closed the connection before its hello: see "
                         "'systemctl status hearthd'",
                         path);
    case -EINTR: return fault_set(ret_fault, error, "interrupted while connecting to %s", path);
    default: return fault_set(ret_fault, error, "cannot connect to %s: %s", path, strerror(-error));
    }
}

/* A connected non-blocking socket. A full backlog gives EAGAIN: tried again until the deadline. */
static int socket_connect(const char *path, uint64_t deadline_us, int *ret_fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, path, strlen(path) + 1);
    _cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (errno != EAGAIN)
            return -errno;
        if (client_now_us() >= deadline_us)
            return -ETIMEDOUT;
        if (usleep(BACKLOG_RETRY_US) < 0)
            return -errno;
    }
    *ret_fd = TAKE_FD(fd);
    return 0;
}

static int hello_put(struct hearth *h, const char *client_name)
{
    wire_append(&h->out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(&h->out, WIRE_HELLO, 0);
    wire_put_text(&h->out, TAG_VERSION, HEARTH_VERSION);
    if (client_name)
        wire_put_bytes(&h->out, TAG_CLIENT, client_name,
                       strnlen(client_name, CLIENT_MAX_CLIENT_NAME));
    if (wire_end(&h->out) < 0)
        return fault_set(&h->message, -ENOMEM, "no memory for a connection");
    return 0;
}

static int hello_read(struct hearth *h, const uint8_t *body, size_t body_len)
{
    struct wire_reader reader;
    struct wire_option option;
    uint64_t pid = 0;
    int r, bad = 0;
    h->frame_limit = WIRE_DEFAULT_FRAME;
    wire_reader_init(&reader, body, body_len);
    while ((r = wire_reader_next(&reader, &option)) > 0) {
        switch (option.tag) {
        case TAG_VERSION: {
            size_t len = MIN(option.len, sizeof(h->version) - 1);
            memcpy(h->version, option.value, len);
            h->version[len] = '\0';
            break;
        }
        case TAG_PID: bad |= wire_option_number(&option, &pid); break;
        case TAG_FRAME_LIMIT: bad |= wire_option_number(&option, &h->frame_limit); break;
        case TAG_CREDIT: bad |= wire_option_number(&option, &h->initial_credit); break;
        default: break;
        }
    }
    h->pid = (int64_t)pid;
    return r < 0 || bad ? protocol_error(h, "its hello is malformed") : 0;
}

/* The magic and the first frame, once they have arrived: 1, 0 for not yet, or an error. */
static int hello_handle(struct hearth *h)
{
    size_t n = MIN(h->in_len, (size_t)WIRE_MAGIC_BYTES);
    if (n > 0 && memcmp(h->in, WIRE_MAGIC, n) != 0)
        return fault_set(&h->message, -EPROTO,
                         "what listens at %s does not speak hearth's protocol: check --socket and "
                         "$HEARTH_SOCKET",
                         h->path);
    if (n < WIRE_MAGIC_BYTES)
        return 0;
    struct wire_header header;
    ssize_t size = frame_size(h, WIRE_MAGIC_BYTES, &header);
    if (size <= 0)
        return (int)size;
    uint8_t *body = h->in + WIRE_MAGIC_BYTES + WIRE_HEADER_BYTES;
    struct hearth_reply reply = {.kind = HEARTH_ERROR};
    int r;
    if (header.id == 0 && header.type == WIRE_HELLO) {
        r = hello_read(h, body, header.body_len);
    } else if (header.id == 0 && header.type == WIRE_GOAWAY) {
        r = fault_set(&h->message, -ESHUTDOWN, "the daemon at %s is going away: try again",
                      h->path);
    } else if (header.id == 0 && header.type == WIRE_ERROR) {
        r = reply_parse(body, header.body_len, &h->scratch, &reply, &h->message);
        r = fault_set(&h->message, -EBUSY, "the daemon at %s refused the connection: %s", h->path,
                      r == 0 && reply.sentence ? reply.sentence : "no reason given");
    } else {
        r = protocol_error(h, "its first frame is no hello");
    }
    if (r < 0)
        return r;
    input_consume(h, WIRE_MAGIC_BYTES + (size_t)size);
    h->unparsed = h->in_len > 0;
    return 1;
}

static int hello_exchange(struct hearth *h, uint64_t timeout_us, uint64_t deadline_us)
{
    for (;;) {
        flush_out(h);
        int r = wait_ready(h->fd, hearth_events(h), deadline_us);
        bool more;
        ssize_t n = r < 0 ? r : input_read(h, &more);
        if (n < 0)
            return connect_fault(&h->message, (int)n, h->path, timeout_us);
        r = n > 0 ? hello_handle(h) : 0;
        if (r != 0)
            return r < 0 ? r : 0;
    }
}

static int paths_resolve(const struct hearth_options *options, char ret_main[HEARTH_PATH_BYTES],
                         char ret_path[HEARTH_PATH_BYTES], struct fault *ret_fault)
{
    int r = hearth_socket_path(options->socket_path, ret_main);
    if (r >= 0 && options->status_socket)
        r = hearth_status_path(ret_main, ret_path);
    else if (r >= 0)
        memcpy(ret_path, ret_main, HEARTH_PATH_BYTES);
    if (r == -ENAMETOOLONG)
        return fault_set(ret_fault, r,
                         "the socket's path is longer than the %d bytes a socket may have: choose "
                         "a shorter directory",
                         HEARTH_PATH_BYTES - 1);
    if (r < 0)
        return fault_set(ret_fault, r, "the socket's path is empty: name one or leave it out");
    return 0;
}

DEFINE_CLEANUP(struct hearth *, hearth_free)

static int connect_hearth(const struct hearth_options *options, struct hearth **ret_hearth,
                          struct fault *ret_fault)
{
    uint64_t timeout_us =
        options->connect_timeout_us ? options->connect_timeout_us : DEFAULT_CONNECT_TIMEOUT_US;
    uint64_t deadline_us = deadline_after(timeout_us);
    char path[HEARTH_PATH_BYTES];
    _cleanup_(hearth_freep) struct hearth *h = calloc(1, sizeof(*h));
    if (!h)
        return fault_set(ret_fault, -ENOMEM, "no memory for a connection");
    h->fd = -1;
    h->passing_fd = -1;
    h->first_free = NO_SLOT;
    int r = paths_resolve(options, h->path, path, ret_fault);
    if (r < 0)
        return r;
    r = socket_connect(path, deadline_us, &h->fd);
    if (r < 0)
        return connect_fault(ret_fault, r, h->path, timeout_us);
    r = hello_put(h, options->client_name);
    if (r == 0)
        r = hello_exchange(h, timeout_us, deadline_us);
    if (r < 0)
        return fault_set(ret_fault, r, "%s", h->message.text);
    h->message.text[0] = '\0';
    *ret_hearth = TAKE_PTR(h);
    return 0;
}

int hearth_connect(const struct hearth_options *options, struct hearth **ret_hearth,
                   char ret_message[HEARTH_MESSAGE_BYTES])
{
    struct hearth_options whole = options_defaults;
    struct fault fault = {0};
    int r = options ? sized_read(&sized_options, options, &whole, &fault) : 0;
    if (r == 0)
        r = connect_hearth(&whole, ret_hearth, &fault);
    if (r < 0 && ret_message)
        memcpy(ret_message, fault.text, sizeof(fault.text));
    return r;
}
