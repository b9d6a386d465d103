/* Metrics: one table of definitions, rendered everywhere from there.
 *
 * metrics/definitions.h lists every metric once (identifier, name, kind, unit, section, a sentence);
 * the identifiers, the Prometheus text, the flat `key value` sections of hearthfs and the CLI, and
 * the table in the documentation come from it.
 *
 * Hides: storage, atomics, bucket bounds, text formats. Threads: counting on any thread (relaxed
 * atomics; a reader may see one counter a moment before another); rendering on the reactor. */
#ifndef HEARTH_METRICS_METRICS_H
#define HEARTH_METRICS_METRICS_H

#include <stdint.h>
#include <stdio.h>

enum metric_kind { METRIC_COUNTER, METRIC_GAUGE, METRIC_HISTOGRAM };

enum metric_id {
#define METRIC(id, name, kind, unit, section, help) id,
#include "daemon/metrics/definitions.h"
#undef METRIC
    _METRIC_MAX,
};

struct metrics;

int metrics_new(struct metrics **ret_metrics);
struct metrics *metrics_free(struct metrics *metrics);
void metrics_add(struct metrics *metrics, enum metric_id id, uint64_t n);
void metrics_set(struct metrics *metrics, enum metric_id id, uint64_t value);
/* Histograms: a duration in microseconds. */
void metrics_observe_us(struct metrics *metrics, enum metric_id id, uint64_t us);
uint64_t metrics_get(const struct metrics *metrics, enum metric_id id);

/* The Prometheus text of the table. `extra` may append more (per-model series) and may be NULL. */
void metrics_write_prometheus(const struct metrics *metrics, FILE *out);
/* Flat `key value` lines of a section ("pool", "batcher", "streaming", "loader"); -ENOENT. */
int metrics_write_section(const struct metrics *metrics, const char *section, FILE *out);
/* One metric by its name without the prefix ("requests_total"); -ENOENT. */
int metrics_write_one(const struct metrics *metrics, const char *name, FILE *out);

#endif
