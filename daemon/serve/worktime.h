/* Work time: how long a thread has been at work, and what that cost.
 *
 * While it is busy, and when that ends, three counters move on: the time that went by, the CPU time
 * the thread had of it, and the time it waited for a CPU. Both are read from the system rarely, as
 * reading costs more than a small step.
 *
 * Hides: the thread's CPU clock, /proc/thread-self/schedstat, where a busy stretch began.
 * Thread: the one that is counted. */
#ifndef HEARTH_SERVE_WORKTIME_H
#define HEARTH_SERVE_WORKTIME_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/metrics/metrics.h"

struct worktime {
    struct metrics *metrics;
    bool busy;
    uint64_t busy_since_us, cpu_at_us;
    int schedstat_fd; /* -1: the kernel keeps no such figures */
    uint64_t run_delay_at_ns;
};

/* The calling thread's, idle at first. */
void worktime_begin(struct worktime *worktime, struct metrics *metrics);
/* Whether it is at work from now on. True: the counters have just moved on. */
bool worktime_set(struct worktime *worktime, bool busy, uint64_t now_us);
void worktime_end(struct worktime *worktime);

#endif
