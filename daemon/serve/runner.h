/* The runner: the engine thread.
 *
 * Takes requests from the reactor, lets the batcher compose steps, has the engine compute them
 * slice by slice, samples, and puts text and endings into the outbox. Owns every sequence and all
 * KV memory; a request is its own from runner_submit() to the RUNNER_ENDED or RUNNER_ASLEEP event.
 *
 * Hides the thread, its inbox and the order of work inside it.
 * Threads: all functions here are the reactor's, but for runner_beat(), which is anybody's. */
#ifndef HEARTH_SERVE_RUNNER_H
#define HEARTH_SERVE_RUNNER_H

#include <stdbool.h>
#include <stdint.h>

#include "lib/clock.h"
#include "daemon/engine/engine.h"
#include "daemon/metrics/metrics.h"
#include "daemon/serve/outbox.h"
#include "daemon/serve/request.h"

struct runner;
struct runner_model; /* a model as the engine thread knows it */

/* Events in the outbox. */
enum runner_event {
    RUNNER_TEXT,    /* subject: the request */
    RUNNER_ENDED,   /* subject: the request, which is the reactor's again */
    RUNNER_ASLEEP,  /* subject: one parked for park_timeout, which is the reactor's again */
    RUNNER_LATE,    /* subject: one handed back; a message about it came too late */
    RUNNER_WARMED,  /* subject: the runner_model; see runner_model_error() */
    RUNNER_REMOVED, /* subject: the runner_model, to be freed by runner_model_free() */
    RUNNER_SHRUNK,  /* subject: the runner_model */
};

struct runner_options {
    struct engine_options engine;
    uint32_t max_batch, min_batch;
    uint64_t max_delay_us, chunk_target_us;
    uint64_t adaptive_us; /* a step's time to aim at; 0: none */
    uint64_t kv_per_uid_bytes, park_timeout_us;
    bool prefix_cache;   /* keep and share the beginnings of texts */
    bool share_with_all; /* of all users; else each user's own */
    size_t max_requests; /* bound of requests lent at once (limits.queue) */
    struct metrics *metrics;
    const struct clock *clock;
};

/* Makes the engine and starts the thread. */
int runner_new(const struct runner_options *options, struct runner **ret_runner,
               struct fault *ret_fault);
/* Ends the thread, whatever it is at. Requests still lent are ended (CODE_SHUTTING_DOWN) and stay
 * the caller's, without an event; the runner_models there are go with it. Returns NULL. */
struct runner *runner_free(struct runner *runner);
struct outbox *runner_outbox(const struct runner *runner);
/* Moves whenever the thread does something; `ret_idle`: it has nothing to do and may stand still.
 */
uint64_t runner_beat(const struct runner *runner, bool *ret_idle);

/* Takes a loaded model over and runs one token through it, in slices between which others' steps go
 * on; RUNNER_WARMED says how that went. */
int runner_add_model(struct runner *runner, struct model *model, void *subject,
                     struct runner_model **ret_model);
/* Lets it go once its last request has ended: RUNNER_REMOVED, after RUNNER_WARMED. */
int runner_remove_model(struct runner *runner, struct runner_model *model);
/* Gives the activations of a model at rest back where they are more than that (whole pages), and it
 * still is: RUNNER_SHRUNK. Where there is no room for the message, they stay. */
void runner_shrink_model(struct runner *runner, struct runner_model *model, uint64_t kept_bytes);
void *runner_model_subject(const struct runner_model *model);
/* NULL: the warm-up step went well. Read after RUNNER_WARMED. */
const char *runner_model_error(const struct runner_model *model);
/* After RUNNER_REMOVED; the model itself stays the caller's. Returns NULL. */
struct runner_model *runner_model_free(struct runner_model *model);

/* Lends a request whose ids, model and stream are set, or again one that was asleep. -ENOBUFS. */
int runner_submit(struct runner *runner, struct request *request);
/* Asks for its end before the next step, once with each code; RUNNER_ENDED comes all the same.
 * CODE_CANCELLED: its own client's wish, the reason of its `done`; another code: its error. */
void runner_cancel(struct runner *runner, struct request *request, enum wire_code why);
/* Its stream was granted room while parked. */
void runner_unpark(struct runner *runner, struct request *request);

#endif
