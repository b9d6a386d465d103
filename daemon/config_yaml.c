#include "daemon/config.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <yaml.h>

#include "daemon/config_table.h"
#include "lib/cleanup.h"

#define SHOWN_FILE_BYTES 120 /* of a path in an error: its end */
#define SHOWN_TEXT_BYTES 48  /* of a value or a key in an error */
#define PATH_BYTES       256 /* "models." NAME "." key */

/* The file's events, one at a time. A mapping is entered only where the table has keys below it, so
 * nesting is bounded by the table's own depth; everything else is refused at its first event. */
struct walk {
    yaml_parser_t parser;
    yaml_event_t event; /* the current one, deleted by the next */
    struct config *config;
    const char *file;
    char *text; /* the whole file */
    size_t len;
    const char *last_key; /* display path of the key being read, "" before the first */
    struct fault *fault;
};

/* A mapping: whose fields it sets and what it is called, in the table and to the user. */
struct scope {
    void *base;
    const char *pattern; /* "models.NAME" */
    const char *display; /* "models.story" */
    char **seen;         /* keys met in it so far */
    size_t n_seen, max_seen;
};

static size_t line_of(const struct walk *w)
{
    return w->event.start_mark.line + 1;
}

__attribute__((format(printf, 3, 4))) static int refuse(struct walk *w, size_t line,
                                                        const char *format, ...)
{
    char reason[FAULT_TEXT_BYTES];
    size_t len = strlen(w->file);
    bool cut = len > SHOWN_FILE_BYTES;
    va_list ap;
    va_start(ap, format);
    vsnprintf(reason, sizeof(reason), format, ap);
    va_end(ap);
    return fault_set(w->fault, -EINVAL, "%s%s:%zu: %s%s%s", cut ? "..." : "",
                     cut ? w->file + len - SHOWN_FILE_BYTES : w->file, line, w->last_key,
                     *w->last_key ? ": " : "", reason);
}

/* A beginning of the text, fit to be shown: what a file holds must not write to a terminal. */
static const char *shown(const char *text, char out[SHOWN_TEXT_BYTES])
{
    size_t n = 0;
    while (text[n] && n < SHOWN_TEXT_BYTES - 4) {
        unsigned char c = (unsigned char)text[n];
        out[n++] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    memcpy(out + n, text[n] ? "..." : "", text[n] ? 4 : 1);
    return out;
}

/* libyaml decodes ahead of what it parses: of a byte that is no text it knows the offset alone. */
static size_t line_at(const struct walk *w, size_t offset)
{
    size_t line = 1;
    for (size_t i = 0; i < MIN(offset, w->len); i++)
        line += w->text[i] == '\n';
    return line;
}

static int syntax_error(struct walk *w)
{
    const yaml_parser_t *p = &w->parser;
    size_t line =
        p->error == YAML_READER_ERROR ? line_at(w, p->problem_offset) : p->problem_mark.line + 1;
    if (p->error == YAML_MEMORY_ERROR)
        return -ENOMEM;
    return refuse(w, line, "expected YAML, but %s%s%s%s", p->problem ? p->problem : "it is none",
                  p->context ? " (" : "", p->context ? p->context : "", p->context ? ")" : "");
}

static int next_event(struct walk *w)
{
    yaml_event_delete(&w->event);
    if (!yaml_parser_parse(&w->parser, &w->event))
        return syntax_error(w);
    if (w->event.type == YAML_ALIAS_EVENT)
        return refuse(w, line_of(w), "expected the value itself, found an alias");
    return 0;
}

/* The scalar's text, valid until the next event; a sentence where it is none or not fit to use. */
static int scalar_text(struct walk *w, const char *expected, const char **ret_text)
{
    static const char *const what[] = {
        [YAML_MAPPING_START_EVENT] = "a mapping",
        [YAML_SEQUENCE_START_EVENT] = "a list",
    };
    if (w->event.type != YAML_SCALAR_EVENT)
        return refuse(w, line_of(w), "expected %s, found %s", expected, what[w->event.type]);
    const char *text = (const char *)w->event.data.scalar.value;
    if (w->event.data.scalar.tag)
        return refuse(w, line_of(w), "expected %s, found a tag", expected);
    if (w->event.data.scalar.length > CONFIG_VALUE_BYTES)
        return refuse(w, line_of(w), "expected %s, found more than %u bytes", expected,
                      CONFIG_VALUE_BYTES);
    if (strlen(text) != w->event.data.scalar.length)
        return refuse(w, line_of(w), "expected %s, found a NUL character", expected);
    *ret_text = text;
    return 0;
}

/* One value, or one element of a list. */
static int read_value(struct walk *w, const struct config_key *key, void *base)
{
    char expected[CONFIG_EXPECTS_BYTES], view[SHOWN_TEXT_BYTES];
    const char *text = "";
    config_key_expects(key, expected);
    int r = scalar_text(w, expected, &text);
    if (r < 0)
        return r;
    r = config_key_read(key, base, text);
    if (r == -ENOSPC)
        return refuse(w, line_of(w), "expected at most %u entries", CONFIG_MAX_LIST);
    if (r == -EINVAL)
        return refuse(w, line_of(w), "expected %s, found '%s'", expected, shown(text, view));
    return r;
}

static int read_list(struct walk *w, const struct config_key *key, void *base)
{
    char expected[CONFIG_EXPECTS_BYTES];
    config_key_expects(key, expected);
    if (w->event.type != YAML_SEQUENCE_START_EVENT)
        return refuse(w, line_of(w), "expected %s", expected);
    config_key_clear(key, base);
    for (;;) {
        int r = next_event(w);
        if (r < 0)
            return r;
        if (w->event.type == YAML_SEQUENCE_END_EVENT)
            return 0;
        r = read_value(w, key, base);
        if (r < 0)
            return r;
    }
}

static int read_key(struct walk *w, const struct config_key *key, void *base)
{
    if (!config_key_is_list(key))
        return read_value(w, key, base);
    if (key->kind == KIND_PATHS)
        w->config->dirs_given = true;
    return read_list(w, key, base);
}

/* Remembers a key of the mapping; a second time is an error. A mapping has no more keys than the
 * table, or CONFIG_MAX_MODELS. */
static int note_seen(struct walk *w, struct scope *scope, const char *name)
{
    for (size_t i = 0; i < scope->n_seen; i++)
        if (strcmp(scope->seen[i], name) == 0)
            return refuse(w, line_of(w), "expected once, found again");
    if (scope->n_seen == scope->max_seen) {
        size_t max = scope->max_seen ? 2 * scope->max_seen : 16;
        char **bigger = realloc(scope->seen, max * sizeof(*bigger));
        if (!bigger)
            return -ENOMEM;
        scope->seen = bigger;
        scope->max_seen = max;
    }
    scope->seen[scope->n_seen] = strdup(name);
    return scope->seen[scope->n_seen++] ? 0 : -ENOMEM;
}

static void scope_done(struct scope *scope)
{
    for (size_t i = 0; i < scope->n_seen; i++)
        free(scope->seen[i]);
    free(scope->seen);
}

static int walk_section(struct walk *w, struct scope *scope);

/* The value of a section's key: a mapping, or nothing at all (every key of it commented out). */
static int enter_section(struct walk *w, struct scope *scope)
{
    const char *text = "";
    if (w->event.type == YAML_MAPPING_START_EVENT) {
        int r = walk_section(w, scope);
        scope_done(scope);
        return r;
    }
    if (w->event.type == YAML_SEQUENCE_START_EVENT)
        return refuse(w, line_of(w), "expected keys of its own, found a list");
    int r = scalar_text(w, "keys of its own", &text);
    if (r < 0)
        return r;
    if (*text && strcmp(text, "~") != 0 && strcmp(text, "null") != 0)
        return refuse(w, line_of(w), "expected keys of its own, found a value");
    return 0;
}

static int enter_model(struct walk *w, const char *name, const char *display)
{
    struct config_model *model;
    if (!config_name_valid(name))
        return refuse(w, line_of(w),
                      "expected a model's name (letters, digits, `._-`, at most 128)");
    int r = config_add_model(w->config, name, &model);
    if (r == -ENOSPC)
        return refuse(w, line_of(w), "expected at most %u models", CONFIG_MAX_MODELS);
    if (r == -EEXIST)
        return refuse(w, line_of(w), "expected once, found again");
    if (r < 0 || (r = next_event(w)) < 0)
        return r;
    struct scope scope = {.base = model, .pattern = CONFIG_MODEL_PREFIX, .display = display};
    return enter_section(w, &scope);
}

static int enter_key(struct walk *w, struct scope *scope, const char *pattern, const char *display)
{
    const struct config_key *key = config_key_find(pattern);
    int r;
    if (!key && !config_section_known(pattern))
        return refuse(w, line_of(w), "expected a known key; the nearest one is %s",
                      config_key_nearest(pattern));
    if ((r = next_event(w)) < 0)
        return r;
    if (key)
        return read_key(w, key, scope->base);
    struct scope inner = {.base = w->config, .pattern = pattern, .display = display};
    return enter_section(w, &inner);
}

static void join(char out[PATH_BYTES], const char *section, const char *name)
{
    snprintf(out, PATH_BYTES, "%s%s%s", section, *section ? "." : "", name);
}

/* The keys of a mapping whose start is the current event, up to its end. */
static int walk_section(struct walk *w, struct scope *scope)
{
    for (;;) {
        char pattern[PATH_BYTES], display[PATH_BYTES], view[SHOWN_TEXT_BYTES];
        const char *name = "";
        int r = next_event(w);
        if (r < 0 || w->event.type == YAML_MAPPING_END_EVENT)
            return r;
        r = scalar_text(w, "a key", &name);
        if (r < 0)
            return r;
        join(pattern, scope->pattern, name);
        join(display, scope->display, shown(name, view));
        w->last_key = display;
        r = note_seen(w, scope, name);
        if (r == 0 && strcmp(scope->pattern, "models") == 0)
            r = enter_model(w, name, display);
        else if (r == 0)
            r = enter_key(w, scope, pattern, display);
        w->last_key = scope->display;
        if (r < 0)
            return r;
    }
}

static int walk_document(struct walk *w)
{
    struct scope root = {.base = w->config, .pattern = "", .display = ""};
    int r = next_event(w); /* the stream's start */
    if (r < 0 || (r = next_event(w)) < 0 || w->event.type == YAML_STREAM_END_EVENT)
        return r;
    if ((r = next_event(w)) < 0) /* behind the document's start */
        return r;
    r = enter_section(w, &root);
    if (r < 0 || (r = next_event(w)) < 0) /* the document's end */
        return r;
    if ((r = next_event(w)) < 0)
        return r;
    if (w->event.type != YAML_STREAM_END_EVENT)
        return refuse(w, line_of(w), "expected one document, found a second");
    return 0;
}

/* The whole file in memory, at most CONFIG_FILE_BYTES. */
static int read_file(const char *path, char **ret_text, size_t *ret_len, struct fault *ret_fault)
{
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
    _cleanup_free_ char *text = malloc(CONFIG_FILE_BYTES + 1);
    size_t len = 0;
    ssize_t n = fd < 0 ? -1 : 1;
    if (!text)
        return -ENOMEM;
    while (n > 0 && len <= CONFIG_FILE_BYTES) {
        do
            n = read(fd, text + len, CONFIG_FILE_BYTES + 1 - len);
        while (n < 0 && errno == EINTR);
        len += n > 0 ? (size_t)n : 0;
    }
    if (n < 0)
        return fault_set(ret_fault, -errno, "%s: cannot be read: %s", path, strerror(errno));
    if (len > CONFIG_FILE_BYTES)
        return fault_set(ret_fault, -EFBIG, "%s: expected at most %zu bytes", path,
                         CONFIG_FILE_BYTES);
    *ret_text = TAKE_PTR(text);
    *ret_len = len;
    return 0;
}

int config_load(struct config *config, const char *path, struct fault *ret_fault)
{
    struct walk w = {.config = config, .file = path, .last_key = "", .fault = ret_fault};
    fault_set(ret_fault, 0, "%s: out of memory", path); /* where nothing says better */
    int r = read_file(path, &w.text, &w.len, ret_fault);
    if (r < 0)
        return r;
    if (!yaml_parser_initialize(&w.parser)) {
        free(w.text);
        return -ENOMEM;
    }
    yaml_parser_set_input_string(&w.parser, (const unsigned char *)w.text, w.len);
    r = walk_document(&w);
    yaml_event_delete(&w.event);
    yaml_parser_delete(&w.parser);
    free(w.text);
    return r;
}
