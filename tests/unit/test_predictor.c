/* The predictor: what it learns from a sequence of requests, in virtual time. */
#include <stdio.h>

#include <criterion/criterion.h>

#include "daemon/model/predictor.h"

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
        cr_assert_eq(predictor_model(p, name), m);
        predictor_set_bytes(p, m, GB);
    }
}

/* A request that is a hit when the LRU shadow's would be is not known here: it is always a miss,
 * unless said otherwise. */
static void ask(uint32_t model, bool ready)
{
    now_us += GAP_US;
    cr_assert(predictor_request(p, model, ready, now_us));
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
    start(8, 4 * GB);
    for (uint32_t i = 0; i < 40; i++)
        ask(i % 8, false);
    cr_assert_geq(predictor_mode(p), PREDICTOR_PREDICTS);
    cr_assert_eq(predictor_order(p), RESIDENCY_BY_ESTIMATE);
    for (uint32_t i = 40; i < 80; i++) {
        ask(i % 8, true);
        cr_assert_eq(predictor_next(p, loaded, now_us), (int)((i + 1) % 8));
        cr_assert_gt(predictor_wanted(p, (i + 1) % 8), predictor_wanted(p, (i + 5) % 8));
    }
    finish();
}

Test(predictor, proposes_a_model_once_after_a_request_and_never_what_is_there)
{
    start(8, 4 * GB);
    for (uint32_t i = 0; i < 81; i++)
        ask(i % 8, i > 40);
    cr_assert_eq(predictor_next(p, loaded, now_us), 1);
    cr_assert_eq(predictor_next(p, loaded, now_us), -1);
    ask(1, true);
    loaded[2] = true;
    cr_assert_eq(predictor_next(p, loaded, now_us), -1);
    finish();
}

Test(predictor, what_may_not_be_predicted_is_not)
{
    start(8, 4 * GB);
    predictor_set_predictable(p, 1, false);
    for (uint32_t i = 0; i < 81; i++)
        ask(i % 8, i > 40);
    cr_assert_eq(predictor_next(p, loaded, now_us), -1);
    ask(1, true);
    cr_assert_eq(predictor_next(p, loaded, now_us), 2);
    finish();
}

Test(predictor, a_prediction_is_for_the_window_after_a_request)
{
    start(8, 4 * GB);
    for (uint32_t i = 0; i < 81; i++)
        ask(i % 8, i > 40);
    cr_assert_eq(predictor_next(p, loaded, now_us + PREDICTOR_WINDOW_US + 1), -1);
    cr_assert_eq(predictor_next(p, loaded, now_us + PREDICTOR_WINDOW_US), 1);
    finish();
}

Test(predictor, requests_in_one_second_are_one)
{
    start(2, GB);
    ask(0, false);
    now_us += PREDICTOR_SAME_US - 1;
    cr_assert_not(predictor_request(p, 0, true, now_us));
    now_us += PREDICTOR_SAME_US;
    cr_assert(predictor_request(p, 0, true, now_us));
    finish();
}
