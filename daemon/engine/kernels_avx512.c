/* The avx512 variant: kernels_simd.h in AVX-512 with VNNI. */
#include "daemon/engine/kernels_vec_avx512.h"

#include "daemon/engine/kernels_simd.h"

const struct kernel_table kernels_avx512 = SIMD_TABLE("avx512");
