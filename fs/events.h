/* Events: the news of the daemon that the file `events` still holds, and where its readers are.
 *
 * A ring of lines with running numbers. Each open file has a reader of its own, which begins with
 * what comes after it was opened; one that the ring has overtaken gets one line that says how many
 * events it missed, then goes on with the oldest there is. Lines are given whole as far as the
 * caller's room goes; the rest of a line that was cut is kept by its reader and comes next,
 * whatever happens to the ring.
 *
 * Hides: the ring, its numbers. Does no input or output. Thread: the caller's. */
#ifndef HEARTH_FS_EVENTS_H
#define HEARTH_FS_EVENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A longer line counts as lost. */
#define EVENTS_LINE_BYTES_MAX 4096u

struct events;

/* Zero-initialised only by events_reader_init(). */
struct events_reader {
    uint64_t at;   /* number of the event to come next */
    uint64_t told; /* of the daemon's events: given, or told to be lost */
    char *rest;    /* of a line that has been given in part */
    size_t rest_at, rest_bytes;
};

int events_new(struct events **ret_events);
struct events *events_free(struct events *events);

/* The daemon's next event: one line, its end added where it has none. */
void events_push(struct events *events, const char *text);
/* The daemon has left out `n` events here. */
void events_push_lost(struct events *events, uint64_t n);
/* Grows with every event. */
uint64_t events_pushed(const struct events *events);

/* From now on. */
void events_reader_init(const struct events *events, struct events_reader *reader);
void events_reader_done(struct events_reader *reader);
/* Whether events_read() gives something. */
bool events_pending(const struct events *events, const struct events_reader *reader);
/* Moves text of at most `size` bytes to the reader; returns how many, 0 where there is no news (or
 * no room), or -ENOMEM. */
int events_read(const struct events *events, struct events_reader *reader, char *ret_text,
                size_t size, size_t *ret_bytes);

#endif
