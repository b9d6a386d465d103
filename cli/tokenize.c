/* hearth tokenize: the ids that a model reads a text as. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct tokenizing {
    struct cli_end end;
    int32_t *ids;
    size_t n;
    bool failed;
};

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct tokenizing *t = userdata;
    if (reply->n_ids) {
        int32_t *ids = reallocarray(t->ids, t->n + reply->n_ids, sizeof(*ids));
        if (ids) {
            memcpy(ids + t->n, reply->ids, reply->n_ids * sizeof(*ids));
            t->ids = ids;
            t->n += reply->n_ids;
        }
        t->failed |= !ids;
    }
    cli_note_end(&t->end, reply);
}

static int print_ids(const struct cli *cli, const struct tokenizing *t)
{
    if (cli->json)
        putchar('[');
    for (size_t i = 0; i < t->n; i++)
        printf("%s%d", i == 0 ? "" : cli->json ? ", " : " ", t->ids[i]);
    puts(cli->json ? "]" : "");
    return CLI_DONE;
}

static int tokenize(struct cli *cli, const char *model, const char *text, size_t len)
{
    struct tokenizing t = {0};
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    uint64_t id = 0;
    int exit_code = cli_open(cli, false, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    int r = hearth_tokenize(h, model, text, len, on_reply, &t, &id);
    exit_code = cli_finish(h, r, id, &t.end);
    if (exit_code == CLI_DONE)
        exit_code = t.failed ? cli_error("no memory for the ids") : print_ids(cli, &t);
    free(t.ids);
    return exit_code;
}

int cli_tokenize(struct cli *cli, int argc, char **argv)
{
    const char *arguments[2];
    size_t n, len = 0;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 1, 2, arguments, &n, &exit_code))
        return exit_code;
    exit_code = cli_check_model(arguments[0]);
    if (exit_code != CLI_DONE)
        return exit_code;
    if (n == 2)
        return tokenize(cli, arguments[0], arguments[1], strlen(arguments[1]));
    _cleanup_free_ char *text = NULL;
    exit_code = cli_read_stdin(&text, &len);
    return exit_code == CLI_DONE ? tokenize(cli, arguments[0], text, len) : exit_code;
}
