#include "daemon/serve/text_thread.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/registry.h"
#include "daemon/queue.h"
#include "daemon/serve/text_turns.h"
#include "lib/cleanup.h"
#include "lib/thread.h"

enum message_kind { MESSAGE_TEXT, MESSAGE_STOP };

struct text_thread {
    struct queue *in, *out;
    pthread_t thread;
    bool started;
};

int request_tokenize(struct request *request, const struct model *model, bool bare)
{
    const struct tokenizer *tokenizer = model_tokenizer(model);
    int32_t *ids = NULL, *grown;
    size_t n = 0;
    bool bos = !bare && tokenizer_adds_bos(tokenizer) && tokenizer_bos(tokenizer) >= 0;
    int r = tokenizer_encode(tokenizer, request->text, request->text_bytes, &ids, &n);

    if (r < 0) {
        if (r == -E2BIG)
            request_fail(request, CODE_BAD_REQUEST,
                         "the prompt is too intricate for the model's pre-tokenizer; break up its "
                         "longest words");
        else
            request_fail(request, CODE_NO_MEMORY, "no memory to tokenize the prompt");
        return -EINVAL;
    }
    if (bos) {
        grown = reallocarray(ids, n + 1, sizeof(*ids));
        if (!grown) {
            free(ids);
            request_fail(request, CODE_NO_MEMORY, "no memory to tokenize the prompt");
            return -EINVAL;
        }
        ids = grown;
        memmove(ids + 1, ids, n * sizeof(*ids));
        ids[0] = tokenizer_bos(tokenizer);
        n++;
    }
    free(request->text);
    request->text = NULL;
    request->ids = ids;
    request->n_ids = request->n_prompt = request->ids_capacity = (uint32_t)n;
    return 0;
}

/* Takes what has come. False: it is time to stop. */
static bool take_new(struct text_thread *thread, struct text_turns *turns)
{
    const struct message *messages;
    size_t n = queue_take(thread->in, &messages);

    for (size_t i = 0; i < n; i++) {
        if (messages[i].kind == MESSAGE_STOP)
            return false;
        text_turns_add(turns, messages[i].subject);
    }
    return true;
}

static void *text_main(void *argument)
{
    struct text_thread *thread = argument;
    struct pollfd pollfd = {.fd = queue_fd(thread->in), .events = POLLIN};
    struct text_turns turns = {0};

    while (take_new(thread, &turns)) {
        struct request *request = text_turns_take(&turns);
        struct message message = {.kind = MESSAGE_TEXT, .subject = request};
        if (request) {
            request_tokenize(request, request->model->model, request->kind == REQUEST_TOKENIZE);
            queue_push(thread->out, &message); /* as large as the queue in */
            continue;
        }
        poll(&pollfd, 1, -1);
        queue_clear_wakeup(thread->in);
    }
    return NULL;
}

int text_thread_new(size_t max_requests, struct text_thread **ret_thread, struct fault *ret_fault)
{
    struct text_thread *thread = calloc(1, sizeof(*thread));
    int r = thread ? 0 : -ENOMEM;

    if (r == 0)
        r = queue_new(max_requests + 1, &thread->in);
    if (r == 0)
        r = queue_new(max_requests + 1, &thread->out);
    if (r == 0) {
        r = thread_start(&thread->thread, "hearth-text", text_main, thread);
        thread->started = r == 0;
    }
    if (r < 0) {
        text_thread_free(thread);
        return fault_set(ret_fault, r, "cannot start the tokenizer thread: %s", strerror(-r));
    }
    *ret_thread = thread;
    return 0;
}

struct text_thread *text_thread_free(struct text_thread *thread)
{
    struct message stop = {.kind = MESSAGE_STOP};

    if (!thread)
        return NULL;
    if (thread->started) {
        queue_push(thread->in, &stop);
        pthread_join(thread->thread, NULL);
    }
    queue_free(thread->in);
    queue_free(thread->out);
    free(thread);
    return NULL;
}

int text_thread_submit(struct text_thread *thread, struct request *request)
{
    struct message message = {.kind = MESSAGE_TEXT, .subject = request};

    return queue_push(thread->in, &message);
}

int text_thread_fd(const struct text_thread *thread)
{
    return queue_fd(thread->out);
}

void text_thread_take(struct text_thread *thread,
                      void (*fn)(void *userdata, struct request *request), void *userdata)
{
    const struct message *messages;
    size_t n;

    queue_clear_wakeup(thread->out);
    n = queue_take(thread->out, &messages);
    for (size_t i = 0; i < n; i++)
        fn(userdata, messages[i].subject);
}
