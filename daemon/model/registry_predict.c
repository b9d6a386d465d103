/* Prediction for the registry: what requests ask for is told to the predictor and remembered over
 * restarts, and what it foretells is loaded while nothing else loads. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/log.h"
#include "daemon/model/history.h"
#include "daemon/model/predictor.h"
#include "daemon/model/registry_internal.h"
#include "lib/cleanup.h"

/* Requests for a model that come closer together than this count as one. */
#define ASKED_AGAIN_US PREDICTOR_SAME_US

/* The history is written so often at most, but at the end. */
#define SAVE_EVERY_US 60000000u

/* How much of the measured rate of loads is left when the next one is measured. */
#define KEEP_RATE 0.7

struct foresight {
    struct predictor *predictor;
    struct history *history;
    uint64_t epoch_us; /* the predictor's time is the clock's and this: its past is longer */
    double bytes_per_s;
    bool due;     /* a request has come, and what it foretells has not been looked through */
    bool changed; /* since the history was written */
    uint64_t saved_us;
    struct load_task *save; /* under way */
};

static enum config_prediction setting(const struct registry *registry)
{
    return registry->options.config->loading.prediction;
}

static uint64_t predictor_now_us(const struct registry *registry)
{
    return registry_now_us(registry) + registry->foresight->epoch_us;
}

/* ---- life ---- */

static void recall(struct registry *registry)
{
    struct foresight *f = registry->foresight;
    const char *path = registry->options.history_path;
    struct fault fault = {0};
    int r;

    if (!path || setting(registry) == PREDICTION_OFF)
        return;
    r = history_load(path, &f->history, &fault);
    if (r < 0) {
        if (r != -ENOENT)
            log_warning("the history of requests in %s is discarded: %s", path, fault.text);
        return;
    }
    /* As long ago as it takes for nothing of it to be of the present. */
    history_tell(f->history, f->predictor, predictor_now_us(registry) - PREDICTOR_WINDOW_US);
    predictor_restart(f->predictor);
}

int registry_foresight_new(struct registry *registry)
{
    struct foresight *f = registry->foresight = calloc(1, sizeof(*f));
    int r;

    if (!f)
        return -ENOMEM;
    f->epoch_us = HISTORY_LONGEST_US + PREDICTOR_WINDOW_US;
    f->saved_us = registry_now_us(registry);
    r = predictor_new(&f->predictor);
    if (r < 0)
        return r;
    predictor_set_budget(f->predictor, registry->options.budget_bytes);
    predictor_set_dry_run(f->predictor, true); /* the past is no trial */
    recall(registry);
    predictor_set_dry_run(f->predictor, setting(registry) != PREDICTION_ON);
    return f->history ? 0 : history_new(&f->history);
}

void registry_foresight_free(struct registry *registry)
{
    struct foresight *f = registry->foresight;

    if (!f)
        return;
    predictor_free(f->predictor);
    history_free(f->history);
    free(f);
    registry->foresight = NULL;
}

/* ---- requests ---- */

static bool is_predictable(const struct model_entry *entry)
{
    return !entry->file && !entry->gone &&
           !(entry->config && entry->config->preload == PRELOAD_NONE);
}

/* The entry's number for the predictor, with what it has to know of it; -ENOMEM. */
static int number_of(struct registry *registry, const struct model_entry *entry)
{
    struct predictor *predictor = registry->foresight->predictor;
    int number = predictor_model(predictor, entry->name);

    if (number < 0)
        return number;
    predictor_set_bytes(predictor, (uint32_t)number, registry_need_bytes(entry));
    predictor_set_predictable(predictor, (uint32_t)number, is_predictable(entry));
    return number;
}

static void settle_prediction(struct registry *registry, struct model_entry *entry, uint64_t now)
{
    if (entry->predicted_us == 0)
        return;
    if (now - entry->predicted_us <= PREDICTOR_WINDOW_US)
        metrics_add(registry->options.metrics, M_PREDICTIONS_USED, 1);
    entry->predicted_us = 0;
}

void registry_asked(struct registry *registry, struct model_entry *entry)
{
    struct foresight *f = registry->foresight;
    struct metrics *metrics = registry->options.metrics;
    uint64_t now = registry_now_us(registry), before = entry->asked_us;
    bool ready = entry->state == MODEL_READY;
    int number;

    entry->asked_us = now;
    if (before != 0 && now - before < ASKED_AGAIN_US)
        return;
    metrics_add(metrics, M_PRELOAD_ASKED, 1);
    metrics_add(metrics, ready ? M_PRELOAD_HITS : M_PRELOAD_MISSES, 1);
    settle_prediction(registry, entry, now);
    if (entry->file)
        return; /* its name means nothing to the next */
    number = number_of(registry, entry);
    if (number >= 0)
        predictor_request(f->predictor, (uint32_t)number, ready, predictor_now_us(registry));
    f->due = setting(registry) != PREDICTION_OFF;
    metrics_set(metrics, M_PREDICTION_MODE,
                setting(registry) == PREDICTION_OFF ? PREDICTOR_LRU
                                                    : (uint64_t)predictor_mode(f->predictor));
    if (setting(registry) == PREDICTION_OFF)
        return;
    history_add(f->history, entry->name, registry_need_bytes(entry), ready, now);
    f->changed = true;
}

/* ---- what residency asks ---- */

double registry_wanted(const struct registry *registry, const struct model_entry *entry)
{
    const struct predictor *predictor = registry->foresight->predictor;
    int number = predictor_find(predictor, entry->name);

    return number < 0 ? 0 : predictor_wanted(predictor, (uint32_t)number);
}

double registry_worth(const struct registry *registry, const struct model_entry *entry)
{
    const struct predictor *predictor = registry->foresight->predictor;
    int number = predictor_find(predictor, entry->name);

    return number < 0 ? 0 : predictor_worth(predictor, (uint32_t)number);
}

enum residency_order registry_order(const struct registry *registry)
{
    return setting(registry) == PREDICTION_ON ? predictor_order(registry->foresight->predictor)
                                              : RESIDENCY_LRU;
}

bool registry_is_prediction(const struct model_entry *entry)
{
    return entry->priority == LOAD_PREDICTED && entry->in_use == 0 && entry->predicted_us != 0;
}

/* ---- loading ahead ---- */

static void count_prediction(struct registry *registry, struct model_entry *entry, bool dry_run)
{
    const struct registry_ops *ops = &registry->options.ops;

    entry->predicted_us = registry_now_us(registry);
    metrics_add(registry->options.metrics, M_PREDICTIONS, 1);
    if (ops->predicted)
        ops->predicted(ops->userdata, entry, dry_run);
}

/* Begins to load it, where it is worth what has to go; false: it is not, or cannot be. */
static bool load_ahead(struct registry *registry, struct model_entry *entry)
{
    enum load_priority before = entry->priority;
    enum residency_verdict verdict;

    entry->priority = LOAD_PREDICTED;
    verdict = registry_room_for(registry, entry);
    entry->priority = before;
    if (verdict != RESIDENCY_FITS && verdict != RESIDENCY_EVICT)
        return false;
    count_prediction(registry, entry, false);
    registry_want(registry, entry, LOAD_PREDICTED, false);
    return true;
}

/* Notes what is loaded; false: something loads or leaves already, so this is no time. */
static bool look_at_models(struct registry *registry, bool *ret_loaded)
{
    for (struct model_entry *e = registry->entries; e; e = e->hh.next) {
        int number;
        if (e->state == MODEL_QUEUED || e->state == MODEL_LOADING || e->state == MODEL_WARMING ||
            e->state == MODEL_DRAINING)
            return false;
        number = predictor_find(registry->foresight->predictor, e->name);
        if (number >= 0)
            ret_loaded[number] = e->state != MODEL_COLD;
    }
    return registry->freeing_bytes == 0;
}

void registry_foresee(struct registry *registry)
{
    struct foresight *f = registry->foresight;
    bool loaded[PREDICTOR_MAX_MODELS] = {false};
    bool dry_run = setting(registry) == PREDICTION_DRY_RUN;
    int number;

    if (!f->due || registry->shutting_down || !look_at_models(registry, loaded))
        return;
    while ((number = predictor_next(f->predictor, loaded, predictor_now_us(registry))) >= 0) {
        struct model_entry *entry =
            registry_find(registry, predictor_name(f->predictor, (uint32_t)number));
        if (!entry || entry->state != MODEL_COLD || !is_predictable(entry))
            continue;
        if (dry_run)
            count_prediction(registry, entry, true);
        else if (load_ahead(registry, entry))
            return;
    }
    f->due = false;
}

void registry_bring_back_eager(struct registry *registry)
{
    bool loaded[PREDICTOR_MAX_MODELS];

    if (registry->shutting_down)
        return;
    for (struct model_entry *e = registry->entries; e; e = e->hh.next) {
        if (e->state != MODEL_COLD || !e->evicted || e->gone || !e->config ||
            e->config->preload != PRELOAD_EAGER)
            continue;
        if (!look_at_models(registry, loaded))
            return;
        e->priority = LOAD_PRELOAD;
        if (registry_room_for(registry, e) != RESIDENCY_FITS)
            continue;
        e->wanted = true;
        registry_want(registry, e, LOAD_PRELOAD, false);
        return; /* one at a time */
    }
}

void registry_foreseen_loaded(struct registry *registry, const struct model_entry *entry)
{
    struct foresight *f = registry->foresight;
    double rate = (double)entry->loaded_bytes * 1e6 / (double)MAX(entry->load_us, UINT64_C(1));

    if (entry->loaded_bytes == 0)
        return;
    f->bytes_per_s =
        f->bytes_per_s > 0 ? f->bytes_per_s * KEEP_RATE + rate * (1 - KEEP_RATE) : rate;
    predictor_set_rate(f->predictor, f->bytes_per_s);
}

void registry_foreseen_left(struct registry *registry, struct model_entry *entry)
{
    struct predictor *predictor = registry->foresight->predictor;
    int number = predictor_find(predictor, entry->name);

    if (number >= 0 && !entry->evicted)
        predictor_left(predictor, (uint32_t)number);
    if (entry->predicted_us == 0 || setting(registry) == PREDICTION_DRY_RUN)
        return;
    metrics_add(registry->options.metrics, M_PREDICTIONS_WASTED, 1);
    entry->predicted_us = 0;
}

/* ---- the history's file ---- */

struct save {
    char *path;
    uint8_t *bytes;
    size_t n;
};

static struct save *save_free(struct save *save)
{
    if (save) {
        free(save->path);
        free(save->bytes);
    }
    free(save);
    return NULL;
}

static void save_call(struct load_task *task)
{
    const struct save *save = task->result;

    task->error = history_save(save->path, save->bytes, save->n);
}

void registry_save_history(struct registry *registry, bool now)
{
    struct foresight *f = registry->foresight;
    struct save *save;

    if (!registry->options.history_path || !f->changed || f->save ||
        (!now && registry_now_us(registry) - f->saved_us < SAVE_EVERY_US))
        return;
    save = calloc(1, sizeof(*save));
    if (save)
        save->path = strdup(registry->options.history_path);
    f->save = save && save->path && history_write(f->history, &save->bytes, &save->n) == 0
                  ? load_task_new(TASK_CALL, NULL)
                  : NULL;
    if (!f->save) {
        save_free(save);
        return; /* without memory; the next time will do */
    }
    f->changed = false;
    f->saved_us = registry_now_us(registry);
    f->save->call = save_call;
    f->save->result = save;
    if (registry->loader) {
        loader_submit(registry->loader, f->save);
    } else { /* the daemon is about to end */
        struct load_task *task = f->save;

        save_call(task);
        registry_saved(registry, task);
        load_task_free(task);
    }
}

bool registry_is_save(const struct registry *registry, const struct load_task *task)
{
    return task == registry->foresight->save;
}

void registry_saved(struct registry *registry, struct load_task *task)
{
    struct foresight *f = registry->foresight;

    if (task->error < 0) {
        log_warning("the history of requests cannot be written to %s: %s",
                    registry->options.history_path, strerror(-task->error));
        f->changed = true;
    }
    save_free(task->result);
    task->result = NULL;
    f->save = NULL;
    /* What was asked for meanwhile; there is no next time. */
    if (registry->shutting_down && task->error == 0)
        registry_save_history(registry, true);
}
