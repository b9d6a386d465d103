#include "bench/simulation.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

#define READ_BYTES_PER_S 1e9
#define BUDGET_MEANS     5u

#define NOBODY UINT32_MAX

struct simulation {
    const struct trace *trace;
    enum policy policy;
    struct predictor *predictor; /* hearth, informed */
    uint64_t budget_bytes, now_us;
    bool there[PREDICTOR_MAX_MODELS];       /* loaded, or on its way */
    uint64_t used_us[PREDICTOR_MAX_MODELS]; /* when last used or brought */
    bool unused[PREDICTOR_MAX_MODELS];      /* predicted, and not used since */
    uint64_t predicted_us[PREDICTOR_MAX_MODELS];
    uint64_t evicted[PREDICTOR_MAX_MODELS]; /* when, in order: 0 never */
    uint64_t n_evicted;
    uint32_t loading; /* the predicted load under way, or NOBODY */
    uint64_t left_us; /* that it still takes */
    size_t *next;     /* clairvoyant: of each request, the next for the same model */
    size_t next_of[PREDICTOR_MAX_MODELS]; /* by model: its next request */
    size_t at;                            /* the request that was served last */
    struct outcome outcome;
};

const char *policy_name(enum policy policy)
{
    static const char *const names[] = {
        [POLICY_NONE] = "none",
        [POLICY_LRU] = "lru",
        [POLICY_HEARTH] = "hearth",
        [POLICY_INFORMED] = "informed",
        [POLICY_CLAIRVOYANT] = "clairvoyant",
    };
    return names[policy];
}

uint64_t simulation_budget(const struct trace *trace)
{
    uint64_t sum = 0;

    for (uint32_t m = 0; m < trace->n_models; m++)
        sum += trace->bytes[m];
    return sum / trace->n_models * BUDGET_MEANS;
}

static uint64_t load_us(const struct simulation *s, uint32_t model)
{
    return (uint64_t)((double)s->trace->bytes[model] / READ_BYTES_PER_S * 1e6);
}

/* ---- memory ---- */

static double wanted(const struct simulation *s, uint32_t model)
{
    if (s->predictor)
        return predictor_wanted(s->predictor, model);
    if (s->policy == POLICY_CLAIRVOYANT && s->next_of[model] < s->trace->n_requests)
        return 1e6 / (double)(s->trace->requests[s->next_of[model]].at_us - s->now_us + 1);
    return 0;
}

static enum residency_order order_of(const struct simulation *s)
{
    if (s->predictor)
        return predictor_order(s->predictor);
    return s->policy == POLICY_CLAIRVOYANT ? RESIDENCY_BY_ESTIMATE : RESIDENCY_LRU;
}

static void evict(struct simulation *s, uint32_t model)
{
    s->there[model] = false;
    s->evicted[model] = ++s->n_evicted;
    s->outcome.wasted += s->unused[model];
    s->unused[model] = false;
    if (s->loading == model)
        s->loading = NOBODY;
}

static bool make_room(struct simulation *s, uint32_t model, double worth)
{
    struct resident residents[PREDICTOR_MAX_MODELS];
    uint32_t number[PREDICTOR_MAX_MODELS];
    size_t victims[PREDICTOR_MAX_MODELS], n = 0, n_victims;
    struct newcomer newcomer = {.bytes = s->trace->bytes[model], .wanted = worth};
    enum residency_verdict verdict;

    for (uint32_t m = 0; m < s->trace->n_models; m++) {
        if (!s->there[m])
            continue;
        number[n] = m;
        residents[n++] = (struct resident){
            .bytes = s->trace->bytes[m], .last_used_us = s->used_us[m], .wanted = wanted(s, m)};
    }
    verdict = residency_decide(residents, n, order_of(s), s->budget_bytes, &newcomer, victims,
                               &n_victims);
    if (verdict != RESIDENCY_FITS && verdict != RESIDENCY_EVICT)
        return false;
    for (size_t i = 0; i < n_victims; i++)
        evict(s, number[victims[i]]);
    s->there[model] = true;
    s->evicted[model] = 0;
    s->used_us[model] = s->now_us;
    return true;
}

/* ---- predictions ---- */

static uint32_t next_to_load(struct simulation *s)
{
    uint32_t best = NOBODY;

    if (s->predictor) {
        int model = predictor_next(s->predictor, s->there, s->now_us);
        return model < 0 ? NOBODY : (uint32_t)model;
    }
    if (s->policy != POLICY_CLAIRVOYANT)
        return NOBODY;
    for (uint32_t m = 0; m < s->trace->n_models; m++)
        if (!s->there[m] && s->next_of[m] < s->trace->n_requests &&
            (best == NOBODY || s->next_of[m] < s->next_of[best]))
            best = m;
    return best;
}

/* Begins the next predicted load; false: there is none. */
static bool predict(struct simulation *s)
{
    uint32_t model;

    do {
        model = next_to_load(s);
        if (model == NOBODY)
            return false;
        if (make_room(s, model,
                      s->predictor ? predictor_worth(s->predictor, model) : wanted(s, model)))
            break;
    } while (s->predictor); /* a clairvoyant's later ones are worth still less */
    if (!s->there[model])
        return false;
    s->loading = model;
    s->left_us = load_us(s, model);
    s->unused[model] = true;
    s->predicted_us[model] = s->now_us;
    s->outcome.predicted++;
    return true;
}

/* Lets the disk read ahead until the time of the next request. */
static void pass_time(struct simulation *s, uint64_t until_us)
{
    while (s->now_us < until_us && (s->loading != NOBODY || predict(s))) {
        uint64_t step_us = MIN(s->left_us, until_us - s->now_us);
        s->now_us += step_us;
        s->left_us -= step_us;
        if (s->left_us == 0)
            s->loading = NOBODY;
    }
    s->now_us = until_us;
}

/* ---- requests ---- */

static void note_use(struct simulation *s, uint32_t model)
{
    if (s->unused[model])
        s->outcome.predicted_used += s->now_us - s->predicted_us[model] <= PREDICTOR_WINDOW_US;
    s->unused[model] = false;
    s->used_us[model] = s->now_us;
}

/* Waits until the model is there; how long, in microseconds. */
static uint64_t serve(struct simulation *s, uint32_t model)
{
    uint64_t wait_us = load_us(s, model);

    if (s->there[model]) {
        wait_us = s->loading == model ? s->left_us : 0;
        if (s->loading == model)
            s->loading = NOBODY;
    } else {
        for (uint32_t m = 0; m < s->trace->n_models && s->policy == POLICY_NONE; m++)
            if (s->there[m])
                evict(s, m);
        make_room(s, model, RESIDENCY_ASKED_FOR);
    }
    note_use(s, model);
    return wait_us;
}

static void ask(struct simulation *s, uint32_t model)
{
    bool ready = s->there[model] && s->loading != model;
    uint64_t wait_us;

    if (s->policy == POLICY_CLAIRVOYANT)
        s->next_of[model] = s->next[s->at];
    if (s->predictor) {
        if (s->policy == POLICY_INFORMED)
            predictor_tell(s->predictor, s->trace->matrix[s->at + 1 >= s->trace->n_requests / 2],
                           s->trace->n_models);
        predictor_request(s->predictor, model, ready, s->now_us);
    }
    wait_us = serve(s, model);
    s->outcome.requests++;
    s->outcome.hits += ready;
    s->outcome.cost_s += (double)wait_us / 1e6;
    s->now_us += wait_us;
}

/* What the adversary asks for: what was just evicted; where one newcomer drove out several, each of
 * them in turn. Before anything was evicted, whatever is not loaded yet. */
static uint32_t just_evicted(const struct simulation *s)
{
    uint32_t asked = 0;

    for (uint32_t m = s->trace->n_models; m-- > 0;)
        if (!s->there[m] && s->evicted[m] == 0)
            asked = m;
    for (uint32_t m = 0; m < s->trace->n_models; m++)
        if (!s->there[m] && s->evicted[m] > 0 &&
            (s->evicted[asked] == 0 || s->evicted[m] < s->evicted[asked]))
            asked = m;
    return asked;
}

static int look_ahead(struct simulation *s)
{
    const struct trace *trace = s->trace;

    s->next = calloc(trace->n_requests, sizeof(*s->next));
    if (!s->next)
        return -ENOMEM;
    for (uint32_t m = 0; m < trace->n_models; m++)
        s->next_of[m] = SIZE_MAX;
    for (size_t i = trace->n_requests; i-- > 0;) {
        s->next[i] = s->next_of[trace->requests[i].model];
        s->next_of[trace->requests[i].model] = i;
    }
    return 0;
}

static int set_up(struct simulation *s)
{
    char name[16];
    int r;

    if (s->policy == POLICY_CLAIRVOYANT)
        return look_ahead(s);
    if (s->policy != POLICY_HEARTH && s->policy != POLICY_INFORMED)
        return 0;
    r = predictor_new(&s->predictor);
    if (r < 0)
        return r;
    predictor_set_budget(s->predictor, s->budget_bytes);
    predictor_set_rate(s->predictor, READ_BYTES_PER_S);
    for (uint32_t m = 0; m < s->trace->n_models; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        r = predictor_model(s->predictor, name);
        if (r < 0)
            return r;
        predictor_set_bytes(s->predictor, (uint32_t)r, s->trace->bytes[m]);
    }
    return 0;
}

int simulate(const struct trace *trace, enum policy policy, uint32_t *asked,
             struct outcome *ret_outcome)
{
    _cleanup_free_ struct simulation *s = calloc(1, sizeof(*s));
    int r;

    if (!s)
        return -ENOMEM;
    s->trace = trace;
    s->policy = policy;
    s->budget_bytes = simulation_budget(trace);
    s->loading = NOBODY;
    r = set_up(s);
    for (size_t i = 0; i < trace->n_requests && r == 0; i++) {
        uint64_t at_us = MAX(trace->requests[i].at_us, s->now_us);
        uint32_t model;
        pass_time(s, at_us);
        s->at = i;
        model = trace->adaptive ? just_evicted(s) : trace->requests[i].model;
        if (asked)
            asked[i] = model;
        ask(s, model);
    }
    for (uint32_t m = 0; m < trace->n_models; m++)
        s->outcome.wasted += s->unused[m];
    predictor_free(s->predictor);
    free(s->next);
    if (r == 0)
        *ret_outcome = s->outcome;
    return r;
}
