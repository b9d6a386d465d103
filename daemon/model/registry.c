#include "daemon/model/registry_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/log.h"
#include "daemon/model/builtin.h"
#include "daemon/model/holds.h"
#include "daemon/queue.h"
#include "lib/cleanup.h"

/* Least time between two looks through the directories that requests ask for. */
#define RESCAN_EVERY_US 1000000u

/* Messages from loader threads that can wait at once: two a task, of a load, a model's release and
 * one of memory that no load has taken for each model. */
#define REGISTRY_MESSAGES (6u * CATALOG_MAX_MODELS + 8u)

enum message_kind { MESSAGE_BEGUN, MESSAGE_DONE };

const char *model_state_name(enum model_state state)
{
    static const char *const names[] = {
        [MODEL_COLD] = "cold",       [MODEL_QUEUED] = "queued", [MODEL_LOADING] = "loading",
        [MODEL_WARMING] = "warming", [MODEL_READY] = "ready",   [MODEL_DRAINING] = "draining",
        [MODEL_FAILED] = "failed",
    };
    return names[state];
}

void registry_set_state(struct registry *registry, struct model_entry *entry,
                        enum model_state state)
{
    uint64_t ready = 0;

    entry->was = entry->state;
    entry->state = state;
    entry->state_since_us = registry_now_us(registry);
    for (struct model_entry *e = registry->entries; e; e = e->hh.next)
        ready += e->state == MODEL_READY;
    metrics_set(registry->options.metrics, M_MODELS_READY, ready);
    registry_tell_memory(registry);
    registry->options.ops.changed(registry->options.ops.userdata, entry);
}

/* ---- the list of names ---- */

/* A list that is written anew and moved into place, so that a reader sees the old one or the new
 * one. Who writes is in the name meanwhile: a daemon and a `hearthd --list` may do so at once. */
struct names_file {
    FILE *out; /* NULL: it cannot be written, or there is none */
    char *temporary;
};

static struct names_file names_begin(const char *path)
{
    struct names_file names = {NULL, NULL};
    _cleanup_close_ int fd = -1;

    if (!path || asprintf(&names.temporary, "%s.%d", path, (int)getpid()) < 0)
        return (struct names_file){NULL, NULL};
    /* A file of our own making: what somebody else has put there is not written to. */
    unlink(names.temporary);
    fd = open(names.temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return names;
    (void)fchmod(fd, 0644); /* for everybody to read, whatever the umask */
    names.out = fdopen(fd, "w");
    if (names.out)
        (void)TAKE_FD(fd);
    else
        unlink(names.temporary);
    return names;
}

static void names_end(struct names_file *names, const char *path)
{
    if (names->out && (fclose(names->out) != 0 || rename(names->temporary, path) < 0))
        unlink(names->temporary);
    free(names->temporary);
}

static void write_names(const struct registry *registry)
{
    struct names_file names = names_begin(registry->options.names_path);

    for (struct model_entry *e = registry->entries; names.out && e; e = e->hh.next)
        if (!e->file)
            fprintf(names.out, "%s\n", e->name);
    names_end(&names, registry->options.names_path);
}

static int by_name(const struct model_entry *a, const struct model_entry *b)
{
    return strcmp(a->name, b->name);
}

static struct model_entry *entry_free(struct model_entry *entry)
{
    free(entry->file);
    free(entry->path);
    free(entry);
    return NULL;
}

void registry_delete(struct registry *registry, struct model_entry *entry)
{
    registry->file_requests += entry->file ? entry->requests : 0;
    registry_drop_descriptor(registry, entry);
    HASH_DEL(registry->entries, entry);
    entry_free(entry);
}

bool registry_at_rest(const struct model_entry *entry)
{
    return (entry->state == MODEL_COLD || entry->state == MODEL_FAILED) && entry->in_use == 0 &&
           entry->holds == 0;
}

/* An entry of that name; what was found of it comes with entry_update(). */
static int entry_add(struct registry *registry, const struct catalog_item *item)
{
    struct model_entry *entry = calloc(1, sizeof(*entry));

    if (!entry)
        return -ENOMEM;
    memcpy(entry->name, item->name, sizeof(entry->name));
    entry->state_since_us = registry_now_us(registry);
    entry->asker = MODEL_NOBODY;
    /* Only now: what is set at run time outlives a look. */
    entry->pinned = item->config && item->config->pinned;
    entry->keep_alive_us = item->config ? item->config->keep_alive_us : 0;
    HASH_ADD_STR(registry->entries, name, entry);
    if (!hash_added(&entry->hh)) {
        entry_free(entry);
        return -ENOMEM;
    }
    return 0;
}

static void entry_update(struct registry *registry, struct catalog_item *item)
{
    struct model_entry *entry = registry_find(registry, item->name);

    if (!entry || entry->file)
        return; /* a user's file was there before; the model comes with a later look */
    entry->gone = false;
    entry->config = item->config;
    /* A model that is loaded goes on with the file it came from. */
    if (registry_at_rest(entry)) {
        free(entry->path);
        entry->path = TAKE_PTR(item->path);
        entry->file_bytes = item->bytes;
    }
}

/* Brings the entries up to date with what was found on disk. -ENOMEM: some that are new are left
 * out; the rest is done. */
static int catalog_apply(struct registry *registry, struct catalog *catalog)
{
    struct model_entry *entry, *next;
    int r = 0;

    for (size_t i = 0; i < catalog->n_items && r == 0; i++)
        if (!registry_find(registry, catalog->items[i].name))
            r = entry_add(registry, &catalog->items[i]);
    HASH_ITER (hh, registry->entries, entry, next) {
        entry->gone = entry->gone || !entry->file;
    }
    for (size_t i = 0; i < catalog->n_items; i++)
        entry_update(registry, &catalog->items[i]);
    for (size_t i = 0; i < catalog->n_notes; i++)
        log_warning("%s", catalog->notes[i]);
    HASH_ITER (hh, registry->entries, entry, next) {
        if (entry->gone && registry_at_rest(entry))
            registry_delete(registry, entry);
    }
    HASH_SORT(registry->entries, by_name);
    write_names(registry);
    return r;
}

static void scan_call(struct load_task *task)
{
    const struct registry *registry = task->subject;
    struct catalog *catalog = NULL;

    task->error = catalog_read(registry->options.config, &catalog);
    task->result = catalog;
}

static void scan_done(struct registry *registry, struct load_task *task)
{
    struct catalog *catalog = task->result;

    registry->scan = NULL;
    if (task->error < 0 || catalog_apply(registry, catalog) < 0)
        log_warning("there was no memory for all that is in the models directories: what is new is "
                    "known with a later look");
    catalog_free(catalog);
    registry->looks_done++;
    if (registry->looks_done < registry->look_wanted && !registry->shutting_down &&
        !registry_rescan(registry, true))
        registry->looks_done = registry->look_wanted; /* no memory: nobody waits for ever */
    registry->options.ops.changed(registry->options.ops.userdata, NULL);
}

/* A look that hangs in a directory is given up like a load: what it would have found is not there.
 */
static void check_scan(struct registry *registry, uint64_t now)
{
    if (!registry->scan || atomic_load(&registry->scan->n_hands) == 0 ||
        now - registry->scanned_us < registry->options.config->loading.timeout_us)
        return;
    log_warning("looking through the models directories has taken longer than loading.timeout: "
                "given up; a disk hangs, or raise it");
    loader_abandon(registry->loader, TAKE_PTR(registry->scan));
    registry->looks_done = MAX(registry->looks_done + 1, registry->look_wanted);
    registry->options.ops.changed(registry->options.ops.userdata, NULL);
}

bool registry_rescan(struct registry *registry, bool force)
{
    uint64_t now = registry_now_us(registry);

    if (registry->scan)
        return true;
    if (!force && now - registry->scanned_us < RESCAN_EVERY_US)
        return false;
    registry->scan = load_task_new(TASK_CALL, registry);
    if (!registry->scan)
        return false;
    registry->scanned_us = now;
    registry->scan->call = scan_call;
    loader_submit(registry->loader, registry->scan);
    return true;
}

uint64_t registry_look(struct registry *registry)
{
    /* One that is under way may have passed by what is new. */
    uint64_t number = registry->looks_done + (registry->scan ? 2 : 1);

    if (!registry_rescan(registry, true))
        return 0;
    return registry->look_wanted = number;
}

uint64_t registry_looks_done(const struct registry *registry)
{
    return registry->looks_done;
}

/* ---- loading ---- */

void registry_fail(struct registry *registry, struct model_entry *entry, enum wire_code code,
                   const char *sentence)
{
    entry->code = code;
    entry->reserved_bytes = 0;
    entry->again = entry->leaving = false;
    snprintf(entry->error, sizeof(entry->error), "%s", sentence);
    registry_drop_descriptor(registry, entry);
    registry_set_state(registry, entry, MODEL_FAILED);
    if (entry->state == MODEL_FAILED)
        registry_need_changed(registry, entry);
}

struct model_entry *registry_next_in_turn(const struct registry *registry, uint64_t turn)
{
    struct model_entry *next = NULL;

    for (struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (e->state == MODEL_QUEUED && !e->task && e->turn > turn &&
            (!next || e->turn < next->turn))
            next = e;
    return next;
}

/* Those that wait for room try again in their order, so that a model which comes back again and
 * again does not take the room that another waits for. */
static void start_in_turn(struct registry *registry)
{
    uint64_t turn = 0, last = registry->turns;
    struct model_entry *entry;

    while ((entry = registry_next_in_turn(registry, turn)) && entry->turn <= last) {
        turn = entry->turn;
        registry_start_queued(registry, entry);
    }
}

/* Room may have come free. */
void registry_start_waiting(struct registry *registry)
{
    if (!registry->room_wanted)
        return;
    registry->room_wanted = false; /* who still has to wait says so again */
    start_in_turn(registry);
}

static bool failure_stands(struct registry *registry, struct model_entry *entry)
{
    static const struct file_identity unknown;
    struct file_identity now;

    (void)registry;
    if (entry->file)
        return true;
    /* It was given up before it could be looked at: its disk may hang, so nobody looks here. */
    if (entry->path && file_identity_equal(&entry->identity, &unknown))
        return false;
    /* A lack of memory, or a file that could not be read, may be over by now. */
    if (entry->code != CODE_LOAD_FAILED || !entry->path)
        return !entry->path && entry->code == CODE_LOAD_FAILED;
    return file_identity_get(entry->path, &now) == 0 && file_identity_equal(&now, &entry->identity);
}

static bool load_cancelled(const struct load_task *task)
{
    return atomic_load(&task->progress.cancel);
}

static int start_queued(struct registry *registry, struct model_entry *entry)
{
    registry_start_queued(registry, entry);
    if (entry->state == MODEL_FAILED)
        return -EIO;
    return entry->state == MODEL_READY ? 0 : 1;
}

int registry_want(struct registry *registry, struct model_entry *entry, enum load_priority priority,
                  bool retry)
{
    return registry_want_for(registry, entry, priority, MODEL_NOBODY, retry);
}

/* It is loaded for the most urgent of those who ask, and among equals for the last. */
static void note_asker(struct model_entry *entry, enum load_priority priority, uint32_t uid)
{
    bool draining = entry->state == MODEL_DRAINING;
    bool first =
        entry->state == MODEL_COLD || entry->state == MODEL_FAILED || (draining && !entry->again);

    if (first || (uid != MODEL_NOBODY && priority <= entry->priority))
        entry->asker = uid;
    if (draining) /* of the load that comes next */
        entry->priority = first ? priority : MIN(priority, entry->priority);
}

static int fail_stuck(struct registry *registry, struct model_entry *entry)
{
    char sentence[FAULT_TEXT_BYTES];

    snprintf(sentence, sizeof(sentence),
             "a load of %s was given up, and its last read has not returned: its disk hangs; try "
             "again once that answers",
             entry->path);
    entry->identity = (struct file_identity){0}; /* the file may be well */
    registry_fail(registry, entry, CODE_LOAD_FAILED, sentence);
    return -EIO;
}

int registry_want_for(struct registry *registry, struct model_entry *entry,
                      enum load_priority priority, uint32_t uid, bool retry)
{
    note_asker(entry, priority, uid);
    entry->dismissed = false;
    if (registry_file_is_spent(entry) && entry->state != MODEL_FAILED) {
        entry->code = CODE_NO_SUCH_MODEL;
        snprintf(entry->error, sizeof(entry->error),
                 "the file behind %s was unloaded: pass it again", entry->name);
        return -EIO;
    }
    switch (entry->state) {
    case MODEL_READY: return 0;
    case MODEL_QUEUED:
    case MODEL_LOADING:
    case MODEL_WARMING:
        entry->leaving = false;
        entry->again = entry->task && load_cancelled(entry->task);
        if (entry->task)
            registry_share_load(registry, entry, uid);
        if (priority < entry->priority) {
            entry->priority = priority;
            if (entry->task)
                registry_promote_load(registry, entry);
            else if (entry->state == MODEL_QUEUED)
                return start_queued(registry, entry); /* it may have others go now */
        }
        return 1;
    case MODEL_DRAINING: entry->again = true; return 1;
    case MODEL_FAILED:
        if (registry_file_is_spent(entry) || registry_load_is_stuck(registry, entry) ||
            (!retry && failure_stands(registry, entry)))
            return -EIO;
        break;
    case MODEL_COLD:
        if (registry_load_is_stuck(registry, entry))
            return fail_stuck(registry, entry);
        break;
    }
    entry->priority = priority;
    entry->error[0] = 0;
    entry->turn = ++registry->turns;
    registry_set_state(registry, entry, MODEL_QUEUED);
    registry_start_queued(registry, entry);
    if (entry->state == MODEL_FAILED)
        return -EIO;
    return entry->state == MODEL_READY ? 0 : 1;
}

void registry_go_cold(struct registry *registry, struct model_entry *entry)
{
    entry->again = entry->again && !registry->shutting_down && !entry->file;
    entry->wanted = entry->again && entry->wanted;
    entry->reserved_bytes = 0;
    registry_foreseen_left(registry, entry);
    /* Whoever waits for it reads in `again` that it comes back. */
    registry_set_state(registry, entry, MODEL_COLD);
    if (entry->again) {
        entry->again = false;
        entry->wanted = true;
        registry_want_for(registry, entry, entry->priority, entry->asker, false);
    } else if (entry->gone && registry_at_rest(entry)) {
        registry_delete(registry, entry);
        write_names(registry);
        registry->options.ops.changed(registry->options.ops.userdata, NULL);
    }
}

static void load_done(struct registry *registry, struct model_entry *entry, struct load_task *task)
{
    const struct model_info *info;

    entry->task = NULL;
    entry->identity = task->identity;
    entry->load_us = task->load_us;
    if (task->error == -ECANCELED) {
        registry_go_cold(registry, entry);
        return;
    }
    /* A load that was over before it could be cancelled. */
    entry->leaving = load_cancelled(task) && !entry->again;
    entry->again = false;
    if (task->error < 0) {
        registry_fail(registry, entry, task->error == -ENOMEM ? CODE_NO_MEMORY : CODE_LOAD_FAILED,
                      task->fault.text);
        return;
    }
    entry->model = TAKE_PTR(task->model);
    entry->loaded_bytes = atomic_load(&task->progress.total_bytes);
    entry->evicted = false;
    registry_foreseen_loaded(registry, entry);
    info = model_info(entry->model);
    entry->reserved_bytes = info->weight_bytes + info->other_bytes;
    registry_set_state(registry, entry, MODEL_WARMING);
    if (registry->options.ops.attach(registry->options.ops.userdata, entry) < 0)
        registry_warmed(registry, entry, "no memory for the model's lane");
}

void registry_warmed(struct registry *registry, struct model_entry *entry, const char *error)
{
    assert(entry->state == MODEL_WARMING);
    if (error) {
        char sentence[FAULT_TEXT_BYTES];
        snprintf(sentence, sizeof(sentence), "%s", error);
        registry_free_model(registry, entry);
        registry_fail(registry, entry, CODE_LOAD_FAILED, sentence);
        registry_start_waiting(registry);
        return;
    }
    entry->last_used_us = entry->idle_since_us = registry_now_us(registry);
    entry->shortened_us = 0;
    entry->unused = true;
    registry_set_state(registry, entry, MODEL_READY);
    registry_need_changed(registry, entry);
    if (entry->leaving || registry->shutting_down)
        registry_unload(registry, entry);
    else
        registry_start_waiting(registry); /* it may have to go at once */
    registry_foresee(registry);
}

void registry_detached(struct registry *registry, struct model_entry *entry)
{
    assert(entry->state == MODEL_DRAINING);
    metrics_add(registry->options.metrics, M_UNLOADS, 1);
    registry_free_model(registry, entry);
    registry_go_cold(registry, entry);
    registry_start_waiting(registry);
}

void registry_unload(struct registry *registry, struct model_entry *entry)
{
    entry->wanted = false;
    switch (entry->state) {
    case MODEL_QUEUED:
    case MODEL_LOADING:
        entry->again = false;
        if (entry->task)
            loader_cancel(registry->loader, entry->task); /* its `done` makes the model cold */
        else
            registry_go_cold(registry, entry);
        break;
    case MODEL_WARMING: entry->leaving = true; break;
    case MODEL_READY:
        entry->again = entry->leaving = false;
        entry->deadline_us = registry_now_us(registry) + registry->options.config->drain_timeout_us;
        registry->drain_due_us = MIN(registry->drain_due_us, entry->deadline_us);
        registry_set_state(registry, entry, MODEL_DRAINING);
        if (entry->in_use == 0)
            registry->options.ops.detach(registry->options.ops.userdata, entry);
        break;
    case MODEL_DRAINING: entry->again = false; break;
    case MODEL_FAILED: registry_go_cold(registry, entry); break;
    case MODEL_COLD: break;
    }
}

/* ---- events and time ---- */

static void push_message(void *userdata, struct load_task *task, uint32_t kind)
{
    struct registry *registry = userdata;
    struct message message = {.kind = kind, .subject = task};
    int r = queue_push(registry->queue, &message);

    assert(r == 0); /* room for every task's two messages */
    (void)r;
}

static void on_begun(void *userdata, struct load_task *task)
{
    push_message(userdata, task, MESSAGE_BEGUN);
}

static void on_done(void *userdata, struct load_task *task)
{
    push_message(userdata, task, MESSAGE_DONE);
}

static void take_done(struct registry *registry, struct load_task *task)
{
    struct model_entry *entry = task->subject;

    if (task->own)
        registry_file_work_done(registry, task);
    switch (task->kind) {
    case TASK_CALL:
        if (registry_is_save(registry, task))
            registry_saved(registry, task);
        else if (task == registry->scan)
            scan_done(registry, task);
        else
            catalog_free(task->result); /* of a look that was given up */
        break;
    case TASK_FREE:
        registry_model_freed(registry, task);
        registry_tell_memory(registry);
        registry_start_waiting(registry);
        break;
    case TASK_LOAD:
        registry_take_legacy_back(registry, task);
        registry_load_returned(registry, task);
        /* One given up after its time limit has no entry any more. */
        if (entry && entry->task == task)
            load_done(registry, entry, task);
        break;
    }
    if (task->own)
        registry_start_waiting(registry);
    registry_settle_legacy(registry);
    load_task_free(task);
}

void registry_dispatch(struct registry *registry)
{
    const struct message *messages;
    size_t n;

    queue_clear_wakeup(registry->queue);
    n = queue_take(registry->queue, &messages);
    for (size_t i = 0; i < n; i++) {
        struct load_task *task = messages[i].subject;
        struct model_entry *entry = task->subject;
        if (messages[i].kind == MESSAGE_DONE)
            take_done(registry, task);
        else if (task->kind == TASK_LOAD && entry && entry->task == task &&
                 entry->state == MODEL_QUEUED)
            registry_set_state(registry, entry, MODEL_LOADING);
    }
}

/* Ends a drain that has had its time, and finds the next to come. */
static void check_drain(struct registry *registry, struct model_entry *entry, uint64_t now)
{
    if (entry->in_use == 0)
        return; /* it is being let go of */
    if (now >= entry->deadline_us)
        registry->options.ops.expel(registry->options.ops.userdata, entry);
    else
        registry->drain_due_us = MIN(registry->drain_due_us, entry->deadline_us);
}

uint64_t registry_due_us(const struct registry *registry)
{
    return registry->drain_due_us;
}

void registry_tick(struct registry *registry)
{
    uint64_t now = registry_now_us(registry);
    struct model_entry *entry, *next;

    check_scan(registry, now);
    registry_files_tick(registry);
    registry->drain_due_us = UINT64_MAX;
    HASH_ITER (hh, registry->entries, entry, next) {
        if (entry->task) {
            registry_check_legacy(registry, entry->task, now);
            registry_check_load(registry, entry, now);
        } else if (entry->state == MODEL_DRAINING)
            check_drain(registry, entry, now);
        else if (entry->state == MODEL_READY && registry_kept_long_enough(registry, entry))
            registry_unload(registry, entry);
        else if (entry->state == MODEL_READY)
            registry_shrink_idle(registry, entry, now);
    }
    start_in_turn(registry);
    registry_settle_legacy(registry);
    registry_foresee(registry);
    registry_bring_back_eager(registry);
    registry_save_history(registry, false);
    registry_tell_memory(registry);
}

bool registry_shut_down(struct registry *registry)
{
    struct model_entry *entry, *next;
    bool quiet = true;

    if (!registry->shutting_down)
        registry_save_history(registry, true);
    registry->shutting_down = true;
    HASH_ITER (hh, registry->entries, entry, next) {
        if (entry->state == MODEL_COLD || entry->state == MODEL_FAILED)
            continue;
        registry_unload(registry, entry);
        quiet = false;
    }
    return quiet;
}

/* ---- life ---- */

int registry_new(const struct registry_options *options, struct registry **ret_registry,
                 struct fault *ret_fault)
{
    struct registry *registry = calloc(1, sizeof(*registry));
    struct catalog *catalog = NULL;
    int r;

    if (!registry)
        return fault_set(ret_fault, -ENOMEM, "no memory for the registry");
    registry->options = *options;
    registry->drain_due_us = UINT64_MAX;
    registry->loader_options = (struct loader_options){
        .kernels = options->kernels,
        .max_concurrent = options->config->loading.max_concurrent,
        .per_uid = options->config->loading.per_uid,
        .retries = options->config->loading.retries,
        .pulse = options->pulse,
        .metrics = options->metrics,
        .clock = options->clock,
        .begun = on_begun,
        .done = on_done,
        .userdata = registry,
    };
    r = catalog_read(options->config, &catalog);
    if (r == 0)
        r = catalog_apply(registry, catalog);
    if (r == 0)
        r = holds_new(&registry->holds);
    if (r == 0)
        r = registry_foresight_new(registry);
    if (r == 0)
        r = queue_new(REGISTRY_MESSAGES, &registry->queue);
    if (r < 0)
        fault_set(ret_fault, r, "cannot set up the registry: %s", strerror(-r));
    else
        r = loader_new(&registry->loader_options, &registry->loader, ret_fault);
    catalog_free(catalog);
    if (r < 0) {
        registry_free(registry);
        return r;
    }
    registry->scanned_us = registry_now_us(registry);
    *ret_registry = registry;
    return 0;
}

struct registry *registry_free(struct registry *registry)
{
    struct model_entry *entry, *next;

    if (!registry)
        return NULL;
    registry->shutting_down = true; /* nothing begins any more */
    registry->loader = loader_free(registry->loader);
    if (registry->loader)
        return NULL; /* a thread that is stuck in a read may still come to it */
    if (registry->queue) {
        const struct message *messages;
        size_t n = queue_take(registry->queue, &messages);
        for (size_t i = 0; i < n; i++) {
            struct load_task *task = messages[i].subject;
            if (messages[i].kind != MESSAGE_DONE)
                continue;
            if (registry_is_save(registry, task))
                registry_saved(registry, task);
            else if (task->kind == TASK_CALL)
                catalog_free(task->result);
            load_task_free(task);
        }
    }
    registry->queue = queue_free(registry->queue);
    HASH_ITER (hh, registry->entries, entry, next) {
        model_free(entry->model);
        registry_delete(registry, entry);
    }
    arena_legacy_free(registry->legacy);
    registry_files_free(registry);
    holds_free(registry->holds);
    registry_foresight_free(registry);
    free(registry);
    return NULL;
}

int registry_fd(const struct registry *registry)
{
    return queue_fd(registry->queue);
}

struct model_entry *registry_find(struct registry *registry, const char *name)
{
    struct model_entry *entry;

    HASH_FIND_STR(registry->entries, name, entry);
    return entry;
}

struct model_entry *registry_first(struct registry *registry)
{
    return registry->entries;
}

size_t registry_n_models(const struct registry *registry)
{
    return HASH_COUNT(registry->entries);
}

/* ---- names ---- */

int registry_list_names(const struct config *config, const char *names_path, FILE *out,
                        struct fault *ret_fault)
{
    struct names_file names;
    struct catalog *catalog;
    int r = catalog_read(config, &catalog);

    if (r < 0)
        return fault_set(ret_fault, r, "cannot list the models: %s", strerror(-r));
    names = names_begin(names_path);
    for (size_t i = 0; i < catalog->n_items; i++) {
        fprintf(out, "%s\n", catalog->items[i].name);
        if (names.out)
            fprintf(names.out, "%s\n", catalog->items[i].name);
    }
    names_end(&names, names_path);
    catalog_free(catalog);
    return 0;
}
