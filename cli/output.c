#include "cli/output.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "lib/cleanup.h"
#include "lib/wire.h"

#define REPLACEMENT "\xef\xbf\xbd" /* U+FFFD */

/* ---- characters ---- */

/* Bytes of the UTF-8 sequence that opens here; 0: none; -1: it is cut by the end of the text. */
static int sequence_len(const uint8_t *bytes, size_t left)
{
    if (bytes[0] == 0 || bytes[0] < 0x80)
        return 1;
    size_t len = bytes[0] >= 0xf0 ? 4 : bytes[0] >= 0xe0 ? 3 : 2;
    if (left >= len)
        return wire_utf8_valid(bytes, len) ? (int)len : 0;
    /* Cut: could the rest still come? Try with the smallest and the largest possible rest. */
    for (uint8_t fill = 0x80; fill != 0; fill = fill == 0x80 ? 0xbf : 0) {
        uint8_t whole[4];
        memset(whole, fill, sizeof(whole));
        memcpy(whole, bytes, left);
        if (wire_utf8_valid(whole, len))
            return -1;
    }
    /* A lead byte alone whose second byte has a narrower range (e0, ed, f0, f4). */
    return left == 1 &&
                   (bytes[0] == 0xe0 || bytes[0] == 0xed || bytes[0] == 0xf0 || bytes[0] == 0xf4)
               ? -1
               : 0;
}

/* A control character of C0 or C1, or DEL. */
static bool is_control(const uint8_t *bytes, int len)
{
    return (len == 1 && (bytes[0] < 0x20 || bytes[0] == 0x7f)) ||
           (len == 2 && bytes[0] == 0xc2 && bytes[1] < 0xa0);
}

int text_append(struct text_buffer *g, const void *bytes, size_t len)
{
    if (g->capacity - g->len < len + 1) {
        size_t capacity = MAX(g->capacity * 2, g->len + len + 64);
        char *data = realloc(g->data, capacity);
        if (!data)
            return -ENOMEM;
        g->data = data;
        g->capacity = capacity;
    }
    memcpy(g->data + g->len, bytes, len);
    g->len += len;
    g->data[g->len] = '\0';
    return 0;
}

static int grow_escaped(struct text_buffer *g, const uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        char hex[8];
        int n = snprintf(hex, sizeof(hex), "\\x%02x", bytes[i]);
        int r = text_append(g, hex, (size_t)n);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Appends the text with its controls escaped. Stops before a sequence that is cut by the end and
 * tells where in *ret_used; with `whole` such a sequence is escaped too. */
static int escape_into(struct text_buffer *g, const uint8_t *bytes, size_t len, bool keep_newlines,
                       bool whole, size_t *ret_used)
{
    size_t i = 0;
    int r = text_append(g, "", 0);
    while (r == 0 && i < len) {
        int n = sequence_len(bytes + i, len - i);
        if (n < 0 && !whole)
            break;
        bool newline = keep_newlines && (bytes[i] == '\n' || bytes[i] == '\t');
        if (n <= 0 || (is_control(bytes + i, n) && !newline))
            r = grow_escaped(g, bytes + i, (size_t)MAX(n, 1));
        else
            r = text_append(g, bytes + i, (size_t)n);
        i += (size_t)MAX(n, 1);
    }
    *ret_used = i;
    return r;
}

char *text_escape(const char *text, size_t len, bool keep_newlines)
{
    struct text_buffer g = {0};
    size_t used;
    if (escape_into(&g, (const uint8_t *)text, len, keep_newlines, true, &used) == 0)
        return g.data;
    free(g.data);
    return NULL;
}

void text_print_lines(const char *text, size_t len)
{
    _cleanup_free_ char *shown = text_escape(text, len, true);
    size_t shown_len = shown ? strlen(shown) : 0;
    if (shown_len)
        printf("%s%s", shown, shown[shown_len - 1] != '\n' ? "\n" : "");
}

char *text_to_utf8(const char *text, size_t len, size_t *ret_len)
{
    struct text_buffer g = {0};
    const uint8_t *bytes = (const uint8_t *)text;
    int r = text_append(&g, "", 0);
    for (size_t i = 0; r == 0 && i < len;) {
        int n = sequence_len(bytes + i, len - i);
        r = n > 0 ? text_append(&g, bytes + i, (size_t)n)
                  : text_append(&g, REPLACEMENT, strlen(REPLACEMENT));
        i += (size_t)MAX(n, 1);
    }
    if (r < 0) {
        free(g.data);
        return NULL;
    }
    *ret_len = g.len;
    return g.data;
}

/* ---- text as it comes ---- */

static int write_whole(struct text_out *out, const char *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = write(out->fd, bytes + at, len - at);
        if (n < 0)
            return -errno;
        at += (size_t)n;
        out->any = true;
        out->at_newline = bytes[at - 1] == '\n';
    }
    return 0;
}

int text_out_write(struct text_out *out, const char *text, size_t len)
{
    if (!out->escape)
        return write_whole(out, text, len);
    struct text_buffer piece = {0}, shown = {0};
    size_t used = 0;
    int r = text_append(&piece, out->carry, out->n_carry);
    if (r == 0)
        r = text_append(&piece, text, len);
    if (r == 0)
        r = escape_into(&shown, (const uint8_t *)piece.data, piece.len, true, false, &used);
    if (r == 0) {
        out->n_carry = piece.len - used; /* at most 3: the rest of one sequence */
        memcpy(out->carry, piece.data + used, out->n_carry);
        r = write_whole(out, shown.data, shown.len);
    }
    free(piece.data);
    free(shown.data);
    return r;
}

int text_out_end(struct text_out *out)
{
    size_t n = out->n_carry;
    out->n_carry = 0;
    if (n == 0)
        return 0;
    _cleanup_free_ char *shown = text_escape((const char *)out->carry, n, true);
    return shown ? write_whole(out, shown, strlen(shown)) : -ENOMEM;
}

/* ---- sizes and tables ---- */

const char *size_text(uint64_t bytes, char ret_text[SIZE_TEXT_BYTES])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 999.5 && unit + 1 < ELEMENTSOF(units)) {
        value /= 1024;
        unit++;
    }
    snprintf(ret_text, SIZE_TEXT_BYTES, unit > 0 && value < 9.95 ? "%.1f%s" : "%.0f%s", value,
             units[unit]);
    return ret_text;
}

void table_cell(struct table *table, const char *text)
{
    if (table->n_cells == table->capacity) {
        size_t capacity = table->capacity ? table->capacity * 2 : 64;
        char **cells = reallocarray(table->cells, capacity, sizeof(*cells));
        if (!cells) {
            table->failed = true;
            return;
        }
        table->cells = cells;
        table->capacity = capacity;
    }
    char *cell = text_escape(text, strlen(text), false);
    if (cell)
        table->cells[table->n_cells++] = cell;
    else
        table->failed = true;
}

/* Columns on a terminal, as far as one character a code point is true. */
static size_t text_width(const char *text)
{
    size_t width = 0;
    for (; *text; text++)
        width += ((uint8_t)*text & 0xc0) != 0x80;
    return width;
}

int table_print(const struct table *table)
{
    size_t widths[TABLE_MAX_COLUMNS] = {0};
    if (table->failed)
        return -ENOMEM;
    for (size_t i = 0; i < table->n_cells; i++) {
        size_t *width = &widths[i % table->n_columns];
        *width = MAX(*width, text_width(table->cells[i]));
    }
    for (size_t i = 0; i < table->n_cells; i++) {
        size_t column = i % table->n_columns;
        bool last = column + 1 == table->n_columns;
        const char *cell = table->cells[i];
        fputs(cell, stdout);
        if (!last)
            printf("%*s", (int)(widths[column] - text_width(cell) + 2), "");
        else
            fputc('\n', stdout);
    }
    return 0;
}

void table_done(struct table *table)
{
    for (size_t i = 0; i < table->n_cells; i++)
        free(table->cells[i]);
    free(table->cells);
    *table = (struct table){0};
}

/* ---- JSON ---- */

json_t *json_bytes(const char *text, size_t len)
{
    size_t utf8_len = 0;
    _cleanup_free_ char *utf8 = text_to_utf8(text, len, &utf8_len);
    return utf8 ? json_stringn(utf8, utf8_len) : NULL;
}

json_t *json_text(const char *text)
{
    return json_bytes(text, strlen(text));
}

/* The value of a flat line: an integer or a real number where it is one to its last character. */
static json_t *json_value(const char *text, size_t len)
{
    char copy[48], *end;
    bool number = len > 0 && len < sizeof(copy) && strspn(text, "+-.0123456789eE") >= len &&
                  (isdigit((unsigned char)text[0]) || text[0] == '-');
    if (!number)
        return json_bytes(text, len);
    memcpy(copy, text, len);
    copy[len] = '\0';
    errno = 0;
    long long integer = strtoll(copy, &end, 10);
    if (!*end && errno == 0)
        return json_integer(integer);
    double real = strtod(copy, &end);
    return *end ? json_bytes(text, len) : json_real(real);
}

json_t *json_flat(const char *lines)
{
    json_t *object = json_object();
    for (const char *line = lines; object && line && *line;) {
        size_t len = strcspn(line, "\n"), key_len = strcspn(line, " \n");
        size_t value_at = key_len < len ? key_len + 1 : len, utf8_len = 0;
        _cleanup_free_ char *key = text_to_utf8(line, key_len, &utf8_len);
        if (key && *key)
            json_object_set_new(object, key, json_value(line + value_at, len - value_at));
        line += len + (line[len] == '\n');
    }
    return object;
}

int json_print(json_t *json)
{
    int r = json ? json_dumpf(json, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER) : -1;
    json_decref(json);
    if (r < 0)
        return cli_error("no memory for the answer as JSON");
    fputc('\n', stdout);
    return CLI_DONE;
}
