#include "bench/histogram.h"

static uint32_t bucket_of(uint64_t us)
{
    uint32_t exponent, bucket;

    if (us < HISTOGRAM_STEPS)
        return (uint32_t)us;
    exponent = 63u - (uint32_t)__builtin_clzll(us); /* >= 6 */
    bucket = (exponent - 5u) * HISTOGRAM_STEPS +
             (uint32_t)((us >> (exponent - 6u)) & (HISTOGRAM_STEPS - 1));
    return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

static double bucket_end(uint32_t bucket)
{
    uint32_t power = bucket / HISTOGRAM_STEPS, step = bucket % HISTOGRAM_STEPS;

    if (power == 0)
        return step;
    return (double)((uint64_t)(HISTOGRAM_STEPS + step + 1) << (power - 1)) - 1;
}

void histogram_add(struct histogram *histogram, uint64_t us)
{
    histogram->buckets[bucket_of(us)]++;
    histogram->count++;
    histogram->sum_us += (double)us;
    if (us > histogram->max_us)
        histogram->max_us = us;
}

void histogram_merge(struct histogram *histogram, const struct histogram *other)
{
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
        histogram->buckets[i] += other->buckets[i];
    histogram->count += other->count;
    histogram->sum_us += other->sum_us;
    if (other->max_us > histogram->max_us)
        histogram->max_us = other->max_us;
}

double histogram_percentile(const struct histogram *histogram, double percent)
{
    uint64_t seen = 0, rank = (uint64_t)(percent / 100 * (double)histogram->count + 0.999999);

    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS && histogram->count > 0; i++) {
        seen += histogram->buckets[i];
        if (seen >= rank && seen > 0) {
            double end = bucket_end(i);
            return end < (double)histogram->max_us ? end : (double)histogram->max_us;
        }
    }
    return 0;
}

uint64_t histogram_count_to(const struct histogram *histogram, double us)
{
    uint64_t count = 0;

    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS && bucket_end(i) <= us; i++)
        count += histogram->buckets[i];
    return count;
}
