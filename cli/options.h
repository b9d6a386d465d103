/* Command-line options: a table per command says what there is; parsing and help come from it.
 *
 * `--name value` and `--name=value`, before, between and behind the arguments; `--` ends them.
 * Hides: the parsing, and the forms of numbers, real numbers and durations. Thread: any. */
#ifndef HEARTH_CLI_OPTIONS_H
#define HEARTH_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/fault.h"

enum option_kind {
    OPTION_FLAG,     /* bool */
    OPTION_TEXT,     /* const char * */
    OPTION_LIST,     /* struct option_list: may be given several times */
    OPTION_NUMBER,   /* uint64_t */
    OPTION_REAL,     /* float, finite */
    OPTION_DURATION, /* uint64_t microseconds, more than 0; a unit is required */
};

#define OPTION_LIST_MAX 64u

struct option_list {
    const char *values[OPTION_LIST_MAX];
    size_t n;
};

struct option {
    const char *name; /* without the dashes */
    enum option_kind kind;
    void *value;          /* written when the option is given */
    bool *given;          /* set when the option is given; NULL: nobody asks */
    const char *argument; /* its name in the help; NULL for a flag */
    const char *help;
};

/* Parses argv[0..argc), writes what is no option to `arguments` (at most `max_arguments`) and their
 * number to *ret_n. -EINVAL with a sentence. */
int options_parse(const struct option *options, size_t n_options, int argc, char **argv,
                  const char **arguments, size_t max_arguments, size_t *ret_n,
                  struct fault *ret_fault);
/* A whole number with one of the units us, ms, s, min, h ("30s"), or a decimal one ("1.5s"). */
int duration_parse(const char *text, uint64_t *ret_us);

#endif
