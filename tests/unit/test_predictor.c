/* The predictor: what it learns from a sequence of requests, in virtual time. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>

#include "daemon/model/predictor.h"
#include "tests/support/alloc_fail.h"

#define GAP_US 10000000u
#define GB     UINT64_C(1000000000)

static struct predictor *p;
static uint64_t now_us = 1;
static bool loaded[PREDICTOR_MAX_MODELS];

static void start(uint32_t n_models, uint64_t budget_bytes)
{
    char name[16];

    cr_assert_eq(predictor_new(&p), 0);
    predictor_set_budget(p, budget_bytes);
    for (uint32_t m = 0; m < n_models; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        cr_assert_eq(predictor_model(p, name), (int)m);
        predictor_set_bytes(p, m, GB);
    }
}

/* What it proposed after the last request; -1: nothing. */
static int proposed = -1;

/* A memory with room for ROOM models, one of 1 GB each, that does as the predictor says. */
#define ROOM 4u
static uint64_t used_us[PREDICTOR_MAX_MODELS];

static void bring(uint32_t model)
{
    uint32_t n = 0, victim = UINT32_MAX;

    for (uint32_t m = 0; m < PREDICTOR_MAX_MODELS; m++) {
        if (!loaded[m] || m == model)
            continue;
        n++;
        if (victim == UINT32_MAX || (predictor_order(p) == RESIDENCY_LRU
                                         ? used_us[m] < used_us[victim]
                                         : predictor_wanted(p, m) < predictor_wanted(p, victim)))
            victim = m;
    }
    if (n == ROOM)
        loaded[victim] = false;
    loaded[model] = true;
    used_us[model] = now_us;
}

/* A request, and then the next proposal, which is heeded. */
static void ask(uint32_t model)
{
    int next;

    now_us += GAP_US;
    cr_assert(predictor_request(p, model, loaded[model], now_us));
    bring(model);
    proposed = -1;
    while ((next = predictor_next(p, loaded, now_us)) >= 0) {
        proposed = proposed < 0 ? next : proposed;
        bring((uint32_t)next);
    }
}

static void go_round(uint32_t n_models, uint32_t n_requests)
{
    for (uint32_t i = 0; i < n_requests; i++)
        ask(i % n_models);
}

static void finish(void)
{
    p = predictor_free(p);
    cr_assert_null(p);
}

Test(predictor, knows_a_model_by_its_name)
{
    start(2, 4 * GB);
    cr_assert_eq(predictor_model(p, "m1"), 1);
    cr_assert_eq(predictor_model(p, "other"), 2);
    cr_assert_eq(predictor_model(p, "other"), 2);
    finish();
    cr_assert_null(predictor_free(NULL));
}

Test(predictor, a_circle_that_does_not_fit_is_predicted_after_a_few_rounds)
{
    start(8, ROOM * GB);
    go_round(8, 40);
    cr_assert_geq(predictor_mode(p), PREDICTOR_PREDICTS);
    cr_assert_eq(predictor_order(p), RESIDENCY_BY_ESTIMATE);
    for (uint32_t i = 40; i < 80; i++) {
        ask(i % 8);
        cr_assert(loaded[(i + 1) % 8]);
        cr_assert_gt(predictor_wanted(p, (i + 1) % 8), predictor_wanted(p, (i + 5) % 8));
    }
    finish();
}

Test(predictor, what_follows_two_in_a_row_counts_where_one_does_not_tell)
{
    static const uint32_t walk[] = {0, 1, 2, 0, 1, 3, 4, 5, 2, 1, 4, 3, 1, 5};
    uint32_t n = sizeof(walk) / sizeof(walk[0]), right = 0;

    start(6, ROOM * GB);
    for (uint32_t i = 0; i < 40 * n; i++) {
        if (i >= 30 * n)
            right += loaded[walk[i % n]];
        ask(walk[i % n]);
    }
    cr_assert_gt(right, 9 * n); /* after 1 alone come 2, 3, 4 and 5 */
    finish();
}

Test(predictor, a_new_habit_is_learned_in_a_few_rounds)
{
    uint32_t right = 0;

    start(8, ROOM * GB);
    go_round(8, 400);
    for (uint32_t i = 0; i < 80; i++) { /* the other way round */
        if (i >= 40)
            right += loaded[(80 - i) % 8];
        ask((80 - i) % 8);
    }
    cr_assert_gt(right, 36);
    finish();
}

static uint32_t random_below(uint64_t *state, uint32_t n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33) % n;
}

Test(predictor, where_no_order_is_it_stays_silent)
{
    uint64_t state = 1;

    start(12, ROOM * GB);
    for (uint32_t i = 0; i < 2000; i++) {
        ask(random_below(&state, 12));
        cr_assert_eq(proposed, -1);
    }
    finish();
}

Test(predictor, the_favourites_are_kept_where_some_are_asked_for_more_often)
{
    uint64_t state = 1;
    uint32_t proposals = 0, right = 0;

    start(12, ROOM * GB);
    for (uint32_t i = 0; i < 2000; i++) {
        uint32_t favourite = random_below(&state, 4), other = random_below(&state, 12);
        ask(random_below(&state, 4) > 0 ? favourite : other);
        proposals += proposed >= 0;
        right += i >= 1000 && loaded[0] && loaded[1] && loaded[2] && loaded[3];
    }
    cr_assert_gt(proposals, 0);
    cr_assert_gt(right, 900); /* of the last 1,000 requests */
    for (uint32_t m = 4; m < 12; m++)
        cr_assert_lt(predictor_wanted(p, m), predictor_wanted(p, m % 4));
    finish();
}

/* Asks for whatever is not there, always. */
Test(predictor, whoever_defies_it_makes_it_fall_silent_for_longer_each_time)
{
    uint32_t tried = 0;

    start(5, ROOM * GB);
    for (uint32_t i = 0, next = 0; i < 4000; i++) {
        ask(next);
        tried += proposed >= 0;
        for (next = 0; loaded[next];)
            next++;
    }
    cr_assert_lt(tried, 4000 / 20);
    cr_assert_eq(predictor_mode(p), PREDICTOR_LRU);
    finish();
}

Test(predictor, proposes_a_model_once_after_a_request_and_never_what_is_there)
{
    start(8, ROOM * GB);
    go_round(8, 81);
    cr_assert_eq(proposed, 1);
    cr_assert_eq(predictor_next(p, loaded, now_us), -1);
    ask(1);
    loaded[2] = false;
    cr_assert_eq(predictor_next(p, loaded, now_us), -1);
    finish();
}

Test(predictor, what_may_not_be_predicted_is_not)
{
    start(8, ROOM * GB);
    predictor_set_predictable(p, 1, false);
    go_round(8, 80);
    cr_assert(loaded[0]);
    for (uint32_t i = 0; i < 8; i++) {
        ask(i);
        cr_assert_neq(proposed, 1);
    }
    finish();
}

Test(predictor, a_prediction_is_for_the_window_after_a_request)
{
    start(8, ROOM * GB);
    go_round(8, 80);
    now_us += GAP_US;
    cr_assert(predictor_request(p, 0, true, now_us));
    loaded[1] = false;
    cr_assert_eq(predictor_next(p, loaded, now_us + PREDICTOR_WINDOW_US + 1), -1);
    cr_assert_eq(predictor_next(p, loaded, now_us + PREDICTOR_WINDOW_US), 1);
    finish();
}

Test(predictor, what_comes_only_long_after_is_not_predicted)
{
    start(8, ROOM * GB);
    for (uint32_t i = 0; i < 320; i++) {
        now_us += PREDICTOR_WINDOW_US * 2;
        ask(i % 8);
        cr_assert(i < 280 || proposed == -1);
    }
    finish();
}

Test(predictor, remembers_a_bounded_number_of_models_and_forgets_the_one_longest_unused)
{
    char name[16];

    start(8, ROOM * GB);
    go_round(8, 80);
    for (uint32_t m = 8; m < PREDICTOR_MAX_MODELS + 8; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        cr_assert_lt(predictor_model(p, name), (int)PREDICTOR_MAX_MODELS);
        predictor_set_bytes(p, (uint32_t)predictor_model(p, name), GB);
        ask((uint32_t)predictor_model(p, name));
    }
    cr_assert_lt(predictor_model(p, "m9"), (int)PREDICTOR_MAX_MODELS);
    cr_assert_lt(predictor_model(p, "m0"), (int)PREDICTOR_MAX_MODELS); /* known anew */
    finish();
}

Test(predictor, a_model_there_is_no_memory_for_gets_no_number_and_takes_none)
{
    char name[16];
    unsigned refused = 0;

    start(0, ROOM * GB);
    for (int m = 0; m < (int)PREDICTOR_MAX_MODELS + 8; m++) {
        int number = -ENOMEM;
        snprintf(name, sizeof(name), "m%d", m);
        for (unsigned n = 1; number < 0; n++) {
            alloc_fail_at(n);
            number = predictor_model(p, name);
            cr_assert_eq(alloc_fail_done(), number < 0);
            cr_assert(number >= 0 || number == -ENOMEM);
            cr_assert_eq(predictor_find(p, name), number < 0 ? -1 : number);
            refused += number < 0;
        }
        cr_assert(m >= (int)PREDICTOR_MAX_MODELS || number == m, "%d instead of %d", number, m);
        ask((uint32_t)number);
    }
    cr_assert_gt(refused, 2, "the table and its growth");
    finish();
}

Test(predictor, requests_in_one_second_are_one)
{
    start(2, GB);
    ask(0);
    now_us += PREDICTOR_SAME_US - 1;
    cr_assert_not(predictor_request(p, 0, true, now_us));
    now_us += PREDICTOR_SAME_US;
    cr_assert(predictor_request(p, 0, true, now_us));
    finish();
}
