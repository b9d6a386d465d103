/* The quantisers of made-up models, read back by the engine's scalar kernels, which know the block
 * layouts on their own account. */
#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bench/quantise.h"
#include "daemon/engine/kernels.h"
#include "lib/cleanup.h"

#define COLS 1024u

/* Seeded numbers of mean 0 and standard deviation about 1. */
static void fill(float *x, size_t n, uint32_t seed)
{
    uint32_t state = seed;

    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (int j = 0; j < 3; j++) {
            state = state * 1664525 + 1013904223;
            sum += (float)(state >> 8) * 0x1p-23f - 1;
        }
        x[i] = sum;
    }
}

/* One row through the quantiser and back. */
static void there_and_back(enum gguf_type type, const float *x, float *ret_y)
{
    size_t bytes = kernels_scalar.packed_bytes(type, 1, COLS);
    _cleanup_free_ uint8_t *row = malloc(gguf_row_bytes(type, COLS));
    struct tensor tensor = {.type = type, .rows = 1, .cols = COLS, .bytes = bytes};

    cr_assert(bytes > 0);
    cr_assert_eq(posix_memalign(&tensor.data, KERNEL_ALIGN, bytes), 0);
    cr_assert_eq(quantise_row(type, x, COLS, row), 0);
    kernels_scalar.pack(&tensor, 0, 1, row);
    kernels_scalar.unpack_row(&tensor, 0, ret_y);
    free(tensor.data);
}

static double relative_error(const float *x, const float *y)
{
    double difference = 0, norm = 0;

    for (uint32_t i = 0; i < COLS; i++) {
        difference += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        norm += (double)x[i] * x[i];
    }
    return difference / norm;
}

Test(quantise, values_come_back_within_their_bits)
{
    /* Squared error relative to the squares: about step^2 / 12 for numbers of deviation 1. */
    static const struct {
        enum gguf_type type;
        double most;
    } cases[] = {
        {GGUF_F32, 0},       {GGUF_F16, 1e-7},  {GGUF_BF16, 1e-5}, {GGUF_Q8_0, 1e-4},
        {GGUF_Q4_0, 1.5e-2}, {GGUF_Q4_K, 1e-2}, {GGUF_Q6_K, 1e-3},
    };
    float x[COLS], y[COLS];

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        for (uint32_t seed = 1; seed <= 20; seed++) {
            double error;
            fill(x, COLS, seed);
            there_and_back(cases[i].type, x, y);
            error = relative_error(x, y);
            cr_expect(error <= cases[i].most, "%s, seed %u: %g", gguf_type_name(cases[i].type),
                      seed, error);
        }
    }
}

/* Groups of very different size in one block, which is what sub-block scales are for. */
Test(quantise, small_groups_beside_large_ones_survive)
{
    static const enum gguf_type types[] = {GGUF_Q8_0, GGUF_Q4_0, GGUF_Q4_K, GGUF_Q6_K};
    float x[COLS], y[COLS];

    for (size_t i = 0; i < ELEMENTSOF(types); i++) {
        fill(x, COLS, 5);
        for (uint32_t j = 0; j < COLS; j++)
            x[j] *= j / 32 % 2 ? 1.0f : 0.1f;
        there_and_back(types[i], x, y);
        for (uint32_t j = 0; j < COLS; j += 32) {
            double difference = 0, norm = 0;
            for (uint32_t k = j; k < j + 32; k++) {
                difference += ((double)x[k] - y[k]) * ((double)x[k] - y[k]);
                norm += (double)x[k] * x[k];
            }
            cr_expect(difference < 0.05 * norm, "%s, group %u: %g", gguf_type_name(types[i]),
                      j / 32, difference / norm);
        }
    }
}

Test(quantise, zeros_and_extremes_are_valid)
{
    static const enum gguf_type types[] = {GGUF_F32,  GGUF_F16,  GGUF_BF16, GGUF_Q8_0,
                                           GGUF_Q4_0, GGUF_Q4_K, GGUF_Q6_K};
    static const float values[] = {0, -0.0f, 1e-30f, 1e-9f, 1e-5f, -3, 99999};
    float x[COLS], y[COLS];

    for (size_t i = 0; i < ELEMENTSOF(types); i++) {
        for (size_t v = 0; v < ELEMENTSOF(values); v++) {
            for (uint32_t j = 0; j < COLS; j++)
                x[j] = values[v];
            if (types[i] == GGUF_F16 && values[v] > 65504)
                continue; /* beyond what a half holds */
            there_and_back(types[i], x, y);
            for (uint32_t j = 0; j < COLS; j++) {
                float slack = 0.02f * fabsf(x[j]) + 1e-4f;
                cr_assert(fabsf(y[j] - x[j]) <= slack, "%s of %g gives %g",
                          gguf_type_name(types[i]), x[j], y[j]);
            }
        }
    }
}

Test(quantise, halves_round_to_nearest_even)
{
    static const struct {
        float value;
        uint16_t half;
    } cases[] = {
        {0, 0},
        {-0.0f, 0x8000},
        {1, 0x3c00},
        {-2, 0xc000},
        {65504, 0x7bff},
        {65519.996f, 0x7bff},
        {65520, 0x7c00},
        {INFINITY, 0x7c00},
        {0x1p-24f, 1},
        {0x1p-25f, 0},
        {0x1.8p-25f, 1},
        {0x1p-14f, 0x0400},
        {0x1.ff8p-15f, 0x03ff},
        {0x1.002p0f, 0x3c00},
        {0x1.006p0f, 0x3c02},
        {0x1.ffcp-15f, 0x0400},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        cr_expect_eq(half_from_float(cases[i].value), cases[i].half, "%a gives %04x",
                     cases[i].value, half_from_float(cases[i].value));
    for (uint32_t half = 0; half < 65536; half++) {
        float value = half_to_float((uint16_t)half);
        if (!isnan(value))
            cr_assert_eq(half_from_float(value), half, "%04x", half);
        else
            cr_assert(isnan(half_to_float(half_from_float(value))), "%04x", half);
    }
}

Test(quantise, refuses_what_it_cannot_write)
{
    float x[COLS] = {0};
    uint8_t row[COLS * 4];

    memset(row, 0xee, sizeof(row));
    cr_expect_eq(quantise_row(GGUF_Q5_K, x, 256, row), -ENOTSUP);
    cr_expect_eq(quantise_row(GGUF_Q4_K, x, 128, row), -ENOTSUP);
    cr_expect_eq(quantise_row(GGUF_Q8_0, x, 31, row), -ENOTSUP);
    cr_expect_eq(quantise_row((enum gguf_type)250, x, 32, row), -ENOTSUP);
    cr_expect_eq(row[0], 0xee);
}
