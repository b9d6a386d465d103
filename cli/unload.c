/* hearth unload: let models go. */
#include <errno.h>

#include "cli/cli.h"
#include "lib/cleanup.h"

DEFINE_CLEANUP(struct hearth *, hearth_free)

#define MAX_MODELS 64u

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    cli_note_end(userdata, reply);
}

static int unload(struct cli *cli, const char *const *names, size_t n)
{
    struct cli_end ends[MAX_MODELS] = {{0}};
    uint64_t ids[MAX_MODELS];
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    /* The status socket: where no daemon runs nothing is loaded, and none is started to say so. */
    int exit_code = cli_open(cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    for (size_t i = 0; i < n; i++) {
        int r = hearth_unload(h, names[i], on_reply, &ends[i], &ids[i]);
        if (r < 0)
            return cli_refused(h, r);
    }
    exit_code = cli_run(h, ids, n);
    for (size_t i = 0; i < n && exit_code != CLI_INTERRUPTED; i++)
        if (cli_report(&ends[i]) != CLI_DONE)
            exit_code = CLI_FAILED;
    return exit_code;
}

int cli_unload(struct cli *cli, int argc, char **argv)
{
    const char *arguments[MAX_MODELS];
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 1, MAX_MODELS, arguments, &n, &exit_code))
        return exit_code;
    for (size_t i = 0; i < n; i++) {
        exit_code = cli_check_model(arguments[i]);
        if (exit_code != CLI_DONE)
            return exit_code;
    }
    return unload(cli, arguments, n);
}
