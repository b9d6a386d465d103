/* Streaming: a text on its way from the engine to its reader.
 *
 * A stream takes the bytes of tokens as they are generated and hands out what may go: never more
 * than its window (the reader's credit, and the room left in the bounded buffer), never a part of a
 * UTF-8 sequence, never the beginning of what may become a stop string. A stream whose ready text
 * has not all gone is not computed for: it is parked, and costs nothing until its reader comes
 * back.
 *
 * Bytes that cannot be UTF-8 become U+FFFD, so that what is sent is always text.
 *
 * Hides: hold-back of partial sequences and stop strings, the arithmetic of credit.
 * Threads: stream_grant(), stream_delivered() on the reactor; everything else on the engine thread,
 * but for stream_init() and stream_done(), which run while the other side does not know the stream.
 * `window` and `parked` are the only shared fields. */
#ifndef HEARTH_SERVE_STREAMING_H
#define HEARTH_SERVE_STREAMING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Longest stop string and most of them, as on the wire. */
#define STREAM_MAX_STOPS      8u
#define STREAM_MAX_STOP_BYTES 64u

struct stream_stops {
    uint32_t n;
    uint8_t len[STREAM_MAX_STOPS]; /* 1..STREAM_MAX_STOP_BYTES */
    char text[STREAM_MAX_STOPS][STREAM_MAX_STOP_BYTES];
};

struct stream {
    /* Shared: bytes that may have been handed out at most since the stream began. The reactor
     * raises it; the engine thread reads it. */
    _Atomic uint64_t window;
    /* Shared: set by the engine thread when it stops computing for want of room, taken back by
     * whoever raises the window. Both sides use sequentially consistent order: the one writes
     * `parked` and then reads `window`, the other writes `window` and then reads `parked`, so
     * that one of them sees the other. */
    _Atomic bool parked;

    /* Reactor's. */
    uint64_t granted_bytes;   /* the reader's credit since the stream began */
    uint64_t delivered_bytes; /* put into the connection's output */
    uint64_t buffer_bytes;    /* limits.stream_buffer */

    /* Engine thread's. */
    const struct stream_stops *stops; /* NULL: none; owned by the request */
    uint64_t taken_bytes;             /* handed out */
    uint64_t skip_bytes;              /* still to be dropped before the first is handed out */
    char *text;                       /* [ready | held back | incomplete sequence] */
    uint32_t capacity, len;
    uint32_t clean; /* bytes of whole sequences */
    uint32_t ready; /* of these, bytes that may go */
    bool whole;     /* hand out at the end, or when buffer_bytes are full */
    bool finished;  /* nothing more comes: all clean text is ready */
};

/* `credit`: initial bytes. `stops` may be NULL and must outlive the stream. */
void stream_init(struct stream *stream, uint64_t credit, uint64_t buffer_bytes, bool whole,
                 uint64_t skip_bytes, const struct stream_stops *stops);
void stream_done(struct stream *stream);

/* Engine thread: adds the bytes of one token. 1 when a stop string is complete (text from it on is
 * dropped and the stream is finished), 0 else, -ENOMEM; -EILSEQ: skip_bytes ends inside a UTF-8
 * sequence, so that its reader has half a character, or counted wrongly: nothing it could be sent
 * would join on. */
int stream_push(struct stream *stream, const char *bytes, size_t len);
/* Engine thread: the text ends here by something else than itself; a character that is not whole is
 * no part of it. */
void stream_cut(struct stream *stream);
/* Engine thread: nothing more comes; what was held back becomes ready. Errors as above. */
int stream_finish(struct stream *stream);
/* Engine thread: the text that may go now (0: none), valid until the next call on the stream. */
size_t stream_peek(struct stream *stream, const char **ret_text);
/* Engine thread: `len` bytes of it (as peeked) are gone. */
void stream_consume(struct stream *stream, size_t len);
/* Engine thread: whether the next token may be computed: all ready text has gone and there is room
 * for more. When not, the stream is marked parked and stays so until it is granted room. */
bool stream_may_run(struct stream *stream);
/* Engine thread: all text has gone and nothing more comes. */
bool stream_drained(const struct stream *stream);

/* Reactor: the reader takes `bytes` more. True when a parked stream may run again: tell the engine
 * thread. */
bool stream_grant(struct stream *stream, uint64_t bytes);
/* Reactor: `bytes` of text went into the connection's output; `room`: that output is below its
 * bound, so the buffer's window may move on. Return as above. */
bool stream_delivered(struct stream *stream, uint64_t bytes, bool room);

#endif
