/* hearth reload: the daemon looks through its models directories again. */
#include "cli/cli.h"
#include "lib/cleanup.h"

DEFINE_CLEANUP(struct hearth *, hearth_free)

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    cli_note_end(userdata, reply);
}

int cli_reload(struct cli *cli, int argc, char **argv)
{
    struct cli_end end = {0};
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    uint64_t id;
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    /* One that does not run will look when it starts. */
    exit_code = cli_open(cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    int r = hearth_reload(h, on_reply, &end, &id);
    if (r < 0)
        return cli_refused(h, r);
    exit_code = cli_run(h, &id, 1);
    return exit_code == CLI_INTERRUPTED ? exit_code : cli_report(&end);
}
