/* Who is in a lane's next step, and with how many columns. */
#include <assert.h>
#include <errno.h>

#include "daemon/serve/batcher_internal.h"
#include "lib/cleanup.h"

/* The share's most urgent and earliest job that may join; NULL: none. */
static struct job *share_next(const struct share *share)
{
    for (uint32_t i = 0; i < BATCHER_PRIORITIES; i++) {
        struct job *head = share->waiting[i].head;

        if (head && (head->admitted || !share->passed_over))
            return head;
    }
    return NULL;
}

/* Columns that the job has in the next step, as far as that can be said before it is composed. */
static uint32_t planned_columns(const struct job *job)
{
    return MIN(job->known - job->fed, lane_column_budget(job->lane));
}

/* The engine time that a user will have had when the step that is composed is done. */
static double planned_us(const struct share *share)
{
    return share->account->virtual_us + share->lane->us_per_column * (double)share->columns;
}

/* The waiting job that is next in the lane: of the user with the least engine time. */
static struct job *next_waiting(const struct lane *lane)
{
    double least_us = 0, us;
    struct job *next = NULL, *job;

    for (const struct share *share = lane->shares; share; share = share->next)
        if (!share->settled && (job = share_next(share)) &&
            (us = planned_us(share), !next || us < least_us)) {
            least_us = us;
            next = job;
        }
    return next;
}

/* Whether one that has been denied memory for so long stands before others: every other second, so
 * that nobody is held up for longer where it does not help. */
static bool claims(uint64_t denied_us)
{
    return denied_us / BATCHER_PATIENCE_US % 2 == 1;
}

/* Whether another share, denied memory longer than this one and for long, gets it first: of any
 * user where there was none, of the same one where he held too much. */
static bool must_yield(const struct batcher *batcher, const struct share *share, uint64_t now_us)
{
    if (batcher->n_denied == 0)
        return false;
    for (const struct lane *lane = batcher->lanes; lane; lane = lane->next)
        for (const struct share *s = lane->shares; s; s = s->next)
            if (s != share && s->denied_us && claims(now_us - s->denied_us) &&
                (!share->denied_us || s->denied_us < share->denied_us) &&
                (!s->denied_own || s->account == share->account))
                return true;
    return false;
}

/* Whether the job has its KV memory, or gets it now: as options.admit. */
static int admit(struct batcher *batcher, struct job *job, uint64_t now_us)
{
    struct share *share = job->share;
    int r;

    if (job->admitted)
        return 0;
    if (must_yield(batcher, share, now_us)) {
        share->passed_over = true;
        return -EAGAIN;
    }
    r = batcher->options.admit(batcher->options.userdata, job);
    if (r == -EAGAIN || r == -EDQUOT) {
        share_deny(batcher, share, r == -EDQUOT, now_us);
        return -EAGAIN;
    }
    share_grant(batcher, share);
    return r;
}

uint32_t lane_places(const struct lane *lane)
{
    return MIN(lane->batcher->options.max_batch, lane->adaptive.width);
}

/* The job has its KV memory; what is there of its prompt is known now. False: what is not can't be
 * computed before its deadline. */
static bool begin(struct job *job, uint64_t now_us)
{
    if (job->admitted)
        return true;
    job->admitted = true;
    if (job->known == job->prompt)
        forecast_begin(&job->lane->forecast, job->known, job->fed);
    if (!job->deadline_us)
        return true;
    job->foreseen = foresee_begun(job);
    return !foreseen_late(&job->foreseen, job->deadline_us, now_us);
}

/* Whether a running job lacks KV memory for what it knows. One that has more than its last token to
 * compute never does: it was admitted with all it knew. */
static bool cramped(const struct batcher *batcher, const struct job *job)
{
    return batcher->options.grow && job->known > job->room;
}

/* The running job of the share that gives up its place first: the least urgent, the youngest. */
static struct job *share_last_running(const struct share *share)
{
    struct job *job = share->lane->running.tail;

    if (share->n_running[0] + share->n_running[1] == 0)
        return NULL;
    while (job->share != share)
        job = job->previous;
    return job;
}

/* Who gives up his place to a waiting job where all are taken: of the users who without it would
 * have had more engine time than the waiting one's, the one with the most; else a less urgent one
 * of the same user. NULL: nobody. So a place is worth the time it gives: it goes to and fro as
 * users fall behind each other by more than what a step costs one job, and not sooner. */
static struct job *yields_to(const struct lane *lane, const struct job *waiting)
{
    double most_us = planned_us(waiting->share), us;
    struct job *yields = NULL, *own;

    for (const struct share *share = lane->shares; share; share = share->next) {
        struct job *last;
        if (share == waiting->share || planned_us(share) <= most_us ||
            !(last = share_last_running(share)))
            continue;
        us = planned_us(share) - lane->us_per_column * planned_columns(last);
        if (us > most_us) {
            most_us = us;
            yields = last;
        }
    }
    if (yields)
        return yields;
    own = share_last_running(waiting->share);
    return own && own->priority > waiting->priority ? own : NULL;
}

static bool lane_is_full(const struct lane *lane)
{
    return lane->running.n >= lane_places(lane);
}

/* Gives a waiting job that has its KV memory a place: a free one, or one of a
 * job that yields. */
static void join(struct batcher *batcher, struct job *job)
{
    struct lane *lane = job->lane;
    struct job *yields = lane_is_full(lane) ? yields_to(lane, job) : NULL;

    if (yields) {
        yields->share->columns -= MIN(yields->share->columns, planned_columns(yields));
        job_yield(batcher, yields);
    }
    assert(lane->running.n < batcher->options.max_batch);
    job_run(batcher, job);
    job->share->columns += planned_columns(job);
    /* One that comes back with its memory may have stopped where that was full. */
    if (cramped(batcher, job))
        batcher->options.grow(batcher->options.userdata, job);
}

/* What running jobs will have of the step counts already where places are given away. */
static void plan_running(struct lane *lane)
{
    for (struct share *share = lane->shares; share; share = share->next)
        share->passed_over = share->settled = false;
    for (struct job *job = lane->running.head; job; job = job->next)
        job->share->columns += planned_columns(job);
}

/* Lets waiting jobs join while there are places and KV memory, or somebody has a place that is due
 * to them: at most as many times as there are places in all. How many joined. */
static uint32_t join_waiting(struct batcher *batcher, struct lane *lane, uint64_t now_us)
{
    uint32_t n_moves = 0, n_joined = 0;
    struct job *job;

    plan_running(lane);
    while ((job = next_waiting(lane))) {
        int r;
        if (lane_is_full(lane) &&
            (n_moves++ >= batcher->options.max_batch || !yields_to(lane, job))) {
            job->share->settled = true;
            continue;
        }
        r = admit(batcher, job, now_us);
        if (r == -EAGAIN)
            continue;
        if (r == 0 && begin(job, now_us)) {
            join(batcher, job);
            n_joined++;
            continue;
        }
        job_leave(batcher, job);
        if (r == -EBUSY)
            job_hold(batcher, job);
        else
            job_refuse(batcher, job);
    }
    return n_joined;
}

/* Gives running jobs the memory that they have come to need. */
static void grow_running(struct batcher *batcher, struct lane *lane)
{
    struct job *job = lane->running.head;

    while (job) {
        uint32_t n = lane->running.n;

        if (cramped(batcher, job))
            batcher->options.grow(batcher->options.userdata, job);
        /* Where one was preempted, this one or the next may be in the list no more. */
        job = lane->running.n == n ? job->next : lane->running.head;
    }
}

/* Held jobs that may go on wait again, in front of those that came later. */
static void release_held(struct batcher *batcher, struct lane *lane)
{
    struct job *job, *previous;

    for (job = lane->held.tail; job; job = previous) {
        previous = job->previous;
        if (!batcher->options.ready(batcher->options.userdata, job))
            continue;
        job_leave(batcher, job);
        job_wait(batcher, job);
    }
}

uint32_t lane_column_budget(const struct lane *lane)
{
    double columns = (double)lane->batcher->options.chunk_target_us / lane->us_per_column;

    if (columns < MIN_CHUNK_COLUMNS)
        columns = MIN_CHUNK_COLUMNS;
    return columns < lane->adaptive.width ? (uint32_t)columns : lane->adaptive.width;
}

static void batch_put(struct batch *batch, struct job *job, uint32_t chunk)
{
    job->chunk = chunk;
    job->share->columns += chunk;
    batch->jobs[batch->n_jobs++] = job;
    batch->n_columns += chunk;
}

/* The user's next running job whose prompt is not computed yet and that is not in the batch. */
static struct job *share_next_prompt(struct share *share)
{
    while (share->cursor &&
           (share->cursor->share != share || share->cursor->known - share->cursor->fed <= 1))
        share->cursor = share->cursor->next;
    return share->cursor;
}

/* The prompt that goes on first: of the user with the least engine time, this step's included, so
 * that a long prompt does not keep another user's out. */
static struct job *next_prompt(struct lane *lane)
{
    struct share *best = NULL;
    double best_us = 0;

    for (struct share *share = lane->shares; share; share = share->next) {
        double us = planned_us(share);
        if ((!best || us < best_us) && share_next_prompt(share)) {
            best = share;
            best_us = us;
        }
    }
    return best ? best->cursor : NULL;
}

/* Fills the step with prompts: up to the time a step should take, but with a page's worth at
 * least. */
static void put_prompts(const struct batcher *batcher, struct lane *lane)
{
    struct batch *batch = &lane->batch;
    uint32_t most = MAX(lane_column_budget(lane), batch->n_columns + MIN_CHUNK_COLUMNS);
    struct job *job;

    most = MIN(most, batcher->options.max_columns);
    for (struct share *share = lane->shares; share; share = share->next)
        share->cursor = lane->running.head;
    while (batch->n_columns < most && (job = next_prompt(lane))) {
        batch_put(batch, job, MIN(job->known - job->fed, most - batch->n_columns));
        job->share->cursor = job->next;
    }
}

/* When a step that waits for company goes at the latest, and why then: max_delay_us after its
 * eldest came, or when a deadline leaves no more than the time of its prompt. They are fewer than
 * min_batch. */
static uint64_t company_until_us(const struct lane *lane, enum batch_reason *ret_reason)
{
    uint64_t eldest_us = UINT64_MAX, latest_us = UINT64_MAX, until_us;

    for (const struct share *share = lane->shares; share; share = share->next)
        for (uint32_t i = 0; i < BATCHER_PRIORITIES; i++)
            for (const struct job *job = share->waiting[i].head; job; job = job->next) {
                uint64_t prompt_us = (uint64_t)(lane->us_per_column * (job->known - job->fed));
                eldest_us = MIN(eldest_us, job->arrived_us);
                if (job->deadline_us)
                    latest_us = MIN(latest_us, job->deadline_us - MIN(job->deadline_us, prompt_us));
            }
    until_us = eldest_us + lane->batcher->options.max_delay_us;
    *ret_reason = latest_us < until_us ? BATCH_DEADLINE : BATCH_MAX_DELAY;
    return MIN(latest_us, until_us);
}

/* A step still waits for company: fewer jobs than min_batch, and its time has not come. */
bool lane_held_back(const struct batcher *batcher, struct lane *lane, uint64_t now_us,
                    uint64_t *ret_until_us)
{
    if (batcher->options.max_delay_us == 0 || batcher->options.min_batch <= 1 ||
        lane->running.n > 0 || lane->n_waiting == 0 ||
        lane->n_waiting >= batcher->options.min_batch)
        return false;
    *ret_until_us = company_until_us(lane, &lane->company);
    lane->kept_waiting |= *ret_until_us > now_us;
    return *ret_until_us > now_us;
}

/* Why the step goes now; `joined`: jobs that came into it, of `waiting` that could. */
static enum batch_reason step_reason(struct batcher *batcher, struct lane *lane, uint32_t joined,
                                     uint32_t waiting)
{
    bool was_idle = batcher->engine_idle, kept_waiting = lane->kept_waiting;

    batcher->engine_idle = lane->kept_waiting = false;
    if (lane->running.n >= lane_places(lane))
        return BATCH_FULL;
    if (kept_waiting)
        return waiting >= batcher->options.min_batch ? BATCH_MIN_BATCH : lane->company;
    if (was_idle)
        return BATCH_IDLE;
    return joined > 0 ? BATCH_GATHERED : BATCH_CONTINUED;
}

/* Puts those that are generating into the step: each costs one column and a reader watches it. */
static void put_generating(const struct batcher *batcher, struct lane *lane)
{
    for (struct job *job = lane->running.head; job; job = job->next)
        if (!cramped(batcher, job) && job->known - job->fed == 1 &&
            lane->batch.n_columns < batcher->options.max_columns)
            batch_put(&lane->batch, job, 1);
}

/* Jobs that could have been in the step, were there no end of places: those that run and those that
 * still wait, but for those that have no KV memory, or not enough, and could not get it. */
static uint32_t lane_n_runnable(const struct batcher *batcher, const struct lane *lane)
{
    uint32_t n = lane->running.n;

    for (const struct job *job = lane->running.head; job; job = job->next)
        n -= cramped(batcher, job);
    for (const struct share *share = lane->shares; share; share = share->next)
        for (uint32_t i = 0; i < BATCHER_PRIORITIES; i++) {
            const struct job *job = share->waiting[i].head;
            if (!share->passed_over)
                n += share->waiting[i].n;
            for (; share->passed_over && job && job->admitted; job = job->next)
                n++;
        }
    return n;
}

bool batcher_compose(struct batcher *batcher, struct lane *lane, uint64_t now_us,
                     const struct batch **ret_batch)
{
    struct batch *batch = &lane->batch;
    uint32_t waiting, joined;

    assert(!lane->open);
    grow_running(batcher, lane);
    release_held(batcher, lane);
    waiting = lane->n_waiting;
    joined = join_waiting(batcher, lane, now_us);
    for (struct share *share = lane->shares; share; share = share->next)
        share->columns = 0; /* the plan ends here */
    batch->n_jobs = batch->n_columns = 0;
    batch->n_runnable = MIN(lane_n_runnable(batcher, lane), batcher->options.max_batch);
    put_generating(batcher, lane);
    put_prompts(batcher, lane);
    lane->starved = batch->n_jobs == 0;
    lane->open = batch->n_jobs > 0;
    if (lane->open)
        batch->reason = step_reason(batcher, lane, joined, waiting);
    *ret_batch = batch;
    return lane->open;
}
