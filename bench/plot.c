#include "bench/plot.h"

#include <errno.h>
#include <limits.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* Time over which requests a second are averaged. */
#define RATE_WINDOW_S 0.25

/* The percentiles of the curve, by how many of a request's fellows were slower: 1 in 1 to 1 in
 * 10^5, in twenty steps a decade. */
#define CURVE_DECADES 5
#define CURVE_STEPS   20

extern char **environ;

/* Files of one plot, in a folder. */
static const char *const data_names[] = {"percentiles.dat", "distribution.dat", "throughput.dat",
                                         "first-token.dat"};
static const char script_name[] = "plot.gnuplot";

/* ---- data ---- */

static void write_curve(const struct histogram *histogram, FILE *out)
{
    fprintf(out, "# one_in latency_ms\n");
    for (int i = 0; i <= CURVE_DECADES * CURVE_STEPS; i++) {
        double one_in = __builtin_pow(10, (double)i / CURVE_STEPS);
        if (one_in > (double)histogram->count)
            break;
        fprintf(out, "%.6g %.6g\n", one_in,
                histogram_percentile(histogram, 100 - 100 / one_in) / 1e3);
    }
}

/* Per cent of the requests in each 24th of a factor of two. */
static void write_distribution(const struct histogram *histogram, FILE *out)
{
    const double step = __builtin_pow(2, 1.0 / 24);
    uint64_t below = 0;

    fprintf(out, "# latency_ms per_cent\n");
    for (double us = 1; histogram->count > 0 && below < histogram->count; us *= step) {
        uint64_t now = histogram_count_to(histogram, us * step);
        if (now > 0)
            fprintf(out, "%.6g %.6g\n", us / 1e3,
                    100 * (double)(now - below) / (double)histogram->count);
        below = now;
    }
}

static void write_throughput(const struct plot *plot, FILE *out)
{
    size_t from = 0;

    fprintf(out, "# at_s requests_per_s\n");
    for (size_t i = 1; i < plot->n_points; i++) {
        double s = plot->points[i].at_s - plot->points[from].at_s;
        /* A run shorter than a window has one point all the same. */
        if (s < RATE_WINDOW_S && (from > 0 || i + 1 < plot->n_points))
            continue;
        fprintf(out, "%.3f %.1f\n", (plot->points[i].at_s + plot->points[from].at_s) / 2,
                (double)(plot->points[i].requests - plot->points[from].requests) / s);
        from = i;
    }
    if (plot->n_points < 2)
        fprintf(out, "0 0\n");
}

static void write_data(const struct plot *plot, size_t which, FILE *out)
{
    switch (which) {
    case 0: write_curve(plot->latency, out); break;
    case 1: write_distribution(plot->latency, out); break;
    case 2: write_throughput(plot, out); break;
    default:
        if (plot->first_token)
            write_curve(plot->first_token, out);
        break;
    }
}

/* ---- script ---- */

/* A title as gnuplot's single-quoted string takes it. */
static void write_quoted(const char *text, FILE *out)
{
    fputc('\'', out);
    for (; *text; text++) {
        if (*text == '\'')
            fputc('\'', out);
        fputc((unsigned char)*text < ' ' ? ' ' : *text, out);
    }
    fputc('\'', out);
}

static void write_picture(const struct plot *plot, size_t which, FILE *out)
{
    static const char *const settings[] = {
        "set logscale x\nset logscale y\nset xlabel 'percentile'\nset ylabel 'ms'\n"
        "set xtics ('50' 2, '90' 10, '99' 100, '99.9' 1e3, '99.99' 1e4, '99.999' 1e5)\n"
        "set xrange [1:*]\nset yrange [*:*]\nset key left top\n",
        "unset logscale y\nset logscale x\nset xlabel 'latency, ms'\nset ylabel '% of requests'\n"
        "set xtics auto\nset xrange [*:*]\nset yrange [0:*]\nunset key\n",
        "unset logscale\nset xlabel 'seconds'\nset ylabel 'requests/s'\n"
        "set xtics auto\nset xrange [0:*]\nset yrange [0:*]\nunset key\n",
    };
    static const char *const plots[] = {
        "plot 'percentiles.dat' using 1:2 with lines lw 2 lc rgb '#1f6fb4' title 'latency'",
        "plot 'distribution.dat' using 1:2 with fillsteps fs solid 0.6 noborder lc rgb '#1f6fb4'",
        "plot 'throughput.dat' using 1:2 with lines lw 2 lc rgb '#1f6fb4'",
    };

    fputs(settings[which], out);
    fputs(plots[which], out);
    if (which == 0 && plot->first_token && plot->first_token->count > 0)
        fputs(", \\\n     'first-token.dat' using 1:2 with lines lw 2 lc rgb '#d1662a' "
              "title 'first token'",
              out);
    fputc('\n', out);
}

static void write_head(FILE *out)
{
    fputs("# Draws the data files beside it: gnuplot plot.gnuplot\n"
          "set encoding utf8\nset grid lt 1 lc rgb '#dddddd'\nset border 3\nset tics nomirror\n",
          out);
}

static const char *terminal_of(bool png, bool tall)
{
    if (png)
        return tall ? "pngcairo size 900,1100 font 'sans,11'"
                    : "pngcairo size 900,480 font 'sans,11'";
    return tall ? "svg size 720,900 font 'sans,12' background '#ffffff'"
                : "svg size 720,380 font 'sans,12' background '#ffffff'";
}

/* Each picture in both forms. */
static void write_folder_script(const struct plot *plot, FILE *out)
{
    static const char *const names[] = {"percentiles", "distribution", "throughput"};

    write_head(out);
    fputs("set title ", out);
    write_quoted(plot->title, out);
    fputs(" noenhanced\n", out);
    for (size_t form = 0; form < 2; form++)
        for (size_t i = 0; i < ELEMENTSOF(names); i++) {
            fprintf(out, "set terminal %s\nset output '%s.%s'\n", terminal_of(form == 0, false),
                    names[i], form == 0 ? "png" : "svg");
            write_picture(plot, i, out);
        }
}

/* All pictures in one. */
static void write_file_script(const struct plot *plot, bool png, FILE *out)
{
    write_head(out);
    fprintf(out, "set terminal %s\nset output 'all'\nset multiplot layout 3,1 title ",
            terminal_of(png, true));
    write_quoted(plot->title, out);
    fputs(" noenhanced\n", out);
    for (size_t i = 0; i < 3; i++)
        write_picture(plot, i, out);
    fputs("unset multiplot\n", out);
}

/* ---- files and the child ---- */

static int cannot_write(const char *folder, const char *name, int error, char ret_message[320])
{
    snprintf(ret_message, 320, "cannot write %.200s/%s: %s", folder, name, strerror(-error));
    return error;
}

/* `form`: 'd' for a folder, 'p' or 's' for one picture. */
static int write_files(const struct plot *plot, const char *folder, char form,
                       char ret_message[320])
{
    for (size_t i = 0; i <= ELEMENTSOF(data_names); i++) {
        const char *name = i < ELEMENTSOF(data_names) ? data_names[i] : script_name;
        _cleanup_free_ char *path = NULL;
        FILE *file;
        int failed;
        if (asprintf(&path, "%s/%s", folder, name) < 0) {
            path = NULL;
            return cannot_write(folder, name, -ENOMEM, ret_message);
        }
        file = fopen(path, "we");
        if (!file)
            return cannot_write(folder, name, -errno, ret_message);
        if (i < ELEMENTSOF(data_names))
            write_data(plot, i, file);
        else if (form == 'd')
            write_folder_script(plot, file);
        else
            write_file_script(plot, form == 'p', file);
        failed = ferror(file);
        if (fclose(file) != 0 || failed)
            return cannot_write(folder, name, -EIO, ret_message);
    }
    return 0;
}

static int run_in(const char *program, const char *folder, char ret_message[320])
{
    char *argv[] = {(char *)program, (char *)script_name, NULL};
    posix_spawn_file_actions_t actions;
    int status = 0, r;
    pid_t pid;

    r = -posix_spawn_file_actions_init(&actions);
    if (r < 0)
        return r;
    r = -posix_spawn_file_actions_addchdir_np(&actions, folder);
    if (r == 0)
        r = -posix_spawnp(&pid, program, &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (r == -ENOENT)
        snprintf(ret_message, 320,
                 "plots are drawn by gnuplot, and there is none; install the package gnuplot-nox");
    else if (r < 0)
        snprintf(ret_message, 320, "cannot run %s: %s", program, strerror(-r));
    if (r < 0)
        return r;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    snprintf(ret_message, 320, "%s failed on its script; what it said stands above", program);
    return -EIO;
}

static int to_folder(const struct plot *plot, const char *program, const char *path,
                     char ret_message[320])
{
    int r;

    if (mkdir(path, 0777) < 0 && errno != EEXIST) {
        r = -errno;
        snprintf(ret_message, 320, "cannot make the folder %.200s: %s", path, strerror(-r));
        return r;
    }
    r = write_files(plot, path, 'd', ret_message);
    return r < 0 ? r : run_in(program, path, ret_message);
}

static int copy_file(const char *from, const char *to)
{
    FILE *in = fopen(from, "re"), *out = in ? fopen(to, "we") : NULL;
    char buffer[16384];
    int r = out ? 0 : -errno;
    size_t n;

    while (r == 0 && (n = fread(buffer, 1, sizeof(buffer), in)) > 0)
        if (fwrite(buffer, 1, n, out) != n)
            r = -EIO;
    if (out && fclose(out) != 0 && r == 0)
        r = -EIO;
    if (in)
        fclose(in);
    return r;
}

static void remove_files(const char *folder)
{
    char path[PATH_MAX];

    for (size_t i = 0; i <= ELEMENTSOF(data_names) + 1; i++) {
        const char *name = i < ELEMENTSOF(data_names)    ? data_names[i]
                           : i == ELEMENTSOF(data_names) ? script_name
                                                         : "all";
        snprintf(path, sizeof(path), "%s/%s", folder, name);
        unlink(path);
    }
    rmdir(folder);
}

static int to_file(const struct plot *plot, const char *program, const char *path, bool png,
                   char ret_message[320])
{
    char folder[] = "/tmp/hearth-plot-XXXXXX", made[64];
    int r;

    if (!mkdtemp(folder)) {
        r = -errno;
        snprintf(ret_message, 320, "cannot make a folder in /tmp: %s", strerror(-r));
        return r;
    }
    r = write_files(plot, folder, png ? 'p' : 's', ret_message);
    if (r == 0)
        r = run_in(program, folder, ret_message);
    snprintf(made, sizeof(made), "%s/all", folder);
    if (r == 0 && (r = copy_file(made, path)) < 0)
        snprintf(ret_message, 320, "cannot write %.200s: %s", path, strerror(-r));
    remove_files(folder);
    return r;
}

static bool ends_with(const char *text, const char *end)
{
    size_t len = strlen(text), end_len = strlen(end);

    return len > end_len && strcmp(text + len - end_len, end) == 0;
}

int plot_write_with(const struct plot *plot, const char *program, const char *path,
                    char ret_message[320])
{
    if (ends_with(path, ".png") || ends_with(path, ".svg"))
        return to_file(plot, program, path, ends_with(path, ".png"), ret_message);
    return to_folder(plot, program, path, ret_message);
}

int plot_write(const struct plot *plot, const char *path, char ret_message[320])
{
    return plot_write_with(plot, "gnuplot", path, ret_message);
}
