/* Requests lent to the engine thread and taken back, as the service does it: what the race programs
 * of the runner share.
 *
 * A program submits requests, disturbs them, and takes what the engine thread hands over; each must
 * end once. Hides: the runner's beginning and end, messages that were on their way when a request
 * ended. Thread: the program's main one, in the reactor's place. */
#ifndef HEARTH_TESTS_RACE_LENT_H
#define HEARTH_TESTS_RACE_LENT_H

#include <assert.h>
#include <poll.h>
#include <stdlib.h>

#include "daemon/model/builtin.h"
#include "daemon/serve/runner.h"
#include "lib/cleanup.h"
#include "tests/support/gguf_make.h"

#define LENT_MOST     64u /* at once */
#define LENT_MODELS   2u
#define LENT_LIMIT_MS 30000 /* for whatever must come */

static const struct clock lent_clock = {.now_us = clock_monotonic_us};

struct lent {
    struct runner *runner;
    struct metrics *metrics;
    struct model *models[LENT_MODELS]; /* the built-in one, and another of its shape */
    uint8_t *made;                     /* the other one's file */
    struct runner_model *runner_models[LENT_MODELS];
    uint32_t n_models, n_warmed, n_removed;
    struct request *live[LENT_MOST];
    bool asleep[LENT_MOST]; /* the live one is this thread's */
    uint32_t n_live, n_ended;
    unsigned random;
    /* The program's: one has ended, and is freed after; its text has gone out (may be NULL); it has
     * fallen asleep (NULL: none may). */
    void (*on_end)(struct lent *lent, const struct request *request);
    void (*on_text)(struct lent *lent, struct request *request);
    void (*on_asleep)(struct lent *lent, struct request *request);
};

/* Evenly distributed below `bound`. */
static inline unsigned lent_random(struct lent *lent, unsigned bound)
{
    lent->random = lent->random * 1103515245u + 12345u;
    return lent->random / 65536 % bound;
}

static inline uint32_t lent_place(const struct lent *lent, const struct request *request)
{
    uint32_t at = 0;

    while (lent->live[at] != request) {
        at++;
        assert(at < lent->n_live); /* it ends once */
    }
    return at;
}

/* A request of the model with room for `capacity` ids, whose first `n_prompt` are the caller's to
 * set: not submitted yet. */
static inline struct request *lent_request(const struct lent *lent, uint32_t model,
                                           uint32_t n_prompt, uint32_t capacity)
{
    struct request *request = request_new();

    assert(request);
    request->ids = malloc(capacity * sizeof(*request->ids));
    assert(request->ids);
    request->n_ids = request->n_prompt = n_prompt;
    request->ids_capacity = capacity;
    request->ignore_eos = true;
    request->runner_model = lent->runner_models[model];
    request->params = (struct sampler_params){
        .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .repeat_penalty = 1};
    return request;
}

static inline void lent_submit(struct lent *lent, struct request *request, uint64_t credit)
{
    assert(lent->n_live < LENT_MOST);
    stream_init(&request->stream, credit, 1u << 16, false, 0, NULL);
    assert(runner_submit(lent->runner, request) == 0);
    lent->asleep[lent->n_live] = false;
    lent->live[lent->n_live++] = request;
}

/* Frees it once all messages about it are answered. */
static inline void lent_release(struct request *request)
{
    request->over = true;
    if (request->messages_sent == request->messages_taken + request->late)
        request_free(request);
}

static inline void lent_ended(struct lent *lent, struct request *request)
{
    uint32_t at = lent_place(lent, request);

    assert(request->reason == END_CANCELLED || request->reason == END_LENGTH);
    lent->on_end(lent, request);
    lent->n_live--;
    lent->live[at] = lent->live[lent->n_live];
    lent->asleep[at] = lent->asleep[lent->n_live];
    lent->n_ended++;
    lent_release(request);
}

static inline void lent_take_event(struct lent *lent, const struct outbox_event *event)
{
    struct request *request = event->subject;

    switch ((enum runner_event)event->kind) {
    case RUNNER_TEXT:
        if (stream_delivered(&request->stream, event->text_bytes, true))
            runner_unpark(lent->runner, request);
        if (lent->on_text)
            lent->on_text(lent, request);
        break;
    case RUNNER_ENDED:
        assert(request->handed_back);
        lent_ended(lent, request);
        break;
    case RUNNER_ASLEEP:
        assert(lent->on_asleep);
        lent->asleep[lent_place(lent, request)] = true;
        lent->on_asleep(lent, request);
        break;
    case RUNNER_LATE:
        request->late++;
        if (request->over)
            lent_release(request);
        break;
    case RUNNER_WARMED:
        assert(!runner_model_error(event->subject));
        lent->n_warmed++;
        break;
    case RUNNER_REMOVED: lent->n_removed++; break;
    case RUNNER_SHRUNK: break;
    }
}

/* Takes what is there, or comes within wait_ms; within LENT_LIMIT_MS something must. */
static inline void lent_take(struct lent *lent, int wait_ms)
{
    struct pollfd pollfd = {.fd = outbox_fd(runner_outbox(lent->runner)), .events = POLLIN};
    const struct outbox_batch *batch;

    if (poll(&pollfd, 1, wait_ms) == 0) {
        assert(wait_ms < LENT_LIMIT_MS);
        return;
    }
    batch = outbox_take(runner_outbox(lent->runner));
    for (size_t i = 0; i < batch->n_events; i++)
        lent_take_event(lent, &batch->events[i]);
}

/* The next model's file. */
static inline struct gguf_source lent_source(struct lent *lent)
{
    struct model_plan plan = {.type = PLAN_F16,
                              .dim = 128,
                              .layers = 3,
                              .heads = 8,
                              .kv_heads = 4,
                              .ff = 256,
                              .vocab = 1024,
                              .context = 256,
                              .tied = true};
    size_t len;

    if (lent->n_models == 0)
        return memory_source(builtin_bytes(), builtin_size());
    assert(!lent->made && make_model_bytes(&plan, &lent->made, &len, NULL) == 0);
    return memory_source(lent->made, len);
}

/* Starts the runner with so many models and waits until they are warm. The options' kernels,
 * threads, metrics and clock are set here. */
static inline void lent_begin(struct lent *lent, struct runner_options *options, uint32_t n_models)
{
    struct model_load_options loading = {0};

    assert(metrics_new(&lent->metrics) == 0);
    assert(kernels_choose(NULL, &options->engine.kernels, NULL) == 0);
    options->engine.threads = 2;
    options->metrics = lent->metrics;
    options->clock = &lent_clock;
    loading.kernels = options->engine.kernels;
    assert(runner_new(options, &lent->runner, NULL) == 0);
    for (lent->n_models = 0; lent->n_models < n_models; lent->n_models++) {
        struct model **model = &lent->models[lent->n_models];
        struct gguf_source source = lent_source(lent);
        assert(model_load(&source, &loading, NULL, model, NULL) == 0);
        assert(runner_add_model(lent->runner, *model, NULL, &lent->runner_models[lent->n_models]) ==
               0);
    }
    while (lent->n_warmed < n_models)
        lent_take(lent, LENT_LIMIT_MS);
}

/* All have ended. The metrics stay the caller's. */
static inline void lent_finish(struct lent *lent)
{
    assert(lent->n_live == 0);
    for (uint32_t i = 0; i < lent->n_models; i++)
        assert(runner_remove_model(lent->runner, lent->runner_models[i]) == 0);
    while (lent->n_removed < lent->n_models)
        lent_take(lent, LENT_LIMIT_MS);
    for (uint32_t i = 0; i < lent->n_models; i++)
        runner_model_free(lent->runner_models[i]);
    runner_free(lent->runner); /* which asserts that no sequence and no page is left */
    for (uint32_t i = 0; i < lent->n_models; i++)
        model_free(lent->models[i]);
    free(lent->made);
}

#endif
