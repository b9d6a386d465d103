#include "bench/gguf_writer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Numbers of the value types in the file. */
enum {
    VALUE_U32 = 4,
    VALUE_I32 = 5,
    VALUE_F32 = 6,
    VALUE_BOOL = 7,
    VALUE_STRING = 8,
    VALUE_ARRAY = 9,
};

struct gguf_writer {
    uint32_t version;
    uint64_t n_keys, n_tensors;
    uint64_t data_bytes;
    struct byte_buffer keys, tensors;
};

void byte_buffer_done(struct byte_buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct byte_buffer){0};
}

/* Room for `len` more bytes, or NULL. */
static uint8_t *extend(struct byte_buffer *buffer, size_t len)
{
    uint8_t *at;

    if (buffer->failed)
        return NULL;
    if (len > buffer->room - buffer->len) {
        size_t room = buffer->room + buffer->room / 2 + len + 64;
        uint8_t *grown = realloc(buffer->bytes, room);
        if (!grown) {
            buffer->failed = true;
            return NULL;
        }
        buffer->bytes = grown;
        buffer->room = room;
    }
    at = buffer->bytes + buffer->len;
    buffer->len += len;
    return at;
}

void byte_buffer_put(struct byte_buffer *buffer, const void *bytes, size_t len)
{
    uint8_t *to = len > 0 ? extend(buffer, len) : NULL;

    if (to)
        memcpy(to, bytes, len);
}

void byte_buffer_number(struct byte_buffer *buffer, uint64_t value, size_t bytes)
{
    uint8_t *to = extend(buffer, bytes);

    for (size_t i = 0; to && i < bytes; i++)
        to[i] = (uint8_t)(value >> (8 * i));
}

void byte_buffer_string(struct byte_buffer *buffer, const void *bytes, size_t len)
{
    byte_buffer_number(buffer, len, 8);
    byte_buffer_put(buffer, bytes, len);
}

void byte_buffer_zeros(struct byte_buffer *buffer, size_t len)
{
    uint8_t *to = len > 0 ? extend(buffer, len) : NULL;

    if (to)
        memset(to, 0, len);
}

int gguf_writer_new(uint32_t version, struct gguf_writer **ret_writer)
{
    struct gguf_writer *writer = calloc(1, sizeof(*writer));

    if (!writer)
        return -ENOMEM;
    writer->version = version;
    *ret_writer = writer;
    return 0;
}

struct gguf_writer *gguf_writer_free(struct gguf_writer *writer)
{
    if (!writer)
        return NULL;
    byte_buffer_done(&writer->keys);
    byte_buffer_done(&writer->tensors);
    free(writer);
    return NULL;
}

static uint32_t float_bits(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static void put_key(struct gguf_writer *writer, const char *key, uint32_t type)
{
    byte_buffer_string(&writer->keys, key, strlen(key));
    byte_buffer_number(&writer->keys, type, 4);
    writer->n_keys++;
}

static void put_array(struct gguf_writer *writer, const char *key, uint32_t element, uint64_t n)
{
    put_key(writer, key, VALUE_ARRAY);
    byte_buffer_number(&writer->keys, element, 4);
    byte_buffer_number(&writer->keys, n, 8);
}

void gguf_put_u32(struct gguf_writer *writer, const char *key, uint32_t value)
{
    put_key(writer, key, VALUE_U32);
    byte_buffer_number(&writer->keys, value, 4);
}

void gguf_put_f32(struct gguf_writer *writer, const char *key, float value)
{
    put_key(writer, key, VALUE_F32);
    byte_buffer_number(&writer->keys, float_bits(value), 4);
}

void gguf_put_bool(struct gguf_writer *writer, const char *key, bool value)
{
    put_key(writer, key, VALUE_BOOL);
    byte_buffer_number(&writer->keys, value, 1);
}

void gguf_put_string(struct gguf_writer *writer, const char *key, const char *value)
{
    put_key(writer, key, VALUE_STRING);
    byte_buffer_string(&writer->keys, value, strlen(value));
}

void gguf_put_f32s(struct gguf_writer *writer, const char *key, const float *values, uint64_t n)
{
    put_array(writer, key, VALUE_F32, n);
    for (uint64_t i = 0; i < n; i++)
        byte_buffer_number(&writer->keys, float_bits(values[i]), 4);
}

void gguf_put_i32s(struct gguf_writer *writer, const char *key, const int32_t *values, uint64_t n)
{
    put_array(writer, key, VALUE_I32, n);
    for (uint64_t i = 0; i < n; i++)
        byte_buffer_number(&writer->keys, (uint32_t)values[i], 4);
}

void gguf_begin_strings(struct gguf_writer *writer, const char *key, uint64_t n)
{
    put_array(writer, key, VALUE_STRING, n);
}

void gguf_add_string(struct gguf_writer *writer, const void *bytes, size_t len)
{
    byte_buffer_string(&writer->keys, bytes, len);
}

void gguf_put_strings(struct gguf_writer *writer, const char *key, const char *const *values,
                      uint64_t n)
{
    gguf_begin_strings(writer, key, n);
    for (uint64_t i = 0; i < n; i++)
        gguf_add_string(writer, values[i], strlen(values[i]));
}

void gguf_put_raw(struct gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                  size_t len)
{
    put_key(writer, key, type);
    byte_buffer_put(&writer->keys, bytes, len);
}

void gguf_put_tensor(struct gguf_writer *writer, const char *name, enum gguf_type type,
                     const uint64_t *dims, uint32_t n_dims)
{
    uint64_t bytes = gguf_row_bytes(type, n_dims > 0 ? dims[0] : 0);

    byte_buffer_string(&writer->tensors, name, strlen(name));
    byte_buffer_number(&writer->tensors, n_dims, 4);
    for (uint32_t i = 0; i < n_dims; i++) {
        byte_buffer_number(&writer->tensors, dims[i], 8);
        if (i > 0)
            bytes *= dims[i];
    }
    byte_buffer_number(&writer->tensors, type, 4);
    byte_buffer_number(&writer->tensors, writer->data_bytes, 8);
    writer->data_bytes += bytes + gguf_writer_padding(bytes);
    writer->n_tensors++;
}

int gguf_writer_finish(struct gguf_writer *writer, uint8_t **ret_header, size_t *ret_bytes)
{
    struct byte_buffer header = {0};

    byte_buffer_put(&header, "GGUF", 4);
    byte_buffer_number(&header, writer->version, 4);
    byte_buffer_number(&header, writer->n_tensors, 8);
    byte_buffer_number(&header, writer->n_keys, 8);
    byte_buffer_put(&header, writer->keys.bytes, writer->keys.len);
    byte_buffer_put(&header, writer->tensors.bytes, writer->tensors.len);
    byte_buffer_zeros(&header, gguf_writer_padding(header.len));
    if (header.failed || writer->keys.failed || writer->tensors.failed) {
        byte_buffer_done(&header);
        return -ENOMEM;
    }
    *ret_header = header.bytes;
    *ret_bytes = header.len;
    return 0;
}

uint64_t gguf_writer_data_bytes(const struct gguf_writer *writer)
{
    return writer->data_bytes;
}
