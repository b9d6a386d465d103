#include "daemon/model/predictor_internal.h"

#include <string.h>

#include "lib/cleanup.h"

/* How much of what was counted is left when the next request comes. */
#define KEEP_COST (1.0 - 1.0 / 400)
#define KEEP_MEAN 0.98

/* Its own ways must be cheaper than LRU by this factor before they are tried, and may be dearer by
 * nothing while they go on. */
#define BETTER_TO_BEGIN 0.95
#define BETTER_TO_STAY  1.0

/* Filling memory with the likeliest set is for habits without an order: predictions alone save less
 * than this there, the estimates are better than chance by so much (in log), and the set saves
 * enough of the misses. */
#define PREDICTIONS_SAVE  0.7
#define SKILL_TO_FILL     0.05
#define MISSES_WITH_FILLS 0.95

/* A trial has failed after so many misses in a row, or when it has cost more than LRU would have by
 * so many loads of mean length, or when after so many requests it has not earned this much. The
 * next one comes after a pause that doubles with each failure in a row; a trial that goes on for
 * long ends the row. */
#define TRIAL_MISSES       12u
#define TRIAL_LOSSES       3.0
#define TRIAL_REQUESTS     64u
#define TRIAL_EARNS        0.97 /* of LRU's waiting */
#define TRIAL_AS_DEAR      1.01 /* of it, with */
#define TRIAL_EARNS_MISSES 0.85 /* of its misses */
#define TRIAL_PROVEN       400u
#define PAUSE_FIRST        32u
#define PAUSE_DOUBLINGS    7u

static uint64_t load_us(const struct predictor *p, uint32_t model)
{
    return (uint64_t)((double)p->models[model].bytes / p->bytes_per_s * 1e6);
}

/* Makes room in a shadow; false: the newcomer does not come. */
static bool make_room(struct predictor *p, enum shadow_kind kind, uint32_t model, double wanted,
                      uint64_t now_us)
{
    struct shadow *shadow = &p->shadow[kind];
    const bool *target = kind == SHADOW_FILL ? shadow->target : NULL;
    enum residency_order order = kind == SHADOW_LRU ? RESIDENCY_LRU : RESIDENCY_BY_ESTIMATE;
    struct resident residents[MAX_MODELS];
    uint32_t number[MAX_MODELS];
    size_t evict[MAX_MODELS], n = 0, n_evict;
    struct newcomer newcomer = {.bytes = p->models[model].bytes, .wanted = wanted};
    enum residency_verdict verdict;

    for (uint32_t m = 0; m < p->n; m++) {
        if (!shadow->there[m] || m == model)
            continue;
        number[n] = m;
        residents[n++] = (struct resident){
            .bytes = p->models[m].bytes,
            .last_used_us = shadow->used_us[m],
            .wanted = wanted_with(p, target, m),
            .busy = shadow->ready_us[m] > now_us && wanted < RESIDENCY_ASKED_FOR,
        };
    }
    verdict = residency_decide(residents, n, order, p->budget_bytes, &newcomer, evict, &n_evict);
    if (verdict != RESIDENCY_FITS && verdict != RESIDENCY_EVICT)
        return false;
    for (size_t i = 0; i < n_evict; i++)
        shadow->there[number[evict[i]]] = false;
    shadow->there[model] = true;
    shadow->used_us[model] = now_us;
    return true;
}

/* Predicted loads that are not over make way for one that is waited for. */
static void drop_unfinished(struct predictor *p, struct shadow *shadow, uint64_t now_us)
{
    for (uint32_t m = 0; m < p->n; m++)
        if (shadow->there[m] && shadow->ready_us[m] > now_us)
            shadow->there[m] = false;
}

static void shadow_request(struct predictor *p, enum shadow_kind kind, uint32_t model,
                           uint64_t now_us)
{
    struct shadow *shadow = &p->shadow[kind];
    double wait = 0;

    shadow->cost *= KEEP_COST;
    if (shadow->there[model] && shadow->ready_us[model] > now_us) {
        wait = (double)(shadow->ready_us[model] - now_us) * 1e-6 * p->bytes_per_s;
        shadow->ready_us[model] = now_us;
    } else if (!shadow->there[model]) {
        drop_unfinished(p, shadow, now_us);
        wait = (double)p->models[model].bytes;
        make_room(p, kind, model, RESIDENCY_ASKED_FOR, now_us);
    }
    shadow->used_us[model] = now_us;
    shadow->cost += wait;
    shadow->misses = shadow->misses * KEEP_COST + (wait > 0);
    shadow->io_free_us = now_us + (uint64_t)(wait / p->bytes_per_s * 1e6);
    shadow->wait = wait;
}

static void shadow_predict(struct predictor *p, enum shadow_kind kind, uint64_t now_us)
{
    struct shadow *shadow = &p->shadow[kind];
    const bool *target = kind == SHADOW_FILL ? shadow->target : NULL;
    bool proposed[MAX_MODELS] = {false};
    uint32_t m;

    if (target)
        target_choose(p, shadow->there, shadow->target);
    while ((m = candidate(p, target, shadow->there, proposed)) != NOBODY) {
        proposed[m] = true;
        if (!make_room(p, kind, m, worth_with(p, target, m), now_us))
            continue;
        shadow->io_free_us += load_us(p, m);
        shadow->ready_us[m] = shadow->io_free_us;
    }
}

void shadows_request(struct predictor *p, uint32_t model, uint64_t now_us)
{
    for (enum shadow_kind kind = 0; kind < _SHADOW_MAX; kind++)
        shadow_request(p, kind, model, now_us);
    shadow_predict(p, SHADOW_PREDICT, now_us);
    shadow_predict(p, SHADOW_FILL, now_us);
}

void shadows_forget(struct predictor *p, uint32_t model)
{
    for (enum shadow_kind kind = 0; kind < _SHADOW_MAX; kind++)
        p->shadow[kind].there[model] = false;
}

void shadows_empty(struct predictor *p)
{
    for (enum shadow_kind kind = 0; kind < _SHADOW_MAX; kind++)
        for (uint32_t m = 0; m < p->n; m++)
            p->shadow[kind].there[m] = false;
}

/* ---- the mode ---- */

static enum predictor_mode best_mode(const struct predictor *p)
{
    double lru = p->shadow[SHADOW_LRU].cost, order = p->shadow[SHADOW_ORDER].cost;
    double predict = p->shadow[SHADOW_PREDICT].cost, fill = p->shadow[SHADOW_FILL].cost;
    double enough = p->mode == PREDICTOR_LRU ? BETTER_TO_BEGIN : BETTER_TO_STAY;

    if (p->skill > SKILL_TO_FILL && predict > order * PREDICTIONS_SAVE &&
        p->shadow[SHADOW_FILL].misses < p->shadow[SHADOW_ORDER].misses * MISSES_WITH_FILLS &&
        fill <= lru)
        return PREDICTOR_FILLS;
    if (predict < order && predict <= lru * enough)
        return PREDICTOR_PREDICTS;
    if (order <= lru * enough)
        return PREDICTOR_SILENT;
    return PREDICTOR_LRU;
}

/* Whether its ways have saved something against LRU: waiting, or at no more waiting many misses. */
static bool trial_earns(const struct trial *trial)
{
    return trial->real <= trial->lru * TRIAL_EARNS ||
           (trial->real <= trial->lru * TRIAL_AS_DEAR &&
            trial->real_misses <= trial->lru_misses * TRIAL_EARNS_MISSES);
}

/* Whether a trial has shown enough for now, and not that its ways are better than LRU. */
static bool trial_failed(const struct trial *trial)
{
    return trial->misses >= TRIAL_MISSES || trial->real > trial->lru + TRIAL_LOSSES * trial->mean ||
           (trial->requests >= TRIAL_REQUESTS && !trial_earns(trial));
}

/* Accounts for a request; true: the trial that went on is over for now. */
static bool trial_go_on(struct predictor *p, uint32_t model, bool ready)
{
    struct trial *trial = &p->trial;
    double load = (double)p->models[model].bytes;

    trial->mean = trial->mean > 0 ? trial->mean * KEEP_MEAN + load * (1 - KEEP_MEAN) : load;
    trial->real = trial->real * KEEP_COST + (ready ? 0 : load);
    trial->lru = trial->lru * KEEP_COST + p->shadow[SHADOW_LRU].wait;
    trial->real_misses = trial->real_misses * KEEP_COST + !ready;
    trial->lru_misses = trial->lru_misses * KEEP_COST + (p->shadow[SHADOW_LRU].wait > 0);
    trial->requests++;
    trial->misses = ready ? 0 : trial->misses + 1;
    if (p->mode == PREDICTOR_LRU)
        return false;
    if (trial_failed(trial)) {
        trial->failures = MIN(trial->failures + 1, PAUSE_DOUBLINGS);
        trial->pause = PAUSE_FIRST << (trial->failures - 1);
        return true;
    }
    if (trial->requests >= TRIAL_PROVEN)
        trial->failures = 0;
    return false;
}

void mode_choose(struct predictor *p, uint32_t model, bool ready)
{
    struct trial *trial = &p->trial;
    enum predictor_mode best;

    if (trial_go_on(p, model, ready) && !p->dry_run) {
        p->mode = PREDICTOR_LRU;
        return;
    }
    if (p->mode == PREDICTOR_LRU && trial->pause > 0 && !p->dry_run) {
        trial->pause--;
        return;
    }
    best = best_mode(p);
    if (p->mode == PREDICTOR_LRU && best != PREDICTOR_LRU) {
        trial->real = trial->lru = trial->real_misses = trial->lru_misses = 0;
        trial->requests = trial->misses = 0;
    }
    p->mode = best;
}
