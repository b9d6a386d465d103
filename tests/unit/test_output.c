/* What the command line prints: text that cannot drive a terminal, exact bytes, JSON. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "cli/output.h"
#include "lib/cleanup.h"

Test(output, controls_are_shown_and_text_is_left_alone)
{
    static const struct {
        const char *text, *shown;
    } cases[] = {
        {"plain\ttext\n", "plain\ttext\n"},
        {"gr\xc3\xbc\xc3\x9f \xe2\x82\xac \xf0\x9f\x98\x80",
         "gr\xc3\xbc\xc3\x9f \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"\033[31mred", "\\x1b[31mred"},
        {"a\rb\bc\x7f", "a\\x0db\\x08c\\x7f"},
        {"\xc2\x9b"
         "31m",
         "\\xc2\\x9b"
         "31m"},                  /* CSI in one character */
        {"\xc2\xa0", "\xc2\xa0"}, /* the first that is no control */
        {"\x9b"
         "31m",
         "\\x9b"
         "31m"}, /* and in one byte */
        {"\xff\xfe", "\\xff\\xfe"},
        {"\xc3", "\\xc3"}, /* cut */
        {"\xe2\x82", "\\xe2\\x82"},
        {"\xe2"
         "a",
         "\\xe2"
         "a"},
        {"", ""},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        _cleanup_free_ char *shown = text_escape(cases[i].text, strlen(cases[i].text), true);
        cr_assert_str_eq(shown, cases[i].shown, "case %zu: %s", i, shown);
    }
    _cleanup_free_ char *line = text_escape("a\nb\0c", 5, false);
    cr_assert_str_eq(line, "a\\x0ab\\x00c");
}

/* Writes the text in pieces of `step` bytes to a pipe and reads back what came out. */
static size_t through(const char *text, size_t len, size_t step, bool escape, char *ret,
                      size_t size)
{
    int fds[2];
    cr_assert_eq(pipe(fds), 0);
    struct text_out out = {.fd = fds[1], .escape = escape};
    for (size_t at = 0; at < len; at += step)
        cr_assert_eq(text_out_write(&out, text + at, MIN(step, len - at)), 0);
    cr_assert_eq(text_out_end(&out), 0);
    close(fds[1]);
    ssize_t n = read(fds[0], ret, size - 1);
    close(fds[0]);
    cr_assert_geq(n, 0);
    ret[n] = '\0';
    return (size_t)n;
}

Test(output, pieces_give_the_same_as_the_whole_however_they_are_cut)
{
    static const char text[] = "a\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80\033\xed\x9f\xbf\xed\xa0\x80"
                               "\xf4\x8f\xbf\xbf\xf4\x90\xe0\x9f\xf0\x8f\xc2\x9b\xee\x80\x80\xe2";
    _cleanup_free_ char *whole = text_escape(text, sizeof(text) - 1, true);
    for (size_t step = 1; step < sizeof(text); step++) {
        char got[512];
        through(text, sizeof(text) - 1, step, true, got, sizeof(got));
        cr_assert_str_eq(got, whole, "in pieces of %zu: %s, not %s", step, got, whole);
    }
}

Test(output, a_pipe_gets_the_bytes_as_they_are)
{
    static const char text[] = "\033[0m\0\xff\xc3";
    char got[64];
    cr_assert_eq(through(text, sizeof(text) - 1, 2, false, got, sizeof(got)), sizeof(text) - 1);
    cr_assert_arr_eq(got, text, sizeof(text) - 1);
}

Test(output, a_full_device_is_told)
{
    int fd = open("/dev/full", O_WRONLY);
    if (fd < 0)
        cr_skip_test("no /dev/full");
    struct text_out out = {.fd = fd};
    cr_assert_eq(text_out_write(&out, "x", 1), -ENOSPC);
    close(fd);
}

Test(output, bytes_that_are_no_utf8_are_replaced_in_json)
{
    size_t len;
    _cleanup_free_ char *utf8 = text_to_utf8("a\xff"
                                             "b\xc3\xbc\xe2\x82",
                                             7, &len);
    cr_assert_str_eq(utf8, "a\xef\xbf\xbd"
                           "b\xc3\xbc\xef\xbf\xbd\xef\xbf\xbd");
    json_t *json = json_text("\xff\033");
    _cleanup_free_ char *dumped = json_dumps(json, JSON_ENCODE_ANY);
    cr_assert_str_eq(dumped, "\"\xef\xbf\xbd\\u001B\"");
    json_decref(json);
}

Test(output, flat_lines_become_an_object)
{
    json_t *json = json_flat("steps 12\nratio 0.5\nname a b c\nneg -3\nempty\nversion 0.1.0\n\n"
                             "huge 99999999999999999999\nid 7x\nlast 1");
    _cleanup_free_ char *dumped = json_dumps(json, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(3));
    cr_assert_str_eq(dumped,
                     "{\"steps\": 12, \"ratio\": 0.5, \"name\": \"a b c\", \"neg\": -3, "
                     "\"empty\": \"\", \"version\": \"0.1.0\", \"huge\": 1e20, "
                     "\"id\": \"7x\", \"last\": 1}",
                     "%s", dumped);
    json_decref(json);
    json = json_flat(NULL);
    cr_assert_eq(json_object_size(json), 0);
    json_decref(json);
}

Test(output, sizes_are_short_and_without_blanks)
{
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {
        {0, "0B"},        {999, "999B"},       {1000, "1.0KiB"},       {1024, "1.0KiB"},
        {10240, "10KiB"}, {1150464, "1.1MiB"}, {1181116006, "1.1GiB"}, {UINT64_MAX, "16EiB"}};
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        char text[SIZE_TEXT_BYTES];
        cr_assert_str_eq(size_text(cases[i].bytes, text), cases[i].text);
    }
}
