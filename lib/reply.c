/* A reply's options become the fields of struct hearth_reply: one table, indexed by tag. */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/client.h"

enum field_kind {
    FIELD_NONE, /* unknown, or of no use in a reply: skipped */
    FIELD_WORD, /* text as a C string */
    FIELD_TEXT, /* text with its length */
    FIELD_NUMBER,
    FIELD_FLAG,
    FIELD_SEED,
    FIELD_IDS,
    FIELD_VECTOR,
    FIELD_FINGERPRINT,
};

struct field {
    uint16_t tag;
    uint8_t kind;
    uint16_t offset;
};

static const struct field fields[] = {
#define FIELD(t, k, member) \
    [(t) & ~WIRE_TAG_CRITICAL] = {(t), (k), offsetof(struct hearth_reply, member)}
    FIELD(TAG_TEXT, FIELD_TEXT, text),
    FIELD(TAG_IDS, FIELD_IDS, ids),
    FIELD(TAG_VECTOR, FIELD_VECTOR, vector),
    FIELD(TAG_REASON, FIELD_WORD, reason),
    FIELD(TAG_PROMPT_TOKENS, FIELD_NUMBER, prompt_tokens),
    FIELD(TAG_COMPLETION_TOKENS, FIELD_NUMBER, completion_tokens),
    FIELD(TAG_QUEUED_US, FIELD_NUMBER, queued_us),
    FIELD(TAG_LOAD_US, FIELD_NUMBER, load_us),
    FIELD(TAG_PREFILL_US, FIELD_NUMBER, prefill_us),
    FIELD(TAG_DECODE_US, FIELD_NUMBER, decode_us),
    FIELD(TAG_SEED, FIELD_SEED, seed),
    FIELD(TAG_VARIANT, FIELD_WORD, variant),
    FIELD(TAG_FINGERPRINT, FIELD_FINGERPRINT, fingerprint),
    FIELD(TAG_CODE, FIELD_WORD, code),
    FIELD(TAG_SENTENCE, FIELD_WORD, sentence),
    FIELD(TAG_OPTION, FIELD_WORD, option),
    FIELD(TAG_RETRY_AFTER_US, FIELD_NUMBER, retry_after_us),
    FIELD(TAG_MODEL, FIELD_WORD, model),
    FIELD(TAG_STATE, FIELD_WORD, state),
    FIELD(TAG_DONE_BYTES, FIELD_NUMBER, done_bytes),
    FIELD(TAG_TOTAL_BYTES, FIELD_NUMBER, total_bytes),
    FIELD(TAG_MEMORY_BYTES, FIELD_NUMBER, memory_bytes),
    FIELD(TAG_PRELOAD, FIELD_FLAG, preload),
    FIELD(TAG_PINNED, FIELD_FLAG, pinned),
    FIELD(TAG_KEEP_ALIVE_US, FIELD_NUMBER, keep_alive_us),
    FIELD(TAG_HOLDS, FIELD_NUMBER, holds),
    FIELD(TAG_INFO, FIELD_WORD, info),
    FIELD(TAG_STATS, FIELD_WORD, stats),
    FIELD(TAG_VERSION, FIELD_WORD, version),
    FIELD(TAG_LOST, FIELD_NUMBER, lost_events),
    FIELD(TAG_NAME, FIELD_WORD, name),
    FIELD(TAG_PID, FIELD_NUMBER, pid),
#undef FIELD
};

static const struct field *field_of_tag(uint16_t tag)
{
    unsigned index = tag & ~WIRE_TAG_CRITICAL;
    if (index >= ELEMENTSOF(fields) || fields[index].tag != tag)
        return NULL;
    return &fields[index];
}

/* An aligned copy of 32-bit elements in this machine's order. Both arrays of a reply could be there
 * at once, so each takes its half of the scratch. */
static int array_copy(const struct wire_option *option, struct reply_scratch *scratch,
                      uint32_t **ret_array, size_t *ret_n)
{
    if (option->len % sizeof(uint32_t) != 0)
        return -EINVAL;
    if (scratch->capacity < option->len) {
        void *data = realloc(scratch->data, option->len);
        if (!data)
            return -ENOMEM;
        scratch->data = data;
        scratch->capacity = option->len;
    }
    uint32_t *array = scratch->data;
    size_t n = option->len / sizeof(uint32_t);
    for (size_t i = 0; i < n; i++) {
        uint32_t v;
        memcpy(&v, option->value + i * sizeof(v), sizeof(v));
        array[i] = le32toh(v);
    }
    *ret_array = array;
    *ret_n = n;
    return 0;
}

static int array_set(const struct wire_option *option, enum field_kind kind,
                     struct reply_scratch *scratch, struct hearth_reply *reply)
{
    uint32_t *array = NULL;
    size_t n = 0;
    int r = array_copy(option, scratch, &array, &n);
    if (r < 0)
        return r;
    /* There is one scratch: the later array of a reply takes the place of an earlier one. */
    reply->ids = NULL;
    reply->vector = NULL;
    reply->n_ids = reply->n_vector = 0;
    if (kind == FIELD_IDS) {
        reply->ids = (const int32_t *)array;
        reply->n_ids = n;
    } else {
        reply->vector = (const float *)(const void *)array;
        reply->n_vector = n;
    }
    return 0;
}

static int field_set(const struct field *field, const struct wire_option *option,
                     struct reply_scratch *scratch, struct hearth_reply *reply)
{
    void *member = (char *)reply + field->offset;
    uint64_t number = 0;
    int r;
    switch ((enum field_kind)field->kind) {
    case FIELD_TEXT: reply->text_bytes = option->len; /* fall through */
    case FIELD_WORD: *(const char **)member = (const char *)option->value; return 0;
    case FIELD_FINGERPRINT:
        reply->fingerprint = option->value;
        reply->fingerprint_bytes = option->len;
        return 0;
    case FIELD_IDS:
    case FIELD_VECTOR: return array_set(option, field->kind, scratch, reply);
    case FIELD_NUMBER:
    case FIELD_FLAG:
    case FIELD_SEED:
        r = wire_option_number(option, &number);
        if (r < 0)
            return r;
        if (field->kind == FIELD_FLAG)
            *(bool *)member = number != 0;
        else
            *(uint64_t *)member = number;
        reply->has_seed |= field->kind == FIELD_SEED;
        return 0;
    case FIELD_NONE: return 0;
    }
    return 0;
}

int reply_parse(uint8_t *body, size_t len, struct reply_scratch *scratch,
                struct hearth_reply *reply, struct fault *ret_fault)
{
    struct wire_reader reader;
    struct wire_option option;
    uint8_t *text_end = NULL; /* lies on the next option's head, so it is cut once that was read */
    int r;
    wire_reader_init(&reader, body, len);
    while ((r = wire_reader_next(&reader, &option)) > 0) {
        if (text_end)
            *text_end = '\0';
        text_end = NULL;
        const struct field *field = field_of_tag(option.tag);
        if (!field)
            continue;
        r = field_set(field, &option, scratch, reply);
        if (r == -EINVAL)
            return fault_set(ret_fault, -EBADMSG, "'%s' of %u bytes is not a value it can have",
                             wire_tag_name(option.tag), option.len);
        if (r < 0)
            return fault_set(ret_fault, r, "no memory for an array of %u bytes", option.len);
        if (field->kind == FIELD_WORD || field->kind == FIELD_TEXT)
            text_end = body + (option.value - body) + option.len;
    }
    if (r < 0)
        return fault_set(ret_fault, r, "an option runs past the end of its frame");
    if (text_end)
        *text_end = '\0';
    return 0;
}
