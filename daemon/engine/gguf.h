/* GGUF: the container that models come in, versions 2 and 3.
 *
 * Reads the header of a file (or of bytes in memory) into a bounded table of keys and tensor
 * infos, and reads tensor data by pread into the caller's memory. Nothing is mapped. Every count,
 * length and offset is checked against the size of the source before anything is allocated for
 * it, so a hostile file costs an error and no memory.
 *
 * Source of the format: the GGUF specification in the ggml project's documentation.
 * Hides: the binary layout, value types, alignment. Thread: immutable once opened, any thread;
 * gguf_read() uses pread and keeps no position. */
#ifndef HEARTH_ENGINE_GGUF_H
#define HEARTH_ENGINE_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/fault.h"

/* Tensor types by their numbers in the file. */
enum gguf_type {
    GGUF_F32 = 0,
    GGUF_F16 = 1,
    GGUF_Q4_0 = 2,
    GGUF_Q8_0 = 8,
    GGUF_Q4_K = 12,
    GGUF_Q5_K = 13,
    GGUF_Q6_K = 14,
    GGUF_BF16 = 30,
};

/* Bounds of a header, generous for real files: the largest vocabularies have 300,000 entries and
 * 500,000 merges, which makes headers of 10 to 20 MB. */
#define GGUF_MAX_HEADER_BYTES   (64u << 20)
#define GGUF_MAX_KEYS           65536u
#define GGUF_MAX_TENSORS        65536u
#define GGUF_MAX_KEY_BYTES      65535u
#define GGUF_MAX_NAME_BYTES     256u
#define GGUF_MAX_STRING_BYTES   (4u << 20)
#define GGUF_MAX_ARRAY_ELEMENTS (1u << 22)

/* Where the bytes come from: a descriptor (not owned) or memory. */
struct gguf_source {
    int fd;                /* -1: memory */
    const uint8_t *memory; /* `size` bytes, must outlive the gguf */
    uint64_t size;         /* bytes */
};

struct gguf_string {
    const char *bytes; /* not terminated; may contain anything */
    size_t len;
};

struct gguf_tensor {
    struct gguf_string name;
    uint32_t n_dims;     /* 1..4 */
    uint64_t dims[4];    /* innermost first; unused ones are 1 */
    enum gguf_type type; /* as in the file: may be a number outside the enum */
    uint64_t offset;     /* absolute in the source */
    uint64_t bytes;      /* 0 for a type whose size is not known */
};

struct gguf;

/* -EBADMSG with a sentence for anything malformed; -EIO, -ENOMEM. Reads the header only. A tensor
 * of an unknown type is no error here: it keeps its number, and whoever wants it refuses. Strings
 * are kept as bytes, whatever their encoding. A descriptor must stay open for gguf_read(). */
int gguf_open(const struct gguf_source *source, struct gguf **ret_gguf, struct fault *ret_fault);
struct gguf *gguf_free(struct gguf *gguf);

/* Keys: -ENOENT when absent, -EBADMSG when of another type or out of range; both with a sentence
 * that names the key. Integers are accepted in any width that holds the value, floats as f32 or f64
 * and finite, a bool as 0 or 1. */
int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *ret, struct fault *ret_fault);
int gguf_get_f32(const struct gguf *gguf, const char *key, float *ret, struct fault *ret_fault);
int gguf_get_bool(const struct gguf *gguf, const char *key, bool *ret, struct fault *ret_fault);
int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *ret,
                    struct fault *ret_fault);
/* Arrays: the element count, then elements by index (-ERANGE beyond). */
int gguf_get_array(const struct gguf *gguf, const char *key, uint64_t *ret_n,
                   struct fault *ret_fault);
int gguf_array_string(const struct gguf *gguf, const char *key, uint64_t index,
                      struct gguf_string *ret);
/* Whole arrays of strings, floats (no NaN) or integers at once (malloc'd, the caller frees; never
 * NULL on success, even when empty). The strings themselves live as long as the gguf. */
int gguf_get_strings(const struct gguf *gguf, const char *key, struct gguf_string **ret,
                     uint64_t *ret_n, struct fault *ret_fault);
int gguf_get_f32s(const struct gguf *gguf, const char *key, float **ret, uint64_t *ret_n,
                  struct fault *ret_fault);
int gguf_get_i32s(const struct gguf *gguf, const char *key, int32_t **ret, uint64_t *ret_n,
                  struct fault *ret_fault);

uint64_t gguf_n_tensors(const struct gguf *gguf);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, uint64_t index);
/* NULL if there is none of that name. */
const struct gguf_tensor *gguf_find(const struct gguf *gguf, const char *name);

/* Reads `len` bytes of the tensor's data from `offset` within it. -EIO, -ENODATA (file got
 * shorter). Interrupted reads go on. */
int gguf_read(const struct gguf *gguf, const struct gguf_tensor *tensor, uint64_t offset, void *to,
              size_t len, struct fault *ret_fault);

/* Bytes of one row of `cols` elements; 0 when the type is unknown or cols is no multiple of its
 * block. */
uint64_t gguf_row_bytes(enum gguf_type type, uint64_t cols);
/* "Q4_K", also for types that nothing here computes ("Q5_0"); NULL for numbers without a name. */
const char *gguf_type_name(enum gguf_type type);
/* 64-bit hash of the header's bytes: part of a model's fingerprint. */
uint64_t gguf_header_hash(const struct gguf *gguf);

#endif
