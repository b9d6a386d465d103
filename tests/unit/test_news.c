/* Events: the ring, its readers, and what stands in a line. */
#include <criterion/criterion.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/events.h"
#include "daemon/serve/peer.h"
#include "lib/cleanup.h"
#include "lib/news.h"
#include "tests/support/alloc_fail.h"

#define ROOM_BYTES (1u << 16)

static uint64_t now_us = 1;

static uint64_t virtual_now(const struct clock *clock)
{
    (void)clock;
    return now_us;
}

static const struct clock clock_ = {.now_us = virtual_now};

/* A connection that nobody empties but the test, and its subscription. */
struct seat {
    struct peer peer;
    struct request request;
};

static void wants_flush(struct peer *peer)
{
    (void)peer;
}

static struct events *new_events(void)
{
    struct events *events = NULL;

    cr_assert_eq(events_new(&clock_, ROOM_BYTES, &events), 0);
    return events;
}

static void sit_down(struct events *events, struct seat *seat)
{
    *seat = (struct seat){.peer = {.wants_flush = wants_flush}, .request = {.key = {.id = 7}}};
    seat->request.peer = &seat->peer;
    cr_assert_eq(events_subscribe(events, &seat->request, "running"), 0);
}

static void leave(struct events *events, struct seat *seat)
{
    events_unsubscribe(events, &seat->request);
    wire_buffer_done(&seat->peer.out);
}

/* Takes the next frame out of the connection's output; NULL: there is none. */
static json_t *take(struct seat *seat, uint64_t *ret_lost)
{
    struct wire_header header;
    struct wire_reader reader;
    struct wire_option option;
    json_t *json = NULL;
    uint8_t *at = seat->peer.out.data + seat->peer.out_sent;

    *ret_lost = 0;
    if (peer_unsent(&seat->peer) == 0)
        return NULL;
    cr_assert_eq(wire_header_read(at, &header), 0);
    cr_assert_eq(header.type, WIRE_ITEM);
    cr_assert_eq(header.id, 7);
    wire_reader_init(&reader, at + WIRE_HEADER_BYTES, header.body_len);
    while (wire_reader_next(&reader, &option) > 0) {
        if (option.tag == TAG_LOST)
            wire_option_number(&option, ret_lost);
        else if (option.tag == TAG_TEXT) {
            cr_assert_null(memchr(option.value, '\n', option.len), "one line");
            json = json_loadb((const char *)option.value, option.len, JSON_REJECT_DUPLICATES, NULL);
            cr_assert_not_null(json, "%.*s", (int)option.len, (const char *)option.value);
        }
    }
    seat->peer.out_sent += WIRE_HEADER_BYTES + header.body_len;
    return json;
}

static const char *word(const json_t *json, const char *key)
{
    const char *text = json_string_value(json_object_get(json, key));

    return text ? text : "";
}

/* Takes one and checks what kind of event it is. */
static json_t *must_take(struct seat *seat, const char *what)
{
    uint64_t lost;
    json_t *json = take(seat, &lost);

    cr_assert_not_null(json, "no event where '%s' should be", what);
    cr_assert_str_eq(word(json, "event"), what);
    return json;
}

static void skip(struct seat *seat, const char *what)
{
    json_decref(must_take(seat, what));
}

static void change(struct events *events, struct model_entry *entry, enum model_state state)
{
    entry->was = entry->state;
    entry->state = state;
    events_state(events, entry);
}

Test(news, the_first_line_tells_the_daemon_s_state_to_the_new_reader_alone)
{
    struct events *events = new_events();
    struct seat a, b;
    uint64_t lost;
    json_t *json;

    sit_down(events, &a);
    json = must_take(&a, "daemon");
    cr_assert_str_eq(word(json, "state"), "running");
    cr_assert_str_eq(word(json, "version"), HEARTH_VERSION);
    json_decref(json);
    sit_down(events, &b);
    skip(&b, "daemon");
    cr_assert_null(take(&a, &lost));
    leave(events, &a);
    leave(events, &b);
    events_free(events);
}

Test(news, each_kind_of_event_has_its_members)
{
    struct events *events = new_events();
    struct model_entry entry = {
        .name = "m", .state = MODEL_WARMING, .reserved_bytes = 9, .load_us = 5};
    struct model_entry other = {.name = "n"};
    struct eviction eviction = {&entry, &other, "least recently used", 9, 5};
    struct seat seat;
    json_t *json;

    sit_down(events, &seat);
    skip(&seat, "daemon");
    change(events, &entry, MODEL_READY);
    json = must_take(&seat, "state");
    cr_assert_str_eq(word(json, "model"), "m");
    cr_assert_str_eq(word(json, "from"), "warming");
    cr_assert_str_eq(word(json, "state"), "ready");
    cr_assert_eq(json_integer_value(json_object_get(json, "bytes")), 9);
    cr_assert_eq(json_integer_value(json_object_get(json, "load_us")), 5);
    cr_assert_eq(json_integer_value(json_object_get(json, "seq")), 0);
    json_decref(json);
    events_evicted(events, &eviction);
    json = must_take(&seat, "evicted");
    cr_assert_str_eq(word(json, "for"), "n");
    cr_assert_str_eq(word(json, "why"), "least recently used");
    cr_assert_eq(json_integer_value(json_object_get(json, "reload_us")), 5);
    cr_assert_eq(json_integer_value(json_object_get(json, "seq")), 1);
    json_decref(json);
    events_daemon(events, "draining");
    json = must_take(&seat, "daemon");
    cr_assert_str_eq(word(json, "state"), "draining");
    json_decref(json);
    leave(events, &seat);
    events_free(events);
}

Test(news, whatever_stands_in_a_sentence_the_line_is_json)
{
    static const char *const sentences[] = {"plain",
                                            "with \"quotes\" and \\",
                                            "a\nline\tand\x01 more\x7f",
                                            "g\xc3\xbcltig \xe2\x82\xac",
                                            "not \xff\xfe UTF-8 \xc3",
                                            ""};
    struct events *events = new_events();
    struct model_entry entry = {.name = "m", .code = CODE_LOAD_FAILED};
    struct seat seat;

    sit_down(events, &seat);
    skip(&seat, "daemon");
    for (size_t i = 0; i < ELEMENTSOF(sentences); i++) {
        snprintf(entry.error, sizeof(entry.error), "%s", sentences[i]);
        change(events, &entry, MODEL_FAILED);
        skip(&seat, "state");
        json_t *json = must_take(&seat, "load-failed");
        cr_assert_str_eq(word(json, "code"), "load-failed");
        if (wire_utf8_valid((const uint8_t *)sentences[i], strlen(sentences[i])))
            cr_assert_str_eq(word(json, "sentence"), sentences[i]);
        json_decref(json);
    }
    leave(events, &seat);
    events_free(events);
}

Test(news, a_reader_gets_what_there_is_room_for_and_the_rest_later_without_a_gap)
{
    struct events *events = new_events();
    struct model_entry entry = {.name = "m"};
    struct seat seat;
    uint64_t lost, seq = 0;
    json_t *json;

    sit_down(events, &seat);
    for (int i = 0; i < 500; i++)
        change(events, &entry, i % 2 ? MODEL_COLD : MODEL_QUEUED);
    cr_assert(seat.peer.congested, "the connection is to be told of room");
    cr_assert(peer_unsent(&seat.peer) < ROOM_BYTES / 2, "events leave room for answers");
    skip(&seat, "daemon");
    for (int round = 0; seq < 500; round++) {
        cr_assert(round < 100, "it comes to an end");
        while ((json = take(&seat, &lost))) {
            cr_assert_eq(json_integer_value(json_object_get(json, "seq")), (json_int_t)seq++);
            json_decref(json);
        }
        seat.peer.out.len = seat.peer.out_sent = 0;
        events_resume(events, &seat.request);
    }
    leave(events, &seat);
    events_free(events);
}

/* How many are lost to a reader that has `n` events before it when it may read again. */
static uint64_t lost_after(uint32_t n)
{
    struct events *events = new_events();
    struct model_entry entry = {.name = "m"};
    struct seat seat;
    uint64_t lost = 0, got = 0, seen_lost = 0;
    json_t *json;

    sit_down(events, &seat);
    skip(&seat, "daemon");
    /* No room at all, until they are all there. */
    wire_append(&seat.peer.out, (uint8_t[ROOM_BYTES]){0}, ROOM_BYTES);
    for (uint32_t i = 0; i < n; i++)
        change(events, &entry, MODEL_QUEUED);
    while (got < n - seen_lost) {
        seat.peer.out.len = seat.peer.out_sent = 0;
        events_resume(events, &seat.request);
        cr_assert(peer_unsent(&seat.peer) > 0);
        while ((json = take(&seat, &lost))) {
            if (lost > 0) {
                cr_assert_eq(seen_lost, 0, "once");
                cr_assert_eq(got, 0, "in the place of those that are lost");
                cr_assert_str_eq(word(json, "event"), "lost");
                cr_assert_eq(json_integer_value(json_object_get(json, "count")), (json_int_t)lost);
                seen_lost = lost;
            } else {
                cr_assert_eq(json_integer_value(json_object_get(json, "seq")),
                             (json_int_t)(seen_lost + got++));
            }
            json_decref(json);
        }
    }
    leave(events, &seat);
    events_free(events);
    return seen_lost;
}

Test(news, who_is_more_than_1024_behind_is_told_once_how_many_are_lost)
{
    cr_assert_eq(lost_after(1), 0);
    cr_assert_eq(lost_after(NEWS_EVENTS_KEPT), 0);
    cr_assert_eq(lost_after(NEWS_EVENTS_KEPT + 1), 1);
    cr_assert_eq(lost_after(3 * NEWS_EVENTS_KEPT + 5), 2 * NEWS_EVENTS_KEPT + 5);
}

/* Takes what there is: the numbers of events, and of those that are told to be lost. */
static void count(struct seat *seat, uint64_t *got, uint64_t *lost)
{
    uint64_t lost_now;
    json_t *json;

    while ((json = take(seat, &lost_now))) {
        *lost += lost_now;
        *got += lost_now == 0;
        json_decref(json);
    }
}

Test(news, an_event_there_is_no_memory_for_is_told_as_lost)
{
    struct events *events = new_events();
    struct model_entry entry = {.name = "m"}, failed = {.name = "f", .code = CODE_LOAD_FAILED};
    struct eviction eviction = {&entry, &failed, "least recently used", 9, 5};
    struct seat early, late;
    bool fails = true;
    unsigned n = 0, n_lost = 0;

    sit_down(events, &early);
    skip(&early, "daemon");
    sit_down(events, &late);
    skip(&late, "daemon");
    /* Their output has its memory; the late one has no room in it, and reads from the ring. */
    wire_append(&early.peer.out, (uint8_t[ROOM_BYTES]){0}, ROOM_BYTES);
    wire_append(&late.peer.out, (uint8_t[ROOM_BYTES]){0}, ROOM_BYTES);
    while (fails) {
        uint64_t got = 0, lost = 0;
        early.peer.out.len = early.peer.out_sent = 0;
        alloc_fail_at(++n);
        change(events, &entry, MODEL_QUEUED);
        change(events, &failed, MODEL_FAILED);
        events_evicted(events, &eviction);
        events_predicted(events, &entry, false);
        events_daemon(events, "draining");
        fails = alloc_fail_done();
        count(&early, &got, &lost);
        cr_assert_eq(got + lost, 6, "%u: %lu and %lu lost", n, got, lost);
        cr_assert_eq(lost, fails);
        n_lost += fails;
    }
    cr_assert_eq(n_lost, 12, "each stream, and each text");
    for (uint64_t got = 0, lost = 0; got + lost < 6 * n;) {
        late.peer.out.len = late.peer.out_sent = 0;
        events_resume(events, &late.request);
        cr_assert_gt(peer_unsent(&late.peer), 0);
        count(&late, &got, &lost);
        cr_assert(got + lost < 6 * n || lost == n_lost);
    }
    leave(events, &early);
    leave(events, &late);
    events_free(events);
}

Test(news, those_that_are_lost_in_a_row_are_told_at_once)
{
    struct events *events = new_events();
    struct model_entry entry = {.name = "m"};
    struct seat seat;
    uint64_t lost;
    json_t *json;

    sit_down(events, &seat);
    skip(&seat, "daemon");
    wire_append(&seat.peer.out, (uint8_t[ROOM_BYTES]){0}, ROOM_BYTES);
    /* Five more than are kept; the next five there was no memory for. */
    for (uint32_t i = 0; i < NEWS_EVENTS_KEPT + 5; i++) {
        alloc_fail_at(i < 10 ? 1 : 0);
        change(events, &entry, MODEL_QUEUED);
        cr_assert_eq(alloc_fail_done(), i < 10);
    }
    seat.peer.out.len = seat.peer.out_sent = 0;
    events_resume(events, &seat.request);
    json = take(&seat, &lost);
    cr_assert_eq(lost, 10);
    json_decref(json);
    json = must_take(&seat, "state");
    cr_assert_eq(json_integer_value(json_object_get(json, "seq")), 10);
    json_decref(json);
    leave(events, &seat);
    events_free(events);
}

Test(news, a_subscription_there_is_no_memory_for_is_refused)
{
    struct events *events = new_events();
    struct seat seat = {.peer = {.wants_flush = wants_flush}, .request = {.key = {.id = 7}}};
    unsigned n = 0;
    int r;

    seat.request.peer = &seat.peer;
    wire_append(&seat.peer.out, (uint8_t[ROOM_BYTES]){0}, ROOM_BYTES); /* its memory is there */
    seat.peer.out.len = 0;
    do {
        alloc_fail_at(++n);
        r = events_subscribe(events, &seat.request, "running");
        cr_assert_eq(alloc_fail_done(), r < 0);
        cr_assert(r == 0 || (r == -ENOMEM && !seat.request.reader));
    } while (r < 0);
    cr_assert_eq(n, 4, "a place, a stream and its text");
    skip(&seat, "daemon");
    leave(events, &seat);
    events_free(events);
}

Test(news, readers_come_and_go_in_any_order)
{
    struct events *events = new_events();
    struct model_entry entry = {.name = "m"};
    struct seat seats[4];
    static const int order[] = {1, 3, 0, 2};
    uint64_t lost;

    change(events, &entry, MODEL_QUEUED); /* nobody reads */
    for (size_t i = 0; i < 4; i++) {
        sit_down(events, &seats[i]);
        skip(&seats[i], "daemon");
    }
    for (size_t i = 0; i < 4; i++) {
        change(events, &entry, MODEL_QUEUED);
        for (size_t j = i; j < 4; j++) {
            skip(&seats[order[j]], "state");
            cr_assert_null(take(&seats[order[j]], &lost), "one each");
        }
        leave(events, &seats[order[i]]);
    }
    events_free(events);
}

Test(news, refusals_are_gathered_for_a_second)
{
    struct events *events = new_events();
    struct seat seat;
    uint64_t lost;
    json_t *json;

    now_us = 5000000;
    events_busy(events, 1, "nobody reads, so this is not counted");
    sit_down(events, &seat);
    skip(&seat, "daemon");
    for (int i = 0; i < 10; i++)
        events_busy(events, 1000, "the queue is full");
    json = must_take(&seat, "busy");
    cr_assert_eq(json_integer_value(json_object_get(json, "refused")), 1);
    json_decref(json);
    events_tick(events);
    cr_assert_null(take(&seat, &lost), "the second is not over");
    now_us += EVENTS_BUSY_US;
    events_tick(events);
    json = must_take(&seat, "busy");
    cr_assert_eq(json_integer_value(json_object_get(json, "refused")), 9);
    cr_assert_eq(json_integer_value(json_object_get(json, "uid")), 1000);
    json_decref(json);
    now_us += EVENTS_BUSY_US;
    events_tick(events);
    cr_assert_null(take(&seat, &lost), "nothing was refused since");
    leave(events, &seat);
    events_free(events);
}
