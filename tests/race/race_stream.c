/* A stream under ThreadSanitizer: one thread makes text as the engine thread does, another grants
 * credit and says what was delivered as the reactor does, both at odd moments. Every byte must come
 * through once and in order, the stream must never hold more than a token beyond its window, and it
 * must never sleep while it has room: a lost wake-up would end in the poll's time limit. */
#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/queue.h"
#include "daemon/serve/outbox.h"
#include "daemon/serve/streaming.h"

#define ALL_BYTES    (8u << 20)
#define BUFFER_BYTES 4096u
#define MOST_PIECE   24u
#define LIMIT_MS     30000

struct world {
    struct stream stream;
    struct outbox *outbox;
    struct queue *unparks;
    uint64_t made; /* the engine side's */
    uint32_t n_parked;
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

static void wait_for_room(struct world *world)
{
    struct pollfd pollfd = {.fd = queue_fd(world->unparks), .events = POLLIN};
    const struct message *messages;

    world->n_parked++;
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

static void unpark(struct world *world, bool parked)
{
    if (parked)
        assert(queue_push(world->unparks, &(struct message){.kind = 1}) == 0);
}

int main(void)
{
    struct world world = {0};
    uint64_t got = 0, undelivered = 0;
    unsigned random = 2;
    pthread_t thread;
    bool over = false;

    assert(outbox_new(64, &world.outbox) == 0 && queue_new(64, &world.unparks) == 0);
    stream_init(&world.stream, 100, BUFFER_BYTES, false, 0, NULL);
    assert(pthread_create(&thread, NULL, engine_side, &world) == 0);
    while (!over) {
        struct pollfd pollfd = {.fd = outbox_fd(world.outbox), .events = POLLIN};
        const struct outbox_batch *batch;
        assert(poll(&pollfd, 1, LIMIT_MS) == 1);
        batch = outbox_take(world.outbox);
        for (size_t i = 0; i < batch->n_events; i++) {
            const struct outbox_event *event = &batch->events[i];
            over = event->kind == 2;
            for (uint32_t k = 0; k < event->text_bytes; k++)
                assert(batch->text[event->text_at + k] == byte_at(got++));
            undelivered += event->text_bytes;
            assert(got <= world.stream.granted_bytes && undelivered <= BUFFER_BYTES);
            /* Now and then the connection is full for a while, or its reader is slow. */
            if (next_random(&random, 3) > 0)
                continue;
            unpark(&world, stream_delivered(&world.stream, undelivered, true));
            undelivered = 0;
            unpark(&world, stream_grant(&world.stream, next_random(&random, 3 * BUFFER_BYTES)));
        }
        unpark(&world, stream_delivered(&world.stream, undelivered, true));
        undelivered = 0;
        unpark(&world, stream_grant(&world.stream, 1 + next_random(&random, 64)));
    }
    pthread_join(thread, NULL);
    assert(got == ALL_BYTES);
    stream_done(&world.stream);
    outbox_free(world.outbox);
    queue_free(world.unparks);
    printf("%u bytes, parked %u times\n", ALL_BYTES, world.n_parked);
    return 0;
}
