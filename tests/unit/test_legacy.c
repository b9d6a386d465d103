/* Memory that a model which goes leaves to one that waits for room. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "daemon/model/registry_internal.h"
#include "tests/support/gate.h"
#include "tests/support/gguf_make.h"
#include "tests/support/house.h"

#define LAYERS 8u /* of most models here: 6 MiB and more, of which 2 MiB at a time pass on */

static struct gate packing_gate = GATE_SHUT;
static const struct kernel_table *packing_kernels;
static struct kernel_table gated; /* the same, but packing waits at the gate */

static void pack_behind_gate(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows,
                             const void *rows)
{
    pass_gate(&packing_gate);
    packing_kernels->pack(tensor, row_begin, n_rows, rows);
}

static void add_model(const struct house *house, const char *name, uint32_t layers)
{
    struct model_plan plan = model_plan_default();

    plan.seed = (uint64_t)*name;
    plan.layers = layers;
    cr_assert_eq(make_model_file(&plan, house_model_path(house, name), NULL), 0);
}

/* Three models of one size, of which `budget` (in models) fit, and what one takes. */
static uint64_t build_large_house(struct house *house, double budget)
{
    uint64_t bytes;

    house_build(house);
    house->real_time = true;
    for (const char *name = "abc"; *name; name++)
        add_model(house, (char[]){*name, 0}, LAYERS);
    bytes = house_room_of(house, "a", 1);
    cr_assert_gt(bytes, 6 << 20);
    house_open(house, (uint64_t)((double)bytes * budget));
    return bytes;
}

static struct model_entry *want(struct house *house, const char *name)
{
    struct model_entry *entry = registry_find(house->registry, name);

    registry_want(house->registry, entry, LOAD_INTERACTIVE, false);
    return entry;
}

static struct model_entry *load(struct house *house, const char *name)
{
    struct model_entry *entry = want(house, name);

    house_until(house, entry, MODEL_READY);
    house->now_us += 10;
    return entry;
}

/* Until what goes has gone, for nobody. */
static void until_bytes(struct house *house, uint64_t most)
{
    for (int ms = 0; ms < HOUSE_LIMIT_MS && registry_loaded_bytes(house->registry) > most; ms += 5)
        house_go_on(house, 5);
    cr_assert_leq(registry_loaded_bytes(house->registry), most);
    cr_assert_null(house->registry->legacy);
}

static uint64_t recycled(const struct house *house)
{
    return metrics_get(house->metrics, M_LOAD_RECYCLED_BYTES);
}

Test(legacy, an_evicted_model_leaves_its_memory_to_the_next)
{
    struct house house;
    uint64_t bytes = build_large_house(&house, 1.5), before = 0;

    for (int round = 0; round < 3; round++)
        for (const char *name = "abc"; *name; name++) {
            struct model_entry *entry = want(&house, (char[]){*name, 0});

            for (int ms = 0; ms < HOUSE_LIMIT_MS && entry->state != MODEL_READY; ms++) {
                house_go_on(&house, 1);
                cr_assert_leq(registry_loaded_bytes(house.registry), bytes * 3 / 2);
            }
            cr_assert_eq(entry->state, MODEL_READY);
            house.now_us += 10;
            cr_expect_eq(recycled(&house) > before, round > 0 || *name > 'a');
            before = recycled(&house);
        }
    until_bytes(&house, bytes);
    house_leave(&house);
}

Test(legacy, what_goes_by_order_is_for_whoever_waits_for_room)
{
    struct house house;
    struct model_entry *a, *b;

    build_large_house(&house, 1.5);
    a = load(&house, "a");
    registry_use(house.registry, a, 1000);
    b = want(&house, "b"); /* waits until a is idle */
    cr_assert_eq(b->state, MODEL_QUEUED);
    registry_unload(house.registry, a);
    registry_unuse(house.registry, a, 1000, 0);
    house_until(&house, b, MODEL_READY);
    cr_expect_gt(recycled(&house), 0);
    house_leave(&house);
}

Test(legacy, a_model_that_comes_back_at_once_has_its_own_memory)
{
    struct house house;
    struct model_entry *a;

    build_large_house(&house, 1.5);
    a = load(&house, "a");
    registry_use(house.registry, a, 1000);
    registry_unload(house.registry, a);
    want(&house, "a");
    registry_unuse(house.registry, a, 1000, 0);
    cr_assert_eq(a->state, MODEL_DRAINING);
    house_until(&house, a, MODEL_READY);
    cr_expect_gt(recycled(&house), 0);
    house_leave(&house);
}

Test(legacy, what_nobody_waits_for_leaves_nothing)
{
    struct house house;
    struct model_entry *a;

    build_large_house(&house, 1.5);
    a = load(&house, "a");
    registry_unload(house.registry, a);
    house_until(&house, a, MODEL_COLD);
    until_bytes(&house, 0);
    load(&house, "b");
    cr_expect_eq(recycled(&house), 0);
    house_leave(&house);
}

/* Two have to go for one of twice their size: the larger one's memory passes on, the other's goes
 * back. */
Test(legacy, of_several_that_go_the_largest_leaves_its_memory)
{
    struct house house;
    struct model_entry *large;
    uint64_t bytes = build_large_house(&house, 1);

    house.registry = registry_free(house.registry);
    add_model(&house, "large", LAYERS * 3);
    add_model(&house, "small", 1);
    house_open(&house, bytes * 4);
    load(&house, "a");
    load(&house, "small");
    load(&house, "b");
    house.holds_on = true;
    large = want(&house, "large");
    registry_detached(house.registry, registry_find(house.registry, "a"));
    registry_detached(house.registry, registry_find(house.registry, "small"));
    house_until(&house, large, MODEL_READY);
    cr_expect_str_eq(house.evicted, "a>large small>large ");
    cr_expect_geq(recycled(&house), bytes / 4 * 3);
    cr_expect_leq(recycled(&house), bytes);
    cr_expect_leq(registry_loaded_bytes(house.registry), bytes * 4);
    house_leave(&house);
}

/* A large one waits first, until what is in use is idle; the small one that comes in before it
 * takes no more than it needs, and does not wait for what it cannot take. */
Test(legacy, what_is_too_large_for_who_begins_goes_back_first)
{
    struct house house;
    struct model_entry *a, *small, *large;
    uint64_t bytes = build_large_house(&house, 1);

    house.registry = registry_free(house.registry);
    add_model(&house, "large", LAYERS * 2);
    add_model(&house, "small", 1);
    house_open(&house, bytes * 9 / 4);
    a = load(&house, "a");
    registry_use(house.registry, a, 1000);
    load(&house, "b");
    large = registry_find(house.registry, "large");
    registry_want_for(house.registry, large, LOAD_WARM, 1000, false);
    cr_assert_eq(large->state, MODEL_QUEUED);
    small = want(&house, "small");
    house_until(&house, small, MODEL_READY);
    cr_expect_str_eq(house.evicted, "b>small ");
    cr_expect_eq(recycled(&house), 0);
    until_bytes(&house, bytes * 2);
    house_leave(&house);
}

Test(legacy, what_an_heir_gets_goes_back_when_it_does_not_come)
{
    struct house house;
    struct model_entry *a, *b;
    const char *path;

    build_large_house(&house, 1.5);
    /* A file that is no model, of the same size. */
    path = house_model_path(&house, "b");
    b = registry_find(house.registry, "b");
    cr_assert_eq(truncate(path, 0) + truncate(path, (off_t)b->file_bytes), 0);
    load(&house, "a");
    want(&house, "b");
    house_until(&house, b, MODEL_FAILED);
    until_bytes(&house, 0);
    /* One that is not wanted any more once the memory is there. */
    a = load(&house, "a");
    house.holds_on = true;
    b = want(&house, "c");
    cr_assert_eq(house.detaching, a);
    registry_detached(house.registry, a);
    registry_unload(house.registry, b);
    until_bytes(&house, 0);
    cr_expect_eq(recycled(&house), 0);
    house_leave(&house);
}

/* Its bytes are for nobody else, whoever comes after it. */
Test(legacy, a_users_own_file_leaves_nothing)
{
    struct house house;
    struct model_entry *file, *b;
    struct passed_file passed = {.uid = 1000, .holder = &house};
    uint64_t bytes = build_large_house(&house, 1), before;

    house.registry = registry_free(house.registry);
    house.memory_per_uid_bytes = HOUSE_PLENTY;
    house_open(&house, bytes * 3 / 2);
    load(&house, "b");
    passed.fd = open(house_model_path(&house, "a"), O_RDONLY | O_CLOEXEC);
    cr_assert_eq(registry_check_file(passed.fd, &passed.bytes), 0);
    cr_assert_eq(registry_add_file(house.registry, &passed, &file, NULL), 0);
    registry_want_for(house.registry, file, LOAD_INTERACTIVE, 1000, false);
    house_until(&house, file, MODEL_READY);
    cr_expect_gt(recycled(&house), 0, "what others left is good enough for it");
    before = recycled(&house);
    registry_leave_files(house.registry, &house);
    b = want(&house, "b");
    cr_assert_eq(b->state, MODEL_QUEUED);
    house_until(&house, b, MODEL_READY);
    cr_expect_eq(recycled(&house), before);
    house_leave(&house);
}

/* Loads of one user, of which one may run at a time: b runs, and c waits with what a left. */
static struct model_entry *build_waiting_heir(struct house *house)
{
    struct model_entry *a, *b, *c;
    uint64_t bytes = build_large_house(house, 1);

    registry_free(house->registry);
    house->config->loading.max_concurrent = LOADER_HANDS + 1; /* one thread is left for the rest */
    house->config->loading.per_uid = 1;
    packing_kernels = house->kernels;
    gated = *house->kernels;
    gated.pack = pack_behind_gate;
    house->kernels = &gated;
    open_gate(&packing_gate);
    house_open(house, bytes * 5 / 2);
    a = load(house, "a");
    shut_gate(&packing_gate);
    b = registry_find(house->registry, "b");
    registry_want_for(house->registry, b, LOAD_INTERACTIVE, 1000, false);
    house_until(house, b, MODEL_LOADING);
    c = registry_find(house->registry, "c");
    registry_want_for(house->registry, c, LOAD_INTERACTIVE, 1000, false);
    house_until(house, a, MODEL_COLD);
    for (int ms = 0; ms < HOUSE_LIMIT_MS && !c->task; ms += 5)
        house_go_on(house, 5);
    cr_assert_not_null(c->task);
    cr_assert_not_null(c->task->legacy);
    cr_assert_leq(registry_loaded_bytes(house->registry), bytes * 5 / 2);
    return c;
}

Test(legacy, a_load_that_waits_too_long_inherits_nothing)
{
    struct house house;
    struct model_entry *c = build_waiting_heir(&house);

    house.now_us += 1000000;
    registry_tick(house.registry);
    cr_expect_not_null(c->task->legacy);
    house.now_us += 1100000;
    registry_tick(house.registry);
    cr_expect_null(c->task->legacy);
    cr_expect_null(house.registry->legacy);
    open_gate(&packing_gate);
    house_until(&house, c, MODEL_READY);
    cr_expect_eq(recycled(&house), 0);
    house_leave(&house);
}

Test(legacy, a_load_that_is_cancelled_before_it_begins_gives_back_what_it_got)
{
    struct house house;
    struct model_entry *c = build_waiting_heir(&house);
    uint64_t before = registry_loaded_bytes(house.registry);

    registry_unload(house.registry, c);
    house_until(&house, c, MODEL_COLD);
    until_bytes(&house, before / 2 + before / 8);
    open_gate(&packing_gate);
    house_until(&house, registry_find(house.registry, "b"), MODEL_READY);
    cr_expect_eq(recycled(&house), 0);
    house_leave(&house);
}
