/* Interleaved pairs: two ways of doing something, measured in turn, compared by the ratio of each
 * pair, so that what the machine does meanwhile falls on both.
 *
 * The interval of the median is free of any distribution: the k-th smallest and the k-th largest
 * ratio, k as large as at least 95 % allow (10 pairs: the second of each end; 20: the sixth). Under
 * six pairs there is no such k: then it is all of them, and `confidence` says what that is worth.
 *
 * Thread: pure. */
#ifndef HEARTH_BENCH_PAIRS_H
#define HEARTH_BENCH_PAIRS_H

#include <stddef.h>
#include <stdint.h>

#define PAIRS_MAX 1000u

struct pairs {
    double *ratios;
    size_t n, capacity;
};

struct pairs_summary {
    double median, low, high;
    double confidence; /* that the true median lies from low to high */
    size_t n;
};

/* One pair: `after` / `before`. A pair with a `before` of nothing has no ratio and is left out.
 * -ENOMEM; -E2BIG beyond PAIRS_MAX. */
int pairs_add(struct pairs *pairs, double before, double after);
/* All zero but the ratio 1, with n = 0, when there is no pair. */
struct pairs_summary pairs_summary(const struct pairs *pairs);
void pairs_done(struct pairs *pairs);

/* Of `n` values, which are put in order; 0 when there are none. */
double median_of(double *values, size_t n);

#endif
