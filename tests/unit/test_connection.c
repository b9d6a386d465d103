/* Connections: frames cut anywhere, peers that do not read or do not speak, and memory that is out.
 * Time is virtual; the service behind is the real one. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/engine/kernels.h"
#include "daemon/log.h"
#include "daemon/net/connection.h"
#include "lib/cleanup.h"
#include "tests/support/alloc_fail.h"

#define SECOND      1000000u
#define MOST_ROUNDS 10000u
#define OUT_BYTES   4096u /* limits.stream_buffer */

static struct {
    char dir[64], path[96];
    struct config *config;
    struct metrics *metrics;
    struct service *service;
    struct connections *connections;
    struct clock clock;
    uint64_t now_us;
    int epoll_fd, listen_fd;
    struct wire_buffer hello;
} house;

static uint64_t virtual_now(const struct clock *clock)
{
    (void)clock;
    return house.now_us;
}

static void listen_on(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    house.listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    cr_assert_eq(bind(house.listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(house.listen_fd, 64), 0);
}

static void build_house(void)
{
    static const struct clock real = {.now_us = clock_monotonic_us};
    struct service_options service = {.clock = &real};
    struct connections_options options = {.clock = &house.clock, .status_path = "/none"};

    log_open(LOG_ERR);
    house.clock.now_us = virtual_now;
    house.now_us = 1000 * (uint64_t)SECOND;
    strcpy(house.dir, "/tmp/hearth-house-XXXXXX");
    cr_assert_not_null(mkdtemp(house.dir));
    snprintf(house.path, sizeof(house.path), "%s/s", house.dir);
    listen_on(house.path);
    cr_assert_eq(config_new(&house.config), 0);
    cr_assert_eq(config_add_models_dir(house.config, house.dir), 0);
    house.config->limits.stream_buffer = OUT_BYTES;
    cr_assert_eq(metrics_new(&house.metrics), 0);
    cr_assert_eq(kernels_choose("scalar", &service.kernels, NULL), 0);
    service.config = options.config = house.config;
    service.metrics = options.metrics = house.metrics;
    cr_assert_eq(service_new(&service, &house.service, NULL), 0);
    house.epoll_fd = options.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    options.service = house.service;
    cr_assert_eq(connections_new(&options, &house.connections), 0);
    wire_append(&house.hello, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(&house.hello, WIRE_HELLO, 0);
    wire_put_text(&house.hello, TAG_VERSION, "test");
    cr_assert_eq(wire_end(&house.hello), 0);
}

static void leave_house(void)
{
    connections_free(house.connections);
    while (!service_shut_down(house.service))
        service_settle(house.service);
    service_free(house.service);
    metrics_free(house.metrics);
    config_free(house.config);
    wire_buffer_done(&house.hello);
    close(house.epoll_fd);
    close(house.listen_fd);
    unlink(house.path);
    rmdir(house.dir);
}

/* Wake-ups until nothing is left to do. */
static void pump(void)
{
    struct epoll_event events[16];
    int n;

    if (!house.connections)
        return;
    connections_accept(house.connections, house.listen_fd, false);
    for (uint32_t round = 0; round < MOST_ROUNDS; round++) {
        n = epoll_wait(house.epoll_fd, events, ELEMENTSOF(events), 0);
        if (n <= 0)
            break;
        for (int i = 0; i < n; i++)
            connections_event(house.connections, events[i].data.ptr, events[i].events);
        service_settle(house.service);
        connections_flush(house.connections);
    }
}

static void wait_us(uint64_t us)
{
    house.now_us += us;
    connections_tick(house.connections);
    connections_flush(house.connections);
    pump();
}

static int join(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", house.path);
    cr_assert_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

/* Who is gone already is told nothing. */
static void say(int fd, const void *bytes, size_t len)
{
    ssize_t n = send(fd, bytes, len, MSG_NOSIGNAL);

    cr_assert(n == (ssize_t)len || (n < 0 && (errno == EPIPE || errno == ECONNRESET)));
}

/* What the daemon has sent since the last look. */
struct heard {
    bool magic; /* it begins with that */
    uint32_t done, errors;
    char code[32];
    bool end;
};

static void count_frames(struct heard *heard, const uint8_t *bytes, size_t len)
{
    struct wire_header header;
    struct wire_reader reader;
    struct wire_option option;

    heard->magic = len >= WIRE_MAGIC_BYTES && memcmp(bytes, WIRE_MAGIC, WIRE_MAGIC_BYTES) == 0;
    for (size_t at = heard->magic ? WIRE_MAGIC_BYTES : 0; at < len;
         at += WIRE_HEADER_BYTES + header.body_len) {
        cr_assert_eq(wire_header_read(bytes + at, &header), 0);
        cr_assert_leq(at + WIRE_HEADER_BYTES + header.body_len, len);
        heard->done += header.type == WIRE_DONE;
        heard->errors += header.type == WIRE_ERROR;
        wire_reader_init(&reader, bytes + at + WIRE_HEADER_BYTES, header.body_len);
        while (header.type == WIRE_ERROR && wire_reader_next(&reader, &option) > 0)
            if (option.tag == TAG_CODE)
                snprintf(heard->code, sizeof(heard->code), "%.*s", (int)option.len,
                         (const char *)option.value);
    }
}

static struct heard hear(int fd)
{
    static uint8_t bytes[4u << 20];
    struct heard heard = {0};
    size_t len = 0;
    ssize_t n = 1;

    while (n > 0 && len < sizeof(bytes)) {
        pump();
        n = recv(fd, bytes + len, sizeof(bytes) - len, MSG_DONTWAIT);
        len += n > 0 ? (size_t)n : 0;
    }
    heard.end = n == 0 || (n < 0 && errno == ECONNRESET);
    count_frames(&heard, bytes, len);
    return heard;
}

static uint64_t metric(enum metric_id id)
{
    return metrics_get(house.metrics, id);
}

/* Requests that are answered at once, the odd ones with an option that is skipped. */
static void put_nulls(struct wire_buffer *out, uint32_t n, size_t option_bytes)
{
    static const uint8_t option[8192];

    for (uint32_t i = 0; i < n; i++) {
        wire_begin(out, WIRE_NULL, 1 + i);
        if (i % 2 == 1)
            wire_put_bytes(out, 0x0777, option, option_bytes);
        cr_assert_eq(wire_end(out), 0);
    }
}

Test(connection, frames_may_be_cut_anywhere)
{
    struct wire_buffer text = {0};
    int fd;

    build_house();
    wire_append(&text, house.hello.data, house.hello.len);
    put_nulls(&text, 3, 40);
    for (size_t first = 1; first < text.len; first++) {
        for (size_t second = first; second < text.len; second += 13) {
            struct heard heard;
            fd = join();
            say(fd, text.data, first);
            pump();
            if (second > first)
                say(fd, text.data + first, second - first);
            pump();
            say(fd, text.data + second, text.len - second);
            heard = hear(fd);
            cr_assert(heard.done == 3 && heard.errors == 0 && !heard.end, "cut at %zu and %zu",
                      first, second);
            close(fd);
            pump();
        }
    }
    cr_assert_eq(metric(M_CONNECTIONS), 0);
    cr_assert_eq(metric(M_CONNECTIONS_BROKEN), 0);
    wire_buffer_done(&text);
    leave_house();
}

/* Sends requests and reads no reply until the daemon reads no more. */
static void fill(int fd)
{
    struct wire_buffer some = {0};
    uint32_t refused = 0, sent = 0;

    put_nulls(&some, 1, 0);
    while (refused < 3) {
        if (send(fd, some.data, some.len, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)some.len) {
            refused = 0;
        } else {
            cr_assert_eq(errno, EAGAIN);
            refused++;
        }
        pump();
        cr_assert_lt(++sent, 100000, "it reads on and on");
    }
    wire_buffer_done(&some);
}

Test(connection, who_does_not_read_is_closed_after_thirty_seconds)
{
    int deaf, slow;

    build_house();
    deaf = join();
    slow = join();
    say(deaf, house.hello.data, house.hello.len);
    say(slow, house.hello.data, house.hello.len);
    pump();
    fill(deaf);
    fill(slow);
    wait_us(29 * SECOND);
    cr_assert_eq(metric(M_CONNECTIONS), 2);
    cr_assert_gt(hear(slow).done, 100); /* begins anew */
    wait_us(2 * SECOND);
    cr_assert_eq(metric(M_CONNECTIONS), 1, "the deaf one is still there, or the slow one is not");
    cr_assert_eq(metric(M_CONNECTIONS_BROKEN), 1);
    wait_us(60 * SECOND);
    cr_assert_eq(metric(M_CONNECTIONS), 1);
    close(deaf);
    close(slow);
    leave_house();
}

Test(connection, who_is_silent_is_closed_in_time)
{
    struct wire_buffer text = {0};
    struct heard heard;
    int mute, half, idle;

    build_house();
    put_nulls(&text, 1, 0);
    mute = join();
    half = join();
    idle = join();
    say(half, house.hello.data, house.hello.len);
    say(half, text.data, text.len - 1);
    say(idle, house.hello.data, house.hello.len);
    pump();
    wait_us(2 * SECOND - 1);
    cr_assert_eq(metric(M_CONNECTIONS), 3);
    wait_us(1);
    heard = hear(mute);
    cr_assert(heard.magic, "whoever speaks begins with the magic");
    cr_assert(heard.end && strcmp(heard.code, "bad-frame") == 0);
    wait_us(8 * SECOND - 1);
    cr_assert_eq(metric(M_CONNECTIONS), 2);
    wait_us(1);
    heard = hear(half);
    cr_assert(heard.magic && heard.end && strcmp(heard.code, "bad-frame") == 0);
    wait_us(1000 * (uint64_t)SECOND);
    cr_assert_eq(metric(M_CONNECTIONS), 1, "who has nothing to say may stay");
    cr_assert_eq(metric(M_CONNECTIONS_BROKEN), 2);
    close(mute);
    close(half);
    close(idle);
    wire_buffer_done(&text);
    leave_house();
}

/* Everything a connection takes memory for: its slot, its hello, a frame that comes in parts, one
 * whose beginning comes with others, output and a backlog of requests. */
static void live(const struct wire_buffer *text, int fd)
{
    static const size_t cuts[] = {3, 12, 60, 300, 1000};
    size_t at = 0;

    for (size_t i = 0; i < ELEMENTSOF(cuts); i++) {
        say(fd, text->data + at, cuts[i] - at);
        at = cuts[i];
        pump();
    }
    say(fd, text->data + at, text->len - at);
    pump();
}

Test(connection, memory_that_is_out_ends_a_connection_and_harms_no_other)
{
    struct wire_buffer text = {0};
    bool failed = true;
    uint32_t ended = 0;
    int other, fd;

    build_house();
    wire_append(&text, house.hello.data, house.hello.len);
    put_nulls(&text, 400, 600);
    other = join();
    say(other, house.hello.data, house.hello.len);
    pump();
    for (unsigned n = 1; failed; n++) {
        struct heard heard;
        cr_assert_lt(n, 10000);
        fd = join();
        alloc_fail_at(n);
        live(&text, fd);
        failed = alloc_fail_done();
        heard = hear(fd);
        cr_assert(failed || (heard.done == 400 && !heard.end));
        cr_assert(heard.end || heard.done + heard.errors == 400, "%u: %u and %u, not ended", n,
                  heard.done, heard.errors);
        ended += heard.end;
        close(fd);
        say(other, text.data + house.hello.len, WIRE_HEADER_BYTES);
        heard = hear(other);
        cr_assert(heard.done == 0 || !heard.end);
        cr_assert_eq(metric(M_CONNECTIONS), 1, "the %uth", n);
    }
    cr_assert_gt(ended, 3);
    close(other);
    wire_buffer_done(&text);
    leave_house();
}

Test(connection, slots_are_used_again)
{
    int fds[3];

    build_house();
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < ELEMENTSOF(fds); i++) {
            fds[i] = join();
            say(fds[i], house.hello.data, house.hello.len);
        }
        pump();
        for (size_t i = 0; i < ELEMENTSOF(fds); i++)
            close(fds[i]);
        pump();
    }
    cr_assert_eq(metric(M_CONNECTIONS), 0);
    cr_assert_eq(metric(M_CONNECTIONS_TOTAL), 9);
    cr_assert_eq(metric(M_SLOTS), 3);
    cr_assert_eq(metric(M_SLOTS_REUSED), 6);
    leave_house();
}

Test(connection, an_end_with_connections_open_gives_everything_back)
{
    struct wire_buffer text = {0};
    int fds[3];

    build_house();
    put_nulls(&text, 1, 0);
    for (size_t i = 0; i < ELEMENTSOF(fds); i++) {
        fds[i] = join();
        say(fds[i], house.hello.data, house.hello.len);
        say(fds[i], text.data, text.len - i);
    }
    pump();
    house.connections = connections_free(house.connections);
    for (size_t i = 0; i < ELEMENTSOF(fds); i++) {
        cr_assert_eq(hear(fds[i]).end, true);
        close(fds[i]);
    }
    cr_assert_eq(metric(M_CONNECTIONS), 0);
    cr_assert_eq(admission_n_connections(service_admission(house.service)), 0);
    wire_buffer_done(&text);
    leave_house();
}
