/* A daemon's side of a connection, played by a test: whole frames in and out, over a socket that
 * waits.
 *
 * What a function tells with false is that the client is gone. Hides: partial reads and writes. */
#ifndef HEARTH_TESTS_SUPPORT_FAKE_WIRE_H
#define HEARTH_TESTS_SUPPORT_FAKE_WIRE_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "lib/cleanup.h"
#include "lib/wire.h"

#define FAKE_MAX_FRAME   (1u << 21)
#define FAKE_CREDIT      1024u
#define FAKE_FRAME_LIMIT 4096u

struct fake_frame {
    struct wire_header header;
    uint8_t *body;
};

static inline bool fake_read(int fd, void *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = recv(fd, (char *)bytes + at, len - at, 0);
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

static inline bool fake_write(int fd, const void *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(fd, (const char *)bytes + at, len - at, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

/* Sends what is in the buffer and empties it. */
static inline bool fake_send(int fd, struct wire_buffer *buffer)
{
    bool sent = fake_write(fd, buffer->data, buffer->len);
    wire_buffer_done(buffer);
    return sent;
}

static inline bool fake_next(int fd, struct fake_frame *frame)
{
    uint8_t head[WIRE_HEADER_BYTES];
    free(frame->body);
    frame->body = NULL;
    if (!fake_read(fd, head, sizeof(head)) || wire_header_read(head, &frame->header) < 0 ||
        frame->header.body_len > FAKE_MAX_FRAME)
        return false;
    frame->body = malloc(frame->header.body_len + 1u);
    return fake_read(fd, frame->body, frame->header.body_len);
}

static inline void fake_frame_free(struct fake_frame *frame)
{
    free(frame->body);
}
#define _cleanup_frame_ _cleanup_(fake_frame_free)

/* The option's value as a number; `missing` where the frame has none. */
static inline uint64_t fake_number(const struct fake_frame *frame, uint16_t tag, uint64_t missing)
{
    struct wire_reader reader;
    struct wire_option option;
    uint64_t value = missing;
    wire_reader_init(&reader, frame->body, frame->header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        if (option.tag == tag)
            wire_option_number(&option, &value);
    return value;
}

/* The option's text in a buffer of the caller's; false where there is none. */
static inline bool fake_text(const struct fake_frame *frame, uint16_t tag, char *ret_text,
                             size_t size)
{
    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, frame->body, frame->header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        if (option.tag == tag) {
            snprintf(ret_text, size, "%.*s", (int)option.len, (const char *)option.value);
            return true;
        }
    return false;
}

static inline void fake_put_hello(struct wire_buffer *out)
{
    wire_append(out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
    wire_begin(out, WIRE_HELLO, 0);
    wire_put_text(out, TAG_VERSION, "1.2.3");
    wire_put_number(out, TAG_PID, 4711);
    wire_put_number(out, TAG_FRAME_LIMIT, FAKE_FRAME_LIMIT);
    wire_put_number(out, TAG_CREDIT, FAKE_CREDIT);
    wire_end(out);
}

/* The client's magic and hello in, the daemon's out. */
static inline bool fake_hello(int fd)
{
    char magic[WIRE_MAGIC_BYTES];
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer out = {0};
    if (!fake_read(fd, magic, sizeof(magic)) || memcmp(magic, WIRE_MAGIC, sizeof(magic)) != 0 ||
        !fake_next(fd, &frame) || frame.header.type != WIRE_HELLO || frame.header.id != 0)
        return false;
    fake_put_hello(&out);
    return fake_send(fd, &out);
}

static inline void fake_put_tokens(struct wire_buffer *out, uint64_t id, const char *text)
{
    wire_begin(out, WIRE_TOKENS, id);
    wire_put_text(out, TAG_TEXT, text);
    wire_end(out);
}

static inline void fake_put_done(struct wire_buffer *out, uint64_t id, const char *reason)
{
    wire_begin(out, WIRE_DONE, id);
    if (reason)
        wire_put_text(out, TAG_REASON, reason);
    wire_end(out);
}

/* `retry_after_us` 0: it says nothing of that. */
static inline void fake_put_error(struct wire_buffer *out, uint64_t id, const char *code,
                                  const char *sentence, uint64_t retry_after_us)
{
    wire_begin(out, WIRE_ERROR, id);
    wire_put_text(out, TAG_CODE, code);
    wire_put_text(out, TAG_SENTENCE, sentence);
    if (retry_after_us > 0)
        wire_put_number(out, TAG_RETRY_AFTER_US, retry_after_us);
    wire_end(out);
}

static inline void fake_put_goaway(struct wire_buffer *out)
{
    wire_begin(out, WIRE_GOAWAY, 0);
    wire_end(out);
}

#endif
