/* Threads that complete, acquire and release on one pool, beside one that maintains it, one that
 * cancels now and then and one that reads its counters, while the daemon breaks off in the middle,
 * says goaway and closes, and connections grow too old, too idle and due for pings all the time. No
 * story may have a byte twice or in the wrong place. */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "lib/hearth.h"
#include "tests/support/fake_wire.h"

#define WORKERS     6
#define ROUNDS      600
#define MOST        3 /* connections of the pool */
#define SLOTS       64
#define PATIENCE_US 30000000u

static const char story[] = "Once upon a time there was a pool in a wood.";
#define STORY_BYTES (sizeof(story) - 1)

/* ---- a daemon in one thread; each connection has sent whole frames only ---- */

struct daemon {
    int listen_fd, wake[2];
    struct pollfd fds[2 + SLOTS];
    unsigned n, moves;
    pthread_t thread;
};

/* The story from `from` on, up to `to`. */
static void put_story(struct wire_buffer *out, uint64_t id, uint64_t from, uint64_t to)
{
    wire_begin(out, WIRE_TOKENS, id);
    wire_put_number(out, TAG_SEED, 7);
    wire_put_text(out, TAG_FINGERPRINT, "print");
    wire_put_bytes(out, TAG_TEXT, story + from, to - from);
    wire_end(out);
}

/* Answers one frame; false: the connection is closed then. */
static bool answer(struct daemon *daemon, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    unsigned move = daemon->moves++;
    bool stays = true;
    if (!fake_next(fd, &frame))
        return false;
    if (frame.header.type == WIRE_COMPLETE) {
        uint64_t skip = fake_number(&frame, TAG_SKIP_BYTES, 0), left = STORY_BYTES - skip;
        assert(skip <= STORY_BYTES);
        stays = move % 3 != 0 || left <= 20;
        put_story(&out, frame.header.id, skip, stays ? STORY_BYTES : skip + 10);
    }
    if (stays && (frame.header.type != WIRE_PING || move % 7 != 0))
        fake_put_done(&out, frame.header.id, "stop");
    if (stays && move % 11 == 0)
        fake_put_goaway(&out);
    if (out.len > 0 && !fake_send(fd, &out))
        return false;
    return stays && move % 13 != 0;
}

static void take_connection(struct daemon *daemon)
{
    int fd = accept(daemon->listen_fd, NULL, NULL);
    assert(fd >= 0 && daemon->n < 2 + SLOTS);
    if (fake_hello(fd))
        daemon->fds[daemon->n++] = (struct pollfd){.fd = fd, .events = POLLIN};
    else
        close(fd);
}

static void *serve(void *userdata)
{
    struct daemon *daemon = userdata;
    daemon->fds[0] = (struct pollfd){.fd = daemon->wake[0], .events = POLLIN};
    daemon->fds[1] = (struct pollfd){.fd = daemon->listen_fd, .events = POLLIN};
    daemon->n = 2;
    for (;;) {
        assert(poll(daemon->fds, daemon->n, -1) > 0);
        if (daemon->fds[0].revents)
            break;
        for (unsigned i = daemon->n; i-- > 2;) {
            if (!daemon->fds[i].revents || answer(daemon, daemon->fds[i].fd))
                continue;
            close(daemon->fds[i].fd);
            daemon->fds[i] = daemon->fds[--daemon->n];
        }
        if (daemon->fds[1].revents)
            take_connection(daemon);
    }
    while (daemon->n-- > 2)
        close(daemon->fds[daemon->n].fd);
    return NULL;
}

static void daemon_start(struct daemon *daemon, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, path, strlen(path) + 1);
    daemon->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int r = bind(daemon->listen_fd, (struct sockaddr *)&address, sizeof(address));
    assert(r == 0);
    r = listen(daemon->listen_fd, SLOTS);
    assert(r == 0);
    r = pipe(daemon->wake);
    assert(r == 0);
    r = pthread_create(&daemon->thread, NULL, serve, daemon);
    assert(r == 0);
}

static void daemon_stop(struct daemon *daemon)
{
    ssize_t n = write(daemon->wake[1], "", 1);
    assert(n == 1);
    pthread_join(daemon->thread, NULL);
    close(daemon->listen_fd);
    close(daemon->wake[0]);
    close(daemon->wake[1]);
}

/* ---- who uses the pool ---- */

struct heard {
    char text[2 * sizeof(story)];
    size_t bytes;
    int ends;
    bool done;
};

static atomic_int working, whole, cancelled;
static _Atomic(struct heard *) last; /* whose completion began last */

static void hear(void *userdata, const struct hearth_reply *reply)
{
    struct heard *heard = userdata;
    assert(heard->ends == 0);
    if (reply->kind == HEARTH_TOKENS) {
        assert(heard->bytes + reply->text_bytes <= STORY_BYTES);
        memcpy(heard->text + heard->bytes, reply->text, reply->text_bytes);
        heard->bytes += reply->text_bytes;
        return;
    }
    heard->ends++;
    heard->done = reply->kind == HEARTH_DONE;
    assert(heard->done || reply->lost);
}

static void complete(struct hearth_pool *pool)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct heard heard = {0};
    request.prompt = "Tell";
    atomic_store(&last, &heard);
    int r = hearth_pool_complete(pool, &request, hear, &heard, PATIENCE_US);
    assert(r == 0 ? heard.ends == 1 : r == -ECANCELED && heard.ends == 0);
    assert(memcmp(heard.text, story, heard.bytes) == 0);
    assert(!heard.done || heard.bytes == STORY_BYTES);
    atomic_fetch_add(&whole, heard.done);
}

static void use(struct hearth_pool *pool)
{
    struct hearth *h = NULL;
    uint64_t id;
    int r = hearth_pool_acquire(pool, PATIENCE_US, &h);
    assert(r == 0);
    if (hearth_null(h, NULL, NULL, &id) == 0)
        hearth_finish(h, id, PATIENCE_US); /* may break: then release closes it */
    hearth_pool_release(pool, h);
}

static void *work(void *userdata)
{
    for (int i = 0; i < ROUNDS; i++) {
        if (i % 3 == 0)
            use(userdata);
        else
            complete(userdata);
    }
    atomic_fetch_sub(&working, 1);
    return NULL;
}

static void *maintain(void *userdata)
{
    while (atomic_load(&working) > 0) {
        hearth_pool_maintain(userdata);
        usleep(300);
    }
    return NULL;
}

static void *cancel(void *userdata)
{
    while (atomic_load(&working) > 0) {
        int n = hearth_pool_cancel(userdata, atomic_load(&last));
        assert(n == 0 || n == 1);
        atomic_fetch_add(&cancelled, n);
        usleep(700);
    }
    return NULL;
}

static void *watch(void *userdata)
{
    char message[HEARTH_MESSAGE_BYTES];
    while (atomic_load(&working) > 0) {
        struct hearth_pool_stats stats = {.size_of = sizeof(stats)};
        hearth_pool_get_stats(userdata, &stats);
        assert(stats.open == stats.idle + stats.busy && stats.open <= MOST);
        hearth_pool_get_message(userdata, message);
        usleep(300);
    }
    return NULL;
}

static struct hearth_pool *pool_over(const char *path)
{
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    options.connection.socket_path = path;
    options.max_connections = MOST;
    options.idle_timeout_us = 2000;
    options.max_age_us = 20000;
    options.health_every_us = 200;
    options.health_timeout_us = 2000;
    int r = hearth_pool_new(&options, &pool);
    assert(r == 0);
    return pool;
}

int main(void)
{
    char dir[] = "/tmp/hearth-race-XXXXXX", path[64];
    struct daemon daemon = {0};
    pthread_t threads[WORKERS + 3];
    char *made = mkdtemp(dir);
    assert(made);
    snprintf(path, sizeof(path), "%s/s", dir);
    daemon_start(&daemon, path);
    struct hearth_pool *pool = pool_over(path);

    atomic_store(&working, WORKERS);
    for (int i = 0; i < WORKERS; i++)
        pthread_create(&threads[i], NULL, work, pool);
    pthread_create(&threads[WORKERS], NULL, maintain, pool);
    pthread_create(&threads[WORKERS + 1], NULL, watch, pool);
    pthread_create(&threads[WORKERS + 2], NULL, cancel, pool);
    for (int i = 0; i < WORKERS + 3; i++)
        pthread_join(threads[i], NULL);

    struct hearth_pool_stats stats = {.size_of = sizeof(stats)};
    hearth_pool_get_stats(pool, &stats);
    assert(stats.busy == 0 && stats.failovers > 0 && atomic_load(&whole) > 0);
    assert(atomic_load(&cancelled) > 0);
    assert(stats.created ==
           stats.open + stats.closed_idle + stats.closed_aged + stats.closed_broken);
    hearth_pool_free(pool);
    daemon_stop(&daemon);
    unlink(path);
    rmdir(dir);
    return 0;
}
