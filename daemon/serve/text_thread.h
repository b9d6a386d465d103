/* The tokenizer thread: long texts are tokenized here, so that the reactor is never held up by one,
 * and short ones of users who have had their share of its time. Users take turns, a text each: who
 * sends a thousand of them holds up another's by one.
 *
 * A request lent to it comes back through text_thread_take() with its ids or its failure.
 * Hides the thread and its queues. Threads: all functions are the reactor's. */
#ifndef HEARTH_SERVE_TEXT_THREAD_H
#define HEARTH_SERVE_TEXT_THREAD_H

#include <stddef.h>

#include "daemon/serve/request.h"

struct text_thread;

/* `max_requests`: most that are lent at once. */
int text_thread_new(size_t max_requests, struct text_thread **ret_thread, struct fault *ret_fault);
/* Requests that are still inside are dropped and stay the caller's. Returns NULL. */
struct text_thread *text_thread_free(struct text_thread *thread);
int text_thread_submit(struct text_thread *thread, struct request *request);
/* Readable when requests have come back. */
int text_thread_fd(const struct text_thread *thread);
/* Calls `fn` for each of them. */
void text_thread_take(struct text_thread *thread,
                      void (*fn)(void *userdata, struct request *request), void *userdata);

/* Makes ids of the request's text (BOS in front where the model's file says so), on any thread. A
 * failure is noted in the request: -EINVAL. `bare`: as `tokenize` wants it, without BOS. */
int request_tokenize(struct request *request, const struct model *model, bool bare);

#endif
