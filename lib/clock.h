/* The clock: where everything that waits or measures gets its time.
 *
 * Hides whether time is real or virtual, so that batcher, residency and predictor run in tests and
 * simulations at any speed. Microseconds of a monotonic clock; only differences mean something.
 * Thread: any (a virtual clock belongs to its test). */
#ifndef HEARTH_LIB_CLOCK_H
#define HEARTH_LIB_CLOCK_H

#include <stdint.h>
#include <time.h>

struct clock {
    uint64_t (*now_us)(const struct clock *clock);
};

static inline uint64_t clock_now_us(const struct clock *clock)
{
    return clock->now_us(clock);
}

/* A `now_us` over CLOCK_MONOTONIC. */
static inline uint64_t clock_monotonic_us(const struct clock *clock)
{
    struct timespec ts;
    (void)clock;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

#endif
