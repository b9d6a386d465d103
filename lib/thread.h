/* Threads: each is started with every signal blocked, for signals are the main thread's, and under
 * a name that ps and top show.
 *
 * Hides the mask and how a name is given. Thread: any. */
#ifndef HEARTH_LIB_THREAD_H
#define HEARTH_LIB_THREAD_H

#include <pthread.h>
#include <signal.h>
#include <stddef.h>

/* `name`: at most 15 bytes, or the thread goes without. ret_thread is written before `fn` runs. */
static inline int thread_start(pthread_t *ret_thread, const char *name, void *(*fn)(void *),
                               void *argument)
{
    sigset_t all, before;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    r = -pthread_create(ret_thread, NULL, fn, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r == 0)
        pthread_setname_np(*ret_thread, name);
    return r;
}

#endif
