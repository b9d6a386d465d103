#include "fs/connector.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct connector {
    /* Set before the thread starts, then read by it alone. */
    char socket_path[HEARTH_PATH_BYTES];
    bool status_socket;
    uint64_t timeout_us;
    int over_fd;
    /* Written by the thread before it stores `over` (release), read by the caller after it has
     * loaded it (acquire). */
    struct hearth *hearth;
    int error;
    atomic_bool over;
    /* The thread and the caller; the last to let go frees. */
    atomic_int owners;
};

static void let_go(struct connector *connector)
{
    /* acq_rel: what the other owner wrote before letting go is seen by the one who frees. */
    if (atomic_fetch_sub_explicit(&connector->owners, 1, memory_order_acq_rel) > 1)
        return;
    hearth_free(connector->hearth);
    close(connector->over_fd);
    free(connector);
}

static void *attempt(void *userdata)
{
    struct connector *connector = userdata;
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    struct hearth *hearth = NULL;
    ssize_t n;

    options.socket_path = connector->socket_path;
    options.status_socket = connector->status_socket;
    options.client_name = "hearthfs";
    options.connect_timeout_us = connector->timeout_us;
    connector->error = hearth_connect(&options, &hearth, NULL);
    if (connector->error >= 0) {
        connector->error = 0;
        connector->hearth = hearth;
    }
    atomic_store_explicit(&connector->over, true, memory_order_release);
    /* An eventfd's first write never blocks and does not fail. */
    n = write(connector->over_fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)n;
    let_go(connector);
    return NULL;
}

int connector_start(const char *socket_path, bool status_socket, uint64_t timeout_us,
                    struct connector **ret_connector)
{
    struct connector *connector;
    pthread_t thread;
    int r;

    if (strlen(socket_path) >= HEARTH_PATH_BYTES)
        return -ENAMETOOLONG;
    connector = calloc(1, sizeof(*connector));
    if (!connector)
        return -ENOMEM;
    strcpy(connector->socket_path, socket_path);
    connector->status_socket = status_socket;
    connector->timeout_us = timeout_us;
    atomic_init(&connector->owners, 2);
    connector->over_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (connector->over_fd < 0) {
        r = -errno;
        free(connector);
        return r;
    }
    r = pthread_create(&thread, NULL, attempt, connector);
    if (r != 0) {
        close(connector->over_fd);
        free(connector);
        return -r;
    }
    pthread_detach(thread);
    *ret_connector = connector;
    return 0;
}

int connector_fd(const struct connector *connector)
{
    return connector->over_fd;
}

int connector_result(struct connector *connector, struct hearth **ret_hearth)
{
    if (!atomic_load_explicit(&connector->over, memory_order_acquire))
        return -EINPROGRESS;
    if (connector->error < 0)
        return connector->error;
    *ret_hearth = connector->hearth;
    connector->hearth = NULL;
    return 0;
}

struct connector *connector_free(struct connector *connector)
{
    if (connector)
        let_go(connector);
    return NULL;
}
