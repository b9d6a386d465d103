/* Interleaved pairs: the median of their ratios and how sure it is. */
#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>

#include "bench/pairs.h"

static struct pairs pairs;

static void forget(void)
{
    pairs_done(&pairs);
}

TestSuite(pairs, .fini = forget);

/* n pairs with the ratios 1..n, in an order that is none. */
static struct pairs_summary ratios_to(size_t n)
{
    for (size_t i = 0; i < n; i++)
        cr_assert_eq(pairs_add(&pairs, 10, 10 * (double)(i * 7 % n + 1)), 0);
    return pairs_summary(&pairs);
}

Test(pairs, none_say_nothing)
{
    struct pairs_summary summary = pairs_summary(&pairs);

    cr_assert_eq(summary.n, 0);
    cr_assert_eq(summary.median, 1);
    cr_assert_eq(summary.confidence, 0);
}

Test(pairs, one_is_its_own_median_and_worth_no_confidence)
{
    struct pairs_summary summary;

    cr_assert_eq(pairs_add(&pairs, 4, 5), 0);
    summary = pairs_summary(&pairs);
    cr_assert_eq(summary.median, 1.25);
    cr_assert_eq(summary.low, 1.25);
    cr_assert_eq(summary.high, 1.25);
    cr_assert_eq(summary.confidence, 0);
}

Test(pairs, few_have_all_of_them_as_interval)
{
    struct pairs_summary summary = ratios_to(5);

    cr_assert_eq(summary.median, 3);
    cr_assert_eq(summary.low, 1);
    cr_assert_eq(summary.high, 5);
    cr_assert(fabs(summary.confidence - 0.9375) < 1e-9, "%f", summary.confidence);
}

Test(pairs, ten_leave_out_one_at_each_end)
{
    struct pairs_summary summary = ratios_to(10);

    cr_assert_eq(summary.median, 5.5);
    cr_assert_eq(summary.low, 2);
    cr_assert_eq(summary.high, 9);
    cr_assert(fabs(summary.confidence - 0.978515625) < 1e-9, "%f", summary.confidence);
}

Test(pairs, twenty_leave_out_five_at_each_end)
{
    struct pairs_summary summary = ratios_to(20);

    cr_assert_eq(summary.median, 10.5);
    cr_assert_eq(summary.low, 6);
    cr_assert_eq(summary.high, 15);
    cr_assert(fabs(summary.confidence - 0.958610535) < 1e-6, "%f", summary.confidence);
}

Test(pairs, the_interval_is_never_worth_less_than_asked_once_there_are_six)
{
    for (size_t n = 6; n <= PAIRS_MAX; n = n * 3 / 2) {
        pairs_done(&pairs);
        struct pairs_summary summary = ratios_to(n);
        cr_assert_geq(summary.confidence, 0.95, "%zu pairs: %f", n, summary.confidence);
        cr_assert(summary.low <= summary.median && summary.median <= summary.high);
    }
}

Test(pairs, a_pair_without_a_before_has_no_ratio)
{
    cr_assert_eq(pairs_add(&pairs, 0, 5), 0);
    cr_assert_eq(pairs_add(&pairs, NAN, 5), 0);
    cr_assert_eq(pairs.n, 0);
}

Test(pairs, too_many_are_refused)
{
    for (size_t i = 0; i < PAIRS_MAX; i++)
        cr_assert_eq(pairs_add(&pairs, 1, 1), 0);
    cr_assert_eq(pairs_add(&pairs, 1, 1), -E2BIG);
    cr_assert_eq(pairs.n, PAIRS_MAX);
}

Test(pairs, the_median_puts_values_in_order)
{
    double odd[] = {9, 1, 5}, even[] = {4, 1, 3, 2};

    cr_assert_eq(median_of(odd, 3), 5);
    cr_assert_eq(median_of(even, 4), 2.5);
    cr_assert_eq(median_of(NULL, 0), 0);
}
