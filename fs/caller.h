/* A caller: the user in whose name an order goes to the daemon, as the kernel names him.
 *
 * FUSE gives uid and gid of the thread that called open(2); its supplementary groups stand in
 * /proc/PID/status. The thread cannot end, nor its number be given to another, before open(2) has
 * been answered: so they are read while it waits, and kept with the file from then on. They are
 * believed only where that file names the same uid and gid as FUSE did (a thread may act under
 * other credentials than those it shows). Whatever cannot be read or believed leaves the caller
 * with uid and gid alone: he can lose rights by that and gain none.
 *
 * Hides: /proc, the format of `status`. Any thread. */
#ifndef HEARTH_FS_CALLER_H
#define HEARTH_FS_CALLER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The gid and the supplementary groups after it; more are left out. As many as libhearth takes. */
#define CALLER_GIDS_MAX 256u

struct caller {
    uint32_t uid;
    uint32_t n_gids; /* at least 1 */
    uint32_t gids[CALLER_GIDS_MAX];
};

/* `pid` is the calling thread's; 0 where it has none in our namespace. */
void caller_init(struct caller *caller, uid_t uid, gid_t gid, pid_t pid);
/* Adds the groups that the text of a /proc/PID/status names. */
void caller_add_groups(struct caller *caller, const char *status);

#endif
