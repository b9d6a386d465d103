/* Parked: requests that cannot be answered yet, kept in a list and never in a thread.
 *
 * Some wait a moment for a fresh copy, and no longer than a time of their own says; some until
 * somebody else does something (`wait`) or the daemon has acknowledged an order. Both are counted
 * by uid, so that one user's readers cannot take all the room.
 *
 * Hides: the list and the counts. What a parked request means is its owner's: the entry is the
 * first member of the owner's struct. Thread: the caller's. */
#ifndef HEARTH_FS_PARKED_H
#define HEARTH_FS_PARKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Long waits of one uid, waits of all kinds of one uid, and of all; beyond it -EAGAIN. */
#define PARKED_LONG_PER_UID_MAX 64u
#define PARKED_PER_UID_MAX      4096u
#define PARKED_MAX              8192u

struct parked {
    struct parked *prev, *next;
    uid_t uid;
    bool is_long;
    uint64_t since_us; /* values must have been asked for at this time or later */
    uint64_t until_us; /* ... unless it is this late; long waits have no such time */
};

/* Zero-initialised: empty. */
struct parked_list {
    struct parked *first;
    size_t n;
};

/* 0 or -EAGAIN. All but the links is set by the caller before. */
int parked_add(struct parked_list *list, struct parked *parked);
void parked_remove(struct parked_list *list, struct parked *parked);
/* The newest `since_us`; 0 where nobody waits. */
uint64_t parked_since_us(const struct parked_list *list);
/* When the first of those who wait for a copy must not wait any longer; UINT64_MAX: nobody does. */
uint64_t parked_due_us(const struct parked_list *list);
/* Whether anybody waits for something other than the next copy. */
bool parked_any_long(const struct parked_list *list);

#endif
