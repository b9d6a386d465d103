/* The outbox: text and endings on their way from the engine thread to the reactor.
 *
 * The engine thread collects the events of a step and hands them over at once; the reactor takes
 * all there are at once. The descriptor is written only when the outbox was empty. Its size needs
 * no bound of its own: text is bounded by the streams' windows and endings by the requests there
 * are.
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

int outbox_new(struct outbox **ret_outbox);
struct outbox *outbox_free(struct outbox *outbox);

/* Adds text of a kind about a subject; nothing is seen by the reactor before outbox_flush().
 * -ENOMEM: nothing was added. */
int outbox_text(struct outbox *outbox, uint32_t kind, void *subject, const char *text, size_t len);
/* The same without text. */
int outbox_note(struct outbox *outbox, uint32_t kind, void *subject);
/* Makes sure that the next `n` notes cannot fail. */
int outbox_reserve(struct outbox *outbox, size_t n);
/* Hands over what was collected. False: out of memory, try again. */
bool outbox_flush(struct outbox *outbox);

int outbox_fd(const struct outbox *outbox);
/* Everything there is (valid until the next take); clears the descriptor. */
const struct outbox_batch *outbox_take(struct outbox *outbox);

#endif
