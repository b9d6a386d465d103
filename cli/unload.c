/* hearth unload: let models go. */
#include "cli/cli.h"

static int ask(struct hearth *h, const char *model, const void *userdata, hearth_reply_fn fn,
               void *fn_userdata, uint64_t *ret_id)
{
    (void)userdata;
    return hearth_unload(h, model, fn, fn_userdata, ret_id);
}

int cli_unload(struct cli *cli, int argc, char **argv)
{
    const char *names[CLI_MAX_MODELS];
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 1, CLI_MAX_MODELS, names, &n, &exit_code))
        return exit_code;
    /* The status socket: where no daemon runs nothing is loaded, and none is started to say so. */
    return cli_each_model(cli, true, names, n, ask, NULL);
}
