/* hearth reload: the daemon looks through its models directories again. */
#include "cli/cli.h"

int cli_reload(struct cli *cli, int argc, char **argv)
{
    struct cli_end end = {0};
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    uint64_t id = 0;
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    /* One that does not run will look when it starts. */
    exit_code = cli_open(cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    int r = hearth_reload(h, cli_on_end, &end, &id);
    return cli_finish(h, r, id, &end);
}
