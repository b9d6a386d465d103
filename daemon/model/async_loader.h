/* The async loader: models are read and packed on threads of its own.
 *
 * A load is asked for with a priority and runs when there is a place for it, the most urgent first.
 * Loads that somebody waits for run on threads of normal priority, in slices that step back for the
 * engine (daemon/model/pacer); the others run on a thread of idle priority, which costs nobody
 * anything and gets nowhere on a busy machine: a load that becomes urgent is handed over from there
 * to a normal thread at its next piece, and a thread without a load of its own helps another's. A
 * load that is stuck in a read can be abandoned, thread and all. The same threads give models'
 * memory back and look through directories, so that the reactor never waits for a disk.
 *
 * Hides the threads, the queue, who works at what.
 * Threads: loader_* functions are the reactor's. `begun` and `done` run on a loader thread, or in
 * loader_cancel(): they pass the task on and do nothing else. */
#ifndef HEARTH_MODEL_ASYNC_LOADER_H
#define HEARTH_MODEL_ASYNC_LOADER_H

#include "daemon/model/load_task.h"

/* Threads that share one load: one packs, and the disk still has two reads to do. */
#define LOADER_HANDS 3u
/* Threads at most that were abandoned and are still stuck; beyond it none is replaced. */
#define LOADER_MAX_ABANDONED 12u
/* Tasks at once that have a thread of their own. */
#define LOADER_MAX_OWN 32u

struct loader;

int loader_new(const struct loader_options *options, struct loader **ret_loader,
               struct fault *ret_fault);
/* Cancels what waits and runs, and waits for the threads, but not for ever. Tasks get their `done`.
 * Returns NULL, or the loader where a thread is still stuck in a read: it lives on, and so must
 * what its `done` uses. */
struct loader *loader_free(struct loader *loader);
void loader_submit(struct loader *loader, struct load_task *task);
/* Makes a task more urgent, waiting or running. False: it is beginning on a thread of idle
 * priority, which may take long; better cancel it and submit another. */
bool loader_promote(struct loader *loader, struct load_task *task, enum load_priority priority);
/* From now on several users wait for it: it counts to none of them. */
void loader_share(struct loader *loader, struct load_task *task);
/* Asks a load to end with -ECANCELED; one that has not begun ends at once. */
void loader_cancel(struct loader *loader, struct load_task *task);
/* Cancels a task that makes no progress and gives its threads up: others take their places. Its
 * `done` comes once they are free again, which may be never. */
void loader_abandon(struct loader *loader, struct load_task *task);

#endif
