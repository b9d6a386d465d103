#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "fs/mirror.h"
#include "lib/cleanup.h"

/* Virtual time: it stands still until a test moves it. */
static struct mirror *mirror;
static uint64_t now;

static void setup(void)
{
    cr_assert(mirror_new(&mirror) == 0);
    now = 1000000000;
}

static void teardown(void)
{
    mirror = mirror_free(mirror);
}

TestSuite(mirror, .init = setup, .fini = teardown);

#define MS 1000u

static uint64_t fresh(void)
{
    return now - MIRROR_AGE_US;
}

static bool answers(void)
{
    return mirror_answers(mirror, fresh(), now);
}

static enum mirror_action next(void)
{
    return mirror_next(mirror, fresh());
}

static void expect_status(const char *word)
{
    cr_assert_str_eq(mirror_status(mirror, now), word);
}

static void end_part(enum mirror_part part)
{
    mirror_take(mirror, part, &(struct hearth_reply){.kind = HEARTH_DONE}, now);
}

static void give_model(const char *name, const char *state)
{
    mirror_take(mirror, MIRROR_MODELS,
                &(struct hearth_reply){.kind = HEARTH_ITEM, .model = name, .state = state}, now);
}

static void give_text(enum mirror_part part, const char *text)
{
    mirror_take(mirror, part,
                &(struct hearth_reply){
                    .kind = HEARTH_ITEM, .text = text, .text_bytes = text ? strlen(text) : 0},
                now);
}

static void connect_it(void)
{
    mirror_connecting(mirror, now);
    now += MS;
    mirror_connected(mirror, now);
}

/* To a daemon that does not push. */
static void connect_it_asked(void)
{
    connect_it();
    mirror_unfed(mirror, true, now);
}

/* Asks and answers everything; the models are `a` in the given state. */
static void refresh(const char *state)
{
    cr_assert(next() == MIRROR_ASK);
    mirror_asked(mirror, now);
    now += MS;
    give_model("a", state);
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        end_part(part);
}

Test(mirror, knows_nothing_at_first_and_wants_to_connect)
{
    cr_assert(!answers());
    cr_assert(next() == MIRROR_CONNECT);
    cr_assert(mirror_n_models(mirror) == 0);
    cr_assert(mirror_version(mirror) == NULL);
    cr_assert_str_eq(mirror_text(mirror, MIRROR_POOL), "");
    expect_status("inactive");
}

Test(mirror, connects_then_asks_then_answers)
{
    mirror_connecting(mirror, now);
    cr_assert(next() == MIRROR_NOTHING && !answers());
    now += MS;
    mirror_connected(mirror, now);
    cr_assert(next() == MIRROR_FEED && !answers());
    mirror_unfed(mirror, true, now);
    cr_assert(next() == MIRROR_ASK && !answers());
    refresh("ready");
    cr_assert(answers() && next() == MIRROR_NOTHING);
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "ready");
    expect_status("running");
}

Test(mirror, a_copy_is_good_for_its_age_and_no_longer)
{
    connect_it_asked();
    refresh("cold");
    now += MIRROR_AGE_US - MS;
    cr_assert(answers() && next() == MIRROR_NOTHING);
    now += MS;
    cr_assert(!answers() && next() == MIRROR_ASK);
}

Test(mirror, age_counts_from_the_question_not_the_answer)
{
    connect_it_asked();
    mirror_asked(mirror, now);
    now += 90 * MS;
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        end_part(part);
    cr_assert(answers());
    now += 20 * MS;
    cr_assert(!answers());
}

Test(mirror, is_complete_only_with_its_last_part)
{
    connect_it_asked();
    mirror_asked(mirror, now);
    for (int part = 1; part < _MIRROR_PART_MAX; part++)
        end_part(part);
    cr_assert(!answers() && next() == MIRROR_NOTHING);
    end_part(0);
    cr_assert(answers());
}

Test(mirror, a_wait_is_not_answered_by_what_was_asked_before_it)
{
    connect_it_asked();
    refresh("cold");
    cr_assert(answers());
    cr_assert(!mirror_answers(mirror, now, now));
    cr_assert(mirror_next(mirror, now) == MIRROR_ASK);
}

Test(mirror, after_an_order_older_copies_answer_nobody)
{
    connect_it_asked();
    refresh("cold");
    mirror_expire(mirror, now);
    cr_assert(!answers() && next() == MIRROR_ASK);
    now += MS;
    refresh("queued");
    cr_assert(answers());
}

Test(mirror, models_change_only_when_the_list_is_complete)
{
    connect_it_asked();
    refresh("cold");
    now += MIRROR_AGE_US;
    mirror_asked(mirror, now);
    give_model("b", "ready");
    cr_assert(mirror_model(mirror, "b") == NULL && mirror_model(mirror, "a") != NULL);
    end_part(MIRROR_MODELS);
    cr_assert(mirror_model(mirror, "b") != NULL && mirror_model(mirror, "a") == NULL);
}

Test(mirror, an_error_leaves_the_last_values_and_counts_as_an_answer)
{
    connect_it_asked();
    refresh("ready");
    now += MIRROR_AGE_US;
    mirror_asked(mirror, now);
    give_model("half", "cold");
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        mirror_take(mirror, part, &(struct hearth_reply){.kind = HEARTH_ERROR, .code = "busy"},
                    now);
    cr_assert(answers());
    cr_assert(mirror_model(mirror, "a") && !mirror_model(mirror, "half"));
}

Test(mirror, silence_for_a_second_gives_the_last_copy)
{
    connect_it_asked();
    refresh("loading");
    now += 10 * MIRROR_SILENCE_US;
    mirror_asked(mirror, now);
    now += MIRROR_PATIENCE_US - MS;
    cr_assert(!answers());
    expect_status("running");
    now += MS;
    cr_assert(answers() && next() == MIRROR_NOTHING);
    expect_status("unresponsive");
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "loading");
}

Test(mirror, a_daemon_that_spoke_just_now_has_its_full_second)
{
    connect_it_asked();
    refresh("ready");
    now += MIRROR_AGE_US;
    mirror_asked(mirror, now);
    now += 500 * MS;
    mirror_heard(mirror, now);
    now += MIRROR_SILENCE_US - MS;
    cr_assert(!answers());
    now += MS;
    cr_assert(answers());
    expect_status("unresponsive");
}

Test(mirror, the_first_word_ends_unresponsive)
{
    connect_it_asked();
    refresh("ready");
    now += MIRROR_AGE_US;
    mirror_asked(mirror, now);
    now += 60 * MIRROR_SILENCE_US;
    expect_status("unresponsive");
    give_model("a", "cold");
    end_part(MIRROR_MODELS);
    expect_status("running");
    cr_assert(!answers());
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        end_part(part);
    cr_assert(!answers() && next() == MIRROR_ASK);
}

Test(mirror, a_hello_that_does_not_come_is_silence_too)
{
    mirror_connecting(mirror, now);
    now += MIRROR_PATIENCE_US;
    cr_assert(answers() && next() == MIRROR_NOTHING);
    expect_status("unresponsive");
}

Test(mirror, a_deaf_daemon_is_unresponsive_for_a_while_and_tried_again)
{
    mirror_connecting(mirror, now);
    mirror_deaf(mirror, now);
    cr_assert(answers() && next() == MIRROR_NOTHING);
    expect_status("unresponsive");
    now += 2 * MIRROR_AGE_US;
    cr_assert(answers() && next() == MIRROR_CONNECT);
    mirror_connecting(mirror, now);
    cr_assert(answers());
    mirror_connected(mirror, now);
    expect_status("running");
    cr_assert(!answers());
}

Test(mirror, without_a_daemon_models_are_cold_and_nothing_is_counted)
{
    connect_it_asked();
    mirror_asked(mirror, now);
    give_text(MIRROR_PROMETHEUS, "hearth_x 1\n");
    mirror_take(mirror, MIRROR_MODELS,
                &(struct hearth_reply){.kind = HEARTH_ITEM,
                                       .model = "a",
                                       .state = "ready",
                                       .memory_bytes = 5,
                                       .preload = true,
                                       .info = "arch llama\n"},
                now);
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        end_part(part);
    mirror_lost(mirror);
    cr_assert(!answers() && next() == MIRROR_CONNECT);
    mirror_connecting(mirror, now);
    mirror_absent(mirror, NULL, 0, now);
    cr_assert(answers() && next() == MIRROR_NOTHING);
    cr_assert(mirror_is_absent(mirror, fresh()));
    expect_status("inactive");
    const struct mirror_model *model = mirror_model(mirror, "a");
    cr_assert(model && model->memory_bytes == 0 && !model->preload && !model->info);
    cr_assert_str_eq(model->state, "cold");
    cr_assert_str_eq(mirror_text(mirror, MIRROR_PROMETHEUS), "");
}

Test(mirror, the_list_of_names_replaces_what_the_daemon_said_last)
{
    connect_it_asked();
    refresh("ready");
    mirror_lost(mirror);
    mirror_absent(mirror, (const char *[]){"x", "y"}, 2, now);
    cr_assert(mirror_n_models(mirror) == 2 && !mirror_model(mirror, "a"));
    cr_assert_str_eq(mirror_model_at(mirror, 1)->name, "y");
    cr_assert_str_eq(mirror_model(mirror, "x")->state, "cold");
}

Test(mirror, one_that_is_being_started_is_starting_until_it_is_found)
{
    mirror_absent(mirror, NULL, 0, now);
    mirror_starting(mirror, true);
    cr_assert(answers());
    expect_status("starting");
    now += MIRROR_AGE_US;
    mirror_absent(mirror, NULL, 0, now);
    expect_status("starting");
    connect_it();
    expect_status("running");
    mirror_lost(mirror);
    mirror_absent(mirror, NULL, 0, now);
    expect_status("inactive");
    mirror_starting(mirror, true);
    mirror_starting(mirror, false);
    expect_status("inactive");
}

Test(mirror, looks_for_a_new_daemon_once_the_finding_is_old)
{
    mirror_connecting(mirror, now);
    mirror_absent(mirror, NULL, 0, now);
    now += MIRROR_AGE_US - MS;
    cr_assert(answers() && next() == MIRROR_NOTHING);
    now += 2 * MS;
    cr_assert(!answers() && next() == MIRROR_CONNECT);
    cr_assert(!mirror_is_absent(mirror, fresh()));
}

Test(mirror, a_connection_lost_right_after_an_absence_is_looked_into)
{
    mirror_connecting(mirror, now);
    mirror_absent(mirror, NULL, 0, now);
    connect_it_asked();
    mirror_lost(mirror);
    cr_assert(!answers() && next() == MIRROR_CONNECT);
}

Test(mirror, a_daemon_on_its_way_out_is_draining)
{
    connect_it_asked();
    refresh("ready");
    mirror_going(mirror, now);
    cr_assert(answers() && !mirror_is_absent(mirror, fresh()));
    expect_status("draining");
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "ready");
    now += MIRROR_AGE_US + MS;
    cr_assert(next() == MIRROR_CONNECT);
}

Test(mirror, the_daemons_own_words_are_taken_only_if_they_are_words)
{
    static const struct {
        const char *said, *shown;
    } cases[] = {
        {"draining", "draining"}, {"starting", "starting"},         {"", "running"},
        {NULL, "running"},        {"two words", "running"},         {"line\nbreak", "running"},
        {"UPPER", "running"},     {"averyverylongword", "running"},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        mirror_lost(mirror);
        connect_it_asked();
        mirror_asked(mirror, now);
        mirror_take(mirror, MIRROR_STATUS,
                    &(struct hearth_reply){.kind = HEARTH_ITEM, .state = cases[i].said}, now);
        expect_status(cases[i].shown);
    }
}

Test(mirror, replies_nobody_asked_for_change_nothing)
{
    give_model("a", "ready");
    end_part(MIRROR_MODELS);
    cr_assert(mirror_n_models(mirror) == 0);
    connect_it_asked();
    give_text(MIRROR_POOL, "x 1\n");
    end_part(MIRROR_POOL);
    cr_assert_str_eq(mirror_text(mirror, MIRROR_POOL), "");
    mirror_asked(mirror, now);
    end_part(MIRROR_POOL);
    give_text(MIRROR_POOL, "y 1\n");
    cr_assert_str_eq(mirror_text(mirror, MIRROR_POOL), "");
}

Test(mirror, too_many_models_and_impossible_names_are_left_out)
{
    char name[MIRROR_NAME_MAX + 8];

    connect_it_asked();
    mirror_asked(mirror, now);
    give_model(NULL, "cold");
    give_model("", "cold");
    memset(name, 'x', sizeof(name));
    name[sizeof(name) - 1] = '\0';
    give_model(name, "cold");
    for (unsigned i = 0; i < MIRROR_MODELS_MAX + 5; i++) {
        snprintf(name, sizeof(name), "m%u", i);
        give_model(name, "cold");
    }
    end_part(MIRROR_MODELS);
    cr_assert(mirror_n_models(mirror) == MIRROR_MODELS_MAX);
}

Test(mirror, says_when_to_look_again)
{
    cr_assert(mirror_due_us(mirror, false, now) == UINT64_MAX);
    cr_assert(mirror_due_us(mirror, true, now) == now);
    connect_it_asked();
    refresh("ready");
    cr_assert(mirror_due_us(mirror, false, now) == UINT64_MAX);
    cr_assert(mirror_due_us(mirror, true, now) == now - MS + MIRROR_AGE_US);
    now += 5 * MIRROR_SILENCE_US;
    mirror_asked(mirror, now);
    cr_assert(mirror_due_us(mirror, false, now) == now + MIRROR_PATIENCE_US);
    cr_assert(mirror_due_us(mirror, true, now + MIRROR_PATIENCE_US) == UINT64_MAX);
    mirror_deaf(mirror, now);
    cr_assert(mirror_due_us(mirror, false, now) == now + MIRROR_SILENCE_US);
}

Test(mirror, every_change_is_counted)
{
    uint64_t changes = mirror_changes(mirror);

    connect_it_asked();
    cr_assert(mirror_changes(mirror) > changes);
    changes = mirror_changes(mirror);
    refresh("ready");
    cr_assert(mirror_changes(mirror) > changes);
    changes = mirror_changes(mirror);
    mirror_lost(mirror);
    cr_assert(mirror_changes(mirror) > changes);
}

/* ---- pushes ---- */

static void feed_it(void)
{
    connect_it();
    cr_assert(next() == MIRROR_FEED);
    mirror_feeding(mirror, now);
    cr_assert(!answers() && next() == MIRROR_NOTHING, "the first push is awaited");
}

static void push(const struct hearth_reply *item)
{
    struct hearth_reply reply = *item;

    reply.kind = HEARTH_ITEM;
    mirror_push(mirror, &reply, now);
}

static void push_model(const char *name, const char *state)
{
    push(&(struct hearth_reply){.model = name, .state = state});
}

static void push_end(void)
{
    push(&(struct hearth_reply){.state = "running", .version = "1.0"});
}

Test(mirror, the_first_push_is_the_copy)
{
    feed_it();
    push_model("a", "ready");
    push_model("b", "cold");
    push(&(struct hearth_reply){.name = "pool", .text = "open 1\n"});
    cr_assert(!answers(), "a part of it is no copy");
    push_end();
    cr_assert(answers() && next() == MIRROR_NOTHING);
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "ready");
    cr_assert_str_eq(mirror_text(mirror, MIRROR_POOL), "open 1\n");
    cr_assert_str_eq(mirror_version(mirror), "1.0");
    expect_status("running");
}

Test(mirror, a_push_changes_what_it_names_and_nothing_else)
{
    uint64_t changes;

    feed_it();
    push_model("a", "cold");
    push_model("b", "cold");
    push(&(struct hearth_reply){.name = "loader", .text = "loads 1\n"});
    push_end();
    changes = mirror_changes(mirror);
    now += MIRROR_AGE_US;
    push_model("b", "queued");
    push_end();
    cr_assert(mirror_changes(mirror) > changes && answers());
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "cold");
    cr_assert_str_eq(mirror_model(mirror, "b")->state, "queued");
    cr_assert_str_eq(mirror_text(mirror, MIRROR_LOADER), "loads 1\n");
}

Test(mirror, a_model_without_a_state_is_gone)
{
    feed_it();
    push_model("a", "cold");
    push_model("b", "ready");
    push_end();
    push_model("a", NULL);
    push_model("never there", "");
    push_end();
    cr_assert(!mirror_model(mirror, "a") && mirror_n_models(mirror) == 1);
    cr_assert_str_eq(mirror_model(mirror, "b")->state, "ready");
}

Test(mirror, a_push_after_a_loss_has_everything)
{
    feed_it();
    push_model("a", "cold");
    push_model("b", "cold");
    push_end();
    push(&(struct hearth_reply){.lost_events = 3});
    push_model("b", "ready");
    push_model("c", "cold");
    cr_assert(mirror_model(mirror, "a"), "nothing is gone before the push ends");
    push_end();
    cr_assert(!mirror_model(mirror, "a") && mirror_n_models(mirror) == 2);
    cr_assert_str_eq(mirror_model(mirror, "b")->state, "ready");
    /* Also where it comes in the middle of another push. */
    push_model("d", "cold");
    push(&(struct hearth_reply){.lost_events = 1});
    push_model("d", "cold");
    push_end();
    cr_assert(mirror_n_models(mirror) == 1 && mirror_model(mirror, "d"));
}

Test(mirror, models_that_are_asked_for_amid_a_push_stay)
{
    feed_it();
    push_end();
    mirror_expire(mirror, now);
    push(&(struct hearth_reply){.lost_events = 1});
    mirror_asked(mirror, now);
    give_model("a", "queued");
    end_part(MIRROR_MODELS);
    push_end();
    cr_assert(mirror_model(mirror, "a"));
}

Test(mirror, a_pushed_copy_holds_as_long_as_the_daemon_lives)
{
    feed_it();
    push_model("a", "ready");
    push_end();
    for (int i = 0; i < 3; i++) {
        now += 5 * MIRROR_SILENCE_US; /* nothing has changed, nothing was said */
        cr_assert(!answers() && next() == MIRROR_PING);
        expect_status("running");
        mirror_pinged(mirror, now);
        cr_assert(!answers() && next() == MIRROR_NOTHING);
        now += MS;
        mirror_ponged(mirror, now);
        cr_assert(answers() && next() == MIRROR_NOTHING);
    }
    now += MIRROR_AGE_US;
    cr_assert(!answers());
    push_end();
    cr_assert(answers(), "a push is a sign of life");
}

Test(mirror, a_ping_without_an_answer_makes_it_unresponsive)
{
    feed_it();
    push_model("a", "ready");
    push_end();
    now += MIRROR_AGE_US;
    mirror_pinged(mirror, now);
    now += MIRROR_SILENCE_US;
    cr_assert(answers());
    expect_status("unresponsive");
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "ready");
    push_model("a", "cold");
    expect_status("running");
    push_end();
    mirror_ponged(mirror, now);
    cr_assert(answers());
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "cold");
}

Test(mirror, after_an_order_the_values_are_asked_for)
{
    feed_it();
    push_model("a", "cold");
    push_end();
    now += MS;
    mirror_expire(mirror, now);
    cr_assert(!answers() && next() == MIRROR_ASK);
    now += MS;
    mirror_asked(mirror, now);
    give_model("a", "queued");
    cr_assert(!answers());
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        end_part(part);
    cr_assert(answers() && next() == MIRROR_NOTHING);
    cr_assert_str_eq(mirror_model(mirror, "a")->state, "queued");
}

Test(mirror, a_push_that_began_before_an_order_does_not_answer_for_it)
{
    feed_it();
    push_model("a", "cold");
    push_end();
    now += MS;
    push_model("a", "cold");
    now += MS;
    mirror_expire(mirror, now);
    now += MS;
    push_end();
    cr_assert(!answers());
    push_model("a", "queued");
    push_end();
    cr_assert(answers());
}

Test(mirror, who_watches_a_pushed_copy_asks_seldom)
{
    feed_it();
    push_end();
    cr_assert(mirror_due_us(mirror, true, now) == now + MIRROR_PULSE_US);
    cr_assert(mirror_watch_since_us(mirror, now) == now - MIRROR_PULSE_US);
    now += MIRROR_PULSE_US + MS;
    cr_assert(mirror_next(mirror, mirror_watch_since_us(mirror, now)) == MIRROR_PING);
    cr_assert(mirror_due_us(mirror, false, now) == UINT64_MAX);
}

Test(mirror, pushes_that_end_leave_the_copy)
{
    feed_it();
    push_model("a", "ready");
    push_end();
    mirror_unfed(mirror, false, now);
    cr_assert(answers());
    now += MIRROR_AGE_US + MS;
    cr_assert(!answers() && next() == MIRROR_FEED, "they can begin again");
    mirror_feeding(mirror, now);
    push_model("b", "cold");
    push_end();
    cr_assert(!mirror_model(mirror, "a") && mirror_model(mirror, "b"), "with everything");
    mirror_unfed(mirror, true, now);
    now += MIRROR_AGE_US + MS;
    cr_assert(next() == MIRROR_ASK, "or not");
    push_model("c", "cold");
    cr_assert(!mirror_model(mirror, "c"), "what comes late is not taken");
}

Test(mirror, pushes_of_hostile_sizes_are_bounded)
{
    char name[MIRROR_NAME_MAX + 2], number[16];

    feed_it();
    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = '\0';
    push_model(name, "cold");
    push_model("", "cold");
    push(&(struct hearth_reply){.name = "status", .text = "x"});
    push(&(struct hearth_reply){.name = "no such section", .text = "x"});
    for (unsigned i = 0; i < MIRROR_MODELS_MAX + 10; i++) {
        snprintf(number, sizeof(number), "m%u", i);
        push_model(number, i % 2 ? "cold" : "a word that is far too long to be one");
    }
    push_end();
    cr_assert(mirror_n_models(mirror) == MIRROR_MODELS_MAX);
    cr_assert(!mirror_model(mirror, name));
    cr_assert_str_eq(mirror_model(mirror, "m0")->state, "cold");
}
