/* Kernels: every variant this machine has against float64 and against the scalar oracle. */
#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/kernels_internal.h"
#include "lib/cleanup.h"

static const enum gguf_type all_types[] = {GGUF_F32,  GGUF_F16,  GGUF_BF16, GGUF_Q8_0,
                                           GGUF_Q4_0, GGUF_Q4_K, GGUF_Q5_K, GGUF_Q6_K};

/* The variants that run here, the scalar one first. */
static size_t variants(const struct kernel_table *ret_tables[3])
{
    static const char *const names[] = {"scalar", "avx2", "avx512"};
    size_t n = 0;
    for (size_t i = 0; i < ELEMENTSOF(names); i++)
        if (kernels_choose(names[i], &ret_tables[n], NULL) == 0)
            n++;
    cr_assert_geq(n, 1);
    return n;
}

/* ---- material ---- */

static uint64_t random_state = 1;

static uint32_t random_u32(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return random_state >> 32;
}

/* Uniform in -1..1. */
static float random_float(void)
{
    return (float)(int32_t)random_u32() * 0x1p-31f;
}

static void *aligned(size_t bytes)
{
    void *memory = aligned_alloc(KERNEL_ALIGN, bytes + KERNEL_ALIGN - bytes % KERNEL_ALIGN);
    cr_assert_not_null(memory);
    return memory;
}

static uint32_t block_of(enum gguf_type type)
{
    return type_is_float(type) ? 1 : type == GGUF_Q8_0 || type == GGUF_Q4_0 ? 32 : 256;
}

static size_t block_bytes(enum gguf_type type)
{
    switch ((int)type) {
    case GGUF_F32: return 4;
    case GGUF_F16:
    case GGUF_BF16: return 2;
    case GGUF_Q8_0: return 34;
    case GGUF_Q4_0: return 18;
    case GGUF_Q4_K: return 144;
    case GGUF_Q5_K: return 176;
    default: return 210;
    }
}

static void put_f16(uint8_t *at, float value)
{
    uint16_t half = f32_to_f16(value);
    memcpy(at, &half, 2);
}

/* A random block as a file holds it: all quants possible, scales of plausible size. */
static void random_block(enum gguf_type type, uint8_t *block)
{
    float value = random_float();
    uint32_t bits = f32_bits(value);
    for (size_t i = 0; i < block_bytes(type); i++)
        block[i] = random_u32() >> 8;
    switch ((int)type) {
    case GGUF_F32: memcpy(block, &value, 4); break;
    case GGUF_F16: put_f16(block, value); break;
    case GGUF_BF16: memcpy(block, (uint8_t *)&bits + 2, 2); break;
    case GGUF_Q8_0: put_f16(block, value / 128); break;
    case GGUF_Q4_0: put_f16(block, value / 8); break;
    case GGUF_Q4_K:
    case GGUF_Q5_K:
        put_f16(block, value / 500);
        put_f16(block + 2, random_float() / 500);
        break;
    default: put_f16(block + 208, value / 4000); break;
    }
}

/* The values of a block, from the description of its format alone. */
static void dequantise(enum gguf_type type, const uint8_t *b, float *ret)
{
    uint16_t half, half_min;
    memcpy(&half, b + (type == GGUF_Q6_K ? 208 : 0), 2);
    memcpy(&half_min, b + 2, 2);
    float d = f16_to_f32(half), dmin = f16_to_f32(half_min);
    switch ((int)type) {
    case GGUF_F32: memcpy(ret, b, 4); break;
    case GGUF_F16: *ret = d; break;
    case GGUF_BF16: *ret = bits_f32((uint32_t)half << 16); break;
    case GGUF_Q8_0:
        for (int i = 0; i < 32; i++)
            ret[i] = d * (int8_t)b[2 + i];
        break;
    case GGUF_Q4_0:
        for (int i = 0; i < 16; i++) {
            ret[i] = d * ((b[2 + i] & 15) - 8);
            ret[i + 16] = d * ((b[2 + i] >> 4) - 8);
        }
        break;
    case GGUF_Q4_K:
    case GGUF_Q5_K:
        for (int i = 0; i < 256; i++) {
            const uint8_t *sc = b + 4, *high = b + 16, *q = b + (type == GGUF_Q4_K ? 16 : 48);
            int s = i / 32, j = i % 32;
            int scale = s < 4 ? sc[s] & 63 : (sc[s + 4] & 15) | (sc[s - 4] >> 6 << 4);
            int min = s < 4 ? sc[s + 4] & 63 : sc[s + 4] >> 4 | (sc[s] >> 6 << 4);
            int value = q[i / 64 * 32 + j] >> (s % 2 * 4) & 15;
            if (type == GGUF_Q5_K)
                value += (high[j] >> s & 1) * 16;
            ret[i] = d * (float)scale * (float)value - dmin * (float)min;
        }
        break;
    default:
        for (int i = 0; i < 256; i++) {
            int half_block = i / 128, r = i % 128 / 32, j = i % 32;
            int low = b[half_block * 64 + r % 2 * 32 + j] >> (r / 2 * 4) & 15;
            int high = b[128 + half_block * 32 + j] >> (2 * r) & 3;
            ret[i] = d * (int8_t)b[192 + i / 16] * (float)((low | high << 4) - 32);
        }
    }
}

/* A random matrix: the file's bytes and the values they stand for. */
struct matrix {
    enum gguf_type type;
    uint32_t rows, cols;
    uint8_t *file;
    float *values;
};

static struct matrix matrix_new(enum gguf_type type, uint32_t rows, uint32_t cols)
{
    size_t per_row = cols / block_of(type), bytes = block_bytes(type);
    struct matrix m = {type, rows, cols, aligned(rows * per_row * bytes),
                       aligned((size_t)rows * cols * 4)};
    for (size_t b = 0; b < rows * per_row; b++) {
        random_block(type, m.file + b * bytes);
        dequantise(type, m.file + b * bytes, m.values + b * block_of(type));
    }
    return m;
}

static void matrix_done(struct matrix *m)
{
    free(m->file);
    free(m->values);
}

/* Packed in two calls where there is more than one group. */
static struct tensor pack(const struct kernel_table *table, const struct matrix *m)
{
    struct tensor tensor = {m->type, m->rows, m->cols, NULL,
                            table->packed_bytes(m->type, m->rows, m->cols)};
    uint32_t first = m->rows / 2 / KERNEL_ROW_GROUP * KERNEL_ROW_GROUP;
    size_t row_bytes = m->cols / block_of(m->type) * block_bytes(m->type);
    cr_assert_gt(tensor.bytes, 0);
    cr_assert_eq(tensor.bytes % KERNEL_ALIGN, 0);
    tensor.data = aligned(tensor.bytes);
    memset(tensor.data, 0xaa, tensor.bytes);
    if (first)
        table->pack(&tensor, 0, first, m->file);
    table->pack(&tensor, first, m->rows - first, m->file + first * row_bytes);
    return tensor;
}

static float *random_floats(size_t n)
{
    float *values = aligned(n * 4);
    for (size_t i = 0; i < n; i++)
        values[i] = random_float();
    return values;
}

static void *prepare(const struct kernel_table *table, enum gguf_type type, uint32_t cols,
                     uint32_t n, const float *x)
{
    void *prepared = aligned(table->prepared_bytes(type, cols, n));
    table->prepare(type, cols, n, x, prepared);
    return prepared;
}

/* y of all rows, with `extra` floats of stride that must stay untouched. */
static float *multiply(const struct kernel_table *table, const struct tensor *tensor, uint32_t n,
                       const float *x)
{
    void *prepared = prepare(table, tensor->type, tensor->cols, n, x);
    float *y = aligned((size_t)n * (tensor->rows + 3) * 4);
    memset(y, 0xff, (size_t)n * (tensor->rows + 3) * 4);
    table->matmul(tensor, prepared, n, y, tensor->rows + 3, 0, tensor->rows);
    for (uint32_t c = 0; c < n; c++)
        for (uint32_t i = 0; i < 3; i++)
            cr_assert_eq(f32_bits(y[c * (tensor->rows + 3) + tensor->rows + i]), 0xffffffff,
                         "%s wrote beyond its rows", table->name);
    free(prepared);
    return y;
}

/* ---- choice ---- */

Test(kernels, chooses_the_best_when_nothing_is_forced)
{
    const struct kernel_table *tables[3], *best = NULL, *empty = NULL;
    size_t n = variants(tables);
    cr_assert_eq(kernels_choose(NULL, &best, NULL), 0);
    cr_assert_eq(kernels_choose("", &empty, NULL), 0);
    cr_assert_eq(best, tables[n - 1]);
    cr_assert_eq(best, empty);
}

Test(kernels, refuses_unknown_and_missing_variants_by_name)
{
    static const char *const names[] = {"avx2", "avx512"};
    const struct kernel_table *table = NULL;
    struct fault fault = {""};
    cr_assert_eq(kernels_choose("neon", &table, &fault), -EINVAL);
    cr_assert_not_null(strstr(fault.text, "neon"));
    cr_assert_null(table);
    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        int r = kernels_choose(names[i], &table, &fault);
        if (r == 0) {
            cr_assert_str_eq(table->name, names[i]);
        } else {
            cr_assert_eq(r, -ENOTSUP);
            cr_assert_not_null(strstr(fault.text, names[i]));
            cr_assert_not_null(strstr(fault.text, "lacks"));
        }
    }
}

/* ---- numbers ---- */

Test(kernels, converts_every_f16_and_back)
{
    for (uint32_t i = 0; i < 65536; i++) {
        float value = f16_to_f32(i);
        if (value != value)
            cr_assert(f16_to_f32(f32_to_f16(value)) != f16_to_f32(f32_to_f16(value)));
        else
            cr_assert_eq(f32_to_f16(value), i);
    }
    cr_assert_eq(f32_to_f16(65519.0f), 0x7bff);
    cr_assert_eq(f32_to_f16(65520.0f), 0x7c00);
    cr_assert_eq(f32_to_f16(1.0f + 0x1p-11f), 0x3c00, "ties go to even");
    cr_assert_eq(f32_to_f16(1.0f + 3 * 0x1p-11f), 0x3c02, "ties go to even");
    cr_assert_eq(f32_to_f16(0x1.8p-24f), 2);
    cr_assert_eq(f32_to_f16(0x1p-25f), 0);
    cr_assert_eq(f32_to_f16(-0x1.2p-25f), 0x8001);
}

/* ---- packing ---- */

Test(kernels, unpacks_what_the_file_holds)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t t = 0; t < ELEMENTSOF(all_types); t++) {
        uint32_t cols = block_of(all_types[t]) * 3;
        struct matrix m = matrix_new(all_types[t], 37, cols);
        float *row = aligned(cols * 4);
        for (size_t v = 0; v < n; v++) {
            struct tensor tensor = pack(tables[v], &m);
            for (uint32_t r = 0; r < m.rows; r++) {
                tables[v]->unpack_row(&tensor, r, row);
                for (uint32_t k = 0; k < cols; k++)
                    cr_assert_eq(row[k], m.values[r * cols + k], "%s type %d row %u col %u",
                                 tables[v]->name, all_types[t], r, k);
            }
            free(tensor.data);
        }
        free(row);
        matrix_done(&m);
    }
}

/* So that a model's memory may have been another's. */
Test(kernels, packing_leaves_no_byte_as_it_was)
{
    const struct kernel_table *tables[3];
    size_t n_tables = variants(tables);

    for (size_t i = 0; i < ELEMENTSOF(all_types); i++)
        for (uint32_t rows = 15; rows <= 33; rows += 9) {
            uint32_t cols = 3 * block_of(all_types[i]);
            struct matrix m = matrix_new(all_types[i], rows, cols);

            for (size_t k = 0; k < n_tables; k++) {
                size_t bytes = tables[k]->packed_bytes(all_types[i], rows, cols);
                struct tensor a = {all_types[i], rows, cols, aligned(bytes), bytes};
                struct tensor b = {all_types[i], rows, cols, aligned(bytes), bytes};

                memset(a.data, 0x00, bytes);
                memset(b.data, 0xff, bytes);
                tables[k]->pack(&a, 0, rows, m.file);
                tables[k]->pack(&b, 0, rows, m.file);
                cr_expect_eq(memcmp(a.data, b.data, bytes), 0, "%s, type %d, %u rows",
                             tables[k]->name, all_types[i], rows);
                free(a.data);
                free(b.data);
            }
            matrix_done(&m);
        }
}

Test(kernels, refuses_types_and_row_lengths_it_has_not)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        cr_assert_not(tables[v]->supports((enum gguf_type)250));
        cr_assert_eq(tables[v]->packed_bytes((enum gguf_type)250, 16, 256), 0);
        cr_assert_eq(tables[v]->packed_bytes(GGUF_Q8_0, 16, 33), 0);
        cr_assert_eq(tables[v]->packed_bytes(GGUF_Q4_K, 16, 128), 0);
        cr_assert_eq(tables[v]->packed_bytes(GGUF_F32, 16, 0), 0);
        for (size_t t = 0; t < ELEMENTSOF(all_types); t++)
            cr_assert(tables[v]->supports(all_types[t]));
    }
}

/* ---- matrix times columns ---- */

/* What the kernels compute but for rounding: exact products of weights with activations that, for a
 * quantised type, are rounded to 127ths of their block's largest. */
static double reference(const struct matrix *m, uint32_t row, const float *x, double *ret_size)
{
    const float *w = m->values + (size_t)row * m->cols;
    double sum = 0, size = 1e-30;
    for (uint32_t k = 0; k < m->cols; k++) {
        double a = x[k];
        if (!type_is_float(m->type)) {
            double largest = 0;
            for (uint32_t i = k / 32 * 32; i < k / 32 * 32 + 32; i++)
                largest = fmax(largest, fabs(x[i]));
            a = largest > 0 ? rintf(x[k] * (127.0f / (float)largest)) * (largest / 127) : 0;
        }
        sum += w[k] * a;
        size += fabs(w[k] * a);
    }
    *ret_size = size;
    return sum;
}

static void check_matmul(const struct kernel_table *table, const struct matrix *m, uint32_t n)
{
    struct tensor tensor = pack(table, m);
    float *x = random_floats((size_t)n * m->cols);
    if (m->cols >= 32)
        memset(x, 0, 32 * 4); /* a block of zeros */
    float *y = multiply(table, &tensor, n, x);
    for (uint32_t c = 0; c < n; c++) {
        for (uint32_t r = 0; r < m->rows; r++) {
            double size, exact = reference(m, r, x + (size_t)c * m->cols, &size);
            cr_assert_leq(fabs(y[c * (m->rows + 3) + r] - exact), 2e-6 * size + 1e-12,
                          "%s type %d %ux%u column %u of %u row %u: %g, exact %g", table->name,
                          m->type, m->rows, m->cols, c, n, r, y[c * (m->rows + 3) + r], exact);
        }
    }
    free(y);
    free(x);
    free(tensor.data);
}

Test(kernels, multiplies_floats_like_float64_over_odd_shapes)
{
    static const uint32_t shapes[][2] = {{1, 1},    {8, 8},    {16, 3},   {64, 64},
                                         {172, 64}, {64, 172}, {33, 129}, {200, 1000}};
    static const uint32_t columns[] = {1, 2, 5, 13, 33};
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t t = 0; t < 3; t++) {
        for (size_t s = 0; s < ELEMENTSOF(shapes); s++) {
            struct matrix m = matrix_new(all_types[t], shapes[s][0], shapes[s][1]);
            for (size_t v = 0; v < n; v++)
                for (size_t c = 0; c < ELEMENTSOF(columns); c++)
                    check_matmul(tables[v], &m, columns[c]);
            matrix_done(&m);
        }
    }
}

Test(kernels, multiplies_quantised_types_like_float64_over_odd_shapes)
{
    static const uint32_t shapes[][2] = {{1, 1}, {16, 2}, {47, 3}, {130, 5}};
    static const uint32_t columns[] = {1, 3, 8, 14};
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t t = 3; t < ELEMENTSOF(all_types); t++) {
        for (size_t s = 0; s < ELEMENTSOF(shapes); s++) {
            struct matrix m =
                matrix_new(all_types[t], shapes[s][0], shapes[s][1] * block_of(all_types[t]));
            for (size_t v = 0; v < n; v++)
                for (size_t c = 0; c < ELEMENTSOF(columns); c++)
                    check_matmul(tables[v], &m, columns[c]);
            matrix_done(&m);
        }
    }
}

/* The largest sums a block can have: nothing may saturate on the way. */
Test(kernels, multiplies_extreme_quants_without_saturation)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    static const uint8_t fills[] = {0x80, 0x7f, 0xff, 0x00};
    for (size_t t = 3; t < ELEMENTSOF(all_types); t++) {
        for (size_t f = 0; f < ELEMENTSOF(fills); f++) {
            struct matrix m = matrix_new(all_types[t], 16, 256);
            size_t bytes = block_bytes(m.type);
            for (size_t b = 0; b < 16 * 256 / block_of(m.type); b++) {
                uint8_t *block = m.file + b * bytes;
                memset(block, fills[f], bytes);
                put_f16(block + (m.type == GGUF_Q6_K ? 208 : 0), 0.25f);
                if (m.type == GGUF_Q4_K || m.type == GGUF_Q5_K)
                    put_f16(block + 2, 0.25f);
                dequantise(m.type, block, m.values + b * block_of(m.type));
            }
            float *x = aligned(256 * 4);
            for (int sign = -1; sign <= 1; sign += 2) {
                for (int k = 0; k < 256; k++)
                    x[k] = (float)sign;
                for (size_t v = 0; v < n; v++) {
                    struct tensor tensor = pack(tables[v], &m);
                    float *y = multiply(tables[v], &tensor, 1, x);
                    double size, exact = reference(&m, 0, x, &size);
                    cr_assert_float_eq(y[0], exact, 2e-6 * size, "%s type %d fill %x: %g, not %g",
                                       tables[v]->name, m.type, fills[f], y[0], exact);
                    free(y);
                    free(tensor.data);
                }
            }
            free(x);
            matrix_done(&m);
        }
    }
}

/* The header's rule: an element's bits do not depend on the number of columns, its place among them
 * or the range of rows. */
Test(kernels, gives_the_same_bits_whatever_shares_the_call)
{
    enum { rows = 150, max_n = 33, stride = 160 };
    const struct kernel_table *tables[3];
    size_t n_tables = variants(tables);
    for (size_t t = 0; t < ELEMENTSOF(all_types); t++) {
        uint32_t cols = type_is_float(all_types[t]) ? 172 : 512;
        struct matrix m = matrix_new(all_types[t], rows, cols);
        float *x = random_floats(max_n * cols);
        for (size_t v = 0; v < n_tables; v++) {
            struct tensor tensor = pack(tables[v], &m);
            float *alone = aligned(max_n * stride * 4), *y = aligned(max_n * stride * 4);
            for (uint32_t c = 0; c < max_n; c++) {
                void *prepared = prepare(tables[v], m.type, cols, 1, x + c * cols);
                tables[v]->matmul(&tensor, prepared, 1, alone + c * stride, stride, 0, rows);
                free(prepared);
            }
            for (uint32_t n = 1; n <= max_n; n++) {
                uint32_t from = max_n - n;
                void *prepared = prepare(tables[v], m.type, cols, n, x + from * cols);
                uint32_t cut = random_u32() % (rows / KERNEL_ROW_GROUP + 1) * KERNEL_ROW_GROUP;
                tables[v]->matmul(&tensor, prepared, n, y, stride, cut, rows);
                tables[v]->matmul(&tensor, prepared, n, y, stride, 0, cut);
                for (uint32_t c = 0; c < n; c++)
                    cr_assert_eq(memcmp(y + c * stride, alone + (from + c) * stride, rows * 4), 0,
                                 "%s type %d: column %u of %u, rows cut at %u", tables[v]->name,
                                 m.type, c, n, cut);
                free(prepared);
            }
            free(alone);
            free(y);
            free(tensor.data);
        }
        free(x);
        matrix_done(&m);
    }
}

Test(kernels, prepares_each_column_by_itself)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    cr_assert(tables[0]->same_preparation(GGUF_F32, GGUF_BF16));
    cr_assert(tables[0]->same_preparation(GGUF_Q4_K, GGUF_Q6_K));
    cr_assert_not(tables[0]->same_preparation(GGUF_F16, GGUF_Q8_0));
    for (size_t v = 0; v < n; v++) {
        for (size_t t = 0; t < ELEMENTSOF(all_types); t++) {
            float *x = random_floats(256 * 5);
            uint8_t *five = prepare(tables[v], all_types[t], 256, 5, x);
            size_t bytes = tables[v]->prepared_bytes(all_types[t], 256, 1);
            uint8_t *one = prepare(tables[v], all_types[t], 256, 1, x + 3 * 256);
            size_t used =
                type_is_float(all_types[t]) ? 256 * 4 : 8 * sizeof(struct activation_block);
            cr_assert_eq(memcmp(five + 3 * bytes, one, used), 0);
            free(one);
            free(five);
            free(x);
        }
    }
}

/* Activations that are tiny, huge or not numbers: no fault, no endless value from a zero block. */
Test(kernels, survives_strange_activations)
{
    static const float strange[] = {0.0f, 1e-38f, 1e-45f, 3e38f, INFINITY, -INFINITY, NAN};
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    struct matrix m = matrix_new(GGUF_Q8_0, 16, 32);
    float x[32];
    for (size_t v = 0; v < n; v++) {
        struct tensor tensor = pack(tables[v], &m);
        for (size_t s = 0; s < ELEMENTSOF(strange); s++) {
            for (int k = 0; k < 32; k++)
                x[k] = k % 2 ? strange[s] : 0.0f;
            float *y = multiply(tables[v], &tensor, 1, x);
            if (fabsf(strange[s]) < 1)
                cr_assert(fabsf(y[0]) < 1e-30f);
            free(y);
        }
        free(tensor.data);
    }
    matrix_done(&m);
}

/* ---- vectors ---- */

static const uint32_t lengths[] = {1, 7, 8, 15, 16, 17, 31, 64, 100, 172, 1000};

Test(kernels, normalises_like_float64)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        for (size_t l = 0; l < ELEMENTSOF(lengths); l++) {
            float *x = random_floats(lengths[l]), *weight = random_floats(lengths[l]);
            float *y = aligned((lengths[l] + 1) * 4);
            double sum = 0;
            y[lengths[l]] = 42;
            for (uint32_t i = 0; i < lengths[l]; i++)
                sum += (double)x[i] * x[i];
            double scale = 1 / sqrt(sum / lengths[l] + 1e-5);
            tables[v]->rms_norm(x, weight, lengths[l], 1e-5f, y);
            for (uint32_t i = 0; i < lengths[l]; i++)
                cr_assert_float_eq(y[i], x[i] * scale * weight[i], 1e-6, "%s", tables[v]->name);
            cr_assert_eq(y[lengths[l]], 42);
            tables[v]->rms_norm(x, weight, lengths[l], 1e-5f, x);
            cr_assert_eq(memcmp(x, y, lengths[l] * 4), 0, "in place");
            free(x);
            free(weight);
            free(y);
        }
    }
}

Test(kernels, adds_and_gates_like_float64)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        for (size_t l = 0; l < ELEMENTSOF(lengths); l++) {
            uint32_t len = lengths[l];
            float *x = random_floats(len + 1), *up = random_floats(len + 1);
            float *sum = aligned((len + 1) * 4), *gated = aligned((len + 1) * 4);
            for (uint32_t i = 0; i < len; i++)
                x[i] *= 30;
            memcpy(sum, x, (len + 1) * 4);
            memcpy(gated, x, (len + 1) * 4);
            tables[v]->add(sum, up, len);
            tables[v]->silu_mul(gated, up, len);
            for (uint32_t i = 0; i < len; i++) {
                double exact = x[i] / (1 + exp(-(double)x[i])) * up[i];
                cr_assert_eq(sum[i], x[i] + up[i]);
                cr_assert_leq(fabs(gated[i] - exact), 4e-7 * fabs(exact) + 1e-20, "%s: %g not %g",
                              tables[v]->name, gated[i], exact);
            }
            cr_assert_eq(sum[len], x[len]);
            cr_assert_eq(gated[len], x[len]);
            free(x);
            free(up);
            free(sum);
            free(gated);
        }
    }
}

/* silu over the whole range of exp, its ends included. */
Test(kernels, gates_large_and_endless_values)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        float gate[] = {-1e30f, -200.0f, -88.0f, 0.0f, 88.0f, 200.0f, 1e30f, INFINITY, NAN};
        float up[] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
        tables[v]->silu_mul(gate, up, ELEMENTSOF(gate));
        cr_assert_leq(fabsf(gate[1]), 1e-30f);
        cr_assert_leq(fabsf(gate[2]), 1e-30f);
        cr_assert_eq(gate[3], 0.0f);
        cr_assert_eq(gate[4], 88.0f);
        cr_assert_eq(gate[5], 200.0f);
        cr_assert_eq(gate[6], 1e30f);
        cr_assert_eq(gate[7], INFINITY);
        cr_assert(gate[8] != gate[8]);
    }
}

Test(kernels, rotates_pairs_of_both_kinds)
{
    static const uint32_t shapes[][3] = {{8, 8, 8},   {3, 8, 8},   {1, 8, 4}, {4, 16, 16},
                                         {2, 64, 64}, {2, 80, 32}, {3, 6, 6}, {5, 128, 128}};
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        for (size_t s = 0; s < ELEMENTSOF(shapes); s++) {
            uint32_t heads = shapes[s][0], dim = shapes[s][1], rot = shapes[s][2];
            float *x = random_floats(heads * dim), *y = aligned((heads * dim + 1) * 4);
            float *c = aligned(rot * 4), *sn = aligned(rot * 4);
            for (uint32_t i = 0; i < rot / 2; i++) {
                float angle = random_float() * 9;
                c[i] = cosf(angle);
                sn[i] = sinf(angle);
            }
            for (int adjacent = 0; adjacent < 2; adjacent++) {
                memcpy(y, x, heads * dim * 4);
                y[heads * dim] = 42;
                tables[v]->rope(y, heads, dim, rot, adjacent, c, sn);
                cr_assert_eq(y[heads * dim], 42);
                for (uint32_t i = 0; i < heads * dim; i++) {
                    uint32_t d = i % dim, pair = adjacent ? d / 2 : d % (rot / 2);
                    bool first = adjacent ? d % 2 == 0 : d < rot / 2;
                    uint32_t step = adjacent ? 1 : rot / 2;
                    double exact = d >= rot ? x[i]
                                   : first
                                       ? x[i] * (double)c[pair] - x[i + step] * (double)sn[pair]
                                       : x[i - step] * (double)sn[pair] + x[i] * (double)c[pair];
                    cr_assert_float_eq(y[i], exact, 3e-7, "%s %u heads of %u, %u rotated",
                                       tables[v]->name, heads, dim, rot);
                }
            }
            free(x);
            free(y);
            free(c);
            free(sn);
        }
    }
}

Test(kernels, finds_the_largest_and_the_lowest_of_equals)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++) {
        for (size_t l = 0; l < ELEMENTSOF(lengths); l++) {
            uint32_t len = lengths[l];
            float *x = random_floats(len);
            for (uint32_t at = 0; at < len; at += 1 + len / 40) {
                float before = x[at];
                x[at] = 2;
                cr_assert_eq(tables[v]->argmax(x, len), at);
                x[len - 1] = 2;
                cr_assert_eq(tables[v]->argmax(x, len), at, "%s: ties go low", tables[v]->name);
                x[len - 1] = 1;
                x[at] = before;
            }
            free(x);
        }
    }
}

Test(kernels, never_chooses_a_nan)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    float x[40];
    for (size_t v = 0; v < n; v++) {
        for (int i = 0; i < 40; i++)
            x[i] = NAN;
        cr_assert_eq(tables[v]->argmax(x, 40), 0, "nothing but NaN: the first");
        x[21] = -INFINITY;
        cr_assert_eq(tables[v]->argmax(x, 40), 21);
        x[37] = -3;
        cr_assert_eq(tables[v]->argmax(x, 40), 37);
        x[3] = -3;
        cr_assert_eq(tables[v]->argmax(x, 40), 3);
        for (int i = 0; i < 40; i++)
            x[i] = -INFINITY;
        cr_assert_eq(tables[v]->argmax(x, 40), 0);
    }
}

/* ---- attention ---- */

struct cache {
    struct kv_shape shape;
    uint32_t n_positions, n_pages;
    float *k, *v; /* as stored: rounded to F16 where the pages are */
    void **pages; /* unstored slots hold NaN */
};

static struct cache cache_new(const struct kernel_table *table, struct kv_shape shape,
                              uint32_t n_positions)
{
    uint32_t width = shape.n_kv_heads * shape.head_dim;
    uint32_t n_pages = (n_positions + KV_TILE - 1) / KV_TILE;
    struct cache cache = {shape,
                          n_positions,
                          n_pages,
                          random_floats(n_positions * width),
                          random_floats(n_positions * width),
                          calloc(n_pages, sizeof(void *))};
    for (uint32_t p = 0; p < n_pages; p++) {
        cache.pages[p] = aligned(table->kv_page_bytes(&shape));
        memset(cache.pages[p], 0xff, table->kv_page_bytes(&shape));
    }
    for (uint32_t p = 0; p < n_positions; p++)
        table->kv_store(&shape, cache.pages[p / KV_TILE], p % KV_TILE, cache.k + p * width,
                        cache.v + p * width);
    for (uint32_t i = 0; !shape.f32 && i < n_positions * width; i++) {
        cache.k[i] = f16_to_f32(f32_to_f16(cache.k[i]));
        cache.v[i] = f16_to_f32(f32_to_f16(cache.v[i]));
    }
    return cache;
}

static void cache_done(struct cache *cache)
{
    for (uint32_t p = 0; p < cache->n_pages; p++)
        free(cache->pages[p]);
    free(cache->pages);
    free(cache->k);
    free(cache->v);
}

/* One head's attention over the first n positions, in float64. */
static void attend_exactly(const struct cache *cache, uint32_t n, uint32_t kv_head, double scale,
                           const float *q, double *ret_out)
{
    uint32_t dim = cache->shape.head_dim, width = cache->shape.n_kv_heads * dim;
    double largest = -INFINITY, sum = 0;
    _cleanup_free_ double *scores = calloc(n, sizeof(double));
    for (uint32_t p = 0; p < n; p++) {
        for (uint32_t d = 0; d < dim; d++)
            scores[p] += (double)q[d] * cache->k[p * width + kv_head * dim + d] * scale;
        largest = fmax(largest, scores[p]);
    }
    memset(ret_out, 0, dim * sizeof(double));
    for (uint32_t p = 0; p < n; p++) {
        double weight = exp(scores[p] - largest);
        sum += weight;
        for (uint32_t d = 0; d < dim; d++)
            ret_out[d] += weight * cache->v[p * width + kv_head * dim + d];
    }
    for (uint32_t d = 0; d < dim; d++)
        ret_out[d] /= sum;
}

static void check_attention(const struct kernel_table *table, struct kv_shape shape,
                            uint32_t per_kv_head, uint32_t n_positions)
{
    uint32_t n_heads = shape.n_kv_heads * per_kv_head, dim = shape.head_dim;
    float scale = 2.0f / sqrtf((float)dim), *q = random_floats(n_heads * dim);
    float *out = aligned((n_heads * dim + 1) * 4);
    struct cache cache = cache_new(table, shape, n_positions);
    void *scratch = aligned(table->attend_scratch_bytes(n_heads, n_positions));
    double exact[256];
    for (uint32_t n = 1; n <= n_positions; n += 1 + n / 3) {
        memset(scratch, 0xff, table->attend_scratch_bytes(n_heads, n));
        out[n_heads * dim] = 42;
        table->attend(&shape, cache.pages, n, n_heads, scale, q, out, scratch);
        cr_assert_eq(out[n_heads * dim], 42);
        for (uint32_t h = 0; h < n_heads; h++) {
            attend_exactly(&cache, n, h / per_kv_head, scale, q + h * dim, exact);
            for (uint32_t d = 0; d < dim; d++)
                cr_assert_float_eq(out[h * dim + d], exact[d], 2e-6,
                                   "%s %s dim %u head %u of %u, %u positions: %g not %g",
                                   table->name, shape.f32 ? "f32" : "f16", dim, h, n_heads, n,
                                   out[h * dim + d], exact[d]);
        }
    }
    free(scratch);
    free(out);
    free(q);
    cache_done(&cache);
}

Test(kernels, attends_like_float64_and_never_reads_unstored_slots)
{
    static const uint32_t shapes[][3] = {{4, 8, 2},  {1, 4, 2},  {2, 16, 1}, {1, 20, 3},
                                         {2, 32, 4}, {1, 64, 8}, {2, 80, 2}, {1, 128, 7}};
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    for (size_t v = 0; v < n; v++)
        for (size_t s = 0; s < ELEMENTSOF(shapes); s++)
            for (int f32 = 0; f32 < 2; f32++)
                check_attention(tables[v], (struct kv_shape){shapes[s][0], shapes[s][1], f32},
                                shapes[s][2], 75);
}

/* What stands in later slots, stored or not, changes no bit of an earlier position's result. */
Test(kernels, attends_the_same_whatever_was_stored_later)
{
    const struct kernel_table *tables[3];
    size_t n_tables = variants(tables);
    struct kv_shape shape = {2, 16, false};
    for (size_t v = 0; v < n_tables; v++) {
        random_state = 5;
        struct cache all = cache_new(tables[v], shape, 60);
        float *q = random_floats(4 * 16), first[64], second[64];
        void *scratch = aligned(tables[v]->attend_scratch_bytes(4, 60));
        for (uint32_t n = 1; n <= 60; n++) {
            random_state = 5;
            struct cache some = cache_new(tables[v], shape, 60);
            for (uint32_t p = n; p < 60; p++) {
                float garbage[32];
                for (int i = 0; i < 32; i++)
                    garbage[i] = p % 2 ? NAN : INFINITY;
                tables[v]->kv_store(&shape, some.pages[p / KV_TILE], p % KV_TILE, garbage, garbage);
            }
            tables[v]->attend(&shape, all.pages, n, 4, 0.25f, q, first, scratch);
            tables[v]->attend(&shape, some.pages, n, 4, 0.25f, q, second, scratch);
            cr_assert_eq(memcmp(first, second, sizeof(first)), 0, "%s at %u", tables[v]->name, n);
            cache_done(&some);
        }
        free(scratch);
        free(q);
        cache_done(&all);
    }
}

/* Scores far apart: the softmax's tail vanishes instead of overflowing. */
Test(kernels, attends_to_one_position_where_scores_are_far_apart)
{
    const struct kernel_table *tables[3];
    size_t n = variants(tables);
    struct kv_shape shape = {1, 8, true};
    for (size_t v = 0; v < n; v++) {
        void *page = aligned(tables[v]->kv_page_bytes(&shape));
        void *scratch = aligned(tables[v]->attend_scratch_bytes(1, 16));
        float q[8] = {1e4f}, out[8];
        for (uint32_t p = 0; p < 16; p++) {
            float k[8] = {p == 5 ? 1e4f : -1e4f}, value[8] = {(float)p};
            tables[v]->kv_store(&shape, page, p, k, value);
        }
        tables[v]->attend(&shape, &page, 16, 1, 1.0f, q, out, scratch);
        cr_assert_eq(out[0], 5.0f, "%s: %g", tables[v]->name, out[0]);
        free(scratch);
        free(page);
    }
}
