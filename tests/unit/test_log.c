#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/log.h"

static FILE *caught;

/* What goes to stderr goes to a file from here on. */
static void catch_stderr(void)
{
    unsetenv("JOURNAL_STREAM");
    caught = tmpfile();
    cr_assert_not_null(caught);
    cr_assert_eq(dup2(fileno(caught), STDERR_FILENO), STDERR_FILENO);
}

static char *written(void)
{
    static char text[1 << 20];
    rewind(caught);
    text[fread(text, 1, sizeof(text) - 1, caught)] = '\0';
    return text;
}

Test(log, writes_a_sentence_a_line_to_stderr, .init = catch_stderr)
{
    log_open(LOG_INFO);
    log_info("model %s is ready after %d ms", "ember", 12);
    log_error("second");
    cr_expect_str_eq(written(), "hearthd: model ember is ready after 12 ms\nhearthd: second\n");
}

Test(log, drops_what_is_below_its_level, .init = catch_stderr)
{
    log_open(LOG_WARNING);
    log_write(LOG_DEBUG, NULL, "no");
    log_info("no");
    log_warning("yes");
    cr_expect_str_eq(written(), "hearthd: yes\n");
}

Test(log, keeps_hostile_names_on_one_line, .init = catch_stderr)
{
    log_open(LOG_INFO);
    log_info("%s is no model", "a\nhearthd: forged\r\x1b[2J\x7f");
    cr_expect_str_eq(written(), "hearthd: a hearthd: forged  [2J  is no model\n");
}

Test(log, cuts_a_long_sentence, .init = catch_stderr)
{
    char long_text[5000];
    memset(long_text, 'x', sizeof(long_text) - 1);
    long_text[sizeof(long_text) - 1] = '\0';
    log_open(LOG_INFO);
    log_info("%s", long_text);
    char *text = written();
    cr_expect_eq(strlen(text), strlen("hearthd: ") + 1023 + 1);
    cr_expect_eq(text[strlen(text) - 1], '\n');
}

Test(log, leaves_errno_as_it_was, .init = catch_stderr)
{
    log_open(LOG_INFO);
    errno = EBADF;
    log_info("%m"); /* and it can still be told */
    cr_expect_eq(errno, EBADF);
    cr_expect_str_eq(written(), "hearthd: Bad file descriptor\n");
}

Test(log, takes_stderr_for_the_journal_only_where_device_and_inode_say_so, .init = catch_stderr)
{
    static const char *const others[] = {"", "1:2", "x", "18446744073709551616:1", "7", "7:"};
    for (size_t i = 0; i < sizeof(others) / sizeof(*others); i++) {
        setenv("JOURNAL_STREAM", others[i], 1);
        log_open(LOG_INFO);
        log_info("plain");
    }
    cr_expect_str_eq(written(), "hearthd: plain\nhearthd: plain\nhearthd: plain\n"
                                "hearthd: plain\nhearthd: plain\nhearthd: plain\n");
}

Test(log, writes_nothing_to_stderr_when_it_is_the_journal, .init = catch_stderr)
{
    struct stat st;
    char stream[64];
    cr_assert_eq(fstat(STDERR_FILENO, &st), 0);
    snprintf(stream, sizeof(stream), "%ju:%ju", (uintmax_t)st.st_dev, (uintmax_t)st.st_ino);
    setenv("JOURNAL_STREAM", stream, 1);
    log_open(LOG_INFO);
    log_write(
        LOG_INFO,
        &(struct log_fields){.model = "m", .code = "busy", .connection = 3, .uid = 0, .has_uid = 1},
        "to the journal, where there is one");
    cr_expect_str_eq(written(), "");
}

#define LINES 500

static void *write_lines(void *arg)
{
    for (int i = 0; i < LINES; i++)
        log_info("%s", (const char *)arg);
    return NULL;
}

Test(log, does_not_mix_the_lines_of_two_threads, .init = catch_stderr)
{
    static char a_line[] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    static char b_line[] = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
    pthread_t a, b;
    int lines = 0;
    fcntl(STDERR_FILENO, F_SETFL, O_APPEND);
    log_open(LOG_INFO);
    cr_assert_eq(pthread_create(&a, NULL, write_lines, a_line), 0);
    cr_assert_eq(pthread_create(&b, NULL, write_lines, b_line), 0);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    for (char *rest = written(), *line; (line = strsep(&rest, "\n")) && *line; lines++) {
        size_t start = strlen("hearthd: ");
        cr_assert_eq(strlen(line), start + 30);
        cr_assert_eq(strspn(line + start, (char[]){line[start], '\0'}), 30);
    }
    cr_expect_eq(lines, 2 * LINES);
}
