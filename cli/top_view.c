#include "cli/top.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli/output.h"
#include "lib/cleanup.h"

/* ---- samples ---- */

/* Flat lines beyond this are not a daemon's. */
#define FLAT_MAX_BYTES (1u << 20)
#define MODELS_MAX     8192u

static void keep_flat(struct top_sample *s, const char *lines, size_t len)
{
    if (s->flat_len + len + 2 > FLAT_MAX_BYTES)
        return;
    char *flat = realloc(s->flat, s->flat_len + len + 2);
    if (!flat) {
        s->no_memory = true;
        return;
    }
    memcpy(flat + s->flat_len, lines, len);
    s->flat = flat;
    s->flat_len += len;
    flat[s->flat_len++] = '\n';
    flat[s->flat_len] = '\0';
}

/* The text behind the key in flat lines, up to the line's end; NULL where there is none. */
static const char *flat_find(const char *lines, const char *key, size_t *ret_len)
{
    size_t key_len = strlen(key);
    for (const char *line = lines; line && *line;) {
        size_t len = strcspn(line, "\n");
        if (len > key_len && line[key_len] == ' ' && memcmp(line, key, key_len) == 0) {
            *ret_len = len - key_len - 1;
            return line + key_len + 1;
        }
        line += len + (line[len] == '\n');
    }
    return NULL;
}

static double flat_value(const char *lines, const char *key)
{
    size_t len;
    const char *text = flat_find(lines, key, &len);
    char *end;
    double value = text ? strtod(text, &end) : NAN;
    return text && end == text + len && len > 0 ? value : NAN;
}

static uint64_t flat_count(const char *lines, const char *key)
{
    double value = flat_value(lines, key);
    return value > 0 && value < 1.8e19 ? (uint64_t)value : 0;
}

double top_sample_value(const struct top_sample *sample, const char *key)
{
    return flat_value(sample->flat, key);
}

static void keep_model(struct top_sample *s, const struct hearth_reply *r)
{
    if (s->n_models == MODELS_MAX)
        return;
    struct top_model *models = reallocarray(s->models, s->n_models + 1, sizeof(*models));
    if (!models) {
        s->no_memory = true;
        return;
    }
    s->models = models;
    struct top_model *m = &models[s->n_models++];
    *m = (struct top_model){
        .name = text_escape(r->model, strlen(r->model), false),
        .state = text_escape(r->state ? r->state : "-", strlen(r->state ? r->state : "-"), false),
        .sentence = r->sentence ? text_escape(r->sentence, strlen(r->sentence), false) : NULL,
        .memory_bytes = r->memory_bytes,
        .done_bytes = r->done_bytes,
        .total_bytes = r->total_bytes,
        .holds = r->holds,
        .pinned = r->pinned,
        .requests = flat_count(r->stats, "requests"),
        .tokens = flat_count(r->stats, "tokens"),
        .in_use = flat_count(r->stats, "in_use"),
    };
    s->no_memory |= !m->name || !m->state || (r->sentence && !m->sentence);
}

static void keep_word(char *to, size_t size, const char *text, size_t len)
{
    _cleanup_free_ char *escaped = text ? text_escape(text, len, false) : NULL;
    if (escaped)
        snprintf(to, size, "%s", escaped);
}

void top_sample_add(struct top_sample *sample, const struct hearth_reply *reply)
{
    size_t len;
    if (reply->kind != HEARTH_ITEM)
        return;
    if (reply->model) {
        keep_model(sample, reply);
    } else if (reply->text) {
        keep_flat(sample, reply->text, reply->text_bytes);
    } else if (reply->state) {
        const char *kernels = flat_find(reply->info, "kernels", &len);
        keep_word(sample->kernels, sizeof(sample->kernels), kernels, kernels ? len : 0);
        keep_word(sample->state, sizeof(sample->state), reply->state, strlen(reply->state));
        if (reply->version)
            keep_word(sample->version, sizeof(sample->version), reply->version,
                      strlen(reply->version));
        if (reply->info)
            keep_flat(sample, reply->info, strlen(reply->info));
    }
}

void top_sample_done(struct top_sample *sample)
{
    for (size_t i = 0; i < sample->n_models; i++) {
        free(sample->models[i].name);
        free(sample->models[i].state);
        free(sample->models[i].sentence);
    }
    free(sample->models);
    free(sample->flat);
    *sample = (struct top_sample){0};
}

/* ---- figures ---- */

/* How much the counter grew; a daemon that began anew has begun at 0. */
static double growth(const struct top_sample *before, const struct top_sample *after,
                     const char *key)
{
    if (!before)
        return NAN;
    double grown = top_sample_value(after, key) - top_sample_value(before, key);
    return grown < 0 ? 0 : grown;
}

static double seconds_between(const struct top_sample *before, const struct top_sample *after)
{
    return before && after->at_us > before->at_us ? (double)(after->at_us - before->at_us) / 1e6
                                                  : NAN;
}

/* From *at on, and round: both samples have the same order, so the next one is there as a rule. */
static const struct top_model *find_model(const struct top_sample *sample, const char *name,
                                          size_t *at)
{
    for (size_t i = 0; sample && i < sample->n_models; i++) {
        const struct top_model *model = &sample->models[(*at + i) % sample->n_models];
        if (strcmp(model->name, name) == 0) {
            *at += i + 1;
            return model;
        }
    }
    return NULL;
}

static double grown(uint64_t before, uint64_t after)
{
    return after > before ? (double)(after - before) : 0;
}

static double not_nan(double value)
{
    return isnan(value) ? 0 : value;
}

static int by_work(const void *a, const void *b)
{
    const struct top_model_figures *x = a, *y = b;
    double work_x = not_nan(x->requests_per_s) + not_nan(x->tokens_per_s);
    double work_y = not_nan(y->requests_per_s) + not_nan(y->tokens_per_s);
    if (work_x != work_y)
        return work_x > work_y ? -1 : 1;
    bool cold_x = strcmp(x->model->state, "cold") == 0,
         cold_y = strcmp(y->model->state, "cold") == 0;
    if (cold_x != cold_y)
        return cold_x ? 1 : -1;
    return strcmp(x->model->name, y->model->name);
}

static int model_figures(const struct top_sample *before, const struct top_sample *after,
                         double seconds, struct top_figures *f)
{
    f->models = calloc(after->n_models + 1, sizeof(*f->models));
    if (!f->models)
        return -ENOMEM;
    size_t at = 0;
    for (size_t i = 0; i < after->n_models; i++) {
        const struct top_model *now = &after->models[i], *was = find_model(before, now->name, &at);
        f->models[f->n_models++] = (struct top_model_figures){
            .model = now,
            .requests_per_s = was ? grown(was->requests, now->requests) / seconds : NAN,
            .tokens_per_s = was ? grown(was->tokens, now->tokens) / seconds : NAN,
        };
    }
    qsort(f->models, f->n_models, sizeof(*f->models), by_work);
    return 0;
}

int top_figures_make(const struct top_sample *before, const struct top_sample *after,
                     struct top_figures *ret_figures)
{
    double seconds = seconds_between(before, after);
    double rows = growth(before, after, "step_rows_total");
    double steps = growth(before, after, "steps_total");
    double runnable = growth(before, after, "step_runnable_total");
    struct top_figures f = {
        .sample = after,
        .requests_per_s = growth(before, after, "generations_total") / seconds,
        .failed_per_s = growth(before, after, "generations_failed_total") / seconds,
        .tokens_per_s = growth(before, after, "completion_tokens_total") / seconds,
        .prompt_tokens_per_s = growth(before, after, "prompt_tokens_total") / seconds,
        .steps_per_s = steps / seconds,
        .batch_rows = steps > 0 ? rows / steps : NAN,
        .batch_efficiency = runnable > 0 ? MIN(rows / runnable, 1) : NAN,
        .engine_busy = growth(before, after, "engine_busy_seconds_total") / seconds,
        .queue = top_sample_value(after, "queue"),
        .connections = top_sample_value(after, "connections"),
        .streams = top_sample_value(after, "streams"),
        .streams_parked = top_sample_value(after, "streams_parked"),
        .kv_used_bytes = top_sample_value(after, "kv_used_bytes"),
        .kv_budget_bytes = top_sample_value(after, "kv_budget_bytes"),
        .prefix_bytes = top_sample_value(after, "prefix_bytes"),
        .model_bytes = top_sample_value(after, "model_bytes"),
        .memory_budget_bytes = top_sample_value(after, "memory_budget_bytes"),
        .loads_running = top_sample_value(after, "loads_running"),
        .loads_queued = top_sample_value(after, "loads_queued"),
        .uptime_s = top_sample_value(after, "uptime_s"),
    };
    f.engine_busy = f.engine_busy > 1 ? 1 : f.engine_busy; /* keeps NAN */
    int r = model_figures(before, after, seconds, &f);
    if (r == 0)
        *ret_figures = f;
    return r;
}

void top_figures_done(struct top_figures *figures)
{
    free(figures->models);
    *figures = (struct top_figures){0};
}

/* ---- numbers as text ---- */

#define NUMBER_BYTES 32

/* A rate or a count in at most six characters, as far as people count. */
static const char *number(double value, char text[NUMBER_BYTES])
{
    if (isnan(value))
        return "-";
    if (value < 9.95 && value != (double)(long long)value)
        snprintf(text, NUMBER_BYTES, "%.1f", value);
    else if (value < 99999.5)
        snprintf(text, NUMBER_BYTES, "%.0f", value);
    else if (value < 99999.5e3)
        snprintf(text, NUMBER_BYTES, "%.0fk", value / 1e3);
    else
        snprintf(text, NUMBER_BYTES, "%.4gM", value / 1e6);
    return text;
}

static const char *percent(double ratio, char text[NUMBER_BYTES])
{
    if (isnan(ratio))
        return "-";
    snprintf(text, NUMBER_BYTES, ratio < 0.9995 ? "%.1f%%" : "%.0f%%", ratio * 100);
    return text;
}

static const char *bytes(double value, char text[NUMBER_BYTES])
{
    return isnan(value) ? "-" : size_text((uint64_t)value, text);
}

static const char *duration(double seconds, char text[NUMBER_BYTES])
{
    if (isnan(seconds))
        return "-";
    uint64_t s = (uint64_t)seconds;
    if (s < 60)
        snprintf(text, NUMBER_BYTES, "%" PRIu64 "s", s);
    else if (s < 3600)
        snprintf(text, NUMBER_BYTES, "%" PRIu64 "m%02" PRIu64 "s", s / 60, s % 60);
    else if (s < 86400)
        snprintf(text, NUMBER_BYTES, "%" PRIu64 "h%02" PRIu64 "m", s / 3600, s / 60 % 60);
    else
        snprintf(text, NUMBER_BYTES, "%" PRIu64 "d%02" PRIu64 "h", s / 86400, s / 3600 % 24);
    return text;
}

/* ---- the picture ---- */

#define BAR_WIDTH 20
/* Columns and rows beyond these are no screen. */
#define LINE_BYTES 1024

struct picture {
    FILE *out;
    size_t columns, rows, n; /* n: lines so far */
    const char *line_end;
};

/* Text is ASCII here but for models' sentences: a cut must not fall into a sequence. */
static size_t cut(const char *text, size_t columns)
{
    size_t i = 0;
    for (size_t width = 0; text[i]; i++) {
        if (((uint8_t)text[i] & 0xc0) == 0x80)
            continue;
        if (width++ == columns)
            break;
    }
    return i;
}

__attribute__((format(printf, 2, 3))) static void line(struct picture *p, const char *format, ...)
{
    char text[LINE_BYTES];
    if (p->n == p->rows)
        return;
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    size_t len = cut(text, p->columns);
    while (len > 0 && text[len - 1] == ' ')
        len--;
    fprintf(p->out, "%s%.*s", p->n ? p->line_end : "", (int)len, text);
    p->n++;
}

static const char *bar(double part, double whole, char text[BAR_WIDTH + 3])
{
    double share = whole > 0 && part > 0 ? MIN(part / whole, 1) : 0;
    memset(text, '.', BAR_WIDTH + 2);
    memset(text + 1, '#', (size_t)(share * BAR_WIDTH + 0.5));
    text[0] = '[';
    text[BAR_WIDTH + 1] = ']';
    text[BAR_WIDTH + 2] = '\0';
    return text;
}

static void draw_service(struct picture *p, const struct top_figures *f)
{
    char a[NUMBER_BYTES], b[NUMBER_BYTES], c[NUMBER_BYTES], d[NUMBER_BYTES], full[BAR_WIDTH + 3];
    line(p, "requests  %6s/s   failed %s/s   queue %s   connections %s",
         number(f->requests_per_s, a), number(f->failed_per_s, b), number(f->queue, c),
         number(f->connections, d));
    line(p, "tokens    %6s/s   prompt %s/s   streams %s   parked %s", number(f->tokens_per_s, a),
         number(f->prompt_tokens_per_s, b), number(f->streams, c), number(f->streams_parked, d));
    line(p, "batch     %6s     efficiency %s   steps %s/s   engine busy %s",
         number(f->batch_rows, a), percent(f->batch_efficiency, b), number(f->steps_per_s, c),
         percent(f->engine_busy, d));
    line(p, "KV        %s %s of %s   kept prefixes %s",
         bar(f->kv_used_bytes, f->kv_budget_bytes, full), bytes(f->kv_used_bytes, a),
         bytes(f->kv_budget_bytes, b), bytes(f->prefix_bytes, c));
    line(p, "models    %s %s of %s   loading %s   waiting to load %s",
         bar(f->model_bytes, f->memory_budget_bytes, full), bytes(f->model_bytes, a),
         bytes(f->memory_budget_bytes, b), number(f->loads_running, c), number(f->loads_queued, d));
}

static void note_text(const struct top_model *m, char text[LINE_BYTES])
{
    char done[SIZE_TEXT_BYTES], total[SIZE_TEXT_BYTES];
    if (m->sentence)
        snprintf(text, LINE_BYTES, "%s", m->sentence);
    else if (strcmp(m->state, "loading") == 0 && m->total_bytes)
        snprintf(text, LINE_BYTES, "%s of %s", size_text(m->done_bytes, done),
                 size_text(m->total_bytes, total));
    else
        snprintf(text, LINE_BYTES, "%s", m->pinned ? "pinned" : "");
}

static void draw_models(struct picture *p, const struct top_figures *f)
{
    size_t width = strlen("MODEL");
    for (size_t i = 0; i < f->n_models; i++)
        width = MAX(width, strlen(f->models[i].model->name));
    width = MIN(width, 40);
    line(p, "%-*s  %-8s %8s %7s %7s %6s %5s  %s", (int)width, "MODEL", "STATE", "MEMORY", "REQ/S",
         "TOK/S", "IN USE", "HOLDS", "NOTE");
    for (size_t i = 0; i < f->n_models; i++) {
        const struct top_model_figures *m = &f->models[i];
        char memory[SIZE_TEXT_BYTES], requests[NUMBER_BYTES], tokens[NUMBER_BYTES];
        char note[LINE_BYTES];
        size_t left = f->n_models - i;
        if (p->n + 1 == p->rows && left > 1) {
            line(p, "and %zu more", left);
            return;
        }
        note_text(m->model, note);
        line(p, "%-*.*s  %-8s %8s %7s %7s %6" PRIu64 " %5" PRIu64 "  %.600s", (int)width,
             (int)width, m->model->name, m->model->state,
             m->model->memory_bytes ? size_text(m->model->memory_bytes, memory) : "-",
             number(m->requests_per_s, requests), number(m->tokens_per_s, tokens), m->model->in_use,
             m->model->holds, note);
    }
}

void top_draw(const struct top_figures *figures, const char *state, const char *socket,
              size_t columns, size_t rows, const char *line_end, FILE *out)
{
    struct picture p = {.out = out, .columns = columns, .rows = rows, .line_end = line_end};
    const struct top_sample *s = figures->sample;
    char up[NUMBER_BYTES];
    line(&p, "hearth %s   %s   up %s   kernels %s   %s", s->version, state,
         duration(figures->uptime_s, up), *s->kernels ? s->kernels : "-", socket);
    draw_service(&p, figures);
    line(&p, "%s", "");
    draw_models(&p, figures);
}

/* ---- lines ---- */

void top_print_heading(FILE *out)
{
    fprintf(out, "%8s %8s %8s %7s %6s %6s %6s %8s %8s %6s\n", "REQ/S", "TOK/S", "PROMPT/S",
            "FAIL/S", "BATCH", "BUSY", "QUEUE", "KV", "MODELS", "CONN");
}

void top_print_line(const struct top_figures *f, FILE *out)
{
    char a[NUMBER_BYTES], b[NUMBER_BYTES], c[NUMBER_BYTES], d[NUMBER_BYTES], e[NUMBER_BYTES];
    char g[NUMBER_BYTES], h[NUMBER_BYTES], i[NUMBER_BYTES], j[NUMBER_BYTES], k[NUMBER_BYTES];
    fprintf(out, "%8s %8s %8s %7s %6s %6s %6s %8s %8s %6s\n", number(f->requests_per_s, a),
            number(f->tokens_per_s, b), number(f->prompt_tokens_per_s, c),
            number(f->failed_per_s, d), number(f->batch_rows, e), percent(f->engine_busy, g),
            number(f->queue, h), bytes(f->kv_used_bytes, i), bytes(f->model_bytes, j),
            number(f->connections, k));
}

static json_t *json_number(double value)
{
    if (isnan(value) || isinf(value))
        return json_null();
    if (value == (double)(long long)value)
        return json_integer((json_int_t)value);
    return json_real((double)(long long)(value * 1e4 + 0.5) / 1e4);
}

static json_t *model_json(const struct top_model_figures *m)
{
    json_t *o = json_object();
    json_object_set_new(o, "name", json_text(m->model->name));
    json_object_set_new(o, "state", json_text(m->model->state));
    json_object_set_new(o, "memory_bytes", json_integer((json_int_t)m->model->memory_bytes));
    json_object_set_new(o, "requests_per_s", json_number(m->requests_per_s));
    json_object_set_new(o, "tokens_per_s", json_number(m->tokens_per_s));
    json_object_set_new(o, "in_use", json_integer((json_int_t)m->model->in_use));
    json_object_set_new(o, "holds", json_integer((json_int_t)m->model->holds));
    json_object_set_new(o, "pinned", json_boolean(m->model->pinned));
    return o;
}

json_t *top_json(const struct top_figures *f, uint64_t unix_time_ms)
{
    const struct {
        const char *name;
        double value;
    } numbers[] = {
        {"time_ms", (double)unix_time_ms},
        {"uptime_s", f->uptime_s},
        {"requests_per_s", f->requests_per_s},
        {"failed_per_s", f->failed_per_s},
        {"tokens_per_s", f->tokens_per_s},
        {"prompt_tokens_per_s", f->prompt_tokens_per_s},
        {"steps_per_s", f->steps_per_s},
        {"batch_rows", f->batch_rows},
        {"batch_efficiency", f->batch_efficiency},
        {"engine_busy", f->engine_busy},
        {"queue", f->queue},
        {"connections", f->connections},
        {"streams", f->streams},
        {"streams_parked", f->streams_parked},
        {"kv_used_bytes", f->kv_used_bytes},
        {"kv_budget_bytes", f->kv_budget_bytes},
        {"prefix_bytes", f->prefix_bytes},
        {"model_bytes", f->model_bytes},
        {"memory_budget_bytes", f->memory_budget_bytes},
        {"loads_running", f->loads_running},
        {"loads_queued", f->loads_queued},
    };
    json_t *o = json_object(), *models = json_array();
    json_object_set_new(o, "state", json_text(f->sample->state));
    for (size_t i = 0; i < ELEMENTSOF(numbers); i++)
        json_object_set_new(o, numbers[i].name, json_number(numbers[i].value));
    for (size_t i = 0; i < f->n_models; i++)
        json_array_append_new(models, model_json(&f->models[i]));
    json_object_set_new(o, "models", models);
    return o;
}
