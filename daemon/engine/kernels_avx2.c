/* The avx2 variant: kernels_simd.h in AVX2, FMA and F16C. */
#include "daemon/engine/kernels_vec_avx2.h"

#include "daemon/engine/kernels_simd.h"

const struct kernel_table kernels_avx2 = SIMD_TABLE("avx2");
