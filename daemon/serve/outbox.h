/* The outbox: text and endings on their way from the engine thread to the reactor.
 *
 * The engine thread collects the events of a step and hands them over at once; the reactor takes
 * all there are at once. The descriptor is written only when the outbox was empty. Text is bounded
 * by the streams' windows; notes by what the reactor has sent, as each answers one of its messages:
 * room for all of them is there from the start, so that no ending is ever lost for want of memory.
 *
 * Hides the lock and the buffers, which change hands and are used again.
 * Threads: outbox_text(), outbox_note(), outbox_flush() the engine thread; the rest the reactor. */
#ifndef HEARTH_SERVE_OUTBOX_H
#define HEARTH_SERVE_OUTBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct outbox;

struct outbox_event {
    uint32_t kind;
    uint32_t text_bytes;
    size_t text_at; /* offset in the batch's text */
    void *subject;
};

struct outbox_batch {
    struct outbox_event *events;
    size_t n_events, events_capacity;
    char *text;
    size_t text_bytes, text_capacity;
};

/* `max_notes`: most that are on their way at once. */
int outbox_new(size_t max_notes, struct outbox **ret_outbox);
struct outbox *outbox_free(struct outbox *outbox);

/* Adds text of a kind about a subject; nothing is seen by the reactor before outbox_flush().
 * -ENOMEM: nothing was added. */
int outbox_text(struct outbox *outbox, uint32_t kind, void *subject, const char *text, size_t len);
/* The same without text; cannot fail. */
void outbox_note(struct outbox *outbox, uint32_t kind, void *subject);
/* Hands over what was collected. False: out of memory, try again. */
bool outbox_flush(struct outbox *outbox);

int outbox_fd(const struct outbox *outbox);
/* Everything there is (valid until the next take); clears the descriptor. */
const struct outbox_batch *outbox_take(struct outbox *outbox);

#endif
