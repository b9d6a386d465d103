#include "daemon/model/predictor_internal.h"

#include <string.h>

#include "lib/cleanup.h"

/* How much of a shadow's cost is left when the next request comes. */
#define KEEP_COST (1.0 - 1.0 / 200)

/* Its own ways must be cheaper than LRU by this factor before they are tried, and may be dearer by
 * nothing while they go on. */
#define BETTER_TO_BEGIN 0.95
#define BETTER_TO_STAY  1.0

#define BETTER_TO_FILL 0.9
#define PATTERN        0.7

/* A trial that really costs more than LRU would have by so many loads of mean length, has failed;
 * the next one comes after a pause that doubles with each failure. */
#define TRIAL_LOSSES    3.0
#define PAUSE_FIRST     32u
#define PAUSE_DOUBLINGS 10u

double load_seconds(const struct predictor *p, uint32_t model)
{
    return (double)p->models[model].bytes / p->bytes_per_s;
}

/* Makes room in a shadow; false: the newcomer does not come. */
static bool make_room(struct predictor *p, struct shadow *shadow, enum residency_order order,
                      uint32_t model, double wanted, uint64_t now_us)
{
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
            .wanted = p->wanted[m],
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
    enum residency_order order = kind == SHADOW_LRU ? RESIDENCY_LRU : RESIDENCY_BY_ESTIMATE;
    double wait_s = 0;

    shadow->cost_s *= KEEP_COST;
    if (shadow->there[model] && shadow->ready_us[model] > now_us) {
        wait_s = (double)(shadow->ready_us[model] - now_us) / 1e6;
        shadow->ready_us[model] = now_us;
    } else if (!shadow->there[model]) {
        drop_unfinished(p, shadow, now_us);
        wait_s = load_seconds(p, model);
        make_room(p, shadow, order, model, RESIDENCY_ASKED_FOR, now_us);
    }
    shadow->used_us[model] = now_us;
    shadow->cost_s += wait_s;
    shadow->io_free_us = now_us + (uint64_t)(wait_s * 1e6);
    if (kind == SHADOW_LRU) /* what LRU waits for in this request */
        p->trial.lru_s += wait_s;
}

static void shadow_predict(struct predictor *p, enum shadow_kind kind, uint64_t now_us)
{
    struct shadow *shadow = &p->shadow[kind];
    bool proposed[MAX_MODELS] = {false};
    uint32_t m;

    while ((m = candidate(p, kind == SHADOW_FILL, shadow->there, proposed)) != NOBODY) {
        proposed[m] = true;
        if (!make_room(p, shadow, RESIDENCY_BY_ESTIMATE, m, predictor_worth(p, m), now_us))
            continue;
        shadow->io_free_us += (uint64_t)(load_seconds(p, m) * 1e6);
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

/* ---- the mode ---- */

static enum predictor_mode best_mode(const struct predictor *p)
{
    double lru_s = p->shadow[SHADOW_LRU].cost_s, order_s = p->shadow[SHADOW_ORDER].cost_s;
    double predict_s = p->shadow[SHADOW_PREDICT].cost_s, fill_s = p->shadow[SHADOW_FILL].cost_s;
    double enough = p->mode == PREDICTOR_LRU ? BETTER_TO_BEGIN : BETTER_TO_STAY;

    if (predict_s > order_s * PATTERN && fill_s < MIN(order_s, predict_s) * BETTER_TO_FILL &&
        fill_s <= lru_s * enough)
        return PREDICTOR_FILLS;
    if (predict_s < order_s && predict_s <= lru_s * enough)
        return PREDICTOR_PREDICTS;
    if (order_s <= lru_s * enough)
        return PREDICTOR_SILENT;
    return PREDICTOR_LRU;
}

static void trial_begin(struct predictor *p)
{
    p->trial.real_s = p->trial.lru_s = 0;
    p->trial.requests = 0;
}

void mode_choose(struct predictor *p, uint32_t model, bool ready)
{
    struct trial *trial = &p->trial;
    enum predictor_mode best;

    trial->mean_s = trial->mean_s * 0.98 + load_seconds(p, model) * 0.02;
    trial->real_s += ready ? 0 : load_seconds(p, model);
    trial->requests++;
    if (p->mode == PREDICTOR_LRU && trial->pause > 0) {
        trial->pause--;
        return;
    }
    if (p->mode != PREDICTOR_LRU && trial->real_s > trial->lru_s + TRIAL_LOSSES * trial->mean_s) {
        trial->failures = MIN(trial->failures + 1, PAUSE_DOUBLINGS);
        trial->pause = PAUSE_FIRST << trial->failures;
        p->mode = PREDICTOR_LRU;
        return;
    }
    best = best_mode(p);
    if (p->mode == PREDICTOR_LRU && best != PREDICTOR_LRU)
        trial_begin(p);
    p->mode = best;
}
