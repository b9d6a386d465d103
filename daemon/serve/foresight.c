/* What is foreseen of a job from the queues and the forecasts: how long until its first token. */
#include "daemon/serve/batcher_internal.h"
#include "lib/cleanup.h"

static uint64_t least_tokens(uint32_t class)
{
    return class ? (uint64_t)1 << (class - 1) : 0;
}

/* Columns of running prompts of a share that are still to be computed; with `before`, of those that
 * go on before that job. */
static uint64_t running_prompts(const struct share *share, const struct job *before)
{
    uint64_t columns = 0;

    for (const struct job *job = share->lane->running.head; job; job = job->next)
        if (job->share == share && job->known - job->fed > 1 &&
            (!before || job_goes_before(job, before)))
            columns += job->known - job->fed;
    return columns;
}

/* Columns that another user's jobs have before them in the lane. None where he has work elsewhere
 * too: that may bring his time level with the others' while a step of this lane takes in all that
 * wait. */
static uint64_t backlog(const struct share *share)
{
    if (share->n_active < share->account->n_active)
        return 0;
    return running_prompts(share, NULL) + share->work[0].prompts + share->work[1].prompts;
}

/* Tokens that jobs of its own user must generate before there is a place for it. As many as there
 * are places may run beside it, and those that run now may end at any moment; the rest of those
 * that wait before it end first, at the least the ones that generate least. */
static uint64_t tokens_before(const struct job *job)
{
    uint64_t places = lane_places(job->lane), n_before = 0, tokens = 0, n;

    for (uint32_t i = 0; i <= job->priority; i++)
        n_before += job->share->waiting[i].n;
    if (n_before <= places) /* it is one of them itself */
        return 0;
    n = n_before - places;
    for (uint32_t class = 0; class < WORK_CLASSES && n > 0; class ++) {
        uint64_t here = 0;
        for (uint32_t i = 0; i <= job->priority; i++)
            here += job->share->work[i].by_tokens[class];
        here = MIN(here - (class == work_class(job->foreseen_tokens)), n);
        tokens += here * least_tokens(class);
        n -= here;
    }
    return tokens;
}

/* Prompts of so many columns are computed before it in its own user's time, and so many tokens
 * generated; `own` columns are its own. */
static struct foreseen foresee(const struct job *job, uint64_t columns, uint64_t tokens,
                               uint64_t own)
{
    const struct account *account = job->share->account;
    const struct forecast *forecast = &job->lane->forecast;
    /* Whatever a step's width is now, it may be the widest in a moment. */
    uint32_t widest = job->lane->batcher->options.max_columns;
    double column_us = forecast_column_us(forecast, widest);
    /* A step generates one token in each place at most. */
    double token_us = forecast_column_us(forecast, lane_places(job->lane));
    double wait_us = column_us * (double)columns + token_us * (double)tokens, others_us = 0;
    struct foreseen foreseen = {.own_us = forecast_us(forecast, own, widest)};

    /* Meanwhile the others get as much, as far as they have work, and what they are behind; but a
     * single column goes with those that generate, whatever prompts there are. */
    for (const struct share *s = job->lane->shares; s && own > 1; s = s->next) {
        double due_us = account->virtual_us + wait_us - s->account->virtual_us;
        if (s->account != account && s->n_active > 0 && due_us > 0)
            others_us += MIN(due_us, column_us * (double)backlog(s));
    }
    /* The last of what is before it and its own may share a step. */
    wait_us += others_us + column_us * (double)own - (double)foreseen.own_us;
    foreseen.wait_us = wait_us > 0 ? (uint64_t)wait_us : 0;
    return foreseen;
}

struct foreseen batcher_foresee(const struct job *job)
{
    uint64_t columns = 0;

    if (job->least_prompt > 1) {
        columns = running_prompts(job->share, job) - job->foreseen_prompt;
        for (uint32_t i = 0; i <= job->priority; i++)
            columns += job->share->work[i].prompts;
    }
    return foresee(job, columns, tokens_before(job), MAX(job->least_prompt, 1u));
}

struct foreseen foresee_begun(const struct job *job)
{
    uint32_t own = job->known - job->fed;

    return foresee(job, own > 1 ? running_prompts(job->share, job) : 0, 0, own);
}

bool foreseen_late(const struct foreseen *foreseen, uint64_t deadline_us, uint64_t now_us)
{
    uint64_t least_us = foreseen->wait_us + foreseen->own_us;

    least_us -= least_us / FORESEEN_SLACK;
    return least_us > 0 && deadline_us != 0 && now_us + least_us > deadline_us;
}
