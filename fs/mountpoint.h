/* A mount point: whether hearthfs can mount on it, said well while it still can be said.
 *
 * A hearthfs that was killed leaves its mount, on which every call fails with ENOTCONN; the next
 * one clears it away. Only that: a mount that answers, or that is no hearthfs, is left alone.
 *
 * Hides /proc/self/mountinfo, umount2(2), fusermount3. Thread: any; waits for fusermount3 where the
 * user is not root. */
#ifndef HEARTH_FS_MOUNTPOINT_H
#define HEARTH_FS_MOUNTPOINT_H

#include <stdbool.h>

#include "lib/fault.h"

/* What our mounts are called in mountinfo. */
#define MOUNTPOINT_TYPE "fuse.hearthfs"
/* Dead mounts, one on another, that are cleared away. */
#define MOUNTPOINT_DEAD_MAX 8

/* A mount made by somebody else, handed to us as a descriptor. */
bool mountpoint_is_fd(const char *path);
/* 0, or a negative errno with a sentence. */
int mountpoint_prepare(const char *path, struct fault *ret_fault);
/* What a line of mountinfo says of `path` (as realpath(3) gives it): 1, a hearthfs is mounted
 * there; 0, something else; -ENOENT, it speaks of another place. */
int mountpoint_line_is_ours(const char *line, const char *path);

#endif
