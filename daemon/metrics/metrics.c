#include "daemon/metrics/metrics.h"

#include <errno.h>
#include <inttypes.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

#define CACHE_LINE_BYTES 64

/* Upper bounds, microseconds; one more bucket takes what is beyond. */
static const uint64_t bucket_us[] = {
    100,    200,    500,     1000,    2000,    5000,     10000,    20000,    50000,    100000,
    200000, 500000, 1000000, 2000000, 5000000, 10000000, 20000000, 30000000, 60000000,
};
#define N_BUCKETS (ELEMENTSOF(bucket_us) + 1)

static const struct definition {
    const char *name;
    enum metric_kind kind;
    const char *unit;
    const char *section;
    const char *help;
} definitions[_METRIC_MAX] = {
#define METRIC(id, name, kind, unit, section, help) [id] = {name, kind, unit, section, help},
#include "daemon/metrics/definitions.h"
#undef METRIC
};

/* Ratios are never stored: flat sections show them beside the counters they are made of.
 * numerator / (denominator - less), or one minus that. */
static const struct ratio {
    const char *name;
    const char *section;
    enum metric_id numerator, denominator;
    enum metric_id less; /* _METRIC_MAX: nothing */
    bool complement;
    bool mean; /* may be above 1 */
} ratios[] = {
    {"pool_reuse", "pool", M_REQUESTS_REUSED, M_REQUESTS, _METRIC_MAX, false},
    {"batch_efficiency", "batcher", M_STEP_ROWS, M_STEP_RUNNABLE, _METRIC_MAX, false},
    {"step_rows_mean", "batcher", M_STEP_ROWS, M_STEPS, _METRIC_MAX, false, .mean = true},
    {"engine_efficiency", "batcher", M_ENGINE_CPU, M_ENGINE_BUSY, M_ENGINE_RUN_DELAY, false},
    {"credit_wait_ratio", "streaming", M_FRAMES_WAITED, M_FRAMES, _METRIC_MAX, false},
    {"streaming_efficiency", "streaming", M_FRAMES_WAITED, M_FRAMES, _METRIC_MAX, true},
    {"preload_hit_ratio", "loader", M_PRELOAD_HITS, M_PRELOAD_ASKED, _METRIC_MAX, false},
    {"prediction_accuracy", "loader", M_PREDICTIONS_USED, M_PREDICTIONS, _METRIC_MAX, false},
};

/* A line of cache each: reactor, engine and loader threads count side by side. */
struct cell {
    alignas(CACHE_LINE_BYTES) _Atomic uint64_t value; /* a histogram's sum, microseconds */
    _Atomic uint64_t *buckets;                        /* histograms: N_BUCKETS, set once */
};

struct metrics {
    struct cell cells[_METRIC_MAX];
};

int metrics_new(struct metrics **ret_metrics)
{
    struct metrics *m = aligned_alloc(CACHE_LINE_BYTES, sizeof(*m));
    if (!m)
        return -ENOMEM;
    memset(m, 0, sizeof(*m));
    for (size_t i = 0; i < _METRIC_MAX; i++) {
        if (definitions[i].kind != METRIC_HISTOGRAM)
            continue;
        m->cells[i].buckets = calloc(N_BUCKETS, sizeof(*m->cells[i].buckets));
        if (!m->cells[i].buckets) {
            metrics_free(m);
            return -ENOMEM;
        }
    }
    *ret_metrics = m;
    return 0;
}

struct metrics *metrics_free(struct metrics *metrics)
{
    if (!metrics)
        return NULL;
    for (size_t i = 0; i < _METRIC_MAX; i++)
        free(metrics->cells[i].buckets);
    free(metrics);
    return NULL;
}

void metrics_add(struct metrics *metrics, enum metric_id id, uint64_t n)
{
    atomic_fetch_add_explicit(&metrics->cells[id].value, n, memory_order_relaxed);
}

void metrics_set(struct metrics *metrics, enum metric_id id, uint64_t value)
{
    atomic_store_explicit(&metrics->cells[id].value, value, memory_order_relaxed);
}

void metrics_observe_us(struct metrics *metrics, enum metric_id id, uint64_t us)
{
    struct cell *cell = &metrics->cells[id];
    size_t i = 0;
    if (!cell->buckets)
        return;
    while (i < ELEMENTSOF(bucket_us) && us > bucket_us[i])
        i++;
    atomic_fetch_add_explicit(&cell->buckets[i], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&cell->value, us, memory_order_relaxed);
}

uint64_t metrics_get(const struct metrics *metrics, enum metric_id id)
{
    return atomic_load_explicit(&metrics->cells[id].value, memory_order_relaxed);
}

/* ---- text ---- */

#define NUMBER_BYTES 32

/* Seconds from microseconds, without a floating-point round trip or the locale's comma. */
static const char *number_seconds(uint64_t us, char text[NUMBER_BYTES])
{
    int n = snprintf(text, NUMBER_BYTES, "%" PRIu64 ".%06" PRIu64, us / 1000000, us % 1000000);
    while (text[n - 1] == '0')
        text[--n] = '\0';
    if (text[n - 1] == '.')
        text[--n] = '\0';
    return text;
}

static const char *number_of(const struct definition *d, uint64_t value, char text[NUMBER_BYTES])
{
    if (strcmp(d->unit, "seconds") == 0)
        return number_seconds(value, text);
    snprintf(text, NUMBER_BYTES, "%" PRIu64, value);
    return text;
}

/* The count is the last bucket's running sum, so the two agree whatever is counted meanwhile. */
static void write_histogram(const struct metrics *m, enum metric_id id, const char *prefix,
                            FILE *out)
{
    const char *name = definitions[id].name;
    char text[NUMBER_BYTES];
    uint64_t seen = 0;
    for (size_t i = 0; i < N_BUCKETS; i++) {
        seen += atomic_load_explicit(&m->cells[id].buckets[i], memory_order_relaxed);
        fprintf(out, "%s%s_bucket{le=\"%s\"} %" PRIu64 "\n", prefix, name,
                i < ELEMENTSOF(bucket_us) ? number_seconds(bucket_us[i], text) : "+Inf", seen);
    }
    fprintf(out, "%s%s_sum %s\n", prefix, name, number_seconds(metrics_get(m, id), text));
    fprintf(out, "%s%s_count %" PRIu64 "\n", prefix, name, seen);
}

static void write_plain(const struct metrics *m, enum metric_id id, const char *prefix, FILE *out)
{
    char text[NUMBER_BYTES];
    fprintf(out, "%s%s %s\n", prefix, definitions[id].name,
            number_of(&definitions[id], metrics_get(m, id), text));
}

void metrics_write_prometheus(const struct metrics *metrics, FILE *out)
{
    static const char *const types[] = {
        [METRIC_COUNTER] = "counter",
        [METRIC_GAUGE] = "gauge",
        [METRIC_HISTOGRAM] = "histogram",
    };
    fputs("# HELP hearth_up Whether the daemon runs\n# TYPE hearth_up gauge\nhearth_up 1\n", out);
    fputs("# HELP hearth_build_info The daemon's version\n# TYPE hearth_build_info gauge\n"
          "hearth_build_info{version=\"" HEARTH_VERSION "\"} 1\n",
          out);
    for (size_t i = 0; i < _METRIC_MAX; i++) {
        const struct definition *d = &definitions[i];
        fprintf(out, "# HELP hearth_%s %s\n", d->name, d->help);
        fprintf(out, "# TYPE hearth_%s %s\n", d->name, types[d->kind]);
        if (d->kind == METRIC_HISTOGRAM)
            write_histogram(metrics, (enum metric_id)i, "hearth_", out);
        else
            write_plain(metrics, (enum metric_id)i, "hearth_", out);
    }
}

/* Counters are read one after another, so a quotient may run a moment ahead: it is held to 0..1
 * where the definition bounds it (each of these numerators counts part of its denominator). */
static void write_ratio(const struct metrics *m, const struct ratio *r, FILE *out)
{
    double over = (double)metrics_get(m, r->numerator);
    double under = (double)metrics_get(m, r->denominator);
    if (r->less != _METRIC_MAX)
        under -= (double)metrics_get(m, r->less);
    if (under <= 0)
        return; /* nothing counted: there is no such figure yet */
    uint64_t parts = (uint64_t)((r->mean ? over / under : MIN(over / under, 1.0)) * 10000 + 0.5);
    if (r->complement)
        parts = 10000 - parts;
    fprintf(out, "%s %" PRIu64 ".%04" PRIu64 "\n", r->name, parts / 10000, parts % 10000);
}

int metrics_write_section(const struct metrics *metrics, const char *section, FILE *out)
{
    bool found = false;
    if (!*section)
        return -ENOENT;
    for (size_t i = 0; i < _METRIC_MAX; i++) {
        if (strcmp(definitions[i].section, section) != 0)
            continue;
        found = true;
        write_plain(metrics, (enum metric_id)i, "", out);
    }
    for (size_t i = 0; i < ELEMENTSOF(ratios); i++)
        if (strcmp(ratios[i].section, section) == 0)
            write_ratio(metrics, &ratios[i], out);
    return found ? 0 : -ENOENT;
}

int metrics_write_one(const struct metrics *metrics, const char *name, FILE *out)
{
    char text[NUMBER_BYTES];
    for (size_t i = 0; i < _METRIC_MAX; i++) {
        const struct definition *d = &definitions[i];
        if (strcmp(d->name, name) != 0)
            continue;
        if (d->kind == METRIC_HISTOGRAM)
            write_histogram(metrics, (enum metric_id)i, "", out);
        else
            fprintf(out, "%s\n", number_of(d, metrics_get(metrics, (enum metric_id)i), text));
        return 0;
    }
    return -ENOENT;
}
