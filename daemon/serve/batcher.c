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

void job_wait(struct batcher *batcher, struct job *job)
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

void share_deny(struct batcher *batcher, struct share *share, bool own, uint64_t now_us)
{
    share->passed_over = true;
    share->denied_own = own;
    if (share->denied_us)
        return;
    share->denied_us = MAX(now_us, 1u);
    batcher->n_denied++;
}

void share_grant(struct batcher *batcher, struct share *share)
{
    if (share->denied_us)
        batcher->n_denied--;
    share->denied_us = 0;
}

/* Takes the job out of the list it is in. */
void job_leave(struct batcher *batcher, struct job *job)
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

/* A job that left its list and can never run: it stays with the batcher until it is handed out. */
void job_refuse(struct batcher *batcher, struct job *job)
{
    job->state = JOB_REFUSED;
    list_append(&batcher->refused, job);
}

/* A job that left its list waits for what another one computes. */
void job_hold(struct batcher *batcher, struct job *job)
{
    job->state = JOB_HELD;
    list_append(&job->lane->held, job);
    batcher->n_waiting++;
    batcher->n_held++;
    batcher->held_ever++;
}

/* A waiting job that has its KV memory runs. */
void job_run(struct batcher *batcher, struct job *job)
{
    share_activate(job->share);
    job_leave(batcher, job);
    job->state = JOB_RUNNING;
    list_insert_running(&job->lane->running, job);
    job->share->n_running[job->priority]++;
    batcher->n_running++;
}

/* A running job waits from now on, with all that it has. Its user is busy all the time: he is not
 * one that comes back. */
void job_yield(struct batcher *batcher, struct job *job)
{
    share_activate(job->share);
    job_leave(batcher, job);
    job_wait(batcher, job);
    share_deactivate(job->share);
}

int batcher_add(struct batcher *batcher, struct job *job)
{
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

void batcher_unpark(struct batcher *batcher, struct job *job)
{
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

/* ---- steps ---- */

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
            if (lane_held_back(batcher, lane, now_us, &until_us)) {
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

void batcher_charge(struct lane *lane, uint64_t us)
{
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
