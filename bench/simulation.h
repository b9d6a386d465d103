/* A simulation: one policy lives through a trace in virtual time.
 *
 * One disk reads at a rate, one load at a time; a load that a request waits for goes before a
 * predicted one, which goes on afterwards. The policies `hearth` and `informed` are the daemon's
 * own predictor and residency; nothing of them is written twice here.
 *
 * Hides the clock, the disk and the memory. */
#ifndef HEARTH_BENCH_SIMULATION_H
#define HEARTH_BENCH_SIMULATION_H

#include "bench/trace.h"

enum policy {
    POLICY_NONE,        /* keeps the model used last, alone */
    POLICY_LRU,         /* loads when asked, evicts the least recently used */
    POLICY_HEARTH,      /* the daemon's */
    POLICY_INFORMED,    /* the same, told how likely each model follows each */
    POLICY_CLAIRVOYANT, /* knows the future: loads what comes next, evicts what comes last per byte
                         */
    _POLICY_MAX,
};

struct outcome {
    size_t requests, hits;
    size_t predicted, predicted_used, wasted;
    double cost_s;
};

const char *policy_name(enum policy policy);
/* `asked`: NULL, or where an adaptive trace's models are written. -ENOMEM. */
int simulate(const struct trace *trace, enum policy policy, uint32_t *asked,
             struct outcome *ret_outcome);

/* Memory that the policies have, bytes. */
uint64_t simulation_budget(const struct trace *trace);

#endif
