/* Log: one sentence with fields, to the journal under systemd and to stderr otherwise.
 *
 * Hides which of the two it is ($JOURNAL_STREAM decides at log_open()), and drops what is below the
 * level. Never gets prompt or answer text. Thread: any; a line is written in one call. */
#ifndef HEARTH_DAEMON_LOG_H
#define HEARTH_DAEMON_LOG_H

#include <syslog.h>

/* Optional fields of a line; zero means absent. Journal names HEARTH_MODEL, HEARTH_UID,
 * HEARTH_CODE, HEARTH_CONNECTION. */
struct log_fields {
    const char *model;
    const char *code;
    unsigned long connection;
    long uid;
    int has_uid;
};

void log_open(int max_level);
__attribute__((format(printf, 3, 4))) void log_write(int level, const struct log_fields *fields,
                                                     const char *format, ...);

#define log_error(...)   log_write(LOG_ERR, NULL, __VA_ARGS__)
#define log_warning(...) log_write(LOG_WARNING, NULL, __VA_ARGS__)
#define log_info(...)    log_write(LOG_INFO, NULL, __VA_ARGS__)

#endif
