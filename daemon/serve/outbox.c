#include "daemon/serve/outbox.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* A batch's text that grew beyond this is given back once it is empty. */
#define OUTBOX_KEEP_BYTES (1u << 20)

/* Texts that a batch has room for from the start, beside its notes. */
#define OUTBOX_FIRST_TEXTS 1024u

struct outbox {
    size_t max_notes;
    struct outbox_batch collecting; /* the engine thread's */
    size_t n_texts;                 /* of its events */
    struct outbox_batch taken;      /* the reactor's */
    pthread_mutex_t lock;           /* guards `handed` */
    struct outbox_batch handed;
    int fd;
};

static void batch_done(struct outbox_batch *batch)
{
    free(batch->events);
    free(batch->text);
}

static int grow(void **data, size_t *capacity, size_t need, size_t element_bytes)
{
    size_t n = *capacity ? *capacity : 256;
    void *grown;

    if (need <= *capacity)
        return 0;
    while (n < need)
        n *= 2;
    grown = reallocarray(*data, n, element_bytes);
    if (!grown)
        return -ENOMEM;
    *data = grown;
    *capacity = n;
    return 0;
}

static int batch_reserve(struct outbox_batch *batch, size_t n_events, size_t text_bytes)
{
    void *events = batch->events, *text = batch->text;
    int r =
        grow(&events, &batch->events_capacity, batch->n_events + n_events, sizeof(*batch->events));

    batch->events = events;
    if (r == 0)
        r = grow(&text, &batch->text_capacity, batch->text_bytes + text_bytes, 1);
    batch->text = text;
    return r;
}

int outbox_new(size_t max_notes, struct outbox **ret_outbox)
{
    struct outbox *outbox = calloc(1, sizeof(*outbox));
    size_t n = max_notes + OUTBOX_FIRST_TEXTS;
    int r = 0;

    if (!outbox)
        return -ENOMEM;
    outbox->max_notes = max_notes;
    pthread_mutex_init(&outbox->lock, NULL);
    outbox->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (outbox->fd < 0)
        r = -errno;
    /* The three change places, so each has room for all notes. Pages that are not touched cost
     * nothing. */
    if (r == 0)
        r = batch_reserve(&outbox->collecting, n, 0);
    if (r == 0)
        r = batch_reserve(&outbox->handed, n, 0);
    if (r == 0)
        r = batch_reserve(&outbox->taken, n, 0);
    if (r < 0) {
        outbox_free(outbox);
        return r;
    }
    *ret_outbox = outbox;
    return 0;
}

struct outbox *outbox_free(struct outbox *outbox)
{
    if (!outbox)
        return NULL;
    batch_done(&outbox->collecting);
    batch_done(&outbox->handed);
    batch_done(&outbox->taken);
    pthread_mutex_destroy(&outbox->lock);
    if (outbox->fd >= 0)
        close(outbox->fd);
    free(outbox);
    return NULL;
}

static void put(struct outbox_batch *batch, uint32_t kind, void *subject, size_t text_bytes)
{
    batch->events[batch->n_events++] = (struct outbox_event){.kind = kind,
                                                             .subject = subject,
                                                             .text_at = batch->text_bytes,
                                                             .text_bytes = (uint32_t)text_bytes};
}

int outbox_text(struct outbox *outbox, uint32_t kind, void *subject, const char *text, size_t len)
{
    struct outbox_batch *batch = &outbox->collecting;
    /* Room for all notes stays free behind the texts. */
    size_t need = outbox->n_texts + 1 + outbox->max_notes;

    if (len > UINT32_MAX || batch_reserve(batch, need - MIN(need, batch->n_events), len) < 0)
        return -ENOMEM;
    put(batch, kind, subject, len);
    if (len > 0)
        memcpy(batch->text + batch->text_bytes, text, len);
    batch->text_bytes += len;
    outbox->n_texts++;
    return 0;
}

void outbox_note(struct outbox *outbox, uint32_t kind, void *subject)
{
    assert(outbox->collecting.n_events - outbox->n_texts < outbox->max_notes);
    put(&outbox->collecting, kind, subject, 0);
}

/* Empties a batch; what it needed beyond its first room goes back. */
static void batch_clear(const struct outbox *outbox, struct outbox_batch *batch)
{
    size_t first = outbox->max_notes + OUTBOX_FIRST_TEXTS;

    batch->n_events = batch->text_bytes = 0;
    if (batch->text_capacity > OUTBOX_KEEP_BYTES) {
        free(batch->text);
        batch->text = NULL;
        batch->text_capacity = 0;
    }
    if (batch->events_capacity > 2 * first) {
        void *events = reallocarray(batch->events, first, sizeof(*batch->events));
        if (events) { /* else it stays large */
            batch->events = events;
            batch->events_capacity = first;
        }
    }
}

/* Appends what was collected to what the reactor has not taken yet. */
static int batch_append(struct outbox_batch *to, const struct outbox_batch *from)
{
    if (batch_reserve(to, from->n_events, from->text_bytes) < 0)
        return -ENOMEM;
    for (size_t i = 0; i < from->n_events; i++) {
        struct outbox_event event = from->events[i];
        event.text_at += to->text_bytes;
        to->events[to->n_events++] = event;
    }
    if (from->text_bytes > 0)
        memcpy(to->text + to->text_bytes, from->text, from->text_bytes);
    to->text_bytes += from->text_bytes;
    return 0;
}

bool outbox_flush(struct outbox *outbox)
{
    bool was_empty;

    if (outbox->collecting.n_events == 0)
        return true;
    pthread_mutex_lock(&outbox->lock);
    was_empty = outbox->handed.n_events == 0;
    if (was_empty) {
        struct outbox_batch swap = outbox->handed;
        outbox->handed = outbox->collecting;
        outbox->collecting = swap;
    } else if (batch_append(&outbox->handed, &outbox->collecting) < 0) {
        /* Out of memory: what was collected stays so and goes with the next flush. */
        pthread_mutex_unlock(&outbox->lock);
        return false;
    }
    pthread_mutex_unlock(&outbox->lock);
    batch_clear(outbox, &outbox->collecting);
    outbox->n_texts = 0;
    if (was_empty) {
        ssize_t n = write(outbox->fd, &(uint64_t){1}, sizeof(uint64_t));
        (void)n; /* full: the reactor is being woken already */
    }
    return true;
}

int outbox_fd(const struct outbox *outbox)
{
    return outbox->fd;
}

const struct outbox_batch *outbox_take(struct outbox *outbox)
{
    struct outbox_batch swap;
    uint64_t count;
    ssize_t n = read(outbox->fd, &count, sizeof(count));

    (void)n; /* empty: somebody asked without having been woken */
    batch_clear(outbox, &outbox->taken);
    pthread_mutex_lock(&outbox->lock);
    swap = outbox->taken;
    outbox->taken = outbox->handed;
    outbox->handed = swap;
    pthread_mutex_unlock(&outbox->lock);
    return &outbox->taken;
}
