/* hearth stats: what the daemon has counted. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct collecting {
    struct cli_end end;
    json_t *json; /* NULL: text */
    bool headings;
    size_t n;
};

static void print_section(struct collecting *c, const struct hearth_reply *reply)
{
    _cleanup_free_ char *name = text_escape(reply->name, strlen(reply->name), false);
    if (c->headings && name)
        printf("%s%s:\n", c->n ? "\n" : "", name);
    text_print_lines(reply->text, reply->text_bytes);
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct collecting *c = userdata;
    cli_note_end(&c->end, reply);
    if (reply->kind != HEARTH_ITEM || !reply->text || !reply->name)
        return;
    if (!c->json) {
        print_section(c, reply);
    } else {
        /* Prometheus text has comments and labels: it stays text. */
        bool flat = strncmp(reply->text, "# ", 2) != 0;
        json_object_set_new(c->json, reply->name,
                            flat ? json_flat(reply->text) : json_text(reply->text));
    }
    c->n++;
}

static int collect(struct cli *cli, const char *section, struct collecting *c)
{
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    uint64_t id = 0;
    int exit_code = cli_open(cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    int r = hearth_metrics(h, section, on_reply, c, &id);
    exit_code = cli_finish(h, r, id, &c->end);
    if (exit_code == CLI_DONE && c->json)
        exit_code = json_print(json_incref(c->json));
    return exit_code;
}

int cli_stats(struct cli *cli, int argc, char **argv)
{
    struct collecting c = {0};
    const char *section = NULL;
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 1, &section, &n, &exit_code))
        return exit_code;
    c.json = cli->json ? json_object() : NULL;
    c.headings = n == 0;
    exit_code = collect(cli, section, &c);
    json_decref(c.json);
    return exit_code;
}
