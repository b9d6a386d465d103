/* The scalar variant: plain C in the order the others keep, their oracle and the fallback of a
 * machine without AVX2. Lanes (16 rows, 16 positions) are inner loops that a compiler may turn into
 * whatever vectors it has; no sum runs across them but at the end, in one fixed order. */
#include "daemon/engine/kernels_internal.h"

#include <math.h>

#define LANES 16u

/* ---- matrix times columns ---- */

static void scalar_prepare_block(const float *x, struct activation_block *block)
{
    float largest = 0;
    for (uint32_t k = 0; k < QK; k++)
        largest = fmaxf(largest, fabsf(x[k]));
    memset(block, 0, sizeof(*block));
    if (!(largest >= ACTIVATION_TINY))
        return;
    float inverse = 127.0f / largest;
    int32_t sums[2] = {0, 0};
    for (uint32_t k = 0; k < QK; k++) {
        float q = rintf(x[k] * inverse);
        block->q[k] = (int8_t)(q > 127 ? 127 : q >= -127 ? q : -127);
        sums[k / 16] += block->q[k];
    }
    block->scale = largest / 127.0f;
    block->scaled_sum = block->scale * (float)(sums[0] + sums[1]);
    block->bias_128 = -128 * (sums[0] + sums[1]);
    block->bias_8 = -8 * (sums[0] + sums[1]);
    block->bias_32[0] = -32 * sums[0];
    block->bias_32[1] = -32 * sums[1];
}

static void scalar_prepare(enum gguf_type type, uint32_t cols, uint32_t n, const float *x,
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
            scalar_prepare_block(x + b * QK, (struct activation_block *)to + b);
    }
}

static void dot_floats(enum gguf_type type, const void *group, uint32_t cols, const float *x,
                       float acc[LANES])
{
    const float *singles = group;
    const uint16_t *halves = group;
    for (uint32_t k = 0; k < cols; k++) {
        for (uint32_t lane = 0; lane < LANES; lane++) {
            size_t i = (size_t)k * LANES + lane;
            float w = type == GGUF_F32   ? singles[i]
                      : type == GGUF_F16 ? f16_to_f32(halves[i])
                                         : bf16_to_f32(halves[i]);
            acc[lane] += w * x[k];
        }
    }
}

/* sum[lane] += the products of quad i of a block, whose unsigned quants stand in `quad`. */
static void dot_quad(const uint8_t quad[QUAD], const int8_t q[4], int32_t sum[LANES])
{
    for (uint32_t lane = 0; lane < LANES; lane++)
        for (uint32_t j = 0; j < 4; j++)
            sum[lane] += quad[lane * 4 + j] * q[j];
}

/* Unsigned quants of quad i: a nibble each and, with `high_bits` of 1 or 2, what stands above. */
static void unpack_quad(const uint8_t *quants, uint32_t i, uint32_t high_bits,
                        uint8_t ret_quad[QUAD])
{
    const uint8_t *high = quants + NIBBLE_BYTES + (high_bits == 2 ? i / 4 * QUAD : 0);
    uint32_t shift = high_bits == 2 ? i % 4 * 2 : i;
    for (uint32_t j = 0; j < QUAD; j++) {
        ret_quad[j] = quants[i % 4 * QUAD + j] >> (i < 4 ? 0 : 4) & 15;
        if (high_bits)
            ret_quad[j] |= (high[j] >> shift & ((1u << high_bits) - 1)) << 4;
    }
}

static void dot_q8_0(const uint8_t *group, uint32_t cols, const struct activation_block *x,
                     float acc[LANES])
{
    const uint16_t *scales = (const uint16_t *)group;
    const uint8_t *quants = group + scales_bytes(cols);
    for (uint32_t b = 0; b < cols / QK; b++, x++, scales += LANES) {
        int32_t sum[LANES];
        for (uint32_t lane = 0; lane < LANES; lane++)
            sum[lane] = x->bias_128;
        for (uint32_t i = 0; i < N_QUADS; i++, quants += QUAD)
            dot_quad(quants, x->q + 4 * i, sum);
        for (uint32_t lane = 0; lane < LANES; lane++)
            acc[lane] += (float)sum[lane] * f16_to_f32(scales[lane]) * x->scale;
    }
}

static void dot_q4_0(const uint8_t *group, uint32_t cols, const struct activation_block *x,
                     float acc[LANES])
{
    const uint16_t *scales = (const uint16_t *)group;
    const uint8_t *quants = group + scales_bytes(cols);
    uint8_t quad[QUAD];
    for (uint32_t b = 0; b < cols / QK; b++, x++, scales += LANES, quants += NIBBLE_BYTES) {
        int32_t sum[LANES];
        for (uint32_t lane = 0; lane < LANES; lane++)
            sum[lane] = x->bias_8;
        for (uint32_t i = 0; i < N_QUADS; i++) {
            unpack_quad(quants, i, 0, quad);
            dot_quad(quad, x->q + 4 * i, sum);
        }
        for (uint32_t lane = 0; lane < LANES; lane++)
            acc[lane] += (float)sum[lane] * f16_to_f32(scales[lane]) * x->scale;
    }
}

static void dot_k_super(const struct packed_k_head *head, const uint8_t *quants, bool five_bits,
                        const struct activation_block *x, float acc[LANES])
{
    uint8_t quad[QUAD];
    for (uint32_t s = 0; s < QK_SUBS; s++, x++) {
        int32_t sum[LANES] = {0};
        for (uint32_t i = 0; i < N_QUADS; i++) {
            unpack_quad(quants, i, five_bits, quad);
            dot_quad(quad, x->q + 4 * i, sum);
        }
        quants += NIBBLE_BYTES + (five_bits ? QUAD : 0);
        for (uint32_t lane = 0; lane < LANES; lane++) {
            float scale = f16_to_f32(head->d[lane]) * head->sub[s].scale[lane];
            float minimum = f16_to_f32(head->dmin[lane]) * head->sub[s].minimum[lane];
            acc[lane] += (float)sum[lane] * scale * x->scale;
            acc[lane] -= minimum * x->scaled_sum;
        }
    }
}

static void dot_q6_k_super(const struct packed_q6_k *block, const struct activation_block *x,
                           float acc[LANES])
{
    uint8_t quad[QUAD];
    for (uint32_t s = 0; s < QK_SUBS; s++, x++) {
        int32_t sum[2][LANES];
        for (uint32_t lane = 0; lane < LANES; lane++) {
            sum[0][lane] = x->bias_32[0];
            sum[1][lane] = x->bias_32[1];
        }
        for (uint32_t i = 0; i < N_QUADS; i++) {
            unpack_quad(block->quants[s], i, 2, quad);
            dot_quad(quad, x->q + 4 * i, sum[i / 4]);
        }
        for (uint32_t lane = 0; lane < LANES; lane++) {
            int32_t scaled =
                sum[0][lane] * block->scale[s][0][lane] + sum[1][lane] * block->scale[s][1][lane];
            acc[lane] += (float)scaled * f16_to_f32(block->d[lane]) * x->scale;
        }
    }
}

static void dot_group(const struct tensor *tensor, const uint8_t *group, const void *column,
                      float acc[LANES])
{
    const struct activation_block *x = column;
    uint32_t cols = tensor->cols;
    switch ((int)tensor->type) {
    case GGUF_Q8_0: dot_q8_0(group, cols, x, acc); break;
    case GGUF_Q4_0: dot_q4_0(group, cols, x, acc); break;
    case GGUF_Q4_K:
        for (uint32_t b = 0; b < cols / QK_K; b++) {
            const struct packed_q4_k *block = (const struct packed_q4_k *)group + b;
            dot_k_super(&block->head, block->quants[0], false, x + b * QK_SUBS, acc);
        }
        break;
    case GGUF_Q5_K:
        for (uint32_t b = 0; b < cols / QK_K; b++) {
            const struct packed_q5_k *block = (const struct packed_q5_k *)group + b;
            dot_k_super(&block->head, block->quants[0], true, x + b * QK_SUBS, acc);
        }
        break;
    case GGUF_Q6_K:
        for (uint32_t b = 0; b < cols / QK_K; b++)
            dot_q6_k_super((const struct packed_q6_k *)group + b, x + b * QK_SUBS, acc);
        break;
    default: dot_floats(tensor->type, group, cols, column, acc); break;
    }
}

static void scalar_matmul(const struct tensor *tensor, const void *prepared, uint32_t n, float *y,
                          size_t y_stride, uint32_t row_begin, uint32_t row_end)
{
    size_t column_bytes = kernels_prepared_bytes(tensor->type, tensor->cols, 1);
    assert(row_begin % KERNEL_ROW_GROUP == 0);
    for (uint32_t row = row_begin; row < row_end; row += LANES) {
        const uint8_t *group = packed_group(tensor, row / LANES);
        uint32_t n_lanes = row_end - row < LANES ? row_end - row : LANES;
        for (uint32_t c = 0; c < n; c++) {
            float acc[LANES] = {0};
            dot_group(tensor, group, (const uint8_t *)prepared + c * column_bytes, acc);
            memcpy(y + c * y_stride + row, acc, n_lanes * sizeof(float));
        }
    }
}

/* ---- vectors ---- */

static float scalar_exp(float x)
{
    x = x > EXP_MAX ? EXP_MAX : x;
    x = x < EXP_MIN ? EXP_MIN : x;
    if (x != x)
        return x;
    float n = rintf(x * EXP_LOG2E);
    float r = x - n * EXP_LN2_HI - n * EXP_LN2_LO;
    float p = EXP_C6;
    p = p * r + EXP_C5;
    p = p * r + EXP_C4;
    p = p * r + EXP_C3;
    p = p * r + EXP_C2;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits_f32((uint32_t)((int32_t)n + 127) << 23);
}

/* Adds the lanes up in pairs, quarters, halves. */
static float sum_lanes(const float acc[LANES])
{
    float sums[LANES];
    memcpy(sums, acc, sizeof(sums));
    for (uint32_t width = LANES / 2; width > 0; width /= 2)
        for (uint32_t lane = 0; lane < width; lane++)
            sums[lane] += sums[lane + width];
    return sums[0];
}

static void scalar_rms_norm(const float *x, const float *weight, uint32_t n, float eps, float *y)
{
    float acc[LANES] = {0};
    for (uint32_t i = 0; i < n; i++)
        acc[i % LANES] += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum_lanes(acc) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] * scale * weight[i];
}

static void scalar_add(float *x, const float *y, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] += y[i];
}

static void scalar_silu_mul(float *gate, const float *up, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1.0f + scalar_exp(-gate[i])) * up[i];
}

static void scalar_rope(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot,
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

static uint32_t scalar_argmax(const float *values, uint32_t n)
{
    uint32_t best = 0;
    float largest = -INFINITY;
    bool found = false;
    for (uint32_t i = 0; i < n; i++) {
        if (values[i] > largest || (!found && values[i] == largest)) {
            best = i;
            largest = values[i];
            found = true;
        }
    }
    return best;
}

/* ---- attention ---- */

static void scalar_kv_store(const struct kv_shape *shape, void *page, uint32_t slot, const float *k,
                            const float *v)
{
    size_t half = kv_half_elements(shape);
    assert(slot < KV_TILE);
    for (uint32_t h = 0; h < shape->n_kv_heads; h++) {
        for (uint32_t d = 0; d < shape->head_dim; d++) {
            size_t head = (size_t)h * shape->head_dim, i = head + d;
            size_t k_at = i * KV_TILE + slot;
            size_t v_at = half + head * KV_TILE + (size_t)slot * shape->head_dim + d;
            if (shape->f32) {
                ((float *)page)[k_at] = k[i];
                ((float *)page)[v_at] = v[i];
            } else {
                ((uint16_t *)page)[k_at] = f32_to_f16(k[i]);
                ((uint16_t *)page)[v_at] = f32_to_f16(v[i]);
            }
        }
    }
}

static float page_value(const struct kv_shape *shape, const void *page, size_t at)
{
    return shape->f32 ? ((const float *)page)[at] : f16_to_f32(((const uint16_t *)page)[at]);
}

/* One head's scores against the tile's first n_slots positions. */
static void score_tile(const struct kv_shape *shape, const void *page, uint32_t kv_head,
                       uint32_t n_slots, float scale, const float *q, float *ret_scores)
{
    size_t at = (size_t)kv_head * shape->head_dim * KV_TILE;
    float acc[LANES] = {0};
    for (uint32_t d = 0; d < shape->head_dim; d++)
        for (uint32_t slot = 0; slot < n_slots; slot++)
            acc[slot] += q[d] * page_value(shape, page, at + (size_t)d * KV_TILE + slot);
    for (uint32_t slot = 0; slot < n_slots; slot++)
        ret_scores[slot] = acc[slot] * scale;
}

/* Scores become exp(score - largest); returns their sum. */
static float exp_scores(float *scores, uint32_t n)
{
    float acc[LANES] = {0}, largest = -INFINITY;
    for (uint32_t i = 0; i < n; i++)
        largest = fmaxf(largest, scores[i]);
    for (uint32_t i = 0; i < n; i++) {
        scores[i] = scalar_exp(scores[i] - largest);
        acc[i % LANES] += scores[i];
    }
    return sum_lanes(acc);
}

static void scalar_attend(const struct kv_shape *shape, void *const *pages, uint32_t n_positions,
                          uint32_t n_heads, float scale, const float *q, float *out, void *scratch)
{
    uint32_t per_kv_head = n_heads / shape->n_kv_heads, dim = shape->head_dim;
    float *scores = scratch;
    for (uint32_t h = 0; h < n_heads; h++, q += dim, out += dim) {
        uint32_t kv_head = h / per_kv_head;
        for (uint32_t p = 0; p < n_positions; p += KV_TILE) {
            uint32_t n_slots = n_positions - p < KV_TILE ? n_positions - p : KV_TILE;
            score_tile(shape, pages[p / KV_TILE], kv_head, n_slots, scale, q, scores + p);
        }
        float sum = exp_scores(scores, n_positions);
        memset(out, 0, dim * sizeof(float));
        for (uint32_t p = 0; p < n_positions; p++) {
            size_t at = kv_half_elements(shape) +
                        ((size_t)kv_head * KV_TILE + p % KV_TILE) * shape->head_dim;
            for (uint32_t d = 0; d < dim; d++)
                out[d] += scores[p] * page_value(shape, pages[p / KV_TILE], at + d);
        }
        for (uint32_t d = 0; d < dim; d++)
            out[d] *= 1.0f / sum;
    }
}

const struct kernel_table kernels_scalar = {
    .name = "scalar",
    .supports = kernels_supports,
    .packed_bytes = kernels_packed_bytes,
    .pack = kernels_pack,
    .unpack_row = kernels_unpack_row,
    .prepared_bytes = kernels_prepared_bytes,
    .prepare = scalar_prepare,
    .same_preparation = kernels_same_preparation,
    .matmul = scalar_matmul,
    .rms_norm = scalar_rms_norm,
    .add = scalar_add,
    .silu_mul = scalar_silu_mul,
    .rope = scalar_rope,
    .kv_page_bytes = kernels_kv_page_bytes,
    .kv_store = scalar_kv_store,
    .attend = scalar_attend,
    .attend_scratch_bytes = kernels_attend_scratch_bytes,
    .argmax = scalar_argmax,
};
