/* What the kernel variants share: the file's block formats, the packed layouts, prepared
 * activations, the KV page. Nobody outside daemon/engine/kernels*.c includes it (its test does).
 *
 * Packed weights are the same bytes for every variant. A matrix is a run of groups of
 * KERNEL_ROW_GROUP rows (the last one filled up with zero rows); inside a group one lane is one
 * row, and the reduction's index k runs outermost, so that a kernel walks k in order with one
 * accumulator lane per output element:
 *
 *   F32          k x [16 rows] f32
 *   F16, BF16    k x [16 rows] u16
 *   Q8_0, Q4_0   block x [16 rows] f16 scale (padded to KERNEL_ALIGN), then block x quants
 *   Q4_K..Q6_K   superblock x (its scales, then 8 x quants)
 *
 * The quants of a block of 32 k are eight "quads" of 64 bytes, quad i holding k = 4i..4i+3 of row r
 * in its bytes 4r..4r+3: what one 512-bit multiply of unsigned by signed bytes wants. Q8_0 is
 * stored biased to unsigned (+128). Narrower types keep four planes of nibbles, quad i in the low
 * and quad i + 4 in the high half, followed by their higher bits:
 *
 *   Q5_K   one plane; bit i of a byte belongs to quad i
 *   Q6_K   two planes; plane p holds quads 4p..4p+3, two bits each, the lowest quad lowest
 *
 * Source of the file's block formats: the GGUF specification and the ggml project's documentation
 * of its quantisation types. */
#ifndef HEARTH_ENGINE_KERNELS_INTERNAL_H
#define HEARTH_ENGINE_KERNELS_INTERNAL_H

#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "daemon/engine/kernels.h"

/* Elements of a block with its own activation scale, and of a K type's superblock. */
#define QK   32u
#define QK_K 256u
/* Sub-blocks of QK elements in a superblock. */
#define QK_SUBS (QK_K / QK)
/* Bytes of a quad: 16 rows x 4 elements. */
#define QUAD 64u
/* Quads of a block. */
#define N_QUADS (QK / 4)

static_assert(KERNEL_ROW_GROUP == 16 && KV_TILE == 16, "one lane per row and per position");
static_assert(QUAD == KERNEL_ROW_GROUP * 4, "a quad is four elements of each row");

/* ---- the file's blocks (rows are runs of them, unaligned) ---- */

struct __attribute__((packed)) file_q8_0 {
    uint16_t d;
    int8_t q[32];
};

struct __attribute__((packed)) file_q4_0 {
    uint16_t d;
    uint8_t q[16]; /* low nibble: element j, high: j + 16; minus 8 */
};

struct __attribute__((packed)) file_q4_k {
    uint16_t d, dmin;
    uint8_t scales[12]; /* 8 x (6-bit scale, 6-bit minimum) */
    uint8_t q[128];     /* per 64 elements 32 bytes, low nibbles first */
};

struct __attribute__((packed)) file_q5_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t high[32]; /* bit s of byte j: element j of sub-block s */
    uint8_t q[128];
};

struct __attribute__((packed)) file_q6_k {
    uint8_t low[128];
    uint8_t high[64];
    int8_t scales[16]; /* one per 16 elements */
    uint16_t d;
};

static_assert(sizeof(struct file_q8_0) == 34, "Q8_0");
static_assert(sizeof(struct file_q4_0) == 18, "Q4_0");
static_assert(sizeof(struct file_q4_k) == 144, "Q4_K");
static_assert(sizeof(struct file_q5_k) == 176, "Q5_K");
static_assert(sizeof(struct file_q6_k) == 210, "Q6_K");

/* ---- packed superblocks of a row group ---- */

#define NIBBLE_BYTES (4 * QUAD)

/* The head of Q4_K and Q5_K: x = d * scale * q - dmin * minimum. */
struct packed_k_head {
    uint16_t d[16], dmin[16];
    struct {
        uint8_t scale[16], minimum[16];
    } sub[QK_SUBS];
};

struct packed_q4_k {
    struct packed_k_head head;
    uint8_t quants[QK_SUBS][NIBBLE_BYTES];
};

struct packed_q5_k {
    struct packed_k_head head;
    uint8_t quants[QK_SUBS][NIBBLE_BYTES + QUAD];
};

/* x = d * scale * (q - 32), a scale for each half of a sub-block. */
struct packed_q6_k {
    uint16_t d[16];
    uint8_t pad[32];
    int8_t scale[QK_SUBS][2][16];
    uint8_t quants[QK_SUBS][NIBBLE_BYTES + 2 * QUAD];
};

static_assert(sizeof(struct packed_k_head) == 320, "packed Q4_K head");
static_assert(sizeof(struct packed_q4_k) % KERNEL_ALIGN == 0, "packed Q4_K");
static_assert(sizeof(struct packed_q5_k) % KERNEL_ALIGN == 0, "packed Q5_K");
static_assert(sizeof(struct packed_q6_k) % KERNEL_ALIGN == 0, "packed Q6_K");

static inline size_t align_up(size_t bytes)
{
    return (bytes + KERNEL_ALIGN - 1) / KERNEL_ALIGN * KERNEL_ALIGN;
}

static inline uint32_t row_groups(uint32_t rows)
{
    return rows / KERNEL_ROW_GROUP + (rows % KERNEL_ROW_GROUP != 0);
}

/* Bytes of the scales in front of a Q8_0 or Q4_0 group's quants. */
static inline size_t scales_bytes(uint32_t cols)
{
    return align_up((size_t)(cols / QK) * KERNEL_ROW_GROUP * sizeof(uint16_t));
}

/* Bytes of one packed row group; 0: type or row length not supported. */
size_t packed_group_bytes(enum gguf_type type, uint32_t cols);

static inline const uint8_t *packed_group(const struct tensor *tensor, uint32_t group)
{
    return (const uint8_t *)tensor->data + group * packed_group_bytes(tensor->type, tensor->cols);
}

/* ---- prepared activations ---- */

/* 32 activations of one column as int8: x[k] = scale * q[k]; one cache line with all that the types
 * want of its sum. */
struct activation_block {
    int8_t q[QK];
    float scale;        /* largest |x| / 127; 0 when the block is (almost) zero */
    float scaled_sum;   /* scale * sum of q: multiplies a minimum */
    int32_t bias_128;   /* -128 * sum of q: undoes Q8_0's bias */
    int32_t bias_8;     /* -8 * sum of q: Q4_0's offset */
    int32_t bias_32[2]; /* -32 * sum of q of each half: Q6_K's offset */
    int32_t pad[2];
};

static_assert(sizeof(struct activation_block) == KERNEL_ALIGN, "one cache line");

/* Blocks whose largest magnitude is below this are taken for zero (127 / it must be finite). */
#define ACTIVATION_TINY 1e-30f

/* A column's stride is an odd number of cache lines: columns taken together then lie in different
 * cache sets whatever the row length. */
static inline size_t odd_lines(size_t bytes)
{
    return ((bytes + KERNEL_ALIGN - 1) / KERNEL_ALIGN | 1) * KERNEL_ALIGN;
}

/* Bytes from column to column. */
static inline size_t float_column_bytes(uint32_t cols)
{
    return odd_lines((size_t)cols * sizeof(float));
}

static inline size_t quant_column_bytes(uint32_t cols)
{
    return odd_lines((size_t)(cols / QK) * sizeof(struct activation_block));
}

static inline bool type_is_float(enum gguf_type type)
{
    return type == GGUF_F32 || type == GGUF_F16 || type == GGUF_BF16;
}

/* ---- KV page: K as [kv head][dim][16 positions], then V as [kv head][position][dim] ---- */

static inline size_t kv_element_bytes(const struct kv_shape *shape)
{
    return shape->f32 ? sizeof(float) : sizeof(uint16_t);
}

static inline size_t kv_half_elements(const struct kv_shape *shape)
{
    return (size_t)shape->n_kv_heads * shape->head_dim * KV_TILE;
}

/* ---- numbers ---- */

static inline float bits_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float bf16_to_f32(uint16_t value)
{
    return bits_f32((uint32_t)value << 16);
}

/* Without branches, so that loops over it become vectors: the magnitude's bits moved into a float's
 * place are 2^112 too small (subnormals included), and what has the largest exponent keeps it. */
static inline float f16_to_f32(uint16_t value)
{
    uint32_t magnitude = value & 0x7fff, sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t bits = f32_bits(bits_f32(magnitude << 13) * 0x1p112f);
    uint32_t endless = magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : 0;
    return bits_f32(sign | bits | endless);
}

/* Rounds to nearest, ties to even; beyond the range to infinity. */
uint16_t f32_to_f16(float value);

/* exp(x) = 2^n * p(r), n = rint(x / ln 2), r = x - n ln 2 in two parts, p of degree 6 with p(0) =
 * p'(0) = 1 and the other coefficients fitted to the least relative error (3.7e-9 in exact
 * arithmetic) over |r| <= ln 2 / 2. Arguments are clamped to EXP_MIN..EXP_MAX. */
#define EXP_MIN    (-87.0f)
#define EXP_MAX    88.0f
#define EXP_LOG2E  0x1.715476p+0f
#define EXP_LN2_HI 0x1.62e400p-1f /* 15 bits: exact times any n */
#define EXP_LN2_LO 0x1.7f7d1cp-20f
#define EXP_C2     0x1.fffffcp-2f
#define EXP_C3     0x1.555492p-3f
#define EXP_C4     0x1.5558f2p-5f
#define EXP_C5     0x1.123a20p-7f
#define EXP_C6     0x1.6a23ccp-10f

/* ---- shared by all variants' tables ---- */

bool kernels_supports(enum gguf_type type);
size_t kernels_packed_bytes(enum gguf_type type, uint32_t rows, uint32_t cols);
void kernels_pack(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows);
void kernels_unpack_row(const struct tensor *tensor, uint32_t row, float *ret_values);
size_t kernels_prepared_bytes(enum gguf_type type, uint32_t cols, uint32_t n);
bool kernels_same_preparation(enum gguf_type a, enum gguf_type b);
size_t kernels_kv_page_bytes(const struct kv_shape *shape);
size_t kernels_attend_scratch_bytes(uint32_t n_heads, uint32_t n_positions);

#endif
