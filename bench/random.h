/* Chance for what is made up: models, prompts, traces. The same state gives the same numbers on
 * every machine. Hides nothing. Thread: whoever has the state. */
#ifndef HEARTH_BENCH_RANDOM_H
#define HEARTH_BENCH_RANDOM_H

#include <stdint.h>

/* Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): a counter and a mixing function. */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;

    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

#endif
