#include "daemon/queue.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lib/cleanup.h"

struct queue {
    pthread_mutex_t lock;    /* guards the three below; nothing else is ever taken under it */
    struct message *filling; /* where pushes go */
    struct message *reading; /* what the last take handed out: the reader's alone until the next */
    size_t length;           /* messages in `filling` */
    size_t capacity;         /* set once */
    int wakeup_fd;           /* set once */
};

int queue_new(size_t capacity, struct queue **ret_queue)
{
    struct queue *q = calloc(1, sizeof(*q));
    if (!q)
        return -ENOMEM;
    pthread_mutex_init(&q->lock, NULL);
    q->capacity = MAX(capacity, (size_t)1);
    q->wakeup_fd = -1;
    q->filling = calloc(q->capacity, sizeof(*q->filling));
    q->reading = calloc(q->capacity, sizeof(*q->reading));
    if (!q->filling || !q->reading) {
        queue_free(q);
        return -ENOMEM;
    }
    q->wakeup_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->wakeup_fd < 0) {
        int error = -errno;
        queue_free(q);
        return error;
    }
    *ret_queue = q;
    return 0;
}

struct queue *queue_free(struct queue *queue)
{
    if (!queue)
        return NULL;
    if (queue->wakeup_fd >= 0)
        close(queue->wakeup_fd);
    free(queue->filling);
    free(queue->reading);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
    return NULL;
}

int queue_push(struct queue *queue, const struct message *message)
{
    pthread_mutex_lock(&queue->lock);
    size_t before = queue->length;
    if (before < queue->capacity)
        queue->filling[queue->length++] = *message;
    pthread_mutex_unlock(&queue->lock);

    if (before >= queue->capacity)
        return -ENOBUFS;
    /* Outside the lock, so that the woken reader does not run into it. A reader that takes the
     * message before this write has one wake-up for nothing, and none is ever missed. The write
     * cannot fail for long: the counter is at most the number of such wake-ups. */
    if (before == 0)
        (void)!eventfd_write(queue->wakeup_fd, 1);
    return 0;
}

size_t queue_take(struct queue *queue, const struct message **ret_messages)
{
    pthread_mutex_lock(&queue->lock);
    struct message *taken = queue->filling;
    size_t n = queue->length;
    queue->filling = queue->reading;
    queue->reading = taken;
    queue->length = 0;
    pthread_mutex_unlock(&queue->lock);
    *ret_messages = taken;
    return n;
}

int queue_fd(const struct queue *queue)
{
    return queue->wakeup_fd;
}

void queue_clear_wakeup(struct queue *queue)
{
    eventfd_t count;
    (void)!eventfd_read(queue->wakeup_fd, &count);
}

size_t queue_length(struct queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    size_t n = queue->length;
    pthread_mutex_unlock(&queue->lock);
    return n;
}
