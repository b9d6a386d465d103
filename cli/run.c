/* hearth run: the continuation of a prompt, as it comes. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct running {
    const char *model;
    bool json;
    struct text_out out;
    int write_error;         /* stdout took no more: negative errno */
    struct text_buffer text; /* --json: all of it */
    struct cli_end end;
    struct hearth *h;
    uint64_t id;
    char reason[32];
    uint64_t seed, prompt_tokens, completion_tokens;
    uint64_t queued_us, load_us, prefill_us, decode_us;
};

static void on_text(struct running *run, const struct hearth_reply *reply)
{
    if (!reply->text || run->write_error || cli_interrupted())
        return;
    int r = run->json ? text_append(&run->text, reply->text, reply->text_bytes)
                      : text_out_write(&run->out, reply->text, reply->text_bytes);
    if (r == -EINTR && cli_interrupted())
        return;
    run->write_error = r;
    if (r < 0)
        hearth_cancel(run->h, run->id);
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct running *run = userdata;
    if (reply->has_seed)
        run->seed = reply->seed;
    if (reply->kind == HEARTH_TOKENS)
        on_text(run, reply);
    cli_note_end(&run->end, reply);
    if (reply->kind != HEARTH_DONE)
        return;
    snprintf(run->reason, sizeof(run->reason), "%s", reply->reason ? reply->reason : "");
    run->prompt_tokens = reply->prompt_tokens;
    run->completion_tokens = reply->completion_tokens;
    run->queued_us = reply->queued_us;
    run->load_us = reply->load_us;
    run->prefill_us = reply->prefill_us;
    run->decode_us = reply->decode_us;
}

static char *quoted(const char *text, size_t len)
{
    json_t *json = json_bytes(text, len);
    char *dumped = json ? json_dumps(json, JSON_ENCODE_ANY) : NULL;
    json_decref(json);
    return dumped;
}

/* By hand, because a seed may have all its 64 bits and JSON integers of the library have 63. */
static int print_json(const struct running *run)
{
    _cleanup_free_ char *model = quoted(run->model, strlen(run->model));
    _cleanup_free_ char *text = quoted(run->text.data ? run->text.data : "", run->text.len);
    _cleanup_free_ char *reason = quoted(run->reason, strlen(run->reason));
    if (!model || !text || !reason)
        return cli_error("no memory for the answer as JSON");
    printf("{\"model\": %s, \"text\": %s, \"reason\": %s, \"seed\": %" PRIu64 ",\n"
           " \"usage\": {\"prompt_tokens\": %" PRIu64 ", \"completion_tokens\": %" PRIu64 "},\n"
           " \"timings\": {\"queued_us\": %" PRIu64 ", \"load_us\": %" PRIu64
           ", \"prefill_us\": %" PRIu64 ", \"decode_us\": %" PRIu64 "}}\n",
           model, text, reason, run->seed, run->prompt_tokens, run->completion_tokens,
           run->queued_us, run->load_us, run->prefill_us, run->decode_us);
    return CLI_DONE;
}

/* The text is out; what is left is its end. */
static int finish(struct running *run, int exit_code)
{
    if (!run->write_error)
        text_out_end(&run->out);
    if (run->out.any && !run->out.at_newline && isatty(STDOUT_FILENO))
        text_out_write(&run->out, "\n", 1);
    if (run->write_error)
        return cli_error("cannot write the text: %s", strerror(-run->write_error));
    if (exit_code == CLI_INTERRUPTED)
        return exit_code;
    exit_code = cli_report(&run->end);
    if (exit_code == CLI_DONE && run->json)
        exit_code = print_json(run);
    return exit_code;
}

/* ---- a file of the user's own ---- */

struct file_load {
    struct cli_end end;
    char model[160]; /* a name is at most 128 long */
};

static void on_load(void *userdata, const struct hearth_reply *reply)
{
    struct file_load *load = userdata;
    if (reply->kind == HEARTH_ITEM && reply->model)
        snprintf(load->model, sizeof(load->model), "%s", reply->model);
    cli_note_end(&load->end, reply);
}

/* Has the daemon load the open file; the name under which this connection knows it. */
static int load_file(struct hearth *h, int fd, const char *path, struct file_load *load)
{
    uint64_t id;
    int r = hearth_warm_fd(h, fd, true, on_load, load, &id);
    if (r < 0)
        return cli_refused(h, r);
    int exit_code = cli_run(h, &id, 1);
    if (exit_code == CLI_INTERRUPTED)
        return exit_code;
    if (load->end.failed)
        return cli_error("%.128s: %s", path, load->end.sentence);
    exit_code = cli_report(&load->end);
    if (exit_code == CLI_DONE && !*load->model)
        return cli_error("the daemon gave %.128s no name: try again", path);
    return exit_code;
}

/* Opens a file, an argument with a slash; anything else must be a model's name. */
static int open_file(const char *argument, int *ret_fd)
{
    if (!strchr(argument, '/'))
        return cli_check_model(argument);
    *ret_fd = open(argument, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (*ret_fd < 0)
        return cli_error("cannot open %.128s: %s", argument, strerror(errno));
    return CLI_DONE;
}

static int generate(struct cli *cli, struct hearth_generate *request, int file_fd, bool raw)
{
    struct running run = {
        .model = request->model,
        .json = cli->json,
        .out = {.fd = STDOUT_FILENO, .escape = !raw && isatty(STDOUT_FILENO)},
    };
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int exit_code = cli_open(cli, false, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    run.h = h;
    struct file_load load = {0};
    if (file_fd >= 0) {
        exit_code = load_file(h, file_fd, request->model, &load);
        if (exit_code != CLI_DONE)
            return exit_code;
        request->model = load.model;
    }
    int r = hearth_complete(h, request, on_reply, &run, &run.id);
    if (r < 0)
        return cli_refused(h, r);
    exit_code = finish(&run, cli_run(h, &run.id, 1));
    free(run.text.data);
    return exit_code;
}

int cli_run_model(struct cli *cli, int argc, char **argv)
{
    struct hearth_generate g = HEARTH_GENERATE_INIT;
    struct option_list stops = {0};
    uint64_t top_k = g.top_k;
    bool raw = false;
    const struct option options[] = {
        {"max-tokens", OPTION_NUMBER, &g.max_tokens, NULL, "N", "at most so many tokens (256)"},
        {"temperature", OPTION_REAL, &g.temperature, NULL, "T", "0: always the likeliest (0.8)"},
        {"top-k", OPTION_NUMBER, &top_k, NULL, "N", "out of the N likeliest; 0: off (40)"},
        {"top-p", OPTION_REAL, &g.top_p, NULL, "P", "out of those that make up P; 1: off (0.95)"},
        {"min-p", OPTION_REAL, &g.min_p, NULL, "P",
         "none below P times the likeliest; 0: off (0.05)"},
        {"repeat-penalty", OPTION_REAL, &g.repeat_penalty, NULL, "R",
         "on the last 64 tokens; 1: off (1.0)"},
        {"seed", OPTION_NUMBER, &g.seed, &g.has_seed, "N", "the same seed gives the same text"},
        {"stop", OPTION_LIST, &stops, NULL, "TEXT", "end before this text; up to 8 times"},
        {"deadline", OPTION_DURATION, &g.deadline_us, NULL, "TIME", "give up after e.g. 30s"},
        {"ignore-eos", OPTION_FLAG, &g.ignore_eos, NULL, NULL, "go on after the model's end"},
        {"raw", OPTION_FLAG, &raw, NULL, NULL, "control characters as they are, on a terminal too"},
    };
    const char *arguments[2];
    size_t n;
    int exit_code;
    if (!cli_parse(cli, options, ELEMENTSOF(options), argc, argv, 1, 2, arguments, &n, &exit_code))
        return exit_code;
    if (top_k > UINT32_MAX)
        return cli_usage("--top-k is at most %" PRIu32, UINT32_MAX);
    _cleanup_close_ int file_fd = -1;
    exit_code = open_file(arguments[0], &file_fd);
    if (exit_code != CLI_DONE)
        return exit_code;
    g.model = arguments[0];
    g.top_k = (uint32_t)top_k;
    g.stops = stops.values;
    g.n_stops = stops.n;
    _cleanup_free_ char *text = NULL;
    if (n == 2) {
        g.prompt = arguments[1];
    } else {
        exit_code = cli_read_stdin(&text, &g.prompt_bytes);
        if (exit_code != CLI_DONE)
            return exit_code;
        g.prompt = text;
    }
    return generate(cli, &g, file_fd, raw);
}
