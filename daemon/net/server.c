#include "daemon/net/server.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-event.h>
#include <unistd.h>

#include "daemon/log.h"
#include "daemon/net/connection.h"
#include "daemon/net/notify.h"
#include "daemon/serve/service.h"
#include "lib/cleanup.h"

/* Events taken from the kernel at once. */
#define EVENT_BATCH 256

/* STATUS= is sent to systemd at most so often. */
#define STATUS_US 2000000u

/* After the drain's time limit: for last frames to be sent and models to be let go. */
#define LAST_WORDS_US 2000000u

enum server_phase {
    SERVER_RUNNING,
    SERVER_DRAINING,  /* no new requests; those that run may finish */
    SERVER_EXPELLING, /* those that still run are being ended */
    SERVER_UNLOADING, /* models are being let go */
    SERVER_DONE,
};

/* Members of the epoll set other than connections are told apart by their address. */
struct source {
    struct server *server;
    int fd;
    void (*fn)(struct server *server, struct source *source);
    void (*dispatch)(struct service *service);
};

/* The listening sockets come first. */
#define LISTENERS 2u
#define N_SOURCES (LISTENERS + SERVICE_SOURCES + 1)

struct server {
    struct server_options options;
    struct listener listener;
    int epoll_fd;
    sd_event *events;
    struct service *service;
    struct connections *connections;
    struct source sources[N_SOURCES];
    size_t n_sources;
    bool listens; /* listening sockets are waited for */
    enum server_phase phase;
    uint64_t phase_deadline_us;
    uint64_t connections_due_us, status_due_us, watchdog_due_us;
    uint64_t watchdog_us; /* 0: not asked for */
    uint64_t idle_since_us;
    char *names_path, *history_path;
};

static uint64_t now_us(const struct server *server)
{
    return clock_now_us(server->options.clock);
}

/* ---- members of the epoll set ---- */

static int add_source(struct server *server, int fd,
                      void (*fn)(struct server *server, struct source *source),
                      void (*dispatch)(struct service *service))
{
    struct source *source = &server->sources[server->n_sources++];
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};

    *source = (struct source){.server = server, .fd = fd, .fn = fn, .dispatch = dispatch};
    return epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static void accept_main(struct server *server, struct source *source)
{
    connections_accept(server->connections, source->fd, false);
}

static void accept_status(struct server *server, struct source *source)
{
    connections_accept(server->connections, source->fd, true);
}

static void dispatch_service(struct server *server, struct source *source)
{
    source->dispatch(server->service);
}

/* sd-event is armed (prepared) whenever the loop waits. */
static void dispatch_events(struct server *server, struct source *source)
{
    int r = sd_event_wait(server->events, 0);

    (void)source;
    if (r > 0)
        sd_event_dispatch(server->events);
    while (sd_event_prepare(server->events) > 0)
        sd_event_dispatch(server->events);
}

/* Waits for the listening sockets while somebody can be accepted. */
static void settle_listeners(struct server *server)
{
    bool accepts = connections_accepts(server->connections);

    if (accepts == server->listens)
        return;
    for (size_t i = 0; i < LISTENERS; i++) {
        struct epoll_event event = {.events = accepts ? EPOLLIN : 0,
                                    .data.ptr = &server->sources[i]};
        /* The main one has left the set where the daemon drains. */
        epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, server->sources[i].fd, &event);
    }
    server->listens = accepts;
}

static bool is_source(const struct server *server, const void *ptr)
{
    return (const struct source *)ptr >= server->sources &&
           (const struct source *)ptr < server->sources + N_SOURCES;
}

/* ---- the daemon's life ---- */

static void begin_drain(struct server *server, const char *why)
{
    if (server->phase != SERVER_RUNNING)
        return;
    log_info("draining: %s", why);
    notify_send("STOPPING=1\nSTATUS=draining");
    server->phase = SERVER_DRAINING;
    server->phase_deadline_us = now_us(server) + server->options.config->drain_timeout_us;
    epoll_ctl(server->epoll_fd, EPOLL_CTL_DEL, server->listener.main_fd, NULL);
    service_drain(server->service);
    connections_goaway(server->connections, "the daemon is stopping");
}

/* From one phase of the end to the next, as soon as there is nothing left to wait for. */
static void advance_phase(struct server *server)
{
    uint64_t now = now_us(server);
    bool late = now >= server->phase_deadline_us;

    if (server->phase == SERVER_DRAINING && (service_n_requests(server->service) == 0 || late)) {
        service_expel_all(server->service);
        server->phase = SERVER_EXPELLING;
        server->phase_deadline_us = now + LAST_WORDS_US;
        late = false;
    }
    if (server->phase == SERVER_EXPELLING) {
        connections_close_idle(server->connections);
        if ((service_n_requests(server->service) == 0 &&
             connections_all_sent(server->connections)) ||
            late) {
            server->phase = SERVER_UNLOADING;
            server->phase_deadline_us = now + LAST_WORDS_US;
            late = false;
        }
    }
    if (server->phase == SERVER_UNLOADING && (service_shut_down(server->service) || late))
        server->phase = SERVER_DONE;
}

static int on_signal(sd_event_source *event_source, const struct signalfd_siginfo *info,
                     void *userdata)
{
    struct server *server = userdata;

    (void)event_source;
    if (info->ssi_signo == SIGHUP)
        service_reload(server->service);
    else
        begin_drain(server, info->ssi_signo == SIGTERM ? "SIGTERM" : "SIGINT");
    return 0;
}

static void send_status(struct server *server)
{
    _cleanup_free_ char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        return;
    fputs("STATUS=", out);
    service_write_summary(server->service, out);
    if (fclose(out) == 0)
        notify_send(text);
}

/* An activated daemon that has had nothing to do for long enough goes; the socket brings it back.
 */
static void check_idle(struct server *server, uint64_t now)
{
    uint64_t idle_exit_us = server->options.config->idle_exit_us;

    if (!server->listener.activated || idle_exit_us == 0 || server->phase != SERVER_RUNNING)
        return;
    if (!service_idle(server->service))
        server->idle_since_us = now;
    else if (now - server->idle_since_us >= idle_exit_us)
        begin_drain(server, "idle");
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Does what is due. */
static void tick(struct server *server)
{
    uint64_t now = now_us(server);

    if (now >= server->connections_due_us) {
        connections_tick(server->connections);
        server->connections_due_us = now + CONNECTIONS_TICK_US;
    }
    if (now >= service_due_us(server->service)) {
        service_tick(server->service);
        check_idle(server, now);
    }
    if (now >= server->status_due_us) {
        send_status(server);
        server->status_due_us = now + STATUS_US;
    }
    if (server->watchdog_us > 0 && now >= server->watchdog_due_us) {
        if (service_alive(server->service))
            notify_send("WATCHDOG=1");
        else
            log_error("the engine thread stands still; the watchdog is not fed");
        server->watchdog_due_us = now + server->watchdog_us / 2;
    }
}

/* When tick() has something to do again. */
static uint64_t due_us(const struct server *server)
{
    uint64_t due = min_u64(server->connections_due_us, service_due_us(server->service));

    due = min_u64(due, server->status_due_us);
    return server->watchdog_us > 0 ? min_u64(due, server->watchdog_due_us) : due;
}

static int wait_ms(const struct server *server)
{
    uint64_t now = now_us(server), due = due_us(server), us = due > now ? due - now : 0;

    if (server->phase != SERVER_RUNNING)
        us = min_u64(us, 20000); /* the end's phases are looked after more often */
    return (int)min_u64((us + 999) / 1000, 60000);
}

/* What was written goes out, and so does what that makes due. */
static void send_all(struct server *server)
{
    service_settle(server->service);
    do
        connections_flush(server->connections);
    while (service_settle(server->service));
}

int server_run(struct server *server)
{
    struct epoll_event events[EVENT_BATCH];

    if (sd_event_prepare(server->events) > 0)
        sd_event_dispatch(server->events);
    sd_notify(0, "READY=1\nSTATUS=running"); /* may wait: nobody is served yet */
    log_info("listening on %s", server->listener.path);
    while (server->phase != SERVER_DONE) {
        int n;
        tick(server);
        send_all(server);
        settle_listeners(server);
        n = epoll_wait(server->epoll_fd, events, EVENT_BATCH, wait_ms(server));
        if (n < 0 && errno != EINTR) {
            int r = -errno;
            log_error("cannot wait for events: %s", strerror(-r));
            return r;
        }
        service_wake(server->service);
        for (int i = 0; i < n; i++) {
            if (is_source(server, events[i].data.ptr)) {
                struct source *source = events[i].data.ptr;
                source->fn(server, source);
            } else {
                connections_event(server->connections, events[i].data.ptr, events[i].events);
            }
        }
        send_all(server);
        if (server->phase != SERVER_RUNNING)
            advance_phase(server);
    }
    connections_flush(server->connections);
    log_info("stopped");
    return 0;
}

/* ---- setting up ---- */

/* Whether what outlives the daemon has a directory; else it lies beside the socket. */
static bool has_state_dir(const char *socket_path)
{
    size_t len = strlen(socket_path), suffix = strlen("/hearth.sock");

    return len >= suffix && strcmp(socket_path + len - suffix, "/hearth.sock") == 0;
}

int server_names_path(const struct config *config, const char *socket_path, char **ret_path)
{
    char *path;

    if (has_state_dir(socket_path))
        mkdir(config->state_dir, 0755); /* where it cannot be, no list is written */
    if ((has_state_dir(socket_path) ? asprintf(&path, "%s/models.list", config->state_dir)
                                    : asprintf(&path, "%s.models", socket_path)) < 0)
        return -ENOMEM;
    *ret_path = path;
    return 0;
}

/* Where the list of names goes that is read while no daemon runs, and the history of requests. */
static int find_state_paths(struct server *server)
{
    const struct config *config = server->options.config;
    const char *path = server->listener.path;
    int r = server_names_path(config, path, &server->names_path);

    if (r < 0)
        return r;
    if ((has_state_dir(path) ? asprintf(&server->history_path, "%s/history", config->state_dir)
                             : asprintf(&server->history_path, "%s.history", path)) < 0) {
        server->history_path = NULL;
        return -ENOMEM;
    }
    return 0;
}

static int add_signals(struct server *server)
{
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};
    int r = sd_event_new(&server->events);

    for (size_t i = 0; i < ELEMENTSOF(signals) && r >= 0; i++)
        r = sd_event_add_signal(server->events, NULL, signals[i], on_signal, server);
    return r;
}

static int add_sources(struct server *server)
{
    struct service_source sources[SERVICE_SOURCES];
    int r;

    service_sources(server->service, sources);
    server->listens = true;
    r = add_source(server, server->listener.main_fd, accept_main, NULL);
    if (r == 0)
        r = add_source(server, server->listener.status_fd, accept_status, NULL);
    if (r == 0)
        r = add_source(server, sd_event_get_fd(server->events), dispatch_events, NULL);
    for (size_t i = 0; i < SERVICE_SOURCES && r == 0; i++)
        r = add_source(server, sources[i].fd, dispatch_service, sources[i].dispatch);
    return r;
}

static int open_parts(struct server *server, struct fault *ret_fault)
{
    struct service_options service = {.config = server->options.config,
                                      .kernels = server->options.kernels,
                                      .metrics = server->options.metrics,
                                      .clock = server->options.clock};
    struct connections_options connections = {.config = server->options.config,
                                              .metrics = server->options.metrics,
                                              .clock = server->options.clock,
                                              .status_path = server->listener.status_path};
    int r = listener_open(&server->listener, server->options.socket_path, ret_fault);

    if (r < 0)
        return r;
    server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    r = server->epoll_fd < 0 ? -errno : find_state_paths(server);
    if (r == 0)
        r = add_signals(server);
    if (r < 0)
        return fault_set(ret_fault, r, "cannot set up the reactor: %s", strerror(-r));
    service.names_path = server->names_path;
    service.history_path = server->history_path;
    r = service_new(&service, &server->service, ret_fault);
    if (r < 0)
        return r;
    connections.epoll_fd = server->epoll_fd;
    connections.service = server->service;
    r = connections_new(&connections, &server->connections);
    if (r == 0)
        r = add_sources(server);
    if (r < 0)
        return fault_set(ret_fault, r, "cannot set up the reactor: %s", strerror(-r));
    return 0;
}

int server_new(const struct server_options *options, struct server **ret_server,
               struct fault *ret_fault)
{
    struct server *server = calloc(1, sizeof(*server));
    uint64_t watchdog_us = 0;
    int r;

    if (!server)
        return fault_set(ret_fault, -ENOMEM, "no memory for the server");
    server->options = *options;
    server->epoll_fd = server->listener.main_fd = server->listener.status_fd = -1;
    r = open_parts(server, ret_fault);
    if (r < 0) {
        server_free(server);
        return r;
    }
    if (sd_watchdog_enabled(0, &watchdog_us) > 0)
        server->watchdog_us = watchdog_us;
    server->idle_since_us = now_us(server);
    *ret_server = server;
    return 0;
}

struct server *server_free(struct server *server)
{
    if (!server)
        return NULL;
    server->connections = connections_free(server->connections);
    server->service = service_free(server->service);
    sd_event_unref(server->events);
    listener_close(&server->listener);
    if (server->epoll_fd >= 0)
        close(server->epoll_fd);
    free(server->names_path);
    free(server->history_path);
    free(server);
    return NULL;
}
