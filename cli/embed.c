/* hearth embed: the vector of a text; of each line of stdin, in the lines' order. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

/* Lines asked for and not yet printed: enough for a batch, little enough for anybody's share. */
#define MAX_IN_FLIGHT 64u
/* A line beyond this is beyond every frame that a daemon takes. */
#define LINE_MAX_BYTES (16u << 20)

struct embedding;

struct line {
    struct embedding *embedding;
    uint64_t number; /* from 1; 0: the text of the command line */
    float *vector;
    size_t n;
    bool no_memory;
    struct cli_end end;
};

struct embedding {
    struct cli_input input; /* first: what `ready` is called with */
    struct hearth *h;
    const char *model;
    char *text; /* of stdin: what has not been asked for */
    size_t len, capacity;
    bool eof;
    struct line lines[MAX_IN_FLIGHT]; /* a ring: the i-th of all is at i % MAX_IN_FLIGHT */
    uint64_t ids[MAX_IN_FLIGHT];
    uint64_t n_asked, n_printed;
    int exit_code;
};

static void advance(struct embedding *e);
static void stop_reading(struct embedding *e, int exit_code);

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct line *line = userdata;
    if (reply->kind == HEARTH_ITEM && reply->n_vector && !line->vector) {
        line->vector = malloc(reply->n_vector * sizeof(*line->vector));
        line->no_memory = !line->vector;
        line->n = line->vector ? reply->n_vector : 0;
        if (line->vector)
            memcpy(line->vector, reply->vector, line->n * sizeof(*line->vector));
    }
    cli_note_end(&line->end, reply);
    if (reply->lost)
        stop_reading(line->embedding, CLI_FAILED);
    if (line->end.ended)
        advance(line->embedding);
}

/* Nine digits bring a float back as it was. */
static void print_vector(const struct line *line)
{
    putchar('[');
    for (size_t i = 0; i < line->n; i++)
        printf("%s%.9g", i ? ", " : "", (double)line->vector[i]);
    puts("]");
}

/* A line that failed keeps its place, so that the n-th of the output is the n-th of the input. */
static void print_line(struct embedding *e, struct line *line)
{
    const char *why = line->no_memory    ? "no memory for the vector"
                      : line->end.failed ? line->end.sentence
                      : line->n == 0     ? "the daemon sent no vector"
                                         : NULL;
    if (!why) {
        print_vector(line);
    } else if (line->number) {
        puts("null");
        e->exit_code = cli_error("line %" PRIu64 ": %s", line->number, why);
    } else {
        e->exit_code = cli_error("%s", why);
    }
    free(line->vector);
    line->vector = NULL;
}

/* A request that the library does not take (too long, say) is that line's failure alone. */
static void ask(struct embedding *e, const char *text, size_t len, uint64_t number)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    size_t at = e->n_asked++ % MAX_IN_FLIGHT;
    struct line *line = &e->lines[at];
    *line = (struct line){.embedding = e, .number = number};
    request.model = e->model;
    request.prompt = len ? text : "";
    request.prompt_bytes = len;
    int r = hearth_embed(e->h, &request, on_reply, line, &e->ids[at]);
    if (r == 0)
        return;
    const char *message = hearth_message(e->h);
    line->end.ended = line->end.failed = true;
    snprintf(line->end.sentence, sizeof(line->end.sentence), "%s",
             *message ? message : strerror(-r));
}

static bool full(const struct embedding *e)
{
    return e->n_asked - e->n_printed == MAX_IN_FLIGHT;
}

/* Asks for the whole lines that have been read, as far as there is room; at the end of the input
 * the last one needs no newline. */
static void ask_lines(struct embedding *e)
{
    size_t used = 0;
    while (!full(e) && used < e->len) {
        const char *start = e->text + used, *newline = memchr(start, '\n', e->len - used);
        if (!newline && !e->eof)
            break;
        size_t len = newline ? (size_t)(newline - start) : e->len - used;
        ask(e, start, len, e->n_asked + 1);
        used += len + (newline != NULL);
    }
    e->len -= used;
    if (used)
        memmove(e->text, e->text + used, e->len);
}

/* Prints what is due, asks for what there is room for, and says whether more is to be read. */
static void advance(struct embedding *e)
{
    uint64_t before;
    if (cli_interrupted())
        return;
    do {
        before = e->n_asked + e->n_printed;
        while (e->n_printed < e->n_asked && e->lines[e->n_printed % MAX_IN_FLIGHT].end.ended)
            print_line(e, &e->lines[e->n_printed++ % MAX_IN_FLIGHT]);
        ask_lines(e);
    } while (before != e->n_asked + e->n_printed);
    e->input.fd = e->eof || full(e) ? -1 : STDIN_FILENO;
    if (!cli_flush())
        stop_reading(e, CLI_FAILED);
}

static void stop_reading(struct embedding *e, int exit_code)
{
    e->exit_code = exit_code;
    e->eof = true;
    e->len = 0;
    e->input.fd = -1;
}

static void on_input(struct cli_input *input)
{
    struct embedding *e = (struct embedding *)input;
    if (e->len == e->capacity) {
        size_t capacity = e->capacity ? e->capacity * 2 : 65536;
        char *text = capacity <= LINE_MAX_BYTES ? realloc(e->text, capacity) : NULL;
        if (!text) {
            stop_reading(e, cli_error("line %" PRIu64 " is longer than %u MiB, or memory is out: "
                                      "no more is read",
                                      e->n_asked + 1, LINE_MAX_BYTES >> 20));
            advance(e);
            return;
        }
        e->text = text;
        e->capacity = capacity;
    }
    ssize_t n = read(STDIN_FILENO, e->text + e->len, e->capacity - e->len);
    if (n < 0 && errno != EINTR && errno != EAGAIN)
        stop_reading(e, cli_error("cannot read standard input: %s", strerror(errno)));
    e->len += n > 0 ? (size_t)n : 0;
    e->eof |= n == 0;
    advance(e);
}

static int embed(struct cli *cli, const char *model, const char *text)
{
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    struct embedding e = {.input = {.fd = -1, .ready = on_input}, .model = model};
    int exit_code = cli_open(cli, false, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    e.h = h;
    e.eof = text != NULL;
    if (text)
        ask(&e, text, strlen(text), 0);
    advance(&e);
    exit_code = cli_run_input(h, e.ids, MAX_IN_FLIGHT, &e.input);
    if (exit_code != CLI_INTERRUPTED)
        advance(&e);
    while (e.n_printed < e.n_asked)
        free(e.lines[e.n_printed++ % MAX_IN_FLIGHT].vector);
    free(e.text);
    return exit_code == CLI_DONE || exit_code == CLI_FAILED ? e.exit_code : exit_code;
}

int cli_embed(struct cli *cli, int argc, char **argv)
{
    const char *arguments[2] = {0};
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 1, 2, arguments, &n, &exit_code))
        return exit_code;
    exit_code = cli_check_model(arguments[0]);
    return exit_code == CLI_DONE ? embed(cli, arguments[0], arguments[1]) : exit_code;
}
