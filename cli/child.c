#include "cli/child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli/cli.h"
#include "lib/cleanup.h"

/* What execvp() that failed exits with. */
#define NO_PROGRAM 127
/* Looks for a process's end, 10 ms apart, before it is killed and after. */
#define REAP_LOOKS 100

/* Reads what there is, keeps what fits: false at the end. */
static bool drain(int fd, char *text, size_t *len)
{
    char more[4096];
    ssize_t n = read(fd, more, sizeof(more));
    if (n <= 0)
        return n < 0 && errno == EINTR;
    size_t room = CHILD_TEXT_BYTES - 1 - *len, kept = MIN((size_t)n, room);
    memcpy(text + *len, more, kept);
    *len += kept;
    text[*len] = '\0';
    return true;
}

/* Until both streams have ended: 0, or -ETIMEDOUT. */
static int collect(int out, int err, uint64_t timeout_us, struct child_result *result)
{
    uint64_t deadline_us = cli_now_us() + timeout_us;
    struct pollfd fds[] = {{.fd = out, .events = POLLIN}, {.fd = err, .events = POLLIN}};
    char *texts[] = {result->out, result->err};
    size_t lens[] = {0, 0};
    while (fds[0].fd >= 0 || fds[1].fd >= 0) {
        uint64_t now = cli_now_us();
        if (now >= deadline_us)
            return -ETIMEDOUT;
        poll(fds, ELEMENTSOF(fds), (int)((deadline_us - now + 999) / 1000));
        for (size_t i = 0; i < ELEMENTSOF(fds); i++)
            if (fds[i].fd >= 0 && fds[i].revents && !drain(fds[i].fd, texts[i], &lens[i]))
                fds[i].fd = -1;
    }
    return 0;
}

/* Waits briefly for its end, which a closed stream announces; one that is late, or goes on without
 * its streams, is killed. */
static int reap(pid_t pid, int r, struct child_result *result)
{
    const struct timespec pause = {.tv_nsec = 10000000};
    int status = 0;
    bool ended = false;
    for (int i = 0; i < 2 * REAP_LOOKS && !ended; i++) {
        if ((r < 0 && i == 0) || i == REAP_LOOKS) {
            kill(pid, SIGKILL);
            r = -ETIMEDOUT;
        }
        ended = waitpid(pid, &status, WNOHANG) == pid;
        if (!ended)
            nanosleep(&pause, NULL);
    }
    result->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return r;
}

struct program {
    const char *const *argv;
};

static int execute(int fd, const void *userdata)
{
    const struct program *program = userdata;
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0)
        dup2(null, STDIN_FILENO);
    dup2(fd, STDOUT_FILENO);
    execvp(program->argv[0], (char *const *)program->argv); /* which it does not change */
    return NO_PROGRAM;
}

int child_call(int (*fn)(int fd, const void *userdata), const void *userdata, uint64_t timeout_us,
               struct child_result *ret_result)
{
    int out[2], err[2];
    memset(ret_result, 0, sizeof(*ret_result));
    if (pipe2(out, O_CLOEXEC) < 0)
        return -errno;
    if (pipe2(err, O_CLOEXEC) < 0) {
        int error = errno;
        close(out[0]);
        close(out[1]);
        return -error;
    }
    fflush(NULL);
    pid_t pid = fork();
    int r = pid < 0 ? -errno : 0;
    if (pid == 0) {
        dup2(err[1], STDERR_FILENO);
        _exit(fn(out[1], userdata));
    }
    close(out[1]);
    close(err[1]);
    if (r == 0)
        r = reap(pid, collect(out[0], err[0], timeout_us, ret_result), ret_result);
    close(out[0]);
    close(err[0]);
    return r;
}

int child_run(const char *const argv[], uint64_t timeout_us, struct child_result *ret_result)
{
    struct program program = {argv};
    int r = child_call(execute, &program, timeout_us, ret_result);
    return r == 0 && ret_result->status == NO_PROGRAM ? -ENOENT : r;
}
