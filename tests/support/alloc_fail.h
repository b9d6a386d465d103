/* Running out of memory on purpose: the n-th allocation of a thread fails.
 *
 * A test linked with alloc_fail_dep has malloc, calloc, realloc and reallocarray of everything that
 * is linked statically (what ships, not the C library) go through here; and open_memstream, which
 * counts as two: the stream, and the memory of its text, without which it takes nothing. A loop
 * over n = 1, 2, ... until nothing fails any more visits every allocation of a call. Hides: the
 * linker's --wrap. Thread: each is armed for itself. */
#ifndef HEARTH_TESTS_SUPPORT_ALLOC_FAIL_H
#define HEARTH_TESTS_SUPPORT_ALLOC_FAIL_H

#include <stdbool.h>

/* Arms a failure of the n-th allocation from now on (from 1), that one alone; 0: none fails. */
void alloc_fail_at(unsigned n);
/* Disarms; whether an allocation has failed since it was armed. */
bool alloc_fail_done(void);

#endif
