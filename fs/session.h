/* The session: mounts the view, runs its loop, unmounts.
 *
 * Hides: mount options, signals, the poll loop over the kernel's descriptor and the link's. One
 * thread, which never blocks but in poll(2). */
#ifndef HEARTH_FS_SESSION_H
#define HEARTH_FS_SESSION_H

#include "lib/fault.h"

struct session_options {
    const char *socket_path; /* NULL: the default search */
    const char
        *mount_point; /* a directory, or /dev/fd/N: the descriptor of a mount made elsewhere */
    const char *mount_options; /* comma-separated, NULL: none; for mount helpers */
};

/* Serves until SIGTERM, SIGINT or an unmount: 0; or a negative errno and a sentence. */
int session_run(const struct session_options *options, struct fault *ret_fault);

#endif
