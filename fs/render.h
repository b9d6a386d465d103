/* Render: what a file of the tree says, given the mirror.
 *
 * Each file holds one value, or flat `key value` lines; hearth.prom is Prometheus text. Also knows
 * which metrics that text names, and how a written value is spelled.
 *
 * Hides: the formats. Pure, any thread. */
#ifndef HEARTH_FS_RENDER_H
#define HEARTH_FS_RENDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fs/mirror.h"
#include "fs/tree.h"

/* Bound on the metrics found in one Prometheus text. */
#define RENDER_METRICS_MAX 1024u

/* The node's text, to be freed. 0, -ENOENT (the model or metric is gone), -EISDIR, -ENOMEM. */
int render_node(const struct mirror *mirror, const struct tree_node *node, uint64_t now_us,
                char **ret_text, size_t *ret_bytes);

/* The names, without "hearth_", of the metrics that a Prometheus text declares. To be freed with
 * render_names_free(). 0 or -ENOMEM. */
int render_metric_names(const char *prometheus, char ***ret_names, size_t *ret_n);
char **render_names_free(char **names, size_t n);

/* "1" or "0", with or without a newline; -EINVAL for anything else. */
int render_parse_switch(const char *text, size_t bytes, bool *ret_on);
/* Seconds as render_node() spells them: digits, and up to six more behind a point, with or without
 * a newline; -EINVAL for anything else and beyond RENDER_SECONDS_MAX. */
#define RENDER_SECONDS_MAX 31536000u /* 365 days, as in the configuration */
int render_parse_seconds(const char *text, size_t bytes, uint64_t *ret_us);

/* Whether a model in this state has nothing under way: none of queued, loading, warming, draining.
 */
bool render_state_is_settled(const char *state);

#endif
