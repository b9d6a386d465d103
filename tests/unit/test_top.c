/* hearth top's figures and their picture: rates out of two samples, and text for any window. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/top.h"
#include "lib/cleanup.h"

static void add_flat(struct top_sample *sample, const char *lines)
{
    struct hearth_reply reply = {.kind = HEARTH_ITEM, .name = "section", .text = lines};
    reply.text_bytes = strlen(lines);
    top_sample_add(sample, &reply);
}

static void add_model(struct top_sample *sample, const char *name, const char *state,
                      const char *stats)
{
    struct hearth_reply reply = {
        .kind = HEARTH_ITEM, .model = name, .state = state, .stats = stats};
    top_sample_add(sample, &reply);
}

static struct top_sample before, after;
static struct top_figures figures;

static void setup(void)
{
    before.at_us = 1000000;
    after.at_us = 3000000;
}

static void teardown(void)
{
    top_figures_done(&figures);
    top_sample_done(&before);
    top_sample_done(&after);
}

TestSuite(top, .init = setup, .fini = teardown);

static char *picture(size_t columns, size_t rows)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    top_draw(&figures, "running", "/s", columns, rows, "\n", out);
    fclose(out);
    return text;
}

Test(top, rates_are_growth_over_the_time_between)
{
    add_flat(&before, "generations_total 10\ncompletion_tokens_total 100\nsteps_total 4\n"
                      "step_rows_total 8\nstep_runnable_total 8\nengine_busy_seconds_total 1.5\n");
    add_flat(&after, "generations_total 30\ncompletion_tokens_total 101\nsteps_total 8\n"
                     "step_rows_total 18\nstep_runnable_total 28\nengine_busy_seconds_total 2.5\n"
                     "queue 7\n");
    cr_assert_eq(top_figures_make(&before, &after, &figures), 0);
    cr_expect_eq(figures.requests_per_s, 10);
    cr_expect_eq(figures.tokens_per_s, 0.5);
    cr_expect_eq(figures.steps_per_s, 2);
    cr_expect_eq(figures.batch_rows, 2.5);
    cr_expect_eq(figures.batch_efficiency, 0.5);
    cr_expect_eq(figures.engine_busy, 0.5);
    cr_expect_eq(figures.queue, 7);
    cr_expect(isnan(figures.failed_per_s), "what is not there is not 0");
}

Test(top, rates_are_unknown_without_an_earlier_sample)
{
    add_flat(&after, "generations_total 30\nqueue 7\n");
    add_model(&after, "m", "ready", "requests 5\n");
    cr_assert_eq(top_figures_make(NULL, &after, &figures), 0);
    cr_expect(isnan(figures.requests_per_s) && isnan(figures.engine_busy));
    cr_expect(isnan(figures.models[0].requests_per_s));
    cr_expect_eq(figures.queue, 7);
    _cleanup_free_ char *text = picture(80, 24);
    cr_expect(strstr(text, "requests       -/s"), "%s", text);
}

Test(top, a_daemon_that_began_anew_has_not_run_backwards)
{
    add_flat(&before, "generations_total 1000\nengine_busy_seconds_total 500\n");
    add_flat(&after, "generations_total 3\nengine_busy_seconds_total 1\n");
    add_model(&before, "m", "ready", "requests 100\ntokens 100\n");
    add_model(&after, "m", "ready", "requests 1\ntokens 1\n");
    cr_assert_eq(top_figures_make(&before, &after, &figures), 0);
    cr_expect_eq(figures.requests_per_s, 0);
    cr_expect_eq(figures.engine_busy, 0);
    cr_expect_eq(figures.models[0].tokens_per_s, 0);
}

Test(top, ratios_stay_within_one)
{
    add_flat(&before, "step_rows_total 0\nstep_runnable_total 0\nengine_busy_seconds_total 0\n");
    add_flat(&after, "step_rows_total 9\nstep_runnable_total 8\nengine_busy_seconds_total 3\n");
    cr_assert_eq(top_figures_make(&before, &after, &figures), 0);
    cr_expect_eq(figures.batch_efficiency, 1);
    cr_expect_eq(figures.engine_busy, 1);
    cr_expect(isnan(figures.batch_rows), "no steps, no size");
}

Test(top, what_works_comes_first_and_the_cold_last)
{
    const char *const order[] = {"busy", "slow", "idle", "loading", "acold", "bcold"};
    add_model(&before, "busy", "ready", "requests 0\ntokens 0\n");
    add_model(&before, "slow", "ready", "requests 0\ntokens 0\n");
    add_model(&after, "bcold", "cold", NULL);
    add_model(&after, "loading", "loading", NULL);
    add_model(&after, "slow", "ready", "requests 1\ntokens 0\n");
    add_model(&after, "idle", "ready", "requests 100\ntokens 1000\n");
    add_model(&after, "busy", "ready", "requests 1\ntokens 500\n");
    add_model(&after, "acold", "cold", NULL);
    cr_assert_eq(top_figures_make(&before, &after, &figures), 0);
    for (size_t i = 0; i < ELEMENTSOF(order); i++)
        cr_expect_str_eq(figures.models[i].model->name, order[i], "place %zu", i);
}

Test(top, every_window_is_kept_to)
{
    char name[129];
    memset(name, 'n', 128);
    name[128] = '\0';
    add_flat(&after, "queue 1\n");
    for (int i = 0; i < 40; i++)
        add_model(&after, name, "failed", NULL);
    after.models[0].sentence = strdup("\xc3\xa4\xc3\xb6\xc3\xbc because it was so");
    cr_assert_eq(top_figures_make(&before, &after, &figures), 0);
    for (size_t columns = 1; columns < 260; columns += 7)
        for (size_t rows = 1; rows < 60; rows += 3) {
            _cleanup_free_ char *text = picture(columns, rows);
            size_t n = 1, width = 0;
            for (const char *c = text; *c; c++) {
                if (*c == '\n') {
                    n++;
                    width = 0;
                } else if (((unsigned char)*c & 0xc0) != 0x80) {
                    width++;
                }
                cr_assert_leq(width, columns);
            }
            cr_assert_eq(n, MIN(rows, 48u), "%zu lines in %zu rows", n, rows);
        }
    _cleanup_free_ char *text = picture(80, 20);
    cr_expect(strstr(text, "\nand 29 more"), "%s", text);
}

Test(top, numbers_have_a_width_that_columns_can_trust)
{
    static const struct {
        const char *value, *text;
    } cases[] = {
        {"0", "0"},         {"3", "3"},         {"3.14", "3.1"},        {"9.96", "10"},
        {"99999", "99999"}, {"123456", "123k"}, {"99999499", "99999k"}, {"123456789", "123.5M"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        char lines[64], wanted[64];
        struct top_sample sample = {0};
        snprintf(lines, sizeof(lines), "queue %s\n", cases[i].value);
        snprintf(wanted, sizeof(wanted), "queue %s   ", cases[i].text);
        add_flat(&sample, lines);
        cr_assert_eq(top_figures_make(NULL, &sample, &figures), 0);
        _cleanup_free_ char *text = picture(200, 24);
        cr_expect(strstr(text, wanted), "%s is not '%s': %s", cases[i].value, wanted, text);
        top_figures_done(&figures);
        top_sample_done(&sample);
    }
}

Test(top, uptime_and_notes_are_told_as_people_do)
{
    static const struct {
        const char *uptime, *text;
    } cases[] = {{"59", "up 59s "},
                 {"61", "up 1m01s "},
                 {"3660", "up 1h01m "},
                 {"90000", "up 1d01h "},
                 {"x", "up - "}};
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        char lines[64];
        struct top_sample sample = {0};
        snprintf(lines, sizeof(lines), "uptime_s %s\n", cases[i].uptime);
        add_flat(&sample, lines);
        add_model(&sample, "p", "ready", NULL);
        sample.models[0].pinned = true;
        add_model(&sample, "l", "loading", NULL);
        sample.models[1].done_bytes = 1024;
        sample.models[1].total_bytes = 2048;
        cr_assert_eq(top_figures_make(NULL, &sample, &figures), 0);
        _cleanup_free_ char *text = picture(200, 24);
        cr_expect(strstr(text, cases[i].text), "%s", text);
        cr_expect(strstr(text, "pinned") && strstr(text, "1.0KiB of 2.0KiB"), "%s", text);
        top_figures_done(&figures);
        top_sample_done(&sample);
    }
}

Test(top, a_flood_of_text_and_models_is_bounded)
{
    _cleanup_free_ char *lines = malloc(800001);
    memset(lines, 'x', 800000);
    lines[800000] = '\0';
    add_flat(&after, lines);
    add_flat(&after, lines);
    add_flat(&after, "queue 5\n");
    cr_expect_lt(after.flat_len, 1u << 20);
    cr_expect_eq(top_sample_value(&after, "queue"), 5);
    for (int i = 0; i < 9000; i++)
        add_model(&after, "m", "cold", NULL);
    cr_expect_leq(after.n_models, 8192u);
    cr_expect_not(after.no_memory);
}
