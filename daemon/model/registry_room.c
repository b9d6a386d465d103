/* Room in memory for the registry's models: who comes in, and who has to go for that. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/model/predictor.h"
#include "daemon/model/registry_internal.h"
#include "lib/cleanup.h"

/* A model that waits so long for room no longer waits for others to be idle: the one that gives way
 * first drains (its requests finish, new ones wait), so that none keeps another out for ever. */
#define ROOM_PATIENCE_US 1000000u

/* Room in memory that a load asks for beyond its file's size, in percent: padding of packed rows
 * and the tokenizer. The true size is counted once it is known. */
#define LOAD_EXTRA_PERCENT 10u

/* A model that nobody has used for so long gives its activations back where they are more than so
 * much; what it keeps, its next steps find there. */
#define REST_US    1000000u
#define REST_BYTES ((uint64_t)16 << 20)

struct room {
    struct resident *residents;
    struct model_entry **entries; /* of the residents; NULL: memory that is nobody's any more */
    size_t *evict;                /* indexes */
    size_t n, n_evict;
};

static void room_done(struct room *room)
{
    free(room->residents);
    free(room->entries);
    free(room->evict);
}

uint64_t registry_need_bytes(const struct model_entry *entry)
{
    struct model_memory memory = {0};

    if (entry->model)
        model_memory(entry->model, &memory);
    if (entry->reserved_bytes > 0)
        return entry->reserved_bytes + memory.scratch_bytes;
    return entry->file ? registry_file_need_bytes(entry)
                       : entry->file_bytes / 100 * (100 + LOAD_EXTRA_PERCENT);
}

uint64_t registry_memory_bytes(const struct model_entry *entry)
{
    struct model_memory memory;

    if (!entry->model)
        return entry->task ? atomic_load(&entry->task->progress.done_bytes) : 0;
    model_memory(entry->model, &memory);
    return entry->reserved_bytes + memory.scratch_bytes + memory.kv_bytes;
}

uint64_t registry_loaded_bytes(const struct registry *registry)
{
    uint64_t bytes = registry->freeing_bytes + registry->stuck_bytes;

    bytes += registry->legacy ? registry->legacy->bytes : 0;
    for (const struct model_entry *e = registry->entries; e; e = e->hh.next)
        bytes += e->reserved_bytes > 0 ? registry_need_bytes(e) : 0;
    return bytes;
}

void registry_tell_memory(const struct registry *registry)
{
    metrics_set(registry->options.metrics, M_MODEL_BYTES, registry_loaded_bytes(registry));
}

void registry_shrink_idle(struct registry *registry, struct model_entry *entry, uint64_t now)
{
    const struct registry_ops *ops = &registry->options.ops;
    struct model_memory memory;

    if (entry->shrunk || entry->in_use > 0 || !ops->shrink || now - entry->idle_since_us < REST_US)
        return;
    model_memory(entry->model, &memory);
    if (memory.activation_bytes <= REST_BYTES)
        return;
    entry->shrunk = true;
    ops->shrink(ops->userdata, entry, REST_BYTES);
}

/* It can give its activations back at once: nobody has to go for them. What it takes then. */
static bool is_at_rest(const struct model_entry *entry)
{
    return entry->state == MODEL_READY && entry->in_use == 0;
}

static uint64_t rest_bytes(const struct model_entry *entry)
{
    struct model_memory memory = {0};

    if (entry->model)
        model_memory(entry->model, &memory);
    /* The engine thread may be at it between the two. */
    return entry->reserved_bytes + memory.scratch_bytes -
           MIN(memory.activation_bytes, memory.scratch_bytes);
}

/* Somebody comes who fits when it has been given back. */
static void take_spare(struct registry *registry)
{
    const struct registry_ops *ops = &registry->options.ops;

    if (!ops->shrink || registry_loaded_bytes(registry) <= registry->options.budget_bytes)
        return;
    for (struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (is_at_rest(e) && rest_bytes(e) < registry_need_bytes(e))
            ops->shrink(ops->userdata, e, 0);
}

void registry_shrunk(struct registry *registry)
{
    registry_tell_memory(registry);
    registry_start_waiting(registry);
}

/* Somebody had it loaded a moment ago, and has not come to use it yet; or it is a user's file, of
 * which nothing is foretold, and was used a moment ago. */
static bool is_awaited(const struct registry *registry, const struct model_entry *entry)
{
    uint64_t now = registry_now_us(registry);

    if (entry->file)
        return now - entry->last_used_us < PREDICTOR_WINDOW_US;
    return entry->state == MODEL_READY && entry->unused && entry->priority < LOAD_PREDICTED &&
           now - entry->state_since_us < PREDICTOR_WINDOW_US;
}

/* A request waits for it. */
static bool is_asked_for(const struct model_entry *newcomer)
{
    return newcomer->priority == LOAD_INTERACTIVE;
}

static bool is_impatient(const struct registry *registry, const struct model_entry *newcomer)
{
    return is_asked_for(newcomer) &&
           registry_now_us(registry) - newcomer->state_since_us >= ROOM_PATIENCE_US;
}

/* Whether a resident stays for now, whatever it is worth. */
static bool is_busy(const struct registry *registry, const struct model_entry *entry,
                    const struct model_entry *newcomer)
{
    if (registry_is_prediction(entry) && entry->task)
        return newcomer->priority == LOAD_PREDICTED; /* a load that others go before */
    if (entry->state != MODEL_READY || (entry->in_use > 0 && !is_impatient(registry, newcomer)) ||
        registry_is_needed(registry, entry))
        return true;
    if (newcomer->priority == LOAD_PREDICTED)
        return is_awaited(registry, entry);
    return !is_asked_for(newcomer) && registry_used_by_others(registry, entry, newcomer->asker);
}

static bool is_leaving(const struct model_entry *entry)
{
    return entry->state == MODEL_DRAINING ||
           (entry->task && atomic_load(&entry->task->progress.cancel) && !entry->again);
}

/* What is loaded, as residency sees it. The last of the list are memory on its way back and what
 * loads keep that hang: for that nobody is waited for whom another model's going can spare it. What
 * one that went has left counts with the newcomer where that takes it over. */
static int room_look(const struct registry *registry, const struct model_entry *newcomer,
                     struct room *ret_room)
{
    size_t n = HASH_COUNT(registry->entries) + 2;
    uint64_t leaving = registry->freeing_bytes;
    struct room room = {.residents = calloc(n, sizeof(*room.residents)),
                        .entries = calloc(n, sizeof(*room.entries)),
                        .evict = calloc(n, sizeof(*room.evict))};

    if (!room.residents || !room.entries || !room.evict) {
        room_done(&room);
        return -ENOMEM;
    }
    for (struct model_entry *e = registry->entries; e; e = e->hh.next) {
        if (e == newcomer || e->reserved_bytes == 0)
            continue;
        uint64_t rest = rest_bytes(e), bytes = is_at_rest(e) ? rest : registry_need_bytes(e);

        bytes = MAX(bytes, rest); /* the engine thread may be at it between the two */
        room.entries[room.n] = e;
        room.residents[room.n++] = (struct resident){
            .bytes = bytes,
            .passing_bytes = is_impatient(registry, newcomer) ? 0 : bytes - rest,
            .last_used_us = e->last_used_us,
            .wanted = is_awaited(registry, e) ? PREDICTOR_SURELY : registry_wanted(registry, e),
            .fixed = e->pinned || e->holds > 0,
            .busy = is_busy(registry, e, newcomer),
            .leaving = is_leaving(e),
        };
    }
    if (registry->legacy && !registry_would_inherit(registry, newcomer))
        leaving += registry->legacy->bytes;
    room.residents[room.n++] = (struct resident){.bytes = leaving, .leaving = true};
    room.residents[room.n++] = (struct resident){.bytes = registry->stuck_bytes, .busy = true};
    *ret_room = room;
    return 0;
}

static enum residency_verdict room_decide(const struct registry *registry,
                                          const struct model_entry *entry, struct room *room)
{
    struct newcomer newcomer = {
        .bytes = registry_need_bytes(entry),
        .wanted = entry->priority == LOAD_PREDICTED ? registry_worth(registry, entry)
                                                    : RESIDENCY_ASKED_FOR,
    };

    return residency_decide(room->residents, room->n, registry_order(registry),
                            registry->options.budget_bytes, &newcomer, room->evict, &room->n_evict);
}

enum residency_verdict registry_room_for(const struct registry *registry,
                                         const struct model_entry *entry)
{
    enum residency_verdict verdict;
    struct room room;

    if (room_look(registry, entry, &room) < 0)
        return RESIDENCY_IMPOSSIBLE;
    verdict = room_decide(registry, entry, &room);
    room_done(&room);
    return verdict;
}

static void evict(struct registry *registry, struct model_entry *victim,
                  const struct model_entry *newcomer)
{
    const struct registry_ops *ops = &registry->options.ops;
    struct eviction eviction = {
        .victim = victim,
        .newcomer = newcomer,
        .why = registry_is_prediction(victim) ? "predicted, and not asked for yet"
               : registry_order(registry) == RESIDENCY_LRU
                   ? "least recently used"
                   : "least likely to be wanted soon, per byte",
        .bytes = registry_need_bytes(victim),
        .reload_us = victim->load_us,
    };

    victim->evicted = true;
    victim->evictions++;
    snprintf(victim->last_eviction.by, sizeof(victim->last_eviction.by), "%s",
             newcomer->file ? "file" : newcomer->name); /* a user's file is nobody else's news */
    victim->last_eviction.why = eviction.why;
    victim->last_eviction.bytes = eviction.bytes;
    victim->last_eviction.reload_us = eviction.reload_us;
    metrics_add(registry->options.metrics, M_EVICTIONS, 1);
    if (ops->evicted)
        ops->evicted(ops->userdata, &eviction);
    registry_unload(registry, victim);
}

static void refuse(struct registry *registry, struct model_entry *entry)
{
    uint64_t budget = registry->options.budget_bytes, need = registry_need_bytes(entry);
    char sentence[FAULT_TEXT_BYTES];

    if (need > budget)
        snprintf(sentence, sizeof(sentence),
                 "%s needs %" PRIu64 " MiB, more than the %" PRIu64
                 " MiB that memory_budget leaves for all models; raise it, or take a smaller model",
                 entry->name, need >> 20, budget >> 20);
    else
        snprintf(sentence, sizeof(sentence),
                 "%s needs %" PRIu64 " MiB, and of the %" PRIu64
                 " MiB that memory_budget leaves for models too much is pinned or held (%" PRIu64
                 " MiB are loaded); let go of one or raise the budget",
                 entry->name, need >> 20, budget >> 20, registry_loaded_bytes(registry) >> 20);
    registry_fail(registry, entry, CODE_NO_MEMORY, sentence);
}

void registry_start_queued(struct registry *registry, struct model_entry *entry)
{
    enum residency_verdict verdict;
    struct room room;

    if (!registry_needs_are_ready(registry, entry))
        return; /* their news bring it back here */
    if (entry->file && !registry_file_may_begin(registry, entry)) {
        registry->room_wanted = true; /* the end of what its user's thread does brings it back */
        return;
    }
    if (room_look(registry, entry, &room) < 0) {
        registry_fail(registry, entry, CODE_NO_MEMORY, "no memory for the load");
        return;
    }
    verdict = room_decide(registry, entry, &room);
    switch (verdict) {
    case RESIDENCY_FITS:
        entry->reserved_bytes = registry_need_bytes(entry);
        take_spare(registry);
        registry_start_load(registry, entry);
        break;
    case RESIDENCY_EVICT:
        registry->room_wanted = true;
        for (size_t i = 0; i < room.n_evict; i++)
            evict(registry, room.entries[room.evict[i]], entry);
        break;
    case RESIDENCY_WAIT: registry->room_wanted = true; break;
    case RESIDENCY_WORTHLESS: registry_go_cold(registry, entry); break; /* a prediction alone */
    case RESIDENCY_IMPOSSIBLE:
        if (registry_is_prediction(entry))
            registry_go_cold(registry, entry);
        else
            refuse(registry, entry);
        break;
    }
    room_done(&room);
}
