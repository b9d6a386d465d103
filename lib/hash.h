/* Hash tables: uthash, but that a program whose memory is out goes on.
 *
 * As it comes, uthash ends the process then. Here an element that could not be added is in no
 * table: whoever adds one looks with hash_added(), and takes it back where it was not. Finding and
 * taking out need no memory. Hides the choice. Thread: the table's owner. */
#ifndef HEARTH_LIB_HASH_H
#define HEARTH_LIB_HASH_H

#ifdef UTHASH_H
#error "uthash.h was included by itself: the choice comes too late"
#endif

#include <stdbool.h>

#define HASH_NONFATAL_OOM 1
#include <uthash.h>

/* Whether the element of that handle is in a table after HASH_ADD. */
static inline bool hash_added(const UT_hash_handle *handle)
{
    return handle->tbl != NULL;
}

#endif
