/* Queue: messages from any thread to one, which takes all that waits in one go.
 *
 * Bounded; the reader's eventfd is written only when the queue was empty, so a busy reader costs no
 * system call. Hides the lock, the double buffer and the eventfd.
 * Threads: queue_push() any; queue_take() and queue_clear_wakeup() the reader alone. */
#ifndef HEARTH_DAEMON_QUEUE_H
#define HEARTH_DAEMON_QUEUE_H

#include <stddef.h>
#include <stdint.h>

/* One message: what it is, whom it is about, and a number. The queue owns none of it. */
struct message {
    uint32_t kind;
    uint32_t number;
    void *subject;
    uint64_t value;
};

struct queue;

/* -ENOMEM, -EMFILE. `capacity`: most messages that wait at once. */
int queue_new(size_t capacity, struct queue **ret_queue);
struct queue *queue_free(struct queue *queue);
/* 0, or -ENOBUFS when full. */
int queue_push(struct queue *queue, const struct message *message);
/* Swaps the waiting messages out: a pointer valid until the next take, and their number. */
size_t queue_take(struct queue *queue, const struct message **ret_messages);
/* Readable when messages wait (poll it); clear before taking. */
int queue_fd(const struct queue *queue);
void queue_clear_wakeup(struct queue *queue);
/* Messages waiting now. */
size_t queue_length(struct queue *queue);

#endif
