#include "bench/arguments.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

int parse_duration(const char *text, uint64_t *ret_us)
{
    static const struct {
        const char *unit;
        double us;
    } units[] = {{"us", 1}, {"ms", 1e3}, {"s", 1e6}, {"min", 6e7}};
    char *end;
    double value = strtod(text, &end);

    for (size_t i = 0; i < ELEMENTSOF(units); i++)
        if (end != text && strcmp(end, units[i].unit) == 0 && value >= 0 && value < 1e6) {
            *ret_us = (uint64_t)(value * units[i].us);
            return 0;
        }
    return -EINVAL;
}

int parse_number(const char *text, double least, double most, double *ret_value)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end || !(value >= least && value <= most))
        return -EINVAL;
    *ret_value = value;
    return 0;
}
