/* What the files of the batcher share: the queues, the fair shares and their bookkeeping
 * (batcher.c), who is in the next step (batcher_compose.c), and what is foreseen from them
 * (foresight.c). */
#ifndef HEARTH_SERVE_BATCHER_INTERNAL_H
#define HEARTH_SERVE_BATCHER_INTERNAL_H

#include "daemon/serve/adaptive.h"
#include "daemon/serve/batcher.h"
#include "daemon/serve/deadlines.h"
#include "daemon/serve/forecast.h"

/* Least columns that a step has for prompts, however slow the model and however many generate: one
 * KV page. */
#define MIN_CHUNK_COLUMNS 16u

struct job_list {
    struct job *head, *tail;
    uint32_t n;
};

/* What is foreseen of the jobs in a list: tokens of prompts to be computed, and how many jobs will
 * generate nothing, 1, 2..3, 4..7, ... tokens. */
#define WORK_CLASSES 16u

struct work {
    uint64_t prompts;
    uint32_t by_tokens[WORK_CLASSES];
};

static inline uint32_t work_class(uint32_t tokens)
{
    uint32_t class = tokens ? 32u - (uint32_t)__builtin_clz(tokens) : 0;

    return class < WORK_CLASSES ? class : WORK_CLASSES - 1;
}

/* One user's engine time over all lanes. One without jobs that stands no higher than the batcher's
 * floor says nothing that a new one would not, and is forgotten; so is a share in the same case. */
struct account {
    uint32_t uid;
    uint64_t engine_us; /* charged, ever */
    double virtual_us;  /* the same, raised to the others' when the user comes back from idle */
    uint32_t n_active;  /* jobs waiting or running */
    uint32_t n_waiting; /* of these, waiting */
    double floor_us;    /* what its shares come back at, as the batcher's for accounts */
    struct share *shares;
    struct account *next;
};

/* One user's waiting jobs in one lane. */
struct share {
    struct lane *lane;
    struct account *account;
    struct job_list waiting[BATCHER_PRIORITIES];
    struct work work[BATCHER_PRIORITIES]; /* of those that wait */
    uint32_t n_jobs;                      /* in whatever state */
    uint32_t n_active;                    /* of these, waiting or running */
    uint32_t n_running[BATCHER_PRIORITIES];
    double virtual_us;     /* engine time, as the account's: decides between one user's models */
    uint64_t columns;      /* in the open step; while composing, those that are planned */
    struct job *cursor;    /* while composing: the running jobs before it have been looked at */
    bool passed_over;      /* while composing: nobody of it is admitted any more */
    bool settled;          /* while composing: nobody of it gets a place any more */
    uint64_t denied_us;    /* its first job has been denied memory since then; 0: it has not */
    bool denied_own;       /* because of what its own user holds */
    struct share *next;    /* in its lane */
    struct share *sibling; /* of its account */
};

struct lane {
    struct batcher *batcher;
    void *subject;
    struct share *shares;
    struct job_list running, held;
    uint32_t n_waiting, n_jobs;
    double us_per_column;
    struct adaptive adaptive;
    struct forecast forecast;
    bool open;
    bool starved;      /* nothing could be composed: KV memory is out until something leaves */
    bool kept_waiting; /* the next step has waited for company */
    enum batch_reason company; /* what ends that waiting, if not company */
    struct batch batch;
    struct lane *next;
};

struct batcher {
    struct batcher_options options;
    struct account *accounts;
    double floor_us; /* the most that the least virtual_us of those at work has been: what a user
                      * who comes, or comes back, starts at */
    uint32_t n_idle; /* shares without jobs and accounts without shares */
    struct lane *lanes;
    struct job_list refused;
    struct deadlines deadlines;
    uint64_t n_added;
    uint32_t n_denied; /* shares that have been denied memory */
    uint32_t n_waiting, n_running, n_parked, n_held;
    uint64_t held_ever;
    uint64_t n_narrowed, n_widened; /* widths of lanes that are gone */
    const struct lane *last;        /* whose step was closed last; NULL: none, or it is gone */
    bool engine_idle;               /* nothing could be done when it was last asked for */
};

/* What becomes of a job; of one that left the queue it was in: */
void job_leave(struct batcher *batcher, struct job *job);
/* it waits for a place or for KV memory; */
void job_wait(struct batcher *batcher, struct job *job);
/* it waits for what another one computes; */
void job_hold(struct batcher *batcher, struct job *job);
/* it can never run, and stays with the batcher until it is handed out. */
void job_refuse(struct batcher *batcher, struct job *job);
/* One that waits runs; one that runs waits again, with all that it has. */
void job_run(struct batcher *batcher, struct job *job);
void job_yield(struct batcher *batcher, struct job *job);

/* The share's first job is denied KV memory, by what its own user holds or by all; or no more. */
void share_deny(struct batcher *batcher, struct share *share, bool own, uint64_t now_us);
void share_grant(struct batcher *batcher, struct share *share);

/* Whether the lane's next step waits for company: fewer jobs than min_batch, and its time has not
 * come. */
bool lane_held_back(const struct batcher *batcher, struct lane *lane, uint64_t now_us,
                    uint64_t *ret_until_us);

/* The order of one user's jobs: by priority, then by arrival. */
static inline bool job_goes_before(const struct job *a, const struct job *b)
{
    return a->priority < b->priority || (a->priority == b->priority && a->serial < b->serial);
}

/* For tests: the lane's jobs, in whatever state, and the engine time charged to a user since he is
 * known, in microseconds; 0: he is not. */
uint32_t lane_n_jobs(const struct lane *lane);
uint64_t batcher_uid_us(const struct batcher *batcher, uint32_t uid);

/* Columns that a step of the lane may have now. */
uint32_t lane_column_budget(const struct lane *lane);
/* Jobs of it that may run at once. */
uint32_t lane_places(const struct lane *lane);

/* The same as batcher_foresee() of a job that has just been given its memory: what is there of its
 * prompt is known, and who is before it runs. */
struct foreseen foresee_begun(const struct job *job);

#endif
