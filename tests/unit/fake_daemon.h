/* A daemon made of sand: a thread that accepts connections on a temporary socket and lets each be
 * played by a script of the test, in frames of the real wire.
 *
 * Each connection has a thread of its own, joined by fake_stop(). A script that finds the client
 * gone just returns. Hides: sockets, threads, partial reads. */
#ifndef HEARTH_TESTS_FAKE_DAEMON_H
#define HEARTH_TESTS_FAKE_DAEMON_H

#include <criterion/criterion.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"
#include "lib/wire.h"

#define FAKE_MAX_CONNECTIONS 256
#define FAKE_MAX_FRAME       (1u << 21)
#define FAKE_CREDIT          1024u
#define FAKE_FRAME_LIMIT     4096u

struct fake;
typedef void (*fake_script)(struct fake *fake, int fd);

struct fake {
    char dir[64], path[HEARTH_PATH_BYTES];
    int listen_fd;
    fake_script script;
    pthread_t acceptor, connections[FAKE_MAX_CONNECTIONS];
    int n_connections;
    atomic_int accepted, seen, note; /* counters for the tests' use */
};

struct fake_frame {
    struct wire_header header;
    uint8_t *body;
};

struct fake_play {
    struct fake *fake;
    int fd;
};

static inline void *fake_connection(void *userdata)
{
    struct fake_play play = *(struct fake_play *)userdata;
    free(userdata);
    play.fake->script(play.fake, play.fd);
    close(play.fd);
    return NULL;
}

static inline void *fake_accept(void *userdata)
{
    struct fake *fake = userdata;
    int fd;
    while (fake->n_connections < FAKE_MAX_CONNECTIONS &&
           (fd = accept(fake->listen_fd, NULL, NULL)) >= 0) {
        struct fake_play *play = malloc(sizeof(*play));
        *play = (struct fake_play){fake, fd};
        atomic_fetch_add(&fake->accepted, 1);
        pthread_create(&fake->connections[fake->n_connections++], NULL, fake_connection, play);
    }
    return NULL;
}

static inline void fake_start(struct fake *fake, fake_script script)
{
    *fake = (struct fake){.dir = "/tmp/hearth-test-XXXXXX", .script = script};
    cr_assert_not_null(mkdtemp(fake->dir));
    snprintf(fake->path, sizeof(fake->path), "%s/s", fake->dir);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, fake->path, strlen(fake->path) + 1);
    fake->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(fake->listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(fake->listen_fd, 64), 0);
    /* Its threads take no signals: those are for the test. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    cr_assert_eq(pthread_create(&fake->acceptor, NULL, fake_accept, fake), 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* The clients must be gone, or the script must end by itself. */
static inline void fake_stop(struct fake *fake)
{
    shutdown(fake->listen_fd, SHUT_RDWR);
    pthread_join(fake->acceptor, NULL);
    for (int i = 0; i < fake->n_connections; i++)
        pthread_join(fake->connections[i], NULL);
    close(fake->listen_fd);
    unlink(fake->path);
    rmdir(fake->dir);
}

static inline bool fake_read(int fd, void *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = recv(fd, (char *)bytes + at, len - at, 0);
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

static inline bool fake_write(int fd, const void *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(fd, (const char *)bytes + at, len - at, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

/* Sends what is in the buffer and empties it. */
static inline bool fake_send(int fd, struct wire_buffer *buffer)
{
    bool sent = fake_write(fd, buffer->data, buffer->len);
    wire_buffer_done(buffer);
    return sent;
}

static inline bool fake_next(int fd, struct fake_frame *frame)
{
    uint8_t head[WIRE_HEADER_BYTES];
    free(frame->body);
    frame->body = NULL;
    if (!fake_read(fd, head, sizeof(head)) || wire_header_read(head, &frame->header) < 0 ||
        frame->header.body_len > FAKE_MAX_FRAME)
        return false;
    frame->body = malloc(frame->header.body_len + 1u);
    return fake_read(fd, frame->body, frame->header.body_len);
}

static inline void fake_frame_free(struct fake_frame *frame)
{
    free(frame->body);
}
#define _cleanup_frame_ _cleanup_(fake_frame_free)

/* The option's value as a number; `missing` where the frame has none. */
static inline uint64_t fake_number(const struct fake_frame *frame, uint16_t tag, uint64_t missing)
{
    struct wire_reader reader;
    struct wire_option option;
    uint64_t value = missing;
    wire_reader_init(&reader, frame->body, frame->header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        if (option.tag == tag)
            wire_option_number(&option, &value);
    return value;
}

/* The option's text in a buffer of the caller's; false where there is none. */
static inline bool fake_text(const struct fake_frame *frame, uint16_t tag, char *ret_text,
                             size_t size)
{
    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, frame->body, frame->header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        if (option.tag == tag) {
            snprintf(ret_text, size, "%.*s", (int)option.len, (const char *)option.value);
            return true;
        }
    return false;
}

static inline void fake_put_hello(struct wire_buffer *out)
{
    wire_append(out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(out, WIRE_HELLO, 0);
    wire_put_text(out, TAG_VERSION, "1.2.3");
    wire_put_number(out, TAG_PID, 4711);
    wire_put_number(out, TAG_FRAME_LIMIT, FAKE_FRAME_LIMIT);
    wire_put_number(out, TAG_CREDIT, FAKE_CREDIT);
    wire_end(out);
}

/* The client's magic and hello in, the daemon's out. */
static inline bool fake_hello(int fd)
{
    char magic[WIRE_MAGIC_BYTES];
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_read(fd, magic, sizeof(magic)) || memcmp(magic, WIRE_MAGIC, sizeof(magic)) != 0 ||
        !fake_next(fd, &frame) || frame.header.type != WIRE_HELLO || frame.header.id != 0)
        return false;
    fake_put_hello(&out);
    return fake_send(fd, &out);
}

static inline void fake_put_tokens(struct wire_buffer *out, uint64_t id, const char *text)
{
    wire_begin(out, WIRE_TOKENS, id);
    wire_put_text(out, TAG_TEXT, text);
    wire_end(out);
}

static inline void fake_put_done(struct wire_buffer *out, uint64_t id, const char *reason)
{
    wire_begin(out, WIRE_DONE, id);
    if (reason)
        wire_put_text(out, TAG_REASON, reason);
    wire_end(out);
}

static inline void fake_put_goaway(struct wire_buffer *out)
{
    wire_begin(out, WIRE_GOAWAY, 0);
    wire_end(out);
}

/* The plainest daemon: every request is done at once. */
static inline void fake_serve_done(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer out = {0};
        atomic_fetch_add(&fake->seen, 1);
        fake_put_done(&out, frame.header.id, "stop");
        if (!fake_send(fd, &out))
            return;
    }
}

static inline int fake_connect(const struct fake *fake, struct hearth **ret_hearth,
                               char *ret_message)
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    options.socket_path = fake->path;
    options.connect_timeout_us = 10000000;
    return hearth_connect(&options, ret_hearth, ret_message);
}

#endif
