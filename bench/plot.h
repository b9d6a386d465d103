/* Plots of a run of `serve`, drawn by gnuplot: the latency's percentile curve and distribution, and
 * requests a second over time.
 *
 * A folder gets data files, one gnuplot script that draws them again, and each picture as PNG and
 * SVG; a file whose name ends in .png or .svg gets all three pictures in one. gnuplot is a child
 * process started by its name, without a shell. Hides the script and the files' form.
 * Thread: pure but for files and the child. */
#ifndef HEARTH_BENCH_PLOT_H
#define HEARTH_BENCH_PLOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bench/histogram.h"

/* Most points of the curve over time; a longer run's later ones are dropped. */
#define PLOT_POINTS_MAX 36000u

struct plot_point {
    double at_s;
    uint64_t requests; /* ended so far */
};

struct plot {
    const char *title;
    const struct histogram *latency;
    const struct histogram *first_token; /* NULL or empty: no curve of its own */
    const struct plot_point *points;
    size_t n_points;
};

/* 0, or -errno with a sentence (320 bytes). -ENOENT: there is no gnuplot; a folder's data and
 * script are written all the same. */
int plot_write(const struct plot *plot, const char *path, char ret_message[320]);
/* The same with another program in gnuplot's place; for tests. */
int plot_write_with(const struct plot *plot, const char *program, const char *path,
                    char ret_message[320]);

#endif
