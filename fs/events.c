#include "fs/events.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/news.h"

/* A line, or where `text` is NULL `lost` events that nobody has. */
struct event {
    char *text;
    uint64_t lost;
    uint64_t before; /* the daemon's events before it, those lost among them */
};

struct events {
    uint64_t next;  /* number of the event that comes next */
    uint64_t total; /* the daemon's events until now */
    struct event ring[NEWS_EVENTS_KEPT];
};

int events_new(struct events **ret_events)
{
    struct events *events = calloc(1, sizeof(*events));

    if (!events)
        return -ENOMEM;
    *ret_events = events;
    return 0;
}

struct events *events_free(struct events *events)
{
    if (!events)
        return NULL;
    for (size_t i = 0; i < NEWS_EVENTS_KEPT; i++)
        free(events->ring[i].text);
    free(events);
    return NULL;
}

static void push(struct events *events, char *text, uint64_t lost)
{
    struct event *event = &events->ring[events->next++ % NEWS_EVENTS_KEPT];

    free(event->text);
    *event = (struct event){.text = text, .lost = lost, .before = events->total};
    events->total += text ? 1 : lost;
}

void events_push_lost(struct events *events, uint64_t n)
{
    push(events, NULL, n);
}

void events_push(struct events *events, const char *text)
{
    size_t len = text ? strcspn(text, "\n") : 0;
    char *line = len > 0 && len < EVENTS_LINE_BYTES_MAX ? malloc(len + 2) : NULL;

    if (!line) {
        events_push_lost(events, 1);
        return;
    }
    memcpy(line, text, len);
    strcpy(line + len, "\n");
    push(events, line, 0);
}

uint64_t events_pushed(const struct events *events)
{
    return events->next;
}

void events_reader_init(const struct events *events, struct events_reader *reader)
{
    *reader = (struct events_reader){.at = events->next, .told = events->total};
}

void events_reader_done(struct events_reader *reader)
{
    free(reader->rest);
    *reader = (struct events_reader){0};
}

bool events_pending(const struct events *events, const struct events_reader *reader)
{
    return reader->rest || reader->told < events->total;
}

/* As much of the line as there is room for; what is left becomes the reader's rest. */
static int give(struct events_reader *reader, const char *line, size_t bytes, char *ret_text,
                size_t size, size_t *used)
{
    size_t n = MIN(bytes, size - *used);

    if (n < bytes) {
        reader->rest = malloc(bytes - n);
        if (!reader->rest)
            return -ENOMEM;
        memcpy(reader->rest, line + n, bytes - n);
        reader->rest_at = 0;
        reader->rest_bytes = bytes - n;
    }
    memcpy(ret_text + *used, line, n);
    *used += n;
    return 0;
}

static void give_rest(struct events_reader *reader, char *ret_text, size_t size, size_t *used)
{
    size_t n = MIN(reader->rest_bytes - reader->rest_at, size);

    memcpy(ret_text, reader->rest + reader->rest_at, n);
    reader->rest_at += n;
    *used = n;
    if (reader->rest_at < reader->rest_bytes)
        return;
    free(reader->rest);
    reader->rest = NULL;
}

static const struct event *event_at(const struct events *events, uint64_t at)
{
    return &events->ring[at % NEWS_EVENTS_KEPT];
}

/* What the reader missed before his place, or has to be told of there. */
static uint64_t skip_lost(const struct events *events, struct events_reader *reader)
{
    if (events->next - reader->at > NEWS_EVENTS_KEPT)
        reader->at = events->next - NEWS_EVENTS_KEPT;
    while (reader->at < events->next && !event_at(events, reader->at)->text)
        reader->at++;
    return (reader->at < events->next ? event_at(events, reader->at)->before : events->total) -
           reader->told;
}

/* A line that would be cut comes with the next read, unless it is the first of this one. */
static bool fits(size_t bytes, size_t used, size_t size)
{
    return used == 0 || bytes <= size - used;
}

int events_read(const struct events *events, struct events_reader *reader, char *ret_text,
                size_t size, size_t *ret_bytes)
{
    size_t used = 0;
    int r = 0;

    if (reader->rest)
        give_rest(reader, ret_text, size, &used);
    while (r == 0 && used < size && !reader->rest) {
        uint64_t n_lost = skip_lost(events, reader);
        const char *line;
        char lost[64];
        if (n_lost > 0)
            snprintf(lost, sizeof(lost), NEWS_LOST_FORMAT "\n", n_lost);
        else if (reader->at == events->next)
            break;
        line = n_lost > 0 ? lost : event_at(events, reader->at)->text;
        if (!fits(strlen(line), used, size))
            break;
        r = give(reader, line, strlen(line), ret_text, size, &used);
        if (r < 0)
            break;
        reader->told += n_lost > 0 ? n_lost : 1;
        reader->at += n_lost == 0;
    }
    if (r < 0 && used == 0)
        return r;
    *ret_bytes = used;
    return 0;
}
