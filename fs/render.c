#include "fs/render.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

#define PREFIX "hearth_"

static const char readme[] =
    "This is Hearth, the local inference service, as files. A file holds one value, or lines of a "
    "key\n"
    "and a value. Looking at them never starts the service and never waits for a model.\n"
    "\n"
    "status                  inactive (none runs), starting, running, draining (about to end), or\n"
    "                        unresponsive (it has not said a word for a second)\n"
    "version                 of the running service (of this view while there is none)\n"
    "models/NAME/state       cold, queued, loading, warming, ready, draining or failed\n"
    "models/NAME/wait        a read ends when nothing is under way any more, with the state\n"
    "models/NAME/progress    bytes loaded, bytes in all\n"
    "models/NAME/error       why loading failed; empty otherwise\n"
    "models/NAME/info        what the model is: its file, its shape\n"
    "models/NAME/memory      bytes of memory it takes now, pages of its texts included\n"
    "models/NAME/stats       what it has done: requests, the last load in microseconds, "
    "evictions;\n"
    "                        and the parts of its memory\n"
    "models/NAME/preload     write 1 to load the model in the background, 0 to unload it;\n"
    "                        reads 1 from a load that was asked for until unload or eviction\n"
    "models/NAME/hold        kept loaded while somebody has it open for writing; reads how many "
    "do\n"
    "models/NAME/pinned      1: never evicted; for administrators to write\n"
    "models/NAME/keep_alive  seconds it stays after its last use, 0: until it is evicted;\n"
    "                        for administrators to write\n"
    "metrics/hearth.prom     all metrics as Prometheus text, each with a sentence that explains "
    "it\n"
    "metrics/NAME            one metric\n"
    "pool/stats              connections and requests on them; metrics by subject, as the next "
    "three\n"
    "batcher/stats           requests that wait and run, steps of the engine, memory of texts\n"
    "streaming/stats         texts on their way to their readers\n"
    "loader/stats            loads, unloads, predictions\n"
    "events                  what happens from now on, one JSON object a line; a read waits for "
    "it\n"
    "\n"
    "A file keeps what it held when it was opened: open it again to see what has changed, or "
    "poll(2) it\n"
    "for POLLPRI and read from offset 0. inotify sees no changes.\n"
    "\n"
    "    cat models/*/state\n"
    "    echo 1 >models/ember/preload && cat models/ember/wait\n"
    "    exec 9>models/ember/hold      (and 9>&- to let go)\n"
    "\n"
    "Members of the group of these files may load and hold; administrators are those of the "
    "service's\n"
    "configuration. A write or a hold that fails says why: \"Invalid argument\" (the file takes no "
    "such\n"
    "text), \"Permission denied\", \"Device or resource busy\" (too much to do, or too many "
    "holds), \"Cannot\n"
    "allocate memory\" (no room for the model), \"Input/output error\" (the load failed: see "
    "error),\n"
    "\"Connection refused\" (no service runs, and none could be started), \"Connection timed "
    "out\".\n"
    "\n"
    "While no service runs every model is cold; preload and hold start one where systemd keeps "
    "its\n"
    "socket. From an unresponsive service the last values are shown.\n";

/* ---- the single values ---- */

/* A text of the daemon's, closed by a newline unless it is empty. */
static void put_text(FILE *out, const char *text)
{
    size_t len = text ? strlen(text) : 0;

    if (len == 0)
        return;
    fwrite(text, 1, len, out);
    if (text[len - 1] != '\n')
        fputc('\n', out);
}

static void put_number(FILE *out, uint64_t value)
{
    fprintf(out, "%" PRIu64 "\n", value);
}

/* Seconds without a fraction where there is none. */
static void put_seconds(FILE *out, uint64_t us)
{
    uint64_t fraction = us % 1000000u;
    int digits = 6;

    fprintf(out, "%" PRIu64, us / 1000000u);
    for (; fraction && fraction % 10 == 0; digits--)
        fraction /= 10;
    if (fraction)
        fprintf(out, ".%0*" PRIu64, digits, fraction);
    fputc('\n', out);
}

static int put_model(FILE *out, const struct mirror_model *model, enum tree_what what)
{
    switch (what) {
    case TREE_STATE:
    case TREE_WAIT: put_text(out, model->state); break;
    case TREE_PROGRESS:
        fprintf(out, "done_bytes %" PRIu64 "\ntotal_bytes %" PRIu64 "\n", model->done_bytes,
                model->total_bytes);
        break;
    case TREE_PRELOAD: put_number(out, model->preload); break;
    case TREE_PINNED: put_number(out, model->pinned); break;
    case TREE_KEEP_ALIVE: put_seconds(out, model->keep_alive_us); break;
    case TREE_HOLD: put_number(out, model->holds); break;
    case TREE_ERROR:
        put_text(out, strcmp(model->state, "failed") == 0 ? model->sentence : NULL);
        break;
    case TREE_INFO: put_text(out, model->info); break;
    case TREE_MEMORY: put_number(out, model->memory_bytes); break;
    case TREE_STATS: put_text(out, model->stats); break;
    default: return -EISDIR;
    }
    return 0;
}

/* ---- Prometheus text ---- */

/* The daemon's text says nothing of itself being there: that only somebody else can say. */
static void put_prometheus(FILE *out, const char *text, bool up)
{
    if (!strstr(text, "# TYPE hearth_up "))
        fprintf(out,
                "# HELP hearth_up Whether the daemon runs.\n"
                "# TYPE hearth_up gauge\n"
                "hearth_up %d\n",
                up);
    put_text(out, text);
}

/* The next line of `*at` (without its newline), false at the end. */
static bool next_line(const char **at, const char **ret_line, size_t *ret_len)
{
    if (!**at)
        return false;
    *ret_line = *at;
    *ret_len = strcspn(*at, "\n");
    *at += *ret_len + ((*at)[*ret_len] == '\n');
    return true;
}

/* The name in "# TYPE hearth_NAME kind", without the prefix; 0 for another line. */
static size_t declared_name(const char *line, size_t len, const char **ret_name)
{
    static const char opening[] = "# TYPE " PREFIX;
    const size_t skip = sizeof(opening) - 1;
    size_t n = 0;

    if (len <= skip || memcmp(line, opening, skip) != 0)
        return 0;
    while (skip + n < len && line[skip + n] != ' ')
        n++;
    *ret_name = line + skip;
    return n;
}

char **render_names_free(char **names, size_t n)
{
    for (size_t i = 0; names && i < n; i++)
        free(names[i]);
    free(names);
    return NULL;
}

int render_metric_names(const char *prometheus, char ***ret_names, size_t *ret_n)
{
    char **names = calloc(RENDER_METRICS_MAX, sizeof(*names));
    const char *line, *name;
    size_t n = 0, len;

    if (!names)
        return -ENOMEM;
    while (n < RENDER_METRICS_MAX && next_line(&prometheus, &line, &len)) {
        size_t bytes = declared_name(line, len, &name);
        if (bytes == 0)
            continue;
        names[n] = strndup(name, bytes);
        if (!names[n]) {
            render_names_free(names, n);
            return -ENOMEM;
        }
        n++;
    }
    *ret_names = names;
    *ret_n = n;
    return 0;
}

/* Labels without braces and quotes: {model="x",code="y"} is model=x,code=y. A blank inside a value
 * becomes an underscore, so that the value of the line stays its second word. */
static void put_labels(FILE *out, const char *labels, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (labels[i] == '\\' && i + 1 < len)
            i++;
        else if (labels[i] == '"')
            continue;
        fputc(labels[i] == ' ' || labels[i] == '\t' ? '_' : labels[i], out);
    }
}

/* One sample of the metric: `rest` is the line behind its name. A lone sample is the value alone;
 * others have a key of what tells them apart ("le=0.001", "sum", "model=x"). */
static void put_sample(FILE *out, const char *rest, size_t len)
{
    static const char bucket[] = "_bucket";
    size_t suffix = strcspn(rest, "{ \n"), value = suffix;

    if (suffix > len)
        return;
    if (suffix > 1 && !(suffix == sizeof(bucket) - 1 && memcmp(rest, bucket, suffix) == 0))
        fprintf(out, "%.*s%s", (int)(suffix - 1), rest + 1, rest[suffix] == '{' ? "," : " ");
    if (rest[suffix] == '{') {
        bool quoted = false;
        for (value = suffix + 1; value < len && (quoted || rest[value] != '}'); value++) {
            if (rest[value] == '"')
                quoted = !quoted;
            else if (rest[value] == '\\' && value + 1 < len)
                value++;
        }
        put_labels(out, rest + suffix + 1, value - suffix - 1);
        fputc(' ', out);
        value = MIN(value + 1, len);
    }
    while (value < len && rest[value] == ' ')
        value++;
    fwrite(rest + value, 1, len - value, out);
    fputc('\n', out);
}

/* Whether what follows a metric's name shows that the sample is this metric's own. */
static bool is_own_sample(const char *rest)
{
    static const char *const suffixes[] = {"", "_bucket", "_sum", "_count"};

    for (size_t i = 0; i < ELEMENTSOF(suffixes); i++) {
        size_t n = strlen(suffixes[i]);
        if (strncmp(rest, suffixes[i], n) == 0 && (rest[n] == ' ' || rest[n] == '{'))
            return true;
    }
    return false;
}

/* Samples stand between their metric's TYPE line and the next one's. */
static int put_metric(FILE *out, const char *text, const char *metric)
{
    const char *line, *name;
    size_t len, metric_len = strlen(metric), prefix_len = strlen(PREFIX);
    bool mine = false, found = false;

    while (next_line(&text, &line, &len)) {
        size_t bytes = declared_name(line, len, &name);
        if (bytes > 0) {
            mine = bytes == metric_len && memcmp(name, metric, bytes) == 0;
            found = found || mine;
        } else if (mine && len > prefix_len + metric_len && line[0] != '#' &&
                   memcmp(line, PREFIX, prefix_len) == 0 &&
                   memcmp(line + prefix_len, metric, metric_len) == 0 &&
                   is_own_sample(line + prefix_len + metric_len)) {
            put_sample(out, line + prefix_len + metric_len, len - prefix_len - metric_len);
        }
    }
    return found ? 0 : -ENOENT;
}

/* ---- nodes ---- */

static int put_fixed(FILE *out, const struct mirror *mirror, enum tree_what what, uint64_t now_us)
{
    const char *status = mirror_status(mirror, now_us);
    bool up = strcmp(status, "inactive") != 0 && strcmp(status, "starting") != 0;

    switch (what) {
    case TREE_README: put_text(out, readme); break;
    case TREE_VERSION:
        put_text(out, mirror_version(mirror) ? mirror_version(mirror) : HEARTH_VERSION);
        break;
    case TREE_STATUS: put_text(out, status); break;
    case TREE_PROMETHEUS: put_prometheus(out, mirror_text(mirror, MIRROR_PROMETHEUS), up); break;
    case TREE_POOL: put_text(out, mirror_text(mirror, MIRROR_POOL)); break;
    case TREE_BATCHER: put_text(out, mirror_text(mirror, MIRROR_BATCHER)); break;
    case TREE_STREAMING: put_text(out, mirror_text(mirror, MIRROR_STREAMING)); break;
    case TREE_LOADER: put_text(out, mirror_text(mirror, MIRROR_LOADER)); break;
    default: return -EISDIR;
    }
    return 0;
}

static int put_node(FILE *out, const struct mirror *mirror, const struct tree_node *node,
                    uint64_t now_us)
{
    const struct mirror_model *model;

    if (node->what == TREE_DIR)
        return -EISDIR;
    if (node->what == TREE_METRIC)
        return put_metric(out, mirror_text(mirror, MIRROR_PROMETHEUS), node->subject);
    if (!node->subject)
        return put_fixed(out, mirror, node->what, now_us);
    model = mirror_model(mirror, node->subject);
    return model ? put_model(out, model, node->what) : -ENOENT;
}

int render_node(const struct mirror *mirror, const struct tree_node *node, uint64_t now_us,
                char **ret_text, size_t *ret_bytes)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    int r;

    if (!out)
        return -ENOMEM;
    r = put_node(out, mirror, node, now_us);
    if (fclose(out) != 0 && r == 0)
        r = -ENOMEM;
    if (r < 0) {
        free(text);
        return r;
    }
    *ret_text = text;
    *ret_bytes = bytes;
    return 0;
}

int render_parse_switch(const char *text, size_t bytes, bool *ret_on)
{
    if (bytes == 2 && text[1] == '\n')
        bytes = 1;
    if (bytes != 1 || (text[0] != '0' && text[0] != '1'))
        return -EINVAL;
    *ret_on = text[0] == '1';
    return 0;
}

/* Reads digits at *at: how many, their number in *ret. */
static size_t digits_at(const char *text, size_t bytes, size_t at, uint64_t *ret)
{
    size_t n = 0;

    *ret = 0;
    for (; at + n < bytes && text[at + n] >= '0' && text[at + n] <= '9'; n++)
        if (n < 18)
            *ret = *ret * 10 + (uint64_t)(text[at + n] - '0');
    return n;
}

int render_parse_seconds(const char *text, size_t bytes, uint64_t *ret_us)
{
    uint64_t seconds, fraction = 0;
    size_t n, more = 0;

    if (bytes > 0 && text[bytes - 1] == '\n')
        bytes--;
    n = digits_at(text, bytes, 0, &seconds);
    if (n == 0 || n > 8)
        return -EINVAL;
    if (n < bytes && text[n] == '.') {
        more = digits_at(text, bytes, n + 1, &fraction);
        if (more == 0 || more > 6)
            return -EINVAL;
        for (size_t i = more; i < 6; i++)
            fraction *= 10;
        more++;
    }
    if (n + more != bytes || seconds * 1000000u + fraction > RENDER_SECONDS_MAX * 1000000ull)
        return -EINVAL;
    *ret_us = seconds * 1000000u + fraction;
    return 0;
}

bool render_state_is_settled(const char *state)
{
    static const char *const moving[] = {"queued", "loading", "warming", "draining"};

    for (size_t i = 0; i < ELEMENTSOF(moving); i++)
        if (strcmp(state, moving[i]) == 0)
            return false;
    return true;
}
