/* The view's life: open files, parked requests, and the step that answers them. */
#include "fs/view_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <utlist.h>

#include "fs/render.h"
#include "lib/cleanup.h"

static_assert(TREE_NAME_MAX >= sizeof("hearth.prom"), "every name of the tree fits an entry");

uint64_t view_now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
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

uint64_t view_look(struct view *view, uint64_t now_us)
{
    follow(view); /* what has arrived may be more than the last step has seen */
    view->looked_us = now_us;
    return now_us > MIRROR_AGE_US ? now_us - MIRROR_AGE_US : 1;
}

/* Whom a wait for nothing has led to the last copy, that one is not made to wait again with his
 * next step along the same path. */
bool view_answers(const struct view *view, uint64_t since_us, uint64_t now_us)
{
    return mirror_answers(view->mirror, since_us, now_us) ||
           now_us < view->gave_up_us + MIRROR_AGE_US;
}

/* ---- attributes ---- */

/* A file's value held when the copy was made, or when no daemon was found: whoever watches a file's
 * age (node_exporter tells it) sees a daemon that has gone silent. */
static struct timespec held_at(const struct view *view)
{
    uint64_t held_us = mirror_held_us(view->mirror), age_us;
    struct timespec at;

    if (held_us == 0)
        return view->born;
    age_us = view_now_us() - held_us;
    clock_gettime(CLOCK_REALTIME, &at);
    at.tv_sec -= (time_t)(age_us / 1000000u);
    at.tv_nsec -= (long)(age_us % 1000000u) * 1000;
    if (at.tv_nsec < 0) {
        at.tv_sec--;
        at.tv_nsec += 1000000000;
    }
    return at;
}

void view_fill_attr(const struct view *view, uint64_t ino, mode_t mode, struct stat *ret_attr)
{
    struct timespec changed = S_ISREG(mode) ? held_at(view) : view->born;

    *ret_attr = (struct stat){
        .st_ino = ino,
        .st_mode = mode,
        .st_nlink = S_ISDIR(mode) ? 2 : 1,
        .st_uid = view->uid,
        .st_gid = view->gid,
        .st_atim = view->born,
        .st_mtim = changed,
        .st_ctim = changed,
        .st_blksize = 4096,
    };
}

double view_timeout_s(uint64_t parent)
{
    return tree_follows(parent) ? VIEW_FOLLOWS_TIMEOUT_S : VIEW_FIXED_TIMEOUT_S;
}

double view_attr_timeout_s(uint64_t parent, mode_t mode)
{
    return S_ISREG(mode) ? VIEW_FOLLOWS_TIMEOUT_S : view_timeout_s(parent);
}

void view_fill_entry(const struct view *view, uint64_t parent, uint64_t ino, mode_t mode,
                     struct fuse_entry_param *ret_entry)
{
    *ret_entry = (struct fuse_entry_param){
        .ino = ino,
        .entry_timeout = view_timeout_s(parent),
        .attr_timeout = view_attr_timeout_s(parent, mode),
    };
    view_fill_attr(view, ino, mode, &ret_entry->attr);
}

/* ---- handles ---- */

static struct user *user_of(struct view *view, uid_t uid)
{
    struct user *user;

    HASH_FIND(hh, view->users, &uid, sizeof(uid), user);
    if (user)
        return user;
    user = calloc(1, sizeof(*user));
    if (!user)
        return NULL;
    user->uid = uid;
    HASH_ADD(hh, view->users, uid, sizeof(user->uid), user);
    if (hash_added(&user->hh))
        return user;
    free(user);
    return NULL;
}

/* Forgets one who has nothing open. */
static void user_put(struct view *view, struct user *user)
{
    if (user->n_handles > 0)
        return;
    HASH_DELETE(hh, view->users, user);
    free(user);
}

void handle_set_poll(struct handle *handle, struct fuse_pollhandle *poll)
{
    if (handle->poll) {
        fuse_pollhandle_destroy(handle->poll);
        handle->view->n_polled--;
        handle->user->n_polled--;
    }
    handle->poll = poll;
    if (poll) {
        handle->view->n_polled++;
        handle->user->n_polled++;
    }
}

bool handle_polls_too_many(const struct handle *handle)
{
    return !handle->poll && handle->user->n_polled >= VIEW_POLLED_PER_UID_MAX;
}

void handle_wake(struct handle *handle)
{
    if (!handle->poll)
        return;
    fuse_lowlevel_notify_poll(handle->poll);
    handle_set_poll(handle, NULL);
}

int handle_keep(struct handle *handle, size_t bytes)
{
    struct user *user = handle->user;
    struct view *view = handle->view;
    size_t of_user = user->kept_bytes - handle->kept_bytes + bytes;
    size_t of_all = view->kept_bytes - handle->kept_bytes + bytes;

    if (bytes > handle->kept_bytes && of_user > VIEW_KEPT_BYTES_PER_UID_MAX)
        return -EMFILE;
    if (bytes > handle->kept_bytes && of_all > VIEW_KEPT_BYTES_MAX)
        return -ENFILE;
    user->kept_bytes = of_user;
    view->kept_bytes = of_all;
    handle->kept_bytes = bytes;
    return 0;
}

void handle_free(struct handle *handle)
{
    struct view *view = handle->view;

    if (handle->hold)
        link_drop(view->link, handle->hold);
    handle_set_poll(handle, NULL);
    DL_DELETE(view->handles, handle);
    view->n_handles--;
    handle_keep(handle, 0);
    handle->user->n_handles--;
    user_put(view, handle->user);
    view->n_events -= handle->what == TREE_EVENTS;
    events_reader_done(&handle->events);
    free(handle->caller);
    free(handle->text);
    free(handle->given);
    free(handle->entries);
    free(handle);
}

int handle_new(struct view *view, fuse_req_t req, const struct tree_node *node,
               struct handle **ret_handle)
{
    struct handle *handle;
    struct user *user;

    if (view->n_handles >= VIEW_HANDLES_MAX)
        return -ENFILE;
    user = user_of(view, fuse_req_ctx(req)->uid);
    if (!user)
        return -ENOMEM;
    if (user->n_handles >= VIEW_HANDLES_PER_UID_MAX)
        return -EMFILE;
    handle = calloc(1, sizeof(*handle));
    if (!handle) {
        user_put(view, user);
        return -ENOMEM;
    }
    handle->view = view;
    handle->ino = node->ino;
    handle->what = node->what;
    handle->user = user;
    user->n_handles++;
    events_reader_init(view->events, &handle->events);
    DL_APPEND(view->handles, handle);
    view->n_handles++;
    view->n_events += node->what == TREE_EVENTS;
    *ret_handle = handle;
    return 0;
}

int handle_take(struct handle *handle, uint64_t now_us)
{
    struct view *view = handle->view;
    struct tree_node node;
    char *text;
    size_t bytes;
    int r = tree_get(view->tree, handle->ino, &node);

    if (r == 0)
        r = render_node(view->mirror, &node, now_us, &text, &bytes);
    if (r < 0)
        return r;
    r = handle_keep(handle, bytes);
    if (r < 0) {
        free(text);
        return r;
    }
    free(handle->text);
    handle->text = text;
    handle->bytes = bytes;
    handle->changed = false;
    return 0;
}

void handle_give(struct handle *handle, fuse_req_t req, const struct fuse_file_info *asked)
{
    struct fuse_file_info file = *asked;

    file.fh = (uintptr_t)handle;
    file.direct_io = 1; /* sizes are not known before: without it readers get nothing */
    if (fuse_reply_open(req, &file) == -ENOENT)
        handle_free(handle); /* open(2) was interrupted, no release will come */
}

/* ---- parking ---- */

static void on_interrupt(fuse_req_t req, void *userdata)
{
    struct wish *wish = userdata;

    (void)req;
    wish->interrupted = true;
}

struct wish *wish_park(struct view *view, fuse_req_t req, enum wish_kind kind, bool is_long,
                       uint64_t since_us)
{
    struct wish *wish = calloc(1, sizeof(*wish));
    int r = wish ? 0 : -ENOMEM;

    if (wish) {
        wish->parked.uid = fuse_req_ctx(req)->uid;
        wish->parked.is_long = is_long;
        wish->parked.since_us = since_us;
        wish->parked.until_us = view_now_us() + VIEW_PATIENCE_US;
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

fuse_req_t wish_unpark(struct wish *wish)
{
    fuse_req_t req = wish->req;

    fuse_req_interrupt_func(req, NULL, NULL);
    parked_remove(&wish->view->parked, &wish->parked);
    free(wish);
    return req;
}

/* Whether the copy will do for this one, or has to. */
static bool is_known(const struct wish *wish, uint64_t now_us)
{
    struct view *view = wish->view;

    if (view_answers(view, wish->parked.since_us, now_us))
        return true;
    if (now_us < wish->parked.until_us)
        return false;
    view->gave_up_us = now_us;
    return true;
}

static bool is_ready(struct wish *wish, bool news, uint64_t now_us)
{
    const struct view *view = wish->view;
    const struct handle *handle = handle_of(&wish->file);

    switch (wish->kind) {
    case WISH_ORDER:
    case WISH_HOLD: return false;
    case WISH_EVENTS:
        return events_pending(view->events, &handle->events) || link_events_error(view->link);
    case WISH_WAIT:
        /* Each of many would be looked up after every request of the kernel's. */
        if (!news && wish->tried)
            return false;
        wish->tried = true;
        return wait_is_over(view, handle, wish->parked.since_us, now_us);
    default: return is_known(wish, now_us);
    }
}

static void grant(const struct wish *wish, uint64_t now_us)
{
    struct view *view = wish->view;
    struct handle *handle = handle_of(&wish->file);

    switch (wish->kind) {
    case WISH_LOOKUP: answer_lookup(view, wish->req, wish->ino, wish->name); break;
    case WISH_OPEN: answer_open(view, wish->req, wish->ino, &wish->file, now_us); break;
    case WISH_OPENDIR: answer_opendir(view, wish->req, wish->ino, &wish->file); break;
    case WISH_EVENTS_OPEN: answer_events_open(wish->handle, wish->req, &wish->file); break;
    case WISH_EVENTS: answer_events(handle, wish->req, wish->size, wish->offset); break;
    case WISH_PEEK:
        if (!wait_is_over(view, handle, wish->parked.since_us, now_us)) {
            fuse_reply_err(wish->req, EAGAIN);
            break;
        }
        /* fall through */
    case WISH_WAIT:
    case WISH_READ: answer_read(handle, wish->req, wish->size, wish->offset, now_us); break;
    case WISH_ORDER:
    case WISH_HOLD: break;
    }
}

/* Answers with an error instead. */
static void deny(struct wish *wish, int error)
{
    struct handle *handle = wish->handle;
    fuse_req_t req;

    if (wish->order)
        link_drop(wish->view->link, wish->order);
    req = wish_unpark(wish);
    if (handle)
        handle_free(handle);
    fuse_reply_err(req, error);
}

static void try_parked(struct view *view, bool news, uint64_t now_us)
{
    struct parked *parked, *next;

    DL_FOREACH_SAFE (view->parked.first, parked, next) {
        struct wish *wish = (struct wish *)parked;
        if (wish->interrupted) {
            deny(wish, EINTR);
        } else if (is_ready(wish, news, now_us)) {
            struct wish granted = *wish;
            wish_unpark(wish);
            grant(&granted, now_us);
        }
    }
}

/* ---- steps ---- */

static bool has_changed(const struct handle *handle, uint64_t now_us)
{
    const struct view *view = handle->view;
    _cleanup_free_ char *text = NULL;
    struct tree_node node;
    size_t bytes;

    if (!handle->text)
        return poll_events(handle, now_us) & (POLLIN | POLLERR);
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
        if (!handle->poll || !has_changed(handle, now_us))
            continue;
        handle->changed = handle->text != NULL;
        handle_wake(handle);
    }
}

/* Whether anything is new since the last call. */
static bool see(struct view *view, uint64_t now_us)
{
    struct seen now = {
        .changes = mirror_changes(view->mirror),
        .held_us = mirror_held_us(view->mirror),
        .events = events_pushed(view->events),
        .status = mirror_status(view->mirror, now_us),
    };
    const struct seen *seen = &view->seen;
    bool news = now.changes != seen->changes || now.held_us != seen->held_us ||
                now.events != seen->events || now.status != seen->status;

    view->seen = now;
    return news;
}

/* Somebody wants to see the next change, whenever it comes. */
static bool is_watched(const struct view *view)
{
    return view->n_polled > 0 || parked_any_long(&view->parked);
}

/* Whoever has `events` open wants to know of the next daemon, and no more than that. */
static bool is_sought(const struct view *view)
{
    return is_watched(view) || (view->n_events > 0 && !mirror_is_connected(view->mirror));
}

/* Until when the daemon is to push its values; 0: it is not. */
static uint64_t feed_until_us(const struct view *view, uint64_t now_us)
{
    if (view->parked.n > 0 || is_watched(view))
        return UINT64_MAX;
    return now_us < view->looked_us + VIEW_FEED_US ? view->looked_us + VIEW_FEED_US : 0;
}

void view_step(struct view *view, uint64_t now_us)
{
    uint64_t since_us = parked_since_us(&view->parked);
    bool news;

    if (is_sought(view))
        since_us = MAX(since_us, mirror_watch_since_us(view->mirror, now_us));
    link_want_values(view->link, feed_until_us(view, now_us) > 0);
    link_want_events(view->link, view->n_events > 0);
    link_step(view->link, since_us, now_us);
    follow(view);
    news = see(view, now_us);
    try_parked(view, news, now_us);
    if (news)
        wake_pollers(view, now_us);
}

uint64_t view_due_us(const struct view *view, uint64_t now_us)
{
    uint64_t due_us = link_due_us(view->link, now_us), feed_us = feed_until_us(view, now_us);

    if (view->parked.n > 0 || is_sought(view))
        due_us = MIN(due_us, mirror_due_us(view->mirror, is_sought(view), now_us));
    else if (feed_us > 0)
        due_us = MIN(due_us, feed_us);
    return MIN(due_us, parked_due_us(&view->parked));
}

/* ---- life ---- */

int view_new(struct mirror *mirror, struct link *link, struct events *events, uid_t uid, gid_t gid,
             struct view **ret_view)
{
    struct view *view = calloc(1, sizeof(*view));
    int r;

    if (!view)
        return -ENOMEM;
    view->mirror = mirror;
    view->link = link;
    view->events = events;
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
        handle_free(handle);
    }
    tree_free(view->tree);
    free(view);
    return NULL;
}
