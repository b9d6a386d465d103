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
static struct events *events;
static struct link *link_;
static struct caller caller; /* ourselves, unless a test says otherwise */

static void setup(void)
{
    strcpy(dir, "/tmp/hearth-link-XXXXXX");
    cr_assert(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    cr_assert(mirror_new(&mirror) == 0);
    cr_assert(events_new(&events) == 0);
    cr_assert(link_new(path, mirror, events, &link_) == 0);
    link_want_values(link_, true);
    caller_init(&caller, geteuid(), getegid(), 0);
}

static void teardown(void)
{
    char list[128];

    link_ = link_free(link_);
    events = events_free(events);
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

static int give(enum link_verb verb, uint64_t value, struct outcome *outcome,
                struct link_order **ret_order)
{
    struct link_request request = {verb, "alpha", value, &caller};

    return link_order(link_, &request, on_end, outcome, view_now_us(), ret_order);
}

/* Turns until somebody has been told something. */
static void turn_until_told(const struct outcome *outcome, int calls)
{
    uint64_t end_us = view_now_us() + PATIENCE_US;

    while (outcome->calls < calls) {
        turn(0);
        cr_assert(view_now_us() < end_us);
    }
    cr_assert(outcome->calls == calls);
}

/* Gives the order and turns until it has ended. */
static int order_of(enum link_verb verb, uint64_t value)
{
    struct outcome outcome = {0};
    struct link_order *given;

    cr_assert(give(verb, value, &outcome, &given) == 0);
    turn_until_told(&outcome, 1);
    return outcome.error;
}

static int order(bool load)
{
    return order_of(load ? LINK_LOAD : LINK_UNLOAD, 0);
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
    cr_assert(status_daemon_count(fake, WIRE_SUBSCRIBE) == 1);
    cr_assert(status_daemon_count(fake, WIRE_MODELS) == 0);
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
        {"no-memory", ENOMEM},     {"new-word", EIO},
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
    cr_assert(give(LINK_LOAD, 0, &outcome, &given) == 0);
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
    cr_assert(give(LINK_LOAD, 0, &outcome, &given) == 0);
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
        cr_assert(give(LINK_LOAD, 0, &outcome, &given) == 0);
    cr_assert(give(LINK_LOAD, 0, &outcome, &given) == -EAGAIN);
    turn(0);
    while (outcome.calls < (int)LINK_ORDERS_MAX)
        turn(0);
    cr_assert(order(true) == -ECONNREFUSED);
}

/* ---- pushed values ---- */

Test(link, a_daemon_that_does_not_push_is_asked)
{
    fake = status_daemon_start(path);
    status_daemon_push(fake, false);
    refresh();
    status_daemon_set_state(fake, "ready");
    refresh();
    cr_assert_str_eq(state(), "ready");
    cr_assert_str_eq(mirror_text(mirror, MIRROR_POOL), "section_pool 1\n");
    cr_assert(status_daemon_count(fake, WIRE_SUBSCRIBE) == 1);
    cr_assert(status_daemon_count(fake, WIRE_MODELS) >= 2);
}

Test(link, changes_come_without_a_question)
{
    fake = status_daemon_start(path);
    refresh();
    status_daemon_set_state(fake, "loading");
    while (strcmp(state(), "loading") != 0)
        turn(0);
    status_daemon_set_model(fake, "beta");
    while (!mirror_model(mirror, "beta") || mirror_model(mirror, "alpha"))
        turn(0);
    cr_assert(status_daemon_count(fake, WIRE_MODELS) == 0);
    cr_assert(status_daemon_count(fake, WIRE_PING) == 0);
}

Test(link, pushes_end_when_nobody_wants_them_and_begin_again)
{
    fake = status_daemon_start(path);
    refresh();
    link_want_values(link_, false);
    while (status_daemon_count(fake, WIRE_CANCEL) == 0)
        turn(0);
    status_daemon_set_state(fake, "ready");
    for (int i = 0; i < 3; i++)
        turn(0);
    cr_assert_str_eq(state(), "cold");
    link_want_values(link_, true);
    refresh();
    cr_assert_str_eq(state(), "ready");
    cr_assert(status_daemon_count(fake, WIRE_SUBSCRIBE) == 2);
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 1);
}

/* ---- events ---- */

static void expect_events(struct events_reader *reader, const char *expected)
{
    char text[256];
    size_t bytes, used = 0;

    while (used < strlen(expected)) {
        turn(0);
        cr_assert(events_read(events, reader, text + used, sizeof(text) - used, &bytes) == 0);
        used += bytes;
    }
    cr_assert_eq(used, strlen(expected));
    cr_assert(memcmp(text, expected, used) == 0);
}

Test(link, events_come_while_they_are_wanted)
{
    struct events_reader reader;

    fake = status_daemon_start(path);
    link_want_events(link_, true);
    events_reader_init(events, &reader);
    refresh(); /* what is asked after the subscription is answered after it */
    status_daemon_event(fake, "{\"event\":1}", 0);
    status_daemon_event(fake, NULL, 5);
    status_daemon_event(fake, "{\"event\":2}", 0);
    expect_events(&reader, "{\"event\":1}\n{\"event\":\"lost\",\"count\":5}\n{\"event\":2}\n");
    link_want_events(link_, false);
    turn(0);
    refresh();
    status_daemon_event(fake, "{\"event\":3}", 0);
    refresh();
    cr_assert(!events_pending(events, &reader));
    cr_assert(link_events_error(link_) == 0);
    events_reader_done(&reader);
}

Test(link, events_of_the_next_daemon_come_as_well)
{
    struct events_reader reader;

    fake = status_daemon_start(path);
    link_want_events(link_, true);
    refresh();
    fake = status_daemon_stop(fake);
    events_reader_init(events, &reader);
    refresh();
    cr_assert_str_eq(status(), "inactive");
    fake = status_daemon_start(path);
    refresh();
    status_daemon_event(fake, "again", 0);
    expect_events(&reader, "again\n");
    events_reader_done(&reader);
}

/* ---- what is set ---- */

Test(link, pins_and_keep_alive_are_set)
{
    fake = status_daemon_start(path);
    cr_assert(order_of(LINK_PIN, 1) == 0);
    cr_assert(order_of(LINK_KEEP_ALIVE, 1500000) == 0);
    refresh();
    cr_assert(mirror_model(mirror, "alpha")->pinned);
    cr_assert(mirror_model(mirror, "alpha")->keep_alive_us == 1500000);
    cr_assert(order_of(LINK_PIN, 0) == 0);
    refresh();
    cr_assert(!mirror_model(mirror, "alpha")->pinned);
    status_daemon_refuse(fake, "forbidden");
    cr_assert(order_of(LINK_PIN, 1) == -EACCES);
}

Test(link, nothing_is_set_where_nobody_runs)
{
    fake = status_daemon_start_activated(path);
    cr_assert(order_of(LINK_PIN, 1) == -ECONNREFUSED);
    cr_assert(order_of(LINK_KEEP_ALIVE, 0) == -ECONNREFUSED);
    cr_assert(order_of(LINK_PIN, 0) == 0);
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 0);
}

/* ---- in whose name ---- */

static const char *last_caller(void)
{
    static char text[256];

    status_daemon_get_caller(fake, text, sizeof(text));
    return text;
}

Test(link, orders_go_in_the_name_of_who_gave_them)
{
    fake = status_daemon_start(path); /* under our uid */
    cr_assert(order(true) == 0);
    cr_assert_str_eq(last_caller(), "self");
    caller = (struct caller){.uid = geteuid() + 7, .n_gids = 3, .gids = {100, 27, 44}};
    cr_assert(order(false) == 0);
    char expected[64];
    snprintf(expected, sizeof(expected), "%u 100 27 44", geteuid() + 7);
    cr_assert_str_eq(last_caller(), expected);
    caller_init(&caller, geteuid(), getegid(), 0);
    cr_assert(order(true) == 0);
    cr_assert_str_eq(last_caller(), "self", "the identity of the one before stuck");
}

/* ---- holds ---- */

static struct outcome held;

static struct link_order *take_hold(void)
{
    struct link_order *hold;

    held = (struct outcome){0};
    cr_assert(give(LINK_HOLD, 0, &held, &hold) == 0);
    turn_until_told(&held, 1);
    cr_assert(held.error == 0);
    return hold;
}

static void turn_until_holds(uint64_t n)
{
    uint64_t end_us = view_now_us() + PATIENCE_US;

    while (status_daemon_holds(fake) != n) {
        turn(0);
        cr_assert(view_now_us() < end_us);
    }
}

Test(link, a_hold_stays_until_it_is_dropped)
{
    struct link_order *hold;

    fake = status_daemon_start(path);
    hold = take_hold();
    cr_assert(status_daemon_holds(fake) == 1);
    refresh();
    cr_assert_str_eq(state(), "queued");
    cr_assert(mirror_model(mirror, "alpha")->holds == 1);
    link_drop(link_, hold);
    refresh();
    cr_assert(status_daemon_holds(fake) == 0);
    cr_assert(mirror_model(mirror, "alpha")->holds == 0, "what is seen is older than the drop");
    cr_assert(held.calls == 1);
}

Test(link, a_hold_starts_a_daemon)
{
    fake = status_daemon_start_activated(path);
    refresh();
    take_hold();
    cr_assert(status_daemon_holds(fake) == 1);
}

Test(link, a_hold_that_is_refused_is_told)
{
    struct link_order *hold;

    fake = status_daemon_start(path);
    status_daemon_refuse(fake, "busy");
    held = (struct outcome){0};
    cr_assert(give(LINK_HOLD, 0, &held, &hold) == 0);
    turn_until_told(&held, 1);
    cr_assert(held.error == -EBUSY);
    fake = status_daemon_stop(fake);
    held = (struct outcome){0};
    cr_assert(give(LINK_HOLD, 0, &held, &hold) == 0);
    turn_until_told(&held, 1);
    cr_assert(held.error == -ECONNREFUSED);
}

Test(link, a_hold_of_a_silent_daemon_times_out_and_is_not_kept)
{
    struct link_order *hold;

    fake = status_daemon_start(path);
    refresh();
    status_daemon_mute(fake, true);
    held = (struct outcome){0};
    cr_assert(give(LINK_HOLD, 0, &held, &hold) == 0);
    turn_until_told(&held, 1);
    cr_assert(held.error == -ETIMEDOUT);
    status_daemon_mute(fake, false);
    while (status_daemon_count(fake, WIRE_CANCEL) == 0)
        turn(0);
    turn_until_holds(0);
    cr_assert(held.calls == 1);
}

Test(link, a_hold_whose_load_fails_is_told_a_second_time)
{
    fake = status_daemon_start(path);
    take_hold();
    status_daemon_break_holds(fake, "load-failed");
    turn_until_told(&held, 2);
    cr_assert(held.error == -EIO);
    refresh();
    cr_assert(status_daemon_holds(fake) == 0);
}

Test(link, a_hold_is_taken_again_from_the_next_daemon)
{
    fake = status_daemon_start(path);
    caller = (struct caller){.uid = geteuid() + 7, .n_gids = 1, .gids = {100}};
    take_hold();
    fake = status_daemon_stop(fake);
    for (int i = 0; i < 30; i++)
        turn(0);
    fake = status_daemon_start(path);
    turn_until_holds(1);
    char expected[64];
    snprintf(expected, sizeof(expected), "%u 100", geteuid() + 7);
    cr_assert_str_eq(last_caller(), expected);
    status_daemon_hang_up(fake);
    turn_until_holds(0);
    turn_until_holds(1);
    cr_assert(held.calls == 1);
}

Test(link, a_hold_starts_no_daemon_a_second_time)
{
    struct link_order *hold;

    fake = status_daemon_start(path);
    hold = take_hold();
    fake = status_daemon_stop(fake);
    fake = status_daemon_start_activated(path);
    for (int i = 0; i < 60; i++)
        turn(0);
    cr_assert(status_daemon_count(fake, WIRE_HELLO) == 0);
    link_drop(link_, hold);
    turn(0);
    cr_assert(held.calls == 1);
}

Test(link, a_hold_survives_a_daemon_on_its_way_out)
{
    fake = status_daemon_start(path);
    take_hold();
    status_daemon_break_holds(fake, "shutting-down");
    turn_until_holds(0);
    turn_until_holds(1);
    status_daemon_go_away(fake);
    turn_until_holds(0);
    turn_until_holds(1);
    cr_assert(held.calls == 1);
}

Test(link, many_holds_come_and_go)
{
    static struct link_order *holds[100];

    fake = status_daemon_start(path);
    for (int i = 0; i < 100; i++)
        holds[i] = take_hold();
    cr_assert(status_daemon_holds(fake) == 100);
    for (int i = 0; i < 100; i += 2)
        link_drop(link_, holds[i]);
    turn_until_holds(50);
    for (int i = 1; i < 100; i += 2)
        link_drop(link_, holds[i]);
    turn_until_holds(0);
}
