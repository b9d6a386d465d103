#include "cli/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

/* Beyond this a duration is a slip of the pen: a thousand years, and still exact in a double. */
#define DURATION_MAX_US 3.2e16

int duration_parse(const char *text, uint64_t *ret_us)
{
    static const struct {
        const char *unit;
        double us;
    } units[] = {{"us", 1}, {"ms", 1e3}, {"s", 1e6}, {"min", 60e6}, {"h", 3600e6}};
    size_t digits = strspn(text, "0123456789.");
    char *end;
    if (digits == 0)
        return -EINVAL;
    double value = strtod(text, &end);
    if (end != text + digits)
        return -EINVAL;
    for (size_t i = 0; i < ELEMENTSOF(units); i++) {
        if (strcmp(end, units[i].unit) != 0)
            continue;
        double us = value * units[i].us;
        if (!(us <= DURATION_MAX_US))
            return -EINVAL;
        *ret_us = (uint64_t)(us + 0.5);
        return 0;
    }
    return -EINVAL;
}

static int number_parse(const char *text, uint64_t *ret_number)
{
    char *end;
    if (*text < '0' || *text > '9')
        return -EINVAL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *end)
        return -EINVAL;
    *ret_number = value;
    return 0;
}

static int real_parse(const char *text, float *ret_real)
{
    char *end;
    float value = strtof(text, &end);
    if (end == text || *end || !isfinite(value))
        return -EINVAL;
    *ret_real = value;
    return 0;
}

/* What a value must look like, for the sentence. */
static const char *const kind_words[] = {
    [OPTION_NUMBER] = "a whole number",
    [OPTION_REAL] = "a number",
    [OPTION_DURATION] = "a duration with its unit, such as 500ms, 30s, 2min",
};

static int value_set(const struct option *option, const char *text, struct fault *ret_fault)
{
    struct option_list *list;
    int r = 0;
    switch (option->kind) {
    case OPTION_FLAG: *(bool *)option->value = true; break;
    case OPTION_TEXT: *(const char **)option->value = text; break;
    case OPTION_NUMBER: r = number_parse(text, option->value); break;
    case OPTION_REAL: r = real_parse(text, option->value); break;
    case OPTION_DURATION:
        r = duration_parse(text, option->value);
        if (r == 0 && *(uint64_t *)option->value == 0)
            return fault_set(ret_fault, -EINVAL, "--%s must be more than 0", option->name);
        break;
    case OPTION_LIST:
        list = option->value;
        if (list->n == OPTION_LIST_MAX)
            return fault_set(ret_fault, -EINVAL, "--%s is given more than %u times", option->name,
                             OPTION_LIST_MAX);
        list->values[list->n++] = text;
        break;
    }
    if (r < 0)
        return fault_set(ret_fault, r, "--%s takes %s, not '%s'", option->name,
                         kind_words[option->kind], text);
    if (option->given)
        *option->given = true;
    return 0;
}

static const struct option *option_find(const struct option *options, size_t n, const char *name,
                                        size_t len)
{
    for (size_t i = 0; i < n; i++)
        if (strlen(options[i].name) == len && memcmp(options[i].name, name, len) == 0)
            return &options[i];
    return NULL;
}

/* The option at argv[*at] and, where it has one, its value: *at goes to the last word of it. */
static int option_parse(const struct option *options, size_t n_options, int argc, char **argv,
                        int *at, struct fault *ret_fault)
{
    const char *name = argv[*at] + 2, *equals = strchr(name, '='), *text = NULL;
    size_t len = equals ? (size_t)(equals - name) : strlen(name);
    const struct option *option = option_find(options, n_options, name, len);
    if (!option)
        return fault_set(ret_fault, -EINVAL, "there is no option --%.*s here: see --help",
                         (int)MIN(len, (size_t)64), name);
    if (option->kind == OPTION_FLAG && equals)
        return fault_set(ret_fault, -EINVAL, "--%s takes no value", option->name);
    if (option->kind != OPTION_FLAG) {
        text = equals ? equals + 1 : *at + 1 < argc ? argv[++*at] : NULL;
        if (!text)
            return fault_set(ret_fault, -EINVAL, "--%s needs a value: %s", option->name,
                             option->argument);
    }
    return value_set(option, text, ret_fault);
}

int options_parse(const struct option *options, size_t n_options, int argc, char **argv,
                  const char **arguments, size_t max_arguments, size_t *ret_n,
                  struct fault *ret_fault)
{
    size_t n = 0;
    bool ended = false;
    for (int i = 0; i < argc; i++) {
        int r = 0;
        if (!ended && strcmp(argv[i], "--") == 0)
            ended = true;
        else if (!ended && strncmp(argv[i], "--", 2) == 0)
            r = option_parse(options, n_options, argc, argv, &i, ret_fault);
        else if (!ended && argv[i][0] == '-' && argv[i][1])
            r = fault_set(ret_fault, -EINVAL,
                          "options begin with two dashes, unlike '%.64s' (before an argument that "
                          "begins with a dash put --)",
                          argv[i]);
        else if (n == max_arguments)
            r = fault_set(ret_fault, -EINVAL,
                          "one argument too many: '%.64s' (quote a text that has blanks)", argv[i]);
        else
            arguments[n++] = argv[i];
        if (r < 0)
            return r;
    }
    *ret_n = n;
    return 0;
}
