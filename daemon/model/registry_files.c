/* Models that users bring along: files passed by descriptor, known to their user alone.
 *
 * Such a file may lie on a file system of the user's own, which answers when it likes: nothing that
 * can wait for it (fstat, read, even close) happens on the reactor or on a loader's common threads.
 * Each user has one thread at work on a file and one file that waits for its turn at most; what
 * comes meanwhile is not taken at all. What was received all the same (two connections at once) is
 * closed once the user's thread is free, or by the end of the process. */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/log.h"
#include "daemon/model/holds.h"
#include "daemon/model/registry_internal.h"
#include "lib/cleanup.h"

/* Room that a file's model may take beyond the file's size: a tenth, and so much for a small one.
 */
#define FILE_EXTRA_BYTES (1u << 20)

/* ---- whose threads are at work, and whose files wait ---- */

static bool has_uid(const struct file_uids *uids, uint32_t uid)
{
    for (uint32_t i = 0; i < uids->n; i++)
        if (uids->uids[i] == uid)
            return true;
    return false;
}

static bool is_full(const struct file_uids *uids)
{
    return uids->n == ELEMENTSOF(uids->uids);
}

static void put_uid(struct file_uids *uids, uint32_t uid)
{
    assert(!is_full(uids) && !has_uid(uids, uid));
    uids->uids[uids->n++] = uid;
}

static void take_uid(struct file_uids *uids, uint32_t uid)
{
    for (uint32_t i = 0; i < uids->n; i++)
        if (uids->uids[i] == uid) {
            uids->uids[i] = uids->uids[--uids->n];
            return;
        }
}

/* Whether a thread may begin to work for that user now. */
static bool may_work(const struct registry *registry, uint32_t uid)
{
    return !registry->shutting_down && !is_full(&registry->at_work) &&
           !has_uid(&registry->at_work, uid);
}

bool registry_takes_file(const struct registry *registry, uint32_t uid)
{
    return may_work(registry, uid) && !is_full(&registry->in_turn) &&
           !has_uid(&registry->in_turn, uid);
}

bool registry_file_may_begin(const struct registry *registry, const struct model_entry *entry)
{
    return may_work(registry, entry->file->uid);
}

static void begin_work(struct registry *registry, struct load_task *task, uint32_t uid)
{
    task->own = true;
    task->uid = uid;
    put_uid(&registry->at_work, uid);
    loader_submit(registry->loader, task);
}

/* ---- closing ---- */

static void close_call(struct load_task *task)
{
    close(TAKE_FD(task->fd));
}

/* Has those closed whose users' threads are free. */
static void begin_closing(struct registry *registry)
{
    struct load_task **at = &registry->unclosed;

    while (*at) {
        struct load_task *task = *at;

        if (!may_work(registry, task->uid)) {
            at = &task->next;
            continue;
        }
        *at = task->next;
        task->next = NULL;
        begin_work(registry, task, task->uid);
    }
}

/* Kept until begin_closing(); at most one a connection, as none is received meanwhile. */
static void keep_unclosed(struct registry *registry, uint32_t uid, int fd)
{
    struct load_task *task = load_task_new(TASK_CALL, NULL);

    if (!task) {
        log_warning("no memory to close a file of uid %" PRIu32 ": it stays open", uid);
        return; /* closing it here might wait for ever */
    }
    task->uid = uid;
    task->fd = fd;
    task->call = close_call;
    task->next = registry->unclosed;
    registry->unclosed = task;
}

void registry_drop_file(struct registry *registry, uint32_t uid, int fd)
{
    keep_unclosed(registry, uid, fd);
    begin_closing(registry);
}

void registry_file_work_done(struct registry *registry, struct load_task *task)
{
    take_uid(&registry->at_work, task->uid);
    if (task->fd >= 0) /* no thread could be started: the next time will do */
        keep_unclosed(registry, task->uid, TAKE_FD(task->fd));
    else
        begin_closing(registry);
    registry->room_wanted = true; /* the user's next file may begin */
}

void registry_files_tick(struct registry *registry)
{
    begin_closing(registry);
}

void registry_files_free(struct registry *registry)
{
    while (registry->unclosed) {
        struct load_task *task = registry->unclosed;

        registry->unclosed = task->next;
        task->fd = -1; /* the end of the process closes it */
        load_task_free(task);
    }
}

/* ---- the descriptor ---- */

int registry_check_file(int fd, uint64_t *ret_bytes)
{
    int flags = fcntl(fd, F_GETFL);
    struct statx st;

    if (flags < 0 || (flags & O_ACCMODE) != O_RDONLY || (flags & O_PATH))
        return -EINVAL;
    /* What is known of it already: asking the file system anew may take for ever. */
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_SIZE, &st) < 0)
        return -EINVAL;
    if (!S_ISREG(st.stx_mode))
        return -EINVAL;
    *ret_bytes = st.stx_size;
    return 0;
}

/* ---- entries ---- */

static struct model_entry *new_entry(struct registry *registry)
{
    struct model_entry *entry = calloc(1, sizeof(*entry));

    if (!entry)
        return NULL;
    entry->file = calloc(1, sizeof(*entry->file));
    if (!entry->file) {
        free(entry);
        return NULL;
    }
    do /* a model of the directories may have such a name */
        snprintf(entry->name, sizeof(entry->name), "file-%" PRIu64, ++registry->n_files);
    while (registry_find(registry, entry->name));
    entry->state_since_us = registry_now_us(registry);
    entry->asker = MODEL_NOBODY;
    HASH_ADD_STR(registry->entries, name, entry);
    if (!hash_added(&entry->hh)) {
        free(entry->file);
        free(entry);
        return NULL;
    }
    return entry;
}

int registry_add_file(struct registry *registry, const struct passed_file *file,
                      struct model_entry **ret_entry, struct fault *ret_fault)
{
    struct model_entry *entry;
    int r;

    if (!registry_takes_file(registry, file->uid))
        r = fault_set(ret_fault, -EBUSY,
                      has_uid(&registry->in_turn, file->uid) ||
                              has_uid(&registry->at_work, file->uid)
                          ? "another file of this user is being loaded; wait for its end"
                          : "too many users' files are being loaded at once; try again shortly");
    else if (!(entry = new_entry(registry)))
        r = fault_set(ret_fault, -ENOMEM, "no memory for another model");
    else {
        *entry->file = *file;
        r = registry_hold(registry, entry, file->uid, true, ret_fault);
        if (r == 0) {
            put_uid(&registry->in_turn, file->uid);
            *ret_entry = entry;
            return 0;
        }
        entry->file->fd = -1;
        registry_delete(registry, entry);
    }
    registry_drop_file(registry, file->uid, file->fd);
    return r;
}

/* The entry's turn is over: its descriptor, or -1. */
static int take_descriptor(struct registry *registry, struct model_entry *entry)
{
    if (entry->file->fd >= 0)
        take_uid(&registry->in_turn, entry->file->uid);
    return TAKE_FD(entry->file->fd);
}

void registry_drop_descriptor(struct registry *registry, struct model_entry *entry)
{
    int fd = entry->file ? take_descriptor(registry, entry) : -1;

    if (fd >= 0)
        registry_drop_file(registry, entry->file->uid, fd);
}

void registry_start_file(struct registry *registry, struct model_entry *entry,
                         struct load_task *task)
{
    task->fd = take_descriptor(registry, entry);
    task->max_bytes = entry->reserved_bytes;
    begin_work(registry, task, entry->file->uid);
}

uint64_t registry_file_need_bytes(const struct model_entry *entry)
{
    return entry->file->bytes + entry->file->bytes / 10 + FILE_EXTRA_BYTES;
}

bool registry_file_is_spent(const struct model_entry *entry)
{
    return entry->file && entry->file->fd < 0 && !entry->task && !entry->model;
}

void registry_file_idle(struct registry *registry, struct model_entry *entry)
{
    if (!entry->file || !entry->gone || entry->in_use > 0)
        return;
    registry_drop_descriptor(registry, entry);
    if (registry_at_rest(entry))
        registry_delete(registry, entry);
    else
        registry_unload(registry, entry); /* gone once it is cold */
}

static struct model_entry *find_held(struct registry *registry, const void *holder)
{
    for (struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (e->file && e->file->holder == holder)
            return e;
    return NULL;
}

void registry_leave_files(struct registry *registry, const void *holder)
{
    struct model_entry *entry;

    if (registry->n_files == 0)
        return;
    /* Found anew each time: one that goes may take others along. */
    while ((entry = find_held(registry, holder))) {
        entry->file->holder = NULL;
        entry->gone = true;
        entry->dismissed = false; /* it goes in any case, and in one way */
        entry->idle_since_us = registry_now_us(registry);
        holds_give(registry->holds, entry, entry->file->uid);
        registry_file_idle(registry, entry);
    }
}
