/* The server: the reactor's loop and the daemon's life around it.
 *
 * One epoll set holds listening sockets, connections, the service's descriptors and, as one member,
 * sd-event with signals and the watchdog's timer. Hides readiness, STATUS lines, draining, idle
 * exit. Thread: the main one, which becomes the reactor in server_run(). */
#ifndef HEARTH_NET_SERVER_H
#define HEARTH_NET_SERVER_H

#include "lib/clock.h"
#include "daemon/config.h"
#include "daemon/metrics/metrics.h"
#include "daemon/net/listener.h"
#include "lib/fault.h"

struct server;

struct server_options {
    const struct config *config;
    const struct kernel_table *kernels;
    struct metrics *metrics;
    const struct clock *clock;
    const char *socket_path; /* NULL: the usual search; ignored when systemd passed a socket */
};

/* Opens the sockets and starts the service. Signals must be blocked (SIGTERM, SIGINT, SIGHUP). */
int server_new(const struct server_options *options, struct server **ret_server,
               struct fault *ret_fault);
/* Serves until SIGTERM, SIGINT or idle exit, then drains: 0, or a negative errno. */
int server_run(struct server *server);
struct server *server_free(struct server *server);

/* The list of models' names that belongs to a socket, to be freed; makes its directory where that
 * is missing and can be made. 0 or -ENOMEM. */
int server_names_path(const struct config *config, const char *socket_path, char **ret_path);

#endif
