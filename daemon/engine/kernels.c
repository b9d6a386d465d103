/* The choice of a variant: what this build has, what this machine can run, what was asked for. */
#include "daemon/engine/kernels.h"

#include <errno.h>
#include <string.h>

#include "lib/cleanup.h"

struct variant {
    const char *name;
    const struct kernel_table *table;
    const char *(*missing)(void); /* the first thing this machine lacks, or NULL */
};

static const char *avx2_missing(void)
{
    return "x86-64";
}

static const char *avx512_missing(void)
{
    return "x86-64";
}

static const char *scalar_missing(void)
{
    return NULL;
}

/* Best first. */
static const struct variant variants[] = {
    {"avx512", NULL, avx512_missing},
    {"avx2", NULL, avx2_missing},
    {"scalar", &kernels_scalar, scalar_missing},
};

int kernels_choose(const char *forced, const struct kernel_table **ret_table,
                   struct fault *ret_fault)
{
    bool any = !forced || !*forced;
    for (size_t i = 0; i < ELEMENTSOF(variants); i++) {
        const struct variant *variant = &variants[i];
        if (!any && strcmp(forced, variant->name) != 0)
            continue;
        const char *missing = variant->missing();
        if (!missing) {
            *ret_table = variant->table;
            return 0;
        }
        if (!any)
            return fault_set(ret_fault, -ENOTSUP,
                             "kernel variant '%s' cannot run here: the processor lacks %s; unset "
                             "HEARTH_CPU to use the best variant it has",
                             forced, missing);
    }
    return fault_set(ret_fault, -EINVAL,
                     "unknown kernel variant '%s': HEARTH_CPU is one of scalar, avx2, avx512",
                     forced);
}
