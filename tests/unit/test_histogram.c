/* The benchmarks' histogram: percentiles within its steps, sums that hold. */
#include <criterion/criterion.h>
#include <string.h>

#include "bench/histogram.h"

static struct histogram histogram, other;

static void fresh(void)
{
    histogram = other = (struct histogram){0};
}

TestSuite(histogram, .init = fresh);

Test(histogram, nothing_has_no_percentile)
{
    cr_assert_eq(histogram_percentile(&histogram, 50), 0);
    cr_assert_eq(histogram_percentile(&histogram, 100), 0);
    cr_assert_eq(histogram_count_to(&histogram, 1e9), 0);
}

Test(histogram, one_value_is_every_percentile)
{
    histogram_add(&histogram, 777);
    cr_assert_eq(histogram_percentile(&histogram, 0.1), 777);
    cr_assert_eq(histogram_percentile(&histogram, 50), 777);
    cr_assert_eq(histogram_percentile(&histogram, 100), 777);
}

Test(histogram, small_values_are_exact)
{
    for (uint64_t us = 1; us <= 60; us++)
        histogram_add(&histogram, us);
    cr_assert_eq(histogram_percentile(&histogram, 50), 30);
    cr_assert_eq(histogram_percentile(&histogram, 90), 54);
    cr_assert_eq(histogram_percentile(&histogram, 100), 60);
}

Test(histogram, percentiles_of_any_size_are_at_most_a_step_too_high)
{
    for (uint64_t us = 1; us < (uint64_t)1 << 38; us = us * 17 / 16 + 1) {
        fresh();
        histogram_add(&histogram, us);
        histogram_add(&histogram, (uint64_t)1 << 38);
        double seen = histogram_percentile(&histogram, 50);
        cr_assert(seen >= (double)us && seen <= (double)us * (1 + 1.0 / HISTOGRAM_STEPS) + 1,
                  "%llu is told as %f", (unsigned long long)us, seen);
    }
}

Test(histogram, no_percentile_is_above_the_greatest_value)
{
    histogram_add(&histogram, 1000001);
    histogram_add(&histogram, 3);
    cr_assert_eq(histogram_percentile(&histogram, 99), 1000001);
    cr_assert_eq(histogram.max_us, 1000001);
}

Test(histogram, what_is_beyond_its_range_is_counted_in_the_last_bucket)
{
    histogram_add(&histogram, UINT64_MAX);
    histogram_add(&histogram, 5);
    cr_assert_eq(histogram.count, 2);
    cr_assert_eq(histogram.max_us, UINT64_MAX);
    cr_assert_eq(histogram_percentile(&histogram, 50), 5);
    cr_assert_eq(histogram.buckets[HISTOGRAM_BUCKETS - 1], 1);
}

Test(histogram, merged_ones_are_as_one)
{
    struct histogram whole = {0};

    for (uint64_t i = 0; i < 1000; i++) {
        uint64_t us = i * i * 7 % 100003;
        histogram_add(i % 3 ? &histogram : &other, us);
        histogram_add(&whole, us);
    }
    histogram_merge(&histogram, &other);
    cr_assert_eq(memcmp(histogram.buckets, whole.buckets, sizeof(whole.buckets)), 0);
    cr_assert_eq(histogram.count, whole.count);
    cr_assert_eq(histogram.max_us, whole.max_us);
    cr_assert_eq(histogram_percentile(&histogram, 99.9), histogram_percentile(&whole, 99.9));
}

Test(histogram, counts_up_to_a_value)
{
    for (uint64_t us = 1; us <= 50; us++)
        histogram_add(&histogram, us);
    cr_assert_eq(histogram_count_to(&histogram, 0.5), 0);
    cr_assert_eq(histogram_count_to(&histogram, 20), 20);
    cr_assert_eq(histogram_count_to(&histogram, 1e12), 50);
}
