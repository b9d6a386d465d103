#include "fs/fuse_ops.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "fs/parked.h"
#include "fs/render.h"
#include "lib/cleanup.h"

/* One open(2) or opendir(3). */
struct handle {
    struct handle *prev, *next;
    uint64_t ino;
    enum tree_what what;
    uid_t uid;
    bool writable;
    bool changed; /* the value is no longer `text`; poll has said so */
    char *text;   /* the snapshot; NULL for a directory and until a `wait` has ended */
    size_t bytes;
    struct entry *entries; /* a directory's snapshot */
    size_t n_entries;
    struct fuse_pollhandle *poll; /* somebody wants to know of the next change */
};

struct entry {
    uint64_t ino;
    mode_t mode;
    char name[TREE_NAME_MAX + 1];
};
static_assert(TREE_NAME_MAX >= sizeof("hearth.prom"), "every name of the tree fits an entry");

enum wish_kind { WISH_LOOKUP, WISH_OPEN, WISH_OPENDIR, WISH_WAIT, WISH_PEEK, WISH_ORDER };

/* A parked request. */
struct wish {
    struct parked parked; /* first: the list's entry */
    struct view *view;
    enum wish_kind kind;
    fuse_req_t req;
    bool interrupted; /* set inside libfuse's lock; answered by the next step */
    uint64_t ino;     /* lookup: the directory */
    char name[TREE_NAME_MAX + 1];
    struct fuse_file_info file;
    size_t size; /* read and write */
    off_t offset;
    struct link_order *order;
};

struct view {
    struct mirror *mirror; /* borrowed */
    struct link *link;     /* borrowed */
    struct tree *tree;
    uid_t uid;
    gid_t gid;
    struct timespec born; /* every file's times */
    uint64_t changes;     /* of the mirror, as far as the tree has followed */
    struct parked_list parked;
    struct handle *handles;
    size_t n_handles;
    size_t n_polled; /* of them with a poll handle */
};

uint64_t view_now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

static struct view *view_of(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

static struct handle *handle_of(const struct fuse_file_info *file)
{
    return (struct handle *)(uintptr_t)file->fh;
}

/* What somebody who asks now is content with. */
static uint64_t since_now_us(uint64_t now_us)
{
    return now_us > MIRROR_AGE_US ? now_us - MIRROR_AGE_US : 1;
}

/* ---- the tree follows the mirror ---- */

static int follow_models(struct view *view)
{
    size_t n = mirror_n_models(view->mirror);
    _cleanup_free_ const char **names = calloc(n + 1, sizeof(*names));

    if (!names)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        names[i] = mirror_model_at(view->mirror, i)->name;
    return tree_follow(view->tree, TREE_MODELS, names, n);
}

static int follow_metrics(struct view *view)
{
    char **names;
    size_t n;
    int r = render_metric_names(mirror_text(view->mirror, MIRROR_PROMETHEUS), &names, &n);

    if (r < 0)
        return r;
    r = tree_follow(view->tree, TREE_METRICS, (const char *const *)names, n);
    render_names_free(names, n);
    return r;
}

static void follow(struct view *view)
{
    if (view->changes == mirror_changes(view->mirror))
        return;
    /* Short of memory the tree stays as it was and the next step tries again. */
    if (follow_models(view) == 0 && follow_metrics(view) == 0)
        view->changes = mirror_changes(view->mirror);
}

/* ---- attributes ---- */

static void fill_attr(const struct view *view, uint64_t ino, mode_t mode, struct stat *ret_attr)
{
    *ret_attr = (struct stat){
        .st_ino = ino,
        .st_mode = mode,
        .st_nlink = S_ISDIR(mode) ? 2 : 1,
        .st_uid = view->uid,
        .st_gid = view->gid,
        .st_atim = view->born,
        .st_mtim = view->born,
        .st_ctim = view->born,
        .st_blksize = 4096,
    };
}

static double timeout_s(uint64_t parent)
{
    return tree_follows(parent) ? VIEW_FOLLOWS_TIMEOUT_S : VIEW_FIXED_TIMEOUT_S;
}

static void fill_entry(const struct view *view, uint64_t parent, uint64_t ino, mode_t mode,
                       struct fuse_entry_param *ret_entry)
{
    *ret_entry = (struct fuse_entry_param){
        .ino = ino,
        .entry_timeout = timeout_s(parent),
        .attr_timeout = timeout_s(parent),
    };
    fill_attr(view, ino, mode, &ret_entry->attr);
}

/* ---- handles ---- */

static void handle_set_poll(struct view *view, struct handle *handle, struct fuse_pollhandle *poll)
{
    if (handle->poll) {
        fuse_pollhandle_destroy(handle->poll);
        view->n_polled--;
    }
    handle->poll = poll;
    if (poll)
        view->n_polled++;
}

static void handle_free(struct view *view, struct handle *handle)
{
    handle_set_poll(view, handle, NULL);
    DL_DELETE(view->handles, handle);
    view->n_handles--;
    free(handle->text);
    free(handle->entries);
    free(handle);
}

static int handle_new(struct view *view, fuse_req_t req, const struct tree_node *node,
                      struct handle **ret_handle)
{
    struct handle *handle;
    uid_t uid = fuse_req_ctx(req)->uid;

    if (view->n_handles >= VIEW_HANDLES_MAX)
        return -ENFILE;
    /* Counting them only where it could matter keeps open(2) cheap. */
    if (view->n_handles >= VIEW_HANDLES_PER_UID_MAX) {
        size_t n = 0;
        DL_FOREACH (view->handles, handle)
            n += handle->uid == uid;
        if (n >= VIEW_HANDLES_PER_UID_MAX)
            return -EMFILE;
    }
    handle = calloc(1, sizeof(*handle));
    if (!handle)
        return -ENOMEM;
    handle->ino = node->ino;
    handle->what = node->what;
    handle->uid = uid;
    DL_APPEND(view->handles, handle);
    view->n_handles++;
    *ret_handle = handle;
    return 0;
}

/* The handle's text is the value now. */
static int handle_take(struct view *view, struct handle *handle, uint64_t now_us)
{
    struct tree_node node;
    char *text;
    size_t bytes;
    int r = tree_get(view->tree, handle->ino, &node);

    if (r == 0)
        r = render_node(view->mirror, &node, now_us, &text, &bytes);
    if (r < 0)
        return r;
    free(handle->text);
    handle->text = text;
    handle->bytes = bytes;
    handle->changed = false;
    return 0;
}

/* ---- parking ---- */

static void on_interrupt(fuse_req_t req, void *userdata)
{
    struct wish *wish = userdata;

    (void)req;
    wish->interrupted = true;
}

/* Keeps the request for later; where that cannot be, answers it with the reason. */
static struct wish *park(struct view *view, fuse_req_t req, enum wish_kind kind, bool is_long,
                         uint64_t since_us)
{
    struct wish *wish = calloc(1, sizeof(*wish));
    int r = wish ? 0 : -ENOMEM;

    if (wish) {
        wish->parked.uid = fuse_req_ctx(req)->uid;
        wish->parked.is_long = is_long;
        wish->parked.since_us = since_us;
        wish->view = view;
        wish->kind = kind;
        wish->req = req;
        r = parked_add(&view->parked, &wish->parked);
    }
    if (r < 0) {
        free(wish);
        fuse_reply_err(req, -r);
        return NULL;
    }
    fuse_req_interrupt_func(req, on_interrupt, wish);
    return wish;
}

/* The request is to be answered now, by the caller. */
static fuse_req_t unpark(struct wish *wish)
{
    fuse_req_t req = wish->req;

    fuse_req_interrupt_func(req, NULL, NULL);
    parked_remove(&wish->view->parked, &wish->parked);
    free(wish);
    return req;
}

/* ---- lookup, getattr, setattr ---- */

static void answer_lookup(struct view *view, fuse_req_t req, uint64_t parent, const char *name)
{
    struct fuse_entry_param entry;
    struct tree_node node;
    int r = tree_lookup(view->tree, parent, name, &node);

    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    fill_entry(view, parent, node.ino, node.mode, &entry);
    fuse_reply_entry(req, &entry);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us();
    struct wish *wish;

    if (strlen(name) > TREE_NAME_MAX) {
        fuse_reply_err(req, ENAMETOOLONG);
        return;
    }
    if (!tree_follows(parent) || mirror_answers(view->mirror, since_now_us(now_us), now_us)) {
        answer_lookup(view, req, parent, name);
        return;
    }
    wish = park(view, req, WISH_LOOKUP, false, since_now_us(now_us));
    if (!wish)
        return;
    wish->ino = parent;
    strcpy(wish->name, name);
}

static void reply_attr(struct view *view, fuse_req_t req, const struct tree_node *node)
{
    struct stat attr;

    fill_attr(view, node->ino, node->mode, &attr);
    fuse_reply_attr(req, &attr, timeout_s(node->parent));
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

static bool is_writable(const struct tree_node *node)
{
    return S_ISREG(node->mode) && (node->mode & 0222);
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
    if (r == 0 && !is_writable(&node))
        r = -EACCES;
    if (r < 0)
        fuse_reply_err(req, -r);
    else
        reply_attr(view, req, &node);
}

/* ---- open ---- */

/* Modes hold for root too: a write that has no meaning is refused at open. */
static int check_access(const struct tree_node *node, int flags)
{
    int mode = flags & O_ACCMODE;

    if (S_ISDIR(node->mode))
        return -EISDIR;
    if (mode != O_RDONLY && !is_writable(node))
        return -EACCES;
    if ((flags & O_TRUNC) && !is_writable(node))
        return -EACCES;
    if (mode != O_WRONLY && !(node->mode & 0444))
        return -EACCES;
    return 0;
}

static void answer_open(struct view *view, fuse_req_t req, uint64_t ino,
                        const struct fuse_file_info *asked, uint64_t now_us)
{
    struct fuse_file_info file = *asked;
    struct tree_node node;
    struct handle *handle = NULL;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0)
        r = check_access(&node, file.flags);
    if (r == 0)
        r = handle_new(view, req, &node, &handle);
    if (r == 0 && node.what != TREE_WAIT)
        r = handle_take(view, handle, now_us);
    if (r < 0) {
        if (handle)
            handle_free(view, handle);
        fuse_reply_err(req, -r);
        return;
    }
    handle->writable = (file.flags & O_ACCMODE) != O_RDONLY;
    file.fh = (uintptr_t)handle;
    file.direct_io = 1; /* sizes are not known before: without it readers get nothing */
    if (fuse_reply_open(req, &file) == -ENOENT)
        handle_free(view, handle); /* open(2) was interrupted, no release will come */
}

/* Whether the file's text does not depend on the daemon, or is taken later. */
static bool opens_at_once(enum tree_what what)
{
    return what == TREE_README || what == TREE_WAIT;
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us();
    struct tree_node node;
    struct wish *wish;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0)
        r = check_access(&node, file->flags);
    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    if (opens_at_once(node.what) || (file->flags & O_ACCMODE) == O_WRONLY ||
        mirror_answers(view->mirror, since_now_us(now_us), now_us)) {
        answer_open(view, req, ino, file, now_us);
        return;
    }
    wish = park(view, req, WISH_OPEN, false, since_now_us(now_us));
    if (!wish)
        return;
    wish->ino = ino;
    wish->file = *file;
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    (void)ino;
    handle_free(view_of(req), handle_of(file));
    fuse_reply_err(req, 0);
}

/* ---- read ---- */

static void reply_slice(fuse_req_t req, const struct handle *handle, size_t size, off_t offset)
{
    size_t at = offset < 0 ? 0 : MIN((size_t)offset, handle->bytes);

    fuse_reply_buf(req, handle->text + at, MIN(size, handle->bytes - at));
}

/* What a `wait` waits for (and a non-blocking one peeks at): the state is known well enough, and
 * nothing is under way. */
static bool wait_is_over(const struct view *view, const struct handle *handle, uint64_t since_us,
                         uint64_t now_us)
{
    const struct mirror_model *model;
    struct tree_node node;

    if (!mirror_answers(view->mirror, since_us, now_us))
        return false;
    if (tree_get(view->tree, handle->ino, &node) < 0)
        return true; /* the model has gone: the read fails */
    model = mirror_model(view->mirror, node.subject);
    return !model || render_state_is_settled(model->state);
}

static void answer_wait(struct view *view, fuse_req_t req, struct handle *handle, size_t size,
                        off_t offset, uint64_t now_us)
{
    int r = handle_take(view, handle, now_us);

    if (r < 0)
        fuse_reply_err(req, -r);
    else
        reply_slice(req, handle, size, offset);
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                    struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    struct handle *handle = handle_of(file);
    uint64_t now_us = view_now_us();

    if (!handle->text) {
        bool peek = file->flags & O_NONBLOCK;
        struct wish *wish = park(view, req, peek ? WISH_PEEK : WISH_WAIT, !peek, now_us);
        if (!wish)
            return;
        wish->ino = ino;
        wish->file = *file;
        wish->size = size;
        wish->offset = offset;
        return;
    }
    if (handle->changed && offset == 0) {
        int r = handle_take(view, handle, now_us);
        if (r < 0) {
            fuse_reply_err(req, -r);
            return;
        }
    }
    reply_slice(req, handle, size, offset);
}

/* ---- write ---- */

static void on_order(void *userdata, int error)
{
    struct wish *wish = userdata;
    size_t size = wish->size;
    fuse_req_t req = unpark(wish);

    if (error < 0)
        fuse_reply_err(req, -error);
    else
        fuse_reply_write(req, size);
}

static int start_order(struct view *view, fuse_req_t req, const char *model, bool load, size_t size)
{
    uint64_t now_us = view_now_us();
    struct wish *wish = park(view, req, WISH_ORDER, true, 0);
    int r;

    if (!wish)
        return 0; /* answered */
    wish->size = size;
    r = link_order(view->link, load, model, on_order, wish, now_us, &wish->order);
    if (r < 0)
        unpark(wish);
    return r;
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    const struct handle *handle = handle_of(file);
    struct tree_node node;
    bool on;
    int r = tree_get(view->tree, ino, &node);

    (void)offset; /* each write is an order of its own */
    if (r == 0 && (!handle->writable || node.what != TREE_PRELOAD))
        r = -EACCES;
    if (r == 0)
        r = render_parse_switch(data, size, &on);
    if (r == 0 && handle->uid != 0 && handle->uid != geteuid())
        r = -EACCES;
    if (r == 0)
        r = start_order(view, req, node.subject, on, size);
    if (r < 0)
        fuse_reply_err(req, -r);
}

/* ---- directories ---- */

struct listing {
    struct handle *handle;
    size_t capacity;
};

static int list_add(struct listing *listing, uint64_t ino, mode_t mode, const char *name)
{
    struct handle *handle = listing->handle;
    struct entry *entry;

    if (handle->n_entries == listing->capacity) {
        size_t capacity = MAX(16u, listing->capacity * 2);
        struct entry *entries = realloc(handle->entries, capacity * sizeof(*entries));
        if (!entries)
            return -ENOMEM;
        handle->entries = entries;
        listing->capacity = capacity;
    }
    entry = &handle->entries[handle->n_entries++];
    entry->ino = ino;
    entry->mode = mode;
    strcpy(entry->name, name);
    return 0;
}

static int list_node(void *userdata, const struct tree_node *node)
{
    return list_add(userdata, node->ino, node->mode, node->name);
}

static int fill_listing(const struct view *view, struct handle *handle,
                        const struct tree_node *node)
{
    struct listing listing = {.handle = handle};
    int r = list_add(&listing, node->ino, S_IFDIR, ".");

    if (r == 0)
        r = list_add(&listing, node->parent, S_IFDIR, "..");
    if (r == 0)
        r = tree_each(view->tree, node->ino, list_node, &listing);
    return r;
}

static void answer_opendir(struct view *view, fuse_req_t req, uint64_t ino,
                           const struct fuse_file_info *asked)
{
    struct fuse_file_info file = *asked;
    struct tree_node node;
    struct handle *handle = NULL;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0 && !S_ISDIR(node.mode))
        r = -ENOTDIR;
    if (r == 0)
        r = handle_new(view, req, &node, &handle);
    if (r == 0)
        r = fill_listing(view, handle, &node);
    if (r < 0) {
        if (handle)
            handle_free(view, handle);
        fuse_reply_err(req, -r);
        return;
    }
    file.fh = (uintptr_t)handle;
    if (fuse_reply_open(req, &file) == -ENOENT)
        handle_free(view, handle);
}

static void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us();
    struct wish *wish;

    if (!tree_follows(ino) || mirror_answers(view->mirror, since_now_us(now_us), now_us)) {
        answer_opendir(view, req, ino, file);
        return;
    }
    wish = park(view, req, WISH_OPENDIR, false, since_now_us(now_us));
    if (!wish)
        return;
    wish->ino = ino;
    wish->file = *file;
}

/* An entry's bytes in the buffer, or 0 where it does not fit. */
static size_t put_entry(fuse_req_t req, const struct handle *handle, size_t index, bool plus,
                        char *buffer, size_t size)
{
    const struct view *view = view_of(req);
    const struct entry *entry = &handle->entries[index];
    off_t next = (off_t)index + 1;
    size_t n;

    if (plus) {
        struct fuse_entry_param param;
        fill_entry(view, handle->ino, entry->ino, entry->mode, &param);
        if (index < 2)
            param.ino = 0; /* . and .. are no lookups */
        n = fuse_add_direntry_plus(req, buffer, size, entry->name, &param, next);
    } else {
        struct stat attr;
        fill_attr(view, entry->ino, entry->mode, &attr);
        n = fuse_add_direntry(req, buffer, size, entry->name, &attr, next);
    }
    return n <= size ? n : 0;
}

static void list(fuse_req_t req, size_t size, off_t offset, const struct fuse_file_info *file,
                 bool plus)
{
    const struct handle *handle = handle_of(file);
    _cleanup_free_ char *buffer = malloc(size);
    size_t used = 0;

    if (!buffer) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    for (size_t i = offset < 0 ? 0 : (size_t)offset; i < handle->n_entries; i++) {
        size_t n = put_entry(req, handle, i, plus, buffer + used, size - used);
        if (n == 0)
            break;
        used += n;
    }
    fuse_reply_buf(req, buffer, used);
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                       struct fuse_file_info *file)
{
    (void)ino;
    list(req, size, offset, file, false);
}

static void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                           struct fuse_file_info *file)
{
    (void)ino;
    list(req, size, offset, file, true);
}

/* ---- poll ---- */

/* As with sysfs: reading is always possible, POLLPRI says that the value is another now. A `wait`
 * is readable when it would not block. */
static unsigned poll_events(const struct view *view, const struct handle *handle, uint64_t now_us)
{
    const unsigned readable = POLLIN | POLLRDNORM;

    if (handle->what == TREE_WAIT && !handle->text)
        return wait_is_over(view, handle, since_now_us(now_us), now_us) ? readable : 0;
    return readable | (handle->writable ? POLLOUT | POLLWRNORM : 0) |
           (handle->changed ? POLLPRI : 0);
}

static void op_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file,
                    struct fuse_pollhandle *poll)
{
    struct view *view = view_of(req);
    struct handle *handle = handle_of(file);

    (void)ino;
    if (poll)
        handle_set_poll(view, handle, poll);
    fuse_reply_poll(req, poll_events(view, handle, view_now_us()));
}

static bool has_changed(const struct view *view, const struct handle *handle, uint64_t now_us)
{
    _cleanup_free_ char *text = NULL;
    struct tree_node node;
    size_t bytes;

    if (handle->what == TREE_WAIT && !handle->text)
        return wait_is_over(view, handle, since_now_us(now_us), now_us);
    if (tree_get(view->tree, handle->ino, &node) < 0 ||
        render_node(view->mirror, &node, now_us, &text, &bytes) < 0)
        return true;
    return bytes != handle->bytes || memcmp(text, handle->text, bytes) != 0;
}

static void wake_pollers(struct view *view, uint64_t now_us)
{
    struct handle *handle;

    if (view->n_polled == 0)
        return;
    DL_FOREACH (view->handles, handle) {
        if (!handle->poll || !has_changed(view, handle, now_us))
            continue;
        handle->changed = true;
        fuse_lowlevel_notify_poll(handle->poll);
        handle_set_poll(view, handle, NULL);
    }
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

/* ---- steps ---- */

static bool is_ready(const struct wish *wish, uint64_t now_us)
{
    const struct view *view = wish->view;

    switch (wish->kind) {
    case WISH_ORDER: return false; /* the link ends it */
    case WISH_WAIT:
        return wait_is_over(view, handle_of(&wish->file), wish->parked.since_us, now_us);
    default: return mirror_answers(view->mirror, wish->parked.since_us, now_us);
    }
}

static void grant(const struct wish *wish, uint64_t now_us)
{
    struct view *view = wish->view;

    switch (wish->kind) {
    case WISH_LOOKUP: answer_lookup(view, wish->req, wish->ino, wish->name); break;
    case WISH_OPEN: answer_open(view, wish->req, wish->ino, &wish->file, now_us); break;
    case WISH_OPENDIR: answer_opendir(view, wish->req, wish->ino, &wish->file); break;
    case WISH_PEEK:
        if (!wait_is_over(view, handle_of(&wish->file), wish->parked.since_us, now_us)) {
            fuse_reply_err(wish->req, EAGAIN);
            break;
        }
        /* fall through */
    case WISH_WAIT:
        answer_wait(view, wish->req, handle_of(&wish->file), wish->size, wish->offset, now_us);
        break;
    case WISH_ORDER: break;
    }
}

/* Answers with an error instead. */
static void deny(struct wish *wish, int error)
{
    fuse_req_t req;

    if (wish->order)
        link_drop(wish->view->link, wish->order);
    req = unpark(wish);
    fuse_reply_err(req, error);
}

static void try_parked(struct view *view, uint64_t now_us)
{
    struct parked *parked, *next;

    DL_FOREACH_SAFE (view->parked.first, parked, next) {
        struct wish *wish = (struct wish *)parked;
        if (wish->interrupted) {
            deny(wish, EINTR);
        } else if (is_ready(wish, now_us)) {
            struct wish granted = *wish;
            unpark(wish);
            grant(&granted, now_us);
        }
    }
}

/* Somebody wants to see the next change, whenever it comes. */
static bool is_watched(const struct view *view)
{
    return view->n_polled > 0 || parked_any_long(&view->parked);
}

void view_step(struct view *view, uint64_t now_us)
{
    uint64_t since_us = parked_since_us(&view->parked);

    if (is_watched(view))
        since_us = MAX(since_us, since_now_us(now_us));
    link_step(view->link, since_us, now_us);
    follow(view);
    try_parked(view, now_us);
    wake_pollers(view, now_us);
}

uint64_t view_due_us(const struct view *view, uint64_t now_us)
{
    uint64_t due_us = link_due_us(view->link, now_us);

    if (view->parked.n > 0 || is_watched(view))
        due_us = MIN(due_us, mirror_due_us(view->mirror, is_watched(view), now_us));
    return due_us;
}

/* ---- life ---- */

static const struct fuse_lowlevel_ops ops = {
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

int view_new(struct mirror *mirror, struct link *link, uid_t uid, gid_t gid, struct view **ret_view)
{
    struct view *view = calloc(1, sizeof(*view));
    int r;

    if (!view)
        return -ENOMEM;
    view->mirror = mirror;
    view->link = link;
    view->uid = uid;
    view->gid = gid;
    clock_gettime(CLOCK_REALTIME, &view->born);
    view->changes = UINT64_MAX;
    r = tree_new(&view->tree);
    if (r < 0) {
        free(view);
        return r;
    }
    *ret_view = view;
    return 0;
}

struct view *view_free(struct view *view)
{
    struct parked *parked, *next;
    struct handle *handle, *next_handle;

    if (!view)
        return NULL;
    DL_FOREACH_SAFE (view->parked.first, parked, next) {
        deny((struct wish *)parked, ENODEV);
    }
    DL_FOREACH_SAFE (view->handles, handle, next_handle) {
        handle_free(view, handle);
    }
    tree_free(view->tree);
    free(view);
    return NULL;
}
