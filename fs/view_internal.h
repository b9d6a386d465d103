/* What the files of the view share: its state, open files, parked requests. Thread: the session
 * loop's. */
#ifndef HEARTH_FS_VIEW_INTERNAL_H
#define HEARTH_FS_VIEW_INTERNAL_H

#include "fs/caller.h"
#include "fs/events.h"
#include "fs/fuse_ops.h"
#include "fs/parked.h"
#include "lib/hash.h"

/* An entry of a directory's snapshot. */
struct entry {
    uint64_t ino;
    mode_t mode;
    char name[TREE_NAME_MAX + 1];
};

/* Somebody who has something open; there while he has. */
struct user {
    uid_t uid;
    size_t n_handles;
    size_t n_polled; /* of them with a poll handle */
    size_t kept_bytes;
    UT_hash_handle hh;
};

/* One open(2) or opendir(3). */
struct handle {
    struct handle *prev, *next;
    struct view *view;
    uint64_t ino;
    enum tree_what what;
    struct user *user; /* whose it is */
    size_t kept_bytes; /* text, entries and what is given again, as counted in `user` */
    bool changed;      /* the value is no longer `text`; poll has said so */
    char *text;        /* the snapshot; NULL where none has been taken (yet) */
    size_t bytes;
    struct caller *caller; /* who opened it; NULL unless for writing */
    struct link_order *hold;
    bool hold_broken;     /* the daemon has ended it */
    struct wish *opening; /* the open(2) of a hold, until the daemon has acknowledged it */
    struct events_reader events;
    char *given; /* the end of what has been read of `events`, for who seeks back; or NULL */
    size_t given_bytes;
    off_t given_end;       /* its place in the file */
    struct entry *entries; /* a directory's snapshot */
    size_t n_entries;
    struct fuse_pollhandle *poll; /* somebody wants to know of the next change */
};

enum wish_kind {
    WISH_LOOKUP,
    WISH_OPEN,
    WISH_OPENDIR,
    WISH_READ,        /* a snapshot that is taken when it is first read */
    WISH_WAIT,        /* a blocking read of `wait` */
    WISH_PEEK,        /* one that may not block */
    WISH_EVENTS,      /* a blocking read of `events` */
    WISH_EVENTS_OPEN, /* an open of it, until the daemon tells them */
    WISH_ORDER,
    WISH_HOLD, /* the link ends the last two */
};

/* A parked request. */
struct wish {
    struct parked parked; /* first: the list's entry */
    struct view *view;
    enum wish_kind kind;
    fuse_req_t req;
    bool tried;
    bool interrupted; /* set inside libfuse's lock; answered by the next step */
    uint64_t ino;     /* lookup: the directory */
    char name[TREE_NAME_MAX + 1];
    struct fuse_file_info file;
    size_t size; /* read and write */
    off_t offset;
    struct link_order *order;
    struct handle *handle; /* of an open(2): not the kernel's yet, so ours to free */
};

/* What a step has seen of the copy: something new is what differs. */
struct seen {
    uint64_t changes, held_us, events;
    const char *status;
};

struct view {
    struct mirror *mirror; /* borrowed */
    struct link *link;     /* borrowed */
    struct events *events; /* borrowed */
    struct tree *tree;
    uid_t uid;
    gid_t gid;
    struct timespec born; /* the directories' times */
    uint64_t changes;     /* of the mirror, as far as the tree has followed */
    struct seen seen;
    uint64_t looked_us;  /* somebody last wanted a value */
    uint64_t gave_up_us; /* somebody last got the last copy for want of a fresh one */
    struct parked_list parked;
    struct handle *handles;
    struct user *users; /* by uid */
    size_t n_handles;
    size_t kept_bytes;
    size_t n_polled; /* of them with a poll handle */
    size_t n_events; /* of them `events` */
};

/* ---- view.c ---- */

static inline struct view *view_of(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

static inline struct handle *handle_of(const struct fuse_file_info *file)
{
    return (struct handle *)(uintptr_t)file->fh;
}

/* Somebody looks: the tree has what the copy has, and this is since when values must hold for him.
 */
uint64_t view_look(struct view *view, uint64_t now_us);
/* Whether the copy will do for who wants values that held at `since_us` or later. */
bool view_answers(const struct view *view, uint64_t since_us, uint64_t now_us);
void view_fill_attr(const struct view *view, uint64_t ino, mode_t mode, struct stat *ret_attr);
void view_fill_entry(const struct view *view, uint64_t parent, uint64_t ino, mode_t mode,
                     struct fuse_entry_param *ret_entry);
double view_timeout_s(uint64_t parent);
double view_attr_timeout_s(uint64_t parent, mode_t mode);

int handle_new(struct view *view, fuse_req_t req, const struct tree_node *node,
               struct handle **ret_handle);
void handle_free(struct handle *handle);
/* From now on this much is kept for the handle, if it may be. -EMFILE, -ENFILE. */
int handle_keep(struct handle *handle, size_t bytes);
/* The handle's text is the value now. */
int handle_take(struct handle *handle, uint64_t now_us);
void handle_set_poll(struct handle *handle, struct fuse_pollhandle *poll);
/* Whether he who opened it polls as many as he may already, and not this one. */
bool handle_polls_too_many(const struct handle *handle);
/* Tells whoever polls, once. */
void handle_wake(struct handle *handle);
/* The kernel has the handle from now on, or it is freed. */
void handle_give(struct handle *handle, fuse_req_t req, const struct fuse_file_info *asked);

/* Keeps the request for later; where that cannot be, answers it with the reason. */
struct wish *wish_park(struct view *view, fuse_req_t req, enum wish_kind kind, bool is_long,
                       uint64_t since_us);
/* The request is to be answered now, by the caller. */
fuse_req_t wish_unpark(struct wish *wish);

/* ---- fuse_files.c, fuse_ops.c, fuse_dirs.c: how parked requests are answered ---- */

bool wait_is_over(const struct view *view, const struct handle *handle, uint64_t since_us,
                  uint64_t now_us);
unsigned poll_events(const struct handle *handle, uint64_t now_us);
void answer_lookup(struct view *view, fuse_req_t req, uint64_t parent, const char *name);
void answer_open(struct view *view, fuse_req_t req, uint64_t ino,
                 const struct fuse_file_info *asked, uint64_t now_us);
void answer_events_open(struct handle *handle, fuse_req_t req, const struct fuse_file_info *asked);
void answer_read(struct handle *handle, fuse_req_t req, size_t size, off_t offset, uint64_t now_us);
void answer_events(struct handle *handle, fuse_req_t req, size_t size, off_t offset);
void answer_opendir(struct view *view, fuse_req_t req, uint64_t ino,
                    const struct fuse_file_info *asked);

void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file);
void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
             struct fuse_file_info *file);
void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
              struct fuse_file_info *file);
void op_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file,
             struct fuse_pollhandle *poll);
void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file);
void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file);
void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                struct fuse_file_info *file);
void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                    struct fuse_file_info *file);
/* Whether a file of this kind is opened for writing by somebody. */
bool node_is_writable(const struct tree_node *node);

#endif
