/* The wire, version 1: frames of tag-length-value options over a Unix stream socket.
 *
 * Each side opens with the 8 bytes of WIRE_MAGIC, then sends frames. A frame is a 16-byte header
 * and `body_len` bytes of options; an option is an 8-byte head and its value. Everything is
 * little-endian and unaligned. Numbers are unsigned and 1, 2, 4 or 8 bytes long (the reader takes
 * any of them); real numbers are IEEE 754 binary32; text is UTF-8 without a terminator.
 * docs/protocol.md is the contract in words.
 *
 * Hides: byte order, alignment, bounds of every read. A frame is never trusted: whatever the bytes,
 * these functions read inside the given range only. Thread: no state, any thread. */
#ifndef HEARTH_LIB_WIRE_H
#define HEARTH_LIB_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_MAGIC         "HRTHv1\0\0"
#define WIRE_MAGIC_BYTES   8u
#define WIRE_HEADER_BYTES  16u
#define WIRE_HEADER_ID_AT  8u /* where the id is in it */
#define WIRE_OPTION_BYTES  8u
#define WIRE_TAG_CRITICAL  0x8000u /* an unknown or misplaced tag with this bit is refused */
#define WIRE_DEFAULT_FRAME (1u << 20)

enum wire_type {
    /* Both ways: the first frame of each side. */
    WIRE_HELLO = 1,
    /* Requests: answered by any number of `item` and `tokens`, then one `done` or `error`. */
    WIRE_COMPLETE = 2,
    WIRE_CHAT = 3,
    WIRE_EMBED = 4,
    WIRE_TOKENIZE = 5,
    WIRE_MODELS = 6,
    WIRE_WARM = 7,
    WIRE_UNLOAD = 8,
    WIRE_SET = 9,
    WIRE_HOLD = 10,
    WIRE_RELOAD = 11,
    WIRE_STATUS = 12,
    WIRE_METRICS = 13,
    WIRE_SUBSCRIBE = 14,
    WIRE_NULL = 15,
    WIRE_PING = 16,
    /* Notes to a live request: they have its id and no answer of their own. */
    WIRE_CANCEL = 17,
    WIRE_CREDIT = 18,
    /* Replies. */
    WIRE_ITEM = 64,
    WIRE_TOKENS = 65,
    WIRE_DONE = 66,
    WIRE_ERROR = 67,
    WIRE_GOAWAY = 68, /* id 0: no new requests on this connection; those running finish */
};

enum wire_tag {
    /* Connection. */
    TAG_VERSION = 1,      /* text: the program's version */
    TAG_PID = 2,          /* number: the daemon's own pid */
    TAG_FRAME_LIMIT = 3,  /* number: largest body_len taken, bytes */
    TAG_CREDIT = 4,       /* number: bytes of text; in hello and requests the initial, in `credit` more */
    TAG_CLIENT = 5,       /* text: the client program's name, for status */
    TAG_STATUS_PATH = 6,  /* text: path of the status socket */
    /* Requests. */
    TAG_MODEL = 16,          /* text */
    TAG_PROMPT = 17,         /* text */
    TAG_IDS = 18,            /* i32[]: token ids, in place of a prompt; in replies of tokenize */
    TAG_ROLE = 19,           /* text: opens a message, followed by its content */
    TAG_CONTENT = 20,        /* text */
    TAG_STREAM = 21,         /* number 0/1, default 1 */
    TAG_MAX_TOKENS = 22,     /* number */
    TAG_TEMPERATURE = 23,    /* real */
    TAG_TOP_K = 24,          /* number, 0: off */
    TAG_TOP_P = 25,          /* real */
    TAG_MIN_P = 26,          /* real */
    TAG_REPEAT_PENALTY = 27, /* real */
    TAG_SEED = 28,           /* number */
    TAG_STOP = WIRE_TAG_CRITICAL | 29,        /* text, repeatable up to WIRE_MAX_STOPS */
    TAG_IGNORE_EOS = 30,                      /* number 0/1 */
    TAG_DEADLINE_US = WIRE_TAG_CRITICAL | 31, /* number: from receipt */
    TAG_PRIORITY = 32,                        /* number: 0 interactive, 1 batch */
    TAG_SKIP_BYTES = WIRE_TAG_CRITICAL | 33,  /* number: bytes of text not to send again */
    TAG_FINGERPRINT = WIRE_TAG_CRITICAL | 34, /* bytes; also in the first `tokens` and in `done` */
    TAG_KEEP_ALIVE_US = 35,                   /* number */
    TAG_WAIT = 36,    /* number 0/1: `warm` answers with progress items and ends when it is over */
    TAG_PRELOAD = 37, /* number 0/1 */
    TAG_PINNED = 38,  /* number 0/1 */
    TAG_NAME = 39,    /* text: which metrics section, which list */
    TAG_ON_BEHALF_OF = WIRE_TAG_CRITICAL | 40, /* u32 uid, then u32 gids */
    /* Replies. */
    TAG_TEXT = 64,               /* text */
    TAG_REASON = 66,             /* text: done.reason */
    TAG_CODE = 67,               /* text: the error's code word */
    TAG_SENTENCE = 68,           /* text */
    TAG_OPTION = 69,             /* text: the name of the offending option */
    TAG_RETRY_AFTER_US = 70,     /* number */
    TAG_PROMPT_TOKENS = 71,      /* number */
    TAG_COMPLETION_TOKENS = 72,  /* number */
    TAG_QUEUED_US = 73,          /* number */
    TAG_LOAD_US = 74,            /* number */
    TAG_PREFILL_US = 75,         /* number */
    TAG_DECODE_US = 76,          /* number */
    TAG_STATE = 77,              /* text: a model's or the daemon's state word */
    TAG_DONE_BYTES = 78,         /* number */
    TAG_TOTAL_BYTES = 79,        /* number */
    TAG_INFO = 80,               /* text: flat `key value` lines */
    TAG_STATS = 81,              /* text: flat `key value` lines */
    TAG_MEMORY_BYTES = 82,       /* number */
    TAG_VARIANT = 83,            /* text: kernel variant */
    TAG_VECTOR = 84,             /* f32[] */
    TAG_LOST = 85,               /* number: events a slow subscriber missed */
    TAG_HOLDS = 86,              /* number */
};

/* Bound on stop strings of a request; each is at most WIRE_MAX_STOP_BYTES. */
#define WIRE_MAX_STOPS      8u
#define WIRE_MAX_STOP_BYTES 64u
/* Longest model name, `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. */
#define WIRE_MAX_MODEL_NAME 128u

/* The codes of `error`; the same word on the wire, in the CLI, in metrics and in the manual. */
enum wire_code {
    CODE_BAD_FRAME,
    CODE_TOO_LARGE,
    CODE_BAD_REQUEST,
    CODE_NO_SUCH_MODEL,
    CODE_LOAD_FAILED,
    CODE_NO_MEMORY,
    CODE_BUSY,
    CODE_DEADLINE,
    CODE_CANCELLED,
    CODE_FORBIDDEN,
    CODE_CONTEXT_FULL,
    CODE_SHUTTING_DOWN,
    CODE_INTERNAL,
    _CODE_MAX,
};

struct wire_header {
    uint32_t body_len; /* bytes of options */
    uint16_t type;     /* enum wire_type */
    uint16_t flags;    /* 0 */
    uint64_t id;       /* the client's choice, unique among its live requests; 0: the connection */
};

/* A view into a received option; valid as long as the frame's bytes. */
struct wire_option {
    uint16_t tag;
    uint32_t len;
    const uint8_t *value;
};

/* Walks the options of a body. */
struct wire_reader {
    const uint8_t *at;
    const uint8_t *end;
};

/* A growing output buffer. Zero-initialise; wire_buffer_done() gives the memory back. `failed` is
 * sticky: after a failed allocation every append does nothing and wire_end() returns -ENOMEM. A
 * frame that wire_end() refuses is taken out again; the frames before it stay. */
struct wire_buffer {
    uint8_t *data;
    size_t len;
    size_t capacity;
    size_t frame_at;  /* offset of the frame being written, or written last */
    size_t option_at; /* of its last option */
    bool failed;
    bool oversize; /* the frame being written has an option beyond 4 GiB */
};

/* The code's word ("bad-frame"), and the code of a word (-EINVAL if it is none). */
const char *wire_code_name(enum wire_code code);
int wire_code_from_name(const char *name, size_t len);
/* The option's name as documents and errors give it ("max_tokens"), NULL if the tag is unknown. */
const char *wire_tag_name(uint16_t tag);
/* The frame type's name ("complete"), NULL if unknown. */
const char *wire_type_name(uint16_t type);

/* Reads a header from WIRE_HEADER_BYTES bytes. 0, or -EBADMSG where a reserved field is not zero. */
int wire_header_read(const uint8_t *bytes, struct wire_header *ret_header);

void wire_reader_init(struct wire_reader *reader, const uint8_t *body, size_t body_len);
/* 1 and an option; 0 at the end; -EBADMSG where a length runs past the body or a reserved field is
 * not zero. */
int wire_reader_next(struct wire_reader *reader, struct wire_option *ret_option);
/* The option's value as a number (1, 2, 4 or 8 bytes) or a finite real (4 bytes); -EINVAL else. */
int wire_option_number(const struct wire_option *option, uint64_t *ret_value);
int wire_option_real(const struct wire_option *option, float *ret_value);
/* Whether the text equals `word`. */
bool wire_option_is(const struct wire_option *option, const char *word);
/* True when the value is valid UTF-8 without U+0000 (model names and other words want more). */
bool wire_utf8_valid(const uint8_t *bytes, size_t len);

/* Frames are written begin, put..., end; several frames may follow each other in one buffer. */
void wire_begin(struct wire_buffer *buffer, uint16_t type, uint64_t id);
void wire_put_bytes(struct wire_buffer *buffer, uint16_t tag, const void *value, size_t len);
void wire_put_text(struct wire_buffer *buffer, uint16_t tag, const char *text);
void wire_put_number(struct wire_buffer *buffer, uint16_t tag, uint64_t value); /* 4 or 8 bytes */
void wire_put_real(struct wire_buffer *buffer, uint16_t tag, float value);
/* Closes the frame begun last: 0, -ENOMEM, or -EMSGSIZE beyond 4 GiB. */
int wire_end(struct wire_buffer *buffer);
/* Lengthens the last option of the frame ended last, which must be the buffer's end and not yet on
 * its way: text that follows itself needs no frame of its own. As wire_end(). */
int wire_extend(struct wire_buffer *buffer, const void *bytes, size_t len);
/* Appends raw bytes (the magic, an HTTP reply). */
void wire_append(struct wire_buffer *buffer, const void *bytes, size_t len);
void wire_buffer_done(struct wire_buffer *buffer);

#endif
