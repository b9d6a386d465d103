#include "daemon/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <systemd/sd-journal.h>
#include <unistd.h>

#define LOG_PROGRAM     "hearthd"
#define LOG_LINE_BYTES  1024 /* longer sentences are cut */
#define LOG_FIELD_BYTES 160  /* a model's name and the field's own */
#define LOG_MAX_FIELDS  7

/* Written by log_open() alone, before there is a second thread. */
static int log_level = LOG_INFO;
static bool log_to_journal;

/* systemd gives device and inode of the journal's stream; stderr may have been redirected since. */
static bool stderr_is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    uintmax_t dev, inode;
    struct stat st;
    if (!stream || sscanf(stream, "%" SCNuMAX ":%" SCNuMAX, &dev, &inode) != 2)
        return false;
    return fstat(STDERR_FILENO, &st) == 0 && st.st_dev == dev && st.st_ino == inode;
}

void log_open(int max_level)
{
    log_level = max_level;
    log_to_journal = stderr_is_journal();
}

/* Names of files and models reach the log: whatever they contain, one call stays one line. */
static void flatten(char *text)
{
    for (unsigned char *p = (unsigned char *)text; *p; p++)
        if (*p < 0x20 || *p == 0x7f)
            *p = ' ';
}

struct line {
    struct iovec iov[LOG_MAX_FIELDS];
    int n;
    char text[LOG_MAX_FIELDS - 1][LOG_FIELD_BYTES];
};

__attribute__((format(printf, 2, 3))) static void add_field(struct line *line, const char *format,
                                                            ...)
{
    char *text = line->text[line->n - 1]; /* the first iovec is the message's own */
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, LOG_FIELD_BYTES, format, ap);
    va_end(ap);
    line->iov[line->n++] = (struct iovec){.iov_base = text, .iov_len = strlen(text)};
}

static void write_journal(int level, const struct log_fields *fields, char *message)
{
    struct line line = {.n = 1};
    line.iov[0] = (struct iovec){.iov_base = message, .iov_len = strlen(message)};
    add_field(&line, "PRIORITY=%d", level);
    add_field(&line, "SYSLOG_IDENTIFIER=%s", LOG_PROGRAM);
    if (fields && fields->model)
        add_field(&line, "HEARTH_MODEL=%s", fields->model);
    if (fields && fields->code)
        add_field(&line, "HEARTH_CODE=%s", fields->code);
    if (fields && fields->connection)
        add_field(&line, "HEARTH_CONNECTION=%lu", fields->connection);
    if (fields && fields->has_uid)
        add_field(&line, "HEARTH_UID=%ld", fields->uid);
    sd_journal_sendv(line.iov, line.n);
}

static void write_stderr(const char *sentence)
{
    char line[LOG_LINE_BYTES + sizeof(LOG_PROGRAM ": \n")];
    int n = snprintf(line, sizeof(line), LOG_PROGRAM ": %s\n", sentence);
    /* One write, so that lines of several threads do not mix; a broken stderr has no remedy. */
    if (n > 0)
        (void)!write(STDERR_FILENO, line, (size_t)n);
}

void log_write(int level, const struct log_fields *fields, const char *format, ...)
{
    static const char key[] = "MESSAGE=";
    char message[sizeof(key) + LOG_LINE_BYTES];
    char *sentence = message + sizeof(key) - 1;
    int saved = errno;
    if (level > log_level)
        return;
    memcpy(message, key, sizeof(key));
    va_list ap;
    va_start(ap, format);
    vsnprintf(sentence, LOG_LINE_BYTES, format, ap);
    va_end(ap);
    flatten(sentence);
    if (log_to_journal)
        write_journal(level, fields, message);
    else
        write_stderr(sentence);
    errno = saved;
}
