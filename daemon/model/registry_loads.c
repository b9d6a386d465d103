/* The loads of the registry's entries: begun, made urgent, given up. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "daemon/model/builtin.h"
#include "daemon/model/registry_internal.h"

/* A cancelled load ends at its next piece; one that does not come to it is given up. */
#define CANCEL_PATIENCE_US 2000000u

static struct load_task *new_task(struct model_entry *entry)
{
    struct load_task *task = load_task_new(TASK_LOAD, entry);

    if (!task)
        return NULL;
    if (entry->file) {
        /* its descriptor comes with registry_start_file() */
    } else if (entry->path) {
        task->path = strdup(entry->path);
        if (!task->path)
            return load_task_free(task);
    } else {
        task->memory = builtin_bytes();
        task->memory_bytes = builtin_size();
    }
    task->priority = entry->priority;
    task->uid = entry->asker;
    if (entry->config) {
        task->rank = entry->config->priority;
        task->context_tokens = entry->config->context;
    }
    return task;
}

void registry_start_load(struct registry *registry, struct model_entry *entry)
{
    struct load_task *task = new_task(entry);

    if (!task) {
        registry_fail(registry, entry, CODE_NO_MEMORY, "no memory for the load");
        return;
    }
    registry_inherit(registry, entry, task);
    entry->task = task;
    entry->progress_bytes = 0;
    entry->progress_at_us = registry_now_us(registry);
    if (entry->file) {
        registry_start_file(registry, entry, task); /* never here: it may hang */
    } else if (registry->options.config->loading.async) {
        loader_submit(registry->loader, task);
    } else {
        load_sync(&registry->loader_options, task);
        registry->loader_options.done(registry->loader_options.userdata, task);
    }
}

/* From here on the task is nobody's: its `done` frees it. */
static struct load_task *give_task_up(struct model_entry *entry)
{
    struct load_task *task = entry->task;

    task->subject = NULL;
    entry->task = NULL;
    return task;
}

void registry_promote_load(struct registry *registry, struct model_entry *entry)
{
    if (loader_promote(registry->loader, entry->task, entry->priority))
        return;
    /* It has begun where it may take long: another is faster. Not where it has come to make another
     * model's memory its own, which is the last step: there would not be room for both. */
    if (!registry_take_legacy_back(registry, entry->task))
        return;
    loader_cancel(registry->loader, give_task_up(entry));
    registry_start_load(registry, entry);
}

void registry_share_load(struct registry *registry, struct model_entry *entry, uint32_t uid)
{
    if (uid != MODEL_NOBODY && entry->task->uid != LOAD_FOR_MANY && entry->task->uid != uid)
        loader_share(registry->loader, entry->task);
}

/* ---- loads that hang ---- */

/* What it has mapped stays counted until the read returns: for ever, perhaps. */
static void abandon(struct registry *registry, struct model_entry *entry)
{
    struct load_task *task = give_task_up(entry);
    bool inherited = !registry_take_legacy_back(registry, task);
    /* Not by one that began just now. */
    bool mapped = inherited || atomic_load(&task->progress.total_bytes) > 0;

    task->kept_bytes = mapped ? entry->reserved_bytes : 0;
    registry->stuck_bytes += task->kept_bytes;
    task->next_stuck = registry->stuck;
    registry->stuck = task;
    loader_abandon(registry->loader, task);
}

bool registry_load_is_stuck(const struct registry *registry, const struct model_entry *entry)
{
    for (const struct load_task *task = registry->stuck; task; task = task->next_stuck)
        if (entry->path && task->path && strcmp(entry->path, task->path) == 0)
            return true;
    return false;
}

void registry_load_returned(struct registry *registry, const struct load_task *task)
{
    for (struct load_task **at = &registry->stuck; *at; at = &(*at)->next_stuck) {
        if (*at != task)
            continue;
        *at = task->next_stuck;
        registry->stuck_bytes -= task->kept_bytes;
        registry_tell_memory(registry);
        registry_start_waiting(registry);
        return;
    }
}

void registry_check_load(struct registry *registry, struct model_entry *entry, uint64_t now)
{
    uint64_t done = atomic_load(&entry->task->progress.done_bytes);
    uint64_t timeout_us = registry->options.config->loading.timeout_us;
    bool cancelled = atomic_load(&entry->task->progress.cancel);
    char sentence[FAULT_TEXT_BYTES];

    /* One that no thread is at only waits for its turn. */
    if (done != entry->progress_bytes || atomic_load(&entry->task->n_hands) == 0) {
        entry->progress_bytes = done;
        entry->progress_at_us = now;
        return;
    }
    if (cancelled && now - entry->progress_at_us >= CANCEL_PATIENCE_US) {
        abandon(registry, entry);
        registry_go_cold(registry, entry);
        return;
    }
    if (now - entry->progress_at_us < timeout_us)
        return;
    snprintf(sentence, sizeof(sentence),
             "reading %s has made no progress for %" PRIu64 " s after %" PRIu64 " bytes",
             entry->path ? entry->path : entry->name, timeout_us / 1000000u, done);
    abandon(registry, entry);
    entry->identity = (struct file_identity){0}; /* the file may be well: it may be tried again */
    registry_fail(registry, entry, CODE_LOAD_FAILED, sentence);
}
