/* A stream under ThreadSanitizer: one thread makes text as the engine thread does, another grants
 * credit and says what was delivered as the reactor does, both at odd moments. Every byte must come
 * through once and in order, the stream must never hold more than a token beyond its window, and it
 * must never sleep while it has room: a lost wake-up would end in the poll's time limit. Credit may
 * end within a character, too: then the stream waits for the rest of it, and goes on with that. */
#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/queue.h"
#include "daemon/serve/outbox.h"
#include "daemon/serve/streaming.h"
#include "lib/cleanup.h"

#define ALL_BYTES    (8u << 20)
#define BUFFER_BYTES 4096u
#define MOST_PIECE   24u
#define LONGEST      4u /* bytes of a character */
#define LIMIT_MS     30000

struct world {
    struct stream stream;
    struct outbox *outbox;
    struct queue *unparks;
    /* The engine side's: text made; waits without room, with less than the next character takes,
     * and those where room had come already. */
    uint64_t made;
    uint32_t n_without, n_short, n_over;
};

/* The text: lines of digits with characters of two, three and four bytes between. */
static char byte_at(uint64_t at)
{
    static const char pattern[] = "0123456789\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\n";

    return pattern[at % (sizeof(pattern) - 1)];
}

static unsigned next_random(unsigned *random, unsigned bound)
{
    *random = *random * 1103515245u + 12345u;
    return *random / 65536 % bound;
}

static void hand_out(struct world *world)
{
    const char *text;
    size_t n;

    while ((n = stream_peek(&world->stream, &text)) > 0) {
        assert(outbox_text(world->outbox, 1, NULL, text, n) == 0);
        stream_consume(&world->stream, n);
    }
    assert(world->stream.capacity <= 2 * BUFFER_BYTES);
}

/* Bytes of the character that begins so. */
static uint32_t character_length(uint8_t first)
{
    return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

static void count_wait(struct world *world)
{
    const struct stream *stream = &world->stream;
    uint64_t room = atomic_load(&stream->window) - stream->taken_bytes;

    if (room == 0)
        world->n_without++;
    else if (stream->ready > 0 && room < character_length((uint8_t)stream->text[0]))
        world->n_short++;
    else
        world->n_over++;
}

static void wait_for_room(struct world *world)
{
    struct pollfd pollfd = {.fd = queue_fd(world->unparks), .events = POLLIN};
    const struct message *messages;

    count_wait(world);
    do {
        assert(outbox_flush(world->outbox));
        if (queue_take(world->unparks, &messages) == 0) {
            assert(poll(&pollfd, 1, LIMIT_MS) == 1); /* else a wake-up was lost */
            queue_clear_wakeup(world->unparks);
        }
        hand_out(world);
    } while (!stream_may_run(&world->stream));
}

static void *engine_side(void *argument)
{
    struct world *world = argument;
    unsigned random = 1;

    while (world->made < ALL_BYTES) {
        char piece[MOST_PIECE];
        uint64_t n = 1 + next_random(&random, MOST_PIECE);
        if (n > ALL_BYTES - world->made)
            n = ALL_BYTES - world->made;
        for (uint64_t i = 0; i < n; i++)
            piece[i] = byte_at(world->made + i);
        assert(stream_push(&world->stream, piece, n) == 0);
        world->made += n;
        hand_out(world);
        if (next_random(&random, 8) == 0)
            assert(outbox_flush(world->outbox));
        if (!stream_may_run(&world->stream))
            wait_for_room(world);
    }
    assert(stream_finish(&world->stream) == 0);
    hand_out(world);
    while (!stream_drained(&world->stream))
        wait_for_room(world);
    outbox_note(world->outbox, 2, NULL);
    assert(outbox_flush(world->outbox));
    return NULL;
}

/* ---- the reactor's side ---- */

struct reader {
    struct world *world;
    uint64_t got, undelivered;
    unsigned random;
    uint32_t n_silent; /* times that it granted more, for no text had come */
    bool over;
};

static void unpark(struct world *world, bool parked)
{
    if (parked)
        assert(queue_push(world->unparks, &(struct message){.kind = 1}) == 0);
}

static void deliver(struct reader *reader)
{
    struct world *world = reader->world;

    unpark(world, stream_delivered(&world->stream, reader->undelivered, true));
    reader->undelivered = 0;
}

static void grant(struct reader *reader, uint64_t bytes)
{
    unpark(reader->world, stream_grant(&reader->world->stream, bytes));
}

/* Credit that it has given and not had text for. */
static uint64_t credit_left(const struct reader *reader)
{
    return reader->world->stream.granted_bytes - reader->got;
}

/* In a thirty-second part of the text it grants no more than a line at once. */
static bool is_miserly(const struct reader *reader)
{
    return (reader->got >> 16) % 32 == 0;
}

static void take_event(struct reader *reader, const struct outbox_batch *batch,
                       const struct outbox_event *event)
{
    reader->over = event->kind == 2;
    for (uint32_t i = 0; i < event->text_bytes; i++)
        assert(batch->text[event->text_at + i] == byte_at(reader->got++));
    reader->undelivered += event->text_bytes;
    assert(reader->got <= reader->world->stream.granted_bytes);
    assert(reader->undelivered <= BUFFER_BYTES);
    /* Now and then the connection is full for a while, or its reader is slow. */
    if (next_random(&reader->random, 3) > 0)
        return;
    deliver(reader);
    if (!is_miserly(reader) && credit_left(reader) < BUFFER_BYTES)
        grant(reader, next_random(&reader->random, 3 * BUFFER_BYTES));
}

/* What comes next. With room for any character something must; with less it may have to wait, and
 * then it is given a byte more. */
static void read_on(struct reader *reader)
{
    const struct stream *stream = &reader->world->stream;
    uint64_t buffer_end = stream->delivered_bytes + BUFFER_BYTES;
    uint64_t room = MIN(stream->granted_bytes, buffer_end) - reader->got;
    struct pollfd pollfd = {.fd = outbox_fd(reader->world->outbox), .events = POLLIN};
    const struct outbox_batch *batch;
    uint64_t got;

    if (poll(&pollfd, 1, room < LONGEST ? 1 : LIMIT_MS) == 0) {
        assert(room < LONGEST);
        reader->n_silent++;
        grant(reader, 1);
        return;
    }
    got = reader->got;
    batch = outbox_take(reader->world->outbox);
    for (size_t i = 0; i < batch->n_events; i++)
        take_event(reader, batch, &batch->events[i]);
    reader->n_silent += reader->got == got && !reader->over;
    deliver(reader);
    /* One that is almost out of it gets the least at times. */
    if (credit_left(reader) < LONGEST && next_random(&reader->random, 2))
        grant(reader, 1);
    else
        grant(reader, 1 + next_random(&reader->random, 64));
}

int main(void)
{
    struct world world = {0};
    struct reader reader = {.world = &world, .random = 2};
    pthread_t thread;

    assert(outbox_new(64, &world.outbox) == 0 && queue_new(64, &world.unparks) == 0);
    stream_init(&world.stream, 100, BUFFER_BYTES, false, 0, NULL);
    assert(pthread_create(&thread, NULL, engine_side, &world) == 0);
    while (!reader.over)
        read_on(&reader);
    pthread_join(thread, NULL);
    assert(reader.got == ALL_BYTES);
    printf("%u bytes; %u waits without room, %u for the rest of a character, %u at once over; "
           "%u times a byte more\n",
           ALL_BYTES, world.n_without, world.n_short, world.n_over, reader.n_silent);
    assert(world.n_without > 0 && world.n_short > 0 && reader.n_silent > 0);
    stream_done(&world.stream);
    outbox_free(world.outbox);
    queue_free(world.unparks);
    return 0;
}
