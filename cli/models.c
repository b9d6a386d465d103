/* hearth models: what the daemon knows; without one, the names it left behind. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct listing {
    const char *only; /* one model in full; NULL: all */
    bool json_wanted;
    struct table table;
    json_t *json;
    size_t n;
    struct cli_end end;
};

static void cell_number(struct table *table, uint64_t number)
{
    char text[24];
    snprintf(text, sizeof(text), "%" PRIu64, number);
    table_cell(table, text);
}

static void heading(struct table *table)
{
    static const char *const names[] = {"NAME",   "STATE", "MEMORY", "PRELOAD",
                                        "PINNED", "HOLDS", "NOTE"};
    table->n_columns = ELEMENTSOF(names);
    for (size_t i = 0; i < ELEMENTSOF(names); i++)
        table_cell(table, names[i]);
}

/* What a state leaves open: how far a load is, why it failed. */
static void cell_note(struct table *table, const struct hearth_reply *r)
{
    char text[64], done[SIZE_TEXT_BYTES], total[SIZE_TEXT_BYTES];
    if (r->sentence) {
        table_cell(table, r->sentence);
        return;
    }
    if (r->state && strcmp(r->state, "loading") == 0)
        snprintf(text, sizeof(text), "%s of %s", size_text(r->done_bytes, done),
                 size_text(r->total_bytes, total));
    else
        snprintf(text, sizeof(text), "-");
    table_cell(table, text);
}

static void row(struct table *table, const struct hearth_reply *r)
{
    char size[SIZE_TEXT_BYTES];
    table_cell(table, r->model);
    table_cell(table, r->state ? r->state : "-");
    table_cell(table, size_text(r->memory_bytes, size));
    table_cell(table, r->preload ? "yes" : "no");
    table_cell(table, r->pinned ? "yes" : "no");
    cell_number(table, r->holds);
    cell_note(table, r);
}

static json_t *as_json(const struct hearth_reply *r)
{
    json_t *o = json_object();
    json_object_set_new(o, "name", json_text(r->model));
    json_object_set_new(o, "state", json_text(r->state ? r->state : ""));
    json_object_set_new(o, "done_bytes", json_integer((json_int_t)r->done_bytes));
    json_object_set_new(o, "total_bytes", json_integer((json_int_t)r->total_bytes));
    json_object_set_new(o, "memory_bytes", json_integer((json_int_t)r->memory_bytes));
    json_object_set_new(o, "preload", json_boolean(r->preload));
    json_object_set_new(o, "pinned", json_boolean(r->pinned));
    json_object_set_new(o, "keep_alive_us", json_integer((json_int_t)r->keep_alive_us));
    json_object_set_new(o, "holds", json_integer((json_int_t)r->holds));
    json_object_set_new(o, "error", r->sentence ? json_text(r->sentence) : json_null());
    json_object_set_new(o, "info", json_flat(r->info));
    json_object_set_new(o, "stats", json_flat(r->stats));
    return o;
}

/* One model in full: a key and its value a line, as in the files of hearthfs. */
static void pair(struct table *table, const char *key, const char *value)
{
    table_cell(table, key);
    table_cell(table, value);
}

static void pair_number(struct table *table, const char *key, uint64_t number)
{
    table_cell(table, key);
    cell_number(table, number);
}

static bool has_pair(const struct table *table, const char *key)
{
    for (size_t i = 0; i < table->n_cells; i += 2)
        if (strcmp(table->cells[i], key) == 0)
            return true;
    return false;
}

/* Of the flat lines those whose key was not there before. */
static void pairs_flat(struct table *table, const char *lines)
{
    for (const char *line = lines; line && *line;) {
        char copy[512];
        size_t len = strcspn(line, "\n");
        snprintf(copy, sizeof(copy), "%.*s", (int)MIN(len, sizeof(copy) - 1), line);
        char *value = strchr(copy, ' ');
        if (value)
            *value++ = '\0';
        if (*copy && !has_pair(table, copy))
            pair(table, copy, value ? value : "");
        line += len + (line[len] == '\n');
    }
}

static void in_full(struct table *table, const struct hearth_reply *r)
{
    table->n_columns = 2;
    pair(table, "name", r->model);
    pair(table, "state", r->state ? r->state : "-");
    if (r->sentence)
        pair(table, "error", r->sentence);
    pair_number(table, "done_bytes", r->done_bytes);
    pair_number(table, "total_bytes", r->total_bytes);
    pair_number(table, "memory_bytes", r->memory_bytes);
    pair(table, "preload", r->preload ? "1" : "0");
    pair(table, "pinned", r->pinned ? "1" : "0");
    pair_number(table, "keep_alive_us", r->keep_alive_us);
    pair_number(table, "holds", r->holds);
    pairs_flat(table, r->info);
    pairs_flat(table, r->stats);
}

static void add(struct listing *l, const struct hearth_reply *reply)
{
    if (!reply->model || (l->only && strcmp(l->only, reply->model) != 0))
        return;
    l->n++;
    if (l->json_wanted)
        json_array_append_new(l->json, as_json(reply));
    else if (l->only)
        in_full(&l->table, reply);
    else
        row(&l->table, reply);
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct listing *l = userdata;
    if (reply->kind == HEARTH_ITEM)
        add(l, reply);
    cli_note_end(&l->end, reply);
}

static void on_name(void *userdata, const char *name)
{
    struct hearth_reply reply = {.kind = HEARTH_ITEM, .model = name, .state = "cold"};
    add(userdata, &reply);
}

/* No daemon: all that is known is cold. */
static int list_names(const struct cli *cli, struct listing *l)
{
    char path[HEARTH_PATH_BYTES];
    int r = hearth_socket_path(cli->socket, path);
    if (r >= 0)
        r = hearth_list_names(path, on_name, l);
    if (r < 0)
        return cli_error("cannot read the list of models that the daemon left: %s", strerror(-r));
    return CLI_DONE;
}

static int ask_daemon(struct hearth *h, struct listing *l)
{
    uint64_t id = 0;
    int r = hearth_models(h, l->only, on_reply, l, &id);
    return cli_finish(h, r, id, &l->end);
}

static int list(struct cli *cli, struct listing *l)
{
    char message[HEARTH_MESSAGE_BYTES] = "";
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int r = cli_connect(cli, true, &h, message), exit_code;
    if (r >= 0)
        exit_code = ask_daemon(h, l);
    else if (cli_no_daemon(r))
        exit_code = list_names(cli, l);
    else
        exit_code = cli_error("%s", message);
    if (exit_code != CLI_DONE)
        return exit_code;
    if (l->only && l->n == 0)
        return cli_error("there is no model '%s': 'hearth models' lists those there are", l->only);
    if (l->json_wanted)
        return json_print(json_incref(l->json));
    return table_print(&l->table) < 0 ? cli_error("no memory for the list") : CLI_DONE;
}

int cli_models(struct cli *cli, int argc, char **argv)
{
    struct listing l = {0};
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 1, &l.only, &n, &exit_code))
        return exit_code;
    exit_code = n > 0 ? cli_check_model(l.only) : CLI_DONE;
    if (exit_code != CLI_DONE)
        return exit_code;
    l.json_wanted = cli->json;
    l.json = json_array();
    if (!l.only)
        heading(&l.table);
    exit_code = list(cli, &l);
    json_decref(l.json);
    table_done(&l.table);
    return exit_code;
}
