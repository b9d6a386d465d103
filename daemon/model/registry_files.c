/* Models that users bring along: files passed by descriptor, known to their user alone.
 *
 * Such a file may lie on a file system of the user's own, which answers when it likes: nothing that
 * can wait for it (fstat, read, even close) happens on the reactor or on a loader's common threads.
 * Each user has one thread at work on a file at most; what comes meanwhile is not taken at all. */
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
#include "daemon/model/registry_internal.h"
#include "lib/cleanup.h"

/* Room that a file's model may take beyond the file's size: a tenth, and so much for a small one.
 */
#define FILE_EXTRA_BYTES (1u << 20)

/* ---- whose threads are at work ---- */

static bool is_at_work(const struct registry *registry, uint32_t uid)
{
    for (uint32_t i = 0; i < registry->n_file_uids; i++)
        if (registry->file_uids[i] == uid)
            return true;
    return false;
}

bool registry_takes_file(const struct registry *registry, uint32_t uid)
{
    return !registry->shutting_down && registry->n_file_uids < ELEMENTSOF(registry->file_uids) &&
           !is_at_work(registry, uid);
}

static void begin_work(struct registry *registry, struct load_task *task, uint32_t uid)
{
    assert(registry->n_file_uids < ELEMENTSOF(registry->file_uids));
    task->own = true;
    task->uid = uid;
    registry->file_uids[registry->n_file_uids++] = uid;
    loader_submit(registry->loader, task);
}

void registry_file_work_done(struct registry *registry, const struct load_task *task)
{
    for (uint32_t i = 0; i < registry->n_file_uids; i++)
        if (registry->file_uids[i] == task->uid) {
            registry->file_uids[i] = registry->file_uids[--registry->n_file_uids];
            return;
        }
}

static void close_call(struct load_task *task)
{
    close(TAKE_FD(task->fd));
}

void registry_drop_file(struct registry *registry, uint32_t uid, int fd)
{
    struct load_task *task =
        registry_takes_file(registry, uid) ? load_task_new(TASK_CALL, NULL) : NULL;

    if (!task) {
        close(fd); /* there is nobody else to do it */
        return;
    }
    task->fd = fd;
    task->call = close_call;
    begin_work(registry, task, uid);
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
                      "another file of this user is being loaded; wait for its end");
    else if (!(entry = new_entry(registry)))
        r = fault_set(ret_fault, -ENOMEM, "no memory for another model");
    else {
        *entry->file = *file;
        r = registry_hold(registry, entry, file->uid, true, ret_fault);
        if (r == 0) {
            *ret_entry = entry;
            return 0;
        }
        entry->file->fd = -1;
        registry_delete(registry, entry);
    }
    registry_drop_file(registry, file->uid, file->fd);
    return r;
}

void registry_start_file(struct registry *registry, struct model_entry *entry,
                         struct load_task *task)
{
    task->fd = TAKE_FD(entry->file->fd);
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
    if (entry->file->fd >= 0)
        registry_drop_file(registry, entry->file->uid, TAKE_FD(entry->file->fd));
    if (registry_at_rest(entry))
        registry_delete(registry, entry);
    else
        registry_unload(registry, entry); /* gone once it is cold */
}

void registry_leave_files(struct registry *registry, const void *holder)
{
    struct model_entry *entry, *next;

    if (registry->n_files == 0)
        return;
    HASH_ITER (hh, registry->entries, entry, next) {
        if (!entry->file || entry->file->holder != holder)
            continue;
        entry->file->holder = NULL;
        entry->gone = true;
        registry_release(registry, entry, entry->file->uid);
        registry_file_idle(registry, entry);
    }
}
