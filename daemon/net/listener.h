/* The listening sockets: the main one, from systemd or by path, and the status socket beside it.
 *
 * Hides activation, stale socket files, modes and groups. Thread: the reactor. */
#ifndef HEARTH_NET_LISTENER_H
#define HEARTH_NET_LISTENER_H

#include <stdbool.h>

#include "lib/fault.h"
#include "lib/hearth.h"

struct listener {
    int main_fd, status_fd;
    bool activated; /* the main socket is systemd's and stays when the daemon goes */
    char path[HEARTH_PATH_BYTES];
    char status_path[HEARTH_PATH_BYTES];
};

/* Takes the socket systemd passed, or binds `path` (mode 0660, group hearth where that exists and
 * may be given). A file that nobody answers on is replaced; one that a daemon answers on is
 * -EADDRINUSE. */
int listener_open(struct listener *ret_listener, const char *path, struct fault *ret_fault);
/* Where that is without systemd, `path` or the usual search: as clients look for it, but that a
 * user's own daemon makes its socket in the user's runtime directory where clients find none yet.
 * -ENAMETOOLONG. */
int listener_path(const char *path, char ret_path[HEARTH_PATH_BYTES]);
/* Stops listening: the files go, but for an activated main socket. */
void listener_close(struct listener *listener);

#endif
