/* Scope-bound clean-up: what a function acquires it gives back on every path out.
 *
 * Hides the compiler's attribute and nothing else. A variable declared with one of these must be
 * initialised where it is declared. */
#ifndef HEARTH_LIB_CLEANUP_H
#define HEARTH_LIB_CLEANUP_H

#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_freep(void *p)
{
    free(*(void **)p);
}

static inline void cleanup_closep(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

#define _cleanup_(fn) __attribute__((cleanup(fn)))
#define _cleanup_free_  _cleanup_(cleanup_freep)
#define _cleanup_close_ _cleanup_(cleanup_closep)

/* Declares `static inline void fnp(type *p)` for a destructor that takes NULL. */
#define DEFINE_CLEANUP(type, fn)              \
    static inline void fn##p(type *p)         \
    {                                         \
        if (*p)                               \
            fn(*p);                           \
    }

/* Hands ownership out of a scope: the value, leaving NULL (or -1) behind. */
#define TAKE_PTR(p)              \
    ({                           \
        __typeof__(p) _t = (p);  \
        (p) = NULL;              \
        _t;                      \
    })
#define TAKE_FD(fd)        \
    ({                     \
        int _fd_t = (fd);  \
        (fd) = -1;         \
        _fd_t;             \
    })

#define ELEMENTSOF(a) (sizeof(a) / sizeof((a)[0]))
#define MIN(a, b)     ((a) < (b) ? (a) : (b))
#define MAX(a, b)     ((a) > (b) ? (a) : (b))

#endif
