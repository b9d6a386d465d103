/* Residency: who gives way to a newcomer. */
#include <criterion/criterion.h>

#include "daemon/model/residency.h"

static size_t evict[8], n_evict;

static enum residency_verdict decide(const struct resident *residents, size_t n, uint64_t budget,
                                     uint64_t need)
{
    struct newcomer newcomer = {.bytes = need, .wanted = RESIDENCY_ASKED_FOR};

    return residency_decide(residents, n, RESIDENCY_LRU, budget, &newcomer, evict, &n_evict);
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

Test(residency, what_a_fixed_one_will_give_back_is_waited_for)
{
    struct resident residents[] = {
        {.bytes = 80, .passing_bytes = 30, .fixed = true, .busy = true},
        {.bytes = 10, .last_used_us = 1},
    };

    cr_assert_eq(decide(residents, 2, 100, 40), RESIDENCY_WAIT);
    cr_assert_eq(n_evict, 0);
    cr_assert_eq(decide(residents, 2, 100, 51), RESIDENCY_IMPOSSIBLE);
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

static enum residency_verdict decide_wanted(const struct resident *residents, size_t n,
                                            uint64_t budget, uint64_t bytes, double wanted)
{
    struct newcomer newcomer = {.bytes = bytes, .wanted = wanted};

    return residency_decide(residents, n, RESIDENCY_BY_ESTIMATE, budget, &newcomer, evict,
                            &n_evict);
}

Test(residency, the_least_wanted_per_byte_go_first_and_of_equals_the_least_recently_used)
{
    struct resident residents[] = {{.bytes = 40, .wanted = 0.4, .last_used_us = 1},
                                   {.bytes = 20, .wanted = 0.1, .last_used_us = 3},
                                   {.bytes = 20, .wanted = 0.1, .last_used_us = 2}};

    cr_assert_eq(decide_wanted(residents, 3, 80, 20, RESIDENCY_ASKED_FOR), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 1);
    cr_assert_eq(evict[0], 2);
    cr_assert_eq(decide_wanted(residents, 3, 80, 40, RESIDENCY_ASKED_FOR), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 2);
    cr_assert_eq(evict[1], 1);
}

Test(residency, a_large_victim_spares_the_small_ones_named_before_it)
{
    struct resident residents[] = {
        {.bytes = 10, .wanted = 0.1}, {.bytes = 10, .wanted = 0.11}, {.bytes = 80, .wanted = 1.6}};

    cr_assert_eq(decide_wanted(residents, 3, 100, 80, RESIDENCY_ASKED_FOR), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 1);
    cr_assert_eq(evict[0], 2);
    cr_assert_eq(decide_wanted(residents, 3, 100, 85, RESIDENCY_ASKED_FOR), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 2);
    cr_assert_eq(evict[0], 0); /* the likelier of the small ones stays */
    cr_assert_eq(evict[1], 2);
}

Test(residency, a_prediction_never_displaces_what_is_likelier)
{
    struct resident residents[] = {{.bytes = 50, .wanted = 0.3}, {.bytes = 50, .wanted = 0.2}};

    cr_assert_eq(decide_wanted(residents, 2, 100, 50, 0.25), RESIDENCY_EVICT);
    cr_assert_eq(evict[0], 1);
    cr_assert_eq(decide_wanted(residents, 2, 100, 50, 0.2), RESIDENCY_WORTHLESS);
    cr_assert_eq(decide_wanted(residents, 2, 100, 60, 0.4), RESIDENCY_WORTHLESS); /* 0.3 + 0.2 */
    cr_assert_eq(decide_wanted(residents, 2, 100, 60, 0.51), RESIDENCY_EVICT);
    cr_assert_eq(n_evict, 2);
    cr_assert_eq(decide_wanted(residents, 2, 150, 50, 0.01), RESIDENCY_FITS);
}

Test(residency, sizes_near_the_end_of_the_numbers_are_refused_not_added_up)
{
    struct resident residents[] = {{.bytes = 50, .fixed = true}};

    cr_assert_eq(decide(residents, 1, 100, UINT64_MAX), RESIDENCY_IMPOSSIBLE);
    cr_assert_eq(decide(residents, 1, 100, UINT64_MAX - 10), RESIDENCY_IMPOSSIBLE);
}
