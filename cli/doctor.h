/* What `hearth doctor` looks at, and what it has to say of it.
 *
 * A check looks at one thing and adds findings: how bad, what about, a sentence, and what to do.
 * Nothing is changed and nothing is started. What is read of the machine lies under `root`, so that
 * a test can show a machine that is not there. Hides where the kernel, systemd and hearthd say what
 * they say. Thread: one. */
#ifndef HEARTH_CLI_DOCTOR_H
#define HEARTH_CLI_DOCTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/hearth.h"

enum doctor_level { DOCTOR_OK, DOCTOR_WARNING, DOCTOR_PROBLEM };
/* ok, warning, problem */
const char *doctor_level_word(enum doctor_level level);

#define DOCTOR_MAX_FINDINGS 256u
#define DOCTOR_MAX_GROUPS   256

struct doctor_finding {
    enum doctor_level level;
    const char *area; /* a word */
    char text[480];   /* a sentence without its stop */
    char remedy[240]; /* what to do; empty where nothing is to be done */
};

/* Who asks: may it open the socket? */
struct doctor_caller {
    uid_t uid;
    gid_t groups[DOCTOR_MAX_GROUPS];
    int n_groups;
};

struct doctor {
    const char *root; /* "" or a folder that stands for / */
    struct doctor_finding findings[DOCTOR_MAX_FINDINGS];
    size_t n;
    struct doctor_caller caller;
    char socket[HEARTH_PATH_BYTES], status_socket[HEARTH_PATH_BYTES];
    bool named;          /* the socket was named: it is nobody's default */
    const char *hearthd; /* the program that checks the configuration; NULL: looked for */

    /* of the daemon, where one runs */
    bool running;
    pid_t pid;
    uid_t uid;
    char version[32];
    char *status; /* flat lines */

    char *check;      /* flat lines of `hearthd --check`, or NULL */
    char subject[16]; /* whose limits count, under /proc: its pid, or "self" */
};

/* Adds a finding; more than DOCTOR_MAX_FINDINGS are dropped. `remedy` may be NULL. */
__attribute__((format(printf, 5, 6))) void doctor_find(struct doctor *d, enum doctor_level level,
                                                       const char *area, const char *remedy,
                                                       const char *format, ...);
size_t doctor_count(const struct doctor *d, enum doctor_level level);

/* Reads a file below root (at most 1 MiB; malloc'd and terminated), NULL where it cannot. ret_len
 * may be NULL. */
char *doctor_read_bytes(const struct doctor *d, const char *path, size_t *ret_len);
static inline char *doctor_read(const struct doctor *d, const char *path)
{
    return doctor_read_bytes(d, path, NULL);
}
/* Writes the real path of one below root. */
#define DOCTOR_PATH_BYTES 4608
const char *doctor_path(const struct doctor *d, const char *path, char ret[DOCTOR_PATH_BYTES]);
/* The text behind `key` in flat lines, copied and cut to `size`: false where there is none. `nth`
 * of those with the same key, from 0. */
bool doctor_text(const char *lines, const char *key, size_t nth, char *ret, size_t size);
/* The same as a number; `missing` where there is none. */
uint64_t doctor_number(const char *lines, const char *key, uint64_t missing);
bool doctor_is_system(const struct doctor *d); /* the socket of the system's daemon */

/* Checks, in the order in which they are made. Those of the service find out what the others need.
 */
void doctor_daemon(struct doctor *d);
void doctor_socket(struct doctor *d);
void doctor_systemd(struct doctor *d);
void doctor_config(struct doctor *d);
void doctor_models(struct doctor *d);
void doctor_cpu(struct doctor *d);
void doctor_memory(struct doctor *d);
void doctor_descriptors(struct doctor *d);
void doctor_fuse(struct doctor *d);

#endif
