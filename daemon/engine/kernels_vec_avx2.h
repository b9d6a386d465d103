/* Sixteen lanes as AVX2 with FMA and F16C has them: two registers, lanes 0..7 and 8..15. The
 * primitives that kernels_simd.h is written in; what each means is said in kernels_vec_avx512.h. */
#ifndef HEARTH_ENGINE_KERNELS_VEC_AVX2_H
#define HEARTH_ENGINE_KERNELS_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VEC static inline __attribute__((always_inline))

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
typedef vi vb;
typedef __m256i va;

/* Bounded by 16 registers, of which a vector takes two. */
#define TILE_COLUMNS       6
#define QUANT_TILE_COLUMNS 4
#define ATTEND_HEADS       2
#define ATTEND_CHUNKS      2
/* Tiles of K in flight for a single head. */
#define ATTEND_TILES 2

VEC __m256i lanes_mask(uint32_t from, uint32_t n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)n - (int32_t)from), lane);
}

VEC vf vf_zero(void)
{
    return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

VEC vf vf_set1(float x)
{
    __m256 all = _mm256_set1_ps(x);
    return (vf){all, all};
}

VEC vf vf_set2(float a, float b)
{
    return (vf){_mm256_set1_ps(a), _mm256_set1_ps(b)};
}

VEC vf vf_load(const float *p)
{
    return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

VEC vf vf_load_n(const float *p, uint32_t n)
{
    return (vf){_mm256_maskload_ps(p, lanes_mask(0, n)),
                n > 8 ? _mm256_maskload_ps(p + 8, lanes_mask(8, n)) : _mm256_setzero_ps()};
}

VEC void vf_store(float *p, vf v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}

VEC void vf_store_n(float *p, vf v, uint32_t n)
{
    _mm256_maskstore_ps(p, lanes_mask(0, n), v.a);
    if (n > 8)
        _mm256_maskstore_ps(p + 8, lanes_mask(8, n), v.b);
}

VEC vf vf_load_f16(const uint16_t *p)
{
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

VEC __m256 bf16_to_8(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

VEC vf vf_load_bf16(const uint16_t *p)
{
    return (vf){bf16_to_8(p), bf16_to_8(p + 8)};
}

VEC void vf_store_f16(uint16_t *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

VEC vf vf_from_vi(vi v)
{
    return (vf){_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)};
}

VEC vf vf_from_u8(const uint8_t *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return vf_from_vi(
        (vi){_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}

VEC vf vf_from_i8(const int8_t *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return vf_from_vi(
        (vi){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}

VEC vf vf_add(vf x, vf y)
{
    return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}

VEC vf vf_sub(vf x, vf y)
{
    return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}

VEC vf vf_mul(vf x, vf y)
{
    return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}

VEC vf vf_div(vf x, vf y)
{
    return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}

VEC vf vf_max(vf x, vf y)
{
    return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}

VEC vf vf_min(vf x, vf y)
{
    return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}

VEC vf vf_abs(vf x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}

VEC vf vf_fma(vf x, vf y, vf z)
{
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

VEC vf vf_fnma(vf x, vf y, vf z)
{
    return (vf){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}

VEC vf vf_fmaddsub(vf x, vf y, vf z)
{
    return (vf){_mm256_fmaddsub_ps(x.a, y.a, z.a), _mm256_fmaddsub_ps(x.b, y.b, z.b)};
}

VEC vf vf_round(vf x)
{
    return (vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

VEC __m256 scale2_8(__m256 x, __m256 n)
{
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

VEC vf vf_scale2(vf x, vf n)
{
    return (vf){scale2_8(x.a, n.a), scale2_8(x.b, n.b)};
}

VEC vf vf_swap_pairs(vf x)
{
    return (vf){_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
}

VEC vf vf_load_twice(const float *p)
{
    const __m256i low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const __m256i high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    __m256 eight = _mm256_loadu_ps(p);
    return (vf){_mm256_permutevar8x32_ps(eight, low), _mm256_permutevar8x32_ps(eight, high)};
}

VEC vf vf_first(vf x, vf other, uint32_t n)
{
    return (vf){_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(lanes_mask(0, n))),
                _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(lanes_mask(8, n)))};
}

VEC vf vf_fold(vf x)
{
    __m256 sum = _mm256_add_ps(x.a, x.b);
    return (vf){sum, sum};
}

VEC float vf_sum(vf x)
{
    __m256 eight = vf_fold(x).a;
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_add_ps(two, _mm_permute_ps(two, 0xb1)));
}

VEC float vf_largest(vf x)
{
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_permute_ps(two, 0xb1)));
}

VEC vi vi_set1(int32_t x)
{
    __m256i all = _mm256_set1_epi32(x);
    return (vi){all, all};
}

VEC vi vi_iota(void)
{
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

VEC vi vi_add(vi x, vi y)
{
    return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}

VEC vi vi_where_greater(vf a, vf b, vi x, vi y)
{
    __m256i low = _mm256_castps_si256(_mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ));
    __m256i high = _mm256_castps_si256(_mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ));
    return (vi){_mm256_blendv_epi8(y.a, x.a, low), _mm256_blendv_epi8(y.b, x.b, high)};
}

VEC void vi_store(int32_t *p, vi v)
{
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 8), v.b);
}

/* ---- bytes ---- */

VEC vb vb_load(const uint8_t *p)
{
    return (vb){_mm256_loadu_si256((const __m256i *)p),
                _mm256_loadu_si256((const __m256i *)(p + 32))};
}

VEC vb vb_low_nibbles(vb v)
{
    const __m256i mask = _mm256_set1_epi8(15);
    return (vb){_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}

VEC vb vb_high_nibbles(vb v)
{
    return vb_low_nibbles((vb){_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)});
}

VEC __m256i or_bits_32(__m256i v, __m256i high, int left, uint8_t mask)
{
    __m256i shifted = left >= 0 ? _mm256_slli_epi16(high, left) : _mm256_srli_epi16(high, -left);
    return _mm256_or_si256(v, _mm256_and_si256(shifted, _mm256_set1_epi8((char)mask)));
}

VEC vb vb_or_bits(vb v, vb high, int left, uint8_t mask)
{
    return (vb){or_bits_32(v.a, high.a, left, mask), or_bits_32(v.b, high.b, left, mask)};
}

VEC va va_set1(const int8_t *four)
{
    int32_t bits;
    memcpy(&bits, four, 4);
    return _mm256_set1_epi32(bits);
}

/* Weights up to 63: a sum of two products is at most 2 * 63 * 128 and fits 16 bits. */
VEC __m256i dot_8(__m256i sum, __m256i w, __m256i a)
{
    __m256i pairs = _mm256_maddubs_epi16(w, a);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

VEC vi vi_dot(vi sum, vb w, va a)
{
    return (vi){dot_8(sum.a, w.a, a), dot_8(sum.b, w.b, a)};
}

/* Q8_0's full range would saturate 16 bits when biased to unsigned. So its quants are taken back to
 * signed, and the sign moves from the weight to the activation: |w| <= 128, |a| <= 127, and two
 * products are at most 32512. The sum starts at zero. */
VEC vb vb_load_q8(const uint8_t *p)
{
    const __m256i bias = _mm256_set1_epi8((char)0x80);
    vb v = vb_load(p);
    return (vb){_mm256_xor_si256(v.a, bias), _mm256_xor_si256(v.b, bias)};
}

VEC vi q8_start(int32_t bias_128)
{
    (void)bias_128;
    return vi_set1(0);
}

VEC vi vi_dot_q8(vi sum, vb w, va a)
{
    return (vi){dot_8(sum.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(a, w.a)),
                dot_8(sum.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(a, w.b))};
}

VEC int32_t sum_8(__m256i v)
{
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

VEC void quantise_32(vf low, vf high, int8_t *ret_q, int32_t ret_sums[2])
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i a = _mm256_cvtps_epi32(low.a), b = _mm256_cvtps_epi32(low.b);
    __m256i c = _mm256_cvtps_epi32(high.a), d = _mm256_cvtps_epi32(high.b);
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256((__m256i *)ret_q, _mm256_permutevar8x32_epi32(bytes, order));
    ret_sums[0] = sum_8(_mm256_add_epi32(a, b));
    ret_sums[1] = sum_8(_mm256_add_epi32(c, d));
}

#endif
