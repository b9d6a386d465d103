/* Sixteen lanes as AVX-512 with VNNI has them: the primitives that kernels_simd.h is written in.
 *
 * vf: 16 floats. vi: 16 int32. vb: 64 unsigned bytes, four to a lane. va: four int8 in every lane.
 * Loads and stores are unaligned; `_n` forms touch the first n (1..16) lanes alone. */
#ifndef HEARTH_ENGINE_KERNELS_VEC_AVX512_H
#define HEARTH_ENGINE_KERNELS_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VEC static inline __attribute__((always_inline))

typedef __m512 vf;
typedef __m512i vi, vb, va;

/* Most columns a tile takes, bounded by 32 registers: row groups x columns <= 24 accumulators;
 * quantised, an integer and a float accumulator a column. */
#define TILE_COLUMNS       12
#define QUANT_TILE_COLUMNS 12
/* Heads times 16-lane chunks of V in flight. */
#define ATTEND_HEADS  4
#define ATTEND_CHUNKS 4
/* Tiles of K in flight for a single head. */
#define ATTEND_TILES 4

VEC __mmask16 lanes_mask(uint32_t n)
{
    return (__mmask16)((1u << n) - 1);
}

VEC vf vf_zero(void)
{
    return _mm512_setzero_ps();
}

VEC vf vf_set1(float x)
{
    return _mm512_set1_ps(x);
}

/* The lower eight lanes are a, the upper eight b. */
VEC vf vf_set2(float a, float b)
{
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b));
}

VEC vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

VEC vf vf_load_n(const float *p, uint32_t n)
{
    return _mm512_maskz_loadu_ps(lanes_mask(n), p);
}

VEC void vf_store(float *p, vf v)
{
    _mm512_storeu_ps(p, v);
}

VEC void vf_store_n(float *p, vf v, uint32_t n)
{
    _mm512_mask_storeu_ps(p, lanes_mask(n), v);
}

VEC vf vf_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

VEC vf vf_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

VEC void vf_store_f16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

VEC vf vf_from_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

VEC vf vf_from_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

VEC vf vf_from_vi(vi v)
{
    return _mm512_cvtepi32_ps(v);
}

VEC vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}

VEC vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}

VEC vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}

VEC vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}

/* b where either is NaN. */
VEC vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}

VEC vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}

VEC vf vf_abs(vf a)
{
    return _mm512_abs_ps(a);
}

/* a * b + c */
VEC vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* c - a * b */
VEC vf vf_fnma(vf a, vf b, vf c)
{
    return _mm512_fnmadd_ps(a, b, c);
}

/* Even lanes a * b - c, odd ones a * b + c. */
VEC vf vf_fmaddsub(vf a, vf b, vf c)
{
    return _mm512_fmaddsub_ps(a, b, c);
}

VEC vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* a * 2^n for a whole n in -126..127. */
VEC vf vf_scale2(vf a, vf n)
{
    return _mm512_scalef_ps(a, n);
}

/* The lanes of each pair exchanged. */
VEC vf vf_swap_pairs(vf a)
{
    return _mm512_permute_ps(a, 0xb1);
}

/* Eight floats, each twice. */
VEC vf vf_load_twice(const float *p)
{
    const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}

/* Lanes from n (0..16) on become those of `other`. */
VEC vf vf_first(vf a, vf other, uint32_t n)
{
    return _mm512_mask_blend_ps(lanes_mask(n), other, a);
}

/* The upper half added to the lower one: eight sums in the lower lanes. */
VEC vf vf_fold(vf a)
{
    return _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
}

/* Lanes added up in halves, quarters, pairs; the narrower the vector, the cheaper the step. */
VEC float vf_sum(vf a)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_add_ps(two, _mm_permute_ps(two, 0xb1)));
}

VEC float vf_largest(vf a)
{
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_permute_ps(two, 0xb1)));
}

VEC vi vi_set1(int32_t x)
{
    return _mm512_set1_epi32(x);
}

VEC vi vi_iota(void)
{
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

VEC vi vi_add(vi a, vi b)
{
    return _mm512_add_epi32(a, b);
}

/* Where a > b (never where one is NaN): then x, else y. */
VEC vi vi_where_greater(vf a, vf b, vi x, vi y)
{
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

VEC void vi_store(int32_t *p, vi v)
{
    _mm512_storeu_si512(p, v);
}

/* ---- bytes ---- */

VEC vb vb_load(const uint8_t *p)
{
    return _mm512_loadu_si512(p);
}

VEC vb vb_low_nibbles(vb v)
{
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

VEC vb vb_high_nibbles(vb v)
{
    return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}

/* v with the bits of `high` that `mask` has, `high` shifted left by `left` (negative: right). */
VEC vb vb_or_bits(vb v, vb high, int left, uint8_t mask)
{
    vb shifted = left >= 0 ? _mm512_slli_epi16(high, (unsigned)left)
                           : _mm512_srli_epi16(high, (unsigned)-left);
    /* v | (shifted & mask) */
    return _mm512_ternarylogic_epi32(v, shifted, _mm512_set1_epi8((char)mask), 0xf8);
}

VEC va va_set1(const int8_t *four)
{
    int32_t bits;
    memcpy(&bits, four, 4);
    return _mm512_set1_epi32(bits);
}

/* Adds the four products of each lane. */
VEC vi vi_dot(vi sum, vb w, va a)
{
    return _mm512_dpbusd_epi32(sum, w, a);
}

/* The same for Q8_0's quants as packed (+128), whose sum starts at q8_start(-128 * sum of a). */
VEC vb vb_load_q8(const uint8_t *p)
{
    return vb_load(p);
}

VEC vi q8_start(int32_t bias_128)
{
    return vi_set1(bias_128);
}

VEC vi vi_dot_q8(vi sum, vb w, va a)
{
    return _mm512_dpbusd_epi32(sum, w, a);
}

/* 32 floats within -127..127, rounded to nearest even, and the sums of both halves. */
VEC void quantise_32(vf low, vf high, int8_t *ret_q, int32_t ret_sums[2])
{
    vi a = _mm512_cvtps_epi32(low), b = _mm512_cvtps_epi32(high);
    _mm_storeu_si128((__m128i *)ret_q, _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(ret_q + 16), _mm512_cvtsepi32_epi8(b));
    ret_sums[0] = _mm512_reduce_add_epi32(a);
    ret_sums[1] = _mm512_reduce_add_epi32(b);
}

#endif
