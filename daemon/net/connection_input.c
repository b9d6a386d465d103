#include "daemon/net/connection_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* A frame that has begun must end within this time. */
#define FRAME_US 10000000u

/* ---- giving up ---- */

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

void input_drop(struct connection *c)
{
    passed_drop(c);
    partial_drop(c);
    backlog_drop(c);
}

/* ---- units ---- */

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

/* Takes whole units (the magic, frames) from the bytes, while there is room for replies; the number
 * of bytes used. *ret_need: bytes of the unit that is incomplete; 0: there was no room. */
static size_t take_units(struct connection *c, const uint8_t *bytes, size_t len, size_t *ret_need)
{
    size_t used = 0;

    *ret_need = 0;
    while (c->phase != PHASE_CLOSING && !c->closed && !connection_is_full(c)) {
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
        c->input_deadline_us = connections_now_us(c->owner) + FRAME_US;
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

    if (c->backlog || connection_is_full(c)) {
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

void input_take_backlog(struct connection *c)
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
    c->peer.wants_flush(&c->peer); /* what is asked of epoll may be something else now */
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

void input_read(struct connection *c)
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
