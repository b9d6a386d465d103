#include "daemon/serve/adaptive.h"

#include <assert.h>

#include "lib/cleanup.h"

/* Within this share of the target a step is as long as it should be. */
#define TOLERANCE 0.1

/* Steps in a row on one side before anything changes. */
#define STEPS_TO_CHANGE 2u

/* Bounds of one change. */
#define LEAST_FACTOR 0.5
#define MOST_FACTOR  1.25

void adaptive_init(struct adaptive *adaptive, uint64_t target_us, uint32_t least, uint32_t most)
{
    assert(least > 0 && least <= most);
    *adaptive =
        (struct adaptive){.target_us = target_us, .least = least, .most = most, .width = most};
}

static void narrow(struct adaptive *adaptive, uint32_t columns, double factor)
{
    /* A step narrower than the width that still took too long: the width is beyond use. */
    uint32_t from = MIN(columns, adaptive->width);
    uint32_t width = MAX((uint32_t)(from * MAX(factor, LEAST_FACTOR)), adaptive->least);

    if (width >= adaptive->width)
        return;
    adaptive->width = width;
    adaptive->n_narrowed++;
}

static void widen(struct adaptive *adaptive, double factor)
{
    uint32_t width = (uint32_t)(adaptive->width * MIN(factor, MOST_FACTOR));

    width = MIN(MAX(width, adaptive->width + 1), adaptive->most);
    if (width <= adaptive->width)
        return;
    adaptive->width = width;
    adaptive->n_widened++;
}

void adaptive_note(struct adaptive *adaptive, uint32_t columns, uint64_t us)
{
    double ratio;

    if (adaptive->target_us == 0 || columns == 0)
        return;
    ratio = (double)adaptive->target_us / (double)MAX(us, (uint64_t)1);
    if (ratio < 1 / (1 + TOLERANCE)) {
        adaptive->n_under = 0;
        if (++adaptive->n_over >= STEPS_TO_CHANGE)
            narrow(adaptive, columns, (1 + ratio) / 2);
    } else if (ratio > 1 / (1 - TOLERANCE) && columns >= adaptive->width) {
        adaptive->n_over = 0;
        if (++adaptive->n_under >= STEPS_TO_CHANGE)
            widen(adaptive, (1 + ratio) / 2);
    } else {
        adaptive->n_over = adaptive->n_under = 0;
    }
}
