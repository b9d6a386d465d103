/* KV memory under pressure, under ThreadSanitizer: two models share a budget of a few sequences;
 * readers of three users grant credit in bits, stay away, come back and cancel at odd moments, so
 * that sequences are parked, preempted, put to sleep and lent again. Each request ends exactly
 * once, what it generated is what it generates alone, and all memory comes back. */
#include <stdio.h>
#include <string.h>

#include "tests/race/lent.h"

#define N_REQUESTS 120u
#define N_KINDS    12u
#define MOST_IDS   240u

/* What a kind of request is, and the ids that one has at its end. The same is asked of each model.
 */
struct kind {
    uint32_t n_prompt, max_tokens;
    int32_t ids[MOST_IDS];
};

static struct kind kinds[N_KINDS];
static uint32_t n_slept;

/* The first of a kind says what all others must be. */
static void on_end(struct lent *lent, const struct request *request)
{
    bool second = request->runner_model == lent->runner_models[1];
    struct kind *kind = &kinds[request->params.seed * LENT_MODELS + second];

    if (request->reason == END_CANCELLED)
        return;
    assert(request->n_ids == kind->n_prompt + kind->max_tokens);
    if (kind->ids[0] < 0)
        memcpy(kind->ids, request->ids, request->n_ids * sizeof(*kind->ids));
    assert(memcmp(kind->ids, request->ids, request->n_ids * sizeof(*kind->ids)) == 0);
}

static void submit(struct lent *lent, uint32_t which, uint64_t credit)
{
    const struct kind *kind = &kinds[which];
    struct request *request = lent_request(lent, which % LENT_MODELS, kind->n_prompt, MOST_IDS);

    for (uint32_t i = 0; i < kind->n_prompt; i++)
        request->ids[i] = (int32_t)(260 + (i * 31 + which / LENT_MODELS) % 700);
    request->max_tokens = kind->max_tokens;
    request->params.seed = which / LENT_MODELS;
    request->job.uid = which % 3;
    lent_submit(lent, request, credit);
}

/* What the service does with one that is asleep and may have room. */
static void stir(struct lent *lent, struct request *request)
{
    const char *text;
    size_t n;

    while ((n = stream_peek(&request->stream, &text)) > 0) {
        stream_consume(&request->stream, n);
        stream_delivered(&request->stream, n, true);
    }
    if (request->ended && stream_drained(&request->stream)) {
        lent_ended(lent, request);
    } else if (stream_may_run(&request->stream)) {
        lent->asleep[lent_place(lent, request)] = false;
        assert(runner_submit(lent->runner, request) == 0);
    }
}

static void on_asleep(struct lent *lent, struct request *request)
{
    n_slept++;
    if (request->cancelled) {
        request->reason = END_CANCELLED;
        lent_ended(lent, request);
    } else if (!atomic_load(&request->stream.parked)) {
        stir(lent, request);
    }
}

/* A reader does something, or comes back, or goes. */
static void disturb(struct lent *lent)
{
    uint32_t at = lent_random(lent, MAX(lent->n_live, 1u));
    struct request *request = lent->live[at];

    if (lent->n_live == 0)
        return;
    if (lent_random(lent, 60) == 0 && !request->cancelled) {
        request->cancelled = true;
        if (lent->asleep[at]) {
            request->reason = END_CANCELLED;
            lent_ended(lent, request);
        } else {
            runner_cancel(lent->runner, request, CODE_CANCELLED);
        }
    } else if ((atomic_load(&request->stream.parked) || lent_random(lent, 8) == 0) &&
               stream_grant(&request->stream, 1 + lent_random(lent, 60))) {
        if (lent->asleep[at])
            stir(lent, request);
        else
            runner_unpark(lent->runner, request);
    }
}

static void make_kinds(struct lent *lent)
{
    for (uint32_t i = 0; i < N_KINDS; i++) {
        kinds[i].n_prompt = 5 + i / LENT_MODELS * 14;
        kinds[i].max_tokens = 150 - i / LENT_MODELS * 12;
        kinds[i].ids[0] = -1;
    }
    /* Alone, one after the other. */
    for (uint32_t i = 0; i < N_KINDS; i++) {
        submit(lent, i, 1u << 20);
        while (lent->n_live > 0)
            lent_take(lent, LENT_LIMIT_MS);
    }
    assert(metrics_get(lent->metrics, M_PREEMPTIONS) == 0);
    for (uint32_t i = 0; i < N_KINDS; i += LENT_MODELS)
        assert(memcmp(kinds[i].ids, kinds[i + 1].ids, sizeof(kinds[i].ids)) != 0);
}

int main(void)
{
    static struct lent lent = {.random = 7, .on_end = on_end, .on_asleep = on_asleep};
    struct runner_options options = {.max_batch = 48,
                                     .min_batch = 1,
                                     .chunk_target_us = 20000,
                                     .kv_per_uid_bytes = 1u << 20,
                                     .park_timeout_us = 1000,
                                     .prefix_cache = true,
                                     .max_requests = N_REQUESTS};
    uint32_t n = 0;

    options.engine.kv_budget_bytes = LENT_MODELS * (2u << 20); /* a slab for each model */
    lent_begin(&lent, &options, LENT_MODELS);
    make_kinds(&lent);
    while (n < N_REQUESTS || lent.n_live > 0) {
        while (n < N_REQUESTS && lent.n_live < LENT_MOST) {
            submit(&lent, lent_random(&lent, N_KINDS), lent_random(&lent, 2) ? 1u << 20 : 20);
            n++;
        }
        disturb(&lent);
        lent_take(&lent, 1);
    }
    lent_finish(&lent);
    assert(lent.n_ended == N_REQUESTS + N_KINDS);
    assert(n_slept > 0 && metrics_get(lent.metrics, M_PREEMPTIONS) > 0);
    printf("%u requests; %u slept, %lu gave way, %lu tokens computed again\n", lent.n_ended,
           n_slept, metrics_get(lent.metrics, M_PREEMPTIONS),
           metrics_get(lent.metrics, M_RECOMPUTED_TOKENS));
    metrics_free(lent.metrics);
    return 0;
}
