#include "cli/cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/output.h"
#include "lib/cleanup.h"

#define MAX_OPTIONS 32u

/* ---- saying no ---- */

__attribute__((format(printf, 1, 0))) static void print_error(const char *format, va_list ap)
{
    char text[1024];
    vsnprintf(text, sizeof(text), format, ap);
    /* Names and sentences come from elsewhere: they shall not drive a terminal. */
    _cleanup_free_ char *shown = text_escape(text, strlen(text), true);
    fflush(stdout);
    fprintf(stderr, "hearth: %s\n", shown ? shown : "out of memory");
}

int cli_error(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    print_error(format, ap);
    va_end(ap);
    return CLI_FAILED;
}

int cli_usage(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    print_error(format, ap);
    va_end(ap);
    return CLI_USAGE;
}

/* ---- help ---- */

static void print_options(const struct option *options, size_t n)
{
    int width = 0;
    for (size_t i = 0; i < n; i++) {
        int len = (int)(strlen(options[i].name) +
                        (options[i].argument ? strlen(options[i].argument) + 1 : 0));
        width = MAX(width, len);
    }
    for (size_t i = 0; i < n; i++) {
        int printed = printf("  --%s%s%s", options[i].name, options[i].argument ? " " : "",
                             options[i].argument ? options[i].argument : "");
        printf("%*s%s\n", width + 6 - printed, "", options[i].help);
    }
}

static void print_command_help(const struct cli_command *command, const struct option *options,
                               size_t n_options)
{
    printf("usage: hearth %s %s\n\n%s\n\n%s\nOptions:\n", command->name, command->arguments,
           command->summary, command->help);
    print_options(options, n_options);
}

static void print_help(const struct cli_command *commands, size_t n)
{
    printf("usage: hearth COMMAND [ARGUMENT...] [OPTION...]\n\n"
           "Talks to hearthd, the daemon that keeps language models warm on this machine.\n\n"
           "Commands:\n");
    for (size_t i = 0; i < n; i++)
        printf("  %-10s%s\n", commands[i].name, commands[i].summary);
    printf("\n'hearth COMMAND --help' says more about each. Every command takes --socket PATH; "
           "without it\nthe socket is $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth/hearth.sock or\n"
           "/run/hearth/hearth.sock.\n\n"
           "Exit status: 0 done, 1 refused or failed, 2 usage, 3 no daemon, 130 interrupted.\n");
}

/* ---- parsing ---- */

bool cli_parse(struct cli *cli, const struct option *options, size_t n_options, int argc,
               char **argv, size_t min_arguments, size_t max_arguments, const char **arguments,
               size_t *ret_n, int *ret_exit)
{
    bool help = false;
    struct option all[MAX_OPTIONS];
    const struct option shared[] = {
        {"socket", OPTION_TEXT, &cli->socket, NULL, "PATH", "the daemon's socket"},
        {"help", OPTION_FLAG, &help, NULL, NULL, "print this help"},
        {"json", OPTION_FLAG, &cli->json, NULL, NULL, "print JSON"},
    };
    size_t n_shared = cli->command->has_json ? 3 : 2, n = n_options;
    struct fault fault;
    if (n_options)
        memcpy(all, options, n_options * sizeof(*options));
    memcpy(all + n, shared, n_shared * sizeof(*shared));
    n += n_shared;

    int r = options_parse(all, n, argc, argv, arguments, max_arguments, ret_n, &fault);
    if (help) {
        print_command_help(cli->command, all, n);
        *ret_exit = CLI_DONE;
        return false;
    }
    if (r >= 0 && *ret_n < min_arguments)
        r = fault_set(&fault, -EINVAL, "an argument is missing; usage: hearth %s %s",
                      cli->command->name, cli->command->arguments);
    if (r < 0)
        *ret_exit = cli_usage("%s", fault.text);
    return r >= 0;
}

/* ---- the command ---- */

/* Edits that turn one word into the other, for "did you mean". Words longer than the row are far
 * from everything. */
static size_t word_distance(const char *a, const char *b)
{
    size_t row[32], len = strlen(b);
    if (len >= ELEMENTSOF(row))
        return SIZE_MAX;
    for (size_t j = 0; j <= len; j++)
        row[j] = j;
    for (size_t i = 1; *a; a++, i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= len; j++) {
            size_t above = row[j];
            size_t replaced = diagonal + (*a != b[j - 1]);
            row[j] = MIN(replaced, MIN(above, row[j - 1]) + 1);
            diagonal = above;
        }
    }
    return row[len];
}

static int unknown_command(const struct cli_command *commands, size_t n, const char *name)
{
    const char *nearest = NULL;
    size_t least = 3;
    for (size_t i = 0; i < n; i++) {
        size_t distance = word_distance(name, commands[i].name);
        if (distance < least) {
            least = distance;
            nearest = commands[i].name;
        }
    }
    if (nearest)
        return cli_usage("there is no command '%.64s': did you mean '%s'?", name, nearest);
    return cli_usage("there is no command '%.64s': 'hearth --help' lists them", name);
}

static const struct cli_command *command_find(const struct cli_command *commands, size_t n,
                                              const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}

/* Options before the command: --socket, --help, --version. The number of words they take, or an
 * exit code in *ret_exit. */
static int leading_options(struct cli *cli, const struct cli_command *commands, size_t n_commands,
                           int argc, char **argv, bool *ret_ends, int *ret_exit)
{
    int at = 1;
    *ret_ends = true;
    *ret_exit = CLI_DONE;
    for (; at < argc && argv[at][0] == '-'; at++) {
        if (strcmp(argv[at], "--help") == 0 || strcmp(argv[at], "-h") == 0) {
            print_help(commands, n_commands);
            return at;
        }
        if (strcmp(argv[at], "--version") == 0) {
            printf("hearth %s\n", HEARTH_VERSION);
            return at;
        }
        if (strncmp(argv[at], "--socket=", 9) == 0) {
            cli->socket = argv[at] + 9;
        } else if (strcmp(argv[at], "--socket") == 0 && at + 1 < argc) {
            cli->socket = argv[++at];
        } else {
            *ret_exit =
                cli_usage("'%.64s' is no option before a command: see 'hearth --help'", argv[at]);
            return at;
        }
    }
    *ret_ends = false;
    return at;
}

/* The first errno of stdout: later writes may fail without one. */
static int output_error;

bool cli_flush(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return true;
    if (output_error == 0)
        output_error = errno ? errno : EIO;
    return false;
}

/* What was printed must have arrived: a full disk is a failure. */
static int flushed(int exit_code)
{
    if (cli_flush())
        return exit_code;
    return cli_error("cannot write the output: %s", strerror(output_error));
}

int cli_main(const struct cli_command *commands, size_t n_commands, int argc, char **argv)
{
    struct cli cli = {0};
    bool ends;
    int exit_code;
    int at = leading_options(&cli, commands, n_commands, argc, argv, &ends, &exit_code);
    if (ends)
        return flushed(exit_code);
    if (at >= argc)
        return cli_usage("no command: 'hearth --help' lists them");
    const char *name = argv[at++];
    static char help[] = "--help";
    char *help_argv[] = {help};
    if (strcmp(name, "help") == 0) {
        if (at >= argc) {
            print_help(commands, n_commands);
            return flushed(CLI_DONE);
        }
        name = argv[at];
        argv = help_argv;
        argc = 1;
        at = 0;
    }
    cli.command = command_find(commands, n_commands, name);
    if (!cli.command)
        return unknown_command(commands, n_commands, name);
    return flushed(cli.command->run(&cli, argc - at, argv + at));
}
