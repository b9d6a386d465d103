#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/serve/runner_internal.h"
#include "lib/cleanup.h"

void runner_let_model_go(struct runner *runner, struct runner_model *rm)
{
    if (!rm->removing || rm->n_requests > 0 || (rm->lane && lane_step_open(rm->lane)))
        return;
    rm->lane = lane_free(rm->lane);
    engine_forget_prefixes(runner->engine, rm->model);
    rm->removing = false;
    outbox_note(runner->outbox, RUNNER_REMOVED, rm);
}

/* Its first step is over, or there will be none; and so it is with the memory it had. */
static void warm_end(struct runner *runner, struct runner_model *rm, int r)
{
    struct runner_model **at = &runner->warming;

    while (*at != rm)
        at = &(*at)->warms_next;
    *at = rm->warms_next;
    rm->warming = false;
    if (rm->warm_row.sequence) {
        rm->warm_row.sequence = sequence_free(rm->warm_row.sequence);
        batcher_room_came(runner->batcher);
    }
    if (r == -ENOSPC)
        snprintf(rm->error, sizeof(rm->error),
                 "one page of its KV cache is larger than engine.kv_budget; raise the budget");
    else if (r < 0)
        snprintf(rm->error, sizeof(rm->error), "its first step failed: %s", strerror(-r));
    outbox_note(runner->outbox, RUNNER_WARMED, rm);
}

void runner_warm_abandon(struct runner *runner, struct runner_model *rm)
{
    if (rm->warm_row.sequence)
        engine_step_abandon(runner->engine, rm->model);
    warm_end(runner, rm, 0);
}

/* One token through the model: touches every weight once and shows that it computes. Where there is
 * no memory for that, warm_end() has been called. */
static bool warm_begin(struct runner *runner, struct runner_model *rm)
{
    int32_t bos = tokenizer_bos(model_tokenizer(rm->model));
    int r;

    rm->warm_id = bos >= 0 ? bos : 0;
    rm->warm_row = (struct step_row){.tokens = &rm->warm_id, .n_tokens = 1, .wants = ROW_LOGITS};
    r = sequence_new(runner->engine, rm->model, 1, &rm->warm_row.sequence);
    if (r == 0)
        r = engine_step_begin(runner->engine, rm->model, &rm->warm_row, 1);
    if (r < 0) /* -EAGAIN: KV memory is all in use, and the first request shows it */
        warm_end(runner, rm, r == -EAGAIN ? 0 : r);
    return r == 0;
}

void runner_warm(struct runner *runner, uint64_t now)
{
    struct runner_model *rm = runner->warming;

    if (!rm->warm_row.sequence && !warm_begin(runner, rm))
        return;
    if (engine_step_slice(runner->engine, rm->model) == 0) {
        engine_step_end(runner->engine, rm->model);
        warm_end(runner, rm, 0);
    }
    runner->warm_ahead_us += runner_now_us(runner) - now;
}

void runner_take_model(struct runner *runner, struct runner_model *rm)
{
    struct runner_model **at = &runner->warming;
    int r = lane_new(runner->batcher, rm, &rm->lane);

    rm->context_tokens = engine_context_tokens(runner->engine, rm->model);
    while (*at)
        at = &(*at)->warms_next;
    *at = rm;
    rm->warming = true;
    if (r < 0)
        warm_end(runner, rm, r);
}

void runner_drop_model(struct runner *runner, struct runner_model *rm)
{
    if (rm->warming)
        runner_warm_abandon(runner, rm);
    rm->removing = true;
    runner_let_model_go(runner, rm);
}

void runner_shrink(struct runner *runner, struct runner_model *rm, uint64_t kept_bytes)
{
    /* No request: then none of its sequences is there, but for the first step's. */
    if (rm->n_requests == 0 && !rm->warming && !lane_step_open(rm->lane))
        engine_shrink_scratch(rm->model, kept_bytes);
    outbox_note(runner->outbox, RUNNER_SHRUNK, rm);
}
