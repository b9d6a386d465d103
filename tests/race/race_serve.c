/* The engine thread, the outbox, streams and the loader under ThreadSanitizer: requests that are
 * submitted, granted credit, cancelled and left alone at odd moments, beside loads that come and
 * are cancelled. Each request must end exactly once, and all KV memory must come back. */
#include <errno.h>
#include <stdio.h>

#include "daemon/model/async_loader.h"
#include "tests/race/lent.h"

#define N_REQUESTS 400u
#define AT_ONCE    48u
#define N_LOADS    12u
#define TOKENS     12u

static struct load_task *loads[N_LOADS]; /* freed at the end: they may be cancelled at any moment */
static _Atomic uint32_t n_loads_done;
static uint32_t n_cancelled;

static void on_load_done(void *userdata, struct load_task *task)
{
    (void)userdata;
    assert(task->error == 0 || task->error == -ECANCELED);
    assert((task->error == 0) == (task->model != NULL));
    atomic_fetch_add(&n_loads_done, 1);
}

static void cancel(struct lent *lent, struct request *request)
{
    if (request->cancelled)
        return;
    request->cancelled = true;
    runner_cancel(lent->runner, request, CODE_CANCELLED);
    n_cancelled++;
}

static void grant(struct lent *lent, struct request *request, uint64_t bytes)
{
    if (stream_grant(&request->stream, bytes))
        runner_unpark(lent->runner, request);
}

static void submit(struct lent *lent)
{
    uint32_t n = 1 + lent_random(lent, 40);
    struct request *request = lent_request(lent, 0, n, n);

    for (uint32_t i = 0; i < n; i++)
        request->ids[i] = (int32_t)(260 + lent_random(lent, 700));
    request->max_tokens = TOKENS;
    request->params.seed = n;
    request->job.uid = lent_random(lent, 3);
    /* Some have credit for all, some for a little, some for nothing at first. */
    lent_submit(lent, request, lent_random(lent, 4) ? 1u << 20 : 3);
    if (lent_random(lent, 8) == 0)
        cancel(lent, request);
    else
        grant(lent, request, 1u << 20);
}

static void on_end(struct lent *lent, const struct request *request)
{
    (void)lent;
    assert(request->reason == END_CANCELLED || request->n_ids == request->n_prompt + TOKENS);
}

static void on_text(struct lent *lent, struct request *request)
{
    grant(lent, request, 1);
}

/* Whatever may happen to a live request or load at any moment. */
static void disturb(struct lent *lent, struct loader *loader)
{
    struct load_task *load = loads[lent_random(lent, N_LOADS)];
    struct request *request = lent->n_live ? lent->live[lent_random(lent, lent->n_live)] : NULL;

    if (request && lent_random(lent, 8) == 0)
        cancel(lent, request);
    else if (request)
        grant(lent, request, 1);
    if (lent_random(lent, 4) == 0)
        loader_cancel(loader, load);
    else
        loader_promote(loader, load, lent_random(lent, _LOAD_PRIORITY_MAX));
}

static void submit_loads(struct loader *loader)
{
    for (uint32_t i = 0; i < N_LOADS; i++) {
        struct load_task *task = load_task_new(TASK_LOAD, NULL);
        task->priority = i % _LOAD_PRIORITY_MAX;
        task->memory = builtin_bytes();
        task->memory_bytes = builtin_size();
        loads[i] = task;
        loader_submit(loader, task);
    }
}

static uint32_t free_loads(void)
{
    uint32_t n_loaded = 0;

    assert(atomic_load(&n_loads_done) == N_LOADS);
    for (uint32_t i = 0; i < N_LOADS; i++) {
        n_loaded += loads[i]->error == 0;
        load_task_free(loads[i]);
    }
    return n_loaded;
}

int main(void)
{
    static struct lent lent = {.random = 1, .on_end = on_end, .on_text = on_text};
    struct runner_options options = {.max_batch = 16,
                                     .min_batch = 1,
                                     .chunk_target_us = 20000,
                                     .park_timeout_us = 60000000,
                                     .max_requests = N_REQUESTS};
    struct loader_options loading = {
        .max_concurrent = 2, .clock = &lent_clock, .done = on_load_done};
    struct loader *loader;

    options.engine.kv_budget_bytes = 8u << 20;
    lent_begin(&lent, &options, 1);
    loading.metrics = lent.metrics;
    loading.kernels = options.engine.kernels;
    assert(loader_new(&loading, &loader, NULL) == 0);
    submit_loads(loader);
    for (uint32_t n = 0; n < N_REQUESTS || lent.n_live > 0;) {
        while (n < N_REQUESTS && lent.n_live < AT_ONCE) {
            submit(&lent);
            n++;
        }
        disturb(&lent, loader);
        lent_take(&lent, LENT_LIMIT_MS);
    }
    assert(lent.n_ended == N_REQUESTS);
    loader_free(loader);
    lent_finish(&lent);
    printf("%u requests, %u cancelled; %u loads, %u loaded\n", lent.n_ended, n_cancelled, N_LOADS,
           free_loads());
    metrics_free(lent.metrics);
    return 0;
}
