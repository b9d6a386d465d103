/* A house for a registry: a directory of models, a configuration, a clock that the test moves, and
 * the registry over them, to which the house is the upper side.
 *
 * Built, filled with models and configured, then opened; between these the test changes what it is
 * about. As the upper side the house takes every model that is loaded and lets go of those that
 * leave, and remembers what it was told. Hides: files, the registry's options, waiting. Thread: the
 * test's. */
#ifndef HEARTH_TESTS_SUPPORT_HOUSE_H
#define HEARTH_TESTS_SUPPORT_HOUSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/clock.h"
#include "daemon/config.h"
#include "daemon/metrics/metrics.h"
#include "daemon/model/registry.h"

#define HOUSE_LIMIT_MS 20000 /* whatever is waited for */
#define HOUSE_PLENTY   ((uint64_t)1 << 30)

struct house {
    char dir[64];
    char names_path[96], history_path[96]; /* in the directory */
    struct config *config;
    struct metrics *metrics;
    struct registry *registry; /* NULL until the house is open */
    struct clock clock;
    /* The time: stands at this until the test moves it; or, with real_time, how much the house is
     * ahead. */
    uint64_t now_us;
    bool real_time;

    /* Before house_open() the test may change these. */
    const struct kernel_table *kernels; /* the scalar ones */
    uint64_t memory_per_uid_bytes;      /* 0: none */
    bool writes_names, writes_history;

    /* How the upper side behaves. */
    bool first_step_fails;
    bool lets_go_at_once;                /* else in house_go_on(), */
    bool holds_on;                       /* and not even there */
    struct model_entry *used_when_ready; /* a request of uid 1000 waits for it */

    /* What it was told. */
    char states[1024]; /* "NAME:STATE " of each change */
    char evicted[512]; /* "VICTIM>NEWCOMER " of each */
    char shrunk[128];  /* "NAME " of each that was to give activations back */
    uint32_t n_expelled, n_lists, n_predicted;
    bool again_when_cold;          /* the entry's `again` when it last went cold */
    struct model_entry *detaching; /* has been told to let go of this one, and has not yet */
};

/* A directory without a model and a configuration of defaults. */
void house_build(struct house *house);
/* The registry goes, and the directory with all that is in it. */
void house_leave(struct house *house);

/* YAML text. */
void house_configure(struct house *house, const char *yaml);
/* A file of that name: a copy of the built-in model; a tiny model, another one for each seed. */
void house_add_builtin(struct house *house, const char *name);
void house_add_tiny(struct house *house, const char *name, uint64_t seed);
/* The path of a model's file, valid until the next call. */
const char *house_model_path(const struct house *house, const char *name);

/* Memory for models of that many copies of the built-in one. */
uint64_t house_room_of_builtin(double n);
/* The same of a model that is here, which it loads and measures in a registry of its own. */
uint64_t house_room_of(struct house *house, const char *name, double n);
/* Opens the registry; once more after registry_free(). */
void house_open(struct house *house, uint64_t budget_bytes);

/* Waits for news of the loader, does what the upper side does, and lets a tick pass. */
void house_go_on(struct house *house, int wait_ms);
/* Until the model is in that state. */
void house_until(struct house *house, const struct model_entry *entry, enum model_state state);

#endif
