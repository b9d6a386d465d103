/* Packing: from the file's rows to groups of interleaved rows, and single rows back. */
#include "daemon/engine/kernels_internal.h"

#include "lib/cleanup.h"

float f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t exponent = value >> 10 & 31, mantissa = value & 0x3ff;
    if (exponent == 31)
        return bits_f32(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        float small = (float)mantissa * 0x1p-24f;
        return sign ? -small : small;
    }
    return bits_f32(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t f32_to_f16(float value)
{
    uint32_t bits = f32_bits(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
    if (magnitude >= 0x477ff000) /* 65520 and above round to infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        /* Below 2^-14 the result counts units of 2^-24: adding 0.5 leaves them in the low bits of
         * the sum, rounded to nearest even by the addition itself. */
        float sum = bits_f32(magnitude) + 0.5f;
        return sign | (f32_bits(sum) - 0x3f000000);
    }
    uint32_t odd = magnitude >> 13 & 1;
    return sign | ((magnitude + 0xfff + odd - 0x38000000) >> 13);
}

bool kernels_supports(enum gguf_type type)
{
    switch ((int)type) {
    case GGUF_F32:
    case GGUF_F16:
    case GGUF_BF16:
    case GGUF_Q8_0:
    case GGUF_Q4_0:
    case GGUF_Q4_K:
    case GGUF_Q5_K:
    case GGUF_Q6_K: return true;
    default: return false;
    }
}

/* Elements of the file's block; 1 for plain numbers. */
static uint32_t type_block(enum gguf_type type)
{
    if (type_is_float(type))
        return 1;
    return type == GGUF_Q8_0 || type == GGUF_Q4_0 ? QK : QK_K;
}

/* Bytes of one row in the file's layout. */
static size_t file_row_bytes(enum gguf_type type, uint32_t cols)
{
    size_t blocks = cols / type_block(type);
    switch ((int)type) {
    case GGUF_F32: return blocks * sizeof(float);
    case GGUF_F16:
    case GGUF_BF16: return blocks * sizeof(uint16_t);
    case GGUF_Q8_0: return blocks * sizeof(struct file_q8_0);
    case GGUF_Q4_0: return blocks * sizeof(struct file_q4_0);
    case GGUF_Q4_K: return blocks * sizeof(struct file_q4_k);
    case GGUF_Q5_K: return blocks * sizeof(struct file_q5_k);
    case GGUF_Q6_K: return blocks * sizeof(struct file_q6_k);
    default: return 0;
    }
}

size_t packed_group_bytes(enum gguf_type type, uint32_t cols)
{
    if (!kernels_supports(type) || cols == 0 || cols % type_block(type) != 0)
        return 0;
    size_t blocks = cols / QK, supers = cols / QK_K;
    switch ((int)type) {
    case GGUF_F32: return (size_t)cols * KERNEL_ROW_GROUP * sizeof(float);
    case GGUF_F16:
    case GGUF_BF16: return align_up((size_t)cols * KERNEL_ROW_GROUP * sizeof(uint16_t));
    case GGUF_Q8_0: return scales_bytes(cols) + blocks * N_QUADS * QUAD;
    case GGUF_Q4_0: return scales_bytes(cols) + blocks * NIBBLE_BYTES;
    case GGUF_Q4_K: return supers * sizeof(struct packed_q4_k);
    case GGUF_Q5_K: return supers * sizeof(struct packed_q5_k);
    default: return supers * sizeof(struct packed_q6_k);
    }
}

size_t kernels_packed_bytes(enum gguf_type type, uint32_t rows, uint32_t cols)
{
    return row_groups(rows) * packed_group_bytes(type, cols);
}

/* ---- one row of the file into its lane of a group ---- */

/* Writes element k (0..QK-1) of a lane: nibbles, and what the type has above them. */
static void put_nibble(uint8_t *quants, uint32_t lane, uint32_t k, uint32_t value)
{
    uint32_t quad = k / 4;
    quants[quad % 4 * QUAD + lane * 4 + k % 4] |= quad < 4 ? value : value << 4;
}

static uint32_t get_nibble(const uint8_t *quants, uint32_t lane, uint32_t k)
{
    uint32_t quad = k / 4;
    return quants[quad % 4 * QUAD + lane * 4 + k % 4] >> (quad < 4 ? 0 : 4) & 15;
}

/* Scale and minimum of sub-block s, six bits each, from the 12 bytes that hold eight of both. */
static void k_scale(const uint8_t scales[12], uint32_t s, uint8_t *ret_scale, uint8_t *ret_minimum)
{
    if (s < 4) {
        *ret_scale = scales[s] & 63;
        *ret_minimum = scales[s + 4] & 63;
    } else {
        *ret_scale = (scales[s + 4] & 15) | scales[s - 4] >> 6 << 4;
        *ret_minimum = scales[s + 4] >> 4 | scales[s] >> 6 << 4;
    }
}

/* Nibble of element k of sub-block s in the K types' 128 bytes. */
static uint32_t file_k_nibble(const uint8_t q[128], uint32_t s, uint32_t k)
{
    return q[s / 2 * 32 + k] >> (s % 2 * 4) & 15;
}

static void pack_q8_0(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q8_0 *blocks = row;
    uint16_t *scales = (uint16_t *)group;
    uint8_t *quants = group + scales_bytes(cols);
    for (uint32_t b = 0; b < cols / QK; b++, quants += N_QUADS * QUAD) {
        scales[b * KERNEL_ROW_GROUP + lane] = blocks[b].d;
        for (uint32_t k = 0; k < QK; k++)
            quants[k / 4 * QUAD + lane * 4 + k % 4] = (uint8_t)blocks[b].q[k] ^ 0x80;
    }
}

static void pack_q4_0(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q4_0 *blocks = row;
    uint16_t *scales = (uint16_t *)group;
    uint8_t *quants = group + scales_bytes(cols);
    for (uint32_t b = 0; b < cols / QK; b++, quants += NIBBLE_BYTES) {
        scales[b * KERNEL_ROW_GROUP + lane] = blocks[b].d;
        for (uint32_t k = 0; k < QK; k++)
            put_nibble(quants, lane, k, k < 16 ? blocks[b].q[k] & 15 : blocks[b].q[k - 16] >> 4);
    }
}

static void pack_k_head(struct packed_k_head *head, uint32_t lane, uint16_t d, uint16_t dmin,
                        const uint8_t scales[12])
{
    head->d[lane] = d;
    head->dmin[lane] = dmin;
    for (uint32_t s = 0; s < QK_SUBS; s++)
        k_scale(scales, s, &head->sub[s].scale[lane], &head->sub[s].minimum[lane]);
}

static void pack_q4_k(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q4_k *from = row;
    struct packed_q4_k *to = (struct packed_q4_k *)group;
    for (uint32_t b = 0; b < cols / QK_K; b++, from++, to++) {
        pack_k_head(&to->head, lane, from->d, from->dmin, from->scales);
        for (uint32_t s = 0; s < QK_SUBS; s++)
            for (uint32_t k = 0; k < QK; k++)
                put_nibble(to->quants[s], lane, k, file_k_nibble(from->q, s, k));
    }
}

static void pack_q5_k(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q5_k *from = row;
    struct packed_q5_k *to = (struct packed_q5_k *)group;
    for (uint32_t b = 0; b < cols / QK_K; b++, from++, to++) {
        pack_k_head(&to->head, lane, from->d, from->dmin, from->scales);
        for (uint32_t s = 0; s < QK_SUBS; s++)
            for (uint32_t k = 0; k < QK; k++) {
                put_nibble(to->quants[s], lane, k, file_k_nibble(from->q, s, k));
                uint32_t high = from->high[k] >> s & 1;
                to->quants[s][NIBBLE_BYTES + lane * 4 + k % 4] |= high << k / 4;
            }
    }
}

/* The file keeps each half superblock as 64 low bytes and 32 high ones: element 32i + k of the half
 * has its nibble in low byte 32 (i % 2) + k, half i / 2, and its two high bits in high byte k. */
static void pack_q6_k(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q6_k *from = row;
    struct packed_q6_k *to = (struct packed_q6_k *)group;
    for (uint32_t b = 0; b < cols / QK_K; b++, from++, to++) {
        to->d[lane] = from->d;
        for (uint32_t s = 0; s < QK_SUBS; s++) {
            uint32_t half = s / 4, i = s % 4;
            to->scale[s][0][lane] = from->scales[2 * s];
            to->scale[s][1][lane] = from->scales[2 * s + 1];
            for (uint32_t k = 0; k < QK; k++) {
                uint32_t low = from->low[half * 64 + i % 2 * 32 + k] >> i / 2 * 4 & 15;
                uint32_t high = from->high[half * 32 + k] >> 2 * i & 3;
                put_nibble(to->quants[s], lane, k, low);
                to->quants[s][NIBBLE_BYTES + k / 16 * QUAD + lane * 4 + k % 4] |= high
                                                                                  << k / 4 % 4 * 2;
            }
        }
    }
}

static void pack_row(enum gguf_type type, uint8_t *group, uint32_t lane, uint32_t cols,
                     const void *row)
{
    const uint8_t *bytes = row;
    switch ((int)type) {
    case GGUF_F32:
        for (uint32_t k = 0; k < cols; k++)
            memcpy(group + (k * KERNEL_ROW_GROUP + lane) * 4, bytes + k * 4, 4);
        break;
    case GGUF_F16:
    case GGUF_BF16:
        for (uint32_t k = 0; k < cols; k++)
            memcpy(group + (k * KERNEL_ROW_GROUP + lane) * 2, bytes + k * 2, 2);
        break;
    case GGUF_Q8_0: pack_q8_0(group, lane, cols, row); break;
    case GGUF_Q4_0: pack_q4_0(group, lane, cols, row); break;
    case GGUF_Q4_K: pack_q4_k(group, lane, cols, row); break;
    case GGUF_Q5_K: pack_q5_k(group, lane, cols, row); break;
    case GGUF_Q6_K: pack_q6_k(group, lane, cols, row); break;
    default: break;
    }
}

void kernels_pack(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows)
{
    size_t group_bytes = packed_group_bytes(tensor->type, tensor->cols);
    size_t row_bytes = file_row_bytes(tensor->type, tensor->cols);
    assert(row_begin % KERNEL_ROW_GROUP == 0 && row_begin + n_rows <= tensor->rows);
    assert(n_rows % KERNEL_ROW_GROUP == 0 || row_begin + n_rows == tensor->rows);
    for (uint32_t i = 0; i < n_rows; i++) {
        uint32_t lane = i % KERNEL_ROW_GROUP;
        uint8_t *group = (uint8_t *)tensor->data + (row_begin + i) / KERNEL_ROW_GROUP * group_bytes;
        if (lane == 0)
            memset(group, 0, group_bytes);
        pack_row(tensor->type, group, lane, tensor->cols, (const uint8_t *)rows + i * row_bytes);
    }
}

/* ---- one row back ---- */

static void unpack_k_sub(const struct packed_k_head *head, uint32_t s, uint32_t lane,
                         const uint8_t *quants, bool five_bits, float *ret_values)
{
    float scale = f16_to_f32(head->d[lane]) * head->sub[s].scale[lane];
    float minimum = f16_to_f32(head->dmin[lane]) * head->sub[s].minimum[lane];
    for (uint32_t k = 0; k < QK; k++) {
        uint32_t q = get_nibble(quants, lane, k);
        if (five_bits)
            q |= (quants[NIBBLE_BYTES + lane * 4 + k % 4] >> k / 4 & 1) << 4;
        ret_values[k] = scale * (float)q - minimum;
    }
}

static void unpack_q6_k_sub(const struct packed_q6_k *block, uint32_t s, uint32_t lane,
                            float *ret_values)
{
    const uint8_t *quants = block->quants[s];
    for (uint32_t k = 0; k < QK; k++) {
        uint8_t high = quants[NIBBLE_BYTES + k / 16 * QUAD + lane * 4 + k % 4] >> k / 4 % 4 * 2 & 3;
        int32_t q = (int32_t)(get_nibble(quants, lane, k) | high << 4) - 32;
        ret_values[k] = f16_to_f32(block->d[lane]) * block->scale[s][k / 16][lane] * (float)q;
    }
}

/* The QK values of block b of a quantised group's lane. */
static void unpack_block(const struct tensor *tensor, const uint8_t *group, uint32_t b,
                         uint32_t lane, float *ret_values)
{
    const uint16_t *scales = (const uint16_t *)group;
    const uint8_t *quants = group + scales_bytes(tensor->cols);
    uint32_t super = b / QK_SUBS, s = b % QK_SUBS;
    switch ((int)tensor->type) {
    case GGUF_Q8_0:
        for (uint32_t k = 0; k < QK; k++) {
            uint8_t q = quants[(b * N_QUADS + k / 4) * QUAD + lane * 4 + k % 4] ^ 0x80;
            ret_values[k] = f16_to_f32(scales[b * KERNEL_ROW_GROUP + lane]) * (int8_t)q;
        }
        break;
    case GGUF_Q4_0:
        for (uint32_t k = 0; k < QK; k++) {
            int32_t q = (int32_t)get_nibble(quants + b * NIBBLE_BYTES, lane, k) - 8;
            ret_values[k] = f16_to_f32(scales[b * KERNEL_ROW_GROUP + lane]) * (float)q;
        }
        break;
    case GGUF_Q4_K: {
        const struct packed_q4_k *block = (const struct packed_q4_k *)group + super;
        unpack_k_sub(&block->head, s, lane, block->quants[s], false, ret_values);
        break;
    }
    case GGUF_Q5_K: {
        const struct packed_q5_k *block = (const struct packed_q5_k *)group + super;
        unpack_k_sub(&block->head, s, lane, block->quants[s], true, ret_values);
        break;
    }
    case GGUF_Q6_K:
        unpack_q6_k_sub((const struct packed_q6_k *)group + super, s, lane, ret_values);
        break;
    default: break;
    }
}

void kernels_unpack_row(const struct tensor *tensor, uint32_t row, float *ret_values)
{
    const uint8_t *group = packed_group(tensor, row / KERNEL_ROW_GROUP);
    const uint16_t *halves = (const uint16_t *)group;
    uint32_t lane = row % KERNEL_ROW_GROUP;
    assert(row < tensor->rows);
    if (!type_is_float(tensor->type)) {
        for (uint32_t b = 0; b < tensor->cols / QK; b++)
            unpack_block(tensor, group, b, lane, ret_values + b * QK);
        return;
    }
    for (uint32_t k = 0; k < tensor->cols; k++) {
        size_t i = (size_t)k * KERNEL_ROW_GROUP + lane;
        if (tensor->type == GGUF_F32)
            ret_values[k] = ((const float *)group)[i];
        else
            ret_values[k] =
                tensor->type == GGUF_F16 ? f16_to_f32(halves[i]) : bf16_to_f32(halves[i]);
    }
}

/* ---- sizes that all variants share ---- */

size_t kernels_prepared_bytes(enum gguf_type type, uint32_t cols, uint32_t n)
{
    return n * (type_is_float(type) ? float_column_bytes(cols) : quant_column_bytes(cols));
}

bool kernels_same_preparation(enum gguf_type a, enum gguf_type b)
{
    return type_is_float(a) == type_is_float(b);
}

size_t kernels_kv_page_bytes(const struct kv_shape *shape)
{
    /* A vector load of a head's last V may run on by less than KERNEL_ALIGN. */
    return align_up(2 * kv_half_elements(shape) * kv_element_bytes(shape)) + KERNEL_ALIGN;
}

/* A score for every head and position, in whole tiles. */
size_t kernels_attend_scratch_bytes(uint32_t n_heads, uint32_t n_positions)
{
    size_t tiles = n_positions / KV_TILE + (n_positions % KV_TILE != 0);
    return n_heads * tiles * KV_TILE * sizeof(float);
}
