/* The batcher: composes the next engine step from what waits now.
 *
 * Continuous and work-conserving: jobs join and leave between steps, an idle engine starts at once
 * with what is there. Every model has a lane; a lane's running jobs (at most max_batch) are all
 * advanced by its next step, waiting ones join when a place and KV memory are free, or when a job
 * that runs must yield its place. Between lanes and between users the order is engine time: whoever
 * had least goes on, and a step is charged to its users by the columns they had in it. Within a
 * user: priority, then arrival.
 *
 * A function of (state, now): it reads no clock, allocates only per lane and per user, and knows
 * nothing of sockets, models or text, so that tests run it in virtual time. KV memory is asked for
 * through `admit` and `grow`, and taken back through batcher_preempt(). A user whose job was denied
 * memory for a second stands before all others for the next: nobody else begins meanwhile.
 *
 * Hides: the queues, the fair shares, the size of prompt chunks. Thread: the engine thread. */
#ifndef HEARTH_SERVE_BATCHER_H
#define HEARTH_SERVE_BATCHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BATCHER_PRIORITIES 2u

/* So long others may get KV memory while a user's first job for a model is denied it. */
#define BATCHER_PATIENCE_US 1000000u

struct batcher;
struct lane;
struct share;

enum job_state {
    JOB_IDLE,    /* not with the batcher */
    JOB_WAITING, /* for a place in the batch, or for KV memory */
    JOB_RUNNING, /* advanced by every step of its lane, until it ends or yields its place */
    JOB_HELD,    /* for what another job of its lane computes, and it could share */
    JOB_PARKED,  /* its reader takes nothing; not computed */
    JOB_REFUSED, /* can never run; waits to be handed out by batcher_refused() */
};

/* The least time that a job will take to its first token; all 0: nobody knows. */
struct foreseen {
    uint64_t wait_us; /* work before it in the order of service: its own user's, and of others what
                       * they are due meanwhile */
    uint64_t own_us;  /* its prompt and the step that gives its first token */
};

/* What the batcher knows of a request; embedded in it. */
struct job {
    /* Set by the submitter. */
    struct lane *lane;
    uint32_t uid;
    uint32_t priority; /* 0 interactive .. BATCHER_PRIORITIES - 1 */
    uint64_t arrived_us;
    uint64_t deadline_us;  /* absolute; 0: none */
    uint32_t known;        /* tokens known: the prompt, and each that was sampled */
    uint32_t least_prompt; /* tokens of its prompt that no kept beginning can spare it */
    uint32_t most_tokens;  /* that it may generate */
    uint32_t room;         /* tokens it has KV memory for; set by `admit` and `grow` */
    /* The batcher's. */
    uint32_t fed;   /* of these, computed */
    uint32_t chunk; /* columns in the open step; 0: not in it */
    enum job_state state;
    bool admitted;   /* has its KV memory */
    uint64_t serial; /* in the order of arrival, from 1; stays when it is added again */
    uint32_t prompt; /* tokens known when it came */
    uint32_t foreseen_prompt, foreseen_tokens; /* while it waits: to be computed nearly at least */
    struct foreseen foreseen;                  /* JOB_REFUSED for its deadline: the numbers */
    struct share *share;
    struct job *previous, *next;
    size_t heap_index; /* place among the deadlines + 1; 0: none */
};

struct batcher_options {
    uint32_t max_batch;
    uint32_t min_batch; /* wait for so many, at most max_delay_us */
    uint64_t max_delay_us;
    uint64_t chunk_target_us; /* bound of a step by predicted time */
    uint32_t max_columns;     /* bound of a step by the engine's memory */
    uint64_t adaptive_us;     /* a step's time to aim at; 0: none. See adaptive.h */
    /* Gives a job its KV memory, and sets its `fed` where a beginning is there already: 0, -EAGAIN
     * (not now), -EBUSY (another job, running in its lane, computes what it could have: it is held
     * until `ready` says so), -EDQUOT (not now: its user has all he may have), or another error,
     * which the batcher keeps in no form: the callee has noted it, and the job is handed out by
     * batcher_refused(). It may preempt jobs that are in no open step, and so may `grow`. */
    int (*admit)(void *userdata, struct job *job);
    /* Whether a held job may be admitted now; only asked of those. */
    bool (*ready)(void *userdata, const struct job *job);
    /* Makes the room of a running job reach what it knows. Negative: not now, and the job is left
     * out of this step; it may have been preempted itself. NULL: `admit` gives each job all it will
     * ever need. */
    int (*grow)(void *userdata, struct job *job);
    void *userdata;
};

/* Why a step was dispatched when it was; the first that holds of FULL, the three of waiting, IDLE,
 * GATHERED, CONTINUED. */
enum batch_reason {
    BATCH_IDLE,      /* the engine had nothing to do: what came starts at once */
    BATCH_GATHERED,  /* jobs came, or found room, while other work ran */
    BATCH_CONTINUED, /* the same jobs go on */
    BATCH_FULL,      /* every place was taken */
    BATCH_MIN_BATCH, /* it waited for company: enough came */
    BATCH_MAX_DELAY, /* it waited for company: max_delay_us ran out */
    BATCH_DEADLINE,  /* it waited for company: a deadline could bear no more */
    _BATCH_REASON_MAX,
};

struct batch {
    struct job **jobs; /* their chunk says how many columns each has */
    uint32_t n_jobs;
    uint32_t n_columns;
    uint32_t n_runnable; /* jobs that ran or waited, at most max_batch; without those that are held
                          * or have been denied the KV memory they need */
    enum batch_reason reason;
};

int batcher_new(const struct batcher_options *options, struct batcher **ret_batcher);
/* Jobs and lanes must be gone. Returns NULL. */
struct batcher *batcher_free(struct batcher *batcher);

/* A model's lane; `subject` is the caller's. */
int lane_new(struct batcher *batcher, void *subject, struct lane **ret_lane);
struct lane *lane_free(struct lane *lane); /* no jobs left */
void *lane_subject(const struct lane *lane);

/* Hands a job in (JOB_IDLE, the submitter's fields set). -ENOMEM. */
int batcher_add(struct batcher *batcher, struct job *job);
/* Takes it out, in whatever state. Not while it is in the open step (chunk != 0). */
void batcher_remove(struct batcher *batcher, struct job *job);
/* Not computed until batcher_unpark(). */
void batcher_park(struct batcher *batcher, struct job *job);
void batcher_unpark(struct batcher *batcher, struct job *job);

/* Its KV memory was taken: it is computed from its first token when it has some again. One that was
 * running waits, in the order of arrival. Not while it is in the open step. */
void batcher_preempt(struct batcher *batcher, struct job *job);
/* Whether a job of another user waits for memory or a place. */
bool batcher_others_wait(const struct batcher *batcher, uint32_t uid);

/* The lane to work on now: one whose step is open, or that has a step to compose. NULL: nothing to
 * do before *ret_wake_us (UINT64_MAX: before something is added). */
struct lane *batcher_pick(struct batcher *batcher, uint64_t now_us, uint64_t *ret_wake_us);
bool lane_step_open(const struct lane *lane);
/* The batch of the open step. */
const struct batch *batcher_batch(const struct lane *lane);
/* Opens the lane's next step; the batch is valid until the step ends. False: nothing to run (all
 * that waits, waits for KV memory). */
bool batcher_compose(struct batcher *batcher, struct lane *lane, uint64_t now_us,
                     const struct batch **ret_batch);
/* A slice of the lane's open step took `us`: its users are charged. */
void batcher_charge(struct lane *lane, uint64_t us);
/* The step is done: `fed` of its jobs moves on. `us`: the step's whole time, for prediction. */
void batcher_close(struct batcher *batcher, struct lane *lane, uint64_t us);
/* The step came to nothing: its jobs have computed nothing, and nothing is learnt from it. */
void batcher_abandon(struct batcher *batcher, struct lane *lane);
/* KV memory has come free by something else than a job: lanes that found none look again. */
void batcher_room_came(struct batcher *batcher);

/* Part of what is foreseen that a deadline is given beyond: what was measured need not hold. */
#define FORESEEN_SLACK 4u

/* What is foreseen of a job that has just been added. */
struct foreseen batcher_foresee(const struct job *job);
/* Whether that clearly cannot be in time: all of it less a FORESEEN_SLACK-th is more than the time
 * that is left. Jobs that are late by their own prompt alone, once what is there of it is known,
 * come out by batcher_refused(). */
bool foreseen_late(const struct foreseen *foreseen, uint64_t deadline_us, uint64_t now_us);

/* A job whose deadline has passed and that is in no open step, or NULL. Still the batcher's. */
struct job *batcher_expired(struct batcher *batcher, uint64_t now_us);
/* A job that `admit` refused for good, or that is late (its `foreseen` is not all 0), or NULL. It
 * is JOB_IDLE now. */
struct job *batcher_refused(struct batcher *batcher);

/* Jobs by state, over all lanes; held ones wait. */
uint32_t batcher_n_waiting(const struct batcher *batcher);
uint32_t batcher_n_running(const struct batcher *batcher);
uint32_t batcher_n_parked(const struct batcher *batcher);
/* Of those that wait, the held ones; and how often a job has been held so far. */
uint32_t batcher_n_held(const struct batcher *batcher);
uint64_t batcher_held_ever(const struct batcher *batcher);
/* Columns that the lane which ran last may have in a step, and how often a lane's were changed. */
uint32_t batcher_width(const struct batcher *batcher, uint64_t *ret_narrowed,
                       uint64_t *ret_widened);

#endif
