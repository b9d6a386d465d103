/* What goes to people and to programs: text as it comes, tables, sizes, JSON.
 *
 * Text of a model is exact on a pipe; on a terminal control characters other than newline and tab
 * are shown as \xNN, so that no text can drive it. Hides: partial writes, UTF-8 sequences that are
 * cut between two pieces, column widths. Thread: one. */
#ifndef HEARTH_CLI_OUTPUT_H
#define HEARTH_CLI_OUTPUT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Where text goes. Zero-initialise but for fd and escape. */
struct text_out {
    int fd;
    bool escape;      /* a terminal that gets no raw text */
    uint8_t carry[4]; /* the begun sequence that the next piece may complete */
    size_t n_carry;
    bool any;        /* something was written */
    bool at_newline; /* the last byte written was a newline */
};

/* Writes a piece at once: 0, -EINTR where a signal came first, or why not. */
int text_out_write(struct text_out *out, const char *text, size_t len);
/* Writes what was begun and never completed. */
int text_out_end(struct text_out *out);

/* A copy of the text (malloc) with control characters and bytes that are no UTF-8 escaped;
 * `keep_newlines`: newlines and tabs stay. NULL when out of memory. */
char *text_escape(const char *text, size_t len, bool keep_newlines);
/* A copy (malloc) in which bytes that are no UTF-8 are U+FFFD; *ret_len is its length. */
char *text_to_utf8(const char *text, size_t len, size_t *ret_len);

/* Prints lines to stdout, escaped so and ended by a newline. */
void text_print_lines(const char *text, size_t len);

/* Bytes that grow (malloc) with a NUL behind them. Zero-initialise; whoever has it frees `data`. */
struct text_buffer {
    char *data;
    size_t len, capacity;
};
/* 0 or -ENOMEM. */
int text_append(struct text_buffer *buffer, const void *bytes, size_t len);

/* "1.1GiB", "640KiB", "17B": no blank inside, so that columns stay columns. */
#define SIZE_TEXT_BYTES 16
const char *size_text(uint64_t bytes, char ret_text[SIZE_TEXT_BYTES]);

/* Rows of cells, aligned when printed; the last column is not padded. Cells are copied. */
#define TABLE_MAX_COLUMNS 8u
struct table {
    size_t n_columns, n_cells, capacity;
    char **cells;
    bool failed; /* a cell found no memory */
};
void table_cell(struct table *table, const char *text);
/* Prints to stdout: 0 or -ENOMEM. */
int table_print(const struct table *table);
void table_done(struct table *table);

/* A JSON string of bytes that need not be UTF-8. */
json_t *json_text(const char *text);
json_t *json_bytes(const char *text, size_t len);
/* The flat lines `key value` as an object; values that are numbers become numbers. */
json_t *json_flat(const char *lines);
/* Prints to stdout with a newline and drops the reference: an exit code. */
int json_print(json_t *json);

#endif
