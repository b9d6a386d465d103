/* hearth warm: load models ahead; with --wait, watch them come. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "cli/terminal.h"
#include "lib/cleanup.h"

#define BAR_WIDTH 30
/* Blanks, percent, the longest state, two sizes. */
#define BAR_TEXT_WIDTH 36u

struct warming;

struct warm_model {
    struct warming *warming;
    const char *name;
    struct cli_end end;
    char state[16];
    uint64_t done_bytes, total_bytes;
    unsigned tenth_shown; /* of the progress, in the lines */
};

struct warming {
    struct warm_model models[CLI_MAX_MODELS];
    size_t n;
    size_t name_width;
    bool bars;  /* a terminal that has room for them */
    bool drawn; /* the bars stand above the cursor */
};

static double fraction(const struct warm_model *m)
{
    if (m->end.ended && !m->end.failed)
        return 1;
    return m->total_bytes ? MIN((double)m->done_bytes / (double)m->total_bytes, 1) : 0;
}

/* A line of at most `columns` characters, so that the cursor's way back up is as long as it was
 * down: what does not fit is left out from the right, the bar first. */
static void draw_bar(const struct warm_model *m, size_t columns, FILE *out)
{
    char bar[BAR_WIDTH + 4] = "", size[2 * SIZE_TEXT_BYTES + 8] = "", line[512];
    char done[SIZE_TEXT_BYTES], total[SIZE_TEXT_BYTES];
    if (m->total_bytes)
        snprintf(size, sizeof(size), "  %s of %s", size_text(m->done_bytes, done),
                 size_text(m->total_bytes, total));
    if (columns >= m->warming->name_width + BAR_WIDTH + BAR_TEXT_WIDTH) {
        memset(bar, '.', BAR_WIDTH + 2);
        memset(bar + 1, '#', (size_t)(fraction(m) * BAR_WIDTH));
        bar[0] = '[';
        bar[BAR_WIDTH + 1] = ']';
    }
    snprintf(line, sizeof(line), "%-*s  %s%s%3d%%  %s%s", (int)m->warming->name_width, m->name, bar,
             *bar ? " " : "", (int)(fraction(m) * 100), m->state, size);
    fprintf(out, "\r\033[K%.*s\n", (int)MIN(columns - 1, sizeof(line)), line);
}

static void draw_bars(struct warming *w)
{
    size_t columns, rows, len = 0;
    char *text = NULL;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return;
    terminal_size(&columns, &rows);
    if (w->drawn)
        fprintf(out, "\033[%zuA", w->n);
    for (size_t i = 0; i < w->n; i++)
        draw_bar(&w->models[i], columns, out);
    if (fclose(out) == 0)
        fwrite(text, 1, len, stdout);
    free(text);
    cli_flush();
    w->drawn = true;
}

static void print_line(const struct warm_model *m)
{
    printf("%s %s %" PRIu64 " %" PRIu64 "\n", m->name, m->state, m->done_bytes, m->total_bytes);
    cli_flush();
}

/* The state as a word of the project's seven: anything else is not shown. */
static void state_set(struct warm_model *m, const char *state)
{
    for (const char *c = state; *c; c++)
        if (*c < 'a' || *c > 'z')
            return;
    snprintf(m->state, sizeof(m->state), "%s", state);
}

static void on_progress(void *userdata, const struct hearth_reply *reply)
{
    struct warm_model *m = userdata;
    char before[sizeof(m->state)];
    memcpy(before, m->state, sizeof(before));
    if (reply->kind == HEARTH_ITEM && reply->state) {
        state_set(m, reply->state);
        m->done_bytes = reply->done_bytes;
        m->total_bytes = reply->total_bytes;
    }
    cli_note_end(&m->end, reply);
    if (m->end.ended)
        state_set(m, m->end.failed ? "failed" : "ready");
    unsigned tenth = (unsigned)(fraction(m) * 10);
    bool news = strcmp(before, m->state) != 0 || tenth != m->tenth_shown;
    m->tenth_shown = tenth;
    if (m->warming->bars)
        draw_bars(m->warming);
    else if (news)
        print_line(m);
}

static int report(const struct warming *w, int exit_code)
{
    if (exit_code == CLI_INTERRUPTED)
        return exit_code;
    for (size_t i = 0; i < w->n; i++) {
        const struct warm_model *m = &w->models[i];
        /* Sentences about a file need not name the model. */
        if (m->end.failed && !strstr(m->end.sentence, m->name))
            exit_code = cli_error("%s: %s", m->name, m->end.sentence);
        else if (cli_report(&m->end) != CLI_DONE)
            exit_code = CLI_FAILED;
    }
    return exit_code;
}

static int warm(struct cli *cli, struct warming *w, bool wait)
{
    uint64_t ids[CLI_MAX_MODELS];
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int exit_code = cli_open(cli, false, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    for (size_t i = 0; i < w->n; i++) {
        struct warm_model *m = &w->models[i];
        int r = wait ? hearth_warm(h, m->name, true, on_progress, m, &ids[i])
                     : hearth_warm(h, m->name, false, cli_on_end, &m->end, &ids[i]);
        if (r < 0)
            return cli_refused(h, r);
    }
    if (wait && w->bars)
        draw_bars(w);
    return report(w, cli_run(h, ids, w->n));
}

int cli_warm(struct cli *cli, int argc, char **argv)
{
    bool wait = false;
    const struct option options[] = {
        {"wait", OPTION_FLAG, &wait, NULL, NULL, "show the progress, end when all are ready"},
    };
    const char *arguments[CLI_MAX_MODELS];
    struct warming w = {0};
    int exit_code;
    if (!cli_parse(cli, options, ELEMENTSOF(options), argc, argv, 1, CLI_MAX_MODELS, arguments,
                   &w.n, &exit_code))
        return exit_code;
    for (size_t i = 0; i < w.n; i++) {
        exit_code = cli_check_model(arguments[i]);
        if (exit_code != CLI_DONE)
            return exit_code;
        w.models[i] = (struct warm_model){.warming = &w, .name = arguments[i]};
        w.name_width = MAX(w.name_width, strlen(arguments[i]));
    }
    size_t columns, rows;
    terminal_size(&columns, &rows);
    w.bars = wait && isatty(STDOUT_FILENO) && w.n < rows;
    return warm(cli, &w, wait);
}
