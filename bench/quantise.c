#include "bench/quantise.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "lib/cleanup.h"

#define Q8_0_BLOCK  32u
#define Q4_0_BLOCK  32u
#define K_BLOCK     256u
#define Q4_K_GROUPS 8u  /* of 32 elements, each with a scale and a minimum */
#define Q6_K_GROUPS 16u /* of 16 elements, each with a scale */

static uint32_t bits_of(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static void store_u16(uint8_t *to, uint16_t value)
{
    to[0] = (uint8_t)value;
    to[1] = (uint8_t)(value >> 8);
}

uint16_t half_from_float(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest;
    int exponent = (int)(bits >> 23 & 0xff) - 127 + 15;
    uint32_t mantissa = bits & 0x7fffff, half;
    unsigned shift = 13;

    if (exponent >= 31) {
        bool nan = (bits >> 23 & 0xff) == 0xff && mantissa != 0;
        return (uint16_t)(sign | 0x7c00 | (nan ? 0x200 : 0));
    }
    if (exponent <= 0) {
        /* Subnormal: the hidden bit becomes a real one, further right. */
        if (exponent < -10)
            return (uint16_t)sign;
        mantissa |= 0x800000;
        shift += (unsigned)(1 - exponent);
        exponent = 0;
    }
    half = (uint32_t)exponent << 10 | mantissa >> shift;
    rest = mantissa & ((1u << shift) - 1);
    /* A carry out of the mantissa rightly raises the exponent. */
    if (rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && (half & 1)))
        half++;
    return (uint16_t)(sign | half);
}

float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31;
    uint32_t mantissa = half & 0x3ff;

    if (exponent == 31)
        return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* Round to nearest even; a NaN stays one. */
static uint16_t bfloat_from_float(float value)
{
    uint32_t bits = bits_of(value);

    if (isnan(value))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The nearest integer to `x`, halves upwards, held within low..high (low > -512). */
static int nearest(float x, int low, int high)
{
    int n = (int)(x + 512.5f) - 512;

    return n < low ? low : n > high ? high : n;
}

static float reciprocal(float x)
{
    return x != 0 ? 1.0f / x : 0;
}

static float largest_magnitude(const float *x, uint32_t n)
{
    float most = 0;

    for (uint32_t i = 0; i < n; i++)
        most = MAX(most, fabsf(x[i]));
    return most;
}

static void quantise_q8_0(const float *x, uint8_t *to)
{
    uint16_t scale = half_from_float(largest_magnitude(x, Q8_0_BLOCK) / 127);
    float inverse = reciprocal(half_to_float(scale));

    store_u16(to, scale);
    for (uint32_t i = 0; i < Q8_0_BLOCK; i++)
        to[2 + i] = (uint8_t)(int8_t)nearest(x[i] * inverse, -127, 127);
}

static void quantise_q4_0(const float *x, uint8_t *to)
{
    uint16_t scale;
    float inverse, peak = 0;

    /* The value of largest magnitude becomes -8, the code without a positive twin. */
    for (uint32_t i = 0; i < Q4_0_BLOCK; i++)
        peak = fabsf(x[i]) > fabsf(peak) ? x[i] : peak;
    scale = half_from_float(peak / -8);
    inverse = reciprocal(half_to_float(scale));
    store_u16(to, scale);
    for (uint32_t i = 0; i < Q4_0_BLOCK / 2; i++) {
        int low = nearest(x[i] * inverse, -8, 7) + 8;
        int high = nearest(x[i + Q4_0_BLOCK / 2] * inverse, -8, 7) + 8;
        to[2 + i] = (uint8_t)(low | high << 4);
    }
}

/* Packs eight 6-bit scales and eight 6-bit minima into 12 bytes: the first four of each whole, the
 * last four as nibbles with their two high bits on top of the first four. */
static void pack_q4_k_scales(const uint8_t *scales, const uint8_t *minima, uint8_t *to)
{
    for (uint32_t j = 0; j < 4; j++) {
        to[j] = (uint8_t)(scales[j] | scales[j + 4] >> 4 << 6);
        to[j + 4] = (uint8_t)(minima[j] | minima[j + 4] >> 4 << 6);
        to[j + 8] = (uint8_t)((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
    }
}

static void quantise_q4_k(const float *x, uint8_t *to)
{
    float steps[Q4_K_GROUPS], depths[Q4_K_GROUPS], most_step = 0, most_depth = 0, d, dmin;
    uint8_t scales[Q4_K_GROUPS], minima[Q4_K_GROUPS], codes[K_BLOCK];

    for (uint32_t g = 0; g < Q4_K_GROUPS; g++) {
        float low = 0, high = 0; /* minima are never above zero in this format */
        for (uint32_t i = 0; i < 32; i++) {
            low = MIN(low, x[g * 32 + i]);
            high = MAX(high, x[g * 32 + i]);
        }
        steps[g] = (high - low) / 15;
        depths[g] = -low;
        most_step = MAX(most_step, steps[g]);
        most_depth = MAX(most_depth, depths[g]);
    }
    store_u16(to, half_from_float(most_step / 63));
    store_u16(to + 2, half_from_float(most_depth / 63));
    d = half_to_float((uint16_t)(to[0] | to[1] << 8));
    dmin = half_to_float((uint16_t)(to[2] | to[3] << 8));
    for (uint32_t g = 0; g < Q4_K_GROUPS; g++) {
        float inverse, minimum;
        scales[g] = (uint8_t)nearest(steps[g] * reciprocal(d), 0, 63);
        minima[g] = (uint8_t)nearest(depths[g] * reciprocal(dmin), 0, 63);
        inverse = reciprocal(d * scales[g]);
        minimum = dmin * minima[g];
        for (uint32_t i = 0; i < 32; i++)
            codes[g * 32 + i] = (uint8_t)nearest((x[g * 32 + i] + minimum) * inverse, 0, 15);
    }
    pack_q4_k_scales(scales, minima, to + 4);
    for (uint32_t i = 0; i < K_BLOCK / 2; i++) {
        uint32_t low = i / 32 * 64 + i % 32; /* 64 elements share 32 bytes */
        to[16 + i] = (uint8_t)(codes[low] | codes[low + 32] << 4);
    }
}

/* Six bits a code: low nibbles in `low`, two high bits in `high`, per half of 128 elements in four
 * runs of 32. */
static void pack_q6_k_codes(const uint8_t *codes, uint8_t *low, uint8_t *high)
{
    for (uint32_t half = 0; half < 2; half++, codes += 128, low += 64, high += 32) {
        for (uint32_t i = 0; i < 32; i++) {
            uint8_t a = codes[i], b = codes[i + 32], c = codes[i + 64], d = codes[i + 96];
            low[i] = (uint8_t)((a & 15) | (c & 15) << 4);
            low[i + 32] = (uint8_t)((b & 15) | (d & 15) << 4);
            high[i] = (uint8_t)(a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6);
        }
    }
}

static void quantise_q6_k(const float *x, uint8_t *to)
{
    float steps[Q6_K_GROUPS], most = 0, d;
    uint8_t codes[K_BLOCK];
    uint16_t scale;

    for (uint32_t g = 0; g < Q6_K_GROUPS; g++) {
        steps[g] = largest_magnitude(x + g * 16, 16) / 31;
        most = MAX(most, steps[g]);
    }
    scale = half_from_float(most / 127);
    d = half_to_float(scale);
    for (uint32_t g = 0; g < Q6_K_GROUPS; g++) {
        int step = nearest(steps[g] * reciprocal(d), 0, 127);
        float inverse = reciprocal(d * (float)step);
        to[192 + g] = (uint8_t)step;
        for (uint32_t i = 0; i < 16; i++)
            codes[g * 16 + i] = (uint8_t)(nearest(x[g * 16 + i] * inverse, -32, 31) + 32);
    }
    pack_q6_k_codes(codes, to, to + 128);
    store_u16(to + 208, scale);
}

static void store_plain(enum gguf_type type, const float *values, uint64_t cols, uint8_t *to)
{
    for (uint64_t i = 0; i < cols; i++) {
        uint32_t bits = bits_of(values[i]);
        if (type == GGUF_F32) {
            store_u16(to + 4 * i, (uint16_t)bits);
            store_u16(to + 4 * i + 2, (uint16_t)(bits >> 16));
        } else if (type == GGUF_F16) {
            store_u16(to + 2 * i, half_from_float(values[i]));
        } else {
            store_u16(to + 2 * i, bfloat_from_float(values[i]));
        }
    }
}

int quantise_row(enum gguf_type type, const float *values, uint64_t cols, void *ret_row)
{
    static const struct {
        enum gguf_type type;
        uint32_t block;
        void (*quantise)(const float *x, uint8_t *to);
    } kinds[] = {
        {GGUF_Q8_0, Q8_0_BLOCK, quantise_q8_0},
        {GGUF_Q4_0, Q4_0_BLOCK, quantise_q4_0},
        {GGUF_Q4_K, K_BLOCK, quantise_q4_k},
        {GGUF_Q6_K, K_BLOCK, quantise_q6_k},
    };
    uint8_t *to = ret_row;

    if (gguf_row_bytes(type, cols) == 0)
        return -ENOTSUP;
    if (type == GGUF_F32 || type == GGUF_F16 || type == GGUF_BF16) {
        store_plain(type, values, cols, to);
        return 0;
    }
    for (size_t k = 0; k < ELEMENTSOF(kinds); k++) {
        uint64_t block_bytes = gguf_row_bytes(type, kinds[k].block);
        if (kinds[k].type != type)
            continue;
        for (uint64_t i = 0; i < cols; i += kinds[k].block, to += block_bytes)
            kinds[k].quantise(values + i, to);
        return 0;
    }
    return -ENOTSUP;
}
