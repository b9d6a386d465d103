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

/* As deadlines_due(), of the part of the heap below `at`: as deep as the heap is. */
static struct job *due_below(const struct deadlines *deadlines, size_t at, uint64_t now_us)
{
    struct job *job, *left, *right;

    if (at >= deadlines->n || deadlines->heap[at]->deadline_us > now_us)
        return NULL;
    job = deadlines->heap[at];
    if (job->chunk == 0)
        return job;
    left = due_below(deadlines, 2 * at + 1, now_us);
    right = due_below(deadlines, 2 * at + 2, now_us);
    if (!left || !right)
        return left ? left : right;
    return right->deadline_us < left->deadline_us ? right : left;
}

struct job *deadlines_due(const struct deadlines *deadlines, uint64_t now_us)
{
    return due_below(deadlines, 0, now_us);
}

uint64_t deadlines_next_us(const struct deadlines *deadlines)
{
    return deadlines->n > 0 ? deadlines->heap[0]->deadline_us : UINT64_MAX;
}
