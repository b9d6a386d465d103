/* What the files of the registry share: its state, and the steps from one state to the next.
 *
 * registry.c has the entries, their states and their loads; what else there is about them has a
 * file of its own, registry_<noun>.c. Nobody outside of these includes it. Thread: the reactor. */
#ifndef HEARTH_MODEL_REGISTRY_INTERNAL_H
#define HEARTH_MODEL_REGISTRY_INTERNAL_H

#include "daemon/model/registry.h"
#include "daemon/model/residency.h"

/* Users, each once. */
struct file_uids {
    uint32_t uids[LOADER_MAX_OWN];
    uint32_t n;
};

struct registry {
    struct registry_options options;
    struct loader_options loader_options;
    struct loader *loader;
    struct queue *queue;
    struct model_entry *entries; /* uthash, sorted by name */
    struct holds *holds;
    struct foresight *foresight;
    uint64_t freeing_bytes;      /* of models whose memory is being given back */
    struct arena_legacy *legacy; /* what one left, for whoever begins next; NULL: nothing */
    struct load_task *stuck;     /* loads that were given up and have not returned */
    uint64_t stuck_bytes;        /* that these keep */
    uint64_t scanned_us;
    struct load_task *scan;           /* the look that is under way */
    uint64_t looks_done, look_wanted; /* numbers of looks: one more is due where this is more */
    uint64_t turns;                   /* given out so far */
    uint64_t drain_due_us;            /* the earliest end of a drain; UINT64_MAX: none */
    bool room_wanted;                 /* somebody is queued until there is room */
    bool shutting_down;
    uint64_t n_files;           /* users' files so far */
    uint64_t file_requests;     /* of those that are gone */
    struct file_uids at_work;   /* users whose threads are at work on a file */
    struct file_uids in_turn;   /* users with a file whose load has not begun */
    struct load_task *unclosed; /* descriptors that wait for their users' threads to be closed */
};

static inline uint64_t registry_now_us(const struct registry *registry)
{
    return clock_now_us(registry->options.clock);
}

/* Tells the upper side, which may want or unload the model at once: look at the state again. */
void registry_set_state(struct registry *registry, struct model_entry *entry,
                        enum model_state state);
/* The load is over, or never began: `failed`, with that sentence. */
void registry_fail(struct registry *registry, struct model_entry *entry, enum wire_code code,
                   const char *sentence);
/* It is neither loaded nor on its way any more: cold, and queued again where it is wanted again. */
void registry_go_cold(struct registry *registry, struct model_entry *entry);
/* The one that has waited for room longest, of those that came after `turn`; NULL: nobody. */
struct model_entry *registry_next_in_turn(const struct registry *registry, uint64_t turn);
/* Room may have come free: those that wait for it try again, in their turn. */
void registry_start_waiting(struct registry *registry);
/* Starts the load of a queued entry when what it needs is ready and there is room, and makes room
 * where that may be. */
void registry_start_queued(struct registry *registry, struct model_entry *entry);
/* Whether the models that a queued entry needs are ready (registry_needs.c); wants them, and fails
 * the entry where one of them has failed. */
bool registry_needs_are_ready(struct registry *registry, struct model_entry *entry);
/* Whether another model that is on its way in needs this one. */
bool registry_is_needed(const struct registry *registry, const struct model_entry *need);
/* The model has become ready or failed: those that wait for it go on. */
void registry_need_changed(struct registry *registry, struct model_entry *need);
/* A use of the model is one of those that it needs. */
void registry_use_needs(struct registry *registry, const struct model_entry *entry);
/* Neither loaded nor on its way, and of no use to anybody. */
bool registry_at_rest(const struct model_entry *entry);
void registry_delete(struct registry *registry, struct model_entry *entry);
/* The load of a user's file begins, on a thread of its own; and what that thread did is over. */
void registry_start_file(struct registry *registry, struct model_entry *entry,
                         struct load_task *task);
void registry_file_work_done(struct registry *registry, struct load_task *task);
/* Whether the file's user has no thread at work now, and another may begin. */
bool registry_file_may_begin(const struct registry *registry, const struct model_entry *entry);
/* The load of the entry will not begin: its descriptor goes, if it has one. */
void registry_drop_descriptor(struct registry *registry, struct model_entry *entry);
/* Tries again what could not begin; and lets go of all that is left, without closing it. */
void registry_files_tick(struct registry *registry);
void registry_files_free(struct registry *registry);
uint64_t registry_file_need_bytes(const struct model_entry *entry);
/* A user's file that was read and is not loaded any more: it cannot come back. */
bool registry_file_is_spent(const struct model_entry *entry);
/* Nothing uses the entry: a user's file goes if its holder is gone. */
void registry_file_idle(struct registry *registry, struct model_entry *entry);
/* Hands the entry's load to the loader (registry_loads.c); room has been reserved. */
void registry_start_load(struct registry *registry, struct model_entry *entry);
/* A load under way has become as urgent as the entry. */
void registry_promote_load(struct registry *registry, struct model_entry *entry);
/* Somebody, of that uid, asks for a load under way. */
void registry_share_load(struct registry *registry, struct model_entry *entry, uint32_t uid);
/* A load that was given up has not returned: until then nobody reads that file anew. */
bool registry_load_is_stuck(const struct registry *registry, const struct model_entry *entry);
/* The load is over, and may have been one of these. */
void registry_load_returned(struct registry *registry, const struct load_task *task);
/* Gives a load without progress for loading.timeout up. */
void registry_check_load(struct registry *registry, struct model_entry *entry, uint64_t now);
/* Has a ready model that rests give back what it does not need of scratch (registry_room.c). */
void registry_shrink_idle(struct registry *registry, struct model_entry *entry, uint64_t now);

/* ---- memory that passes from one model to the next (registry_legacy.c) ---- */

/* Gives a model's memory back on a loader thread: unmapping gigabytes takes a while. What somebody
 * who waits for room can use of it stays. */
void registry_free_model(struct registry *registry, struct model_entry *entry);
/* The thread is done with that: what stayed is for whoever begins next. */
void registry_model_freed(struct registry *registry, struct load_task *task);
/* Whoever could begin has: what stayed goes back, unless more memory is on its way, with which
 * another may begin. */
void registry_settle_legacy(struct registry *registry);
/* Whether what stayed becomes a part of the entry's memory if it begins now. */
bool registry_would_inherit(const struct registry *registry, const struct model_entry *entry);
/* It begins: gives that to its load. */
void registry_inherit(struct registry *registry, const struct model_entry *entry,
                      struct load_task *task);
/* Takes back what the load has not used of it. False: it has. */
bool registry_take_legacy_back(struct registry *registry, struct load_task *task);
/* The same once the load has let it lie for too long. */
void registry_check_legacy(struct registry *registry, struct load_task *task, uint64_t now);

/* Whether nothing keeps a ready model any more and its keep_alive is over. */
bool registry_kept_long_enough(const struct registry *registry, const struct model_entry *entry);

/* The entry is cold from now on, or queued again where it was asked for meanwhile. May free it. */
void registry_go_cold(struct registry *registry, struct model_entry *entry);

/* What residency says about a model's load now (registry_room.c), without doing anything. */
enum residency_verdict registry_room_for(const struct registry *registry,
                                         const struct model_entry *entry);

/* ---- prediction (registry_predict.c) ---- */

int registry_foresight_new(struct registry *registry);
void registry_foresight_free(struct registry *registry);
/* How wanted the model is, as a resident and as a newcomer; and whether that orders evictions. */
double registry_wanted(const struct registry *registry, const struct model_entry *entry);
double registry_worth(const struct registry *registry, const struct model_entry *entry);
enum residency_order registry_order(const struct registry *registry);
/* Whether the entry's load, under way or waiting, is a prediction that nobody has asked for yet. */
bool registry_is_prediction(const struct model_entry *entry);
/* Loads what is likely to be wanted next, where nothing else loads; call when something has come to
 * an end, and once a second. */
void registry_foresee(struct registry *registry);
/* Eager models that had to go come back where there is room without asking anybody. */
void registry_bring_back_eager(struct registry *registry);
/* A load is over: what it tells. The model leaves, or its load is given up: what it was good for.
 */
void registry_foreseen_loaded(struct registry *registry, const struct model_entry *entry);
void registry_foreseen_left(struct registry *registry, struct model_entry *entry);
/* Has the history written, on a loader's thread, where it has changed: once in a while, or `now`.
 */
void registry_save_history(struct registry *registry, bool now);
bool registry_is_save(const struct registry *registry, const struct load_task *task);
void registry_saved(struct registry *registry, struct load_task *task);

#endif
