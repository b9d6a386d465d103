/* Structs that begin with their size: how this library reads what a program built against another
 * version of hearth.h hands in.
 *
 * A struct grows only at its end, and what a member does not say is 0 or the default. So a shorter
 * one (an older program), down to the first version's size, is taken with the rest as it was; a
 * longer one (a newer program) is taken while all that this version does not know is zero.
 *
 * Hides: the first versions' sizes. Thread: any. */
#ifndef HEARTH_LIB_SIZED_H
#define HEARTH_LIB_SIZED_H

#include "lib/fault.h"
#include "lib/hearth.h"

struct sized {
    const char *name, *init; /* of the struct, and of the macro that a program starts from */
    size_t first_bytes;      /* of the first version */
    size_t bytes;            /* of this one */
};

extern const struct sized sized_options, sized_generate, sized_set;

/* Copies `given` over *ret_known, a struct of this version that has its defaults, and sets its
 * size. -EINVAL, with *ret_known as it was: shorter than the first version, or set in what is not
 * known. */
int sized_read(const struct sized *type, const void *given, void *ret_known,
               struct fault *ret_fault);
/* The same of a pool's options, whose embedded struct has a size and an end of its own. */
int sized_read_pool_options(const struct hearth_pool_options *given,
                            struct hearth_pool_options *ret_known, struct fault *ret_fault);

#endif
