/* hearth status: whether a daemon runs, and how it is. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct asking {
    struct cli_end end;
    char *state, *version, *info;
    int64_t pid;
};

static void keep(char **to, const char *text)
{
    if (text && !*to)
        *to = strdup(text);
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct asking *a = userdata;
    if (reply->kind == HEARTH_ITEM) {
        keep(&a->state, reply->state);
        keep(&a->version, reply->version);
        keep(&a->info, reply->info);
        a->pid = reply->pid ? reply->pid : a->pid;
    }
    cli_note_end(&a->end, reply);
}

static int ask_daemon(struct hearth *h, struct asking *a)
{
    uint64_t id = 0;
    a->pid = hearth_daemon_pid(h);
    int r = hearth_status(h, on_reply, a, &id);
    int exit_code = cli_finish(h, r, id, &a->end);
    keep(&a->version, hearth_daemon_version(h));
    return exit_code;
}

static int print_json(const struct asking *a, const char *socket)
{
    json_t *o = json_object();
    json_object_set_new(o, "state", json_text(a->state));
    json_object_set_new(o, "socket", json_text(socket));
    if (a->version)
        json_object_set_new(o, "version", json_text(a->version));
    if (a->pid)
        json_object_set_new(o, "pid", json_integer(a->pid));
    if (a->info)
        json_object_set_new(o, "info", json_flat(a->info));
    return json_print(o);
}

/* A daemon's word shall not drive a terminal. */
static void print_line(const char *key, const char *value)
{
    _cleanup_free_ char *shown = value ? text_escape(value, strlen(value), false) : NULL;
    if (shown)
        printf("%s %s\n", key, shown);
}

/* Flat lines `key value`. */
static void print_lines(const struct asking *a, const char *socket)
{
    print_line("state", a->state);
    print_line("socket", socket);
    print_line("version", a->version);
    if (a->pid)
        printf("pid %" PRId64 "\n", a->pid);
    if (a->info)
        text_print_lines(a->info, strlen(a->info));
}

static int print_status(const struct cli *cli, struct asking *a)
{
    char socket[HEARTH_PATH_BYTES] = "";
    if (!a->state)
        return cli_error("the daemon did not say its state");
    int r = hearth_socket_path(cli->socket, socket);
    if (r < 0)
        return cli_error("no socket: %s", strerror(-r));
    if (cli->json)
        return print_json(a, socket);
    print_lines(a, socket);
    return CLI_DONE;
}

static int status(struct cli *cli, struct asking *a)
{
    char message[HEARTH_MESSAGE_BYTES] = "";
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int r = cli_connect(cli, true, &h, message), exit_code = CLI_DONE;
    if (r >= 0)
        exit_code = ask_daemon(h, a);
    else if (cli_no_daemon(r))
        keep(&a->state, "inactive");
    else if (r == -ETIMEDOUT)
        keep(&a->state, "unresponsive");
    else
        exit_code = cli_error("%s", message);
    return exit_code == CLI_DONE ? print_status(cli, a) : exit_code;
}

int cli_status(struct cli *cli, int argc, char **argv)
{
    struct asking a = {0};
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    exit_code = status(cli, &a);
    free(a.state);
    free(a.version);
    free(a.info);
    return exit_code;
}
