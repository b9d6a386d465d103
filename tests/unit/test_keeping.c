/* What keeps a model loaded: use, holds, pins, keep_alive, in virtual time. */
#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/holds.h"
#include "daemon/model/registry.h"
#include "lib/cleanup.h"
#include "tests/support/house.h"
#include "tests/support/alloc_fail.h"

#define SECOND 1000000u

enum { ALICE = 1000, BOB = 1001 };

static struct house house;
static struct {
    struct model_entry *a, *b, *c;
} models; /* copies of the built-in one */

/* `yaml`: the configuration, or NULL; room for `n` models. */
static void build_house(const char *yaml, double n)
{
    house_build(&house);
    house_add_builtin(&house, "a");
    house_add_builtin(&house, "b");
    house_add_builtin(&house, "c");
    house_configure(&house, yaml ? yaml : "");
    house.lets_go_at_once = true;
    house.memory_per_uid_bytes = 3 << 20;
    house_open(&house, house_room_of_builtin(n));
    models.a = registry_find(house.registry, "a");
    models.b = registry_find(house.registry, "b");
    models.c = registry_find(house.registry, "c");
}

static void load(struct model_entry *entry)
{
    registry_want_for(house.registry, entry, LOAD_WARM, ALICE, false);
    house_until(&house, entry, MODEL_READY);
}

static void use(struct model_entry *entry, uint32_t uid, uint64_t keep_alive_us)
{
    registry_use(house.registry, entry, uid);
    registry_unuse(house.registry, entry, uid, keep_alive_us);
}

/* Whether the model is still ready after so long without use. */
static bool stays(struct model_entry *entry, uint64_t us)
{
    house.now_us += us;
    house_go_on(&house, 0);
    return entry->state == MODEL_READY;
}

/* ---- keep_alive ---- */

Test(keeping, keep_alive_counts_from_the_last_use)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(models.a);
    load(models.b);
    cr_assert(stays(models.a, 29 * SECOND));
    use(models.a, ALICE, 0);
    cr_assert(stays(models.a, 29 * SECOND));
    registry_use(house.registry, models.a, ALICE);
    cr_assert(stays(models.a, 3600ull * SECOND), "it is in use");
    registry_unuse(house.registry, models.a, ALICE, 0);
    cr_assert(stays(models.a, 30 * SECOND));
    cr_assert_not(stays(models.a, 1 * SECOND));
    cr_assert_eq(models.b->state, MODEL_READY, "it has none");
    house_until(&house, models.a, MODEL_COLD);
    house_leave(&house);
}

Test(keeping, keep_alive_is_set_at_run_time)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(models.a);
    registry_set_keep_alive(house.registry, models.a, 0);
    cr_assert(stays(models.a, 3600ull * SECOND));
    registry_set_keep_alive(house.registry, models.a, 7200ull * SECOND);
    cr_assert(stays(models.a, 3599ull * SECOND));
    cr_assert_not(stays(models.a, 2 * SECOND));
    house_leave(&house);
}

Test(keeping, a_request_may_shorten_keep_alive_and_not_lengthen_it)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(models.a);
    use(models.a, ALICE, 60 * SECOND);
    cr_assert_eq(registry_keep_alive_us(house.registry, models.a), 30 * SECOND);
    use(models.a, ALICE, 5 * SECOND);
    cr_assert_eq(registry_keep_alive_us(house.registry, models.a), 5 * SECOND);
    cr_assert(stays(models.a, 5 * SECOND));
    use(models.a, ALICE, 0);
    cr_assert(stays(models.a, 29 * SECOND), "the next one says nothing");
    use(models.a, ALICE, 5 * SECOND);
    cr_assert_not(stays(models.a, 6 * SECOND));
    /* A model without one has it from its last request. */
    load(models.b);
    use(models.b, ALICE, 5 * SECOND);
    cr_assert_not(stays(models.b, 6 * SECOND));
    house_leave(&house);
}

Test(keeping, nobody_shortens_what_others_use)
{
    build_house(NULL, 8);
    load(models.a);
    use(models.a, BOB, 0);
    use(models.a, ALICE, 1);
    cr_assert_eq(registry_keep_alive_us(house.registry, models.a), 0);
    cr_assert(stays(models.a, 59 * SECOND));
    cr_assert_not(stays(models.a, 2 * SECOND), "the other's use is a minute ago");
    house_leave(&house);
}

Test(keeping, what_is_pinned_or_held_outlives_its_keep_alive)
{
    struct fault fault;

    build_house("models: {a: {keep_alive: 30s, pinned: yes}, b: {keep_alive: 30s}}", 8);
    load(models.a);
    load(models.b);
    cr_assert_eq(registry_hold(house.registry, models.b, ALICE, true, &fault), 0);
    cr_assert(stays(models.a, 3600ull * SECOND));
    cr_assert_eq(models.b->state, MODEL_READY);
    registry_release(house.registry, models.b, ALICE);
    cr_assert(stays(models.b, 29 * SECOND), "it counts from the hold's end");
    cr_assert_not(stays(models.b, 2 * SECOND));
    registry_set_pinned(house.registry, models.a, false);
    cr_assert_not(stays(models.a, 1));
    house_leave(&house);
}

/* ---- who gives way ---- */

Test(keeping, a_warm_does_not_evict_what_another_used_within_a_minute)
{
    build_house(NULL, 1.5);
    load(models.a);
    use(models.a, BOB, 0);
    cr_assert_eq(registry_want_for(house.registry, models.b, LOAD_WARM, ALICE, false), 1);
    cr_assert(stays(models.a, 59 * SECOND));
    cr_assert_eq(models.b->state, MODEL_QUEUED);
    cr_assert_not(stays(models.a, 2 * SECOND), "a minute is over");
    house_until(&house, models.b, MODEL_READY);
    cr_assert_str_eq(house.evicted, "a>b ");
    house_leave(&house);
}

Test(keeping, a_warm_evicts_what_its_own_user_used)
{
    build_house(NULL, 1.5);
    load(models.a);
    use(models.a, ALICE, 0);
    registry_want_for(house.registry, models.b, LOAD_WARM, ALICE, false);
    house_until(&house, models.b, MODEL_READY);
    house_leave(&house);
}

Test(keeping, a_request_evicts_all_the_same_also_where_a_warm_waits)
{
    build_house(NULL, 1.5);
    load(models.a);
    use(models.a, BOB, 0);
    registry_want_for(house.registry, models.b, LOAD_WARM, ALICE, false);
    cr_assert_eq(models.b->state, MODEL_QUEUED);
    cr_assert_eq(registry_want_for(house.registry, models.b, LOAD_INTERACTIVE, ALICE, false), 1);
    house_until(&house, models.b, MODEL_READY);
    cr_assert_str_eq(house.evicted, "a>b ");
    house_leave(&house);
}

Test(keeping, a_model_that_comes_back_comes_back_for_the_same_user)
{
    build_house(NULL, 1.5);
    load(models.a);
    registry_use(house.registry, models.a, ALICE);
    registry_unload(house.registry, models.a);
    cr_assert_eq(models.a->state, MODEL_DRAINING);
    cr_assert_eq(registry_want_for(house.registry, models.a, LOAD_WARM, ALICE, false), 1);
    registry_unuse(house.registry, models.a, ALICE, 0);
    cr_assert_eq(models.a->state, MODEL_QUEUED);
    cr_assert_eq(models.a->asker, ALICE, "else what she used herself could keep it out");
    house_until(&house, models.a, MODEL_READY);
    house_leave(&house);
}

Test(keeping, a_warm_that_waits_long_still_does_not_evict_what_is_in_use)
{
    build_house(NULL, 1.5);
    load(models.a);
    registry_use(house.registry, models.a, BOB);
    registry_want_for(house.registry, models.b, LOAD_WARM, ALICE, false);
    cr_assert(stays(models.a, 600 * SECOND));
    cr_assert(registry_used_by_others(house.registry, models.a, ALICE),
              "however long ago it began");
    registry_unuse(house.registry, models.a, BOB, 0);
    cr_assert(stays(models.a, 59 * SECOND), "a minute counts from its end");
    cr_assert_not(stays(models.a, 2 * SECOND));
    house_leave(&house);
}

Test(keeping, what_is_held_or_pinned_is_not_evicted_and_the_newcomer_is_refused)
{
    struct fault fault;

    build_house(NULL, 2.5);
    load(models.a);
    load(models.b);
    registry_set_pinned(house.registry, models.a, true);
    cr_assert_eq(registry_hold(house.registry, models.b, ALICE, true, &fault), 0);
    cr_assert_eq(registry_want(house.registry, models.c, LOAD_INTERACTIVE, false), -EIO);
    cr_assert_eq(models.c->code, CODE_NO_MEMORY);
    registry_release(house.registry, models.b, ALICE);
    cr_assert_eq(registry_want(house.registry, models.c, LOAD_INTERACTIVE, false), 1);
    house_until(&house, models.c, MODEL_READY);
    cr_assert_str_eq(house.evicted, "b>c ");
    house_leave(&house);
}

/* ---- holds ---- */

Test(keeping, holds_are_counted_by_model_and_user)
{
    struct model_entry a = {.reserved_bytes = 100}, b = {.reserved_bytes = 10};
    struct holds *holds;

    cr_assert_eq(holds_new(&holds), 0);
    cr_assert_eq(holds_take(holds, &a, ALICE), 0);
    cr_assert_eq(holds_take(holds, &a, ALICE), 0);
    cr_assert_eq(holds_take(holds, &b, ALICE), 0);
    cr_assert_eq(holds_take(holds, &a, BOB), 0);
    cr_assert_eq(a.holds, 3);
    cr_assert_eq(holds_of(holds, ALICE), 3);
    cr_assert_eq(holds_of(holds, 5), 0);
    cr_assert(holds_by_others(holds, &a, ALICE));
    cr_assert_not(holds_by_others(holds, &b, ALICE));
    cr_assert(holds_by_others(holds, &b, BOB));
    cr_assert_eq(holds_bytes(holds, ALICE), 10, "the other one is held by Bob, too");
    holds_give(holds, &a, BOB);
    cr_assert_eq(holds_bytes(holds, ALICE), 110);
    cr_assert_eq(holds_of(holds, BOB), 0);
    b.pinned = true;
    cr_assert_eq(holds_bytes(holds, ALICE), 100);
    holds_give(holds, &a, ALICE);
    cr_assert(holds_bytes(holds, ALICE) == 100 && a.holds == 1);
    holds_free(holds);
}

/* Among two hundred the table grows several times. */
Test(keeping, a_hold_there_is_no_memory_for_is_refused_and_leaves_nothing)
{
    struct model_entry a = {.reserved_bytes = 100};
    struct holds *holds;
    unsigned refused = 0;

    cr_assert_eq(holds_new(&holds), 0);
    for (uint32_t uid = 0; uid < 200; uid++) {
        int r = -ENOMEM;
        for (unsigned n = 1; r < 0; n++) {
            alloc_fail_at(n);
            r = holds_take(holds, &a, uid);
            cr_assert_eq(alloc_fail_done(), r < 0);
            cr_assert(r == 0 || r == -ENOMEM);
            cr_assert(holds_of(holds, uid) == (r == 0) && a.holds == uid + (r == 0));
            refused += r < 0;
        }
    }
    cr_assert_gt(refused, 202, "a row each, the table, and its growth");
    for (uint32_t uid = 0; uid < 200; uid++)
        holds_give(holds, &a, uid);
    cr_assert_eq(a.holds, 0);
    holds_free(holds);
}

Test(keeping, a_user_s_holds_have_a_number_and_a_memory)
{
    struct fault fault;

    build_house("limits: {holds_per_uid: 3}", 8);
    for (int i = 0; i < 2; i++)
        cr_assert_eq(registry_hold(house.registry, models.a, ALICE, true, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, models.b, ALICE, true, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, models.a, ALICE, true, &fault), -EDQUOT);
    cr_assert_not_null(strstr(fault.text, "holds_per_uid is 3"), "%s", fault.text);
    registry_release(house.registry, models.a, ALICE);
    cr_assert_eq(registry_hold(house.registry, models.c, ALICE, true, &fault), -ENOSPC,
                 "three of 1.2 MiB are more than 3 MiB");
    cr_assert_not_null(strstr(fault.text, "memory_per_uid"), "%s", fault.text);
    cr_assert_eq(registry_hold(house.registry, models.c, ALICE, false, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, models.c, BOB, true, &fault), 0);
    house_leave(&house);
}

Test(keeping, a_dismissed_model_goes_with_its_last_hold_unless_it_is_wanted_again)
{
    struct fault fault;

    build_house(NULL, 8);
    load(models.a);
    cr_assert_eq(registry_hold(house.registry, models.a, ALICE, true, &fault), 0);
    registry_dismiss(house.registry, models.a);
    cr_assert_eq(models.a->state, MODEL_READY);
    cr_assert_not(models.a->wanted);
    registry_want(house.registry, models.a, LOAD_INTERACTIVE, false);
    registry_release(house.registry, models.a, ALICE);
    cr_assert_eq(models.a->state, MODEL_READY);
    cr_assert_eq(registry_hold(house.registry, models.a, ALICE, true, &fault), 0);
    registry_dismiss(house.registry, models.a);
    registry_release(house.registry, models.a, ALICE);
    house_until(&house, models.a, MODEL_COLD);
    house_leave(&house);
}

Test(keeping, a_model_whose_file_is_gone_stays_while_it_is_held)
{
    struct fault fault;
    uint64_t look;

    build_house(NULL, 8);
    cr_assert_eq(registry_hold(house.registry, models.a, ALICE, true, &fault), 0);
    unlink(house_model_path(&house, "a"));
    look = registry_look(house.registry);
    while (registry_looks_done(house.registry) < look)
        house_go_on(&house, 5);
    cr_assert_eq(registry_find(house.registry, "a"), models.a);
    registry_release(house.registry, models.a, ALICE);
    models.a = NULL;
    look = registry_look(house.registry);
    while (registry_looks_done(house.registry) < look)
        house_go_on(&house, 5);
    cr_assert_null(registry_find(house.registry, "a"));
    house_leave(&house);
}

/* ---- looks, values ---- */

/* A look through the directories; the n-th allocation that its outcome takes here fails. */
static bool look_without_memory(unsigned n)
{
    struct pollfd pollfd = {.fd = registry_fd(house.registry), .events = POLLIN};
    uint64_t look = registry_look(house.registry);
    bool failed = false;

    while (registry_looks_done(house.registry) < look) {
        cr_assert_eq(poll(&pollfd, 1, HOUSE_LIMIT_MS), 1);
        alloc_fail_at(n);
        registry_dispatch(house.registry);
        failed |= alloc_fail_done();
    }
    return failed;
}

Test(keeping, a_look_there_is_no_memory_for_loses_no_model)
{
    static const char *const fresh[] = {"d", "e", "f"};

    build_house(NULL, 8);
    for (size_t i = 0; i < ELEMENTSOF(fresh); i++)
        house_add_tiny(&house, fresh[i], i);
    cr_assert(look_without_memory(1));
    cr_assert_null(registry_find(house.registry, "d"));
    for (size_t i = 0; i < ELEMENTSOF(fresh); i++) {
        cr_assert_eq(look_without_memory(2), i + 1 < ELEMENTSOF(fresh));
        for (size_t j = 0; j < ELEMENTSOF(fresh); j++)
            cr_assert_eq(registry_find(house.registry, fresh[j]) != NULL, j <= i, "%zu", j);
        cr_assert(!models.a->gone && !models.b->gone && !models.c->gone);
    }
    /* None is in the way of what comes after. */
    unlink(house_model_path(&house, "c"));
    load(models.a);
    cr_assert_not(look_without_memory(1));
    cr_assert_eq(registry_find(house.registry, "a"), models.a);
    cr_assert_null(registry_find(house.registry, "c"));
    load(registry_find(house.registry, "f"));
    house_leave(&house);
}

Test(keeping, values_of_run_time_outlive_a_look)
{
    uint64_t look, next;

    build_house("models: {a: {keep_alive: 30s, pinned: yes}}", 8);
    registry_set_keep_alive(house.registry, models.a, 5);
    registry_set_pinned(house.registry, models.a, false);
    look = registry_look(house.registry);
    next = registry_look(house.registry);
    cr_assert_eq(next, look + 1, "one that is under way may have passed by what is new");
    cr_assert_eq(registry_look(house.registry), next);
    while (registry_looks_done(house.registry) < next)
        house_go_on(&house, 5);
    cr_assert_eq(models.a->keep_alive_us, 5);
    cr_assert_not(models.a->pinned);
    house_leave(&house);
}
