/* The registry over the async loader: models made on the spot, states as they follow. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/engine/engine.h"
#include "daemon/engine/kv.h"
#include "daemon/model/registry.h"
#include "lib/cleanup.h"
#include "tests/support/gate.h"
#include "tests/support/house.h"

static struct gate packing_gate = GATE_SHUT;
static const struct kernel_table *packing_kernels;
static struct kernel_table gated; /* the same, but packing waits at the gate */

static void pack_behind_gate(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows,
                             const void *rows)
{
    pass_gate(&packing_gate);
    packing_kernels->pack(tensor, row_begin, n_rows, rows);
}

/* From now on loads get stuck until packing_gate is opened. Before house_open(). */
static void hold_loads(struct house *house)
{
    packing_kernels = house->kernels;
    gated = *house->kernels;
    gated.pack = pack_behind_gate;
    house->kernels = &gated;
}

/* Loads take the time they take, so the house's goes on with the real one. */
static void build_house(struct house *house)
{
    house_build(house);
    house->real_time = house->writes_names = true;
}

/* Opens it, with memory for everything, over one model: its entry, cold. */
static struct model_entry *open_with_one(struct house *house)
{
    house_add_tiny(house, "one", 1);
    house_open(house, HOUSE_PLENTY);
    return registry_find(house->registry, "one");
}

static void warm(struct house *house, struct model_entry *entry)
{
    registry_want(house->registry, entry, LOAD_WARM, false);
    house_until(house, entry, MODEL_READY);
}

/* A house of two models and memory for one: `a` is ready. */
static void open_house_for_a(struct house *house, struct model_entry **ret_a,
                             struct model_entry **ret_b)
{
    build_house(house);
    house_add_tiny(house, "a", 1);
    house_add_tiny(house, "b", 2);
    house_open(house, house_room_of(house, "a", 1.5));
    *ret_a = registry_find(house->registry, "a");
    *ret_b = registry_find(house->registry, "b");
    warm(house, *ret_a);
}

/* Until the n-th look through the directory is over. */
static void await_look(struct house *house, uint32_t n)
{
    for (int ms = 0; ms < HOUSE_LIMIT_MS && house->n_lists < n; ms++) {
        usleep(1000);
        registry_dispatch(house->registry);
    }
    cr_assert_geq(house->n_lists, n);
}

Test(registry, a_model_goes_through_its_states)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), 1);
    house_until(&house, entry, MODEL_READY);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), 0);
    cr_assert(registry_loaded_bytes(house.registry) > 100000);
    registry_unload(house.registry, entry);
    house_until(&house, entry, MODEL_COLD);
    cr_assert_str_eq(house.states, "one:queued one:loading one:warming one:ready one:draining "
                                   "one:cold ");
    house_leave(&house);
}

Test(registry, many_wants_are_one_load)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    for (int i = 0; i < 10; i++)
        cr_assert_eq(registry_want(house.registry, entry, LOAD_PRELOAD, false), 1);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_INTERACTIVE, false), 1);
    cr_assert_eq(entry->priority, LOAD_INTERACTIVE, "a request makes the load urgent");
    house_until(&house, entry, MODEL_READY);
    cr_assert_eq(metrics_get(house.metrics, M_LOADS_DONE), 1);
    house_leave(&house);
}

Test(registry, a_model_in_use_drains_until_it_is_idle)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    warm(&house, entry);
    registry_use(house.registry, entry, 1000);
    registry_unload(house.registry, entry);
    cr_assert_eq(entry->state, MODEL_DRAINING);
    cr_assert_null(house.detaching, "it is in use");
    registry_unuse(house.registry, entry, 1000, 0);
    cr_assert_not_null(house.detaching);
    house_until(&house, entry, MODEL_COLD);
    house_leave(&house);
}

Test(registry, a_drain_that_takes_too_long_expels)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    warm(&house, entry);
    registry_use(house.registry, entry, 1000);
    cr_assert_eq(registry_due_us(house.registry), UINT64_MAX);
    registry_unload(house.registry, entry);
    cr_assert_eq(registry_due_us(house.registry), entry->deadline_us);
    registry_tick(house.registry);
    cr_assert_eq(registry_due_us(house.registry), entry->deadline_us);
    cr_assert_eq(house.n_expelled, 0);
    house.now_us += house.config->drain_timeout_us;
    registry_tick(house.registry);
    registry_tick(house.registry);
    cr_assert_eq(house.n_expelled, 1);
    cr_assert_eq(registry_due_us(house.registry), UINT64_MAX);
    registry_unuse(house.registry, entry, 1000, 0);
    house_until(&house, entry, MODEL_COLD);
    house_leave(&house);
}

Test(registry, one_wanted_while_it_drains_comes_back)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    warm(&house, entry);
    house.holds_on = true;
    registry_unload(house.registry, entry);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_INTERACTIVE, false), 1);
    cr_assert_eq(entry->state, MODEL_DRAINING);
    house.holds_on = false;
    house_until(&house, entry, MODEL_READY);
    cr_assert_not_null(strstr(house.states, "one:draining one:cold one:queued"));
    cr_assert(house.again_when_cold, "those that wait are not to be sent away");
    house_leave(&house);
}

Test(registry, one_that_comes_back_does_so_for_the_most_urgent_who_asked)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    registry_want_for(house.registry, entry, LOAD_PRELOAD, 1001, false);
    house_until(&house, entry, MODEL_READY);
    house.holds_on = true;
    registry_unload(house.registry, entry);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_PRELOAD, false), 1);
    cr_assert_eq(entry->asker, MODEL_NOBODY);
    registry_want_for(house.registry, entry, LOAD_INTERACTIVE, 1002, false);
    registry_want_for(house.registry, entry, LOAD_PRELOAD, 1003, false);
    registry_want(house.registry, entry, LOAD_PREDICTED, false);
    cr_assert_eq(entry->priority, LOAD_INTERACTIVE);
    cr_assert_eq(entry->asker, 1002);
    house.holds_on = false;
    house_until(&house, entry, MODEL_READY);
    cr_assert_eq(entry->priority, LOAD_INTERACTIVE);
    cr_assert_eq(entry->asker, 1002);
    house_leave(&house);
}

Test(registry, one_wanted_after_its_load_was_cancelled_is_loaded_again)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    hold_loads(&house);
    entry = open_with_one(&house);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), 1);
    house_until(&house, entry, MODEL_LOADING);
    registry_unload(house.registry, entry);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_INTERACTIVE, false), 1);
    open_gate(&packing_gate);
    house_until(&house, entry, MODEL_READY);
    house_leave(&house);
}

Test(registry, a_cancelled_load_ends_cold)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    hold_loads(&house);
    entry = open_with_one(&house);
    registry_want(house.registry, entry, LOAD_WARM, false);
    house_until(&house, entry, MODEL_LOADING);
    registry_unload(house.registry, entry);
    registry_want(house.registry, entry, LOAD_INTERACTIVE, false);
    registry_unload(house.registry, entry); /* the last word counts */
    open_gate(&packing_gate);
    house_until(&house, entry, MODEL_COLD);
    cr_assert_not(house.again_when_cold);
    cr_assert_eq(registry_loaded_bytes(house.registry), 0);
    house_leave(&house);
}

/* While a load that was given up hangs in its read the model is not tried again; then it is. */
static void want_after_return(struct house *house, struct model_entry *entry)
{
    int r = registry_want(house->registry, entry, LOAD_INTERACTIVE, true);

    cr_assert_eq(r, -EIO, "another thread would hang");
    cr_assert_eq(entry->code, CODE_LOAD_FAILED);
    cr_assert_gt(registry_loaded_bytes(house->registry), 0, "its memory is still there");
    open_gate(&packing_gate);
    for (int ms = 0; ms < HOUSE_LIMIT_MS && r < 0; ms++) {
        usleep(1000);
        registry_dispatch(house->registry);
        r = registry_want(house->registry, entry, LOAD_INTERACTIVE, false);
    }
    cr_assert_eq(r, 1);
}

Test(registry, a_load_without_progress_is_given_up_and_may_be_tried_again)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    hold_loads(&house);
    entry = open_with_one(&house);
    registry_want(house.registry, entry, LOAD_WARM, false);
    house_until(&house, entry, MODEL_LOADING);
    usleep(20000); /* what is read before the first tensor counts as progress */
    registry_tick(house.registry);
    house.now_us += house.config->loading.timeout_us - 1000000;
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_LOADING, "it has a second left");
    for (int i = 0; i < 3 && entry->state == MODEL_LOADING; i++) {
        house.now_us += house.config->loading.timeout_us;
        registry_tick(house.registry);
    }
    cr_assert_eq(entry->state, MODEL_FAILED);
    cr_assert_eq(entry->code, CODE_LOAD_FAILED);
    cr_assert_not_null(strstr(entry->error, "one.gguf has made no progress for 120 s"), "%s",
                       entry->error);
    want_after_return(&house, entry);
    house_until(&house, entry, MODEL_READY);
    house_leave(&house);
}

Test(registry, one_unloaded_while_it_warms_leaves_unless_somebody_wants_it)
{
    for (int wanted = 0; wanted < 2; wanted++) {
        struct house house;
        struct model_entry *entry;

        build_house(&house);
        entry = open_with_one(&house);
        registry_want(house.registry, entry, LOAD_WARM, false);
        for (int ms = 0; ms < HOUSE_LIMIT_MS && entry->state != MODEL_WARMING; ms++) {
            usleep(1000);
            registry_dispatch(house.registry);
        }
        cr_assert_eq(entry->state, MODEL_WARMING);
        registry_unload(house.registry, entry);
        if (wanted)
            registry_want(house.registry, entry, LOAD_INTERACTIVE, false);
        registry_warmed(house.registry, entry, NULL);
        cr_assert_eq(entry->state, wanted ? MODEL_READY : MODEL_DRAINING);
        registry_unload(house.registry, entry);
        house_until(&house, entry, MODEL_COLD);
        house_leave(&house);
    }
}

Test(registry, shutting_down_ends_every_state)
{
    struct house house;
    struct model_entry *ready, *loading;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    house_add_tiny(&house, "two", 2);
    hold_loads(&house);
    open_gate(&packing_gate);
    house_open(&house, HOUSE_PLENTY);
    ready = registry_find(house.registry, "one");
    loading = registry_find(house.registry, "two");
    warm(&house, ready);
    packing_gate.is_open = false; /* nobody is at it */
    registry_want(house.registry, loading, LOAD_WARM, false);
    house_until(&house, loading, MODEL_LOADING);
    cr_assert_not(registry_shut_down(house.registry));
    open_gate(&packing_gate);
    house_until(&house, ready, MODEL_COLD);
    house_until(&house, loading, MODEL_COLD);
    cr_assert(registry_shut_down(house.registry));
    house_leave(&house);
}

Test(registry, a_failure_stands_until_the_file_changes)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    cr_assert_eq(truncate(house_model_path(&house, "one"), 1000), 0);
    house_open(&house, HOUSE_PLENTY);
    entry = registry_find(house.registry, "one");
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), 1);
    house_until(&house, entry, MODEL_FAILED);
    cr_assert_eq(entry->code, CODE_LOAD_FAILED);
    cr_assert(entry->error[0]);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), -EIO);
    cr_assert_eq(metrics_get(house.metrics, M_LOADS), 1, "it was read again in vain");
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, true), 1, "an administrator may");
    house_until(&house, entry, MODEL_FAILED);
    house_add_tiny(&house, "one", 2);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), 1);
    house_until(&house, entry, MODEL_READY);
    house_leave(&house);
}

Test(registry, a_first_step_that_fails_fails_the_model)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    house_open(&house, HOUSE_PLENTY);
    house.first_step_fails = true;
    entry = registry_find(house.registry, "one");
    registry_want(house.registry, entry, LOAD_WARM, false);
    house_until(&house, entry, MODEL_FAILED);
    cr_assert_str_eq(entry->error, "no first step");
    cr_assert_null(entry->model);
    house_leave(&house);
}

Test(registry, the_least_recently_used_makes_room)
{
    struct house house;
    struct model_entry *a, *b, *c;

    build_house(&house);
    house_add_tiny(&house, "a", 1);
    house_add_tiny(&house, "b", 2);
    house_add_tiny(&house, "c", 3);
    house_open(&house, house_room_of(&house, "a", 2.5));
    a = registry_find(house.registry, "a");
    b = registry_find(house.registry, "b");
    c = registry_find(house.registry, "c");
    warm(&house, a);
    warm(&house, b);
    house.now_us += 10;                 /* all of this may happen within a microsecond */
    registry_use(house.registry, a, 1); /* a is the newer one now */
    registry_unuse(house.registry, a, 1, 0);
    registry_want(house.registry, c, LOAD_INTERACTIVE, false);
    house_until(&house, c, MODEL_READY);
    cr_assert_eq(a->state, MODEL_READY);
    cr_assert_eq(b->state, MODEL_COLD);
    house_leave(&house);
}

Test(registry, a_busy_model_is_waited_for_but_not_for_ever)
{
    struct house house;
    struct model_entry *a, *b;

    open_house_for_a(&house, &a, &b);
    registry_use(house.registry, a, 1);
    cr_assert_eq(registry_want(house.registry, b, LOAD_INTERACTIVE, false), 1);
    registry_tick(house.registry);
    cr_assert_eq(b->state, MODEL_QUEUED);
    cr_assert_eq(a->state, MODEL_READY);
    house.now_us += 1000000;
    registry_tick(house.registry);
    cr_assert_eq(a->state, MODEL_DRAINING);
    registry_unuse(house.registry, a, 1, 0);
    house_until(&house, b, MODEL_READY);
    house_leave(&house);
}

/* `a` is wanted all the time, and comes before `b` in every list: `b` has its turn all the same. */
Test(registry, a_model_that_comes_back_goes_behind_those_that_wait)
{
    struct house house;
    struct model_entry *a, *b;

    open_house_for_a(&house, &a, &b);
    registry_want(house.registry, b, LOAD_INTERACTIVE, false);
    cr_assert_eq(a->state, MODEL_DRAINING);
    cr_assert_eq(registry_want(house.registry, a, LOAD_INTERACTIVE, false), 1);
    house.used_when_ready = b;
    house_until(&house, b, MODEL_READY);
    cr_assert_eq(a->state, MODEL_QUEUED);
    registry_unuse(house.registry, b, 1000, 0);
    house_until(&house, a, MODEL_READY);
    house_leave(&house);
}

/* The value of a key in the model's stats. */
static uint64_t stat_of(const struct model_entry *entry, const char *key)
{
    char text[2048] = "\n", line[64];
    FILE *out = fmemopen(text + 1, sizeof(text) - 1, "w");
    const char *at;

    cr_assert(out);
    registry_write_stats(entry, out);
    fclose(out);
    snprintf(line, sizeof(line), "\n%s ", key);
    at = strstr(text, line);
    cr_assert(at, "there is no %s in %s", key, text);
    return strtoull(at + strlen(line), NULL, 10);
}

/* Two fit but while steps of one are wide: then it takes the room of both. */
Test(registry, what_steps_take_counts_in_the_room_of_their_model)
{
    struct engine_options options = {.threads = 1, .kv_budget_bytes = KV_SLAB_BYTES};
    struct step_row rows[2] = {{.n_tokens = 120}, {.n_tokens = 120}};
    struct model_entry *a, *b;
    struct engine *engine = NULL;
    int32_t ids[120] = {0};
    struct house house;
    uint64_t budget, room, kv;

    build_house(&house);
    house_add_tiny(&house, "a", 1);
    house_add_tiny(&house, "b", 2);
    budget = house_room_of(&house, "a", 2.5);
    house_open(&house, budget);
    a = registry_find(house.registry, "a");
    b = registry_find(house.registry, "b");
    cr_expect_eq(registry_memory_bytes(a), 0);
    cr_expect_eq(stat_of(a, "weight_bytes") + stat_of(a, "scratch_bytes"), 0);
    registry_want(house.registry, a, LOAD_WARM, false);
    house_until(&house, a, MODEL_READY);
    room = registry_need_bytes(a);
    cr_expect_eq(registry_memory_bytes(a), room);
    cr_expect_eq(stat_of(a, "weight_bytes") + stat_of(a, "table_bytes"), room);

    registry_use(house.registry, a, 1);
    options.kernels = house.kernels;
    cr_assert_eq(engine_new(&options, &engine, NULL), 0);
    for (size_t i = 0; i < 2; i++) {
        cr_assert_eq(sequence_new(engine, a->model, 120, &rows[i].sequence), 0);
        rows[i].tokens = ids;
    }
    kv = 2 * sequence_bytes(rows[0].sequence);
    cr_assert_eq(engine_step_begin(engine, a->model, rows, 2), 0);
    while (engine_step_slice(engine, a->model) > 0)
        ;
    engine_step_end(engine, a->model);
    cr_expect_eq(registry_need_bytes(a), room + stat_of(a, "scratch_bytes"));
    cr_expect_eq(registry_loaded_bytes(house.registry), registry_need_bytes(a));
    cr_expect_eq(registry_memory_bytes(a), registry_need_bytes(a) + kv);
    cr_expect_eq(stat_of(a, "kv_bytes"), kv);
    registry_tick(house.registry);
    cr_expect_eq(metrics_get(house.metrics, M_MODEL_BYTES), registry_need_bytes(a));
    cr_assert_gt(registry_need_bytes(a), room * 3 / 2, "the test shows nothing");

    /* Who wants to come waits while a is at work, and has it give that back when it rests. */
    registry_want(house.registry, b, LOAD_INTERACTIVE, false);
    house_go_on(&house, 0);
    cr_expect_eq(b->state, MODEL_QUEUED);
    registry_set_pinned(house.registry, a, true);
    house_go_on(&house, 0);
    cr_expect_eq(b->state, MODEL_QUEUED, "it can come once a rests");
    house.now_us += 1000000;
    house_go_on(&house, 0);
    cr_expect_eq(b->state, MODEL_FAILED, "but nobody waits for that for ever");
    cr_expect(strstr(b->error, "pinned or held"), "%s", b->error);
    registry_want(house.registry, b, LOAD_INTERACTIVE, false);
    house_go_on(&house, 0);
    cr_expect_eq(b->state, MODEL_QUEUED);
    cr_expect_str_eq(house.shrunk, "");
    sequence_free(rows[0].sequence);
    sequence_free(rows[1].sequence);
    registry_unuse(house.registry, a, 1, 0);
    cr_expect_str_eq(house.shrunk, "a ");
    engine_shrink_scratch(a->model, 0);
    registry_shrunk(house.registry);
    cr_expect_lt(metrics_get(house.metrics, M_MODEL_BYTES), budget, "with what b reserved");
    house_until(&house, b, MODEL_READY);
    cr_expect_str_eq(house.evicted, "");
    engine_free(engine);
    house_leave(&house);
}

Test(registry, a_model_beyond_the_budget_is_refused_with_numbers)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    house_open(&house, 1000);
    entry = registry_find(house.registry, "one");
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), -EIO);
    cr_assert_eq(entry->code, CODE_NO_MEMORY);
    cr_assert_not_null(strstr(entry->error, "MiB"));
    house_leave(&house);
}

Test(registry, the_list_follows_the_directory)
{
    struct house house;
    char names[4096] = "";
    FILE *file;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    house_open(&house, HOUSE_PLENTY);
    cr_assert_eq(registry_n_models(house.registry), 2, "one and the built-in model");
    house_add_tiny(&house, "two", 2);
    cr_assert_not(registry_rescan(house.registry, false), "too soon after the first look");
    cr_assert(registry_rescan(house.registry, true));
    await_look(&house, 1);
    cr_assert_not_null(registry_find(house.registry, "two"));
    unlink(house_model_path(&house, "one"));
    house.now_us += 2000000;
    cr_assert(registry_rescan(house.registry, false));
    await_look(&house, 2);
    cr_assert_null(registry_find(house.registry, "one"));
    file = fopen(house.names_path, "r");
    cr_assert_not_null(file);
    cr_assert(fread(names, 1, sizeof(names) - 1, file) > 0);
    fclose(file);
    cr_assert_str_eq(names, "ember\ntwo\n");
    house_leave(&house);
}

Test(registry, a_model_is_unloaded_after_its_keep_alive)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    house_add_tiny(&house, "one", 1);
    house_configure(&house, "models: {one: {keep_alive: 30s}}\n");
    house_open(&house, HOUSE_PLENTY);
    entry = registry_find(house.registry, "one");
    warm(&house, entry);
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_READY);
    house.now_us += 31000000;
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_DRAINING);
    house_until(&house, entry, MODEL_COLD);
    house_leave(&house);
}

Test(registry, who_used_a_model_is_remembered_for_a_minute)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    house_open(&house, HOUSE_PLENTY);
    entry = registry_find(house.registry, "ember");
    registry_use(house.registry, entry, 1000);
    registry_unuse(house.registry, entry, 1000, 0);
    cr_assert_not(registry_used_by_others(house.registry, entry, 1000));
    cr_assert(registry_used_by_others(house.registry, entry, 1001));
    house.now_us += MODEL_RECENT_US;
    cr_assert_not(registry_used_by_others(house.registry, entry, 1001));
    for (uint32_t uid = 0; uid < 2 * MODEL_USERS; uid++) {
        registry_use(house.registry, entry, uid);
        registry_unuse(house.registry, entry, uid, 0);
    }
    cr_assert(registry_used_by_others(house.registry, entry, 5));
    house_leave(&house);
}

/* ---- models that need others ---- */

Test(registry, what_a_model_needs_is_loaded_first)
{
    struct house house;
    struct model_entry *top;

    build_house(&house);
    house_add_tiny(&house, "base", 1);
    house_add_tiny(&house, "middle", 2);
    house_add_tiny(&house, "top", 3);
    house_configure(&house, "models: {top: {needs: [middle, base]}, middle: {needs: [base]}}\n");
    house_open(&house, HOUSE_PLENTY);
    top = registry_find(house.registry, "top");
    cr_assert_eq(registry_want(house.registry, top, LOAD_WARM, false), 1);
    cr_assert_eq(top->state, MODEL_QUEUED);
    for (const char *names[] = {"base", "middle"}, **name = names; name < names + 2; name++)
        house_until(&house, registry_find(house.registry, *name), MODEL_READY);
    house_until(&house, top, MODEL_READY);
    cr_assert_str_eq(house.states,
                     "top:queued middle:queued base:queued base:loading base:warming base:ready "
                     "middle:loading middle:warming middle:ready top:loading top:warming "
                     "top:ready ");
    house_leave(&house);
}

Test(registry, a_need_becomes_as_urgent_as_what_waits_for_it)
{
    struct house house;
    struct model_entry *top, *base;

    build_house(&house);
    house_add_tiny(&house, "base", 1);
    house_add_tiny(&house, "top", 2);
    house_configure(&house, "models: {top: {needs: [base]}}\n");
    hold_loads(&house);
    house_open(&house, HOUSE_PLENTY);
    top = registry_find(house.registry, "top");
    base = registry_find(house.registry, "base");
    registry_want(house.registry, top, LOAD_PRELOAD, false);
    cr_assert_eq(base->priority, LOAD_PRELOAD);
    registry_want(house.registry, top, LOAD_INTERACTIVE, false);
    cr_assert_eq(base->priority, LOAD_INTERACTIVE);
    open_gate(&packing_gate);
    house_until(&house, base, MODEL_READY);
    house_until(&house, top, MODEL_READY);
    house_leave(&house);
}

Test(registry, a_need_that_fails_fails_those_that_wait_for_it)
{
    struct house house;
    struct model_entry *top, *middle, *base;

    build_house(&house);
    house_add_tiny(&house, "base", 1);
    house_add_tiny(&house, "middle", 2);
    house_add_tiny(&house, "top", 3);
    house_configure(&house, "models: {top: {needs: [middle]}, middle: {needs: [base]}}\n");
    cr_assert_eq(truncate(house_model_path(&house, "base"), 1000), 0);
    house_open(&house, HOUSE_PLENTY);
    top = registry_find(house.registry, "top");
    middle = registry_find(house.registry, "middle");
    base = registry_find(house.registry, "base");
    registry_want(house.registry, top, LOAD_WARM, false);
    house_until(&house, top, MODEL_FAILED);
    cr_assert_eq(middle->state, MODEL_FAILED);
    cr_assert_eq(base->state, MODEL_FAILED);
    cr_assert(strstr(top->error, "top needs middle, which failed: middle needs base, which failed"),
              "%s", top->error);
    cr_assert_eq(top->code, CODE_LOAD_FAILED);
    cr_assert_eq(registry_want(house.registry, top, LOAD_WARM, false), -EIO, "base stays as it is");
    house_add_tiny(&house, "base", 4);
    cr_assert_eq(registry_want(house.registry, top, LOAD_WARM, false), 1, "it has changed");
    house_until(&house, base, MODEL_READY);
    house_until(&house, middle, MODEL_READY);
    house_until(&house, top, MODEL_READY);
    house_leave(&house);
}

Test(registry, a_need_is_not_evicted_while_it_is_waited_for)
{
    struct house house;
    struct model_entry *top, *base, *other;

    build_house(&house);
    house_add_tiny(&house, "base", 1);
    house_add_tiny(&house, "other", 2);
    house_add_tiny(&house, "top", 3);
    house_configure(&house, "models: {top: {needs: [base]}}\n");
    house_open(&house, house_room_of(&house, "base", 2.5));
    top = registry_find(house.registry, "top");
    base = registry_find(house.registry, "base");
    other = registry_find(house.registry, "other");
    warm(&house, base);
    house.now_us += 10;
    warm(&house, other);
    registry_want(house.registry, top, LOAD_INTERACTIVE, false);
    house_until(&house, top, MODEL_READY);
    cr_assert_eq(base->state, MODEL_READY, "though it is the one used longest ago");
    cr_assert_eq(other->state, MODEL_COLD);
    house_leave(&house);
}

Test(registry, a_need_that_nobody_knows_is_an_error_of_the_configuration)
{
    struct house house;
    struct model_entry *top;
    struct fault fault;

    build_house(&house);
    house_add_tiny(&house, "base", 1);
    house_add_tiny(&house, "top", 2);
    house_configure(&house, "models: {top: {needs: [base, ember]}}\n");
    cr_assert_eq(registry_check_config(house.config, &fault), 0, "%s", fault.text);
    house_open(&house, HOUSE_PLENTY);
    unlink(house_model_path(&house, "base"));
    cr_assert_eq(registry_check_config(house.config, &fault), -EINVAL);
    cr_assert(strstr(fault.text, "models.top.needs") && strstr(fault.text, "no model base"), "%s",
              fault.text);
    /* One that goes while the daemon runs fails the load alone. */
    registry_rescan(house.registry, true);
    await_look(&house, 1);
    top = registry_find(house.registry, "top");
    cr_assert_eq(registry_want(house.registry, top, LOAD_WARM, false), -EIO);
    cr_assert(strstr(top->error, "top needs base"), "%s", top->error);
    house_leave(&house);
}

/* ---- reads that hang ---- */

Test(registry, a_load_without_progress_fails_after_its_timeout_and_may_be_tried_again)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    hold_loads(&house);
    entry = open_with_one(&house);
    registry_want(house.registry, entry, LOAD_INTERACTIVE, false);
    house_until(&house, entry, MODEL_LOADING);
    while (atomic_load(&entry->task->progress.total_bytes) == 0)
        usleep(1000); /* its memory is mapped: it is at its pieces */
    registry_tick(house.registry);
    house.now_us += house.config->loading.timeout_us - 1000000;
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_LOADING, "not yet");
    house.now_us += 1000000;
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_FAILED);
    cr_assert_eq(entry->code, CODE_LOAD_FAILED);
    cr_assert_not_null(strstr(entry->error, "no progress for 120 s"), "%s", entry->error);
    want_after_return(&house, entry);
    house_until(&house, entry, MODEL_READY);
    house_leave(&house);
}

Test(registry, a_cancelled_load_that_hangs_is_given_up_soon)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    hold_loads(&house);
    entry = open_with_one(&house);
    registry_want(house.registry, entry, LOAD_WARM, false);
    house_until(&house, entry, MODEL_LOADING);
    while (atomic_load(&entry->task->progress.total_bytes) == 0)
        usleep(1000); /* its memory is mapped: it is at its pieces */
    registry_tick(house.registry);
    registry_unload(house.registry, entry);
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_LOADING, "its next piece may be near");
    house.now_us += 3000000;
    registry_tick(house.registry);
    cr_assert_eq(entry->state, MODEL_COLD);
    cr_assert_eq(registry_want(house.registry, entry, LOAD_WARM, false), -EIO);
    cr_assert_not_null(strstr(entry->error, "has not returned"), "%s", entry->error);
    want_after_return(&house, entry);
    house_until(&house, entry, MODEL_READY);
    registry_unload(house.registry, entry);
    house_until(&house, entry, MODEL_COLD);
    while (registry_loaded_bytes(house.registry) > 0)
        house_go_on(&house, 5);
    house_leave(&house);
}

Test(registry, a_preload_that_becomes_urgent_in_its_beginning_is_one_load_all_the_same)
{
    struct house house;
    struct model_entry *entry;

    build_house(&house);
    entry = open_with_one(&house);
    for (int i = 0; i < 20; i++) {
        house.states[0] = 0;
        registry_want(house.registry, entry, LOAD_PREDICTED, false);
        usleep((useconds_t)i * 50); /* its beginning, or somewhat later */
        registry_want(house.registry, entry, LOAD_INTERACTIVE, false);
        house_until(&house, entry, MODEL_READY);
        cr_assert_str_eq(house.states, "one:queued one:loading one:warming one:ready ");
        registry_unload(house.registry, entry);
        house_until(&house, entry, MODEL_COLD);
    }
    house_leave(&house);
}

/* ---- the history ---- */

Test(registry, what_was_asked_for_while_the_history_was_written_is_written_at_the_end)
{
    struct house house;
    char text[4096];
    FILE *file;
    size_t n;

    build_house(&house);
    house_add_tiny(&house, "first", 1);
    house_add_tiny(&house, "later", 2);
    house.writes_history = true;
    house_open(&house, HOUSE_PLENTY);
    registry_asked(house.registry, registry_find(house.registry, "first"));
    house.now_us += 3600000000u;
    registry_tick(house.registry); /* has it written, and its end is not heard of before: */
    registry_asked(house.registry, registry_find(house.registry, "later"));
    registry_shut_down(house.registry);
    house.registry = registry_free(house.registry);
    file = fopen(house.history_path, "r");
    cr_assert_not_null(file);
    n = fread(text, 1, sizeof(text), file);
    fclose(file);
    cr_assert_not_null(memmem(text, n, "first", 5));
    cr_assert_not_null(memmem(text, n, "later", 5));
    house_leave(&house);
}

/* ---- users' files ---- */

static int open_model_file(const struct house *house, const char *name)
{
    int fd = open(house_model_path(house, name), O_RDONLY | O_CLOEXEC);

    cr_assert(fd >= 0);
    return fd;
}

static int pass_file(struct house *house, uint32_t uid, const void *holder,
                     struct model_entry **ret_entry)
{
    struct passed_file file = {.fd = open_model_file(house, "one"), .uid = uid, .holder = holder};
    struct fault fault;

    cr_assert_eq(registry_check_file(file.fd, &file.bytes), 0);
    return registry_add_file(house->registry, &file, ret_entry, &fault);
}

/* One model, in use, takes all the memory there is. */
static struct model_entry *fill_house(struct house *house)
{
    struct model_entry *entry;

    entry = open_with_one(house);
    warm(house, entry);
    registry_use(house->registry, entry, 1000);
    entry->reserved_bytes = HOUSE_PLENTY; /* all there is */
    return entry;
}

Test(registry, files_that_wait_for_room_begin_one_a_user_and_no_more_than_may)
{
    struct house house;
    struct model_entry *full, *files[LOADER_MAX_OWN], *more;
    int holder;

    build_house(&house);
    house.memory_per_uid_bytes = HOUSE_PLENTY;
    full = fill_house(&house);
    for (uint32_t i = 0; i < LOADER_MAX_OWN; i++) {
        cr_assert(registry_takes_file(house.registry, 2000 + i));
        cr_assert_eq(pass_file(&house, 2000 + i, &holder, &files[i]), 0);
        cr_assert_eq(registry_want_for(house.registry, files[i], LOAD_WARM, 2000 + i, false), 1);
        cr_assert_eq(files[i]->state, MODEL_QUEUED);
        cr_assert_not(registry_takes_file(house.registry, 2000 + i), "it has one that waits");
        cr_assert_eq(pass_file(&house, 2000 + i, &holder, &more), -EBUSY);
    }
    cr_assert_not(registry_takes_file(house.registry, 9999));
    cr_assert_eq(pass_file(&house, 9999, &holder, &more), -EBUSY);
    full->reserved_bytes = 1;
    house.config->loading.timeout_us = UINT64_MAX;
    for (uint32_t i = 0; i < LOADER_MAX_OWN; i++)
        house_until(&house, files[i], MODEL_READY);
    for (int ms = 0; ms < HOUSE_LIMIT_MS && !registry_takes_file(house.registry, 9999); ms++) {
        usleep(1000);
        registry_dispatch(house.registry);
    }
    cr_assert(registry_takes_file(house.registry, 9999));
    house_leave(&house);
}

Test(registry, a_file_waits_while_its_users_thread_is_at_work)
{
    struct house house;
    struct model_entry *full, *file;
    int holder;

    build_house(&house);
    house.memory_per_uid_bytes = HOUSE_PLENTY;
    full = fill_house(&house);
    cr_assert_eq(pass_file(&house, 2000, &holder, &file), 0);
    cr_assert_eq(registry_want_for(house.registry, file, LOAD_WARM, 2000, false), 1);
    registry_drop_file(house.registry, 2000, open_model_file(&house, "one"));
    full->reserved_bytes = 1; /* there is room, but the user's thread closes a file */
    registry_tick(house.registry);
    cr_assert_eq(file->state, MODEL_QUEUED);
    cr_assert_null(file->task);
    house_until(&house, file, MODEL_READY);
    house_leave(&house);
}

static bool is_closed(int pipe_end)
{
    struct pollfd pollfd = {.fd = pipe_end};

    cr_assert(poll(&pollfd, 1, 0) >= 0);
    return pollfd.revents & POLLHUP;
}

Test(registry, a_file_is_closed_by_its_users_thread_alone)
{
    struct house house;
    struct model_entry *file;
    int holder, pair[2], last[2];

    build_house(&house);
    house.memory_per_uid_bytes = HOUSE_PLENTY;
    house_add_tiny(&house, "one", 1);
    hold_loads(&house);
    house_open(&house, HOUSE_PLENTY);
    cr_assert_eq(pass_file(&house, 2000, &holder, &file), 0);
    cr_assert_eq(registry_want_for(house.registry, file, LOAD_WARM, 2000, false), 1);
    cr_assert_eq(pipe(pair), 0);
    registry_drop_file(house.registry, 2000, pair[1]);
    usleep(10000);
    cr_assert_not(is_closed(pair[0]), "the user's thread is busy, and nobody else may");
    open_gate(&packing_gate);
    for (int ms = 0; ms < HOUSE_LIMIT_MS && !is_closed(pair[0]); ms++) {
        usleep(1000);
        registry_dispatch(house.registry);
    }
    cr_assert(is_closed(pair[0]));
    registry_shut_down(house.registry);
    cr_assert_eq(pipe(last), 0);
    registry_drop_file(house.registry, 2001, last[1]);
    house_leave(&house);
    cr_assert_not(is_closed(last[0]), "the end of the process does that");
}

Test(registry, a_file_that_was_dismissed_goes_once_with_its_holder)
{
    for (int state = 0; state < 3; state++) {
        struct house house;
        struct model_entry *file, *full = NULL;
        int holder;

        build_house(&house);
        house.memory_per_uid_bytes = HOUSE_PLENTY;
        if (state == 0) {
            full = fill_house(&house);
        } else {
            house_add_tiny(&house, "one", 1);
            house_open(&house, HOUSE_PLENTY);
        }
        cr_assert_eq(pass_file(&house, 2000, &holder, &file), 0);
        registry_want_for(house.registry, file, LOAD_WARM, 2000, false);
        if (state == 1)
            house_until(&house, file, MODEL_READY);
        if (state == 2) {
            house.first_step_fails = true;
            house_until(&house, file, MODEL_FAILED);
        }
        registry_dismiss(house.registry, file);
        registry_leave_files(house.registry, &holder);
        for (int ms = 0; ms < HOUSE_LIMIT_MS && registry_find(house.registry, "file-1"); ms++) {
            usleep(1000);
            registry_dispatch(house.registry);
            if (house.detaching)
                registry_detached(house.registry, TAKE_PTR(house.detaching));
        }
        cr_assert_null(registry_find(house.registry, "file-1"), "case %d", state);
        (void)full;
        house_leave(&house);
    }
}
