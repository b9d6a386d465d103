/* A log-linear histogram of microseconds: each power of two in 64 equal steps, so that a percentile
 * is off by less than 1.6 %. Hides the bucket arithmetic. Thread: the owner's. */
#ifndef HEARTH_BENCH_HISTOGRAM_H
#define HEARTH_BENCH_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_STEPS   64u
#define HISTOGRAM_BUCKETS (HISTOGRAM_STEPS * 34u) /* up to 2^39 us */

struct histogram {
    uint64_t count, max_us;
    double sum_us;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *histogram, uint64_t us);
void histogram_merge(struct histogram *histogram, const struct histogram *other);
/* The value that `percent` of the values do not exceed (a bucket's upper end); 0 when empty. */
double histogram_percentile(const struct histogram *histogram, double percent);
/* How many values lie in buckets that end at or below `us`. */
uint64_t histogram_count_to(const struct histogram *histogram, double us);

#endif
