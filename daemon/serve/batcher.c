#include "daemon/serve/batcher.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/batcher_internal.h"
#include "lib/cleanup.h"

/* A step's time is predicted as columns x this moving average; a new lane starts here. */
#define FIRST_US_PER_COLUMN 10.0
#define AVERAGE_WEIGHT      0.2

/* ---- lists ---- */

static void list_append(struct job_list *list, struct job *job)
{
    job->previous = list->tail;
    job->next = NULL;
    if (list->tail)
        list->tail->next = job;
    else
        list->head = job;
    list->tail = job;
    list->n++;
}

/* Waiting jobs stand in the order of arrival, but those that have their memory first. */
static bool stands_before(const struct job *a, const struct job *b)
{
    return a->admitted > b->admitted || (a->admitted == b->admitted && a->serial < b->serial);
}

/* Who is new belongs at the end, who comes back is mostly old: neither has far to go, however many
 * wait. */
static void list_insert(struct job_list *list, struct job *job)
{
    struct job *next = list->head;

    if (!list->tail || stands_before(list->tail, job)) {
        list_append(list, job);
        return;
    }
    while (stands_before(next, job))
        next = next->next;
    job->next = next;
    job->previous = next->previous;
    if (next->previous)
        next->previous->next = job;
    else
        list->head = job;
    next->previous = job;
    list->n++;
}

/* Running ones stand by priority, then in the order of arrival, whoever's they are. */
static void list_insert_running(struct job_list *list, struct job *job)
{
    struct job *previous = list->tail;

    while (previous && job_goes_before(job, previous))
        previous = previous->previous;
    if (previous == list->tail) {
        list_append(list, job);
        return;
    }
    job->previous = previous;
    job->next = previous ? previous->next : list->head;
    job->next->previous = job;
    if (previous)
        previous->next = job;
    else
        list->head = job;
    list->n++;
}

static void list_remove(struct job_list *list, struct job *job)
{
    if (job->previous)
        job->previous->next = job->next;
    else
        list->head = job->next;
    if (job->next)
        job->next->previous = job->previous;
    else
        list->tail = job->previous;
    job->previous = job->next = NULL;
    list->n--;
}

/* ---- accounts and shares ---- */

static struct account *account_find(const struct batcher *batcher, uint32_t uid)
{
    struct account *account = batcher->accounts;

    while (account && account->uid != uid)
        account = account->next;
    return account;
}

/* Takes the floor of users' time to where they have all come. */
static void batcher_level(struct batcher *batcher)
{
    double least_us = INFINITY;

    for (const struct account *a = batcher->accounts; a; a = a->next)
        if (a->n_active > 0)
            least_us = MIN(least_us, a->virtual_us);
    if (least_us < INFINITY)
        batcher->floor_us = MAX(batcher->floor_us, least_us);
}

/* The same of one user's models. */
static void account_level(struct account *account)
{
    double least_us = INFINITY;

    for (const struct share *s = account->shares; s; s = s->sibling)
        if (s->n_active > 0)
            least_us = MIN(least_us, s->virtual_us);
    if (least_us < INFINITY)
        account->floor_us = MAX(account->floor_us, least_us);
}

/* Who had nothing to do has saved nothing up, neither a user nor one of his models. */
static void share_activate(struct share *share)
{
    struct batcher *batcher = share->lane->batcher;
    struct account *account = share->account;

    if (account->n_active == 0) {
        batcher_level(batcher);
        account->virtual_us = MAX(account->virtual_us, batcher->floor_us);
    }
    if (share->n_active == 0) {
        account_level(account);
        share->virtual_us = MAX(share->virtual_us, account->floor_us);
    }
    account->n_active++;
    share->n_active++;
}

static void share_deactivate(struct share *share)
{
    if (share->n_active == 1)
        account_level(share->account);
    if (share->account->n_active == 1)
        batcher_level(share->lane->batcher);
    share->n_active--;
    share->account->n_active--;
}

static struct account *account_get(struct batcher *batcher, uint32_t uid)
{
    struct account *account = account_find(batcher, uid);

    if (account)
        return account;
    account = calloc(1, sizeof(*account));
    if (!account)
        return NULL;
    account->uid = uid;
    account->virtual_us = batcher->floor_us;
    account->next = batcher->accounts;
    batcher->accounts = account;
    batcher->n_idle++;
    return account;
}

/* Where the account has no more to say than a new one would it is gone. */
static void account_forget(struct batcher *batcher, struct account *account)
{
    struct account **at = &batcher->accounts;

    if (account->shares || account->virtual_us > batcher->floor_us)
        return;
    while (*at != account)
        at = &(*at)->next;
    *at = account->next;
    batcher->n_idle--;
    free(account);
}

static struct share *share_get(struct lane *lane, uint32_t uid)
{
    struct share *share = lane->shares;
    struct account *account;

    while (share && share->account->uid != uid)
        share = share->next;
    if (share)
        return share;
    account = account_get(lane->batcher, uid);
    share = account ? calloc(1, sizeof(*share)) : NULL;
    if (!share)
        return NULL;
    lane->batcher->n_idle += account->shares != NULL;
    share->account = account;
    share->virtual_us = account->floor_us;
    share->sibling = account->shares;
    account->shares = share;
    share->lane = lane;
    share->next = lane->shares;
    lane->shares = share;
    return share;
}

/* One without jobs. */
static void share_free(struct share *share)
{
    struct share **at = &share->lane->shares, **sibling = &share->account->shares;

    assert(share->n_jobs == 0);
    while (*at != share)
        at = &(*at)->next;
    *at = share->next;
    while (*sibling != share)
        sibling = &(*sibling)->sibling;
    *sibling = share->sibling;
    share->lane->batcher->n_idle -= share->account->shares != NULL;
    free(share);
}

static void share_forget(struct share *share)
{
    if (share->n_jobs == 0 && share->virtual_us <= share->account->floor_us)
        share_free(share);
}

/* Forgets whom the others have caught up with. */
static void forget_idle(struct batcher *batcher)
{
    struct account *account, *next_account;
    struct share *share, *next_share;

    if (batcher->n_idle == 0)
        return;
    batcher_level(batcher);
    for (account = batcher->accounts; account; account = next_account) {
        next_account = account->next;
        account_level(account);
        for (share = account->shares; share; share = next_share) {
            next_share = share->sibling;
            share_forget(share);
        }
        account_forget(batcher, account);
    }
}

static bool share_waits(const struct share *share)
{
    for (uint32_t i = 0; i < BATCHER_PRIORITIES; i++)
        if (share->waiting[i].n > 0)
            return true;
    return false;
}

/* ---- batcher and lanes ---- */

int batcher_new(const struct batcher_options *options, struct batcher **ret_batcher)
{
    struct batcher *batcher;

    assert(options->max_batch > 0 && options->max_columns > 0 && options->admit);
    batcher = calloc(1, sizeof(*batcher));
    if (!batcher)
        return -ENOMEM;
    batcher->options = *options;
    batcher->engine_idle = true;
    *ret_batcher = batcher;
    return 0;
}

struct batcher *batcher_free(struct batcher *batcher)
{
    if (!batcher)
        return NULL;
    assert(!batcher->lanes);
    while (batcher->accounts) {
        struct account *account = batcher->accounts;
        batcher->accounts = account->next;
        free(account);
    }
    deadlines_done(&batcher->deadlines);
    free(batcher);
    return NULL;
}

int lane_new(struct batcher *batcher, void *subject, struct lane **ret_lane)
{
    struct lane *lane = calloc(1, sizeof(*lane));

    if (!lane)
        return -ENOMEM;
    lane->batch.jobs = calloc(batcher->options.max_batch, sizeof(*lane->batch.jobs));
    if (!lane->batch.jobs) {
        free(lane);
        return -ENOMEM;
    }
    lane->batcher = batcher;
    lane->subject = subject;
    lane->us_per_column = FIRST_US_PER_COLUMN;
    adaptive_init(&lane->adaptive, batcher->options.adaptive_us,
                  MIN(MIN_CHUNK_COLUMNS, batcher->options.max_columns),
                  batcher->options.max_columns);
    lane->next = batcher->lanes;
    batcher->lanes = lane;
    *ret_lane = lane;
    return 0;
}

struct lane *lane_free(struct lane *lane)
{
    struct lane **at;

    if (!lane)
        return NULL;
    assert(lane->n_jobs == 0 && !lane->open);
    for (at = &lane->batcher->lanes; *at != lane; at = &(*at)->next)
        ;
    *at = lane->next;
    lane->batcher->n_narrowed += lane->adaptive.n_narrowed;
    lane->batcher->n_widened += lane->adaptive.n_widened;
    if (lane->batcher->last == lane)
        lane->batcher->last = NULL;
    while (lane->shares) {
        struct account *account = lane->shares->account;
        share_free(lane->shares);
        account_forget(lane->batcher, account);
    }
    free(lane->batch.jobs);
    free(lane);
    return NULL;
}

void *lane_subject(const struct lane *lane)
{
    return lane->subject;
}

uint32_t lane_n_jobs(const struct lane *lane)
{
    return lane->n_jobs;
}

bool lane_step_open(const struct lane *lane)
{
    return lane->open;
}

const struct batch *batcher_batch(const struct lane *lane)
{
    return &lane->batch;
}

/* ---- jobs ---- */

/* What it will have computed once it runs, nearly at least. */
static void foresee(struct job *job)
{
    const struct forecast *forecast = &job->lane->forecast;
    uint32_t left =
        job->prompt + job->most_tokens - MIN(job->known, job->prompt + job->most_tokens);
    double least_tokens = MAX(0.0, forecast->least_tokens - (job->known - job->prompt));

    job->foreseen_prompt = (uint32_t)(forecast->least_fresh * (job->known - job->fed));
    job->foreseen_prompt = MAX(job->foreseen_prompt, MIN(job->least_prompt, job->known - job->fed));
    job->foreseen_tokens = (uint32_t)MIN(least_tokens, (double)left);
}

static void job_wait(struct batcher *batcher, struct job *job)
{
    struct work *work = &job->share->work[job->priority];

    list_insert(&job->share->waiting[job->priority], job);
    job->state = JOB_WAITING;
    foresee(job);
    work->prompts += job->foreseen_prompt;
    work->by_tokens[work_class(job->foreseen_tokens)]++;
    job->share->account->n_waiting++;
    job->lane->n_waiting++;
    job->lane->starved = false;
    batcher->n_waiting++;
    share_activate(job->share);
}

/* Room may have come free, here and, KV memory being one pool, in every lane. */
static void unstarve(struct batcher *batcher)
{
    for (struct lane *lane = batcher->lanes; lane; lane = lane->next)
        lane->starved = false;
}

static void share_deny(struct batcher *batcher, struct share *share, bool own, uint64_t now_us)
{
    share->passed_over = true;
    share->denied_own = own;
    if (share->denied_us)
        return;
    share->denied_us = MAX(now_us, 1u);
    batcher->n_denied++;
}

static void share_grant(struct batcher *batcher, struct share *share)
{
    if (share->denied_us)
        batcher->n_denied--;
    share->denied_us = 0;
}

/* Takes the job out of the list it is in. */
static void job_leave(struct batcher *batcher, struct job *job)
{
    struct lane *lane = job->lane;

    switch (job->state) {
    case JOB_WAITING:
        list_remove(&job->share->waiting[job->priority], job);
        job->share->work[job->priority].prompts -= job->foreseen_prompt;
        job->share->work[job->priority].by_tokens[work_class(job->foreseen_tokens)]--;
        lane->n_waiting--;
        batcher->n_waiting--;
        job->share->account->n_waiting--;
        share_deactivate(job->share);
        if (!share_waits(job->share))
            share_grant(batcher, job->share);
        break;
    case JOB_RUNNING:
        list_remove(&lane->running, job);
        job->share->n_running[job->priority]--;
        batcher->n_running--;
        share_deactivate(job->share);
        break;
    case JOB_HELD:
        list_remove(&lane->held, job);
        batcher->n_waiting--;
        batcher->n_held--;
        break;
    case JOB_PARKED: batcher->n_parked--; break;
    case JOB_REFUSED: list_remove(&batcher->refused, job); break;
    case JOB_IDLE: break;
    }
    job->state = JOB_IDLE;
    unstarve(batcher);
}

int batcher_add(struct batcher *batcher, struct job *job, uint64_t now_us)
{
    (void)now_us;
    assert(job->state == JOB_IDLE && job->known > 0 && job->priority < BATCHER_PRIORITIES);
    job->share = share_get(job->lane, job->uid);
    if (!job->share)
        return -ENOMEM;
    if (job->deadline_us && deadlines_add(&batcher->deadlines, job) < 0)
        return -ENOMEM;
    if (job->serial == 0) {
        job->serial = ++batcher->n_added;
        job->prompt = job->known;
    }
    job->admitted = false;
    job->fed = job->room = 0;
    if (job->share->n_jobs++ == 0)
        batcher->n_idle--;
    job->lane->n_jobs++;
    job_wait(batcher, job);
    return 0;
}

void batcher_remove(struct batcher *batcher, struct job *job)
{
    assert(job->chunk == 0);
    if (job->state == JOB_IDLE)
        return;
    job_leave(batcher, job);
    deadlines_remove(&batcher->deadlines, job);
    forecast_end(&job->lane->forecast, job->known - job->prompt);
    job->lane->n_jobs--;
    if (--job->share->n_jobs == 0) {
        struct account *account = job->share->account;
        batcher->n_idle++;
        share_forget(job->share);
        account_forget(batcher, account);
    }
    job->share = NULL;
}

void batcher_park(struct batcher *batcher, struct job *job)
{
    assert(job->chunk == 0);
    if (job->state == JOB_PARKED || job->state == JOB_IDLE || job->state == JOB_REFUSED)
        return;
    job_leave(batcher, job);
    job->state = JOB_PARKED;
    batcher->n_parked++;
}

void batcher_unpark(struct batcher *batcher, struct job *job, uint64_t now_us)
{
    (void)now_us;
    if (job->state != JOB_PARKED)
        return;
    batcher->n_parked--;
    job_wait(batcher, job);
}

void batcher_preempt(struct batcher *batcher, struct job *job)
{
    enum job_state state = job->state;

    assert(job->chunk == 0 && job->admitted);
    /* Its place among those that wait is another one now. */
    if (state == JOB_RUNNING || state == JOB_WAITING)
        job_leave(batcher, job);
    job->admitted = false;
    job->fed = job->room = 0;
    if (state == JOB_RUNNING || state == JOB_WAITING)
        job_wait(batcher, job);
    unstarve(batcher);
}

bool batcher_others_wait(const struct batcher *batcher, uint32_t uid)
{
    for (const struct account *account = batcher->accounts; account; account = account->next)
        if (account->uid != uid && account->n_waiting > 0)
            return true;
    return false;
}

/* ---- composing ---- */

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

/* A job that left its list and can never run: it stays with the batcher until it is handed out. */
static void job_refuse(struct batcher *batcher, struct job *job)
{
    job->state = JOB_REFUSED;
    list_append(&batcher->refused, job);
}

/* A job that left its list waits for what another one computes. */
static void job_hold(struct batcher *batcher, struct job *job)
{
    job->state = JOB_HELD;
    list_append(&job->lane->held, job);
    batcher->n_waiting++;
    batcher->n_held++;
    batcher->held_ever++;
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

/* A running job waits from now on, with all that it has. Its user is busy all the time: he is not
 * one that comes back. */
static void give_up_place(struct batcher *batcher, struct job *job)
{
    share_activate(job->share);
    job_leave(batcher, job);
    job_wait(batcher, job);
    share_deactivate(job->share);
}

/* Gives a waiting job that has its KV memory a place: a free one, or one of a
 * job that yields. */
static void join(struct batcher *batcher, struct job *job)
{
    struct lane *lane = job->lane;
    struct job *yields = lane_is_full(lane) ? yields_to(lane, job) : NULL;

    if (yields) {
        yields->share->columns -= MIN(yields->share->columns, planned_columns(yields));
        give_up_place(batcher, yields);
    }
    assert(lane->running.n < batcher->options.max_batch);
    share_activate(job->share);
    job_leave(batcher, job);
    job->state = JOB_RUNNING;
    list_insert_running(&lane->running, job);
    job->share->n_running[job->priority]++;
    batcher->n_running++;
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
static bool held_back(const struct batcher *batcher, struct lane *lane, uint64_t now_us,
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

/* Whether jobs of the share run, or wait for the lane's step to end; one that was denied memory
 * does not wait for that. */
static bool waits_for_step(const struct share *share)
{
    return share->n_active > 0 && !(share->lane->open && share->denied_us);
}

/* The lane's share that is due first. */
static const struct share *lane_due(const struct lane *lane)
{
    const struct share *due = NULL;

    for (const struct share *share = lane->shares; share; share = share->next)
        if (share->n_jobs > 0 && (share->columns > 0 || waits_for_step(share)) &&
            (!due || share->account->virtual_us < due->account->virtual_us))
            due = share;
    return due;
}

/* The priority of the share's most urgent job that runs or may soon. */
static uint32_t share_priority(const struct share *share)
{
    uint32_t i = 0;

    while (i < BATCHER_PRIORITIES && share->n_running[i] == 0 &&
           (share->waiting[i].n == 0 || share->denied_us))
        i++;
    return i;
}

/* Whether `a` goes on before `b`: the user who had less engine time, and where that is one user,
 * his model with the more urgent work, then the one that had less. */
static bool due_before(const struct share *a, const struct share *b)
{
    if (!a || !b)
        return a != NULL;
    if (a->account != b->account)
        return a->account->virtual_us < b->account->virtual_us;
    if (share_priority(a) != share_priority(b))
        return share_priority(a) < share_priority(b);
    return a->virtual_us < b->virtual_us;
}

struct lane *batcher_pick(struct batcher *batcher, uint64_t now_us, uint64_t *ret_wake_us)
{
    const struct share *best_due = NULL;
    struct lane *best = NULL;

    *ret_wake_us = deadlines_next_us(&batcher->deadlines);
    for (struct lane *lane = batcher->lanes; lane; lane = lane->next) {
        uint64_t until_us;
        if (!lane->open) {
            if (lane->starved || lane->running.n + lane->n_waiting + lane->held.n == 0)
                continue;
            if (held_back(batcher, lane, now_us, &until_us)) {
                *ret_wake_us = MIN(*ret_wake_us, until_us);
                continue;
            }
        }
        if (!best || due_before(lane_due(lane), best_due)) {
            best = lane;
            best_due = lane_due(lane);
        }
    }
    batcher->engine_idle |= best == NULL;
    return best;
}

void batcher_charge(struct batcher *batcher, struct lane *lane, uint64_t us)
{
    (void)batcher;
    assert(lane->open);
    for (struct share *share = lane->shares; share; share = share->next) {
        double part = (double)us * (double)share->columns / lane->batch.n_columns;
        share->account->virtual_us += part;
        share->virtual_us += part;
        share->account->engine_us += (uint64_t)(part + 0.5);
    }
}

/* The open step is over: its jobs may leave, or be preempted, again. */
static void end_step(struct batcher *batcher, struct lane *lane)
{
    assert(lane->open);
    for (uint32_t i = 0; i < lane->batch.n_jobs; i++)
        lane->batch.jobs[i]->chunk = 0;
    for (struct share *share = lane->shares; share; share = share->next)
        share->columns = 0;
    lane->open = false;
    unstarve(batcher);
    forget_idle(batcher);
}

void batcher_close(struct batcher *batcher, struct lane *lane, uint64_t us)
{
    struct batch *batch = &lane->batch;
    double per_column = (double)us / batch->n_columns;

    assert(lane->open);
    batcher->last = lane;
    adaptive_note(&lane->adaptive, batch->n_columns, us);
    forecast_step(&lane->forecast, batch->n_columns, us);
    lane->us_per_column += AVERAGE_WEIGHT * (per_column - lane->us_per_column);
    if (lane->us_per_column < 0.01)
        lane->us_per_column = 0.01;
    for (uint32_t i = 0; i < batch->n_jobs; i++)
        batch->jobs[i]->fed += batch->jobs[i]->chunk;
    end_step(batcher, lane);
}

void batcher_abandon(struct batcher *batcher, struct lane *lane)
{
    end_step(batcher, lane);
}

void batcher_room_came(struct batcher *batcher)
{
    unstarve(batcher);
}

struct job *batcher_expired(struct batcher *batcher, uint64_t now_us)
{
    return deadlines_due(&batcher->deadlines, now_us);
}

struct job *batcher_refused(struct batcher *batcher)
{
    struct job *job = batcher->refused.head;

    if (job)
        batcher_remove(batcher, job);
    return job;
}

uint64_t batcher_uid_us(const struct batcher *batcher, uint32_t uid)
{
    const struct account *account = account_find(batcher, uid);

    return account ? account->engine_us : 0;
}

uint32_t batcher_n_waiting(const struct batcher *batcher)
{
    return batcher->n_waiting;
}

uint32_t batcher_n_running(const struct batcher *batcher)
{
    return batcher->n_running;
}

uint32_t batcher_n_parked(const struct batcher *batcher)
{
    return batcher->n_parked;
}

uint32_t batcher_n_held(const struct batcher *batcher)
{
    return batcher->n_held;
}

uint64_t batcher_held_ever(const struct batcher *batcher)
{
    return batcher->held_ever;
}

uint32_t batcher_width(const struct batcher *batcher, uint64_t *ret_narrowed, uint64_t *ret_widened)
{
    uint64_t narrowed = batcher->n_narrowed, widened = batcher->n_widened;

    for (const struct lane *lane = batcher->lanes; lane; lane = lane->next) {
        narrowed += lane->adaptive.n_narrowed;
        widened += lane->adaptive.n_widened;
    }
    *ret_narrowed = narrowed;
    *ret_widened = widened;
    return batcher->last ? batcher->last->adaptive.width : batcher->options.max_columns;
}
