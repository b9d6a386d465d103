/* Under ThreadSanitizer: four threads push, one sleeps on the descriptor and takes, one asks for
 * the length. */
#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

#include "daemon/queue.h"

#define WRITERS           4
#define MESSAGES_A_WRITER 20000
#define CAPACITY          32
#define WAKEUP_LIMIT_MS   30000

static struct queue *queue;
static atomic_bool over;

static void *push_all(void *arg)
{
    uint32_t writer = *(const uint32_t *)arg;
    for (uint32_t i = 0; i < MESSAGES_A_WRITER;) {
        struct message message = {.kind = writer, .number = i, .subject = arg};
        if (queue_push(queue, &message) == 0)
            i++;
        else
            sched_yield();
    }
    return NULL;
}

static void *watch_length(void *unused)
{
    while (!atomic_load(&over))
        assert(queue_length(queue) <= CAPACITY);
    return unused;
}

static size_t take_some(uint32_t next[WRITERS])
{
    struct pollfd p = {.fd = queue_fd(queue), .events = POLLIN};
    const struct message *messages;
    int n_ready = poll(&p, 1, WAKEUP_LIMIT_MS);
    assert(n_ready == 1);
    queue_clear_wakeup(queue);
    size_t n = queue_take(queue, &messages);
    for (size_t i = 0; i < n; i++) {
        assert(messages[i].number == next[messages[i].kind]);
        assert(*(const uint32_t *)messages[i].subject == messages[i].kind);
        next[messages[i].kind]++;
    }
    return n;
}

int main(void)
{
    static uint32_t numbers[WRITERS], next[WRITERS];
    pthread_t writers[WRITERS], watcher;
    size_t total = 0;
    int r = queue_new(CAPACITY, &queue);
    assert(r == 0);
    pthread_create(&watcher, NULL, watch_length, NULL);
    for (uint32_t i = 0; i < WRITERS; i++) {
        numbers[i] = i;
        pthread_create(&writers[i], NULL, push_all, &numbers[i]);
    }
    while (total < (size_t)WRITERS * MESSAGES_A_WRITER)
        total += take_some(next);
    for (uint32_t i = 0; i < WRITERS; i++)
        pthread_join(writers[i], NULL);
    atomic_store(&over, true);
    pthread_join(watcher, NULL);
    queue_free(queue);
    printf("%zu messages in order\n", total);
    return 0;
}
