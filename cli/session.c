/* One connection of a command, and Ctrl-C: the first cancels in the daemon, the second kills. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "lib/clock.h"

/* How long a cancelled request's end is waited for. */
#define CANCEL_WAIT_US 2000000u
/* A look at the state is quick or it is news in itself; the other socket may have to start it. */
#define STATUS_TIMEOUT_US 2000000u
/* A daemon that is about to exit says goaway; the next connection starts a new one. */
#define CONNECT_ATTEMPTS 3
#define STDIN_MAX_BYTES  (64u << 20)

static volatile sig_atomic_t interrupted;
static int wake_pipe[2] = {-1, -1};

static void on_interrupt(int signal_number)
{
    int saved = errno;
    (void)signal_number;
    interrupted = 1;
    ssize_t n = write(wake_pipe[1], "", 1);
    (void)n; /* full: it is awake already */
    errno = saved;
}

/* SIGINT writes to a pipe that the loop polls, so that none is missed between a look and a wait. */
static void catch_interrupts(void)
{
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    if (wake_pipe[0] >= 0 || pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK) < 0)
        return;
    sigaction(SIGINT, &action, NULL);
}

bool cli_interrupted(void)
{
    return interrupted;
}

bool cli_no_daemon(int error)
{
    return error == -ENOENT || error == -ECONNREFUSED;
}

int cli_connect(const struct cli *cli, bool status_socket, struct hearth **ret_hearth,
                char message[HEARTH_MESSAGE_BYTES])
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    options.socket_path = cli->socket;
    options.status_socket = status_socket;
    options.client_name = "hearth";
    options.connect_timeout_us = status_socket ? STATUS_TIMEOUT_US : 0;
    catch_interrupts();
    int r = -ESHUTDOWN;
    for (int i = 0; i < CONNECT_ATTEMPTS && r == -ESHUTDOWN; i++)
        r = hearth_connect(&options, ret_hearth, message);
    return r;
}

int cli_open(const struct cli *cli, bool status_socket, struct hearth **ret_hearth)
{
    char message[HEARTH_MESSAGE_BYTES] = "";
    int r = cli_connect(cli, status_socket, ret_hearth, message);
    if (r >= 0)
        return CLI_DONE;
    if (interrupted)
        return CLI_INTERRUPTED;
    cli_error("%s", message);
    return cli_no_daemon(r) ? CLI_NO_DAEMON : CLI_FAILED;
}

void cli_note_end(struct cli_end *end, const struct hearth_reply *reply)
{
    if (reply->kind != HEARTH_DONE && reply->kind != HEARTH_ERROR)
        return;
    end->ended = true;
    end->failed = reply->kind == HEARTH_ERROR;
    if (!end->failed)
        return;
    snprintf(end->code, sizeof(end->code), "%s", reply->code);
    if (reply->retry_after_us)
        snprintf(end->sentence, sizeof(end->sentence), "%.240s (try again in %.3g s)",
                 reply->sentence, (double)reply->retry_after_us / 1e6);
    else
        snprintf(end->sentence, sizeof(end->sentence), "%s", reply->sentence);
}

int cli_report(const struct cli_end *end)
{
    if (end->ended && !end->failed)
        return CLI_DONE;
    return cli_error("%s", end->ended ? end->sentence : "the request has no end: try again");
}

int cli_refused(const struct hearth *h, int error)
{
    const char *message = hearth_message(h);
    if (error == -EINVAL)
        return cli_usage("%s", *message ? message : strerror(-error));
    return cli_error("%s", *message ? message : strerror(-error));
}

uint64_t cli_now_us(void)
{
    return clock_monotonic_us(NULL);
}

/* Waits for the daemon, for input or for Ctrl-C; false once `deadline_us` has passed. */
static bool wait_for_news(struct hearth *h, struct cli_input *input, uint64_t deadline_us)
{
    struct pollfd fds[] = {
        {.fd = hearth_fd(h), .events = hearth_events(h)},
        /* Once it has woken us it would do so for ever. */
        {.fd = interrupted ? -1 : wake_pipe[0], .events = POLLIN},
        {.fd = input && !interrupted ? input->fd : -1, .events = POLLIN},
    };
    int timeout_ms = -1;
    if (deadline_us != UINT64_MAX) {
        uint64_t now = cli_now_us();
        if (now >= deadline_us)
            return false;
        timeout_ms = (int)((deadline_us - now + 999) / 1000);
    }
    if (poll(fds, ELEMENTSOF(fds), timeout_ms) > 0 && fds[2].revents && !interrupted)
        input->ready(input);
    return true;
}

int cli_run_input(struct hearth *h, const uint64_t *ids, size_t n, struct cli_input *input)
{
    uint64_t deadline_us = UINT64_MAX;
    bool cancelled = false;
    while (hearth_in_flight(h) > 0 || (input && input->fd >= 0 && !interrupted)) {
        if (interrupted && !cancelled) {
            for (size_t i = 0; i < n; i++)
                hearth_cancel(h, ids[i]);
            cancelled = true;
            deadline_us = cli_now_us() + CANCEL_WAIT_US;
        }
        if (!wait_for_news(h, input, deadline_us))
            break;
        if (hearth_dispatch(h) < 0)
            return interrupted ? CLI_INTERRUPTED : CLI_FAILED;
    }
    return interrupted ? CLI_INTERRUPTED : CLI_DONE;
}

int cli_run(struct hearth *h, const uint64_t *ids, size_t n)
{
    return cli_run_input(h, ids, n, NULL);
}

void cli_on_end(void *userdata, const struct hearth_reply *reply)
{
    cli_note_end(userdata, reply);
}

int cli_finish(struct hearth *h, int r, uint64_t id, const struct cli_end *end)
{
    if (r < 0)
        return cli_refused(h, r);
    int exit_code = cli_run(h, &id, 1);
    return exit_code == CLI_INTERRUPTED ? exit_code : cli_report(end);
}

/* ---- the same of several models ---- */

static int each(struct cli *cli, bool status_socket, const char *const *names, size_t n,
                cli_ask_fn ask, const void *userdata)
{
    struct cli_end ends[CLI_MAX_MODELS] = {{0}};
    uint64_t ids[CLI_MAX_MODELS];
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int exit_code = cli_open(cli, status_socket, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    for (size_t i = 0; i < n; i++) {
        int r = ask(h, names[i], userdata, cli_on_end, &ends[i], &ids[i]);
        if (r < 0)
            return cli_refused(h, r);
    }
    exit_code = cli_run(h, ids, n);
    for (size_t i = 0; i < n && exit_code != CLI_INTERRUPTED; i++)
        if (cli_report(&ends[i]) != CLI_DONE)
            exit_code = CLI_FAILED;
    return exit_code;
}

int cli_each_model(struct cli *cli, bool status_socket, const char *const *names, size_t n,
                   cli_ask_fn ask, const void *userdata)
{
    for (size_t i = 0; i < n; i++) {
        int exit_code = cli_check_model(names[i]);
        if (exit_code != CLI_DONE)
            return exit_code;
    }
    return each(cli, status_socket, names, n, ask, userdata);
}

/* ---- arguments ---- */

int cli_check_model(const char *name)
{
    if (hearth_model_name_valid(name))
        return CLI_DONE;
    if (strchr(name, '/'))
        return cli_error(
            "'%.128s' is a file, and only 'hearth run' takes one: put it into a models directory "
            "of the daemon and give its name without .gguf",
            name);
    return cli_error("'%.128s' is no model's name: letters, digits and . _ - make one, at most 128 "
                     "('hearth models' lists them)",
                     name);
}

/* A read that Ctrl-C ends, also one that came just before it. */
static ssize_t read_some(int fd, char *text, size_t size)
{
    struct pollfd fds[] = {
        {.fd = fd, .events = POLLIN},
        {.fd = wake_pipe[0], .events = POLLIN},
    };
    poll(fds, ELEMENTSOF(fds), -1);
    if (interrupted) {
        errno = EINTR;
        return -1;
    }
    return read(fd, text, size);
}

static int read_all(int fd, char **ret_text, size_t *ret_len)
{
    _cleanup_free_ char *text = NULL;
    size_t len = 0, capacity = 0;
    for (;;) {
        if (len == capacity) {
            if (capacity >= STDIN_MAX_BYTES)
                return -EFBIG;
            capacity = capacity ? capacity * 2 : 4096;
            char *larger = realloc(text, capacity + 1);
            if (!larger)
                return -ENOMEM;
            text = larger;
        }
        ssize_t n = read_some(fd, text + len, capacity - len);
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        len += (size_t)n;
    }
    text[len] = '\0';
    *ret_text = TAKE_PTR(text);
    *ret_len = len;
    return 0;
}

int cli_read_stdin(char **ret_text, size_t *ret_len)
{
    catch_interrupts();
    if (isatty(STDIN_FILENO) && isatty(STDERR_FILENO))
        fprintf(stderr, "hearth: reading the text from the terminal; Ctrl-D ends it\n");
    int r = read_all(STDIN_FILENO, ret_text, ret_len);
    if (interrupted)
        return CLI_INTERRUPTED;
    if (r == -EFBIG)
        return cli_error("the text on standard input is longer than 64 MiB: shorten it");
    return r < 0 ? cli_error("cannot read standard input: %s", strerror(-r)) : CLI_DONE;
}
