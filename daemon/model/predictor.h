/* The predictor: which model will be wanted soon.
 *
 * A function of (what it was told, now). It is told of requests, of loads and of the budget, and
 * answers two questions: how wanted each model is (residency lets the least wanted per byte go
 * first), and which model to load now, before anybody asks. It learns how often each model is
 * asked for, what follows what (one and two steps back) and whether that comes soon; each of these
 * views is weighed by how well it foretold the last requests, so a change of habit shifts the
 * weights within a few requests.
 *
 * It doubts itself: four shadows, caches of numbers alone, live through the same requests: plain
 * LRU, its own order of eviction, that with predictions, and that with memory filled by the
 * likeliest set. Where its own ways do not cost less waiting than LRU's in the shadows, or did not
 * when they were tried, it has no say: the mode is LRU. Where they do, it orders evictions; where
 * predictions pay, it predicts, too; where there is no order to learn but some are asked for more
 * often, it fills.
 *
 * Bounded: PREDICTOR_MAX_MODELS models, of which the one longest unused makes place. Hides all
 * arithmetic. No clock, no files, no threads of its own; the reactor calls it. */
#ifndef HEARTH_MODEL_PREDICTOR_H
#define HEARTH_MODEL_PREDICTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/model/residency.h"

#define PREDICTOR_MAX_MODELS 256u

/* A prediction is right when its model is asked for within this time. */
#define PREDICTOR_WINDOW_US 60000000u

/* Requests for a model that come closer together than this are one. */
#define PREDICTOR_SAME_US 1000000u

enum predictor_mode {
    PREDICTOR_LRU,      /* no say: evictions are plain LRU, nothing is predicted */
    PREDICTOR_SILENT,   /* orders evictions, predicts nothing */
    PREDICTOR_PREDICTS, /* orders evictions and predicts what is likely to come next */
    PREDICTOR_FILLS,    /* keeps the likeliest set in memory, too */
};

/* More wanted than any estimate says: for what somebody has said will be used. */
#define PREDICTOR_SURELY 64.0

struct predictor;

int predictor_new(struct predictor **ret_predictor);
struct predictor *predictor_free(struct predictor *predictor);

/* What the shadows reckon with: room for models, and bytes a second of a load. */
void predictor_set_budget(struct predictor *predictor, uint64_t budget_bytes);
void predictor_set_rate(struct predictor *predictor, double bytes_per_s);

/* A model's number, the same until PREDICTOR_MAX_MODELS others have come; a new one gets one, or
 * -ENOMEM. */
int predictor_model(struct predictor *predictor, const char *name);
/* The same without making it known: -1 where it is not. And its name. */
int predictor_find(const struct predictor *predictor, const char *name);
const char *predictor_name(const struct predictor *predictor, uint32_t model);
/* What it takes in memory. */
void predictor_set_bytes(struct predictor *predictor, uint32_t model, uint64_t bytes);
/* Whether it may be predicted: true at first. */
void predictor_set_predictable(struct predictor *predictor, uint32_t model, bool predictable);

/* With nobody heeding it, it cannot prove itself: it chooses its mode by its shadows alone. */
void predictor_set_dry_run(struct predictor *predictor, bool dry_run);
/* A new life begins after what it was told: nothing is loaded, and what comes follows nothing. */
void predictor_restart(struct predictor *predictor);

/* It has left memory, and not to make room: neither has any shadow it any more. */
void predictor_left(struct predictor *predictor, uint32_t model);

/* A request for it comes in and finds it ready, or not. True: it was counted, and what is wanted
 * has changed; false: it belongs to the one before. */
bool predictor_request(struct predictor *predictor, uint32_t model, bool ready, uint64_t now_us);

/* How wanted it is, for `struct resident` and `struct newcomer`. */
double predictor_wanted(const struct predictor *predictor, uint32_t model);
/* The same for a newcomer that nobody has asked for yet: a little less, so that two models about
 * equally wanted do not drive each other out. */
double predictor_worth(const struct predictor *predictor, uint32_t model);
enum predictor_mode predictor_mode(const struct predictor *predictor);
enum residency_order predictor_order(const struct predictor *predictor);

/* The likeliest model that is worth loading before it is asked for, each once after a request;
 * `loaded` says which are there or on their way. -1: none. Call again until it says so. It counts
 * as proposed: whether it is loaded is the caller's. */
int predictor_next(struct predictor *predictor, const bool *loaded, uint64_t now_us);

/* For measuring: replaces what was learned by the truth. `matrix[a * n + b]`: how likely model b
 * follows model a, both by number below n. The caller's, as long as it is told; NULL: no more. */
void predictor_tell(struct predictor *predictor, const float *matrix, uint32_t n);

#endif
