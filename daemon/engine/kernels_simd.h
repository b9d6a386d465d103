/* The body of a vector variant, written in the primitives of the kernels_vec_*.h included before
 * it. Included once by each kernels_<variant>.c, which puts the functions into its table.
 *
 * The rule of kernels.h in these terms: a lane is an output element (a row of weights, a position,
 * a dimension of the output), and its accumulator walks the reduction in order. A tile of several
 * row groups and columns only decides which accumulators are in flight together, never the order
 * inside one; integer sums are exact in any order. */
#ifndef HEARTH_ENGINE_KERNELS_SIMD_H
#define HEARTH_ENGINE_KERNELS_SIMD_H

#include "daemon/engine/kernels_internal.h"

#include <math.h>

#define LANES 16u
/* How far ahead of their use weights are asked for. */
#define PREFETCH_BYTES 4096

/* Loops over the accumulators of a tile must vanish, or the accumulators live in memory. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- matrix times columns ---- */

/* Some row groups times some columns. */
struct tile {
    const uint8_t *weights; /* the first row group */
    size_t group_bytes;     /* from row group to row group */
    uint32_t cols;          /* length of the reduction */
    const uint8_t *x;       /* the first prepared column */
    size_t x_bytes;         /* from column to column */
    float *y;               /* the first row of the first column */
    size_t y_stride;        /* floats from column to column */
    uint32_t rows;          /* rows wanted from the first row group on */
};

typedef void tile_fn(const struct tile *t);

VEC void store_rows(float *y, vf values, uint32_t rows)
{
    if (rows >= LANES)
        vf_store(y, values);
    else
        vf_store_n(y, values, rows);
}

VEC vf load_weights(enum gguf_type type, const uint8_t *group, size_t k)
{
    if (type == GGUF_F32)
        return vf_load((const float *)group + k * LANES);
    if (type == GGUF_F16)
        return vf_load_f16((const uint16_t *)group + k * LANES);
    return vf_load_bf16((const uint16_t *)group + k * LANES);
}

VEC void tile_floats(enum gguf_type type, int n_groups, int n_columns, const struct tile *t)
{
    vf acc[8][TILE_COLUMNS];
    size_t cols = t->cols, group_bytes = t->group_bytes, x_bytes = t->x_bytes;
    const uint8_t *weights = t->weights, *x = t->x;
    UNROLL for (int g = 0; g < n_groups; g++) UNROLL for (int c = 0; c < n_columns; c++) acc[g][c] =
        vf_zero();
    for (size_t k = 0; k < cols; k++, x += sizeof(float)) {
        vf w[8];
        UNROLL for (int g = 0; g < n_groups; g++) w[g] =
            load_weights(type, weights + (size_t)g * group_bytes, k);
        UNROLL for (int c = 0; c < n_columns; c++)
        {
            vf a = vf_set1(*(const float *)(x + (size_t)c * x_bytes));
            UNROLL for (int g = 0; g < n_groups; g++) acc[g][c] = vf_fma(w[g], a, acc[g][c]);
        }
    }
    UNROLL for (int g = 0; g < n_groups; g++) UNROLL for (int c = 0; c < n_columns; c++)
        store_rows(t->y + (size_t)c * t->y_stride + (size_t)g * LANES, acc[g][c],
                   t->rows - (uint32_t)g * LANES);
}

/* Quad i of a block of nibbles with the type's bits above them; `nibbles` is plane i % 4. */
VEC vb quad_of(enum gguf_type type, vb nibbles, const uint8_t *high_bits, int i)
{
    vb quad = i < 4 ? vb_low_nibbles(nibbles) : vb_high_nibbles(nibbles);
    if (type == GGUF_Q5_K)
        quad = vb_or_bits(quad, vb_load(high_bits), 4 - i, 0x10);
    if (type == GGUF_Q6_K)
        quad = vb_or_bits(quad, vb_load(high_bits + i / 4 * QUAD), 4 - 2 * (i % 4), 0x30);
    return quad;
}

/* Bytes of a block's quants in a row group. */
VEC size_t quant_bytes(enum gguf_type type)
{
    return type == GGUF_Q8_0   ? N_QUADS * QUAD
           : type == GGUF_Q5_K ? NIBBLE_BYTES + QUAD
           : type == GGUF_Q6_K ? NIBBLE_BYTES + 2 * QUAD
                               : NIBBLE_BYTES;
}

/* A processor's own prefetching stops at each page and follows one row group at half the memory's
 * speed. Running on beyond the matrix is harmless. */
VEC void prefetch_lines(const uint8_t *p, size_t lines)
{
    UNROLL for (size_t i = 0; i < lines; i++)
        _mm_prefetch((const char *)p + PREFETCH_BYTES + i * KERNEL_ALIGN, _MM_HINT_T0);
}

VEC const struct activation_block *block_at(const uint8_t *x, size_t x_bytes, int column)
{
    return (const struct activation_block *)(x + (size_t)column * x_bytes);
}

/* sums[h][c]: block times column c over its half h; all in sums[0] unless the type (Q6_K) wants
 * halves. */
VEC void dot_block(enum gguf_type type, int n_columns, const uint8_t *quants, const uint8_t *x,
                   size_t x_bytes, vi sums[2][QUANT_TILE_COLUMNS])
{
    bool halves = type == GGUF_Q6_K;
    UNROLL for (int c = 0; c < n_columns; c++)
    {
        const struct activation_block *a = block_at(x, x_bytes, c);
        sums[0][c] = type == GGUF_Q8_0   ? q8_start(a->bias_128)
                     : type == GGUF_Q4_0 ? vi_set1(a->bias_8)
                     : halves            ? vi_set1(a->bias_32[0])
                                         : vi_set1(0);
        if (halves)
            sums[1][c] = vi_set1(a->bias_32[1]);
    }
    if (type == GGUF_Q8_0) {
        UNROLL for (int i = 0; i < (int)N_QUADS; i++)
        {
            vb w = vb_load_q8(quants + (size_t)i * QUAD);
            UNROLL for (int c = 0; c < n_columns; c++) sums[0][c] =
                vi_dot_q8(sums[0][c], w, va_set1(block_at(x, x_bytes, c)->q + 4 * i));
        }
        return;
    }
    UNROLL for (int plane = 0; plane < 4; plane++)
    {
        vb nibbles = vb_load(quants + (size_t)plane * QUAD);
        UNROLL for (int i = plane; i < (int)N_QUADS; i += 4)
        {
            vb w = quad_of(type, nibbles, quants + NIBBLE_BYTES, i);
            vi *sum = sums[halves ? i / 4 : 0];
            UNROLL for (int c = 0; c < n_columns; c++) sum[c] =
                vi_dot(sum[c], w, va_set1(block_at(x, x_bytes, c)->q + 4 * i));
        }
    }
}

/* One row group of a type with a scale per block of QK. */
VEC void tile_blocks(enum gguf_type type, int n_columns, const struct tile *t)
{
    vf acc[QUANT_TILE_COLUMNS];
    size_t x_bytes = t->x_bytes;
    const uint16_t *scales = (const uint16_t *)t->weights;
    const uint8_t *quants = t->weights + scales_bytes(t->cols), *x = t->x;
    UNROLL for (int c = 0; c < n_columns; c++) acc[c] = vf_zero();
    for (uint32_t b = 0; b < t->cols / QK; b++) {
        vi sums[2][QUANT_TILE_COLUMNS];
        dot_block(type, n_columns, quants, x, x_bytes, sums);
        vf d = vf_load_f16(scales);
        UNROLL for (int c = 0; c < n_columns; c++)
        {
            vf scale = vf_set1(block_at(x, x_bytes, c)->scale);
            acc[c] = vf_fma(vf_mul(vf_from_vi(sums[0][c]), d), scale, acc[c]);
        }
        scales += LANES;
        quants += quant_bytes(type);
        x += sizeof(struct activation_block);
    }
    UNROLL for (int c = 0; c < n_columns; c++)
        store_rows(t->y + (size_t)c * t->y_stride, acc[c], t->rows);
}

/* One row group of Q4_K or Q5_K. */
VEC void tile_k(enum gguf_type type, int n_columns, const struct tile *t)
{
    vf acc[QUANT_TILE_COLUMNS];
    size_t x_bytes = t->x_bytes;
    const uint8_t *weights = t->weights, *x = t->x;
    UNROLL for (int c = 0; c < n_columns; c++) acc[c] = vf_zero();
    for (uint32_t b = 0; b < t->cols / QK_K; b++) {
        const struct packed_k_head *head = (const struct packed_k_head *)weights;
        const uint8_t *quants = weights + sizeof(*head);
        vf d = vf_load_f16(head->d), dmin = vf_load_f16(head->dmin);
        for (uint32_t s = 0; s < QK_SUBS; s++, quants += quant_bytes(type)) {
            vi sums[2][QUANT_TILE_COLUMNS];
            dot_block(type, n_columns, quants, x, x_bytes, sums);
            vf scale = vf_mul(d, vf_from_u8(head->sub[s].scale));
            vf minimum = vf_mul(dmin, vf_from_u8(head->sub[s].minimum));
            UNROLL for (int c = 0; c < n_columns; c++)
            {
                const struct activation_block *a = block_at(x, x_bytes, c);
                vf products = vf_mul(vf_from_vi(sums[0][c]), scale);
                acc[c] = vf_fma(products, vf_set1(a->scale), acc[c]);
                acc[c] = vf_fnma(minimum, vf_set1(a->scaled_sum), acc[c]);
            }
            x += sizeof(struct activation_block);
        }
        weights = quants;
    }
    UNROLL for (int c = 0; c < n_columns; c++)
        store_rows(t->y + (size_t)c * t->y_stride, acc[c], t->rows);
}

/* One row group of Q6_K. The scaled sum of both halves stays below 2^24: exact in a float. */
VEC void tile_q6_k(enum gguf_type type, int n_columns, const struct tile *t)
{
    vf acc[QUANT_TILE_COLUMNS];
    size_t x_bytes = t->x_bytes;
    const struct packed_q6_k *block = (const struct packed_q6_k *)t->weights;
    const uint8_t *x = t->x;
    UNROLL for (int c = 0; c < n_columns; c++) acc[c] = vf_zero();
    for (uint32_t b = 0; b < t->cols / QK_K; b++, block++) {
        vf d = vf_load_f16(block->d);
        for (uint32_t s = 0; s < QK_SUBS; s++) {
            vi sums[2][QUANT_TILE_COLUMNS];
            dot_block(type, n_columns, block->quants[s], x, x_bytes, sums);
            vf first = vf_from_i8(block->scale[s][0]), second = vf_from_i8(block->scale[s][1]);
            UNROLL for (int c = 0; c < n_columns; c++)
            {
                vf scaled = vf_mul(vf_from_vi(sums[0][c]), first);
                scaled = vf_fma(vf_from_vi(sums[1][c]), second, scaled);
                acc[c] = vf_fma(vf_mul(scaled, d), vf_set1(block_at(x, x_bytes, c)->scale), acc[c]);
            }
            x += sizeof(struct activation_block);
        }
    }
    UNROLL for (int c = 0; c < n_columns; c++)
        store_rows(t->y + (size_t)c * t->y_stride, acc[c], t->rows);
}

/* Tiles by columns (index 0 is unused) and, for floats, by row groups: 1, 2, 4 or 8. */
#define FLOAT_TILE(TYPE, G, C)                                \
    static void tile_##TYPE##_##G##x##C(const struct tile *t) \
    {                                                         \
        tile_floats(GGUF_##TYPE, G, C, t);                    \
    }
#define QUANT_TILE(TYPE, BODY, C)                       \
    static void tile_##TYPE##_##C(const struct tile *t) \
    {                                                   \
        BODY(GGUF_##TYPE, C, t);                        \
    }

#define FLOAT_TILES_8(TYPE, C) FLOAT_TILE(TYPE, 8, C) FLOAT_TILES_4(TYPE, C)
#define FLOAT_TILES_4(TYPE, C) FLOAT_TILE(TYPE, 4, C) FLOAT_TILES_2(TYPE, C)
#define FLOAT_TILES_2(TYPE, C) FLOAT_TILE(TYPE, 2, C) FLOAT_TILE(TYPE, 1, C)

#define F8(TYPE, C)                                                                        \
    {                                                                                      \
        tile_##TYPE##_1x##C, tile_##TYPE##_2x##C, tile_##TYPE##_4x##C, tile_##TYPE##_8x##C \
    }
#define F4(TYPE, C)                                                         \
    {                                                                       \
        tile_##TYPE##_1x##C, tile_##TYPE##_2x##C, tile_##TYPE##_4x##C, NULL \
    }
#define F2(TYPE, C)                                          \
    {                                                        \
        tile_##TYPE##_1x##C, tile_##TYPE##_2x##C, NULL, NULL \
    }
#define F1(TYPE, C)                           \
    {                                         \
        tile_##TYPE##_1x##C, NULL, NULL, NULL \
    }

#if TILE_COLUMNS == 12
#define FLOAT_TILES(TYPE)                                                                  \
    FLOAT_TILES_8(TYPE, 1)                                                                 \
    FLOAT_TILES_8(TYPE, 2)                                                                 \
    FLOAT_TILES_4(TYPE, 3)                                                                 \
    FLOAT_TILES_4(TYPE, 4)                                                                 \
    FLOAT_TILES_4(TYPE, 5)                                                                 \
    FLOAT_TILES_4(TYPE, 6)                                                                 \
    FLOAT_TILES_2(TYPE, 7)                                                                 \
    FLOAT_TILES_2(TYPE, 8)                                                                 \
    FLOAT_TILES_2(TYPE, 9)                                                                 \
    FLOAT_TILES_2(TYPE, 10)                                                                \
    FLOAT_TILES_2(TYPE, 11)                                                                \
    FLOAT_TILES_2(TYPE, 12)                                                                \
    static tile_fn *const tiles_##TYPE[TILE_COLUMNS + 1][4] = {{NULL},       F8(TYPE, 1),  \
                                                               F8(TYPE, 2),  F4(TYPE, 3),  \
                                                               F4(TYPE, 4),  F4(TYPE, 5),  \
                                                               F4(TYPE, 6),  F2(TYPE, 7),  \
                                                               F2(TYPE, 8),  F2(TYPE, 9),  \
                                                               F2(TYPE, 10), F2(TYPE, 11), \
                                                               F2(TYPE, 12)};
#else
#define FLOAT_TILES(TYPE)                                       \
    FLOAT_TILES_4(TYPE, 1)                                      \
    FLOAT_TILES_2(TYPE, 2)                                      \
    FLOAT_TILES_2(TYPE, 3)                                      \
    FLOAT_TILE(TYPE, 1, 4)                                      \
    FLOAT_TILE(TYPE, 1, 5)                                      \
    FLOAT_TILE(TYPE, 1, 6)                                      \
    static tile_fn *const tiles_##TYPE[TILE_COLUMNS + 1][4] = { \
        {NULL}, F4(TYPE, 1), F2(TYPE, 2), F2(TYPE, 3), F1(TYPE, 4), F1(TYPE, 5), F1(TYPE, 6)};
#endif

#if QUANT_TILE_COLUMNS == 12
#define QUANT_TILES(TYPE, BODY)                                                     \
    QUANT_TILE(TYPE, BODY, 1)                                                       \
    QUANT_TILE(TYPE, BODY, 2)                                                       \
    QUANT_TILE(TYPE, BODY, 3)                                                       \
    QUANT_TILE(TYPE, BODY, 4)                                                       \
    QUANT_TILE(TYPE, BODY, 5)                                                       \
    QUANT_TILE(TYPE, BODY, 6)                                                       \
    QUANT_TILE(TYPE, BODY, 7)                                                       \
    QUANT_TILE(TYPE, BODY, 8)                                                       \
    QUANT_TILE(TYPE, BODY, 9)                                                       \
    QUANT_TILE(TYPE, BODY, 10)                                                      \
    QUANT_TILE(TYPE, BODY, 11)                                                      \
    QUANT_TILE(TYPE, BODY, 12)                                                      \
    static tile_fn *const tiles_##TYPE[QUANT_TILE_COLUMNS + 1] = {NULL,             \
                                                                  tile_##TYPE##_1,  \
                                                                  tile_##TYPE##_2,  \
                                                                  tile_##TYPE##_3,  \
                                                                  tile_##TYPE##_4,  \
                                                                  tile_##TYPE##_5,  \
                                                                  tile_##TYPE##_6,  \
                                                                  tile_##TYPE##_7,  \
                                                                  tile_##TYPE##_8,  \
                                                                  tile_##TYPE##_9,  \
                                                                  tile_##TYPE##_10, \
                                                                  tile_##TYPE##_11, \
                                                                  tile_##TYPE##_12};
#else
#define QUANT_TILES(TYPE, BODY)                                    \
    QUANT_TILE(TYPE, BODY, 1)                                      \
    QUANT_TILE(TYPE, BODY, 2)                                      \
    QUANT_TILE(TYPE, BODY, 3)                                      \
    QUANT_TILE(TYPE, BODY, 4)                                      \
    static tile_fn *const tiles_##TYPE[QUANT_TILE_COLUMNS + 1] = { \
        NULL, tile_##TYPE##_1, tile_##TYPE##_2, tile_##TYPE##_3, tile_##TYPE##_4};
#endif

/* clang-format off */
FLOAT_TILES(F32)
FLOAT_TILES(F16)
FLOAT_TILES(BF16)
QUANT_TILES(Q8_0, tile_blocks)
QUANT_TILES(Q4_0, tile_blocks)
QUANT_TILES(Q4_K, tile_k)
QUANT_TILES(Q5_K, tile_k)
QUANT_TILES(Q6_K, tile_q6_k)
/* clang-format on */

/* The tile function for up to `*groups` row groups times n columns, lowering *groups to what it
 * takes. */
static tile_fn *tile_for(enum gguf_type type, uint32_t n, uint32_t *groups)
{
    tile_fn *const *floats = type == GGUF_F32   ? tiles_F32[n]
                             : type == GGUF_F16 ? tiles_F16[n]
                                                : tiles_BF16[n];
    uint32_t log2 = *groups >= 8 ? 3 : *groups >= 4 ? 2 : *groups >= 2 ? 1 : 0;
    if (type_is_float(type)) {
        while (!floats[log2])
            log2--;
        *groups = 1u << log2;
        return floats[log2];
    }
    *groups = 1;
    switch ((int)type) {
    case GGUF_Q8_0: return tiles_Q8_0[n];
    case GGUF_Q4_0: return tiles_Q4_0[n];
    case GGUF_Q4_K: return tiles_Q4_K[n];
    case GGUF_Q5_K: return tiles_Q5_K[n];
    default: return tiles_Q6_K[n];
    }
}

static void simd_matmul(const struct tensor *tensor, const void *prepared, uint32_t n, float *y,
                        size_t y_stride, uint32_t row_begin, uint32_t row_end)
{
    enum gguf_type type = tensor->type;
    bool floats = type_is_float(type);
    uint32_t most = floats ? TILE_COLUMNS : QUANT_TILE_COLUMNS;
    /* Columns are shared out evenly: 13 are 7 and 6, not 12 and 1. */
    uint32_t n_blocks = n / most + (n % most != 0);
    struct tile t = {
        .group_bytes = packed_group_bytes(type, tensor->cols),
        .cols = tensor->cols,
        .x_bytes = floats ? float_column_bytes(tensor->cols) : quant_column_bytes(tensor->cols),
        .y_stride = y_stride,
    };
    assert(row_begin % KERNEL_ROW_GROUP == 0 && row_end <= tensor->rows);
    uint32_t groups;
    for (uint32_t row = row_begin; row < row_end && n > 0; row += groups * LANES) {
        t.weights = (const uint8_t *)tensor->data + row / LANES * t.group_bytes;
        t.rows = row_end - row;
        groups = row_groups(t.rows);
        (void)tile_for(type, (n + n_blocks - 1) / n_blocks, &groups);
        for (uint32_t b = 0, c = 0; b < n_blocks; b++) {
            uint32_t columns = (n - c) / (n_blocks - b), same = groups;
            t.x = (const uint8_t *)prepared + c * t.x_bytes;
            t.y = y + c * y_stride + row;
            tile_for(type, columns, &same)(&t);
            c += columns;
        }
    }
}

static void simd_prepare_block(const float *x, struct activation_block *block)
{
    vf low = vf_load(x), high = vf_load(x + LANES);
    float largest = vf_largest(vf_max(vf_abs(low), vf_abs(high)));
    if (!(largest >= ACTIVATION_TINY)) {
        memset(block, 0, sizeof(*block));
        return;
    }
    int32_t sums[2];
    vf inverse = vf_set1(127.0f / largest), limit = vf_set1(127.0f), minus = vf_set1(-127.0f);
    /* A NaN becomes 127: sums stay small whatever comes. */
    low = vf_max(vf_min(vf_mul(low, inverse), limit), minus);
    high = vf_max(vf_min(vf_mul(high, inverse), limit), minus);
    quantise_32(low, high, block->q, sums);
    block->scale = largest / 127.0f;
    block->scaled_sum = block->scale * (float)(sums[0] + sums[1]);
    block->bias_128 = -128 * (sums[0] + sums[1]);
    block->bias_8 = -8 * (sums[0] + sums[1]);
    block->bias_32[0] = -32 * sums[0];
    block->bias_32[1] = -32 * sums[1];
    block->pad[0] = block->pad[1] = 0;
}

static void simd_prepare(enum gguf_type type, uint32_t cols, uint32_t n, const float *x,
                         void *prepared)
{
    uint8_t *to = prepared;
    bool floats = type_is_float(type);
    size_t stride = floats ? float_column_bytes(cols) : quant_column_bytes(cols);
    for (uint32_t c = 0; c < n; c++, to += stride, x += cols) {
        if (floats) {
            memcpy(to, x, cols * sizeof(float));
            continue;
        }
        for (uint32_t b = 0; b < cols / QK; b++)
            simd_prepare_block(x + b * QK, (struct activation_block *)to + b);
    }
}

/* ---- vectors ---- */

/* NaN in, NaN out. */
VEC vf vf_exp(vf x)
{
    x = vf_max(vf_set1(EXP_MIN), vf_min(vf_set1(EXP_MAX), x));
    vf n = vf_round(vf_mul(x, vf_set1(EXP_LOG2E)));
    vf r = vf_fnma(n, vf_set1(EXP_LN2_LO), vf_fnma(n, vf_set1(EXP_LN2_HI), x));
    vf p = vf_fma(vf_set1(EXP_C6), r, vf_set1(EXP_C5));
    p = vf_fma(p, r, vf_set1(EXP_C4));
    p = vf_fma(p, r, vf_set1(EXP_C3));
    p = vf_fma(p, r, vf_set1(EXP_C2));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

static void simd_rms_norm(const float *x, const float *weight, uint32_t n, float eps, float *y)
{
    vf sums[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    uint32_t i = 0;
    for (; n - i >= 4 * LANES; i += 4 * LANES) {
        UNROLL for (uint32_t j = 0; j < 4; j++)
        {
            vf v = vf_load(x + i + j * LANES);
            sums[j] = vf_fma(v, v, sums[j]);
        }
    }
    for (; i < n; i += LANES) {
        vf v = n - i >= LANES ? vf_load(x + i) : vf_load_n(x + i, n - i);
        sums[0] = vf_fma(v, v, sums[0]);
    }
    float sum = vf_sum(vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
    vf scale = vf_set1(1.0f / sqrtf(sum / (float)n + eps));
    for (i = 0; n - i >= LANES; i += LANES)
        vf_store(y + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i)));
    if (i < n)
        vf_store_n(y + i,
                   vf_mul(vf_mul(vf_load_n(x + i, n - i), scale), vf_load_n(weight + i, n - i)),
                   n - i);
}

static void simd_add(float *x, const float *y, uint32_t n)
{
    uint32_t i = 0;
    for (; n - i >= LANES; i += LANES)
        vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
    if (i < n)
        vf_store_n(x + i, vf_add(vf_load_n(x + i, n - i), vf_load_n(y + i, n - i)), n - i);
}

VEC vf silu(vf x)
{
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x))));
}

static void simd_silu_mul(float *gate, const float *up, uint32_t n)
{
    uint32_t i = 0;
    for (; n - i >= LANES; i += LANES)
        vf_store(gate + i, vf_mul(silu(vf_load(gate + i)), vf_load(up + i)));
    if (i < n)
        vf_store_n(gate + i, vf_mul(silu(vf_load_n(gate + i, n - i)), vf_load_n(up + i, n - i)),
                   n - i);
}

/* Rotary pairs, one at a time: shapes that fill no vector. */
static void rotate_pairs(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot,
                         bool adjacent, const float *cosines, const float *sines)
{
    uint32_t pairs = n_rot / 2;
    for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
        for (uint32_t i = 0; i < pairs; i++) {
            float *a = adjacent ? x + 2 * i : x + i;
            float *b = adjacent ? a + 1 : a + pairs;
            float before = *a;
            *a = before * cosines[i] - *b * sines[i];
            *b = before * sines[i] + *b * cosines[i];
        }
    }
}

VEC vf rotate_adjacent(vf x, vf cosines, vf sines)
{
    return vf_fmaddsub(x, cosines, vf_mul(vf_swap_pairs(x), sines));
}

/* Heads of 2, 4 or 8 that are rotated whole: one vector takes several of them. */
static void rotate_small_heads(float *x, uint32_t n, uint32_t head_dim, const float *cosines,
                               const float *sines)
{
    float c[8], s[8];
    for (uint32_t i = 0; i < 8; i++) {
        c[i] = cosines[i % (head_dim / 2)];
        s[i] = sines[i % (head_dim / 2)];
    }
    vf all_c = vf_load_twice(c), all_s = vf_load_twice(s);
    uint32_t i = 0;
    for (; n - i >= LANES; i += LANES)
        vf_store(x + i, rotate_adjacent(vf_load(x + i), all_c, all_s));
    if (i < n)
        vf_store_n(x + i, rotate_adjacent(vf_load_n(x + i, n - i), all_c, all_s), n - i);
}

static void rotate_halves(float *x, uint32_t pairs, const float *cosines, const float *sines)
{
    for (uint32_t i = 0; i < pairs; i += LANES) {
        vf a = vf_load(x + i), b = vf_load(x + pairs + i);
        vf c = vf_load(cosines + i), s = vf_load(sines + i);
        vf_store(x + i, vf_fnma(b, s, vf_mul(a, c)));
        vf_store(x + pairs + i, vf_fma(a, s, vf_mul(b, c)));
    }
}

static void simd_rope(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool adjacent,
                      const float *cosines, const float *sines)
{
    if (adjacent && n_rot == head_dim && (head_dim == 2 || head_dim == 4 || head_dim == 8)) {
        rotate_small_heads(x, n_heads * head_dim, head_dim, cosines, sines);
    } else if (adjacent && n_rot % LANES == 0) {
        for (uint32_t i = 0; i < n_rot; i += LANES) {
            vf c = vf_load_twice(cosines + i / 2), s = vf_load_twice(sines + i / 2);
            for (float *head = x; head < x + (size_t)n_heads * head_dim; head += head_dim)
                vf_store(head + i, rotate_adjacent(vf_load(head + i), c, s));
        }
    } else if (!adjacent && n_rot / 2 % LANES == 0) {
        for (uint32_t h = 0; h < n_heads; h++)
            rotate_halves(x + (size_t)h * head_dim, n_rot / 2, cosines, sines);
    } else {
        rotate_pairs(x, n_heads, head_dim, n_rot, adjacent, cosines, sines);
    }
}

static uint32_t simd_argmax(const float *values, uint32_t n)
{
    vf best = vf_set1(-INFINITY);
    vi best_at = vi_set1(0), at = vi_iota();
    uint32_t i = 0;
    for (; n - i >= LANES; i += LANES) {
        vf v = vf_load(values + i);
        best_at = vi_where_greater(v, best, at, best_at);
        best = vf_max(v, best);
        at = vi_add(at, vi_set1(LANES));
    }
    float lane_best[LANES], largest = -INFINITY;
    int32_t lane_at[LANES];
    vf_store(lane_best, best);
    vi_store(lane_at, best_at);
    uint32_t found = n;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        bool equal = lane_best[lane] == largest && (uint32_t)lane_at[lane] < found;
        if (lane_best[lane] > largest || (largest > -INFINITY && equal)) {
            largest = lane_best[lane];
            found = (uint32_t)lane_at[lane];
        }
    }
    for (; i < n; i++) {
        if (values[i] > largest) {
            largest = values[i];
            found = i;
        }
    }
    /* Nothing above -infinity: the first that is no NaN. */
    for (i = 0; found == n && i < n; i++)
        if (values[i] == values[i])
            found = i;
    return found == n ? 0 : found;
}

/* ---- attention ---- */

static void simd_kv_store(const struct kv_shape *shape, void *page, uint32_t slot, const float *k,
                          const float *v)
{
    uint32_t dim = shape->head_dim;
    size_t width = (size_t)shape->n_kv_heads * dim, half = kv_half_elements(shape);
    assert(slot < KV_TILE);
    if (shape->f32) {
        float *to_k = (float *)page + slot, *to_v = (float *)page + half;
        for (size_t i = 0; i < width; i++)
            to_k[i * KV_TILE] = k[i];
        for (uint32_t h = 0; h < shape->n_kv_heads; h++)
            memcpy(to_v + ((size_t)h * KV_TILE + slot) * dim, v + (size_t)h * dim,
                   dim * sizeof(*v));
        return;
    }
    uint16_t *to_k = (uint16_t *)page + slot, *to_v = (uint16_t *)page + half, halves[LANES];
    for (size_t i = 0; i < width; i += LANES) {
        uint32_t n = width - i < LANES ? (uint32_t)(width - i) : LANES;
        if (n == LANES) {
            vf_store_f16(halves, vf_load(k + i));
            UNROLL for (uint32_t j = 0; j < LANES; j++) to_k[(i + j) * KV_TILE] = halves[j];
            continue;
        }
        vf_store_f16(halves, vf_load_n(k + i, n));
        for (uint32_t j = 0; j < n; j++)
            to_k[(i + j) * KV_TILE] = halves[j];
    }
    for (uint32_t h = 0; h < shape->n_kv_heads; h++) {
        uint16_t *row = to_v + ((size_t)h * KV_TILE + slot) * dim;
        const float *from = v + (size_t)h * dim;
        for (uint32_t d = 0; d < dim; d += LANES) {
            uint32_t n = dim - d < LANES ? dim - d : LANES;
            if (n == LANES) {
                vf_store_f16(row + d, vf_load(from + d));
            } else {
                vf_store_f16(halves, vf_load_n(from + d, n));
                memcpy(row + d, halves, n * sizeof(*halves));
            }
        }
    }
}

/* Up to ATTEND_HEADS query heads of one KV head. */
struct attention {
    void *const *pages;
    size_t k_at, v_at; /* elements from a page's begin to the KV head's K and V */
    uint32_t dim;
    uint32_t n_positions;
    uint32_t score_stride; /* floats from head to head: n_positions in whole tiles */
    float scale;
    const float *q; /* heads of `dim` */
    float *out;
    float *scores;
};

VEC vf load_kv(bool f32, const void *page, size_t at)
{
    return f32 ? vf_load((const float *)page + at) : vf_load_f16((const uint16_t *)page + at);
}

/* Scores of `heads` heads against the positions p .. p + 16 * tiles - 1; slots that are not stored
 * give -infinity. */
VEC void score_tiles(bool f32, int heads, int tiles, uint32_t p, const struct attention *a,
                     vf largest[ATTEND_HEADS])
{
    vf acc[ATTEND_TILES][ATTEND_HEADS];
    const void *page[ATTEND_TILES];
    const float *q = a->q;
    size_t dim = a->dim;
    UNROLL for (int t = 0; t < tiles; t++)
    {
        page[t] = a->pages[p / KV_TILE + (uint32_t)t];
        UNROLL for (int h = 0; h < heads; h++) acc[t][h] = vf_zero();
    }
    for (size_t d = 0, at = a->k_at; d < dim; d++, at += KV_TILE) {
        vf k[ATTEND_TILES];
        UNROLL for (int t = 0; t < tiles; t++) k[t] = load_kv(f32, page[t], at);
        UNROLL for (int h = 0; h < heads; h++)
        {
            vf value = vf_set1(q[(size_t)h * dim + d]);
            UNROLL for (int t = 0; t < tiles; t++) acc[t][h] = vf_fma(value, k[t], acc[t][h]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
    {
        float *scores = a->scores + (size_t)h * a->score_stride + p;
        UNROLL for (int t = 0; t < tiles; t++)
        {
            uint32_t n_slots = a->n_positions - p - (uint32_t)t * KV_TILE;
            vf score = vf_mul(acc[t][h], vf_set1(a->scale));
            if (n_slots < KV_TILE)
                score = vf_first(score, vf_set1(-INFINITY), n_slots);
            largest[h] = vf_max(score, largest[h]);
            vf_store(scores + (uint32_t)t * KV_TILE, score);
        }
    }
}

/* Scores and the largest of each head. `tiles` are in flight together. */
VEC void score_heads(bool f32, int heads, int tiles, const struct attention *a,
                     float ret_largest[ATTEND_HEADS])
{
    vf largest[ATTEND_HEADS];
    uint32_t p = 0, step = (uint32_t)tiles * KV_TILE;
    UNROLL for (int h = 0; h < heads; h++) largest[h] = vf_set1(-INFINITY);
    for (; tiles > 1 && a->score_stride - p >= step; p += step)
        score_tiles(f32, heads, tiles, p, a, largest);
    for (; p < a->n_positions; p += KV_TILE)
        score_tiles(f32, heads, 1, p, a, largest);
    UNROLL for (int h = 0; h < heads; h++) ret_largest[h] = vf_largest(largest[h]);
}

/* Turns a head's scores into exp(score - largest); returns 1 / their sum. */
VEC float weigh_scores(float *scores, uint32_t n_positions, float largest)
{
    vf sum = vf_zero();
    for (uint32_t p = 0; p < n_positions; p += KV_TILE) {
        vf weights = vf_exp(vf_sub(vf_load(scores + p), vf_set1(largest)));
        if (n_positions - p < KV_TILE)
            weights = vf_first(weights, vf_zero(), n_positions - p);
        vf_store(scores + p, weights);
        sum = vf_add(sum, weights);
    }
    return 1.0f / vf_sum(sum);
}

/* Weighted sums of V's dimensions d .. d + 16 * chunks - 1 for `heads` heads. Lanes beyond `dim`
 * read on into the page and are not stored. */
VEC void weigh_values(bool f32, int heads, int chunks, uint32_t d, const struct attention *a,
                      const float inverse[ATTEND_HEADS])
{
    vf acc[ATTEND_HEADS][ATTEND_CHUNKS];
    UNROLL for (int h = 0; h < heads; h++) UNROLL for (int j = 0; j < chunks; j++) acc[h][j] =
        vf_zero();
    for (uint32_t p = 0; p < a->n_positions; p += KV_TILE) {
        const void *page = a->pages[p / KV_TILE];
        const float *weights = a->scores + p;
        uint32_t left = a->n_positions - p, n_slots = left < KV_TILE ? left : KV_TILE;
        size_t at = a->v_at + d;
        for (uint32_t slot = 0; slot < n_slots; slot++, at += a->dim) {
            vf v[ATTEND_CHUNKS];
            UNROLL for (int j = 0; j < chunks; j++) v[j] =
                load_kv(f32, page, at + (size_t)j * LANES);
            UNROLL for (int h = 0; h < heads; h++)
            {
                vf w = vf_set1(weights[(size_t)h * a->score_stride + slot]);
                UNROLL for (int j = 0; j < chunks; j++) acc[h][j] = vf_fma(w, v[j], acc[h][j]);
            }
        }
    }
    UNROLL for (int h = 0; h < heads; h++) UNROLL for (int j = 0; j < chunks; j++)
        store_rows(a->out + (uint32_t)h * a->dim + d + (uint32_t)j * LANES,
                   vf_mul(acc[h][j], vf_set1(inverse[h])), a->dim - d - (uint32_t)j * LANES);
}

/* Heads of 8: a vector takes an even position and the odd one after it. */
VEC void weigh_values_8(bool f32, int heads, const struct attention *a,
                        const float inverse[ATTEND_HEADS])
{
    vf acc[ATTEND_HEADS];
    UNROLL for (int h = 0; h < heads; h++) acc[h] = vf_zero();
    for (uint32_t p = 0; p < a->n_positions; p += 2) {
        const float *weights = a->scores + p;
        size_t at = a->v_at + (size_t)(p % KV_TILE) * 8;
        vf v = load_kv(f32, a->pages[p / KV_TILE], at);
        if (p + 1 == a->n_positions)
            v = vf_first(v, vf_zero(), 8);
        UNROLL for (int h = 0; h < heads; h++)
        {
            const float *pair = weights + (size_t)h * a->score_stride;
            acc[h] = vf_fma(vf_set2(pair[0], pair[1]), v, acc[h]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        vf_store_n(a->out + (uint32_t)h * 8, vf_mul(vf_fold(acc[h]), vf_set1(inverse[h])), 8);
}

VEC void attend_heads(bool f32, int heads, int tiles, const struct attention *a)
{
    float of_head[ATTEND_HEADS]; /* the largest score, then 1 / the weights' sum */
    score_heads(f32, heads, tiles, a, of_head);
    UNROLL for (int h = 0; h < heads; h++) of_head[h] =
        weigh_scores(a->scores + (size_t)h * a->score_stride, a->n_positions, of_head[h]);
    if (a->dim == 8) {
        weigh_values_8(f32, heads, a, of_head);
        return;
    }
    uint32_t d = 0;
    for (; a->dim - d >= ATTEND_CHUNKS * LANES; d += ATTEND_CHUNKS * LANES)
        weigh_values(f32, heads, ATTEND_CHUNKS, d, a, of_head);
    for (; d < a->dim; d += LANES)
        weigh_values(f32, heads, 1, d, a, of_head);
}

typedef void attend_fn(const struct attention *a);

/* A single head has too little to do between two steps of its sum: it takes several tiles. */
#define ATTEND_UNIT(NAME, F32, HEADS, TILES)             \
    static void attend_##NAME(const struct attention *a) \
    {                                                    \
        attend_heads(F32, HEADS, TILES, a);              \
    }

ATTEND_UNIT(one_f16, false, 1, ATTEND_TILES)
ATTEND_UNIT(one_f32, true, 1, ATTEND_TILES)
ATTEND_UNIT(two_f16, false, 2, 1)
ATTEND_UNIT(two_f32, true, 2, 1)
ATTEND_UNIT(most_f16, false, ATTEND_HEADS, 1)
ATTEND_UNIT(most_f32, true, ATTEND_HEADS, 1)

static void simd_attend(const struct kv_shape *shape, void *const *pages, uint32_t n_positions,
                        uint32_t n_heads, float scale, const float *q, float *out, void *scratch)
{
    attend_fn *one = shape->f32 ? attend_one_f32 : attend_one_f16;
    attend_fn *two = shape->f32 ? attend_two_f32 : attend_two_f16;
    attend_fn *most = shape->f32 ? attend_most_f32 : attend_most_f16;
    uint32_t per_kv_head = n_heads / shape->n_kv_heads, dim = shape->head_dim;
    struct attention a = {
        .pages = pages,
        .dim = dim,
        .n_positions = n_positions,
        .score_stride = (n_positions + KV_TILE - 1) / KV_TILE * KV_TILE,
        .scale = scale,
        .q = q,
        .out = out,
        .scores = scratch,
    };
    for (uint32_t kv_head = 0; kv_head < shape->n_kv_heads; kv_head++) {
        a.k_at = (size_t)kv_head * dim * KV_TILE;
        a.v_at = kv_half_elements(shape) + a.k_at;
        for (uint32_t left = per_kv_head, heads; left > 0; left -= heads) {
            heads = left >= ATTEND_HEADS ? ATTEND_HEADS : left >= 2 ? 2 : 1;
            (heads == 1 ? one : heads == 2 ? two : most)(&a);
            a.q += heads * dim;
            a.out += heads * dim;
        }
    }
}

#define SIMD_TABLE(NAME)                                                                          \
    {                                                                                             \
        .name = NAME, .supports = kernels_supports, .packed_bytes = kernels_packed_bytes,         \
        .pack = kernels_pack, .unpack_row = kernels_unpack_row,                                   \
        .prepared_bytes = kernels_prepared_bytes, .prepare = simd_prepare,                        \
        .same_preparation = kernels_same_preparation, .matmul = simd_matmul,                      \
        .rms_norm = simd_rms_norm, .add = simd_add, .silu_mul = simd_silu_mul, .rope = simd_rope, \
        .kv_page_bytes = kernels_kv_page_bytes, .kv_store = simd_kv_store, .attend = simd_attend, \
        .attend_scratch_bytes = kernels_attend_scratch_bytes, .argmax = simd_argmax,              \
    }

#endif
