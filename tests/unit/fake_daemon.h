/* A daemon made of sand: a thread that accepts connections on a temporary socket and lets each be
 * played by a script of the test, in frames of the real wire.
 *
 * Each connection has a thread of its own, joined by fake_stop(). A script that finds the client
 * gone just returns. Hides: sockets and threads. */
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

#include "lib/hearth.h"
#include "tests/support/fake_wire.h"

#define FAKE_MAX_CONNECTIONS 256

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
