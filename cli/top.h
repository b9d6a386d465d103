/* What `hearth top` shows: samples of the daemon's counters, figures out of two of them, and the
 * text that these make, cut to a window or as lines.
 *
 * Nothing here knows a terminal or a connection. Hides the names of counters and the layout.
 * Thread: one. */
#ifndef HEARTH_CLI_TOP_H
#define HEARTH_CLI_TOP_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "lib/hearth.h"

struct top_model {
    char *name, *state, *sentence; /* sentence: why it failed, or NULL */
    uint64_t memory_bytes, done_bytes, total_bytes, holds;
    uint64_t requests, tokens, in_use;
    bool pinned;
};

/* What the daemon said at one time. Zero-initialise. */
struct top_sample {
    uint64_t at_us; /* monotonic */
    char state[32], version[32], kernels[32];
    char *flat; /* `key value` lines of all sections and of the status */
    size_t flat_len;
    struct top_model *models;
    size_t n_models;
    bool no_memory;
};

/* Takes in one reply to status, metrics or models. */
void top_sample_add(struct top_sample *sample, const struct hearth_reply *reply);
void top_sample_done(struct top_sample *sample);
/* The value behind the key; NAN where there is none. */
double top_sample_value(const struct top_sample *sample, const char *key);

struct top_model_figures {
    const struct top_model *model; /* of the later sample */
    double requests_per_s, tokens_per_s;
};

/* NAN: not known, which is what rates are without an earlier sample. */
struct top_figures {
    const struct top_sample *sample;
    double requests_per_s, failed_per_s, tokens_per_s, prompt_tokens_per_s, steps_per_s;
    double batch_rows, batch_efficiency, engine_busy; /* ratios within the time between */
    double queue, connections, streams, streams_parked;
    double kv_used_bytes, kv_budget_bytes, prefix_bytes;
    double model_bytes, memory_budget_bytes, loads_running, loads_queued, uptime_s;
    struct top_model_figures *models; /* what works first, then what is loaded, then by name */
    size_t n_models;
};

/* `before` may be NULL. -ENOMEM. The samples must outlive the figures. */
int top_figures_make(const struct top_sample *before, const struct top_sample *after,
                     struct top_figures *ret_figures);
void top_figures_done(struct top_figures *figures);

/* The whole picture: at most `rows` lines of at most `columns` characters, none of them ended by a
 * newline but by `line_end`; the last one by nothing. `state` is what the daemon is now. */
void top_draw(const struct top_figures *figures, const char *state, const char *socket,
              size_t columns, size_t rows, const char *line_end, FILE *out);
/* The same in one line, and what its columns are called. */
void top_print_heading(FILE *out);
void top_print_line(const struct top_figures *figures, FILE *out);
/* NULL when out of memory. */
json_t *top_json(const struct top_figures *figures, uint64_t unix_time_ms);

#endif
