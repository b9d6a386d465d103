/* What the registry loads ahead, and what it leaves alone, in virtual time. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/builtin.h"
#include "daemon/model/registry.h"
#include "tests/support/house.h"

#define SECOND 1000000u
#define GAP_US (10u * SECOND)
#define N      8u

enum { ALICE = 1000 };

static struct house house;
static struct model_entry *models[N]; /* copies of the built-in one */

static void open_registry(double room)
{
    char name[8];

    house_open(&house, house_room_of_builtin(room));
    for (uint32_t m = 0; m < N; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        models[m] = registry_find(house.registry, name);
        cr_assert_not_null(models[m]);
    }
}

/* `yaml`: the configuration; room for `room` of N models. */
static void build_house(const char *yaml, double room)
{
    char name[8];

    house_build(&house);
    for (uint32_t m = 0; m < N; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        house_add_builtin(&house, name);
    }
    house_configure(&house, yaml);
    house.lets_go_at_once = house.writes_history = true;
    open_registry(room);
}

static bool is_ready(uint32_t m)
{
    return models[m]->state == MODEL_READY;
}

/* Takes the loader's news and lets a tick pass; whether something is still on its way. */
static bool go_on(void)
{
    bool busy = false;

    house_go_on(&house, 1);
    for (uint32_t m = 0; m < N; m++)
        busy = busy || (models[m]->state != MODEL_COLD && !is_ready(m));
    return busy || registry_loaded_bytes(house.registry) > N * 2 * (uint64_t)builtin_size();
}

/* Until nothing loads or leaves, and nothing more is begun for a few ticks. */
static void settle(void)
{
    for (int ms = 0, quiet = 0; ms < HOUSE_LIMIT_MS && quiet < 5; ms++)
        quiet = go_on() ? 0 : quiet + 1;
}

/* A request that begins and ends; whether its model was ready. */
static bool ask(uint32_t m)
{
    struct model_entry *entry = models[m];
    bool ready = is_ready(m);

    house.now_us += GAP_US;
    registry_asked(house.registry, entry);
    registry_want_for(house.registry, entry, LOAD_INTERACTIVE, ALICE, false);
    for (int ms = 0; ms < HOUSE_LIMIT_MS && !is_ready(m); ms++)
        go_on();
    cr_assert(is_ready(m), "m%u is %s: %s", m, model_state_name(entry->state), entry->error);
    registry_use(house.registry, entry, ALICE);
    registry_unuse(house.registry, entry, ALICE, 0);
    settle();
    return ready;
}

static uint32_t go_round(uint32_t rounds)
{
    uint32_t hits = 0;

    for (uint32_t i = 0; i < rounds * N; i++)
        hits += ask(i % N);
    return hits;
}

static uint64_t metric(enum metric_id id)
{
    return metrics_get(house.metrics, id);
}

Test(foresight, what_comes_next_is_loaded_ahead_and_counted)
{
    build_house("", 4.5);
    go_round(6);
    cr_assert_eq(go_round(2), 2 * N);
    cr_assert_geq(metric(M_PREDICTIONS), 2 * N - 1);
    cr_assert_eq(metric(M_PREDICTIONS), house.n_predicted);
    cr_assert_geq(metric(M_PREDICTIONS_USED) * 100, metric(M_PREDICTIONS) * 85);
    cr_assert_eq(metric(M_PRELOAD_ASKED), 8 * N);
    cr_assert_eq(metric(M_PRELOAD_HITS) + metric(M_PRELOAD_MISSES), 8 * N);
    cr_assert_gt(metric(M_EVICTIONS), 0);
    house_leave(&house);
}

Test(foresight, a_model_with_strategy_none_is_not_loaded_ahead)
{
    build_house("models: {m3: {preload: none}}\n", 4.5);
    go_round(8);
    for (uint32_t i = 0; i < N; i++)
        cr_assert(ask(i) || i == 3, "m%u", i);
    cr_assert_not(is_ready(3) && models[3]->predicted_us);
    house_leave(&house);
}

Test(foresight, a_dry_run_tells_and_loads_nothing)
{
    build_house("loading: {prediction: dry-run}\n", 4.5);
    cr_assert_eq(go_round(8), 0);
    cr_assert_gt(house.n_predicted, N);
    cr_assert_eq(metric(M_LOADS), 8 * N);
    cr_assert_eq(metric(M_PREDICTIONS), house.n_predicted);
    house_leave(&house);
}

Test(foresight, off_it_is_plain_lru_and_remembers_nothing)
{
    build_house("loading: {prediction: off}\n", 4.5);
    cr_assert_eq(go_round(6), 0);
    cr_assert_eq(house.n_predicted, 0);
    while (!registry_shut_down(house.registry))
        settle();
    house.registry = registry_free(house.registry);
    cr_assert_eq(access(house.history_path, F_OK), -1);
    house_leave(&house);
}

Test(foresight, predictions_leave_alone_what_was_warmed_pinned_held_or_is_in_use)
{
    build_house("", 6.5);
    go_round(6);
    registry_want_for(house.registry, models[5], LOAD_WARM, ALICE, false);
    settle();
    cr_assert(is_ready(5));
    registry_use(house.registry, models[5], ALICE);
    registry_set_pinned(house.registry, models[4], true);
    registry_want_for(house.registry, models[4], LOAD_WARM, ALICE, false);
    settle();
    cr_assert_eq(registry_hold(house.registry, models[6], ALICE, false, NULL), 0);
    registry_want_for(house.registry, models[6], LOAD_WARM, ALICE, false);
    settle();
    for (uint32_t i = 0; i < 3 * N; i++) {
        ask(i % N);
        cr_assert(is_ready(4) && is_ready(5) && is_ready(6));
    }
    registry_unuse(house.registry, models[5], ALICE, 0);
    registry_release(house.registry, models[6], ALICE);
    house_leave(&house);
}

Test(foresight, what_somebody_has_just_had_warmed_is_not_the_first_to_go)
{
    build_house("", 4.5);
    go_round(6);
    ask(0);
    registry_want_for(house.registry, models[5], LOAD_WARM, ALICE, false);
    settle();
    cr_assert(is_ready(5));
    ask(1);
    ask(2);
    cr_assert(is_ready(5)); /* though it was the last to be foretold */
    house_leave(&house);
}

Test(foresight, what_left_by_itself_is_brought_back_though_there_is_room)
{
    build_house("", N + 1.5);
    go_round(6);
    for (uint32_t m = 0; m < N; m++)
        registry_unload(house.registry, models[m]);
    settle();
    for (uint32_t m = 0; m < N; m++)
        cr_assert_eq(models[m]->state, MODEL_COLD);
    for (uint32_t i = 0; i < 3; i++)
        ask(i);
    for (uint32_t i = 3; i < N; i++)
        cr_assert(ask(i), "m%u", i);
    house_leave(&house);
}

Test(foresight, a_habit_is_remembered_by_the_next_registry)
{
    build_house("", 4.5);
    go_round(6);
    while (!registry_shut_down(house.registry))
        settle();
    registry_free(house.registry);
    house.now_us = 5 * SECOND; /* another clock */
    open_registry(4.5);
    ask(0);
    cr_assert(is_ready(1));
    cr_assert(ask(1));
    while (!registry_shut_down(house.registry))
        settle();
    house_leave(&house);
}

Test(foresight, nothing_is_begun_while_the_daemon_ends)
{
    uint32_t before;

    build_house("", 4.5);
    go_round(6);
    before = house.n_predicted;
    house.now_us += GAP_US;
    registry_asked(house.registry, models[0]);
    while (!registry_shut_down(house.registry))
        settle();
    cr_assert_eq(house.n_predicted, before);
    house_leave(&house);
}

Test(foresight, an_eager_model_comes_back_without_driving_anybody_out)
{
    build_house("loading: {prediction: off}\nmodels: {m0: {preload: eager}}\n", 2.5);
    registry_want(house.registry, models[0], LOAD_PRELOAD, false);
    settle();
    ask(1);
    ask(2);
    cr_assert_eq(models[0]->state, MODEL_COLD);
    cr_assert_eq(models[0]->evictions, 1);
    cr_assert_str_eq(models[0]->last_eviction.by, "m2");
    registry_unload(house.registry, models[1]);
    settle();
    cr_assert(is_ready(0));
    registry_unload(house.registry, models[0]);
    settle();
    cr_assert_eq(models[0]->state, MODEL_COLD); /* unloaded, not evicted */
    house_leave(&house);
}

Test(foresight, what_is_larger_than_all_room_is_refused_and_nobody_goes_for_it)
{
    build_house("", 1.5);
    ask(0);
    models[1]->file_bytes = UINT64_MAX / 200;
    house.now_us += GAP_US;
    registry_asked(house.registry, models[1]);
    cr_assert_eq(registry_want_for(house.registry, models[1], LOAD_INTERACTIVE, ALICE, false),
                 -EIO);
    cr_assert_eq(models[1]->code, CODE_NO_MEMORY);
    cr_assert_not_null(strstr(models[1]->error, "memory_budget"));
    cr_assert(is_ready(0));
    house_leave(&house);
}
