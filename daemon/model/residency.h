/* Residency: which models stay in memory.
 *
 * A function of (what is loaded, now): given the budget and what a newcomer needs, names the models
 * that should go, never one that is pinned, held or in use. Who goes first: the model least likely
 * to be wanted soon per byte, or, where no estimate is trusted, the least recently used. No more go
 * than the room asks for. Knows no files and no threads, so that simulations run it in virtual
 * time.
 *
 * Hides the order of giving way. Thread: none of its own; the reactor calls it. */
#ifndef HEARTH_MODEL_RESIDENCY_H
#define HEARTH_MODEL_RESIDENCY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct resident {
    uint64_t bytes;
    uint64_t passing_bytes; /* of these: of one that is fixed, they come free all the same */
    uint64_t last_used_us;
    double wanted; /* the estimate of being wanted soon; only comparisons and sums mean something */
    bool fixed;    /* pinned or held: stays */
    bool busy;     /* in use or on its way in: stays for now */
    bool leaving;  /* draining: its bytes will come free by themselves */
};

enum residency_order {
    RESIDENCY_LRU,         /* the least recently used goes first */
    RESIDENCY_BY_ESTIMATE, /* the least `wanted` per byte goes first */
};

/* A newcomer that nobody has asked for yet comes only where it is worth more than what it
 * displaces: every victim less wanted than it, and all of them together. */
#define RESIDENCY_ASKED_FOR (1.0 / 0.0)

struct newcomer {
    uint64_t bytes;
    double wanted; /* RESIDENCY_ASKED_FOR, or the estimate */
};

enum residency_verdict {
    RESIDENCY_FITS,       /* go on */
    RESIDENCY_EVICT,      /* after the residents in ret_evict (indexes) have gone */
    RESIDENCY_WAIT,       /* until those that leave have gone, or a busy one is idle */
    RESIDENCY_IMPOSSIBLE, /* not while those that are fixed, stay */
    RESIDENCY_WORTHLESS,  /* what would have to go is likelier to be wanted */
};

/* `ret_evict` has room for n_residents indexes; *ret_n_evict of them are set. */
enum residency_verdict residency_decide(const struct resident *residents, size_t n_residents,
                                        enum residency_order order, uint64_t budget_bytes,
                                        const struct newcomer *newcomer, size_t *ret_evict,
                                        size_t *ret_n_evict);

#endif
