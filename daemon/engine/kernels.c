/* The choice of a variant: what this build has, what this machine can run, what was asked for. */
#include "daemon/engine/kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <errno.h>
#include <string.h>

#include "lib/cleanup.h"

struct variant {
    const char *name;
    const struct kernel_table *table;
    const char *(*missing)(void); /* the first thing this machine lacks, or NULL */
};

#ifdef __x86_64__

/* The builtins look at what the operating system saves too (XGETBV). */
static const char *avx2_missing(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        return "AVX2";
    if (!__builtin_cpu_supports("fma"))
        return "FMA";
    unsigned int eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C))
        return "F16C";
    return NULL;
}

/* VNNI is part of the variant: a processor with AVX-512 but without it gets the AVX2 one. */
static const char *avx512_missing(void)
{
    const char *missing = avx2_missing();
    if (missing)
        return missing;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return "AVX-512 (F, BW, DQ, VL)";
    if (!__builtin_cpu_supports("avx512vnni"))
        return "AVX-512 VNNI";
    return NULL;
}

#else

/* Named, never chosen. */
const struct kernel_table kernels_avx2 = {.name = "avx2"};
const struct kernel_table kernels_avx512 = {.name = "avx512"};

static const char *avx2_missing(void)
{
    return "the x86-64 instruction set";
}

static const char *avx512_missing(void)
{
    return avx2_missing();
}

#endif

static const char *scalar_missing(void)
{
    return NULL;
}

/* Best first. */
static const struct variant variants[] = {
    {"avx512", &kernels_avx512, avx512_missing},
    {"avx2", &kernels_avx2, avx2_missing},
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

const char *kernels_lack(const char *name)
{
    for (size_t i = 0; i < ELEMENTSOF(variants); i++)
        if (strcmp(name, variants[i].name) == 0)
            return variants[i].missing();
    return "a variant of that name";
}
