/* Plots: the data and the script that are written, and what is said when they cannot be drawn. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/plot.h"

static struct histogram latency, first_token;
static char folder[] = "/tmp/hearth-test-plot-XXXXXX", target[128], message[320];
static const struct plot_point points[] = {{0, 0}, {0.3, 300}, {0.6, 900}};
static struct plot plot = {
    .title = "it's a title", .latency = &latency, .points = points, .n_points = 3};

static void begin(void)
{
    cr_assert(mkdtemp(folder));
    snprintf(target, sizeof(target), "%s/plots", folder);
    for (uint64_t us = 1; us <= 1000; us++)
        histogram_add(&latency, 10 * us);
}

static void end(void)
{
    char command[160];

    snprintf(command, sizeof(command), "rm -rf %s", folder);
    cr_assert_eq(system(command), 0);
}

TestSuite(plot, .init = begin, .fini = end);

/* A file of the target's folder; static. */
static const char *text_of(const char *name)
{
    static char text[16384];
    char path[160];
    size_t n;
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", target, name);
    file = fopen(path, "r");
    cr_assert(file, "%s is not there", name);
    n = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[n] = 0;
    return text;
}

Test(plot, a_folder_gets_data_of_all_three_pictures)
{
    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0, "%s", message);
    cr_assert(strstr(text_of("percentiles.dat"), "\n10 9"), "%s", text_of("percentiles.dat"));
    cr_assert(strstr(text_of("throughput.dat"), "0.150 1000.0\n"), "%s", text_of("throughput.dat"));
    cr_assert(strstr(text_of("throughput.dat"), "0.450 2000.0\n"));
    cr_assert(strchr(text_of("distribution.dat"), '\n'));
}

Test(plot, the_distribution_is_of_all_requests)
{
    double sum = 0, at, share;
    char *copy, *line, *rest;

    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    copy = rest = strdup(text_of("distribution.dat"));
    while ((line = strsep(&rest, "\n")))
        if (sscanf(line, "%lf %lf", &at, &share) == 2)
            sum += share;
    free(copy);
    cr_assert(sum > 99.9 && sum < 100.1, "%f", sum);
}

Test(plot, the_curve_ends_where_there_are_no_requests_to_tell)
{
    double one_in = 0, ms;
    const char *last;

    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    last = strrchr(text_of("percentiles.dat"), '\n') - 1;
    while (*last != '\n')
        last--;
    cr_assert_eq(sscanf(last, "%lf %lf", &one_in, &ms), 2);
    cr_assert_eq(one_in, 1000);
    cr_assert_gt(ms, 9.98, "the slowest of 1,000 is at %f ms", ms);
}

Test(plot, titles_are_quoted_as_gnuplot_wants_it)
{
    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    cr_assert(strstr(text_of("plot.gnuplot"), "set title 'it''s a title' noenhanced\n"));
}

Test(plot, the_first_token_has_a_curve_only_where_there_is_one)
{
    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    cr_assert_not(strstr(text_of("plot.gnuplot"), "first-token.dat"));
    plot.first_token = &first_token;
    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    cr_assert_not(strstr(text_of("plot.gnuplot"), "first-token.dat"));
    histogram_add(&first_token, 5);
    cr_assert_eq(plot_write_with(&plot, "true", target, message), 0);
    cr_assert(strstr(text_of("plot.gnuplot"), "first-token.dat"));
}

Test(plot, a_missing_gnuplot_is_named_with_its_package)
{
    cr_assert_eq(plot_write_with(&plot, "hearth-no-such-program", target, message), -ENOENT);
    cr_assert(strstr(message, "gnuplot-nox"), "%s", message);
    cr_assert(strstr(text_of("plot.gnuplot"), "plot 'percentiles.dat'"), "its script is not left");
}

Test(plot, a_gnuplot_that_fails_is_said)
{
    cr_assert_eq(plot_write_with(&plot, "false", target, message), -EIO);
    cr_assert(strstr(message, "false failed"), "%s", message);
}

Test(plot, a_folder_that_cannot_be_made_is_named)
{
    snprintf(target, sizeof(target), "%s/no/plots", folder);
    cr_assert_eq(plot_write_with(&plot, "true", target, message), -ENOENT);
    cr_assert(strstr(message, target), "%s", message);
}

Test(plot, a_single_picture_leaves_nothing_but_itself)
{
    struct stat st;

    snprintf(target, sizeof(target), "%s/one.svg", folder);
    /* No gnuplot has drawn anything: there is nothing to copy, and that is said. */
    cr_assert_eq(plot_write_with(&plot, "true", target, message), -ENOENT);
    cr_assert(strstr(message, "one.svg"), "%s", message);
    cr_assert_neq(stat(target, &st), 0);
}

Test(plot, gnuplot_draws_them)
{
    static const char *const names[] = {"percentiles.png",  "percentiles.svg", "distribution.png",
                                        "distribution.svg", "throughput.png",  "throughput.svg"};

    if (plot_write(&plot, target, message) == -ENOENT)
        cr_skip_test("gnuplot is not installed");
    for (size_t i = 0; i < 6; i++)
        cr_assert_gt(strlen(text_of(names[i])), 4, "%s is empty", names[i]);
    cr_assert_eq(memcmp(text_of("throughput.png"), "\x89PNG", 4), 0);
    cr_assert(strstr(text_of("percentiles.svg"), "<svg"));
}
