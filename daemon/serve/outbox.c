#include "daemon/serve/outbox.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* A batch that grew beyond this gives its memory back once it is empty. */
#define OUTBOX_KEEP_BYTES (1u << 20)

struct outbox {
    struct outbox_batch collecting; /* the engine thread's */
    struct outbox_batch taken;      /* the reactor's */
    pthread_mutex_t lock;           /* guards `handed` */
    struct outbox_batch handed;
    int fd;
};

int outbox_new(struct outbox **ret_outbox)
{
    struct outbox *outbox = calloc(1, sizeof(*outbox));

    if (!outbox)
        return -ENOMEM;
    outbox->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (outbox->fd < 0) {
        int r = -errno;
        free(outbox);
        return r;
    }
    pthread_mutex_init(&outbox->lock, NULL);
    *ret_outbox = outbox;
    return 0;
}

static void batch_done(struct outbox_batch *batch)
{
    free(batch->events);
    free(batch->text);
}

struct outbox *outbox_free(struct outbox *outbox)
{
    if (!outbox)
        return NULL;
    batch_done(&outbox->collecting);
    batch_done(&outbox->handed);
    batch_done(&outbox->taken);
    pthread_mutex_destroy(&outbox->lock);
    close(outbox->fd);
    free(outbox);
    return NULL;
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

int outbox_reserve(struct outbox *outbox, size_t n)
{
    return batch_reserve(&outbox->collecting, n, 0);
}

int outbox_text(struct outbox *outbox, uint32_t kind, void *subject, const char *text, size_t len)
{
    struct outbox_batch *batch = &outbox->collecting;

    if (len > UINT32_MAX || batch_reserve(batch, 1, len) < 0)
        return -ENOMEM;
    batch->events[batch->n_events++] = (struct outbox_event){.kind = kind,
                                                             .subject = subject,
                                                             .text_at = batch->text_bytes,
                                                             .text_bytes = (uint32_t)len};
    if (len > 0)
        memcpy(batch->text + batch->text_bytes, text, len);
    batch->text_bytes += len;
    return 0;
}

int outbox_note(struct outbox *outbox, uint32_t kind, void *subject)
{
    return outbox_text(outbox, kind, subject, NULL, 0);
}

static void batch_clear(struct outbox_batch *batch)
{
    batch->n_events = batch->text_bytes = 0;
    if (batch->events_capacity * sizeof(*batch->events) > OUTBOX_KEEP_BYTES ||
        batch->text_capacity > OUTBOX_KEEP_BYTES) {
        batch_done(batch);
        memset(batch, 0, sizeof(*batch));
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
    batch_clear(&outbox->collecting);
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
    batch_clear(&outbox->taken);
    pthread_mutex_lock(&outbox->lock);
    swap = outbox->taken;
    outbox->taken = outbox->handed;
    outbox->handed = swap;
    pthread_mutex_unlock(&outbox->lock);
    return &outbox->taken;
}
