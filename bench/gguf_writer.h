/* GGUF writer: puts together the header of a model file, key by key, in memory.
 *
 * Keys come first, then tensor infos; each tensor's offset follows from those declared before it.
 * gguf_writer_finish() gives the header, padded to where the data begin; the data are the caller's
 * to write, tensor by tensor in the order of declaration, each padded to the alignment
 * (gguf_writer_padding()). Running out of memory is remembered and told once, at the end.
 *
 * Hides: the binary layout. The raw put functions are there for tests that want a header to be
 * wrong. Thread: the caller's. */
#ifndef HEARTH_BENCH_GGUF_WRITER_H
#define HEARTH_BENCH_GGUF_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"

#define GGUF_WRITER_ALIGNMENT 32u

/* Bytes that grow; after a failed allocation `failed` is set and nothing is added any more. */
struct byte_buffer {
    uint8_t *bytes;
    size_t len, room;
    bool failed;
};

void byte_buffer_done(struct byte_buffer *buffer);
void byte_buffer_put(struct byte_buffer *buffer, const void *bytes, size_t len);
/* The `bytes` low bytes of `value`, little-endian. */
void byte_buffer_number(struct byte_buffer *buffer, uint64_t value, size_t bytes);
/* A length of 8 bytes, then the bytes. */
void byte_buffer_string(struct byte_buffer *buffer, const void *bytes, size_t len);
void byte_buffer_zeros(struct byte_buffer *buffer, size_t len);

struct gguf_writer;

/* -ENOMEM. The version is written as given, right or wrong. */
int gguf_writer_new(uint32_t version, struct gguf_writer **ret_writer);
struct gguf_writer *gguf_writer_free(struct gguf_writer *writer);

void gguf_put_u32(struct gguf_writer *writer, const char *key, uint32_t value);
void gguf_put_f32(struct gguf_writer *writer, const char *key, float value);
void gguf_put_bool(struct gguf_writer *writer, const char *key, bool value);
void gguf_put_string(struct gguf_writer *writer, const char *key, const char *value);
void gguf_put_f32s(struct gguf_writer *writer, const char *key, const float *values, uint64_t n);
void gguf_put_i32s(struct gguf_writer *writer, const char *key, const int32_t *values, uint64_t n);
void gguf_put_strings(struct gguf_writer *writer, const char *key, const char *const *values,
                      uint64_t n);
/* An array of n strings that the caller adds one by one before anything else. */
void gguf_begin_strings(struct gguf_writer *writer, const char *key, uint64_t n);
void gguf_add_string(struct gguf_writer *writer, const void *bytes, size_t len);
/* Any value, given as the type's number and its bytes in the file. */
void gguf_put_raw(struct gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                  size_t len);

/* Declares a tensor; dims innermost first. Its data have gguf_row_bytes(type, dims[0]) bytes a row
 * (none for a type of unknown size). */
void gguf_put_tensor(struct gguf_writer *writer, const char *name, enum gguf_type type,
                     const uint64_t *dims, uint32_t n_dims);

/* The header, padded (malloc'd, the caller frees). -ENOMEM. */
int gguf_writer_finish(struct gguf_writer *writer, uint8_t **ret_header, size_t *ret_bytes);
/* Bytes of all the data behind the header, padding included. */
uint64_t gguf_writer_data_bytes(const struct gguf_writer *writer);
/* Zeros that follow `bytes` bytes of a tensor's data. */
static inline size_t gguf_writer_padding(uint64_t bytes)
{
    return (size_t)(-bytes % GGUF_WRITER_ALIGNMENT);
}

#endif
