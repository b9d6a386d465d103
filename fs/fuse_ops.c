/* Names and attributes, and the table of operations. */
#include "fs/view_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

/* The most that the kernel takes (16 bits); as a user it takes what its memory allows. */
#define BACKGROUND_MAX 65535u

/* close(2) does not wait for us: its request comes behind all others, and the kernel hands out only
 * so many of such kind at a time. Where that were fewer than come, readers in great numbers would
 * leave us with more and more files that they have closed already. */
static void op_init(void *userdata, struct fuse_conn_info *conn)
{
    (void)userdata;
    conn->max_background = BACKGROUND_MAX;
    conn->congestion_threshold = BACKGROUND_MAX;
}

/* ---- lookup, getattr, setattr ---- */

void answer_lookup(struct view *view, fuse_req_t req, uint64_t parent, const char *name)
{
    struct fuse_entry_param entry;
    struct tree_node node;
    int r = tree_lookup(view->tree, parent, name, &node);

    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    view_fill_entry(view, parent, node.ino, node.mode, &entry);
    fuse_reply_entry(req, &entry);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us(), since_us = view_look(view, now_us);
    struct wish *wish;

    if (strlen(name) > TREE_NAME_MAX) {
        fuse_reply_err(req, ENAMETOOLONG);
        return;
    }
    if (!tree_follows(parent) || view_answers(view, since_us, now_us)) {
        answer_lookup(view, req, parent, name);
        return;
    }
    wish = wish_park(view, req, WISH_LOOKUP, false, since_us);
    if (!wish)
        return;
    wish->ino = parent;
    strcpy(wish->name, name);
}

static void reply_attr(struct view *view, fuse_req_t req, const struct tree_node *node)
{
    struct stat attr;

    view_fill_attr(view, node->ino, node->mode, &attr);
    fuse_reply_attr(req, &attr, view_attr_timeout_s(node->parent, node->mode));
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    struct tree_node node;
    int r = tree_get(view->tree, ino, &node);

    (void)file;
    if (r < 0)
        fuse_reply_err(req, -r);
    else
        reply_attr(view, req, &node);
}

/* `>file` truncates before it writes: that is all of setattr there is. */
static void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set,
                       struct fuse_file_info *file)
{
    const int times = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_ATIME_NOW |
                      FUSE_SET_ATTR_MTIME_NOW | FUSE_SET_ATTR_CTIME;
    struct view *view = view_of(req);
    struct tree_node node;
    int r = tree_get(view->tree, ino, &node);

    (void)attr;
    (void)file;
    if (r == 0 && (to_set & ~(FUSE_SET_ATTR_SIZE | times)))
        r = -EPERM;
    if (r == 0 && !node_is_writable(&node))
        r = -EACCES;
    if (r < 0)
        fuse_reply_err(req, -r);
    else
        reply_attr(view, req, &node);
}

/* ---- what there is not: names are made and removed by the daemon alone ---- */

static void op_make(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t device)
{
    (void)parent;
    (void)name;
    (void)mode;
    (void)device;
    fuse_reply_err(req, EPERM);
}

static void op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    op_make(req, parent, name, mode, 0);
}

static void op_remove(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    op_make(req, parent, name, 0, 0);
}

static void op_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
    (void)target;
    op_make(req, parent, name, 0, 0);
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
    (void)ino;
    op_make(req, parent, name, 0, 0);
}

static void op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                      const char *new_name, unsigned flags)
{
    (void)new_parent;
    (void)new_name;
    (void)flags;
    op_make(req, parent, name, 0, 0);
}

static const struct fuse_lowlevel_ops ops = {
    .init = op_init,
    .lookup = op_lookup,
    .getattr = op_getattr,
    .setattr = op_setattr,
    .open = op_open,
    .read = op_read,
    .write = op_write,
    .release = op_release,
    .opendir = op_opendir,
    .readdir = op_readdir,
    .readdirplus = op_readdirplus,
    .releasedir = op_release,
    .poll = op_poll,
    .mknod = op_make,
    .mkdir = op_mkdir,
    .symlink = op_symlink,
    .link = op_link,
    .unlink = op_remove,
    .rmdir = op_remove,
    .rename = op_rename,
};

const struct fuse_lowlevel_ops *view_ops(void)
{
    return &ops;
}
