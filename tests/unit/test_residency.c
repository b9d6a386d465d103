/* Residency: who gives way to a newcomer. */
#include <criterion/criterion.h>

#include "daemon/model/residency.h"

static size_t evict[8], n_evict;

static enum residency_verdict decide(const struct resident *residents, size_t n, uint64_t budget,
                                     uint64_t need)
{
    return residency_decide(residents, n, budget, need, evict, &n_evict);
}

Test(residency, what_fits_evicts_nobody)
{
    struct resident residents[] = {{.bytes = 40, .last_used_us = 1}, {.bytes = 40}};

    cr_assert_eq(decide(residents, 2, 100, 20), RESIDENCY_FITS);
    cr_assert_eq(n_evict, 0);
    cr_assert_eq(decide(NULL, 0, 100, 100), RESIDENCY_FITS);
}

Test(residency, the_least_recently_used_go_first_and_no_more_than_needed)
{
    struct resident residents[] = {{.bytes = 30, .last_used_us = 3},
                                   {.bytes = 30, .last_used_us = 1},
                                   {.bytes = 30, .last_used_us = 2}};

    cr_assert_eq(decide(residents, 3, 100, 30), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 1);
    cr_assert_eq(evict[0], 1);
    cr_assert_eq(decide(residents, 3, 100, 60), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 2);
    cr_assert_eq(evict[1], 2);
}

Test(residency, fixed_ones_stay_and_what_cannot_fit_beside_them_is_refused)
{
    struct resident residents[] = {{.bytes = 50, .fixed = true}, {.bytes = 30, .last_used_us = 9}};

    cr_assert_eq(decide(residents, 2, 100, 50), RESIDENCY_EVICT);
    cr_assert_eq(evict[0], 1);
    cr_assert_eq(decide(residents, 2, 100, 51), RESIDENCY_IMPOSSIBLE);
    cr_assert_eq(decide(NULL, 0, 100, 101), RESIDENCY_IMPOSSIBLE);
}

Test(residency, busy_ones_are_waited_for_and_nobody_goes_in_vain)
{
    struct resident residents[] = {{.bytes = 60, .busy = true}, {.bytes = 30, .last_used_us = 1}};

    cr_assert_eq(decide(residents, 2, 100, 80), RESIDENCY_WAIT);
    cr_assert_eq(n_evict, 0);
    cr_assert_eq(decide(residents, 2, 100, 40), RESIDENCY_EVICT);
    cr_assert_eq(evict[0], 1);
}

Test(residency, those_that_leave_are_not_evicted_again)
{
    struct resident residents[] = {{.bytes = 60, .leaving = true}, {.bytes = 30}};

    cr_assert_eq(decide(residents, 2, 100, 70), RESIDENCY_WAIT);
    cr_assert_eq(n_evict, 0);
    cr_assert_eq(decide(residents, 2, 100, 80), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 1);
    cr_assert_eq(evict[0], 1);
}
