/* hearth: what its commands share: the table of commands, exit codes, the way of saying no, and the
 * session with the daemon.
 *
 * A command is a function in a file of its own and a line in main.c. Output that is data goes to
 * stdout; everything else goes to stderr as `hearth: sentence`.
 *
 * Hides: option parsing and help, connecting, Ctrl-C. Thread: the process has one. */
#ifndef HEARTH_CLI_CLI_H
#define HEARTH_CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cli/options.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

DEFINE_CLEANUP(struct hearth *, hearth_free)

enum cli_exit {
    CLI_DONE = 0,
    CLI_FAILED = 1, /* refused or failed */
    CLI_USAGE = 2,
    CLI_NO_DAEMON = 3,
    CLI_INTERRUPTED = 130,
};

struct cli;
typedef int (*cli_command_fn)(struct cli *cli, int argc, char **argv);

struct cli_command {
    const char *name;
    cli_command_fn run;
    const char *arguments; /* behind the name in its usage line */
    const char *summary;   /* one line */
    const char *help;      /* a paragraph or more, lines as printed */
    bool has_json;
};

struct cli {
    const struct cli_command *command; /* the one that runs */
    const char *socket;                /* --socket; NULL: the default search */
    bool json;
};

/* Finds the command of the command line and runs it: the exit code. */
int cli_main(const struct cli_command *commands, size_t n_commands, int argc, char **argv);

/* Parses a command's options, those it shares with all (--socket, --help, --json) included.
 * False: the command ends with *ret_exit. */
bool cli_parse(struct cli *cli, const struct option *options, size_t n_options, int argc,
               char **argv, size_t min_arguments, size_t max_arguments, const char **arguments,
               size_t *ret_n, int *ret_exit);

/* Print `hearth: sentence` and return the exit code that goes with it. */
__attribute__((format(printf, 1, 2))) int cli_error(const char *format, ...);
__attribute__((format(printf, 1, 2))) int cli_usage(const char *format, ...);

/* Sends on what was printed so far. False once stdout takes no more: a command that would go on
 * printing ends then, and cli_main() says why. */
bool cli_flush(void);

/* ---- a session: one connection, interruptible ---- */

/* How a request ended. */
struct cli_end {
    bool ended, failed;
    char code[32];
    char sentence[HEARTH_MESSAGE_BYTES];
};

/* Connects to the main or the status socket. 0 and *ret_hearth, or a negative errno with the
 * sentence in `message`; nothing is printed. */
int cli_connect(const struct cli *cli, bool status_socket, struct hearth **ret_hearth,
                char message[HEARTH_MESSAGE_BYTES]);
/* The same, but a failure is printed, and the return value is an exit code. */
int cli_open(const struct cli *cli, bool status_socket, struct hearth **ret_hearth);
/* Whether the error says that no daemon runs. */
bool cli_no_daemon(int error);
/* Notes a reply's end, if it is one. */
void cli_note_end(struct cli_end *end, const struct hearth_reply *reply);
/* The callback of a request of which only that counts; `userdata`: its struct cli_end. */
void cli_on_end(void *userdata, const struct hearth_reply *reply);
/* Runs until no request lives any more. At Ctrl-C the requests ids[0..n) are cancelled, and their
 * ends are waited for briefly. CLI_DONE (whatever the requests' ends), CLI_FAILED once the
 * connection is lost (their ends say so), CLI_INTERRUPTED. */
int cli_run(struct hearth *h, const uint64_t *ids, size_t n);
/* Input that a command takes while requests live. `fd` is -1 while none is wanted; `ready` is
 * called when a read would not block, and may start requests and set `fd`. */
struct cli_input {
    int fd;
    void (*ready)(struct cli_input *input);
};
/* The same, and goes on while input is wanted. The ids are read when Ctrl-C comes: those of
 * requests that have ended do no harm. */
int cli_run_input(struct hearth *h, const uint64_t *ids, size_t n, struct cli_input *input);
/* Monotonic. */
uint64_t cli_now_us(void);
/* Whether Ctrl-C has been pressed. */
bool cli_interrupted(void);
/* Prints how a request failed: its exit code (CLI_DONE where it did not). */
int cli_report(const struct cli_end *end);
/* A request that libhearth refused: prints its sentence. */
int cli_refused(const struct hearth *h, int error);
/* Runs the one request that was begun with `r` (of a function of hearth.h) to its end, which its
 * callback notes, and prints how it failed: an exit code. */
int cli_finish(struct hearth *h, int r, uint64_t id, const struct cli_end *end);

/* Most models of one command line. */
#define CLI_MAX_MODELS 64u
/* One request about a model; as the functions of hearth.h. */
typedef int (*cli_ask_fn)(struct hearth *h, const char *model, const void *userdata,
                          hearth_reply_fn fn, void *fn_userdata, uint64_t *ret_id);
/* Connects, asks for each model (at most CLI_MAX_MODELS) and waits for all ends; each failure is
 * printed. An exit code. */
int cli_each_model(struct cli *cli, bool status_socket, const char *const *names, size_t n,
                   cli_ask_fn ask, const void *userdata);

/* Reads stdin to its end, bounded; the text is malloc'ed. An exit code. */
int cli_read_stdin(char **ret_text, size_t *ret_len);
/* The model's name is one: CLI_DONE, or an exit code after saying why not. */
int cli_check_model(const char *name);

/* ---- commands ---- */
int cli_run_model(struct cli *cli, int argc, char **argv);
int cli_embed(struct cli *cli, int argc, char **argv);
int cli_tokenize(struct cli *cli, int argc, char **argv);
int cli_pin(struct cli *cli, int argc, char **argv);
int cli_reload(struct cli *cli, int argc, char **argv);
int cli_events(struct cli *cli, int argc, char **argv);
int cli_warm(struct cli *cli, int argc, char **argv);
int cli_unload(struct cli *cli, int argc, char **argv);
int cli_models(struct cli *cli, int argc, char **argv);
int cli_status(struct cli *cli, int argc, char **argv);
int cli_top(struct cli *cli, int argc, char **argv);
int cli_doctor(struct cli *cli, int argc, char **argv);
int cli_stats(struct cli *cli, int argc, char **argv);

#endif
