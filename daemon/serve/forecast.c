#include "daemon/serve/forecast.h"

#include "lib/cleanup.h"

/* How much of the difference an average takes over. `least` follows what is lower fast and what is
 * higher slowly: about one in fifteen is lower. */
#define FORGET     0.01
#define AVERAGE    0.1
#define FURTHER    0.75
#define LEAST_DOWN 0.3
#define LEAST_UP   0.02

static uint32_t class_of(uint64_t columns)
{
    uint32_t class = 63u - (uint32_t)__builtin_clzll(columns);

    return MIN(class, FORECAST_CLASSES - 1);
}

static void follow_least(double *least, double value)
{
    *least += (value < *least ? LEAST_DOWN : LEAST_UP) * (value - *least);
}

void forecast_step(struct forecast *forecast, uint32_t columns, uint64_t us)
{
    uint32_t class = class_of(columns);
    double *best = &forecast->us_per_column[class], *mean = &forecast->columns[class];
    double per_column = (double)MAX(us, (uint64_t)1) / columns;

    *mean += *best == 0 ? columns : AVERAGE * (columns - *mean);
    if (*best == 0 || per_column < *best)
        *best = per_column;
    else
        *best += FORGET * (per_column - *best);
    forecast->n_steps += forecast->n_steps < FORECAST_MIN_STEPS;
}

void forecast_begin(struct forecast *forecast, uint32_t prompt, uint32_t computed)
{
    follow_least(&forecast->least_fresh, (double)(prompt - computed) / prompt);
}

void forecast_end(struct forecast *forecast, uint32_t tokens)
{
    follow_least(&forecast->least_tokens, tokens);
}

/* What a column more costs around the widest class that was measured, from the next narrower one
 * that has at most half the columns; 0: there is none. */
static double further_column_us(const struct forecast *forecast, uint32_t top)
{
    double columns = forecast->columns[top], us = forecast->us_per_column[top] * columns;

    for (uint32_t i = top; i-- > 0;) {
        double fewer = forecast->columns[i];
        if (forecast->us_per_column[i] > 0 && 2 * fewer <= columns)
            return MAX(0.0, (us - forecast->us_per_column[i] * fewer) / (columns - fewer));
    }
    return 0;
}

double forecast_column_us(const struct forecast *forecast, uint32_t widest)
{
    double best = 0, us;
    uint32_t top = 0;

    if (forecast->n_steps < FORECAST_MIN_STEPS)
        return 0;
    for (uint32_t i = 0; i < FORECAST_CLASSES; i++) {
        double per_column = forecast->us_per_column[i];
        if (per_column == 0)
            continue;
        if (best == 0 || per_column < best)
            best = per_column;
        top = i;
    }
    if (widest > forecast->columns[top]) {
        us = forecast->us_per_column[top] * forecast->columns[top] +
             FURTHER * further_column_us(forecast, top) * (widest - forecast->columns[top]);
        best = MIN(best, us / widest);
    }
    return best;
}

uint64_t forecast_us(const struct forecast *forecast, uint64_t columns, uint32_t widest)
{
    double us = forecast_column_us(forecast, widest) * (double)columns;

    if (us == 0)
        return 0;
    /* A step of a class takes at least what its narrowest does at the best rate of the class. */
    for (uint32_t i = class_of(columns) + 1; i-- > 0;)
        if (forecast->us_per_column[i] > 0)
            return (uint64_t)MAX(us, forecast->us_per_column[i] * (double)(1u << i));
    return (uint64_t)us;
}
