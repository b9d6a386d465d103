/* Memory that passes from a model that goes to one that waits for room.
 *
 * New memory is a large part of what a load costs, and most loads follow another model's going. So
 * where somebody waits for room, what a going model's weights took is not given back at once: it is
 * kept until those that wait have been looked at, and whoever begins takes it along. It counts by
 * itself until then, and is a part of what is reserved for the load from then on, so it is never
 * more than that model's file is large. What nobody has use for, or a load does not come to within
 * LEGACY_PATIENCE_US, goes back to the kernel, on a loader thread. A user's own file leaves
 * nothing: its bytes are for nobody else, and the kernel clears them. */
#include "daemon/model/registry_internal.h"
#include "lib/cleanup.h"

/* A load begins at once where nothing stands in its way; while it waits longer for a thread, or for
 * a disk to give the header, the memory is of more use to others. */
#define LEGACY_PATIENCE_US 2000000u

/* Its file's size, not the tenth more that its load may take: what it turns out not to need must
 * not make the peak of the load. */
static uint64_t usable_bytes(const struct model_entry *heir)
{
    return heir->file ? heir->file->bytes : heir->file_bytes;
}

static void submit(struct registry *registry, struct load_task *task, uint64_t bytes)
{
    task->priority = LOAD_INTERACTIVE; /* somebody may wait for the room */
    task->memory_bytes = bytes;
    registry->freeing_bytes += bytes;
    loader_submit(registry->loader, task);
}

static void give_back(struct registry *registry, struct arena_legacy *legacy)
{
    struct load_task *task = legacy ? load_task_new(TASK_FREE, NULL) : NULL;

    if (!task) {
        arena_legacy_free(legacy);
        return;
    }
    atomic_store(&task->legacy, legacy);
    submit(registry, task, legacy->bytes);
}

/* Of two the larger one. */
static void keep(struct registry *registry, struct arena_legacy *legacy)
{
    struct arena_legacy *smaller = legacy;

    if (legacy && (!registry->legacy || registry->legacy->bytes < legacy->bytes)) {
        smaller = registry->legacy;
        registry->legacy = legacy;
    }
    give_back(registry, smaller);
}

/* What to keep of a model that goes: for who has waited longest, or for itself where it comes back
 * at once. */
static uint64_t keep_bytes(const struct registry *registry, const struct model_entry *leaving)
{
    const struct model_entry *next = registry_next_in_turn(registry, 0);

    if (leaving->file || registry->shutting_down)
        return 0;
    if (!next && leaving->again)
        next = leaving;
    return next ? usable_bytes(next) : 0;
}

void registry_free_model(struct registry *registry, struct model_entry *entry)
{
    struct load_task *task = load_task_new(TASK_FREE, NULL);
    uint64_t bytes;

    if (!task) {
        entry->model = model_free(entry->model);
        return;
    }
    bytes = registry_need_bytes(entry);
    task->model = TAKE_PTR(entry->model);
    task->keep_bytes = keep_bytes(registry, entry);
    submit(registry, task, bytes);
}

void registry_model_freed(struct registry *registry, struct load_task *task)
{
    registry->freeing_bytes -= task->memory_bytes;
    keep(registry, load_task_take_legacy(task));
}

void registry_settle_legacy(struct registry *registry)
{
    if (registry->freeing_bytes == 0)
        give_back(registry, TAKE_PTR(registry->legacy));
}

bool registry_would_inherit(const struct registry *registry, const struct model_entry *entry)
{
    return registry->legacy && registry->legacy->bytes <= usable_bytes(entry);
}

void registry_inherit(struct registry *registry, const struct model_entry *entry,
                      struct load_task *task)
{
    if (!registry_would_inherit(registry, entry))
        return;
    atomic_store(&task->legacy, TAKE_PTR(registry->legacy));
    task->inherited_us = registry_now_us(registry);
}

bool registry_take_legacy_back(struct registry *registry, struct load_task *task)
{
    struct arena_legacy *legacy = load_task_take_legacy(task);

    if (!legacy)
        return task->inherited_us == 0;
    task->inherited_us = 0;
    keep(registry, legacy);
    return true;
}

void registry_check_legacy(struct registry *registry, struct load_task *task, uint64_t now)
{
    if (task->inherited_us > 0 && now - task->inherited_us >= LEGACY_PATIENCE_US)
        registry_take_legacy_back(registry, task);
}
