/* A program run to its end with what it writes kept: for commands that ask others.
 *
 * Bounded in time and in what is kept; a program that takes too long is killed. Hides pipes and
 * processes. Thread: one. */
#ifndef HEARTH_CLI_CHILD_H
#define HEARTH_CLI_CHILD_H

#include <stddef.h>
#include <stdint.h>

/* What is kept of each stream; the rest is read and dropped. */
#define CHILD_TEXT_BYTES 65536u

struct child_result {
    int status; /* exit status; 128 + signal */
    char out[CHILD_TEXT_BYTES];
    char err[CHILD_TEXT_BYTES];
};

/* Runs argv[0], argv ended by NULL (looked for in $PATH where it has no slash) with an empty stdin.
 * 0 with the result, -ENOENT where there is no such program, -ETIMEDOUT, or another negative errno.
 */
int child_run(const char *const argv[], uint64_t timeout_us, struct child_result *ret_result);
/* Runs the function in a process of its own, for what may hang in the kernel: 0 and its return
 * value as `status`, what it wrote to `fd` as `out`. One that cannot be killed is left behind. */
int child_call(int (*fn)(int fd, const void *userdata), const void *userdata, uint64_t timeout_us,
               struct child_result *ret_result);

#endif
