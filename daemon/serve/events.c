#include "daemon/serve/events.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/serve/reply.h"
#include "lib/cleanup.h"
#include "lib/news.h"

/* Part of a connection's unsent output that events fill; the rest is for answers. */
#define ROOM_PART 4u

struct event_reader {
    struct event_reader *previous, *next;
    struct request *request;
    uint64_t at; /* the number of the next event for it */
};

struct events {
    const struct clock *clock;
    uint64_t room_bytes;
    struct event_reader *readers;
    char *ring[NEWS_EVENTS_KEPT]; /* by number % NEWS_EVENTS_KEPT; NULL: lost, for want of memory */
    uint64_t n;                   /* numbers given out: the next event's */
    uint64_t busy_told_us;        /* when `busy` was last told; 0: never */
    uint64_t busy_held;           /* refusals since then */
    uint32_t busy_uid;            /* of the last of them */
    char busy_sentence[FAULT_TEXT_BYTES];
};

int events_new(const struct clock *clock, uint64_t room_bytes, struct events **ret_events)
{
    struct events *events = calloc(1, sizeof(*events));

    if (!events)
        return -ENOMEM;
    events->clock = clock;
    events->room_bytes = room_bytes;
    *ret_events = events;
    return 0;
}

static void forget_all(struct events *events)
{
    for (uint32_t i = 0; i < NEWS_EVENTS_KEPT; i++) {
        free(events->ring[i]);
        events->ring[i] = NULL;
    }
}

struct events *events_free(struct events *events)
{
    if (!events)
        return NULL;
    forget_all(events);
    free(events);
    return NULL;
}

/* ---- JSON ---- */

/* `,"key":"value"`. Bytes that are no UTF-8 (a file's name may have them) stand as code points. */
static void put_text(FILE *out, const char *key, const char *value)
{
    bool utf8 = wire_utf8_valid((const uint8_t *)value, strlen(value));

    fprintf(out, ",\"%s\":\"", key);
    for (const char *p = value; *p; p++) {
        uint8_t byte = (uint8_t)*p;
        if (byte == '"' || byte == '\\')
            fprintf(out, "\\%c", byte);
        else if (byte < 0x20 || byte == 0x7f || (byte >= 0x80 && !utf8))
            fprintf(out, "\\u%04x", byte);
        else
            fputc(byte, out);
    }
    fputc('"', out);
}

static void put_number(FILE *out, const char *key, uint64_t value)
{
    fprintf(out, ",\"%s\":%" PRIu64, key, value);
}

/* What each event begins with. */
static void put_head(FILE *out, const char *what)
{
    struct timespec now;
    struct tm utc;
    char text[32];

    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &utc);
    fprintf(out, "{\"time\":\"%s.%03ldZ\"", text, now.tv_nsec / 1000000);
    put_text(out, "event", what);
}

/* ---- to the readers ---- */

static void send_line(struct request *request, const char *line, uint64_t lost)
{
    struct wire_buffer *out = reply_begin(request->peer, WIRE_ITEM, request->key.id);

    if (lost > 0)
        wire_put_number(out, TAG_LOST, lost);
    wire_put_text(out, TAG_TEXT, line);
    reply_end(request->peer);
}

static uint64_t oldest_kept(const struct events *events)
{
    return events->n > NEWS_EVENTS_KEPT ? events->n - NEWS_EVENTS_KEPT : 0;
}

/* How many events from the reader's place on are not there. */
static uint64_t count_lost(const struct events *events, const struct event_reader *reader)
{
    uint64_t at = MAX(reader->at, oldest_kept(events));

    while (at < events->n && !events->ring[at % NEWS_EVENTS_KEPT])
        at++;
    return at - reader->at;
}

static void tell_lost(struct event_reader *reader, uint64_t lost)
{
    char line[64];

    snprintf(line, sizeof(line), NEWS_LOST_FORMAT, lost);
    reader->at += lost;
    send_line(reader->request, line, lost);
}

/* As many events as there is room for; the rest when there is again. */
static void feed(struct events *events, struct event_reader *reader)
{
    struct peer *peer = reader->request->peer;

    while (reader->at < events->n && peer_unsent(peer) < events->room_bytes / ROOM_PART) {
        uint64_t lost = count_lost(events, reader);
        if (lost > 0)
            tell_lost(reader, lost);
        else
            send_line(reader->request, events->ring[reader->at++ % NEWS_EVENTS_KEPT], 0);
    }
    if (reader->at < events->n)
        peer->congested = true;
}

/* Gives the next event its place in the ring; NULL: it is lost. */
static void add_line(struct events *events, char *line)
{
    char **place = &events->ring[events->n % NEWS_EVENTS_KEPT];

    free(*place);
    *place = line;
    events->n++;
    for (struct event_reader *r = events->readers; r; r = r->next)
        feed(events, r);
}

/* Ends and closes a line; whether all of it is there. */
static bool end_line(FILE *out)
{
    fputc('}', out);
    return fclose(out) == 0;
}

/* Puts the line that `out` has made (closed here) into the ring. */
static void add(struct events *events, FILE *out, char **line)
{
    bool whole = end_line(out);

    add_line(events, whole ? TAKE_PTR(*line) : NULL);
    free(*line);
}

/* Begins an event where somebody reads; NULL else, or where it is lost. */
static FILE *begin(struct events *events, const char *what, char **ret_line, size_t *ret_len)
{
    FILE *out;

    if (!events->readers)
        return NULL;
    out = open_memstream(ret_line, ret_len);
    if (!out) {
        add_line(events, NULL);
        return NULL;
    }
    put_head(out, what);
    put_number(out, "seq", events->n);
    return out;
}

/* For a new reader alone: it says that the subscription stands, and since when. NULL: no memory. */
static char *first_line(const char *daemon_state)
{
    char *line = NULL;
    size_t len;
    FILE *out = open_memstream(&line, &len);

    if (!out)
        return NULL;
    put_head(out, "daemon");
    put_text(out, "state", daemon_state);
    put_text(out, "version", HEARTH_VERSION);
    if (!end_line(out))
        free(TAKE_PTR(line));
    return line;
}

int events_subscribe(struct events *events, struct request *request, const char *daemon_state)
{
    struct event_reader *reader = calloc(1, sizeof(*reader));
    _cleanup_free_ char *line = first_line(daemon_state);

    if (!reader || !line) {
        free(reader);
        return -ENOMEM;
    }
    reader->request = request;
    reader->at = events->n;
    reader->next = events->readers;
    if (events->readers)
        events->readers->previous = reader;
    events->readers = reader;
    request->reader = reader;
    send_line(request, line, 0);
    return 0;
}

void events_unsubscribe(struct events *events, struct request *request)
{
    struct event_reader *reader = request->reader;

    if (reader->previous)
        reader->previous->next = reader->next;
    else
        events->readers = reader->next;
    if (reader->next)
        reader->next->previous = reader->previous;
    free(reader);
    request->reader = NULL;
    if (!events->readers)
        forget_all(events);
}

void events_resume(struct events *events, struct request *request)
{
    feed(events, request->reader);
}

/* ---- what happens ---- */

static void load_failed(struct events *events, const struct model_entry *entry)
{
    char *line = NULL;
    size_t len;
    FILE *out = begin(events, "load-failed", &line, &len);

    if (!out)
        return;
    put_text(out, "model", entry->name);
    put_text(out, "code", wire_code_name(entry->code));
    put_text(out, "sentence", entry->error);
    add(events, out, &line);
}

void events_state(struct events *events, const struct model_entry *entry)
{
    char *line = NULL;
    size_t len;
    FILE *out;

    if (entry->file)
        return; /* a user's own file is nobody else's news */
    out = begin(events, "state", &line, &len);
    if (out) {
        put_text(out, "model", entry->name);
        put_text(out, "from", model_state_name(entry->was));
        put_text(out, "state", model_state_name(entry->state));
        if (entry->state == MODEL_READY) {
            put_number(out, "bytes", registry_need_bytes(entry));
            put_number(out, "load_us", entry->load_us);
        }
        add(events, out, &line);
    }
    if (entry->state == MODEL_FAILED)
        load_failed(events, entry);
}

void events_evicted(struct events *events, const struct eviction *eviction)
{
    char *line = NULL;
    size_t len;
    FILE *out = eviction->victim->file ? NULL : begin(events, "evicted", &line, &len);

    if (!out)
        return;
    put_text(out, "model", eviction->victim->name);
    /* A user's own file is nobody else's news. */
    put_text(out, "for", eviction->newcomer->file ? "file" : eviction->newcomer->name);
    put_text(out, "why", eviction->why);
    put_number(out, "bytes", eviction->bytes);
    put_number(out, "reload_us", eviction->reload_us);
    add(events, out, &line);
}

void events_predicted(struct events *events, const struct model_entry *entry, bool dry_run)
{
    char *line = NULL;
    size_t len;
    FILE *out = begin(events, "predicted", &line, &len);

    if (!out)
        return;
    put_text(out, "model", entry->name);
    put_number(out, "dry_run", dry_run);
    add(events, out, &line);
}

void events_daemon(struct events *events, const char *state)
{
    char *line = NULL;
    size_t len;
    FILE *out = begin(events, "daemon", &line, &len);

    if (!out)
        return;
    put_text(out, "state", state);
    add(events, out, &line);
}

static void tell_busy(struct events *events, uint64_t now)
{
    char *line = NULL;
    size_t len;
    FILE *out = begin(events, "busy", &line, &len);

    if (out) {
        put_number(out, "uid", events->busy_uid);
        put_number(out, "refused", events->busy_held);
        put_text(out, "sentence", events->busy_sentence);
        add(events, out, &line);
    }
    events->busy_held = 0;
    events->busy_told_us = now;
}

static bool busy_is_due(const struct events *events, uint64_t now)
{
    return events->busy_told_us == 0 || now - events->busy_told_us >= EVENTS_BUSY_US;
}

void events_busy(struct events *events, uint32_t uid, const char *sentence)
{
    uint64_t now;

    if (!events->readers)
        return;
    now = clock_now_us(events->clock);
    events->busy_held++;
    events->busy_uid = uid;
    snprintf(events->busy_sentence, sizeof(events->busy_sentence), "%s", sentence);
    if (busy_is_due(events, now))
        tell_busy(events, now);
}

void events_tick(struct events *events)
{
    uint64_t now = clock_now_us(events->clock);

    if (events->busy_held > 0 && busy_is_due(events, now))
        tell_busy(events, now);
}
