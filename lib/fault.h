/* A fault: the sentence that goes with a negative errno on its way up to the user.
 *
 * A function that can fail for a reason worth telling takes a `struct fault *ret_fault` (NULL is
 * allowed), and on failure returns a negative errno and writes a sentence that names the thing, the
 * reason and, where there is one, the remedy. Hides the formatting and its bound. Thread: the
 * caller's. */
#ifndef HEARTH_LIB_FAULT_H
#define HEARTH_LIB_FAULT_H

#include <stdarg.h>
#include <stdio.h>

/* Enough for a path's end, a key and a reason; longer sentences are cut, never overrun. */
#define FAULT_TEXT_BYTES 320

struct fault {
    char text[FAULT_TEXT_BYTES];
};

/* Writes the sentence and returns `error` (a negative errno), so that callers can
 * `return fault_set(f, -EINVAL, ...)`. */
__attribute__((format(printf, 3, 4))) static inline int fault_set(struct fault *ret_fault,
                                                                   int error, const char *format,
                                                                   ...)
{
    if (ret_fault) {
        va_list ap;
        va_start(ap, format);
        vsnprintf(ret_fault->text, sizeof(ret_fault->text), format, ap);
        va_end(ap);
    }
    return error;
}

#endif
