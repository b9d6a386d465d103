/* Packing: from the file's rows to groups of interleaved rows, and single rows back. */
#include "daemon/engine/kernels_internal.h"

#include "lib/cleanup.h"

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

/* Four quants at a time: what a lane has in a quad, and what stands together in the file too. */
static uint32_t load_4(const void *bytes)
{
    uint32_t four;
    memcpy(&four, bytes, sizeof(four));
    return four;
}

static void store_4(uint8_t *quad, uint32_t lane, uint32_t four)
{
    memcpy(quad + lane * 4, &four, sizeof(four));
}

#define EACH_BYTE(x) ((x)*0x01010101u)

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

static void pack_q8_0(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q8_0 *blocks = row;
    uint16_t *scales = (uint16_t *)group;
    uint8_t *quants = group + scales_bytes(cols);
    for (uint32_t b = 0; b < cols / QK; b++) {
        scales[b * KERNEL_ROW_GROUP + lane] = blocks[b].d;
        for (uint32_t i = 0; i < N_QUADS; i++, quants += QUAD)
            store_4(quants, lane, load_4(blocks[b].q + 4 * i) ^ EACH_BYTE(0x80));
    }
}

/* The file pairs element j with j + 16, quad i with i + 4: as the planes do. */
static void pack_q4_0(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q4_0 *blocks = row;
    uint16_t *scales = (uint16_t *)group;
    uint8_t *quants = group + scales_bytes(cols);
    for (uint32_t b = 0; b < cols / QK; b++) {
        scales[b * KERNEL_ROW_GROUP + lane] = blocks[b].d;
        for (uint32_t plane = 0; plane < 4; plane++, quants += QUAD)
            store_4(quants, lane, load_4(blocks[b].q + 4 * plane));
    }
}

/* Four planes from the nibbles (the high ones when `shift` is 4) of 32 bytes of a file. */
static void pack_nibbles(uint8_t *quants, uint32_t lane, const uint8_t *bytes, uint32_t shift)
{
    for (uint32_t plane = 0; plane < 4; plane++) {
        uint32_t low = load_4(bytes + 4 * plane) >> shift & EACH_BYTE(15);
        uint32_t high = load_4(bytes + 16 + 4 * plane) >> shift & EACH_BYTE(15);
        store_4(quants + plane * QUAD, lane, low | high << 4);
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
            pack_nibbles(to->quants[s], lane, from->q + s / 2 * 32, s % 2 * 4);
    }
}

static void pack_q5_k(uint8_t *group, uint32_t lane, uint32_t cols, const void *row)
{
    const struct file_q5_k *from = row;
    struct packed_q5_k *to = (struct packed_q5_k *)group;
    for (uint32_t b = 0; b < cols / QK_K; b++, from++, to++) {
        pack_k_head(&to->head, lane, from->d, from->dmin, from->scales);
        for (uint32_t s = 0; s < QK_SUBS; s++) {
            uint32_t plane = 0;
            for (uint32_t i = 0; i < N_QUADS; i++)
                plane |= (load_4(from->high + 4 * i) >> s & EACH_BYTE(1)) << i;
            pack_nibbles(to->quants[s], lane, from->q + s / 2 * 32, s % 2 * 4);
            store_4(to->quants[s] + NIBBLE_BYTES, lane, plane);
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
            const uint8_t *low = from->low + s / 4 * 64 + s % 2 * 32;
            const uint8_t *high = from->high + s / 4 * 32;
            to->scale[s][0][lane] = from->scales[2 * s];
            to->scale[s][1][lane] = from->scales[2 * s + 1];
            pack_nibbles(to->quants[s], lane, low, s % 4 / 2 * 4);
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t plane = 0;
                for (uint32_t j = 0; j < 4; j++) {
                    uint32_t four = load_4(high + half * 16 + 4 * j);
                    plane |= (four >> 2 * (s % 4) & EACH_BYTE(3)) << 2 * j;
                }
                store_4(to->quants[s] + NIBBLE_BYTES + half * QUAD, lane, plane);
            }
        }
    }
}

/* Up to 16 rows of plain numbers of `width` bytes, a cache line of each at a time. */
static void pack_numbers(uint8_t *group, uint32_t n_rows, uint32_t cols, size_t width,
                         const uint8_t *rows)
{
    for (uint32_t from = 0; from < cols; from += 16) {
        uint32_t to = MIN(from + 16, cols);
        for (uint32_t lane = 0; lane < n_rows; lane++) {
            const uint8_t *row = rows + lane * cols * width;
            for (uint32_t k = from; k < to; k++) {
                uint8_t *at = group + ((size_t)k * KERNEL_ROW_GROUP + lane) * width;
                if (width == 4)
                    memcpy(at, row + (size_t)k * 4, 4);
                else
                    memcpy(at, row + (size_t)k * 2, 2);
            }
        }
    }
}

/* Bytes that no row writes, in a group whose memory may have been anything. */
static void clear_padding(enum gguf_type type, uint8_t *group, uint32_t cols)
{
    size_t used;

    switch ((int)type) {
    case GGUF_F16:
    case GGUF_BF16:
        used = (size_t)cols * KERNEL_ROW_GROUP * sizeof(uint16_t);
        memset(group + used, 0, packed_group_bytes(type, cols) - used);
        break;
    case GGUF_Q8_0:
    case GGUF_Q4_0:
        used = (size_t)(cols / QK) * KERNEL_ROW_GROUP * sizeof(uint16_t);
        memset(group + used, 0, scales_bytes(cols) - used);
        break;
    case GGUF_Q6_K:
        for (uint32_t b = 0; b < cols / QK_K; b++) {
            struct packed_q6_k *block = (struct packed_q6_k *)group + b;

            memset(block->pad, 0, sizeof(block->pad));
        }
        break;
    default: break; /* the others have none */
    }
}

/* Rows of blocks are packed one after the other into their lanes. */
static void pack_group(const struct tensor *tensor, uint8_t *group, uint32_t n_rows,
                       const uint8_t *rows, size_t row_bytes)
{
    enum gguf_type type = tensor->type;
    if (n_rows < KERNEL_ROW_GROUP)
        memset(group, 0, packed_group_bytes(type, tensor->cols));
    else
        clear_padding(type, group, tensor->cols);
    if (type_is_float(type)) {
        pack_numbers(group, n_rows, tensor->cols, type == GGUF_F32 ? 4 : 2, rows);
        return;
    }
    for (uint32_t lane = 0; lane < n_rows; lane++, rows += row_bytes) {
        switch ((int)type) {
        case GGUF_Q8_0: pack_q8_0(group, lane, tensor->cols, rows); break;
        case GGUF_Q4_0: pack_q4_0(group, lane, tensor->cols, rows); break;
        case GGUF_Q4_K: pack_q4_k(group, lane, tensor->cols, rows); break;
        case GGUF_Q5_K: pack_q5_k(group, lane, tensor->cols, rows); break;
        default: pack_q6_k(group, lane, tensor->cols, rows); break;
        }
    }
}

void kernels_pack(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows)
{
    size_t group_bytes = packed_group_bytes(tensor->type, tensor->cols);
    size_t row_bytes = file_row_bytes(tensor->type, tensor->cols);
    const uint8_t *from = rows;
    uint8_t *group = (uint8_t *)tensor->data + row_begin / KERNEL_ROW_GROUP * group_bytes;
    assert(row_begin % KERNEL_ROW_GROUP == 0 && row_begin + n_rows <= tensor->rows);
    assert(n_rows % KERNEL_ROW_GROUP == 0 || row_begin + n_rows == tensor->rows);
    while (n_rows > 0) {
        uint32_t some = MIN(n_rows, KERNEL_ROW_GROUP);
        pack_group(tensor, group, some, from, row_bytes);
        group += group_bytes;
        from += some * row_bytes;
        n_rows -= some;
    }
}

/* ---- one row back ---- */

static uint32_t get_nibble(const uint8_t *quants, uint32_t lane, uint32_t k)
{
    uint32_t quad = k / 4;
    return quants[quad % 4 * QUAD + lane * 4 + k % 4] >> (quad < 4 ? 0 : 4) & 15;
}

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
    uint32_t lane = row % KERNEL_ROW_GROUP, cols = tensor->cols;
    const float *singles = (const float *)group + lane;
    const uint16_t *halves = (const uint16_t *)group + lane;
    assert(row < tensor->rows);
    switch ((int)tensor->type) {
    case GGUF_F32:
        for (uint32_t k = 0; k < cols; k++)
            ret_values[k] = singles[(size_t)k * KERNEL_ROW_GROUP];
        break;
    case GGUF_F16:
        for (uint32_t k = 0; k < cols; k++)
            ret_values[k] = f16_to_f32(halves[(size_t)k * KERNEL_ROW_GROUP]);
        break;
    case GGUF_BF16:
        for (uint32_t k = 0; k < cols; k++)
            ret_values[k] = bf16_to_f32(halves[(size_t)k * KERNEL_ROW_GROUP]);
        break;
    default:
        for (uint32_t b = 0; b < cols / QK; b++)
            unpack_block(tensor, group, b, lane, ret_values + b * QK);
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
