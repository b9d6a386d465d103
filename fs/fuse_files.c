/* Files: open, read, write, poll. */
#include "fs/view_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fs/render.h"
#include "lib/cleanup.h"

/* The most that one read of `events` gives, and what each open file keeps of it. */
#define EVENTS_READ_BYTES 4096u

bool node_is_writable(const struct tree_node *node)
{
    return S_ISREG(node->mode) && (node->mode & 0222);
}

static bool reads(const struct fuse_file_info *file)
{
    return (file->flags & O_ACCMODE) != O_WRONLY;
}

static bool writes(const struct fuse_file_info *file)
{
    return (file->flags & O_ACCMODE) != O_RDONLY;
}

/* ---- open ---- */

/* Modes hold for root too: a write that has no meaning is refused at open. */
static int check_access(const struct tree_node *node, const struct fuse_file_info *file)
{
    if (S_ISDIR(node->mode))
        return -EISDIR;
    if ((writes(file) || (file->flags & O_TRUNC)) && !node_is_writable(node))
        return -EACCES;
    if (reads(file) && !(node->mode & 0444))
        return -EACCES;
    return 0;
}

/* Whose writes they will be is known now: the caller waits for the answer. */
static int note_caller(struct handle *handle, fuse_req_t req)
{
    const struct fuse_ctx *ctx = fuse_req_ctx(req);

    handle->caller = malloc(sizeof(*handle->caller));
    if (!handle->caller)
        return -ENOMEM;
    caller_init(handle->caller, ctx->uid, ctx->gid, ctx->pid);
    return 0;
}

/* Whether the file's text is taken when it is opened. */
static bool has_snapshot(enum tree_what what)
{
    return what != TREE_WAIT && what != TREE_EVENTS;
}

void answer_open(struct view *view, fuse_req_t req, uint64_t ino,
                 const struct fuse_file_info *asked, uint64_t now_us)
{
    struct tree_node node;
    struct handle *handle = NULL;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0)
        r = handle_new(view, req, &node, &handle);
    if (r == 0 && writes(asked))
        r = note_caller(handle, req);
    if (r == 0 && reads(asked) && has_snapshot(node.what))
        r = handle_take(handle, now_us);
    if (r < 0) {
        if (handle)
            handle_free(handle);
        fuse_reply_err(req, -r);
        return;
    }
    handle_give(handle, req, asked);
}

/* The hold is taken, or its end has come before or after that. */
static void on_hold(void *userdata, int error)
{
    struct handle *handle = userdata;
    struct wish *wish = handle->opening;
    struct fuse_file_info file;
    fuse_req_t req;

    if (error < 0)
        handle->hold = NULL;
    if (!wish) {
        handle->hold_broken = true;
        handle_wake(handle);
        return;
    }
    handle->opening = NULL;
    file = wish->file;
    req = wish_unpark(wish);
    if (error == 0) {
        handle_give(handle, req, &file);
        return;
    }
    handle_free(handle);
    fuse_reply_err(req, -error);
}

/* open(2) of `hold` for writing returns when the daemon has acknowledged. */
static void open_hold(struct view *view, fuse_req_t req, const struct tree_node *node,
                      const struct fuse_file_info *file)
{
    struct link_request order = {.verb = LINK_HOLD, .model = node->subject};
    struct handle *handle = NULL;
    struct wish *wish = NULL;
    int r = handle_new(view, req, node, &handle);

    if (r == 0)
        r = note_caller(handle, req);
    if (r == 0) {
        order.caller = handle->caller;
        r = link_order(view->link, &order, on_hold, handle, view_now_us(), &handle->hold);
    }
    if (r < 0) {
        if (handle)
            handle_free(handle);
        fuse_reply_err(req, -r);
        return;
    }
    wish = wish_park(view, req, WISH_HOLD, true, 0);
    if (!wish) {
        handle_free(handle);
        return;
    }
    wish->file = *file;
    wish->handle = handle;
    handle->opening = wish;
}

void answer_events_open(struct handle *handle, fuse_req_t req, const struct fuse_file_info *asked)
{
    int error = link_events_error(handle->view->link);

    if (error == 0) {
        handle_give(handle, req, asked);
        return;
    }
    handle_free(handle);
    fuse_reply_err(req, error);
}

/* Who has opened `events` misses nothing from then on: the open waits until the daemon has answered
 * something that was asked after the subscription (or is known not to answer). */
static void open_events(struct view *view, fuse_req_t req, const struct tree_node *node,
                        const struct fuse_file_info *file, uint64_t now_us)
{
    struct handle *handle;
    struct wish *wish;
    int r = handle_new(view, req, node, &handle);

    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    wish = wish_park(view, req, WISH_EVENTS_OPEN, false, now_us);
    if (!wish) {
        handle_free(handle);
        return;
    }
    wish->file = *file;
    wish->handle = handle;
}

void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us(), since_us = view_look(view, now_us);
    struct tree_node node;
    struct wish *wish;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0)
        r = check_access(&node, file);
    if (r < 0) {
        fuse_reply_err(req, -r);
    } else if (node.what == TREE_HOLD && writes(file)) {
        open_hold(view, req, &node, file);
    } else if (node.what == TREE_EVENTS) {
        open_events(view, req, &node, file, now_us);
    } else if (node.what == TREE_README || node.what == TREE_WAIT || !reads(file) ||
               view_answers(view, since_us, now_us)) {
        answer_open(view, req, ino, file, now_us);
    } else {
        wish = wish_park(view, req, WISH_OPEN, false, since_us);
        if (!wish)
            return;
        wish->ino = ino;
        wish->file = *file;
    }
}

void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    (void)ino;
    handle_free(handle_of(file));
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
bool wait_is_over(const struct view *view, const struct handle *handle, uint64_t since_us,
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

void answer_read(struct handle *handle, fuse_req_t req, size_t size, off_t offset, uint64_t now_us)
{
    int r = handle_take(handle, now_us);

    if (r < 0)
        fuse_reply_err(req, -r);
    else
        reply_slice(req, handle, size, offset);
}

/* Whether this is about text that has been read before. */
static bool is_given(const struct handle *handle, off_t offset)
{
    return offset < handle->given_end && offset >= handle->given_end - (off_t)handle->given_bytes;
}

static void give_again(const struct handle *handle, fuse_req_t req, size_t size, off_t offset)
{
    size_t left = (size_t)(handle->given_end - offset);

    fuse_reply_buf(req, handle->given + handle->given_bytes - left, MIN(size, left));
}

static int make_given(struct handle *handle)
{
    int r = handle_keep(handle, EVENTS_READ_BYTES);

    if (r < 0)
        return r;
    handle->given = malloc(EVENTS_READ_BYTES);
    return handle->given ? 0 : -ENOMEM;
}

void answer_events(struct handle *handle, fuse_req_t req, size_t size, off_t offset)
{
    struct view *view = handle->view;
    size_t bytes = 0;
    int r = 0;

    if (!handle->given)
        r = make_given(handle);
    if (r == 0)
        r = events_read(view->events, &handle->events, handle->given, MIN(size, EVENTS_READ_BYTES),
                        &bytes);
    if (r == 0 && bytes == 0 && size > 0)
        r = -link_events_error(view->link);
    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    handle->given_bytes = bytes;
    handle->given_end = offset + (off_t)bytes;
    fuse_reply_buf(req, handle->given, bytes);
}

/* What is new comes at any offset: the file has no beginning. But programs read ahead and seek back
 * to where they want to go on (head, read of a shell), and find what they left there. */
static void read_events(struct view *view, fuse_req_t req, size_t size, off_t offset,
                        const struct fuse_file_info *file)
{
    struct handle *handle = handle_of(file);
    struct wish *wish;

    if (is_given(handle, offset)) {
        give_again(handle, req, size, offset);
        return;
    }
    if (events_pending(view->events, &handle->events) || link_events_error(view->link)) {
        answer_events(handle, req, size, offset);
        return;
    }
    if (file->flags & O_NONBLOCK) {
        fuse_reply_err(req, EAGAIN);
        return;
    }
    wish = wish_park(view, req, WISH_EVENTS, true, 0);
    if (!wish)
        return;
    wish->file = *file;
    wish->size = size;
    wish->offset = offset;
}

/* Parks a read whose text has to be taken first. */
static void read_later(struct view *view, fuse_req_t req, size_t size, off_t offset,
                       const struct fuse_file_info *file)
{
    uint64_t now_us = view_now_us();
    bool waits = handle_of(file)->what == TREE_WAIT, peeks = file->flags & O_NONBLOCK;
    enum wish_kind kind = !waits ? WISH_READ : peeks ? WISH_PEEK : WISH_WAIT;
    struct wish *wish = wish_park(view, req, kind, kind == WISH_WAIT, now_us);

    if (!wish)
        return;
    wish->file = *file;
    wish->size = size;
    wish->offset = offset;
}

void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    struct handle *handle = handle_of(file);

    (void)ino;
    if (handle->what == TREE_EVENTS)
        read_events(view, req, size, offset, file);
    else if (!handle->text)
        read_later(view, req, size, offset, file);
    else if (handle->changed && offset == 0)
        answer_read(handle, req, size, offset, view_now_us());
    else
        reply_slice(req, handle, size, offset);
}

/* ---- write ---- */

static void on_order(void *userdata, int error)
{
    struct wish *wish = userdata;
    size_t size = wish->size;
    fuse_req_t req = wish_unpark(wish);

    if (error < 0)
        fuse_reply_err(req, -error);
    else
        fuse_reply_write(req, size);
}

/* What the text orders of the file; -EINVAL where it orders nothing. */
static int parse_order(enum tree_what what, const char *text, size_t size,
                       struct link_request *ret_order)
{
    bool on = false;
    int r;

    switch (what) {
    case TREE_PRELOAD:
        r = render_parse_switch(text, size, &on);
        ret_order->verb = on ? LINK_LOAD : LINK_UNLOAD;
        return r;
    case TREE_PINNED:
        r = render_parse_switch(text, size, &on);
        ret_order->verb = LINK_PIN;
        ret_order->value = on;
        return r;
    case TREE_KEEP_ALIVE:
        ret_order->verb = LINK_KEEP_ALIVE;
        return render_parse_seconds(text, size, &ret_order->value);
    case TREE_HOLD: return -EINVAL; /* to have it open is all there is */
    default: return -EACCES;
    }
}

void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
              struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    const struct handle *handle = handle_of(file);
    struct link_request order = {.caller = handle->caller};
    struct tree_node node;
    struct wish *wish;
    int r = tree_get(view->tree, ino, &node);

    (void)offset; /* each write is an order of its own */
    if (r == 0 && !handle->caller)
        r = -EACCES;
    if (r == 0)
        r = parse_order(node.what, data, size, &order);
    if (r < 0) {
        fuse_reply_err(req, -r);
        return;
    }
    view_look(view, view_now_us());
    wish = wish_park(view, req, WISH_ORDER, true, 0);
    if (!wish)
        return;
    wish->size = size;
    order.model = node.subject;
    r = link_order(view->link, &order, on_order, wish, view_now_us(), &wish->order);
    if (r < 0)
        fuse_reply_err(wish_unpark(wish), -r);
}

/* ---- poll ---- */

/* As with sysfs: reading is always possible, POLLPRI says that the value is another now. `wait` and
 * `events` are readable when they would not block; POLLERR: the hold is broken. */
unsigned poll_events(const struct handle *handle, uint64_t now_us)
{
    const struct view *view = handle->view;
    const unsigned readable = POLLIN | POLLRDNORM;

    if (handle->what == TREE_WAIT && !handle->text)
        return wait_is_over(view, handle, mirror_watch_since_us(view->mirror, now_us), now_us)
                   ? readable
                   : 0;
    if (handle->what == TREE_EVENTS)
        return (events_pending(view->events, &handle->events) ? readable : 0) |
               (link_events_error(view->link) ? POLLERR : 0);
    return (handle->text ? readable : 0) | (handle->caller ? POLLOUT | POLLWRNORM : 0) |
           (handle->changed ? POLLPRI : 0) | (handle->hold_broken ? POLLERR : 0);
}

void op_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file,
             struct fuse_pollhandle *poll)
{
    struct handle *handle = handle_of(file);

    (void)ino;
    if (poll && handle_polls_too_many(handle)) {
        fuse_pollhandle_destroy(poll);
        fuse_reply_err(req, EMFILE);
        return;
    }
    if (poll)
        handle_set_poll(handle, poll);
    fuse_reply_poll(req, poll_events(handle, view_now_us()));
}
