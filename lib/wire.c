#include "lib/wire.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

static_assert(sizeof(WIRE_MAGIC) - 1 == WIRE_MAGIC_BYTES, "the magic fills its bytes exactly");
static_assert(sizeof(float) == 4, "real numbers are binary32");

/* A buffer starts with this much; it doubles from there. */
#define BUFFER_FIRST_BYTES 512u

/* ---- names ---- */

static const char *const code_names[_CODE_MAX] = {
    [CODE_BAD_FRAME] = "bad-frame",
    [CODE_TOO_LARGE] = "too-large",
    [CODE_BAD_REQUEST] = "bad-request",
    [CODE_NO_SUCH_MODEL] = "no-such-model",
    [CODE_LOAD_FAILED] = "load-failed",
    [CODE_NO_MEMORY] = "no-memory",
    [CODE_BUSY] = "busy",
    [CODE_DEADLINE] = "deadline",
    [CODE_CANCELLED] = "cancelled",
    [CODE_FORBIDDEN] = "forbidden",
    [CODE_CONTEXT_FULL] = "context-full",
    [CODE_SHUTTING_DOWN] = "shutting-down",
    [CODE_INTERNAL] = "internal",
};

/* Indexed by the tag without its critical bit; a tag is known only with the bit as listed here. */
static const struct {
    uint16_t tag;
    const char *name;
} tag_names[] = {
#define TAG(t, n) [(t) & ~WIRE_TAG_CRITICAL] = {(t), (n)}
    TAG(TAG_VERSION, "version"),
    TAG(TAG_PID, "pid"),
    TAG(TAG_FRAME_LIMIT, "frame_limit"),
    TAG(TAG_CREDIT, "credit"),
    TAG(TAG_CLIENT, "client"),
    TAG(TAG_STATUS_PATH, "status_path"),
    TAG(TAG_MODEL, "model"),
    TAG(TAG_PROMPT, "prompt"),
    TAG(TAG_IDS, "ids"),
    TAG(TAG_ROLE, "role"),
    TAG(TAG_CONTENT, "content"),
    TAG(TAG_STREAM, "stream"),
    TAG(TAG_MAX_TOKENS, "max_tokens"),
    TAG(TAG_TEMPERATURE, "temperature"),
    TAG(TAG_TOP_K, "top_k"),
    TAG(TAG_TOP_P, "top_p"),
    TAG(TAG_MIN_P, "min_p"),
    TAG(TAG_REPEAT_PENALTY, "repeat_penalty"),
    TAG(TAG_SEED, "seed"),
    TAG(TAG_STOP, "stop"),
    TAG(TAG_IGNORE_EOS, "ignore_eos"),
    TAG(TAG_DEADLINE_US, "deadline_us"),
    TAG(TAG_PRIORITY, "priority"),
    TAG(TAG_SKIP_BYTES, "skip_bytes"),
    TAG(TAG_FINGERPRINT, "fingerprint"),
    TAG(TAG_KEEP_ALIVE_US, "keep_alive_us"),
    TAG(TAG_WAIT, "wait"),
    TAG(TAG_PRELOAD, "preload"),
    TAG(TAG_PINNED, "pinned"),
    TAG(TAG_NAME, "name"),
    TAG(TAG_ON_BEHALF_OF, "on-behalf-of"),
    TAG(TAG_TEXT, "text"),
    TAG(TAG_REASON, "reason"),
    TAG(TAG_CODE, "code"),
    TAG(TAG_SENTENCE, "sentence"),
    TAG(TAG_OPTION, "option"),
    TAG(TAG_RETRY_AFTER_US, "retry_after_us"),
    TAG(TAG_PROMPT_TOKENS, "prompt_tokens"),
    TAG(TAG_COMPLETION_TOKENS, "completion_tokens"),
    TAG(TAG_QUEUED_US, "queued_us"),
    TAG(TAG_LOAD_US, "load_us"),
    TAG(TAG_PREFILL_US, "prefill_us"),
    TAG(TAG_DECODE_US, "decode_us"),
    TAG(TAG_STATE, "state"),
    TAG(TAG_DONE_BYTES, "done_bytes"),
    TAG(TAG_TOTAL_BYTES, "total_bytes"),
    TAG(TAG_INFO, "info"),
    TAG(TAG_STATS, "stats"),
    TAG(TAG_MEMORY_BYTES, "memory_bytes"),
    TAG(TAG_VARIANT, "variant"),
    TAG(TAG_VECTOR, "vector"),
    TAG(TAG_LOST, "lost"),
    TAG(TAG_HOLDS, "holds"),
#undef TAG
};

static const char *const type_names[] = {
    [WIRE_HELLO] = "hello",     [WIRE_COMPLETE] = "complete",   [WIRE_CHAT] = "chat",
    [WIRE_EMBED] = "embed",     [WIRE_TOKENIZE] = "tokenize",   [WIRE_MODELS] = "models",
    [WIRE_WARM] = "warm",       [WIRE_UNLOAD] = "unload",       [WIRE_SET] = "set",
    [WIRE_HOLD] = "hold",       [WIRE_RELOAD] = "reload",       [WIRE_STATUS] = "status",
    [WIRE_METRICS] = "metrics", [WIRE_SUBSCRIBE] = "subscribe", [WIRE_NULL] = "null",
    [WIRE_PING] = "ping",       [WIRE_CANCEL] = "cancel",       [WIRE_CREDIT] = "credit",
    [WIRE_ITEM] = "item",       [WIRE_TOKENS] = "tokens",       [WIRE_DONE] = "done",
    [WIRE_ERROR] = "error",     [WIRE_GOAWAY] = "goaway",
};

const char *wire_code_name(enum wire_code code)
{
    return (unsigned)code < _CODE_MAX ? code_names[code] : "internal";
}

int wire_code_from_name(const char *name, size_t len)
{
    for (int code = 0; code < _CODE_MAX; code++)
        if (strlen(code_names[code]) == len && memcmp(code_names[code], name, len) == 0)
            return code;
    return -EINVAL;
}

const char *wire_tag_name(uint16_t tag)
{
    unsigned index = tag & ~WIRE_TAG_CRITICAL;
    return index < ELEMENTSOF(tag_names) && tag_names[index].tag == tag ? tag_names[index].name
                                                                        : NULL;
}

const char *wire_type_name(uint16_t type)
{
    return type < ELEMENTSOF(type_names) ? type_names[type] : NULL;
}

/* ---- unaligned little-endian numbers ---- */

static inline uint16_t load_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof(v));
    return le16toh(v);
}

static inline uint32_t load_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof(v));
    return le32toh(v);
}

static inline uint64_t load_u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof(v));
    return le64toh(v);
}

static inline void store_u32(uint8_t *p, uint32_t v)
{
    v = htole32(v);
    memcpy(p, &v, sizeof(v));
}

static inline void store_u64(uint8_t *p, uint64_t v)
{
    v = htole64(v);
    memcpy(p, &v, sizeof(v));
}

/* ---- reading ---- */

int wire_header_read(const uint8_t *bytes, struct wire_header *ret_header)
{
    struct wire_header header = {
        .body_len = load_u32(bytes),
        .type = load_u16(bytes + 4),
        .flags = load_u16(bytes + 6),
        .id = load_u64(bytes + 8),
    };
    if (header.flags != 0)
        return -EBADMSG;
    *ret_header = header;
    return 0;
}

void wire_reader_init(struct wire_reader *reader, const uint8_t *body, size_t body_len)
{
    reader->at = body;
    reader->end = body_len ? body + body_len : body;
}

int wire_reader_next(struct wire_reader *reader, struct wire_option *ret_option)
{
    size_t left = (size_t)(reader->end - reader->at);
    if (left == 0)
        return 0;
    if (left < WIRE_OPTION_BYTES)
        return -EBADMSG;
    uint32_t len = load_u32(reader->at + 4);
    if (load_u16(reader->at + 2) != 0 || len > left - WIRE_OPTION_BYTES)
        return -EBADMSG;
    ret_option->tag = load_u16(reader->at);
    ret_option->len = len;
    ret_option->value = reader->at + WIRE_OPTION_BYTES;
    reader->at += WIRE_OPTION_BYTES + len;
    return 1;
}

int wire_option_number(const struct wire_option *option, uint64_t *ret_value)
{
    switch (option->len) {
    case 1: *ret_value = option->value[0]; return 0;
    case 2: *ret_value = load_u16(option->value); return 0;
    case 4: *ret_value = load_u32(option->value); return 0;
    case 8: *ret_value = load_u64(option->value); return 0;
    default: return -EINVAL;
    }
}

int wire_option_real(const struct wire_option *option, float *ret_value)
{
    if (option->len != sizeof(float))
        return -EINVAL;
    uint32_t bits = load_u32(option->value);
    float value;
    memcpy(&value, &bits, sizeof(value));
    if (!isfinite(value))
        return -EINVAL;
    *ret_value = value;
    return 0;
}

bool wire_option_is(const struct wire_option *option, const char *word)
{
    size_t len = strlen(word);
    return option->len == len && memcmp(option->value, word, len) == 0;
}

/* Bytes of the sequence that `bytes` opens (2 to 4), 0 where it is none: overlong forms, surrogates
 * and what lies beyond U+10FFFF are ruled out by the range of the second byte (Unicode 15, table
 * 3-7). */
static size_t utf8_sequence(const uint8_t *bytes, size_t left)
{
    uint8_t lead = bytes[0], low = 0x80, high = 0xbf;
    size_t len;
    if (lead >= 0xc2 && lead <= 0xdf) {
        len = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
        len = 3;
        low = lead == 0xe0 ? 0xa0 : 0x80;
        high = lead == 0xed ? 0x9f : 0xbf;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
        len = 4;
        low = lead == 0xf0 ? 0x90 : 0x80;
        high = lead == 0xf4 ? 0x8f : 0xbf;
    } else {
        return 0;
    }
    if (left < len || bytes[1] < low || bytes[1] > high)
        return 0;
    for (size_t i = 2; i < len; i++)
        if ((bytes[i] & 0xc0) != 0x80)
            return 0;
    return len;
}

/* True when none of the eight bytes is NUL or beyond ASCII. Subtracting one borrows into a byte's
 * top bit only where the byte was zero (or above a zero, where the answer is already no). */
static inline bool plain_ascii(const uint8_t *bytes)
{
    uint64_t v;
    memcpy(&v, bytes, sizeof(v));
    return ((v | (v - 0x0101010101010101u)) & 0x8080808080808080u) == 0;
}

bool wire_utf8_valid(const uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len;) {
        if (len - i >= 8 && plain_ascii(bytes + i)) {
            i += 8;
        } else if (bytes[i] < 0x80) {
            if (bytes[i] == 0)
                return false;
            i++;
        } else {
            size_t n = utf8_sequence(bytes + i, len - i);
            if (n == 0)
                return false;
            i += n;
        }
    }
    return true;
}

/* ---- writing ---- */

static bool buffer_grow(struct wire_buffer *buffer, size_t more)
{
    if (buffer->failed)
        return false;
    size_t need, capacity = buffer->capacity ? buffer->capacity : BUFFER_FIRST_BYTES;
    if (__builtin_add_overflow(buffer->len, more, &need))
        goto fail;
    while (capacity < need)
        if (__builtin_mul_overflow(capacity, 2, &capacity))
            goto fail;
    uint8_t *data = realloc(buffer->data, capacity);
    if (!data)
        goto fail;
    buffer->data = data;
    buffer->capacity = capacity;
    return true;
fail:
    buffer->failed = true;
    return false;
}

/* Room for `more` bytes at the end, counted as written; NULL once an allocation has failed. */
static inline uint8_t *buffer_extend(struct wire_buffer *buffer, size_t more)
{
    if (__builtin_expect(buffer->failed || buffer->capacity - buffer->len < more, 0))
        if (!buffer_grow(buffer, more))
            return NULL;
    uint8_t *at = buffer->data + buffer->len;
    buffer->len += more;
    return at;
}

/* The option's head and room for its value. */
static inline uint8_t *option_extend(struct wire_buffer *buffer, uint16_t tag, uint32_t len)
{
    uint8_t *at = buffer_extend(buffer, WIRE_OPTION_BYTES + (size_t)len);
    if (!at)
        return NULL;
    buffer->option_at = (size_t)(at - buffer->data);
    store_u32(at, tag); /* the reserved field is the upper half */
    store_u32(at + 4, len);
    return at + WIRE_OPTION_BYTES;
}

void wire_begin(struct wire_buffer *buffer, uint16_t type, uint64_t id)
{
    buffer->frame_at = buffer->len;
    buffer->oversize = false;
    uint8_t *at = buffer_extend(buffer, WIRE_HEADER_BYTES);
    if (!at)
        return;
    store_u32(at, 0); /* body_len: wire_end() */
    store_u32(at + 4, type);
    store_u64(at + 8, id);
}

void wire_put_bytes(struct wire_buffer *buffer, uint16_t tag, const void *value, size_t len)
{
    if (len > UINT32_MAX) {
        buffer->oversize = true;
        return;
    }
    uint8_t *at = option_extend(buffer, tag, (uint32_t)len);
    if (at && len)
        memcpy(at, value, len);
}

void wire_put_text(struct wire_buffer *buffer, uint16_t tag, const char *text)
{
    wire_put_bytes(buffer, tag, text, strlen(text));
}

void wire_put_number(struct wire_buffer *buffer, uint16_t tag, uint64_t value)
{
    bool small = value <= UINT32_MAX;
    uint8_t *at = option_extend(buffer, tag, small ? 4 : 8);
    if (!at)
        return;
    if (small)
        store_u32(at, (uint32_t)value);
    else
        store_u64(at, value);
}

void wire_put_real(struct wire_buffer *buffer, uint16_t tag, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint8_t *at = option_extend(buffer, tag, sizeof(bits));
    if (at)
        store_u32(at, bits);
}

int wire_end(struct wire_buffer *buffer)
{
    if (buffer->failed) {
        buffer->len = buffer->frame_at;
        return -ENOMEM;
    }
    size_t body_len = buffer->len - buffer->frame_at - WIRE_HEADER_BYTES;
    if (buffer->oversize || body_len > UINT32_MAX) {
        buffer->len = buffer->frame_at;
        return -EMSGSIZE;
    }
    store_u32(buffer->data + buffer->frame_at, (uint32_t)body_len);
    return 0;
}

int wire_extend(struct wire_buffer *buffer, const void *bytes, size_t len)
{
    size_t value_at = buffer->option_at + WIRE_OPTION_BYTES;

    if (len > UINT32_MAX - buffer->len)
        return -EMSGSIZE;
    wire_append(buffer, bytes, len);
    if (buffer->failed)
        return -ENOMEM;
    store_u32(buffer->data + buffer->option_at + 4, (uint32_t)(buffer->len - value_at));
    return wire_end(buffer);
}

void wire_append(struct wire_buffer *buffer, const void *bytes, size_t len)
{
    uint8_t *at = buffer_extend(buffer, len);
    if (at && len)
        memcpy(at, bytes, len);
}

void wire_buffer_done(struct wire_buffer *buffer)
{
    free(buffer->data);
    *buffer = (struct wire_buffer){0};
}
