#include "daemon/serve/deadlines.h"

#include <errno.h>
#include <stdlib.h>

#include "daemon/serve/batcher.h"

static void place(struct deadlines *deadlines, size_t at, struct job *job)
{
    deadlines->heap[at] = job;
    job->heap_index = at + 1;
}

static void up(struct deadlines *deadlines, size_t at, struct job *job)
{
    while (at > 0) {
        size_t parent = (at - 1) / 2;
        if (deadlines->heap[parent]->deadline_us <= job->deadline_us)
            break;
        place(deadlines, at, deadlines->heap[parent]);
        at = parent;
    }
    place(deadlines, at, job);
}

static void down(struct deadlines *deadlines, size_t at, struct job *job)
{
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= deadlines->n)
            break;
        if (child + 1 < deadlines->n &&
            deadlines->heap[child + 1]->deadline_us < deadlines->heap[child]->deadline_us)
            child++;
        if (deadlines->heap[child]->deadline_us >= job->deadline_us)
            break;
        place(deadlines, at, deadlines->heap[child]);
        at = child;
    }
    place(deadlines, at, job);
}

void deadlines_done(struct deadlines *deadlines)
{
    free(deadlines->heap);
    *deadlines = (struct deadlines){0};
}

int deadlines_add(struct deadlines *deadlines, struct job *job)
{
    if (deadlines->n == deadlines->capacity) {
        size_t capacity = deadlines->capacity ? 2 * deadlines->capacity : 64;
        struct job **heap = reallocarray(deadlines->heap, capacity, sizeof(*heap));
        if (!heap)
            return -ENOMEM;
        deadlines->heap = heap;
        deadlines->capacity = capacity;
    }
    up(deadlines, deadlines->n++, job);
    return 0;
}

void deadlines_remove(struct deadlines *deadlines, struct job *job)
{
    size_t at = job->heap_index - 1;
    struct job *last;

    if (job->heap_index == 0)
        return;
    job->heap_index = 0;
    last = deadlines->heap[--deadlines->n];
    if (last == job)
        return;
    up(deadlines, at, last);
    down(deadlines, last->heap_index - 1, last);
}

struct job *deadlines_first(const struct deadlines *deadlines)
{
    return deadlines->n > 0 ? deadlines->heap[0] : NULL;
}

uint64_t deadlines_next_us(const struct deadlines *deadlines)
{
    return deadlines->n > 0 ? deadlines->heap[0]->deadline_us : UINT64_MAX;
}
