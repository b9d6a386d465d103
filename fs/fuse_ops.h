/* FUSE operations: answers the kernel's requests from tree, mirror and link.
 *
 * A file's text is taken when it is opened and kept in the handle. An operation that needs a
 * fresher copy than there is, or something to happen first, is parked and tried again by
 * view_step(); no operation blocks.
 *
 * Who may: the kernel checks modes (default_permissions); what root may in spite of them is refused
 * here, because a value that cannot be written is nobody's to write. Orders and holds are passed on
 * in the name of who opened the file; whether that one may, the daemon says.
 *
 * Hides: handles, parked requests, poll handles. Thread: the session loop's. */
#ifndef HEARTH_FS_FUSE_OPS_H
#define HEARTH_FS_FUSE_OPS_H

#include <stdint.h>
#include <sys/types.h>

#include "fs/events.h"
#include "fs/link.h"
#include "fs/mirror.h"
#include "fs/tree.h"

#define FUSE_USE_VERSION 314
#include <fuse_lowlevel.h>

/* Open files and directories, in all and of one uid; beyond it -ENFILE and -EMFILE. */
#define VIEW_HANDLES_MAX         65536u
#define VIEW_HANDLES_PER_UID_MAX 16384u
/* Bytes kept for open files and directories (what they held when they were opened), of one uid and
 * in all; beyond it -EMFILE and -ENFILE. */
#define VIEW_KEPT_BYTES_PER_UID_MAX (64u << 20)
#define VIEW_KEPT_BYTES_MAX         (256u << 20)
/* Open files of one uid that somebody polls: each is looked at with every push. Beyond it POLLERR.
 */
#define VIEW_POLLED_PER_UID_MAX 2048u
/* How long the kernel may keep what cannot change, and what follows the daemon. */
#define VIEW_FIXED_TIMEOUT_S   3600.0
#define VIEW_FOLLOWS_TIMEOUT_S 0.1

/* Longest that an open, a look into a directory or a read waits for a fresh copy: then it gets the
 * last one, whatever the daemon has said meanwhile. Less than a second, which is promised. */
#define VIEW_PATIENCE_US 950000u

/* How long the daemon goes on pushing its values when nobody has looked. */
#define VIEW_FEED_US 10000000u

struct view;

/* `link`, `mirror` and `events` are borrowed. The owner of all files is `uid` and `gid`. */
int view_new(struct mirror *mirror, struct link *link, struct events *events, uid_t uid, gid_t gid,
             struct view **ret_view);
/* Parked requests are answered with ENODEV. */
struct view *view_free(struct view *view);

/* The operations; their userdata is the view. */
const struct fuse_lowlevel_ops *view_ops(void);
/* Lets tree and parked requests follow the mirror and asks for what is missing. To be called after
 * link_dispatch() and after requests have been processed. */
void view_step(struct view *view, uint64_t now_us);
/* When view_step() has to be called next, whatever poll says; UINT64_MAX: never. */
uint64_t view_due_us(const struct view *view, uint64_t now_us);

uint64_t view_now_us(void);

#endif
