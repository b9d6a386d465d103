/* A hearthd of the benchmark's own: a folder in $TMPDIR (/tmp) with its socket, configuration,
 * models, state and log, and the process.
 *
 * SIGINT, SIGTERM and SIGHUP end the benchmark with the daemon and the folder gone, exit code 130.
 * Hides the folder's layout and where the program is. Thread: the main thread's; one at a time. */
#ifndef HEARTH_BENCH_OWN_DAEMON_H
#define HEARTH_BENCH_OWN_DAEMON_H

#include <stdbool.h>
#include <sys/types.h>

#include "lib/hearth.h"

struct own_daemon {
    char dir[96];
    char models[112]; /* models' folder */
    char socket_path[HEARTH_PATH_BYTES];
    pid_t pid; /* 0: not running */
};

/* Makes the folder. BENCH_DONE, or BENCH_FAILED after saying why; give it back all the same. */
int own_daemon_new(struct own_daemon *daemon);
/* Starts hearthd (the one of the same build, else the installed one) with this configuration, and
 * waits until it answers. */
int own_daemon_start(struct own_daemon *daemon, const char *yaml);
/* SIGTERM, and waits for the end. Nothing when it does not run. */
void own_daemon_stop(struct own_daemon *daemon);
/* Stops it and removes the folder with all that is in it. */
void own_daemon_done(struct own_daemon *daemon);

#endif
