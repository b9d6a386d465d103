/* The registry: every model there is, by name, and the state each is in.
 *
 * cold -> queued -> loading -> warming -> ready -> draining -> cold; `failed` keeps its reason.
 * Names come from the configuration, from the models directories (NAME.gguf) and from the binary
 * itself (ember); the first that has a name keeps it. Loads go through the async loader; room is
 * made by residency. What happens above (running requests, the engine thread) is told through
 * `registry_ops`, which the upper side provides.
 *
 * Hides files, directories, load tasks, the budget. Thread: the reactor's. */
#ifndef HEARTH_MODEL_REGISTRY_H
#define HEARTH_MODEL_REGISTRY_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "daemon/config.h"
#include "daemon/model/async_loader.h"
#include "daemon/model/catalog.h"
#include "lib/clock.h"
#include "lib/hash.h"
#include "lib/wire.h"

enum model_state {
    MODEL_COLD,
    MODEL_QUEUED,
    MODEL_LOADING,
    MODEL_WARMING,
    MODEL_READY,
    MODEL_DRAINING,
    MODEL_FAILED,
};

/* Users remembered per model, for "what nobody else used in the last 60 s". */
#define MODEL_USERS     16u
#define MODEL_RECENT_US 60000000u
/* For whom a model is loaded when no user asked. */
#define MODEL_NOBODY UINT32_MAX

struct model_user {
    uint32_t uid;
    uint32_t in_use; /* requests of the user that run on it */
    uint64_t at_us;  /* of the last use */
};

/* A file that a user passed, open for reading. */
struct passed_file {
    int fd; /* -1: with the loader, or read */
    uint32_t uid;
    uint64_t bytes;     /* its size, as far as that was known */
    const void *holder; /* as long as this lives it stays; NULL: over */
};

struct model_entry {
    char name[WIRE_MAX_MODEL_NAME + 1];
    char *path;                        /* NULL: built in */
    const struct config_model *config; /* NULL: none of its own */
    struct passed_file *file;          /* NULL: not a user's own */
    enum model_state state, was;       /* before the last change */
    bool gone;      /* its file was not there at the last look; goes once it is cold */
    bool wanted;    /* `preload` reads 1 */
    bool again;     /* asked for while it leaves: queued once it is cold (true in changed(), too) */
    bool leaving;   /* unloaded while warming: drains once it is ready */
    bool dismissed; /* unloaded while held: goes with its last hold, unless it is wanted again */
    bool pinned;
    enum load_priority priority; /* of the load asked for */
    uint32_t asker;              /* the uid it was last asked for by; MODEL_NOBODY: none */
    uint32_t in_use;             /* requests that wait for it or run on it */
    uint32_t holds;              /* requests that keep it loaded */
    uint64_t keep_alive_us;      /* 0: none */
    uint64_t shortened_us;       /* by the request that used it last; 0: not */
    uint32_t shortened_by;       /* that one's uid */
    uint64_t idle_since_us;      /* neither used nor held since */
    uint64_t last_used_us, state_since_us, deadline_us /* of draining */;
    uint64_t turn;             /* when it was queued, among all: the earlier goes first */
    uint64_t load_us;          /* the last load's duration */
    uint64_t file_bytes;       /* as of the last look through the directories */
    uint64_t reserved_bytes;   /* of weights and tables, while queued, loading or loaded */
    uint64_t requests, tokens; /* for stats */
    uint64_t progress_bytes, progress_at_us; /* a load's last sign of life */
    struct load_task *task;                  /* the load under way */
    uint64_t loaded_bytes;                   /* of the file's tensor data, once loaded */
    struct model *model;                     /* from warming to draining */
    uint64_t fingerprint;          /* the upper side's: of file, variant and KV type, once ready */
    void *attachment;              /* the upper side's, as long as it has the model */
    struct file_identity identity; /* of the file that was loaded or that failed */
    enum wire_code code;           /* failed: with this code */
    char error[FAULT_TEXT_BYTES];
    uint64_t asked_us;     /* when a request last asked for it; 0: never */
    uint64_t predicted_us; /* when it was predicted, until it is used or leaves; 0: not */
    bool unused;           /* since it became ready */
    bool shrunk;           /* since its last use */
    bool evicted;          /* it had to go for another, and has not been loaded since */
    uint32_t evictions;
    struct {
        char by[WIRE_MAX_MODEL_NAME + 1];
        const char *why;
        uint64_t bytes, reload_us;
    } last_eviction; /* by: empty before the first */
    struct model_user users[MODEL_USERS];
    uint32_t n_users;
    UT_hash_handle hh;
};

/* Why a model had to go. */
struct eviction {
    const struct model_entry *victim;
    const struct model_entry *newcomer; /* who needs the room */
    const char *why;                    /* a few words: why this one */
    uint64_t bytes;                     /* that come free */
    uint64_t reload_us;                 /* what its last load took: the price of wanting it again */
};

/* The upper side. */
struct registry_ops {
    /* The model is loaded: take it and run a step, then call registry_warmed(). -errno. */
    int (*attach)(void *userdata, struct model_entry *entry);
    /* Let go of it, once nothing runs on it, then call registry_detached(). */
    void (*detach)(void *userdata, struct model_entry *entry);
    /* Draining has taken too long: end what still runs on it. */
    void (*expel)(void *userdata, struct model_entry *entry);
    /* The state (or the list of models: entry NULL) has changed. */
    void (*changed)(void *userdata, struct model_entry *entry);
    void *userdata;
    /* A model will be unloaded for another's sake. May be NULL. */
    void (*evicted)(void *userdata, const struct eviction *eviction);
    /* A model is loaded, or with loading.prediction dry-run would be, before anybody asks. May be
     * NULL. */
    void (*predicted)(void *userdata, const struct model_entry *entry, bool dry_run);
    /* A model is at rest: have its activations given back where they are more than that, and it
     * still is, then call registry_shrunk(). May be NULL. */
    void (*shrink)(void *userdata, struct model_entry *entry, uint64_t kept_bytes);
};

struct registry_options {
    const struct config *config;
    const struct kernel_table *kernels;
    struct metrics *metrics;
    const struct clock *clock;
    const struct engine_pulse *pulse; /* whom loads step back for; NULL: nobody */
    uint64_t budget_bytes;            /* for models */
    uint64_t memory_per_uid_bytes;    /* of models kept by one user's holds or files alone */
    const char *names_path;   /* list of names for when no daemon runs; NULL: none is written */
    const char *history_path; /* what was asked for, for the next start; NULL: it is forgotten */
    struct registry_ops ops;
};

struct registry;

/* Looks through the directories (this once in the calling thread) and starts the loader. */
int registry_new(const struct registry_options *options, struct registry **ret_registry,
                 struct fault *ret_fault);
/* Models must have been detached. Returns NULL. */
struct registry *registry_free(struct registry *registry);
/* Readable when registry_dispatch() has something to do. */
int registry_fd(const struct registry *registry);
void registry_dispatch(struct registry *registry);
/* Time limits; call at least once a second, and when registry_due_us() has come: a model's drain
 * has had its time then. UINT64_MAX: none drains. */
void registry_tick(struct registry *registry);
uint64_t registry_due_us(const struct registry *registry);

/* ---- users' own files (registry_files.c): models `file-N`, each its user's alone ---- */

/* Whether a descriptor of that user may be taken now. Else it must not even be received: closing a
 * file may wait for ever, too. */
bool registry_takes_file(const struct registry *registry, uint32_t uid);
/* Whether the descriptor is a regular file, open for reading alone; never waits. -EINVAL. */
int registry_check_file(int fd, uint64_t *ret_bytes);
/* Closes a descriptor where that may take its time. */
void registry_drop_file(struct registry *registry, uint32_t uid, int fd);
/* A model of that file, cold, which is kept until registry_leave_files() of its holder; the
 * descriptor is taken over in any case. -EBUSY: the user has another on its way; -EDQUOT, -ENOSPC:
 * the user's limits; -ENOMEM; with a sentence. */
int registry_add_file(struct registry *registry, const struct passed_file *file,
                      struct model_entry **ret_entry, struct fault *ret_fault);
/* The holder is gone: its files go once no request uses them. */
void registry_leave_files(struct registry *registry, const void *holder);

const char *model_state_name(enum model_state state);

struct model_entry *registry_find(struct registry *registry, const char *name);
/* All entries, in the order of their names: uthash's `hh.next`. */
struct model_entry *registry_first(struct registry *registry);
size_t registry_n_models(const struct registry *registry);
/* What counts against the budget: of all models, and of what gives its memory back. */
uint64_t registry_loaded_bytes(const struct registry *registry);
/* Has the metrics say so; steps change it at any time. */
void registry_tell_memory(const struct registry *registry);

/* Looks through the directories again, on a loader thread; `changed(NULL)` follows. False: too soon
 * after the last time (`force` does not ask), and nothing follows. */
bool registry_rescan(struct registry *registry, bool force);
/* Asks for a look that begins from now on: its number, or 0 where memory is out. It is over once
 * registry_looks_done() has come so far. */
uint64_t registry_look(struct registry *registry);
uint64_t registry_looks_done(const struct registry *registry);

/* Wants the model: 0, it is ready; 1, it is on its way (`changed` will say how it goes); -EIO: it
 * has failed and its file is still the same (entry->code, entry->error). `retry`: try that, too. */
int registry_want(struct registry *registry, struct model_entry *entry, enum load_priority priority,
                  bool retry);
/* The same for a user: while no request waits for it, a model that another user uses or has used
 * within MODEL_RECENT_US does not have to go for it. */
int registry_want_for(struct registry *registry, struct model_entry *entry,
                      enum load_priority priority, uint32_t uid, bool retry);
/* A request asks for the model, before it wants it: counts whether it was ready, and is remembered
 * for prediction. */
void registry_asked(struct registry *registry, struct model_entry *entry);
/* Lets it go: cancels a load, drains a ready one. */
void registry_unload(struct registry *registry, struct model_entry *entry);
/* The same by order: one that is held goes when its last hold lets go. */
void registry_dismiss(struct registry *registry, struct model_entry *entry);
/* A request of `uid` begins or ends to use it. */
void registry_use(struct registry *registry, struct model_entry *entry, uint32_t uid);
/* `keep_alive_us`: what the request wishes, 0: nothing. */
void registry_unuse(struct registry *registry, struct model_entry *entry, uint32_t uid,
                    uint64_t keep_alive_us);
/* While those who waited for it come to use it, it does not go: the first of them may have ended
 * before the last one begins. */
void registry_begin_line(struct model_entry *entry);
void registry_end_line(struct registry *registry, struct model_entry *entry);
/* Whether somebody other than `uid` uses it, or used it within MODEL_RECENT_US. */
bool registry_used_by_others(const struct registry *registry, const struct model_entry *entry,
                             uint32_t uid);
/* Keeps it from being evicted until registry_release(). `bounded`: within limits.memory_per_uid.
 * -EDQUOT: limits.holds_per_uid; -ENOSPC: limits.memory_per_uid; -ENOMEM; with a sentence. */
int registry_hold(struct registry *registry, struct model_entry *entry, uint32_t uid, bool bounded,
                  struct fault *ret_fault);
void registry_release(struct registry *registry, struct model_entry *entry, uint32_t uid);
bool registry_held_by_others(const struct registry *registry, const struct model_entry *entry,
                             uint32_t uid);
/* Values until the daemon ends, in the configuration's place. */
void registry_set_pinned(struct registry *registry, struct model_entry *entry, bool pinned);
void registry_set_keep_alive(struct registry *registry, struct model_entry *entry,
                             uint64_t keep_alive_us);
/* How long the model stays after its last use, its last request's wish included; 0: for ever. */
uint64_t registry_keep_alive_us(const struct registry *registry, const struct model_entry *entry);
/* Room that it takes of the budget, or would take. */
uint64_t registry_need_bytes(const struct model_entry *entry);
/* Memory that it has now, KV's included: as far as its load has come, or all of it. */
uint64_t registry_memory_bytes(const struct model_entry *entry);
/* The upper side's answers. */
void registry_warmed(struct registry *registry, struct model_entry *entry, const char *error);
void registry_detached(struct registry *registry, struct model_entry *entry);
/* Some model's scratch may take less now. */
void registry_shrunk(struct registry *registry);
/* Unloads everything; true once nothing is loaded or loading any more. */
bool registry_shut_down(struct registry *registry);

/* Flat `key value` lines. */
void registry_write_info(const struct model_entry *entry, FILE *out);
void registry_write_stats(const struct model_entry *entry, FILE *out);
/* Per-model series of hearth.prom. */
void registry_write_prometheus(struct registry *registry, FILE *out);

/* Whether all names that the configuration's models need are there; -EINVAL with a sentence. */
int registry_check_config(const struct config *config, struct fault *ret_fault);
/* The names alone, for `hearthd --list`: one a line, to `out` and, where it can be written, to the
 * list at `names_path` (NULL: to none). */
int registry_list_names(const struct config *config, const char *names_path, FILE *out,
                        struct fault *ret_fault);

#endif
