#include "daemon/model/pacer.h"

#include <time.h>

#include "lib/cleanup.h"

/* How often a resting thread looks whether steps still run. */
#define LOOK_US 1000u

static uint64_t clock_us(clockid_t id)
{
    struct timespec ts;

    clock_gettime(id, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

void pace_begin(struct pacer *pacer, struct pace *pace)
{
    pace->cpu_us = clock_us(CLOCK_THREAD_CPUTIME_ID);
    if (pacer->pulse)
        pulse_works(pacer->pulse, &pace->seen);
}

/* Rests one behind the other: when this thread's one is over. */
static uint64_t take_turn(struct pacer *pacer, uint64_t now, uint64_t rest_us)
{
    uint64_t free_at = atomic_load(&pacer->free_at_us), until;

    do
        until = MAX(free_at, now) + rest_us;
    while (!atomic_compare_exchange_weak(&pacer->free_at_us, &free_at, until));
    return until;
}

static void rest(struct pacer *pacer, struct pace *pace, uint64_t rest_us,
                 const _Atomic bool *cancel)
{
    uint64_t began = clock_us(CLOCK_MONOTONIC), now = began;
    uint64_t until = take_turn(pacer, now, rest_us);

    while (now < until && !atomic_load(cancel)) {
        struct timespec ts = {.tv_nsec = (long)MIN(until - now, (uint64_t)LOOK_US) * 1000};

        nanosleep(&ts, NULL);
        now = clock_us(CLOCK_MONOTONIC);
        if (!pulse_works(pacer->pulse, &pace->seen))
            break;
    }
    pace->rested_us += now - began;
    /* What is left of it is nobody's: the others need not wait for its end. */
    if (now < until)
        atomic_fetch_sub(&pacer->free_at_us, until - now);
}

void pace_keep(struct pacer *pacer, struct pace *pace, uint64_t load_us, const _Atomic bool *cancel)
{
    uint64_t cpu, used;

    if (!pacer->pulse || atomic_load(cancel))
        return;
    cpu = clock_us(CLOCK_THREAD_CPUTIME_ID);
    used = cpu - pace->cpu_us;
    if (used < PACER_SLICE_US)
        return;
    pace->cpu_us = cpu;
    if (pulse_works(pacer->pulse, &pace->seen))
        rest(pacer, pace,
             used * (load_us < PACER_PATIENCE_US ? PACER_REST_FIRST : PACER_REST_LATER), cancel);
}
