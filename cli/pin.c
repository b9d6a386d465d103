/* hearth pin: keep models from being evicted, until the daemon ends. */
#include "cli/cli.h"

static int ask(struct hearth *h, const char *model, const void *userdata, hearth_reply_fn fn,
               void *fn_userdata, uint64_t *ret_id)
{
    const bool *off = userdata;
    struct hearth_set set = HEARTH_SET_INIT;
    set.model = model;
    set.has_pinned = true;
    set.pinned = !*off;
    return hearth_set(h, &set, fn, fn_userdata, ret_id);
}

int cli_pin(struct cli *cli, int argc, char **argv)
{
    bool off = false;
    const struct option options[] = {
        {"off", OPTION_FLAG, &off, NULL, NULL, "let it be evicted again"},
    };
    const char *names[CLI_MAX_MODELS];
    size_t n;
    int exit_code;
    if (!cli_parse(cli, options, 1, argc, argv, 1, CLI_MAX_MODELS, names, &n, &exit_code))
        return exit_code;
    /* A daemon that does not run has nothing pinned; to pin, it must run. */
    return cli_each_model(cli, off, names, n, ask, &off);
}
