#include "daemon/model/residency.h"

/* The least recently used of those that may go and are not yet named; n_residents: none. */
static size_t next_victim(const struct resident *residents, size_t n_residents, const size_t *named,
                          size_t n_named)
{
    size_t best = n_residents;

    for (size_t i = 0; i < n_residents; i++) {
        bool taken = residents[i].fixed || residents[i].busy || residents[i].leaving ||
                     residents[i].bytes == 0;
        for (size_t j = 0; j < n_named && !taken; j++)
            taken = named[j] == i;
        if (!taken &&
            (best == n_residents || residents[i].last_used_us < residents[best].last_used_us))
            best = i;
    }
    return best;
}

enum residency_verdict residency_decide(const struct resident *residents, size_t n_residents,
                                        uint64_t budget_bytes, uint64_t need_bytes,
                                        size_t *ret_evict, size_t *ret_n_evict)
{
    uint64_t used = 0, leaving = 0, fixed = 0;

    *ret_n_evict = 0;
    for (size_t i = 0; i < n_residents; i++) {
        used += residents[i].bytes;
        if (residents[i].leaving)
            leaving += residents[i].bytes;
        else if (residents[i].fixed)
            fixed += residents[i].bytes;
    }
    if (fixed + need_bytes > budget_bytes)
        return RESIDENCY_IMPOSSIBLE;
    if (used + need_bytes <= budget_bytes)
        return RESIDENCY_FITS;
    if (used - leaving + need_bytes <= budget_bytes)
        return RESIDENCY_WAIT;
    used -= leaving;
    while (used + need_bytes > budget_bytes) {
        size_t victim = next_victim(residents, n_residents, ret_evict, *ret_n_evict);
        if (victim == n_residents) {
            /* Nobody goes in vain: what can be idle later is waited for first. */
            *ret_n_evict = 0;
            return RESIDENCY_WAIT;
        }
        ret_evict[(*ret_n_evict)++] = victim;
        used -= residents[victim].bytes;
    }
    return RESIDENCY_EVICT;
}
