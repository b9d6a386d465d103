/* Values of options, as several commands take them. Thread: pure. */
#ifndef HEARTH_BENCH_ARGUMENTS_H
#define HEARTH_BENCH_ARGUMENTS_H

#include <stdint.h>

/* A number with a unit: us, ms, s or min. -EINVAL. */
int parse_duration(const char *text, uint64_t *ret_us);
/* -EINVAL for what is no number, or outside of the bounds. */
int parse_number(const char *text, double least, double most, double *ret_value);

#endif
