/* Residency: which models stay in memory.
 *
 * A function of (what is loaded, now): given the budget and what a newcomer needs, names the models
 * that should go, the least recently used first; never one that is pinned, held or in use. Knows no
 * files and no threads, so that simulations run it in virtual time.
 *
 * Hides the order of giving way. Thread: none of its own; the reactor calls it. */
#ifndef HEARTH_MODEL_RESIDENCY_H
#define HEARTH_MODEL_RESIDENCY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct resident {
    uint64_t bytes;
    uint64_t last_used_us;
    bool fixed;   /* pinned or held: stays */
    bool busy;    /* in use or on its way in: stays for now */
    bool leaving; /* draining: its bytes will come free by themselves */
};

enum residency_verdict {
    RESIDENCY_FITS,       /* go on */
    RESIDENCY_EVICT,      /* after the residents in ret_evict (indexes) have gone */
    RESIDENCY_WAIT,       /* until those that leave have gone, or a busy one is idle */
    RESIDENCY_IMPOSSIBLE, /* not while those that are fixed, stay */
};

/* `ret_evict` has room for n_residents indexes; *ret_n_evict of them are set. */
enum residency_verdict residency_decide(const struct resident *residents, size_t n_residents,
                                        uint64_t budget_bytes, uint64_t need_bytes,
                                        size_t *ret_evict, size_t *ret_n_evict);

#endif
