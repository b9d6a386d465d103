/* What keeps a model loaded: use, holds, pins, keep_alive, in virtual time. */
#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/builtin.h"
#include "daemon/model/holds.h"
#include "daemon/model/registry.h"
#include "lib/cleanup.h"
#include "tests/support/alloc_fail.h"

#define SECOND  1000000u
#define WAIT_MS 20000

enum { ALICE = 1000, BOB = 1001 };

/* A registry over copies of the built-in model; the test is its upper side. */
struct house {
    char dir[64];
    struct config *config;
    struct metrics *metrics;
    struct registry *registry;
    struct clock clock;
    uint64_t now_us;
    struct model_entry *a, *b, *c;
    char evicted[512]; /* "VICTIM>NEWCOMER " of each */
};

static struct house house;

static uint64_t virtual_now(const struct clock *clock)
{
    (void)clock;
    return house.now_us;
}

static int on_attach(void *userdata, struct model_entry *entry)
{
    (void)userdata, (void)entry;
    return 0;
}

static void on_detach(void *userdata, struct model_entry *entry)
{
    (void)userdata;
    registry_detached(house.registry, entry);
}

static void on_entry(void *userdata, struct model_entry *entry)
{
    (void)userdata, (void)entry;
}

static void on_evicted(void *userdata, const struct eviction *eviction)
{
    size_t len = strlen(house.evicted);

    (void)userdata;
    cr_assert(eviction->why && eviction->why[0]);
    cr_assert_gt(eviction->bytes, 0);
    snprintf(house.evicted + len, sizeof(house.evicted) - len, "%s>%s ", eviction->victim->name,
             eviction->newcomer->name);
}

static void write_model(const char *name)
{
    char path[160];

    snprintf(path, sizeof(path), "%s/%s.gguf", house.dir, name);
    FILE *file = fopen(path, "w");
    cr_assert(file && fwrite(builtin_bytes(), 1, builtin_size(), file) == builtin_size());
    fclose(file);
}

/* `yaml`: the configuration, or NULL; room for `n` models. */
static void build_house(const char *yaml, double n)
{
    struct registry_options options;
    char path[160];

    house = (struct house){.now_us = 1000 * (uint64_t)SECOND, .clock = {.now_us = virtual_now}};
    strcpy(house.dir, "/tmp/hearth-house-XXXXXX");
    cr_assert_not_null(mkdtemp(house.dir));
    write_model("a");
    write_model("b");
    write_model("c");
    cr_assert_eq(config_new(&house.config), 0);
    cr_assert_eq(config_add_models_dir(house.config, house.dir), 0);
    snprintf(path, sizeof(path), "%s/hearth.yaml", house.dir);
    FILE *file = fopen(path, "w");
    fputs(yaml ? yaml : "", file);
    fclose(file);
    cr_assert_eq(config_load(house.config, path, NULL), 0);
    cr_assert_eq(metrics_new(&house.metrics), 0);
    options = (struct registry_options){
        .config = house.config,
        .metrics = house.metrics,
        .clock = &house.clock,
        .budget_bytes = (uint64_t)((double)builtin_size() * 1.11 * n),
        .memory_per_uid_bytes = 3 << 20,
        .ops = {.attach = on_attach,
                .detach = on_detach,
                .expel = on_entry,
                .changed = on_entry,
                .evicted = on_evicted},
    };
    cr_assert_eq(kernels_choose("scalar", &options.kernels, NULL), 0);
    cr_assert_eq(registry_new(&options, &house.registry, NULL), 0);
    house.a = registry_find(house.registry, "a");
    house.b = registry_find(house.registry, "b");
    house.c = registry_find(house.registry, "c");
}

static void leave_house(void)
{
    char command[96];

    registry_free(house.registry);
    config_free(house.config);
    metrics_free(house.metrics);
    snprintf(command, sizeof(command), "rm -rf %s", house.dir);
    cr_assert_eq(system(command), 0);
}

static void answer(struct model_entry *entry)
{
    if (entry && entry->state == MODEL_WARMING)
        registry_warmed(house.registry, entry, NULL);
}

/* Takes the loader's news and lets a tick pass. */
static void go_on(int wait_ms)
{
    struct pollfd pollfd = {.fd = registry_fd(house.registry), .events = POLLIN};

    poll(&pollfd, 1, wait_ms);
    registry_dispatch(house.registry);
    answer(house.a);
    answer(house.b);
    answer(house.c);
    registry_tick(house.registry);
}

static void until(const struct model_entry *entry, enum model_state state)
{
    for (int ms = 0; ms < WAIT_MS && entry->state != state; ms += 5)
        go_on(5);
    cr_assert_eq(entry->state, state, "%s is %s: %s", entry->name, model_state_name(entry->state),
                 entry->error);
}

static void load(struct model_entry *entry)
{
    registry_want_for(house.registry, entry, LOAD_WARM, ALICE, false);
    until(entry, MODEL_READY);
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
    go_on(0);
    return entry->state == MODEL_READY;
}

/* ---- keep_alive ---- */

Test(keeping, keep_alive_counts_from_the_last_use)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(house.a);
    load(house.b);
    cr_assert(stays(house.a, 29 * SECOND));
    use(house.a, ALICE, 0);
    cr_assert(stays(house.a, 29 * SECOND));
    registry_use(house.registry, house.a, ALICE);
    cr_assert(stays(house.a, 3600ull * SECOND), "it is in use");
    registry_unuse(house.registry, house.a, ALICE, 0);
    cr_assert(stays(house.a, 30 * SECOND));
    cr_assert_not(stays(house.a, 1 * SECOND));
    cr_assert_eq(house.b->state, MODEL_READY, "it has none");
    until(house.a, MODEL_COLD);
    leave_house();
}

Test(keeping, keep_alive_is_set_at_run_time)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(house.a);
    registry_set_keep_alive(house.registry, house.a, 0);
    cr_assert(stays(house.a, 3600ull * SECOND));
    registry_set_keep_alive(house.registry, house.a, 7200ull * SECOND);
    cr_assert(stays(house.a, 3599ull * SECOND));
    cr_assert_not(stays(house.a, 2 * SECOND));
    leave_house();
}

Test(keeping, a_request_may_shorten_keep_alive_and_not_lengthen_it)
{
    build_house("models: {a: {keep_alive: 30s}}", 8);
    load(house.a);
    use(house.a, ALICE, 60 * SECOND);
    cr_assert_eq(registry_keep_alive_us(house.registry, house.a), 30 * SECOND);
    use(house.a, ALICE, 5 * SECOND);
    cr_assert_eq(registry_keep_alive_us(house.registry, house.a), 5 * SECOND);
    cr_assert(stays(house.a, 5 * SECOND));
    use(house.a, ALICE, 0);
    cr_assert(stays(house.a, 29 * SECOND), "the next one says nothing");
    use(house.a, ALICE, 5 * SECOND);
    cr_assert_not(stays(house.a, 6 * SECOND));
    /* A model without one has it from its last request. */
    load(house.b);
    use(house.b, ALICE, 5 * SECOND);
    cr_assert_not(stays(house.b, 6 * SECOND));
    leave_house();
}

Test(keeping, nobody_shortens_what_others_use)
{
    build_house(NULL, 8);
    load(house.a);
    use(house.a, BOB, 0);
    use(house.a, ALICE, 1);
    cr_assert_eq(registry_keep_alive_us(house.registry, house.a), 0);
    cr_assert(stays(house.a, 59 * SECOND));
    cr_assert_not(stays(house.a, 2 * SECOND), "the other's use is a minute ago");
    leave_house();
}

Test(keeping, what_is_pinned_or_held_outlives_its_keep_alive)
{
    struct fault fault;

    build_house("models: {a: {keep_alive: 30s, pinned: yes}, b: {keep_alive: 30s}}", 8);
    load(house.a);
    load(house.b);
    cr_assert_eq(registry_hold(house.registry, house.b, ALICE, true, &fault), 0);
    cr_assert(stays(house.a, 3600ull * SECOND));
    cr_assert_eq(house.b->state, MODEL_READY);
    registry_release(house.registry, house.b, ALICE);
    cr_assert(stays(house.b, 29 * SECOND), "it counts from the hold's end");
    cr_assert_not(stays(house.b, 2 * SECOND));
    registry_set_pinned(house.registry, house.a, false);
    cr_assert_not(stays(house.a, 1));
    leave_house();
}

/* ---- who gives way ---- */

Test(keeping, a_warm_does_not_evict_what_another_used_within_a_minute)
{
    build_house(NULL, 1.5);
    load(house.a);
    use(house.a, BOB, 0);
    cr_assert_eq(registry_want_for(house.registry, house.b, LOAD_WARM, ALICE, false), 1);
    cr_assert(stays(house.a, 59 * SECOND));
    cr_assert_eq(house.b->state, MODEL_QUEUED);
    cr_assert_not(stays(house.a, 2 * SECOND), "a minute is over");
    until(house.b, MODEL_READY);
    cr_assert_str_eq(house.evicted, "a>b ");
    leave_house();
}

Test(keeping, a_warm_evicts_what_its_own_user_used)
{
    build_house(NULL, 1.5);
    load(house.a);
    use(house.a, ALICE, 0);
    registry_want_for(house.registry, house.b, LOAD_WARM, ALICE, false);
    until(house.b, MODEL_READY);
    leave_house();
}

Test(keeping, a_request_evicts_all_the_same_also_where_a_warm_waits)
{
    build_house(NULL, 1.5);
    load(house.a);
    use(house.a, BOB, 0);
    registry_want_for(house.registry, house.b, LOAD_WARM, ALICE, false);
    cr_assert_eq(house.b->state, MODEL_QUEUED);
    cr_assert_eq(registry_want_for(house.registry, house.b, LOAD_INTERACTIVE, ALICE, false), 1);
    until(house.b, MODEL_READY);
    cr_assert_str_eq(house.evicted, "a>b ");
    leave_house();
}

Test(keeping, a_model_that_comes_back_comes_back_for_the_same_user)
{
    build_house(NULL, 1.5);
    load(house.a);
    registry_use(house.registry, house.a, ALICE);
    registry_unload(house.registry, house.a);
    cr_assert_eq(house.a->state, MODEL_DRAINING);
    cr_assert_eq(registry_want_for(house.registry, house.a, LOAD_WARM, ALICE, false), 1);
    registry_unuse(house.registry, house.a, ALICE, 0);
    cr_assert_eq(house.a->state, MODEL_QUEUED);
    cr_assert_eq(house.a->asker, ALICE, "else what she used herself could keep it out");
    until(house.a, MODEL_READY);
    leave_house();
}

Test(keeping, a_warm_that_waits_long_still_does_not_evict_what_is_in_use)
{
    build_house(NULL, 1.5);
    load(house.a);
    registry_use(house.registry, house.a, BOB);
    registry_want_for(house.registry, house.b, LOAD_WARM, ALICE, false);
    cr_assert(stays(house.a, 600 * SECOND));
    cr_assert(registry_used_by_others(house.registry, house.a, ALICE), "however long ago it began");
    registry_unuse(house.registry, house.a, BOB, 0);
    cr_assert(stays(house.a, 59 * SECOND), "a minute counts from its end");
    cr_assert_not(stays(house.a, 2 * SECOND));
    leave_house();
}

Test(keeping, what_is_held_or_pinned_is_not_evicted_and_the_newcomer_is_refused)
{
    struct fault fault;

    build_house(NULL, 2.5);
    load(house.a);
    load(house.b);
    registry_set_pinned(house.registry, house.a, true);
    cr_assert_eq(registry_hold(house.registry, house.b, ALICE, true, &fault), 0);
    cr_assert_eq(registry_want(house.registry, house.c, LOAD_INTERACTIVE, false), -EIO);
    cr_assert_eq(house.c->code, CODE_NO_MEMORY);
    registry_release(house.registry, house.b, ALICE);
    cr_assert_eq(registry_want(house.registry, house.c, LOAD_INTERACTIVE, false), 1);
    until(house.c, MODEL_READY);
    cr_assert_str_eq(house.evicted, "b>c ");
    leave_house();
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
        cr_assert_eq(registry_hold(house.registry, house.a, ALICE, true, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, house.b, ALICE, true, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, house.a, ALICE, true, &fault), -EDQUOT);
    cr_assert_not_null(strstr(fault.text, "holds_per_uid is 3"), "%s", fault.text);
    registry_release(house.registry, house.a, ALICE);
    cr_assert_eq(registry_hold(house.registry, house.c, ALICE, true, &fault), -ENOSPC,
                 "three of 1.2 MiB are more than 3 MiB");
    cr_assert_not_null(strstr(fault.text, "memory_per_uid"), "%s", fault.text);
    cr_assert_eq(registry_hold(house.registry, house.c, ALICE, false, &fault), 0);
    cr_assert_eq(registry_hold(house.registry, house.c, BOB, true, &fault), 0);
    leave_house();
}

Test(keeping, a_dismissed_model_goes_with_its_last_hold_unless_it_is_wanted_again)
{
    struct fault fault;

    build_house(NULL, 8);
    load(house.a);
    cr_assert_eq(registry_hold(house.registry, house.a, ALICE, true, &fault), 0);
    registry_dismiss(house.registry, house.a);
    cr_assert_eq(house.a->state, MODEL_READY);
    cr_assert_not(house.a->wanted);
    registry_want(house.registry, house.a, LOAD_INTERACTIVE, false);
    registry_release(house.registry, house.a, ALICE);
    cr_assert_eq(house.a->state, MODEL_READY);
    cr_assert_eq(registry_hold(house.registry, house.a, ALICE, true, &fault), 0);
    registry_dismiss(house.registry, house.a);
    registry_release(house.registry, house.a, ALICE);
    until(house.a, MODEL_COLD);
    leave_house();
}

Test(keeping, a_model_whose_file_is_gone_stays_while_it_is_held)
{
    struct fault fault;
    char path[160];
    uint64_t look;

    build_house(NULL, 8);
    cr_assert_eq(registry_hold(house.registry, house.a, ALICE, true, &fault), 0);
    snprintf(path, sizeof(path), "%s/a.gguf", house.dir);
    unlink(path);
    look = registry_look(house.registry);
    while (registry_looks_done(house.registry) < look)
        go_on(5);
    cr_assert_eq(registry_find(house.registry, "a"), house.a);
    registry_release(house.registry, house.a, ALICE);
    house.a = NULL;
    look = registry_look(house.registry);
    while (registry_looks_done(house.registry) < look)
        go_on(5);
    cr_assert_null(registry_find(house.registry, "a"));
    leave_house();
}

/* ---- looks, values ---- */

Test(keeping, values_of_run_time_outlive_a_look)
{
    uint64_t look, next;

    build_house("models: {a: {keep_alive: 30s, pinned: yes}}", 8);
    registry_set_keep_alive(house.registry, house.a, 5);
    registry_set_pinned(house.registry, house.a, false);
    look = registry_look(house.registry);
    next = registry_look(house.registry);
    cr_assert_eq(next, look + 1, "one that is under way may have passed by what is new");
    cr_assert_eq(registry_look(house.registry), next);
    while (registry_looks_done(house.registry) < next)
        go_on(5);
    cr_assert_eq(house.a->keep_alive_us, 5);
    cr_assert_not(house.a->pinned);
    leave_house();
}
