/* The pulse: whether the engine computes, for those who would rather step back while it does.
 *
 * The engine thread writes one word at the beginning and the end of each slice; anybody reads it.
 * Odd: a slice runs. A reader that looks twice knows from a change, too, that steps run, though it
 * may have looked between two slices. Relaxed throughout: it guards nothing, it is a hint. */
#ifndef HEARTH_ENGINE_PULSE_H
#define HEARTH_ENGINE_PULSE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct engine_pulse {
    _Atomic uint32_t beat;
};

/* The engine thread, at each end of a slice; NULL is allowed. */
static inline void pulse_beat(struct engine_pulse *pulse)
{
    if (pulse)
        atomic_store_explicit(&pulse->beat,
                              atomic_load_explicit(&pulse->beat, memory_order_relaxed) + 1,
                              memory_order_relaxed);
}

/* Whether the engine is at work or has been since the look before, which *seen keeps. */
static inline bool pulse_works(const struct engine_pulse *pulse, uint32_t *seen)
{
    uint32_t beat = atomic_load_explicit(&pulse->beat, memory_order_relaxed);
    bool works = beat % 2 == 1 || beat != *seen;

    *seen = beat;
    return works;
}

#endif
