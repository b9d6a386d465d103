/* Attempts to connect that are taken, and attempts that are abandoned at every moment of their
 * life: the thread and the caller let go in either order, and the last one frees. */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/connector.h"
#include "tests/support/status_daemon.h"

#define ATTEMPTS   400
#define TIMEOUT_US 5000000u

static void take(struct connector *connector)
{
    struct pollfd pfd = {.fd = connector_fd(connector), .events = POLLIN};
    struct hearth *hearth = NULL;

    assert(poll(&pfd, 1, 10000) == 1);
    int r = connector_result(connector, &hearth);
    assert(r == 0 && hearth);
    connector_free(connector);
    hearth_free(hearth);
}

int main(void)
{
    char dir[] = "/tmp/hearth-race-XXXXXX", path[64];
    assert(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    struct status_daemon *daemon = status_daemon_start(path);

    for (unsigned i = 0; i < ATTEMPTS; i++) {
        struct connector *connector = NULL;
        int r = connector_start(path, i % 2, TIMEOUT_US, &connector);
        assert(r == 0);
        if (i % 4 == 0) {
            take(connector);
            continue;
        }
        /* From before its first step to long after its end. */
        usleep((i % 40) * 10);
        struct hearth *hearth = NULL;
        if (i % 4 == 1 && connector_result(connector, &hearth) == 0)
            hearth_free(hearth);
        connector_free(connector);
    }
    status_daemon_stop(daemon);
    rmdir(dir);
    return 0;
}
