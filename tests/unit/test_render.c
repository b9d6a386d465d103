#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fs/render.h"
#include "lib/cleanup.h"

#define NOW 1000000000u

static struct mirror *mirror;

static const char prometheus[] =
    "# HELP hearth_steps_total Engine steps\n"
    "# TYPE hearth_steps_total counter\n"
    "hearth_steps_total 12\n"
    "# HELP hearth_steps Not to be confused with its longer neighbours\n"
    "# TYPE hearth_steps gauge\n"
    "hearth_steps 3\n"
    "# HELP hearth_load_seconds Time of loads\n"
    "# TYPE hearth_load_seconds histogram\n"
    "hearth_load_seconds_bucket{le=\"0.1\"} 1\n"
    "hearth_load_seconds_bucket{le=\"+Inf\"} 2\n"
    "hearth_load_seconds_sum 0.25\n"
    "hearth_load_seconds_count 2\n"
    "# HELP hearth_model_requests_total Requests by model\n"
    "# TYPE hearth_model_requests_total counter\n"
    "hearth_model_requests_total{model=\"ember\",kind=\"chat\"} 7\n"
    "hearth_model_requests_total{model=\"a } b \\\"c\"} 8\n"
    "# TYPE other_thing gauge\n"
    "other_thing 1\n"
    "# TYPE hearth_empty gauge\n";

/* A mirror with one model, `a`, and the text above. */
static void fill(const struct hearth_reply *model)
{
    cr_assert(mirror_new(&mirror) == 0);
    mirror_connecting(mirror, NOW);
    mirror_connected(mirror, NOW);
    mirror_asked(mirror, NOW);
    if (model)
        mirror_take(mirror, MIRROR_MODELS, model, NOW);
    mirror_take(mirror, MIRROR_PROMETHEUS,
                &(struct hearth_reply){.kind = HEARTH_ITEM, .text = prometheus}, NOW);
    mirror_take(mirror, MIRROR_POOL,
                &(struct hearth_reply){.kind = HEARTH_ITEM, .text = "connections 2\nslots 3"}, NOW);
    mirror_take(mirror, MIRROR_STATUS,
                &(struct hearth_reply){.kind = HEARTH_ITEM, .state = "running", .version = "9.9"},
                NOW);
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        mirror_take(mirror, part, &(struct hearth_reply){.kind = HEARTH_DONE}, NOW);
}

static void teardown(void)
{
    mirror = mirror_free(mirror);
}

TestSuite(render, .fini = teardown);

static const struct hearth_reply loading = {
    .kind = HEARTH_ITEM,
    .model = "a",
    .state = "loading",
    .done_bytes = 5,
    .total_bytes = 1ull << 40,
    .memory_bytes = 4096,
    .preload = true,
    .keep_alive_us = 1500000,
    .holds = 3,
    .info = "arch llama\n",
    .stats = "requests 1\nloads 2",
    .sentence = "an old story",
};

static void expect(enum tree_what what, const char *subject, const char *text)
{
    _cleanup_free_ char *got = NULL;
    size_t bytes;
    struct tree_node node = {.what = what, .subject = subject};

    cr_assert(render_node(mirror, &node, NOW, &got, &bytes) == 0, "%d", what);
    cr_assert_str_eq(got, text, "%d", what);
    cr_assert_eq(bytes, strlen(text));
}

static int failure(enum tree_what what, const char *subject)
{
    char *text = NULL;
    size_t bytes;
    struct tree_node node = {.what = what, .subject = subject};

    return render_node(mirror, &node, NOW, &text, &bytes);
}

Test(render, gives_each_file_of_a_model_its_value)
{
    fill(&loading);
    expect(TREE_STATE, "a", "loading\n");
    expect(TREE_WAIT, "a", "loading\n");
    expect(TREE_PROGRESS, "a", "done_bytes 5\ntotal_bytes 1099511627776\n");
    expect(TREE_PRELOAD, "a", "1\n");
    expect(TREE_PINNED, "a", "0\n");
    expect(TREE_KEEP_ALIVE, "a", "1.5\n");
    expect(TREE_MEMORY, "a", "4096\n");
    expect(TREE_HOLD, "a", "3\n");
    expect(TREE_INFO, "a", "arch llama\n");
    expect(TREE_STATS, "a", "requests 1\nloads 2\n");
}

Test(render, says_why_a_model_failed_only_while_it_is_failed)
{
    struct hearth_reply model = loading;

    fill(&loading);
    expect(TREE_ERROR, "a", "");
    mirror_free(mirror);
    model.state = "failed";
    fill(&model);
    expect(TREE_ERROR, "a", "an old story\n");
}

Test(render, a_model_that_says_little_has_empty_files)
{
    fill(&(struct hearth_reply){.kind = HEARTH_ITEM, .model = "a"});
    expect(TREE_STATE, "a", "cold\n");
    expect(TREE_INFO, "a", "");
    expect(TREE_STATS, "a", "");
    expect(TREE_ERROR, "a", "");
    expect(TREE_KEEP_ALIVE, "a", "0\n");
}

Test(render, writes_seconds_with_the_digits_they_have)
{
    static const struct {
        uint64_t us;
        const char *text;
    } cases[] = {
        {0, "0\n"},         {60000000, "60\n"},    {1, "0.000001\n"},
        {1200000, "1.2\n"}, {1000100, "1.0001\n"}, {UINT64_MAX, "18446744073709.551615\n"},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct hearth_reply model = loading;
        model.keep_alive_us = cases[i].us;
        mirror_free(mirror);
        fill(&model);
        expect(TREE_KEEP_ALIVE, "a", cases[i].text);
    }
}

Test(render, gives_the_fixed_files_their_values)
{
    fill(NULL);
    expect(TREE_STATUS, NULL, "running\n");
    expect(TREE_VERSION, NULL, "9.9\n");
    expect(TREE_POOL, NULL, "connections 2\nslots 3\n");
    expect(TREE_LOADER, NULL, "");
}

Test(render, says_what_it_knows_without_a_daemon)
{
    cr_assert(mirror_new(&mirror) == 0);
    mirror_absent(mirror, (const char *[]){"a"}, 1, NOW);
    expect(TREE_STATUS, NULL, "inactive\n");
    expect(TREE_VERSION, NULL, HEARTH_VERSION "\n");
    expect(TREE_STATE, "a", "cold\n");
    expect(TREE_PROGRESS, "a", "done_bytes 0\ntotal_bytes 0\n");
    expect(TREE_POOL, NULL, "");
    expect(TREE_PROMETHEUS, NULL,
           "# HELP hearth_up Whether the daemon runs.\n"
           "# TYPE hearth_up gauge\n"
           "hearth_up 0\n");
}

Test(render, puts_up_before_the_daemons_metrics)
{
    _cleanup_free_ char *text = NULL;
    size_t bytes;

    fill(NULL);
    cr_assert(
        render_node(mirror, &(struct tree_node){.what = TREE_PROMETHEUS}, NOW, &text, &bytes) == 0);
    cr_assert(strstr(text, "\nhearth_up 1\n# HELP hearth_steps_total"));
    cr_assert(bytes > strlen(prometheus));
    cr_assert_str_eq(text + bytes - strlen(prometheus), prometheus);
}

Test(render, shows_one_metric_by_its_name)
{
    fill(NULL);
    expect(TREE_METRIC, "steps_total", "12\n");
    expect(TREE_METRIC, "steps", "3\n");
    expect(TREE_METRIC, "empty", "");
}

Test(render, shows_what_tells_the_samples_of_a_metric_apart)
{
    fill(NULL);
    expect(TREE_METRIC, "load_seconds", "le=0.1 1\nle=+Inf 2\nsum 0.25\ncount 2\n");
    expect(TREE_METRIC, "model_requests_total", "model=ember,kind=chat 7\nmodel=a_}_b_\"c 8\n");
}

Test(render, names_the_metrics_of_a_text)
{
    static const char *const wanted[] = {"steps_total", "steps", "load_seconds",
                                         "model_requests_total", "empty"};
    char **names;
    size_t n;

    cr_assert(render_metric_names(prometheus, &names, &n) == 0);
    cr_assert_eq(n, ELEMENTSOF(wanted));
    for (size_t i = 0; i < n; i++)
        cr_assert_str_eq(names[i], wanted[i]);
    render_names_free(names, n);
}

Test(render, takes_broken_prometheus_text_as_it_comes)
{
    static const char *const texts[] = {
        "",
        "\n\n\n",
        "# TYPE hearth_",
        "# TYPE hearth_x",
        "# TYPE hearth_ counter\n",
        "# TYPE hearth_x counter\nhearth_x",
        "# TYPE hearth_x counter\nhearth_x{",
        "# TYPE hearth_x counter\nhearth_x{a=\"",
        "# TYPE hearth_x counter\nhearth_x{a=\"\\",
        "# TYPE hearth_x counter\nhearth_x \n",
        "# TYPE hearth_x counter\nhearth_x{}\n",
        "# TYPE hearth_x counter\nhearth_x_bucket\nhearth_xy 1\n",
    };

    for (size_t i = 0; i < ELEMENTSOF(texts); i++) {
        struct tree_node node = {.what = TREE_METRIC, .subject = "x"};
        char **names, *text = NULL;
        size_t n, bytes;
        mirror_free(mirror);
        cr_assert(mirror_new(&mirror) == 0);
        mirror_connecting(mirror, NOW);
        mirror_connected(mirror, NOW);
        mirror_asked(mirror, NOW);
        mirror_take(mirror, MIRROR_PROMETHEUS,
                    &(struct hearth_reply){.kind = HEARTH_ITEM, .text = texts[i]}, NOW);
        cr_assert(render_metric_names(texts[i], &names, &n) == 0);
        for (size_t k = 0; k < n; k++)
            cr_assert_str_eq(names[k], "x");
        int r = render_node(mirror, &node, NOW, &text, &bytes);
        cr_assert(r == (n > 0 ? 0 : -ENOENT), "%zu: %d", i, r);
        free(text);
        render_names_free(names, n);
    }
}

Test(render, bounds_the_metrics_it_names)
{
    char **names;
    size_t n, bytes;
    _cleanup_free_ char *text = NULL;
    FILE *out = open_memstream(&text, &bytes);

    for (unsigned i = 0; i < RENDER_METRICS_MAX + 20; i++)
        fprintf(out, "# TYPE hearth_m%u gauge\n", i);
    fclose(out);
    cr_assert(render_metric_names(text, &names, &n) == 0);
    cr_assert_eq(n, RENDER_METRICS_MAX);
    render_names_free(names, n);
}

Test(render, what_has_gone_is_not_there)
{
    fill(&loading);
    cr_assert(failure(TREE_STATE, "b") == -ENOENT);
    cr_assert(failure(TREE_METRIC, "nothing") == -ENOENT);
    cr_assert(failure(TREE_METRIC, "step") == -ENOENT);
    cr_assert(failure(TREE_DIR, "a") == -EISDIR);
    cr_assert(failure(TREE_DIR, NULL) == -EISDIR);
}

Test(render, reads_a_switch_and_nothing_else)
{
    static const char *const bad[] = {"",   "\n",    "2",   "10", "1 ",
                                      " 1", "1\n\n", "yes", "01", "banana\n"};
    bool on = false;

    cr_assert(render_parse_switch("1", 1, &on) == 0 && on);
    cr_assert(render_parse_switch("0\n", 2, &on) == 0 && !on);
    cr_assert(render_parse_switch("1\n", 2, &on) == 0 && on);
    cr_assert(render_parse_switch("0", 1, &on) == 0 && !on);
    on = true;
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        cr_assert(render_parse_switch(bad[i], strlen(bad[i]), &on) == -EINVAL, "%s", bad[i]);
    cr_assert(render_parse_switch("1\0", 2, &on) == -EINVAL);
    cr_assert(on);
}

Test(render, reads_seconds_as_it_writes_them)
{
    static const struct {
        const char *text;
        uint64_t us;
    } good[] = {
        {"0", 0},         {"0\n", 0},        {"30\n", 30000000},
        {"1.5", 1500000}, {"0.000001\n", 1}, {"31536000", RENDER_SECONDS_MAX * 1000000ull},
        {"007", 7000000},
    };
    static const char *const bad[] = {
        "",
        "\n",
        ".",
        ".5",
        "1.",
        "1.0000001",
        "-1",
        "1 ",
        " 1",
        "1\n\n",
        "1s",
        "banana",
        "1e3",
        "31536001",
        "0x10",
        "1.2.3",
        "99999999999999999999",
        "31536000.000001",
    };
    uint64_t us = 77;

    for (size_t i = 0; i < ELEMENTSOF(good); i++) {
        cr_assert(render_parse_seconds(good[i].text, strlen(good[i].text), &us) == 0, "%s",
                  good[i].text);
        cr_assert(us == good[i].us, "%s", good[i].text);
    }
    us = 77;
    for (size_t i = 0; i < ELEMENTSOF(bad); i++)
        cr_assert(render_parse_seconds(bad[i], strlen(bad[i]), &us) == -EINVAL, "%s", bad[i]);
    cr_assert(us == 77);
}

Test(render, knows_which_states_are_on_their_way)
{
    static const char *const settled[] = {"cold", "ready", "failed"};
    static const char *const moving[] = {"queued", "loading", "warming", "draining"};

    for (size_t i = 0; i < ELEMENTSOF(settled); i++)
        cr_assert(render_state_is_settled(settled[i]));
    for (size_t i = 0; i < ELEMENTSOF(moving); i++)
        cr_assert(!render_state_is_settled(moving[i]));
}
