#include "daemon/model/residency.h"

/* Whether `a` gives way before `b`. Between equals the least recently used goes. */
static bool goes_before(const struct resident *a, const struct resident *b,
                        enum residency_order order)
{
    if (order == RESIDENCY_BY_ESTIMATE) {
        double per_byte_a = a->wanted / (double)a->bytes;
        double per_byte_b = b->wanted / (double)b->bytes;
        if (per_byte_a < per_byte_b || per_byte_a > per_byte_b)
            return per_byte_a < per_byte_b;
    }
    return a->last_used_us < b->last_used_us;
}

/* The first to give way of those that may go and are not yet named; n_residents: none. */
static size_t next_victim(const struct resident *residents, size_t n_residents,
                          enum residency_order order, double below, const size_t *named,
                          size_t n_named)
{
    size_t best = n_residents;

    for (size_t i = 0; i < n_residents; i++) {
        bool taken = residents[i].fixed || residents[i].busy || residents[i].leaving ||
                     residents[i].bytes == 0 || residents[i].wanted >= below;
        for (size_t j = 0; j < n_named && !taken; j++)
            taken = named[j] == i;
        if (!taken && (best == n_residents || goes_before(&residents[i], &residents[best], order)))
            best = i;
    }
    return best;
}

/* A large victim named late may have made earlier ones needless: those that were to stay longest
 * are spared first. `spare_bytes`: what is free beyond the need once all of them are gone. */
static void spare_needless(const struct resident *residents, uint64_t spare_bytes, size_t *evict,
                           size_t *n_evict)
{
    for (size_t i = *n_evict; i-- > 0;) {
        if (residents[evict[i]].bytes > spare_bytes)
            continue;
        spare_bytes -= residents[evict[i]].bytes;
        for (size_t j = i + 1; j < *n_evict; j++)
            evict[j - 1] = evict[j];
        (*n_evict)--;
    }
}

/* What is in use, what leaves, and what stays whatever happens, in bytes. */
struct sums {
    uint64_t used, leaving, fixed;
};

static struct sums sum_up(const struct resident *residents, size_t n_residents)
{
    struct sums sums = {0};

    for (size_t i = 0; i < n_residents; i++) {
        sums.used += residents[i].bytes;
        if (residents[i].leaving)
            sums.leaving += residents[i].bytes;
        else if (residents[i].fixed)
            sums.fixed += residents[i].bytes - residents[i].passing_bytes;
    }
    return sums;
}

enum residency_verdict residency_decide(const struct resident *residents, size_t n_residents,
                                        enum residency_order order, uint64_t budget_bytes,
                                        const struct newcomer *newcomer, size_t *ret_evict,
                                        size_t *ret_n_evict)
{
    struct sums sums = sum_up(residents, n_residents);
    uint64_t used = sums.used, need = newcomer->bytes;
    bool asked_for = newcomer->wanted >= RESIDENCY_ASKED_FOR;
    double displaced = 0;

    *ret_n_evict = 0;
    if (need > budget_bytes || sums.fixed > budget_bytes - need)
        return RESIDENCY_IMPOSSIBLE;
    if (used <= budget_bytes - need)
        return RESIDENCY_FITS;
    if (used - sums.leaving <= budget_bytes - need)
        return RESIDENCY_WAIT;
    used -= sums.leaving;
    while (used > budget_bytes - need) {
        size_t victim =
            next_victim(residents, n_residents, order, newcomer->wanted, ret_evict, *ret_n_evict);
        if (victim == n_residents) {
            /* Nobody goes in vain: what can be idle later is waited for first. */
            *ret_n_evict = 0;
            return asked_for ? RESIDENCY_WAIT : RESIDENCY_WORTHLESS;
        }
        ret_evict[(*ret_n_evict)++] = victim;
        used -= residents[victim].bytes;
    }
    spare_needless(residents, budget_bytes - need - used, ret_evict, ret_n_evict);
    for (size_t i = 0; i < *ret_n_evict; i++)
        displaced += residents[ret_evict[i]].wanted;
    if (!asked_for && displaced >= newcomer->wanted) {
        *ret_n_evict = 0;
        return RESIDENCY_WORTHLESS;
    }
    return RESIDENCY_EVICT;
}
