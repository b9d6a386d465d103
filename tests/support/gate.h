/* A gate: what keeps threads in one place until the test lets them go.
 *
 * Shut at first; opened, it stays open for whoever comes. Hides the lock. Threads: any. */
#ifndef HEARTH_TESTS_SUPPORT_GATE_H
#define HEARTH_TESTS_SUPPORT_GATE_H

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdbool.h>
#include <unistd.h>

#define GATE_LIMIT_MS 20000

struct gate {
    pthread_mutex_t lock;
    pthread_cond_t open;
    bool is_open;
    int n_waiting;
};

#define GATE_SHUT                                                     \
    {                                                                 \
        PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, 0 \
    }

static inline void pass_gate(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->n_waiting++;
    while (!gate->is_open)
        pthread_cond_wait(&gate->open, &gate->lock);
    gate->n_waiting--;
    pthread_mutex_unlock(&gate->lock);
}

static inline void open_gate(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->is_open = true;
    pthread_cond_broadcast(&gate->open);
    pthread_mutex_unlock(&gate->lock);
}

/* Nobody may be at it. */
static inline void shut_gate(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->is_open = false;
    pthread_mutex_unlock(&gate->lock);
}

/* Until so many threads stand before it. */
static inline void wait_at_gate(struct gate *gate, int n)
{
    int waiting = 0;

    for (int ms = 0; ms < GATE_LIMIT_MS && waiting < n; ms++) {
        pthread_mutex_lock(&gate->lock);
        waiting = gate->n_waiting;
        pthread_mutex_unlock(&gate->lock);
        usleep(1000);
    }
    cr_assert(waiting >= n, "%d threads at the gate, %d wanted", waiting, n);
}

#endif
