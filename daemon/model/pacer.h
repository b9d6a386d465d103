/* The pacer: lets loads that somebody waits for run beside the engine without being felt.
 *
 * A loading thread that has used a slice of CPU while steps run rests for a multiple of it; all
 * threads of a loader rest in turns, so that together they take one share of one CPU, however many
 * loads there are. A load that goes on for long rests less: its end is bounded, too. While no step
 * runs nobody rests.
 *
 * Hides the arithmetic. Threads: any; a `struct pace` belongs to one thread. */
#ifndef HEARTH_MODEL_PACER_H
#define HEARTH_MODEL_PACER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/engine/pulse.h"

/* CPU between two rests. */
#define PACER_SLICE_US 1000u
/* Rest for each microsecond of CPU: one eighth of a CPU at first, a quarter of one later. */
#define PACER_REST_FIRST  7u
#define PACER_REST_LATER  3u
#define PACER_PATIENCE_US 2000000u

struct pacer {
    const struct engine_pulse *pulse; /* NULL: nobody to step back for */
    _Atomic uint64_t free_at_us;      /* when the next rest may begin to count */
};

struct pace {
    uint64_t cpu_us;    /* of the thread, at its last rest */
    uint32_t seen;      /* of the pulse */
    uint64_t rested_us; /* in all */
};

/* A thread begins to work at a load. */
void pace_begin(struct pacer *pacer, struct pace *pace);
/* Between two pieces of a load that has gone on for `load_us`. Ends early once `cancel` is set. */
void pace_keep(struct pacer *pacer, struct pace *pace, uint64_t load_us,
               const _Atomic bool *cancel);

#endif
