/* hearth top: the daemon's figures, live on a terminal, line by line elsewhere. */
#include "cli/top.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "cli/terminal.h"
#include "lib/cleanup.h"

#define DEFAULT_INTERVAL_US 1000000u
#define LEAST_INTERVAL_US   100000u
/* The first picture has no rates: the second comes soon. */
#define FIRST_INTERVAL_US 300000u
/* A daemon that owes an answer for so long is called unresponsive. */
#define ANSWER_LIMIT_US 1000000u
/* A heading every so many lines. */
#define HEADING_EVERY 20u

struct top {
    struct cli *cli;
    struct hearth *h;
    struct terminal terminal;
    bool live, once;
    uint64_t interval_us;
    char socket[HEARTH_PATH_BYTES];
    struct top_sample samples[2]; /* by turns */
    size_t latest;                /* the one that is whole, where n_samples > 0 */
    uint64_t n_samples;
    bool asking;
    uint64_t asked_us, due_us;
    bool told_late;
    struct cli_end end; /* a refusal, where there was one */
    uint64_t n_lines;
    bool over;
    int exit_code;
    const char *why; /* said once the terminal is given back; NULL: nothing, or what is known */
};

static void finish(struct top *top, int exit_code)
{
    top->over = true;
    top->exit_code = exit_code;
}

static void fail(struct top *top, const char *why)
{
    top->why = why;
    finish(top, CLI_FAILED);
}

/* ---- what is shown ---- */

static const struct top_sample *earlier(const struct top *top)
{
    return top->n_samples > 1 ? &top->samples[1 - top->latest] : NULL;
}

static bool late(const struct top *top)
{
    return top->asking && cli_now_us() - top->asked_us >= ANSWER_LIMIT_US;
}

static void draw(struct top *top, const struct top_figures *f)
{
    size_t columns, rows, len = 0;
    char *text = NULL;
    FILE *picture = terminal_begin(&text, &len);
    if (!picture)
        return;
    terminal_size(&columns, &rows);
    top_draw(f, late(top) ? "unresponsive" : f->sample->state, top->socket, columns, rows,
             TERMINAL_LINE_END, picture);
    if (terminal_show(picture, &text, &len) < 0)
        finish(top, CLI_FAILED); /* the terminal is gone */
}

static int print_json(const struct top_figures *f)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    json_t *json = top_json(f, (uint64_t)now.tv_sec * 1000u + (uint64_t)now.tv_nsec / 1000000u);
    int r = json ? json_dumpf(json, stdout, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9)) : -1;
    json_decref(json);
    if (r == 0)
        putchar('\n');
    return r;
}

static void print(struct top *top, const struct top_figures *f)
{
    int r = 0;
    if (top->cli->json) {
        r = print_json(f);
    } else if (top->once) {
        top_draw(f, f->sample->state, top->socket, SIZE_MAX, SIZE_MAX, "\n", stdout);
        putchar('\n');
    } else {
        if (top->n_lines++ % HEADING_EVERY == 0)
            top_print_heading(stdout);
        top_print_line(f, stdout);
    }
    if (r < 0)
        fail(top, "no memory for the figures");
    else if (!cli_flush())
        finish(top, CLI_FAILED);
    else if (top->once)
        finish(top, CLI_DONE);
}

/* Lines say what happened since the last one, so the first sample makes none. */
static void show(struct top *top)
{
    struct top_figures f;
    if (top->n_samples == 0 || (!top->live && top->n_samples == 1))
        return;
    if (top_figures_make(earlier(top), &top->samples[top->latest], &f) < 0) {
        fail(top, "no memory for the figures");
        return;
    }
    if (top->live)
        draw(top, &f);
    else
        print(top, &f);
    top_figures_done(&f);
}

/* ---- samples ---- */

static struct top_sample *next_sample(struct top *top)
{
    return &top->samples[top->n_samples ? 1 - top->latest : 0];
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct top *top = userdata;
    top_sample_add(next_sample(top), reply);
    if (reply->kind == HEARTH_ERROR && !reply->lost)
        cli_note_end(&top->end, reply);
}

static void ask(struct top *top)
{
    top_sample_done(next_sample(top));
    top->asked_us = cli_now_us();
    int r = hearth_status(top->h, on_reply, top, NULL);
    if (r == 0)
        r = hearth_metrics(top->h, NULL, on_reply, top, NULL);
    if (r == 0)
        r = hearth_models(top->h, NULL, on_reply, top, NULL);
    top->asking = true;
    top->told_late = false;
    if (r == -ESHUTDOWN)
        finish(top, CLI_NO_DAEMON);
    else if (r < 0)
        finish(top, CLI_FAILED);
}

static void take_sample(struct top *top)
{
    struct top_sample *sample = next_sample(top);
    top->asking = false;
    if (sample->no_memory)
        fail(top, "no memory for what the daemon says");
    else if (top->end.failed)
        finish(top, CLI_FAILED); /* its sentence comes at the end */
    if (top->over)
        return;
    sample->at_us = cli_now_us();
    top->latest = (size_t)(sample - top->samples);
    top->n_samples++;
    uint64_t pause = top->live && top->n_samples == 1 ? FIRST_INTERVAL_US : top->interval_us;
    top->due_us = top->asked_us + MIN(pause, top->interval_us);
    show(top);
}

/* ---- the loop ---- */

static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGWINCH, SIGTSTP};

static int open_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < ELEMENTSOF(signals); i++)
        sigaddset(&set, signals[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* As the signal would have ended it, but with the terminal given back. */
static void die_of(struct top *top, int number)
{
    sigset_t set;
    terminal_leave(&top->terminal);
    cli_flush();
    signal(number, SIG_DFL);
    sigemptyset(&set);
    sigaddset(&set, number);
    raise(number);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
}

static void on_signal(struct top *top, int fd)
{
    struct signalfd_siginfo info;
    while (!top->over && read(fd, &info, sizeof(info)) == sizeof(info)) {
        switch (info.ssi_signo) {
        case SIGINT: finish(top, CLI_INTERRUPTED); break;
        case SIGWINCH:
            if (top->live)
                show(top);
            break;
        case SIGTSTP:
            if (top->live)
                terminal_leave(&top->terminal);
            raise(SIGSTOP);
            if (top->live)
                terminal_enter(&top->terminal);
            if (top->live)
                show(top);
            break;
        default: die_of(top, (int)info.ssi_signo);
        }
    }
}

static void on_key(struct top *top)
{
    char keys[64];
    ssize_t n = read(top->terminal.key_fd, keys, sizeof(keys));
    if (n <= 0) {
        top->terminal.key_fd = -1; /* there will be no more */
        return;
    }
    for (ssize_t i = 0; i < n; i++)
        if (keys[i] == 'q' || keys[i] == 'Q')
            finish(top, CLI_DONE);
        else if (keys[i] == '\f')
            show(top);
}

static int timeout_ms(const struct top *top)
{
    uint64_t now = cli_now_us();
    uint64_t until = !top->asking     ? top->due_us
                     : top->told_late ? UINT64_MAX
                                      : top->asked_us + ANSWER_LIMIT_US;
    if (until == UINT64_MAX)
        return -1;
    return until <= now ? 0 : (int)MIN((until - now + 999) / 1000, 3600000u);
}

static void watch(struct top *top, int signal_fd)
{
    struct pollfd fds[] = {
        {.fd = hearth_fd(top->h), .events = hearth_events(top->h)},
        {.fd = signal_fd, .events = POLLIN},
        {.fd = top->live ? top->terminal.key_fd : -1, .events = POLLIN},
    };
    poll(fds, ELEMENTSOF(fds), timeout_ms(top));
    if (fds[1].revents)
        on_signal(top, signal_fd);
    if (!top->over && fds[2].revents)
        on_key(top);
    if (top->over)
        return;
    int r = hearth_dispatch(top->h);
    if (r < 0) {
        finish(top, r == -ECONNRESET ? CLI_NO_DAEMON : CLI_FAILED);
        return;
    }
    if (top->asking && hearth_in_flight(top->h) == 0)
        take_sample(top);
    else if (!top->asking && cli_now_us() >= top->due_us)
        ask(top);
    else if (late(top) && !top->told_late) {
        top->told_late = true;
        if (top->live)
            show(top);
        else
            cli_error("the daemon does not answer: waiting");
    }
}

static void say_why(const struct top *top)
{
    if (top->why)
        cli_error("%s", top->why);
    else if (top->end.failed)
        cli_error("%s", top->end.sentence);
    else if (top->exit_code == CLI_NO_DAEMON)
        cli_error("the daemon at %s has ended", top->socket);
    else if (top->exit_code == CLI_FAILED && !ferror(stdout) && *hearth_message(top->h))
        cli_error("%s", hearth_message(top->h));
}

static int run(struct top *top)
{
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int exit_code = cli_open(top->cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    _cleanup_close_ int signal_fd = open_signals();
    if (signal_fd < 0)
        return cli_error("cannot watch signals: %s", strerror(errno));
    hearth_socket_path(top->cli->socket, top->socket);
    top->h = h;
    top->terminal.key_fd = -1;
    if (top->live)
        terminal_enter(&top->terminal);
    ask(top);
    while (!top->over)
        watch(top, signal_fd);
    terminal_leave(&top->terminal);
    say_why(top);
    return top->exit_code;
}

int cli_top(struct cli *cli, int argc, char **argv)
{
    struct top top = {.cli = cli, .interval_us = DEFAULT_INTERVAL_US};
    const struct option options[] = {
        {"interval", OPTION_DURATION, &top.interval_us, NULL, "TIME", "between two samples (1s)"},
        {"once", OPTION_FLAG, &top.once, NULL, NULL, "print the figures of one interval, and end"},
    };
    size_t n;
    int exit_code;
    if (!cli_parse(cli, options, ELEMENTSOF(options), argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    if (top.interval_us < LEAST_INTERVAL_US)
        return cli_usage("--interval is at least 100ms: looking costs the daemon time too");
    top.live = isatty(STDOUT_FILENO) && !top.once && !cli->json;
    exit_code = run(&top);
    top_sample_done(&top.samples[0]);
    top_sample_done(&top.samples[1]);
    return exit_code;
}
