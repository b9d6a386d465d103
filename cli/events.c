/* hearth events: what happens in the daemon, as it happens. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

struct watching {
    struct hearth *h;
    uint64_t id;
    bool raw; /* the objects as they come */
    bool output_lost;
    struct cli_end end;
    bool connection_lost;
};

/* ---- an event in words ---- */

/* Text out of an event shall not drive a terminal, nor break the line. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    _cleanup_free_ char *escaped = text_escape(text, strlen(text), false);
    fputs(escaped ? escaped : "", stdout);
}

static const char *text_of(const json_t *event, const char *key)
{
    const char *text = json_string_value(json_object_get(event, key));
    return text ? text : "-";
}

static uint64_t number_of(const json_t *event, const char *key)
{
    json_int_t value = json_integer_value(json_object_get(event, key));
    return value > 0 ? (uint64_t)value : 0;
}

/* "2026-11-24T10:00:00.123Z" as the time of day here. */
static void say_time(const char *text)
{
    struct tm utc = {0}, here;
    const char *rest = strptime(text, "%Y-%m-%dT%H:%M:%S", &utc);
    time_t seconds = rest ? timegm(&utc) : 0;
    if (!rest || !localtime_r(&seconds, &here)) {
        say("%-12.12s  ", text);
        return;
    }
    say("%02d:%02d:%02d%.4s  ", here.tm_hour, here.tm_min, here.tm_sec, *rest == '.' ? rest : "");
}

static const char *time_text(uint64_t us, char text[32])
{
    if (us < 1000000)
        snprintf(text, 32, "%.3gms", (double)us / 1e3);
    else
        snprintf(text, 32, "%.3gs", (double)us / 1e6);
    return text;
}

static void say_daemon(const json_t *event)
{
    const char *version = json_string_value(json_object_get(event, "version"));
    say("hearthd is %s%s%s", text_of(event, "state"), version ? ", version " : "",
        version ? version : "");
}

static void say_state(const json_t *event)
{
    char size[SIZE_TEXT_BYTES], us[32];
    say("%s is %s, was %s", text_of(event, "model"), text_of(event, "state"),
        text_of(event, "from"));
    if (json_object_get(event, "load_us"))
        say(" (%s, loaded in %s)", size_text(number_of(event, "bytes"), size),
            time_text(number_of(event, "load_us"), us));
}

static void say_failed(const json_t *event)
{
    say("%s failed to load (%s): %s", text_of(event, "model"), text_of(event, "code"),
        text_of(event, "sentence"));
}

static void say_evicted(const json_t *event)
{
    char size[SIZE_TEXT_BYTES], us[32];
    say("%s goes for %s: %s (%s come free; its last load took %s)", text_of(event, "model"),
        text_of(event, "for"), text_of(event, "why"), size_text(number_of(event, "bytes"), size),
        time_text(number_of(event, "reload_us"), us));
}

static void say_predicted(const json_t *event)
{
    say(number_of(event, "dry_run") ? "%s would be loaded: it is likely to be wanted soon (dry-run)"
                                    : "%s is loaded: it is likely to be wanted soon",
        text_of(event, "model"));
}

static void say_busy(const json_t *event)
{
    say("busy: %llu refused, the last of uid %llu: %s",
        (unsigned long long)number_of(event, "refused"),
        (unsigned long long)number_of(event, "uid"), text_of(event, "sentence"));
}

static void say_lost(const json_t *event)
{
    say("%llu events are lost: this reader was too slow",
        (unsigned long long)number_of(event, "count"));
}

/* One of a later daemon: what it has, as it has it. */
static void say_other(const json_t *event)
{
    const char *key;
    json_t *value;
    say("%s", text_of(event, "event"));
    json_object_foreach((json_t *)event, key, value)
    {
        _cleanup_free_ char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        if (strcmp(key, "event") != 0 && strcmp(key, "time") != 0 && strcmp(key, "seq") != 0)
            say(" %s=%s", key, text ? text : "");
    }
}

static const struct {
    const char *event;
    void (*say)(const json_t *event);
} sayings[] = {
    {"daemon", say_daemon},   {"state", say_state},         {"load-failed", say_failed},
    {"evicted", say_evicted}, {"predicted", say_predicted}, {"busy", say_busy},
    {"lost", say_lost},
};

static void say_event(const char *text, size_t len)
{
    json_t *event = json_loadb(text, len, 0, NULL);
    size_t i = 0;
    if (!json_is_object(event)) {
        json_decref(event);
        say("%.*s", (int)MIN(len, (size_t)1000), text);
        putchar('\n');
        return;
    }
    say_time(text_of(event, "time"));
    while (i < ELEMENTSOF(sayings) && strcmp(sayings[i].event, text_of(event, "event")) != 0)
        i++;
    (i < ELEMENTSOF(sayings) ? sayings[i].say : say_other)(event);
    putchar('\n');
    json_decref(event);
}

/* ---- the subscription ---- */

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct watching *w = userdata;
    cli_note_end(&w->end, reply);
    w->connection_lost |= reply->lost;
    if (reply->kind != HEARTH_ITEM || !reply->text || w->output_lost)
        return;
    if (w->raw)
        printf("%.*s\n", (int)reply->text_bytes, reply->text);
    else
        say_event(reply->text, reply->text_bytes);
    if (!cli_flush()) {
        w->output_lost = true;
        hearth_cancel(w->h, w->id);
    }
}

static int watch(struct cli *cli)
{
    struct watching w = {.raw = cli->json};
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    int exit_code = cli_open(cli, true, &h);
    if (exit_code != CLI_DONE)
        return exit_code;
    w.h = h;
    int r = hearth_subscribe(h, "events", on_reply, &w, &w.id);
    if (r < 0)
        return cli_refused(h, r);
    exit_code = cli_run(h, &w.id, 1);
    if (exit_code == CLI_INTERRUPTED || w.output_lost)
        return exit_code;
    if (w.connection_lost || strcmp(w.end.code, "shutting-down") == 0) {
        cli_error("the daemon has ended");
        return CLI_NO_DAEMON;
    }
    return cli_report(&w.end);
}

int cli_events(struct cli *cli, int argc, char **argv)
{
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    return watch(cli);
}
