/* Deadlines: which job's comes first.
 *
 * A binary heap, the earliest on top; a job knows its place in it (heap_index), so that one leaves
 * from anywhere. Hides the heap; no clock, no meaning of a deadline. Thread: the engine thread. */
#ifndef HEARTH_SERVE_DEADLINES_H
#define HEARTH_SERVE_DEADLINES_H

#include <stddef.h>
#include <stdint.h>

struct job;

struct deadlines {
    struct job **heap; /* by deadline_us */
    size_t n, capacity;
};

/* No job left in it. */
void deadlines_done(struct deadlines *deadlines);
/* -ENOMEM. */
int deadlines_add(struct deadlines *deadlines, struct job *job);
/* Nothing where it is not in. */
void deadlines_remove(struct deadlines *deadlines, struct job *job);
/* Of the jobs that are in no open step the one with the earliest deadline, where that has come, or
 * NULL. */
struct job *deadlines_due(const struct deadlines *deadlines, uint64_t now_us);
/* The earliest of all, or UINT64_MAX. */
uint64_t deadlines_next_us(const struct deadlines *deadlines);

#endif
