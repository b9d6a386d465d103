#include "daemon/serve/streaming.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

/* First allocation of a stream's text: a short answer never grows it. */
#define STREAM_FIRST_BYTES 64u

static const char replacement[3] = {'\xef', '\xbf', '\xbd'};

void stream_init(struct stream *stream, uint64_t credit, uint64_t buffer_bytes, bool whole,
                 uint64_t skip_bytes, const struct stream_stops *stops)
{
    memset(stream, 0, sizeof(*stream));
    stream->granted_bytes = credit;
    stream->buffer_bytes = buffer_bytes;
    stream->whole = whole;
    stream->skip_bytes = skip_bytes;
    stream->stops = stops;
    atomic_init(&stream->window, MIN(credit, buffer_bytes));
    atomic_init(&stream->parked, false);
}

void stream_done(struct stream *stream)
{
    free(stream->text);
    stream->text = NULL;
}

static int text_reserve(struct stream *stream, size_t more)
{
    size_t need = stream->len + more, capacity = stream->capacity;
    char *text;

    if (need <= capacity)
        return 0;
    if (need > UINT32_MAX / 2)
        return -ENOMEM;
    if (!capacity)
        capacity = STREAM_FIRST_BYTES;
    while (capacity < need)
        capacity *= 2;
    text = realloc(stream->text, capacity);
    if (!text)
        return -ENOMEM;
    stream->text = text;
    stream->capacity = (uint32_t)capacity;
    return 0;
}

/* Length of the UTF-8 sequence at `s`: 1..4; 0 when `n` bytes may be the start of one; -1 when they
 * cannot. The Unicode Standard, table 3-7. */
static int sequence_length(const uint8_t *s, size_t n)
{
    uint8_t low = 0x80, high = 0xbf;
    int len;

    if (s[0] < 0x80)
        return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf)
        len = 2;
    else if (s[0] >= 0xe0 && s[0] <= 0xef)
        len = 3;
    else if (s[0] >= 0xf0 && s[0] <= 0xf4)
        len = 4;
    else
        return -1;
    if (s[0] == 0xe0)
        low = 0xa0;
    else if (s[0] == 0xed)
        high = 0x9f;
    else if (s[0] == 0xf0)
        low = 0x90;
    else if (s[0] == 0xf4)
        high = 0x8f;
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n)
            return 0;
        if (s[i] < low || s[i] > high)
            return -1;
        low = 0x80;
        high = 0xbf;
    }
    return len;
}

/* Moves `clean` forward over whole sequences; a byte that fits none is replaced. */
static int text_clean(struct stream *stream)
{
    while (stream->clean < stream->len) {
        int n =
            sequence_length((uint8_t *)stream->text + stream->clean, stream->len - stream->clean);
        if (n == 0 && !stream->finished)
            return 0;
        if (n > 0) {
            stream->clean += (uint32_t)n;
            continue;
        }
        if (text_reserve(stream, sizeof(replacement) - 1) < 0)
            return -ENOMEM;
        memmove(stream->text + stream->clean + sizeof(replacement),
                stream->text + stream->clean + 1, stream->len - stream->clean - 1);
        memcpy(stream->text + stream->clean, replacement, sizeof(replacement));
        stream->len += sizeof(replacement) - 1;
        stream->clean += sizeof(replacement);
    }
    return 0;
}

/* The first place at or after `from` where a stop string stands whole; -1: none. */
static int64_t find_stop(const struct stream *stream, uint32_t from)
{
    for (uint32_t at = from; at < stream->clean; at++) {
        for (uint32_t i = 0; i < stream->stops->n; i++) {
            uint32_t len = stream->stops->len[i];
            if (len <= stream->clean - at &&
                memcmp(stream->text + at, stream->stops->text[i], len) == 0)
                return at;
        }
    }
    return -1;
}

/* Where the longest end of the text that begins a stop string starts. */
static uint32_t held_from(const struct stream *stream)
{
    uint32_t from = 0;

    if (stream->clean > STREAM_MAX_STOP_BYTES)
        from = stream->clean - STREAM_MAX_STOP_BYTES;
    if (from < stream->ready)
        from = stream->ready;
    for (uint32_t at = from; at < stream->clean; at++) {
        uint32_t tail = stream->clean - at;
        for (uint32_t i = 0; i < stream->stops->n; i++)
            if (tail < stream->stops->len[i] &&
                memcmp(stream->text + at, stream->stops->text[i], tail) == 0)
                return at;
    }
    return stream->clean;
}

/* Drops what the reader has already, as far as it is ready. -EILSEQ: that ends inside a sequence.
 */
static int text_skip(struct stream *stream)
{
    size_t n = MIN(stream->skip_bytes, stream->ready);

    if (n == 0)
        return 0;
    if (n < stream->ready && ((uint8_t)stream->text[n] & 0xc0) == 0x80)
        return -EILSEQ;
    stream->skip_bytes -= n;
    stream_consume(stream, n);
    stream->taken_bytes -= n; /* dropped bytes take no credit */
    return 0;
}

int stream_push(struct stream *stream, const char *bytes, size_t len)
{
    int r = text_reserve(stream, len);

    if (r < 0)
        return r;
    if (len > 0)
        memcpy(stream->text + stream->len, bytes, len);
    stream->len += (uint32_t)len;
    r = text_clean(stream);
    if (r < 0)
        return r;
    if (!stream->stops) {
        stream->ready = stream->clean;
        return text_skip(stream);
    }
    /* What is ready has been searched: a stop string cannot begin there. */
    int64_t stop = find_stop(stream, stream->ready);
    if (stop >= 0) {
        stream->len = stream->clean = stream->ready = (uint32_t)stop;
        stream->finished = true;
        r = text_skip(stream);
        return r < 0 ? r : 1;
    }
    stream->ready = held_from(stream);
    return text_skip(stream);
}

void stream_cut(struct stream *stream)
{
    stream->len = stream->clean;
}

int stream_finish(struct stream *stream)
{
    int r;

    stream->finished = true;
    r = text_clean(stream);
    stream->ready = stream->clean;
    return r < 0 ? r : text_skip(stream);
}

/* The longest beginning of the ready text that is at most `limit` bytes and ends a sequence. */
static size_t whole_sequences(const struct stream *stream, uint64_t limit)
{
    size_t n = stream->ready;

    if (n <= limit)
        return n;
    n = limit;
    while (n > 0 && ((uint8_t)stream->text[n] & 0xc0) == 0x80)
        n--;
    return n;
}

size_t stream_peek(struct stream *stream, const char **ret_text)
{
    uint64_t window;

    /* Ready text that has not been skipped: the place to skip to is inside a sequence. */
    if (stream->ready == 0 || stream->skip_bytes > 0)
        return 0;
    if (stream->whole && !stream->finished && stream->len < stream->buffer_bytes)
        return 0;
    window = atomic_load(&stream->window);
    *ret_text = stream->text;
    return window > stream->taken_bytes ? whole_sequences(stream, window - stream->taken_bytes) : 0;
}

void stream_consume(struct stream *stream, size_t len)
{
    memmove(stream->text, stream->text + len, stream->len - len);
    stream->len -= (uint32_t)len;
    stream->clean -= (uint32_t)len;
    stream->ready -= (uint32_t)len;
    stream->taken_bytes += len;
}

static bool has_room(const struct stream *stream)
{
    if (stream->whole && !stream->finished && stream->len < stream->buffer_bytes)
        return true;
    return stream->ready == 0 && atomic_load(&stream->window) > stream->taken_bytes;
}

bool stream_may_run(struct stream *stream)
{
    const char *text;

    if (has_room(stream))
        return true;
    atomic_store(&stream->parked, true);
    /* Room that came between the two, be it for text that waits, is seen here, or `parked` is seen
     * by whoever gave it. */
    if (!has_room(stream) && stream_peek(stream, &text) == 0)
        return false;
    atomic_store(&stream->parked, false);
    return true;
}

bool stream_drained(const struct stream *stream)
{
    return stream->finished && stream->len == 0;
}

static bool window_raise(struct stream *stream, uint64_t buffer_end)
{
    uint64_t window = MIN(stream->granted_bytes, buffer_end);

    if (window <= atomic_load_explicit(&stream->window, memory_order_relaxed))
        return false;
    atomic_store(&stream->window, window);
    return atomic_load(&stream->parked) && atomic_exchange(&stream->parked, false);
}

bool stream_grant(struct stream *stream, uint64_t bytes)
{
    uint64_t sum = stream->granted_bytes + bytes;

    stream->granted_bytes = sum < bytes ? UINT64_MAX : sum;
    return window_raise(stream, stream->delivered_bytes + stream->buffer_bytes);
}

bool stream_delivered(struct stream *stream, uint64_t bytes, bool room)
{
    stream->delivered_bytes += bytes;
    return room && window_raise(stream, stream->delivered_bytes + stream->buffer_bytes);
}
