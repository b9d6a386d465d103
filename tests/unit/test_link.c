#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/fuse_ops.h"
#include "fs/link.h"
#include "lib/cleanup.h"
#include "tests/support/status_daemon.h"

/* Longer than anything here takes; a test that gets there has failed. */
#define PATIENCE_US 20000000u

static char dir[64], path[108];
static struct status_daemon *fake;
static struct mirror *mirror;
static struct link *link_;

static void setup(void)
{
    strcpy(dir, "/tmp/hearth-link-XXXXXX");
    cr_assert(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    cr_assert(mirror_new(&mirror) == 0);
    cr_assert(link_new(path, mirror, &link_) == 0);
}

static void teardown(void)
{
    char list[128];

    link_ = link_free(link_);
    mirror = mirror_free(mirror);
    fake = status_daemon_stop(fake);
    snprintf(list, sizeof(list), "%s.models", path);
    unlink(list);
    rmdir(dir);
}

TestSuite(link, .init = setup, .fini = teardown);

/* One turn of a loop like hearthfs's, for somebody who wants values since `since_us`. */
static void turn(uint64_t since_us)
{
    struct pollfd fds[LINK_FDS_MAX];
    size_t n = link_poll(link_, fds);

    poll(fds, n, 5);
    link_dispatch(link_, view_now_us());
    link_step(link_, since_us, view_now_us());
}

/* Turns until values asked for from now on are there. */
static void refresh(void)
{
    uint64_t since_us = view_now_us(), end_us = since_us + PATIENCE_US;

    do {
        turn(since_us);
        cr_assert(view_now_us() < end_us);
    } while (!mirror_answers(mirror, since_us, view_now_us()));
}

static const char *status(void)
{
    return mirror_status(mirror, view_now_us());
}

static const char *state(void)
{
    const struct mirror_model *model = mirror_model(mirror, "alpha");

    return model ? model->state : "not there";
}

struct outcome {
    int calls, error;
};

static void on_end(void *userdata, int error)
{
    struct outcome *outcome = userdata;

    outcome->calls++;
    outcome->error = error;
}

/* Gives the order and turns until it has ended. */
static int order(bool load)
{
    struct outcome outcome = {0};
    struct link_order *given;
    uint64_t end_us = view_now_us() + PATIENCE_US;

    cr_assert(link_order(link_, load, "alpha", on_end, &outcome, view_now_us(), &given) == 0);
    while (!outcome.calls) {
        turn(0);
        cr_assert(view_now_us() < end_us);
    }
    cr_assert(outcome.calls == 1);
    return outcome.error;
}

Test(link, brings_all_parts_of_the_copy)
{
    static const struct {
        enum mirror_part part;
        const char *text;
    } cases[] = {
        {MIRROR_PROMETHEUS, "# TYPE hearth_steps_total counter\nhearth_steps_total 5\n"},
        {MIRROR_POOL, "section_pool 1\n"},
        {MIRROR_BATCHER, "section_batcher 1\n"},
        {MIRROR_STREAMING, "section_streaming 1\n"},
        {MIRROR_LOADER, "section_loader 1\n"},
    };

    fake = status_daemon_start(path);
    refresh();
    cr_assert_str_eq(status(), "running");
    cr_assert_str_eq(mirror_version(mirror), "7.7.7");
    cr_assert_str_eq(state(), "cold");
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        cr_assert_str_eq(mirror_text(mirror, cases[i].part), cases[i].text);
}

Test(link, keeps_one_connection_for_all_looks)
{
    fake = status_daemon_start(path);
    for (int i = 0; i < 5; i++)
        refresh();
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 1);
    cr_assert(status_daemon_count(fake, WIRE_MODELS) >= 5);
}

Test(link, looks_without_a_daemon_find_the_list_of_names)
{
    char list[128];
    FILE *file;

    snprintf(list, sizeof(list), "%s.models", path);
    file = fopen(list, "w");
    cr_assert(file);
    fputs("alpha\n../etc/passwd\nbeta\n", file);
    fclose(file);
    refresh();
    cr_assert_str_eq(status(), "inactive");
    cr_assert_str_eq(state(), "cold");
    cr_assert(mirror_n_models(mirror) == 2 && mirror_model(mirror, "beta"));
}

Test(link, a_look_never_starts_a_daemon)
{
    fake = status_daemon_start_activated(path);
    for (int i = 0; i < 3; i++)
        refresh();
    cr_assert_str_eq(status(), "inactive");
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 0);
}

Test(link, an_order_to_load_starts_a_daemon)
{
    fake = status_daemon_start_activated(path);
    refresh();
    cr_assert(order(true) == 0);
    refresh();
    cr_assert_str_eq(state(), "queued");
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 2);
    cr_assert(status_daemon_count(fake, WIRE_WARM) == 1);
}

Test(link, an_order_to_unload_starts_none)
{
    fake = status_daemon_start_activated(path);
    cr_assert(order(false) == 0);
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 0);
}

Test(link, an_order_to_load_where_nobody_listens_is_refused)
{
    cr_assert(order(true) == -ECONNREFUSED);
}

Test(link, what_an_order_changed_is_seen_by_the_next_look)
{
    uint64_t since_us;

    fake = status_daemon_start(path);
    refresh();
    cr_assert(order(true) == 0);
    since_us = view_now_us() - MIRROR_AGE_US;
    while (!mirror_answers(mirror, since_us, view_now_us()))
        turn(since_us);
    cr_assert_str_eq(state(), "queued");
}

Test(link, refusals_become_the_errno_of_their_code)
{
    static const struct {
        const char *code;
        int error;
    } cases[] = {
        {"forbidden", EACCES},     {"bad-request", EINVAL}, {"busy", EBUSY},
        {"no-such-model", ENOENT}, {"load-failed", EIO},    {"internal", EIO},
        {"no-memory", EIO},        {"new-word", EIO},
    };

    fake = status_daemon_start(path);
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        status_daemon_refuse(fake, cases[i].code);
        cr_assert(order(true) == -cases[i].error, "%s", cases[i].code);
        cr_assert(order(false) == -cases[i].error, "%s", cases[i].code);
    }
    cr_assert(link_code_errno(NULL) == EIO);
}

Test(link, a_silent_daemon_is_unresponsive_until_it_speaks)
{
    fake = status_daemon_start(path);
    status_daemon_set_state(fake, "ready");
    refresh();
    status_daemon_mute(fake, true);
    refresh();
    cr_assert_str_eq(status(), "unresponsive");
    cr_assert_str_eq(state(), "ready");
    status_daemon_set_state(fake, "cold");
    status_daemon_mute(fake, false);
    while (strcmp(status(), "running") != 0)
        turn(0);
    refresh();
    cr_assert_str_eq(state(), "cold");
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 1);
}

Test(link, a_daemon_that_gives_no_hello_is_unresponsive)
{
    fake = status_daemon_start(path);
    status_daemon_mute(fake, true);
    refresh();
    cr_assert_str_eq(status(), "unresponsive");
    cr_assert(mirror_n_models(mirror) == 0);
}

Test(link, an_order_to_a_silent_daemon_times_out)
{
    fake = status_daemon_start(path);
    refresh();
    status_daemon_mute(fake, true);
    cr_assert(order(true) == -ETIMEDOUT);
    status_daemon_mute(fake, false);
    cr_assert(order(false) == 0);
}

Test(link, a_dropped_order_is_told_nothing_and_cancelled)
{
    struct outcome outcome = {0};
    struct link_order *given;

    fake = status_daemon_start(path);
    refresh();
    status_daemon_mute(fake, true);
    cr_assert(link_order(link_, true, "alpha", on_end, &outcome, view_now_us(), &given) == 0);
    turn(0);
    link_drop(link_, given);
    turn(0);
    status_daemon_mute(fake, false);
    while (status_daemon_count(fake, WIRE_CANCEL) == 0)
        turn(0);
    refresh();
    cr_assert(outcome.calls == 0);
}

Test(link, an_order_whose_connection_breaks_fails)
{
    struct outcome outcome = {0};
    struct link_order *given;

    fake = status_daemon_start(path);
    refresh();
    status_daemon_mute(fake, true);
    cr_assert(link_order(link_, true, "alpha", on_end, &outcome, view_now_us(), &given) == 0);
    turn(0);
    status_daemon_hang_up(fake);
    while (!outcome.calls)
        turn(0);
    cr_assert(outcome.error == -EIO);
}

Test(link, a_lost_connection_is_made_again)
{
    fake = status_daemon_start(path);
    refresh();
    status_daemon_hang_up(fake);
    refresh();
    refresh();
    cr_assert_str_eq(status(), "running");
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 2);
}

Test(link, a_daemon_that_goes_and_comes_back_is_followed)
{
    fake = status_daemon_start(path);
    status_daemon_set_state(fake, "ready");
    refresh();
    cr_assert_str_eq(state(), "ready");
    fake = status_daemon_stop(fake);
    refresh();
    cr_assert_str_eq(status(), "inactive");
    cr_assert_str_eq(state(), "cold");
    fake = status_daemon_start(path);
    refresh();
    cr_assert_str_eq(status(), "running");
}

Test(link, after_a_goaway_it_connects_again)
{
    fake = status_daemon_start(path);
    refresh();
    status_daemon_go_away(fake);
    while (strcmp(status(), "draining") != 0)
        turn(0);
    refresh();
    cr_assert_str_eq(status(), "running");
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 2);
}

Test(link, orders_are_bounded)
{
    struct outcome outcome = {0};
    struct link_order *given;

    for (unsigned i = 0; i < LINK_ORDERS_MAX; i++)
        cr_assert(link_order(link_, true, "alpha", on_end, &outcome, view_now_us(), &given) == 0);
    cr_assert(link_order(link_, true, "alpha", on_end, &outcome, view_now_us(), &given) == -EAGAIN);
    turn(0);
    while (outcome.calls < (int)LINK_ORDERS_MAX)
        turn(0);
    cr_assert(order(true) == -ECONNREFUSED);
}
