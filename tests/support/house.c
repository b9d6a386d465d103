#include "tests/support/house.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/builtin.h"
#include "lib/cleanup.h"
#include "tests/support/gguf_make.h"

/* What a model needs, in sizes of its file. */
#define MEMORY_PER_FILE 1.11

static uint64_t house_now(const struct clock *clock)
{
    const struct house *house =
        (const struct house *)((const char *)clock - offsetof(struct house, clock));

    return house->now_us + (house->real_time ? clock_monotonic_us(clock) : 0);
}

/* ---- the upper side ---- */

static int on_attach(void *userdata, struct model_entry *entry)
{
    entry->attachment = userdata;
    return 0;
}

static void on_detach(void *userdata, struct model_entry *entry)
{
    struct house *house = userdata;

    if (house->lets_go_at_once)
        registry_detached(house->registry, entry);
    else
        house->detaching = entry;
}

static void on_expel(void *userdata, struct model_entry *entry)
{
    struct house *house = userdata;

    entry->deadline_us = UINT64_MAX;
    house->n_expelled++;
}

static void on_changed(void *userdata, struct model_entry *entry)
{
    struct house *house = userdata;
    size_t len = strlen(house->states);

    if (!entry) {
        house->n_lists++;
        return;
    }
    snprintf(house->states + len, sizeof(house->states) - len, "%s:%s ", entry->name,
             model_state_name(entry->state));
    if (entry->state == MODEL_COLD)
        house->again_when_cold = entry->again;
    if (entry == house->used_when_ready && entry->state == MODEL_READY)
        registry_use(house->registry, entry, 1000);
}

static void on_evicted(void *userdata, const struct eviction *eviction)
{
    struct house *house = userdata;
    size_t len = strlen(house->evicted);

    cr_assert(eviction->why && eviction->why[0]);
    cr_assert_gt(eviction->bytes, 0);
    snprintf(house->evicted + len, sizeof(house->evicted) - len, "%s>%s ", eviction->victim->name,
             eviction->newcomer->name);
}

static void on_predicted(void *userdata, const struct model_entry *entry, bool dry_run)
{
    struct house *house = userdata;

    cr_assert_neq(entry->state, MODEL_READY);
    cr_assert_eq(dry_run, house->config->loading.prediction == PREDICTION_DRY_RUN);
    house->n_predicted++;
}

static void on_shrink(void *userdata, struct model_entry *entry, uint64_t kept_bytes)
{
    struct house *house = userdata;
    size_t len = strlen(house->shrunk);

    (void)kept_bytes;
    cr_assert_eq(entry->in_use, 0);
    snprintf(house->shrunk + len, sizeof(house->shrunk) - len, "%s ", entry->name);
}

void house_go_on(struct house *house, int wait_ms)
{
    struct pollfd pollfd = {.fd = registry_fd(house->registry), .events = POLLIN};
    struct model_entry *entry, *next;

    poll(&pollfd, 1, wait_ms);
    registry_dispatch(house->registry);
    for (entry = registry_first(house->registry); entry; entry = next) {
        next = entry->hh.next;
        if (entry->state == MODEL_WARMING)
            registry_warmed(house->registry, entry,
                            house->first_step_fails ? "no first step" : NULL);
    }
    if (house->detaching && !house->holds_on) {
        struct model_entry *leaving = TAKE_PTR(house->detaching);
        registry_detached(house->registry, leaving);
    }
    registry_tick(house->registry);
}

void house_until(struct house *house, const struct model_entry *entry, enum model_state state)
{
    for (int ms = 0; ms < HOUSE_LIMIT_MS && entry->state != state; ms += 5)
        house_go_on(house, 5);
    cr_assert_eq(entry->state, state, "%s is %s: %s", entry->name, model_state_name(entry->state),
                 entry->error);
}

/* ---- building ---- */

void house_build(struct house *house)
{
    *house = (struct house){.clock = {.now_us = house_now}, .now_us = 1000000000};
    strcpy(house->dir, "/tmp/hearth-house-XXXXXX");
    cr_assert_not_null(mkdtemp(house->dir));
    snprintf(house->names_path, sizeof(house->names_path), "%s/names", house->dir);
    snprintf(house->history_path, sizeof(house->history_path), "%s/history", house->dir);
    cr_assert_eq(config_new(&house->config), 0);
    cr_assert_eq(config_add_models_dir(house->config, house->dir), 0);
    cr_assert_eq(metrics_new(&house->metrics), 0);
    cr_assert_eq(kernels_choose("scalar", &house->kernels, NULL), 0);
}

void house_leave(struct house *house)
{
    char command[96];

    house->registry = registry_free(house->registry);
    config_free(house->config);
    metrics_free(house->metrics);
    snprintf(command, sizeof(command), "rm -rf %s", house->dir);
    cr_assert_eq(system(command), 0);
}

static void write_file(const char *path, const void *bytes, size_t n)
{
    FILE *file = fopen(path, "w");

    cr_assert(file && fwrite(bytes, 1, n, file) == n);
    cr_assert_eq(fclose(file), 0);
}

void house_configure(struct house *house, const char *yaml)
{
    char path[96];

    snprintf(path, sizeof(path), "%s/hearth.yaml", house->dir);
    write_file(path, yaml, strlen(yaml));
    cr_assert_eq(config_load(house->config, path, NULL), 0);
}

const char *house_model_path(const struct house *house, const char *name)
{
    static char path[160];

    snprintf(path, sizeof(path), "%s/%s.gguf", house->dir, name);
    return path;
}

void house_add_builtin(struct house *house, const char *name)
{
    write_file(house_model_path(house, name), builtin_bytes(), builtin_size());
}

void house_add_tiny(struct house *house, const char *name, uint64_t seed)
{
    struct model_plan plan = tiny_model_plan();

    plan.seed = seed;
    cr_assert_eq(make_model_file(&plan, house_model_path(house, name), NULL), 0);
}

uint64_t house_room_of_builtin(double n)
{
    return (uint64_t)((double)builtin_size() * MEMORY_PER_FILE * n);
}

uint64_t house_room_of(struct house *house, const char *name, double n)
{
    struct model_entry *entry;
    uint64_t bytes;

    house_open(house, HOUSE_PLENTY);
    entry = registry_find(house->registry, name);
    registry_want(house->registry, entry, LOAD_WARM, false);
    house_until(house, entry, MODEL_READY);
    bytes = registry_loaded_bytes(house->registry);
    house->registry = registry_free(house->registry);
    house->states[0] = 0;
    return (uint64_t)((double)bytes * n);
}

void house_open(struct house *house, uint64_t budget_bytes)
{
    struct registry_options options = {
        .config = house->config,
        .kernels = house->kernels,
        .metrics = house->metrics,
        .clock = &house->clock,
        .budget_bytes = budget_bytes,
        .memory_per_uid_bytes = house->memory_per_uid_bytes,
        .names_path = house->writes_names ? house->names_path : NULL,
        .history_path = house->writes_history ? house->history_path : NULL,
        .ops = {.attach = on_attach,
                .detach = on_detach,
                .expel = on_expel,
                .changed = on_changed,
                .evicted = on_evicted,
                .predicted = on_predicted,
                .shrink = on_shrink,
                .userdata = house},
    };

    cr_assert_eq(registry_new(&options, &house->registry, NULL), 0);
}
