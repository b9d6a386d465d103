/* The command line's options: what is taken, and what is said about what is not. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "cli/options.h"
#include "lib/cleanup.h"

static struct values {
    bool flag, given;
    const char *text;
    struct option_list list;
    uint64_t number, duration;
    float real;
} v;

static const struct option options[] = {
    {"flag", OPTION_FLAG, &v.flag, NULL, NULL, ""},
    {"text", OPTION_TEXT, &v.text, NULL, "T", ""},
    {"list", OPTION_LIST, &v.list, NULL, "L", ""},
    {"number", OPTION_NUMBER, &v.number, &v.given, "N", ""},
    {"real", OPTION_REAL, &v.real, NULL, "R", ""},
    {"time", OPTION_DURATION, &v.duration, NULL, "D", ""},
};

/* Parses the words of a line that are divided by single blanks. */
static int parse(const char *line, const char **arguments, size_t *ret_n, struct fault *fault)
{
    static char copy[1024];
    char *argv[64];
    int argc = 0;
    snprintf(copy, sizeof(copy), "%s", line);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    v = (struct values){0};
    return options_parse(options, ELEMENTSOF(options), argc, argv, arguments, 2, ret_n, fault);
}

Test(options, stand_before_between_and_behind_the_arguments)
{
    const char *arguments[2];
    struct fault fault;
    size_t n = 0;
    cr_assert_eq(parse("--flag one --number=7 --text word --real -0.5 two --time 30s --list a "
                       "--list=b",
                       arguments, &n, &fault),
                 0, "%s", fault.text);
    cr_assert_eq(n, 2);
    cr_assert_str_eq(arguments[0], "one");
    cr_assert_str_eq(arguments[1], "two");
    cr_assert(v.flag && v.given && v.number == 7 && v.real == -0.5f && v.duration == 30000000);
    cr_assert_str_eq(v.text, "word");
    cr_assert_eq(v.list.n, 2);
    cr_assert_str_eq(v.list.values[1], "b");
}

Test(options, two_dashes_end_them)
{
    const char *arguments[2];
    struct fault fault;
    size_t n = 0;
    cr_assert_eq(parse("-- --flag -x", arguments, &n, &fault), 0);
    cr_assert(n == 2 && !v.flag);
    cr_assert_str_eq(arguments[0], "--flag");
    cr_assert_eq(parse("-", arguments, &n, &fault), 0, "a dash alone is an argument");
    cr_assert_eq(n, 1);
}

Test(options, what_is_wrong_is_named)
{
    static const struct {
        const char *line, *sentence;
    } cases[] = {
        {"--absent", "no option --absent"},
        {"--fla", "no option --fla"},
        {"--flag=1", "takes no value"},
        {"--text", "needs a value: T"},
        {"--number -1", "a whole number, not '-1'"},
        {"--number 1.5", "a whole number"},
        {"--number 18446744073709551616", "a whole number"},
        {"--number=", "a whole number"},
        {"--real inf", "a number, not 'inf'"},
        {"--real nan", "a number"},
        {"--real 1x", "a number"},
        {"--real 1e99", "a number"},
        {"--time 30", "with its unit"},
        {"--time s", "with its unit"},
        {"--time 0s", "more than 0"},
        {"--time 1.2.3s", "with its unit"},
        {"--time 9999999999h", "with its unit"},
        {"-t", "two dashes"},
        {"one two three", "too many: 'three'"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        const char *arguments[2];
        struct fault fault = {""};
        size_t n = 77;
        cr_assert_eq(parse(cases[i].line, arguments, &n, &fault), -EINVAL, "%s", cases[i].line);
        cr_assert_not_null(strstr(fault.text, cases[i].sentence), "%s: %s", cases[i].line,
                           fault.text);
        cr_assert_eq(n, 77);
    }
}

Test(options, an_option_is_not_repeated_for_ever)
{
    const char *arguments[2];
    struct fault fault = {""};
    char *argv[2 * OPTION_LIST_MAX + 2], name[] = "--list", value[] = "x";
    size_t n;
    for (size_t i = 0; i < ELEMENTSOF(argv); i += 2) {
        argv[i] = name;
        argv[i + 1] = value;
    }
    v = (struct values){0};
    cr_assert_eq(options_parse(options, ELEMENTSOF(options), ELEMENTSOF(argv), argv, arguments, 2,
                               &n, &fault),
                 -EINVAL);
    cr_assert_not_null(strstr(fault.text, "more than 64 times"), "%s", fault.text);
}

Test(options, durations_have_units)
{
    static const struct {
        const char *text;
        uint64_t us;
    } cases[] = {{"50us", 50},         {"5ms", 5000},      {"2s", 2000000},
                 {"1.5s", 1500000},    {"1min", 60000000}, {"1h", 3600000000},
                 {"0.5h", 1800000000}, {"0s", 0},          {".5s", 500000}};
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        uint64_t us = 1;
        cr_assert_eq(duration_parse(cases[i].text, &us), 0, "%s", cases[i].text);
        cr_assert_eq(us, cases[i].us, "%s", cases[i].text);
    }
}
