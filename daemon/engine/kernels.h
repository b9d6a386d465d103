/* Kernels: the arithmetic of a step behind one table, chosen once at start.
 *
 * A variant (scalar, avx2, avx512) is a table of functions; the scalar one is the oracle of the
 * others. Weights are repacked at load into the layout the variant wants and are opaque from then
 * on: `struct tensor` and kernel_table.matmul are all that the engine sees of them.
 *
 * The same tokens every time: an output element's reduction order depends on the tensor's type, its
 * row length and the variant alone. It never depends on the number of columns, on which rows a
 * thread computes, on the number of threads or on how a prompt is cut. No reduction is split along
 * its length. Attention reads K and V only as stored, in tiles of KV_TILE absolute positions.
 *
 * Hides: instruction sets, weight layouts, KV page layout, quantisation of activations.
 * Thread: all functions are pure over their arguments; the engine thread and its team call them. */
#ifndef HEARTH_ENGINE_KERNELS_H
#define HEARTH_ENGINE_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"

/* Rows are packed in groups of this many; row ranges given to matmul are multiples of it (or end at
 * the last row). */
#define KERNEL_ROW_GROUP 16u
/* Positions of one KV page. */
#define KV_TILE 16u
/* Alignment of packed weights, activations and pages, bytes (a cache line, an AVX-512 vector). */
#define KERNEL_ALIGN 64u

struct tensor {
    enum gguf_type type;
    uint32_t rows; /* output features */
    uint32_t cols; /* input features, the reduction's length */
    void *data;    /* packed, aligned to KERNEL_ALIGN, owned by the model's arena */
    size_t bytes;
};

struct kv_shape {
    uint32_t n_kv_heads;
    uint32_t head_dim;
    bool f32; /* else F16 */
};

struct kernel_table {
    const char *name; /* "scalar", "avx2", "avx512" */

    bool (*supports)(enum gguf_type type);
    /* Packed size of a rows x cols matrix, a multiple of KERNEL_ALIGN; 0: unsupported. */
    size_t (*packed_bytes)(enum gguf_type type, uint32_t rows, uint32_t cols);
    /* Packs n_rows rows, given in the file's layout, from row_begin (a multiple of
     * KERNEL_ROW_GROUP) on. n_rows is one too unless the rows end there. Every byte of their groups
     * is written, whatever was there. */
    void (*pack)(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows);
    /* One row back as floats (embedding look-up; a tied embedding is one copy). */
    void (*unpack_row)(const struct tensor *tensor, uint32_t row, float *ret_values);

    /* Activations: n columns of `cols` floats, column after column (x[n][cols]), are prepared once
     * for all matrices of one type and row length: `prepared` has prepared_bytes() bytes. */
    size_t (*prepared_bytes)(enum gguf_type type, uint32_t cols, uint32_t n);
    void (*prepare)(enum gguf_type type, uint32_t cols, uint32_t n, const float *x, void *prepared);
    /* True when prepare() of the two types gives the same bytes, so that one serves both. */
    bool (*same_preparation)(enum gguf_type a, enum gguf_type b);
    /* y[column * y_stride + row] = sum over k of w[row][k] * x[column][k], for the rows
     * [row_begin, row_end). One pass over those rows' weights whatever n is. */
    void (*matmul)(const struct tensor *tensor, const void *prepared, uint32_t n, float *y,
                   size_t y_stride, uint32_t row_begin, uint32_t row_end);

    /* y = x / sqrt(mean(x^2) + eps) * weight */
    void (*rms_norm)(const float *x, const float *weight, uint32_t n, float eps, float *y);
    /* x += y */
    void (*add)(float *x, const float *y, uint32_t n);
    /* gate = silu(gate) * up */
    void (*silu_mul)(float *gate, const float *up, uint32_t n);
    /* Rotates n_heads heads in place: pairs (2i, 2i+1) when `adjacent`, else (i, i + n_rot / 2), by
     * the angles whose cosines and sines are given (n_rot / 2 each). */
    void (*rope)(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool adjacent,
                 const float *cosines, const float *sines);

    /* A page holds K and V of KV_TILE positions of one layer. */
    size_t (*kv_page_bytes)(const struct kv_shape *shape);
    /* Stores one position's k and v (n_kv_heads * head_dim floats each) at slot 0..KV_TILE-1. */
    void (*kv_store)(const struct kv_shape *shape, void *page, uint32_t slot, const float *k,
                     const float *v);
    /* Attention of one query position over positions 0..n_positions-1 (causality is the caller's:
     * n_positions = its own position + 1). q and out: n_heads * head_dim floats; n_heads is a
     * multiple of n_kv_heads. scratch: attend_scratch_bytes(), of any alignment that suits a float.
     * Slots that were never stored may hold anything. */
    void (*attend)(const struct kv_shape *shape, void *const *pages, uint32_t n_positions,
                   uint32_t n_heads, float scale, const float *q, float *out, void *scratch);
    size_t (*attend_scratch_bytes)(uint32_t n_heads, uint32_t n_positions);
    /* ret = index of the largest value, the lowest index on ties; NaN never wins. */
    uint32_t (*argmax)(const float *values, uint32_t n);
};

extern const struct kernel_table kernels_scalar;
extern const struct kernel_table kernels_avx2;
extern const struct kernel_table kernels_avx512;

/* The variant named by `forced` (NULL or "": the best this machine has).
 * -ENOTSUP with a sentence naming the variant and what it lacks, -EINVAL for an unknown name. */
int kernels_choose(const char *forced, const struct kernel_table **ret_table,
                   struct fault *ret_fault);
/* The first thing that this machine lacks for a variant; NULL: nothing, it can run here. */
const char *kernels_lack(const char *name);

#endif
