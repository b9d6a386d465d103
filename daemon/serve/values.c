#include "daemon/serve/values.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "daemon/serve/questions.h"
#include "daemon/serve/reply.h"
#include "daemon/serve/service_internal.h"
#include "lib/cleanup.h"
#include "lib/news.h"

/* A reader with more than this part of limits.stream_buffer unsent is passed over. */
#define ROOM_PART 4u

static const char *const sections[] = {NEWS_FLAT_SECTIONS, NEWS_PROMETHEUS};

/* What was said of a model last. */
struct said {
    char name[WIRE_MAX_MODEL_NAME + 1];
    uint64_t entry_digest; /* of the entry that it was said of */
    uint64_t digest;
    uint64_t push; /* number of the last push in which the model was there */
    UT_hash_handle hh;
};

struct values_reader {
    struct values_reader *previous, *next;
    struct request *request;
    bool whole; /* its next push has everything */
    bool lost;  /* for it was passed over */
};

struct values {
    struct service *service;
    int timer_fd;
    struct values_reader *readers;
    bool armed;
    uint64_t pushed_us, pushes;
    struct said *said;
    uint64_t section_digests[ELEMENTSOF(sections)];
    bool draining;             /* as it was said */
    struct wire_buffer frames; /* of a push, their ids still 0 */
};

int values_new(struct service *service, struct values **ret_values)
{
    struct values *values = calloc(1, sizeof(*values));

    if (!values)
        return -ENOMEM;
    values->service = service;
    values->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (values->timer_fd < 0) {
        int r = -errno;
        free(values);
        return r;
    }
    *ret_values = values;
    return 0;
}

static void forget_all(struct values *values)
{
    struct said *said, *next;

    HASH_ITER (hh, values->said, said, next) {
        HASH_DEL(values->said, said);
        free(said);
    }
    memset(values->section_digests, 0, sizeof(values->section_digests));
    wire_buffer_done(&values->frames);
}

struct values *values_free(struct values *values)
{
    if (!values)
        return NULL;
    forget_all(values);
    close(values->timer_fd);
    free(values);
    return NULL;
}

int values_fd(const struct values *values)
{
    return values->timer_fd;
}

void values_touch(struct values *values)
{
    uint64_t now, due;
    struct itimerspec at = {0};

    if (!values->readers || values->armed)
        return;
    now = service_now_us(values->service);
    due = values->pushed_us + VALUES_PACE_US;
    due = values->pushes > 0 && due > now ? due - now : 1;
    at.it_value = (struct timespec){.tv_sec = (time_t)(due / 1000000u),
                                    .tv_nsec = (long)(due % 1000000u) * 1000};
    values->armed = timerfd_settime(values->timer_fd, 0, &at, NULL) == 0;
}

/* ---- what a push says ---- */

/* FNV-1a, 64 bits: tells whether bytes are those of the last time. */
static uint64_t digest_of(const uint8_t *bytes, size_t len)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (size_t i = 0; i < len; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* The frame that was put last at `at` stays where it says something new. */
static void keep_if_new(struct wire_buffer *out, size_t at, uint64_t *digest, bool whole)
{
    uint64_t now;

    if (whole || out->failed)
        return;
    now = digest_of(out->data + at, out->len - at);
    if (now == *digest)
        out->len = at;
    *digest = now;
}

static struct said *said_of(struct values *values, const char *name)
{
    struct said *said;

    HASH_FIND_STR(values->said, name, said);
    if (said)
        return said;
    said = calloc(1, sizeof(*said));
    if (!said)
        return NULL;
    snprintf(said->name, sizeof(said->name), "%s", name);
    HASH_ADD_STR(values->said, name, said);
    if (!hash_added(&said->hh))
        free(TAKE_PTR(said));
    return said;
}

/* What is said of a model follows from its entry, from what never changes (its model, its part of
 * the configuration), from the memory that the engine has for it and from the progress of its load:
 * where the first and the third are those of the last time and nothing is loading, there is no need
 * to make the text. */
static uint64_t digest_of_entry(const struct model_entry *entry)
{
    uint64_t words[sizeof(*entry) / sizeof(uint64_t) + 1], hash = 0xcbf29ce484222325u;

    static_assert(sizeof(*entry) % sizeof(uint64_t) == 0, "no bytes behind the words");
    memcpy(words, entry, sizeof(*entry));
    words[ELEMENTSOF(words) - 1] = registry_memory_bytes(entry);
    for (size_t i = 0; i < ELEMENTSOF(words); i++) {
        hash = (hash ^ words[i]) * 0x100000001b3u;
        hash ^= hash >> 32; /* so that high bits count below, too */
    }
    return hash;
}

static bool said_already(struct said *said, const struct model_entry *entry)
{
    uint64_t digest = digest_of_entry(entry);
    bool same = digest == said->entry_digest && !entry->task;

    said->entry_digest = digest;
    return same;
}

static void put_models(struct values *values, struct wire_buffer *out, bool whole)
{
    for (struct model_entry *e = registry_first(values->service->registry); e; e = e->hh.next) {
        struct said *said;
        size_t at = out->len;
        /* A user's own file is that user's alone. */
        if (e->file)
            continue;
        said = whole ? NULL : said_of(values, e->name); /* without memory it is said every time */
        if (said)
            said->push = values->pushes;
        if (said && said_already(said, e))
            continue;
        question_put_model(out, 0, e);
        if (said)
            keep_if_new(out, at, &said->digest, false);
    }
}

/* Models that are gone are named without a state. */
static void put_gone(struct values *values, struct wire_buffer *out)
{
    struct said *said, *next;

    HASH_ITER (hh, values->said, said, next) {
        if (said->push == values->pushes)
            continue;
        wire_begin(out, WIRE_ITEM, 0);
        wire_put_text(out, TAG_MODEL, said->name);
        wire_end(out);
        HASH_DEL(values->said, said);
        free(said);
    }
}

static void put_sections(struct values *values, struct wire_buffer *out, bool whole)
{
    for (size_t i = 0; i < ELEMENTSOF(sections); i++) {
        size_t at = out->len;
        question_put_section(values->service, out, 0, sections[i]);
        keep_if_new(out, at, &values->section_digests[i], whole);
    }
}

/* Everything, or what is new; empty where nothing is. */
static void put_push(struct values *values, bool whole)
{
    struct wire_buffer *out = &values->frames;
    bool draining = values->service->draining;

    out->len = 0;
    put_models(values, out, whole);
    if (!whole)
        put_gone(values, out);
    put_sections(values, out, whole);
    if (whole || out->len > 0 || draining != values->draining)
        question_put_status(values->service, out, 0);
    if (!whole)
        values->draining = draining;
}

/* ---- to the readers ---- */

/* Gives the copied frames the reader's id. */
static void stamp_ids(uint8_t *frames, size_t len, uint64_t id)
{
    uint64_t little = htole64(id);

    for (size_t at = 0; at < len;) {
        struct wire_header header;
        wire_header_read(frames + at, &header);
        memcpy(frames + at + WIRE_HEADER_ID_AT, &little, sizeof(little));
        at += WIRE_HEADER_BYTES + header.body_len;
    }
}

static void send_push(const struct values *values, struct values_reader *reader)
{
    struct peer *peer = reader->request->peer;
    uint64_t id = reader->request->key.id;
    size_t at;

    if (values->frames.len == 0 || values->frames.failed)
        return;
    if (reader->lost) {
        struct wire_buffer *out = reply_begin(peer, WIRE_ITEM, id);
        wire_put_number(out, TAG_LOST, 1);
        reply_end(peer);
    }
    reader->whole = reader->lost = false;
    peer->tail = NULL;
    at = peer->out.len;
    wire_append(&peer->out, values->frames.data, values->frames.len);
    if (!peer->out.failed)
        stamp_ids(peer->out.data + at, values->frames.len, id);
    peer->wants_flush(peer);
}

static bool has_room(const struct values *values, const struct values_reader *reader)
{
    return peer_unsent(reader->request->peer) <
           values->service->options.config->limits.stream_buffer / ROOM_PART;
}

static void pass_over(struct values_reader *reader)
{
    reader->whole = reader->lost = true;
    reader->request->peer->congested = true;
}

static bool loading(const struct service *service)
{
    for (const struct model_entry *e = registry_first(service->registry); e; e = e->hh.next)
        if (e->task)
            return true;
    return false;
}

static void push(struct values *values)
{
    bool some_whole = false;

    put_push(values, false);
    for (struct values_reader *r = values->readers; r; r = r->next) {
        if (!has_room(values, r))
            pass_over(r);
        else if (!r->whole)
            send_push(values, r);
        some_whole |= r->whole;
    }
    if (some_whole)
        put_push(values, true);
    for (struct values_reader *r = values->readers; r && some_whole; r = r->next)
        if (r->whole && has_room(values, r))
            send_push(values, r);
}

/* Memory was out: what was to be said is lost, so everything is said when there is some again. */
static void start_over(struct values *values)
{
    wire_buffer_done(&values->frames);
    for (struct values_reader *r = values->readers; r; r = r->next)
        r->whole = r->lost = true;
    values_touch(values);
}

void values_dispatch(struct values *values)
{
    uint64_t expirations;

    if (read(values->timer_fd, &expirations, sizeof(expirations)) < 0)
        return;
    values->armed = false;
    if (!values->readers)
        return;
    values->pushes++;
    push(values);
    values->pushed_us = service_now_us(values->service);
    if (values->frames.failed)
        start_over(values);
    if (loading(values->service))
        values_touch(values); /* its progress tells nobody by itself */
}

int values_subscribe(struct values *values, struct request *request)
{
    struct values_reader *reader = calloc(1, sizeof(*reader));

    if (!reader)
        return -ENOMEM;
    reader->request = request;
    reader->whole = true;
    reader->next = values->readers;
    if (values->readers)
        values->readers->previous = reader;
    values->readers = reader;
    request->reader = reader;
    values_touch(values);
    return 0;
}

void values_unsubscribe(struct values *values, struct request *request)
{
    struct values_reader *reader = request->reader;

    if (reader->previous)
        reader->previous->next = reader->next;
    else
        values->readers = reader->next;
    if (reader->next)
        reader->next->previous = reader->previous;
    free(reader);
    request->reader = NULL;
    if (!values->readers)
        forget_all(values);
}

void values_resume(struct values *values, struct request *request)
{
    const struct values_reader *reader = request->reader;

    if (reader->whole)
        values_touch(values);
}
