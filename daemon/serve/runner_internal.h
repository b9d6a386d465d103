/* What the files of the runner share: the thread and what comes to it (runner.c), requests
 * (runner_requests.c), models (runner_models.c), and steps (runner_steps.c).
 *
 * Threads: all functions here are the engine thread's, and whoever has joined it. */
#ifndef HEARTH_SERVE_RUNNER_INTERNAL_H
#define HEARTH_SERVE_RUNNER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "daemon/queue.h"
#include "daemon/serve/pressure.h"
#include "daemon/serve/runner.h"
#include "daemon/serve/worktime.h"
#include "lib/fault.h"

struct runner_model {
    /* Reactor's throughout. */
    struct runner *runner;
    struct runner_model *previous, *next; /* all that are not freed */
    void *subject;
    /* Read by both. */
    struct model *model;
    /* The engine thread's until RUNNER_REMOVED. */
    struct lane *lane;
    uint32_t context_tokens; /* its own, or what the KV budget gives */
    struct step_row *rows;   /* max_batch of them, for the open step */
    uint64_t step_us;        /* of the open step so far */
    uint64_t weight_passes;  /* counted so far */
    uint32_t n_requests;     /* lent and not ended, parked and flushing ones included */
    bool removing;
    bool warming;                    /* RUNNER_WARMED is still to come */
    struct runner_model *warms_next; /* its turn to warm comes after this one's */
    struct step_row warm_row;        /* of its first step, while that is open */
    int32_t warm_id;
    char error[FAULT_TEXT_BYTES];
};

struct runner {
    struct runner_options options;
    struct engine *engine;
    struct batcher *batcher;
    struct pressure *pressure;
    struct queue *inbox;
    struct outbox *outbox;
    struct sampler_scratch *scratch;
    pthread_t thread;
    struct runner_model *models; /* the reactor's */
    bool stopping;
    uint32_t n_requests;
    struct request *lent; /* so many, in no order */
    /* Models whose first step is to be computed, one after the other; and how much more of the
     * engine's time they have had than others' steps, since anybody waits for either. */
    struct runner_model *warming;
    uint64_t warm_ahead_us;
    _Atomic uint64_t beat;
    _Atomic bool idle;
    struct worktime worktime;
};

static inline uint64_t runner_now_us(const struct runner *runner)
{
    return clock_now_us(runner->options.clock);
}

/* ---- requests ---- */

/* The messages of one. */
void runner_take(struct runner *runner, struct request *request);
void runner_take_cancel(struct runner *runner, struct request *request, enum wire_code why);
void runner_take_unpark(struct runner *runner, struct request *request);

/* Moves the text that may go into the outbox, and hands the request back when that was all. True:
 * there was text. */
bool runner_pump(struct runner *runner, struct request *request);
/* Its stream has no room: it waits for its reader, from now on. */
void runner_park(struct runner *runner, struct request *request);
/* The stream could not take a text: -ENOMEM or -EILSEQ. */
void runner_fail_stream(struct request *request, int error);
/* Nothing more is computed for the request. */
void runner_finish(struct runner *runner, struct request *request);
void runner_finish_with(struct runner *runner, struct request *request, enum end_reason reason);

/* Ends those that can never run or whose deadline has passed. */
void runner_refuse_and_expire(struct runner *runner, uint64_t now);
/* Hands back those whose readers have been away for long; when there may be one next. */
uint64_t runner_put_to_sleep(struct runner *runner, uint64_t now);

/* As in batcher_options. */
int runner_admit_kv(void *userdata, struct job *job);
bool runner_prefix_ready(void *userdata, const struct job *job);
int runner_grow_kv(void *userdata, struct job *job);

/* ---- models ---- */

/* The messages of one. */
void runner_take_model(struct runner *runner, struct runner_model *rm);
void runner_drop_model(struct runner *runner, struct runner_model *rm);
void runner_shrink(struct runner *runner, struct runner_model *rm, uint64_t kept_bytes);
/* A model that is to go may, if nothing of it is left. */
void runner_let_model_go(struct runner *runner, struct runner_model *rm);
/* The next slice of the first step of the model whose turn it is. */
void runner_warm(struct runner *runner, uint64_t now);
/* Nobody wants its first step any more. */
void runner_warm_abandon(struct runner *runner, struct runner_model *rm);

/* ---- steps ---- */

/* One slice of the lane's step, which is composed and begun where none is open. */
void runner_work(struct runner *runner, struct lane *lane, uint64_t now);

#endif
