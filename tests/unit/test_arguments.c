/* Values of the benchmarks' options. */
#include <criterion/criterion.h>
#include <errno.h>

#include "bench/arguments.h"
#include "lib/cleanup.h"

Test(arguments, durations_have_units)
{
    static const struct {
        const char *text;
        uint64_t us;
    } cases[] = {{"10s", 10000000},   {"1500ms", 1500000}, {"250us", 250},
                 {"2min", 120000000}, {"0.5s", 500000},    {"0s", 0}};

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        uint64_t us = 1;
        cr_assert_eq(parse_duration(cases[i].text, &us), 0, "%s", cases[i].text);
        cr_assert_eq(us, cases[i].us, "%s is %llu us", cases[i].text, (unsigned long long)us);
    }
}

Test(arguments, what_is_no_duration_is_refused_and_writes_nothing)
{
    static const char *const wrong[] = {"", "s", "10", "10 s", "-1s", "10h", "1e9s", "nans", "1ss"};

    for (size_t i = 0; i < ELEMENTSOF(wrong); i++) {
        uint64_t us = 77;
        cr_assert_eq(parse_duration(wrong[i], &us), -EINVAL, "%s", wrong[i]);
        cr_assert_eq(us, 77);
    }
}

Test(arguments, numbers_keep_to_their_bounds)
{
    double value = 0;

    cr_assert_eq(parse_number("64", 1, 100, &value), 0);
    cr_assert_eq(value, 64);
    cr_assert_eq(parse_number("1", 1, 100, &value), 0);
    cr_assert_eq(parse_number("100", 1, 100, &value), 0);
    cr_assert_eq(value, 100);
}

Test(arguments, what_is_no_number_within_bounds_is_refused_and_writes_nothing)
{
    static const char *const wrong[] = {"", "x", "0", "101", "-5", "5x", "nan", "inf", "1e99"};

    for (size_t i = 0; i < ELEMENTSOF(wrong); i++) {
        double value = 77;
        cr_assert_eq(parse_number(wrong[i], 1, 100, &value), -EINVAL, "%s", wrong[i]);
        cr_assert_eq(value, 77);
    }
}
