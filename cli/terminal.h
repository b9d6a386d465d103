/* A terminal that a program draws on and gives back as it was: the alternate screen, no cursor,
 * keys one by one, nothing echoed.
 *
 * Signals keep their keys: Ctrl-C and Ctrl-Z still send SIGINT and SIGTSTP. Hides termios and
 * escape sequences. Thread: one. */
#ifndef HEARTH_CLI_TERMINAL_H
#define HEARTH_CLI_TERMINAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <termios.h>

struct terminal {
    bool entered;
    int key_fd; /* -1: standard input is no terminal, so there are no keys */
    struct termios before;
};

/* Zero-initialise. Draws on stdout, which must be a terminal. */
void terminal_enter(struct terminal *terminal);
void terminal_leave(struct terminal *terminal);
/* Columns and rows of stdout now; 80 and 24 where nobody knows. */
void terminal_size(size_t *ret_columns, size_t *ret_rows);

/* A picture is made in memory and shown in one write, so that none is seen half drawn: begin, lines
 * divided by TERMINAL_LINE_END, show. */
#define TERMINAL_LINE_END "\033[K\n"
FILE *terminal_begin(char **ret_text, size_t *ret_len);
/* Frees the text. Negative errno where it could not be written. */
int terminal_show(FILE *picture, char **text, size_t *len);

#endif
