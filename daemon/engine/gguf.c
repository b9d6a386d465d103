#include "daemon/engine/gguf.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* The first piece of a header that is read; each further one doubles what is there. */
#define FIRST_PIECE_BYTES (64u << 10)
#define DEFAULT_ALIGNMENT 32u
/* The smallest tensor info: a name of one byte, n_dims, one dimension, type, offset. */
#define MIN_TENSOR_BYTES 33u
/* The smallest key: its length, one byte, value type, one byte of value. */
#define MIN_KEY_BYTES 14u
/* A name as a sentence shows it, terminator included. */
#define SHOWN_BYTES 72u

static_assert(GGUF_MAX_HEADER_BYTES <= UINT32_MAX, "places in a header are kept in 32 bits");

enum value_type {
    VALUE_U8 = 0,
    VALUE_I8 = 1,
    VALUE_U16 = 2,
    VALUE_I16 = 3,
    VALUE_U32 = 4,
    VALUE_I32 = 5,
    VALUE_F32 = 6,
    VALUE_BOOL = 7,
    VALUE_STRING = 8,
    VALUE_ARRAY = 9,
    VALUE_U64 = 10,
    VALUE_I64 = 11,
    VALUE_F64 = 12,
};

/* Bytes of a value of fixed size; 0: a string or an array. */
static const struct {
    const char *name;
    uint8_t bytes;
} value_types[] = {
    [VALUE_U8] = {"u8", 1},       [VALUE_I8] = {"i8", 1},     [VALUE_U16] = {"u16", 2},
    [VALUE_I16] = {"i16", 2},     [VALUE_U32] = {"u32", 4},   [VALUE_I32] = {"i32", 4},
    [VALUE_F32] = {"f32", 4},     [VALUE_BOOL] = {"bool", 1}, [VALUE_STRING] = {"string", 0},
    [VALUE_ARRAY] = {"array", 0}, [VALUE_U64] = {"u64", 8},   [VALUE_I64] = {"i64", 8},
    [VALUE_F64] = {"f64", 8},
};

/* Types with a size are those that somebody here reads; the others only have a name to be refused
 * by. */
static const struct {
    const char *name;
    uint16_t block;       /* elements */
    uint16_t block_bytes; /* 0: not read here */
} tensor_types[] = {
    [GGUF_F32] = {"F32", 1, 4},
    [GGUF_F16] = {"F16", 1, 2},
    [GGUF_Q4_0] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 0, 0},
    [6] = {"Q5_0", 0, 0},
    [7] = {"Q5_1", 0, 0},
    [GGUF_Q8_0] = {"Q8_0", 32, 34},
    [9] = {"Q8_1", 0, 0},
    [10] = {"Q2_K", 0, 0},
    [11] = {"Q3_K", 0, 0},
    [GGUF_Q4_K] = {"Q4_K", 256, 144},
    [GGUF_Q5_K] = {"Q5_K", 256, 176},
    [GGUF_Q6_K] = {"Q6_K", 256, 210},
    [15] = {"Q8_K", 0, 0},
    [16] = {"IQ2_XXS", 0, 0},
    [17] = {"IQ2_XS", 0, 0},
    [18] = {"IQ3_XXS", 0, 0},
    [19] = {"IQ1_S", 0, 0},
    [20] = {"IQ4_NL", 0, 0},
    [21] = {"IQ3_S", 0, 0},
    [22] = {"IQ2_S", 0, 0},
    [23] = {"IQ4_XS", 0, 0},
    [24] = {"I8", 0, 0},
    [25] = {"I16", 0, 0},
    [26] = {"I32", 0, 0},
    [27] = {"I64", 0, 0},
    [28] = {"F64", 0, 0},
    [29] = {"IQ1_M", 0, 0},
    [GGUF_BF16] = {"BF16", 1, 2},
    [34] = {"TQ1_0", 0, 0},
    [35] = {"TQ2_0", 0, 0},
    [39] = {"MXFP4", 0, 0},
};

/* A key and where its value lies; places are offsets in the header. */
struct entry {
    uint32_t key_at, key_len;
    enum value_type type;
    enum value_type element; /* of an array */
    uint32_t value_at;
    uint64_t n;        /* bytes of a string, elements of an array */
    uint32_t *strings; /* of an array of strings: where each one's length stands; owned */
};

struct gguf {
    struct gguf_source source;
    const uint8_t *header; /* `owned`, or the source's memory */
    uint8_t *owned;        /* NULL for a source in memory */
    size_t header_bytes;   /* up to the end of the last tensor info */
    uint64_t hash;
    uint32_t n_entries;
    struct entry *entries; /* sorted by key */
    uint32_t n_tensors;
    struct gguf_tensor *tensors;  /* as in the file */
    struct gguf_tensor **by_name; /* sorted */
};

/* Reads a header from its start on. `bytes` moves when the buffer grows: what is kept while reading
 * are places, not pointers. */
struct header_reader {
    const struct gguf_source *source;
    const uint8_t *bytes;
    uint8_t *owned; /* NULL for a source in memory */
    size_t have;    /* bytes that are there */
    size_t at;      /* the next one */
    struct fault *fault;
};

/* ---- helpers ---- */

/* `bytes` for a sentence: cut, with everything unprintable as '?'. */
static const char *show(char shown[static SHOWN_BYTES], const void *bytes, size_t len)
{
    const unsigned char *from = bytes;
    size_t n = MIN(len, SHOWN_BYTES - 1);

    for (size_t i = 0; i < n; i++)
        shown[i] = from[i] >= ' ' && from[i] < 0x7f ? (char)from[i] : '?';
    shown[n] = '\0';
    if (len > n)
        memcpy(shown + n - 3, "...", 3);
    return shown;
}

static uint64_t load_le(const uint8_t *from, size_t bytes)
{
    uint64_t value = 0;

    for (size_t i = bytes; i-- > 0;)
        value = value << 8 | from[i];
    return value;
}

static float load_f32(const uint8_t *from)
{
    uint32_t bits = (uint32_t)load_le(from, 4);
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static double load_f64(const uint8_t *from)
{
    uint64_t bits = load_le(from, 8);
    double value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* The order of names everywhere here: bytes, then length. */
static int compare_bytes(const void *a, size_t a_len, const void *b, size_t b_len)
{
    int order = memcmp(a, b, MIN(a_len, b_len));

    return order ? order : (a_len > b_len) - (a_len < b_len);
}

/* Reads exactly `len` bytes at `offset` of a descriptor, however often it is interrupted or given
 * less: -EIO, -ENODATA where the file ends before. */
static int read_at(int fd, void *to, size_t len, uint64_t offset)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(fd, (uint8_t *)to + done, len - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENODATA;
        done += (size_t)n;
    }
    return 0;
}

static uint64_t hash_bytes(const uint8_t *bytes, size_t len)
{
    const uint64_t odd = 0x9e3779b97f4a7c15u;
    uint64_t hash = len * odd;
    size_t i = 0;

    for (; i + 8 <= len; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, sizeof(word));
        hash = (hash ^ le64toh(word)) * odd;
        hash ^= hash >> 32;
    }
    hash = (hash ^ load_le(bytes + i, len - i)) * odd;
    return hash ^ hash >> 29;
}

/* ---- reading the header ---- */

static int reader_fetch(struct header_reader *r, size_t until)
{
    uint64_t most = MIN(r->source->size, (uint64_t)GGUF_MAX_HEADER_BYTES);
    size_t want = MAX(until, MAX(r->have * 2, (size_t)FIRST_PIECE_BYTES));
    uint8_t *grown;
    int error;

    want = MIN(want, (size_t)most);
    assert(want >= until && want > r->have);
    grown = realloc(r->owned, want);
    if (!grown)
        return fault_set(r->fault, -ENOMEM, "no memory for a header of %zu bytes", want);
    r->owned = grown;
    r->bytes = grown;
    error = read_at(r->source->fd, grown + r->have, want - r->have, r->have);
    if (error == -ENODATA)
        return fault_set(r->fault, -EBADMSG, "the file became shorter while it was read");
    if (error)
        return fault_set(r->fault, -EIO, "the header cannot be read: %s", strerror(-error));
    r->have = want;
    return 0;
}

/* Makes sure that `n` more bytes are there; `what` is what they are, for the sentence. */
static int reader_need(struct header_reader *r, uint64_t n, const char *what)
{
    if (n <= r->have - r->at)
        return 0;
    if (n > r->source->size - r->at)
        return fault_set(r->fault, -EBADMSG,
                         "%s at byte %zu (%llu bytes) goes beyond the end of the file "
                         "(%llu bytes): it is damaged or was not copied whole",
                         what, r->at, (unsigned long long)n, (unsigned long long)r->source->size);
    if (n > GGUF_MAX_HEADER_BYTES - r->at)
        return fault_set(r->fault, -EBADMSG, "the header is larger than %u bytes",
                         GGUF_MAX_HEADER_BYTES);
    return reader_fetch(r, r->at + (size_t)n);
}

static int read_number(struct header_reader *r, size_t bytes, const char *what, uint64_t *ret)
{
    int error = reader_need(r, bytes, what);

    if (error)
        return error;
    *ret = load_le(r->bytes + r->at, bytes);
    r->at += bytes;
    return 0;
}

/* A string of at most `most` bytes: its place and its length. */
static int read_string(struct header_reader *r, uint64_t most, const char *what, uint32_t *ret_at,
                       uint64_t *ret_len)
{
    uint64_t len = 0;
    int error = read_number(r, 8, what, &len);

    if (error)
        return error;
    if (len > most)
        return fault_set(r->fault, -EBADMSG,
                         "%s at byte %zu claims %llu bytes; at most %llu are taken", what,
                         r->at - 8, (unsigned long long)len, (unsigned long long)most);
    error = reader_need(r, len, what);
    if (error)
        return error;
    *ret_at = (uint32_t)r->at;
    *ret_len = len;
    r->at += (size_t)len;
    return 0;
}

/* Walks over the strings of an array, noting where each begins, so that any one of them is found at
 * once later. The list grows with what has really been read, not with what the file claims. */
static int read_array_of_strings(struct header_reader *r, struct entry *entry)
{
    _cleanup_free_ uint32_t *strings = NULL;
    uint64_t room = 0;

    for (uint64_t i = 0; i < entry->n; i++) {
        uint32_t at;
        uint64_t len;
        int error;

        if (i == room) {
            uint64_t more = MIN(entry->n, MAX(room * 2, (uint64_t)1024));
            uint32_t *grown = reallocarray(strings, more, sizeof(*strings));
            if (!grown)
                return fault_set(r->fault, -ENOMEM, "no memory for an array of strings");
            strings = grown;
            room = more;
        }
        strings[i] = (uint32_t)r->at;
        error = read_string(r, GGUF_MAX_STRING_BYTES, "a string of an array", &at, &len);
        if (error)
            return error;
    }
    entry->strings = TAKE_PTR(strings);
    return 0;
}

static int read_array(struct header_reader *r, struct entry *entry)
{
    uint64_t element = 0, n = 0, least;
    int error = read_number(r, 4, "an array's type", &element);

    if (!error)
        error = read_number(r, 8, "an array's length", &n);
    if (error)
        return error;
    if (element >= ELEMENTSOF(value_types) || element == VALUE_ARRAY)
        return fault_set(r->fault, -EBADMSG, "an array at byte %zu has elements of type %llu (%s)",
                         r->at - 12, (unsigned long long)element,
                         element == VALUE_ARRAY ? "arrays of arrays are not taken" : "unknown");
    if (n > GGUF_MAX_ARRAY_ELEMENTS)
        return fault_set(r->fault, -EBADMSG,
                         "an array at byte %zu claims %llu elements; at most %u are taken",
                         r->at - 12, (unsigned long long)n, GGUF_MAX_ARRAY_ELEMENTS);
    entry->element = (enum value_type)element;
    entry->n = n;
    entry->value_at = (uint32_t)r->at;
    least = n * (value_types[element].bytes ? value_types[element].bytes : 8);
    if (least > r->source->size - r->at)
        return fault_set(r->fault, -EBADMSG,
                         "an array of %llu elements at byte %zu goes beyond the end of the file",
                         (unsigned long long)n, r->at - 12);
    if (element == VALUE_STRING)
        return read_array_of_strings(r, entry);
    error = reader_need(r, least, "an array");
    if (error)
        return error;
    r->at += (size_t)least;
    return 0;
}

static int read_value(struct header_reader *r, struct entry *entry)
{
    int error;

    switch (entry->type) {
    case VALUE_STRING:
        return read_string(r, GGUF_MAX_STRING_BYTES, "a string", &entry->value_at, &entry->n);
    case VALUE_ARRAY: return read_array(r, entry);
    default:
        error = reader_need(r, value_types[entry->type].bytes, "a value");
        if (error)
            return error;
        entry->value_at = (uint32_t)r->at;
        r->at += value_types[entry->type].bytes;
        return 0;
    }
}

/* Names the key in the sentence that a value's reader left behind. */
static int fault_in_key(struct header_reader *r, const struct entry *entry, int error)
{
    char shown[SHOWN_BYTES];
    struct fault cause;

    if (!r->fault)
        return error;
    cause = *r->fault;
    cause.text[FAULT_TEXT_BYTES - SHOWN_BYTES - 16] = '\0';
    return fault_set(r->fault, error, "key %s: %s",
                     show(shown, r->bytes + entry->key_at, entry->key_len), cause.text);
}

static int read_entry(struct header_reader *r, struct entry *entry)
{
    uint64_t len = 0, type = 0;
    int error = read_string(r, GGUF_MAX_KEY_BYTES, "a key", &entry->key_at, &len);

    if (error)
        return error;
    if (len == 0)
        return fault_set(r->fault, -EBADMSG, "a key at byte %zu is empty", r->at - 8);
    entry->key_len = (uint32_t)len;
    error = read_number(r, 4, "a value's type", &type);
    if (error)
        return error;
    if (type >= ELEMENTSOF(value_types)) {
        fault_set(r->fault, -EBADMSG, "its value has the unknown type %llu",
                  (unsigned long long)type);
        return fault_in_key(r, entry, -EBADMSG);
    }
    entry->type = (enum value_type)type;
    error = read_value(r, entry);
    return error ? fault_in_key(r, entry, error) : 0;
}

/* Elements and bytes of a tensor; refuses zeros and products that do not fit. */
static int measure_tensor(struct gguf_tensor *t, const char *name, struct fault *ret_fault)
{
    uint64_t elements = 1, rows = 1, row_bytes;

    for (uint32_t i = 0; i < 4; i++) {
        if (t->dims[i] == 0)
            return fault_set(ret_fault, -EBADMSG, "tensor %s has a dimension of 0", name);
        if (__builtin_mul_overflow(elements, t->dims[i], &elements) || elements > INT64_MAX)
            return fault_set(ret_fault, -EBADMSG, "tensor %s has dimensions too large to be real",
                             name);
        if (i > 0)
            rows *= t->dims[i];
    }
    t->bytes = 0;
    if (t->type >= ELEMENTSOF(tensor_types) || tensor_types[t->type].block_bytes == 0)
        return 0;
    row_bytes = gguf_row_bytes(t->type, t->dims[0]);
    if (row_bytes == 0)
        return fault_set(ret_fault, -EBADMSG,
                         "tensor %s has rows of %llu elements, no multiple of the %u that a block "
                         "of %s holds",
                         name, (unsigned long long)t->dims[0], tensor_types[t->type].block,
                         tensor_types[t->type].name);
    if (__builtin_mul_overflow(row_bytes, rows, &t->bytes))
        return fault_set(ret_fault, -EBADMSG, "tensor %s has dimensions too large to be real",
                         name);
    return 0;
}

/* One tensor info; the name is left as a place, since the buffer may still move. */
static int read_tensor(struct header_reader *r, struct gguf_tensor *t, uint32_t *ret_name_at)
{
    char shown[SHOWN_BYTES];
    uint64_t len = 0, n_dims = 0, type = 0;
    int error = read_string(r, GGUF_MAX_NAME_BYTES, "a tensor's name", ret_name_at, &len);

    if (!error)
        error = read_number(r, 4, "a tensor's number of dimensions", &n_dims);
    if (error)
        return error;
    show(shown, r->bytes + *ret_name_at, (size_t)len);
    if (len == 0)
        return fault_set(r->fault, -EBADMSG, "a tensor at byte %zu has no name", r->at);
    if (n_dims == 0 || n_dims > 4)
        return fault_set(r->fault, -EBADMSG, "tensor %s has %llu dimensions; 1 to 4 are possible",
                         shown, (unsigned long long)n_dims);
    t->name.len = (size_t)len;
    t->n_dims = (uint32_t)n_dims;
    for (uint32_t i = 0; i < 4; i++)
        t->dims[i] = 1;
    for (uint32_t i = 0; i < n_dims; i++) {
        error = read_number(r, 8, "a tensor's dimension", &t->dims[i]);
        if (error)
            return error;
    }
    error = read_number(r, 4, "a tensor's type", &type);
    if (!error)
        error = read_number(r, 8, "a tensor's offset", &t->offset);
    if (error)
        return error;
    t->type = (enum gguf_type)type;
    return measure_tensor(t, shown, r->fault);
}

static int read_entries(struct header_reader *r, struct gguf *gguf, uint64_t n)
{
    if (n > GGUF_MAX_KEYS || n * MIN_KEY_BYTES > r->source->size - r->at)
        return fault_set(r->fault, -EBADMSG,
                         "the file claims %llu keys, more than it has room for (at most %u)",
                         (unsigned long long)n, GGUF_MAX_KEYS);
    gguf->entries = calloc(MAX(n, 1), sizeof(*gguf->entries));
    if (!gguf->entries)
        return fault_set(r->fault, -ENOMEM, "no memory for %llu keys", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        int error = read_entry(r, &gguf->entries[i]);
        if (error)
            return error;
        gguf->n_entries++;
    }
    return 0;
}

static int read_tensors(struct header_reader *r, struct gguf *gguf, uint64_t n)
{
    _cleanup_free_ uint32_t *names = NULL;

    if (n > GGUF_MAX_TENSORS || n * MIN_TENSOR_BYTES > r->source->size - r->at)
        return fault_set(r->fault, -EBADMSG,
                         "the file claims %llu tensors, more than it has room for (at most %u)",
                         (unsigned long long)n, GGUF_MAX_TENSORS);
    names = calloc(MAX(n, 1), sizeof(*names));
    gguf->tensors = calloc(MAX(n, 1), sizeof(*gguf->tensors));
    gguf->by_name = calloc(MAX(n, 1), sizeof(*gguf->by_name));
    if (!names || !gguf->tensors || !gguf->by_name)
        return fault_set(r->fault, -ENOMEM, "no memory for %llu tensors", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        int error = read_tensor(r, &gguf->tensors[i], &names[i]);
        if (error)
            return error;
    }
    gguf->n_tensors = (uint32_t)n;
    for (uint64_t i = 0; i < n; i++) {
        gguf->tensors[i].name.bytes = (const char *)r->bytes + names[i];
        gguf->by_name[i] = &gguf->tensors[i];
    }
    return 0;
}

static int read_magic(struct header_reader *r, uint64_t *ret_n_tensors, uint64_t *ret_n_keys)
{
    uint64_t version = 0;
    int error = reader_need(r, 4, "the magic number");

    if (error)
        return error;
    if (memcmp(r->bytes, "GGUF", 4) != 0)
        return fault_set(r->fault, -EBADMSG,
                         "the file does not begin with \"GGUF\": it is no model file");
    r->at = 4;
    error = read_number(r, 4, "the version", &version);
    if (error)
        return error;
    if (version >= 1u << 24)
        return fault_set(r->fault, -EBADMSG,
                         "the file is big-endian; only little-endian GGUF files are read");
    if (version != 2 && version != 3)
        return fault_set(r->fault, -EBADMSG,
                         "GGUF version %llu is not read here, only 2 and 3: convert the file again",
                         (unsigned long long)version);
    error = read_number(r, 8, "the number of tensors", ret_n_tensors);
    if (!error)
        error = read_number(r, 8, "the number of keys", ret_n_keys);
    return error;
}

/* ---- look-up ---- */

static const struct entry *find_entry(const struct gguf *gguf, const char *key)
{
    size_t len = strlen(key);
    uint32_t low = 0, high = gguf->n_entries;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct entry *entry = &gguf->entries[middle];
        int order = compare_bytes(key, len, gguf->header + entry->key_at, entry->key_len);
        if (order == 0)
            return entry;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

/* ---- checks over the whole header ---- */

static int compare_entries(const void *a, const void *b, void *header)
{
    const struct entry *x = a, *y = b;
    const uint8_t *bytes = header;

    return compare_bytes(bytes + x->key_at, x->key_len, bytes + y->key_at, y->key_len);
}

static int compare_names(const void *a, const void *b)
{
    const struct gguf_tensor *x = *(struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(struct gguf_tensor *const *)b;

    return compare_bytes(x->name.bytes, x->name.len, y->name.bytes, y->name.len);
}

static int compare_offsets(const void *a, const void *b)
{
    const struct gguf_tensor *x = *(struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(struct gguf_tensor *const *)b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* Sorts keys and names for look-up (sorted, not hashed: no choice of names makes it slow) and
 * refuses what occurs twice. */
static int sort_names(struct gguf *gguf, struct fault *ret_fault)
{
    char shown[SHOWN_BYTES];
    void *header = (void *)(uintptr_t)gguf->header; /* only read by the comparison */

    qsort_r(gguf->entries, gguf->n_entries, sizeof(*gguf->entries), compare_entries, header);
    for (uint32_t i = 1; i < gguf->n_entries; i++) {
        const struct entry *entry = &gguf->entries[i];
        if (compare_entries(entry - 1, entry, header) == 0)
            return fault_set(ret_fault, -EBADMSG, "key %s occurs twice",
                             show(shown, gguf->header + entry->key_at, entry->key_len));
    }
    qsort(gguf->by_name, gguf->n_tensors, sizeof(*gguf->by_name), compare_names);
    for (uint32_t i = 1; i < gguf->n_tensors; i++) {
        if (compare_names(&gguf->by_name[i - 1], &gguf->by_name[i]) == 0)
            return fault_set(ret_fault, -EBADMSG, "two tensors are called %s",
                             show(shown, gguf->by_name[i]->name.bytes, gguf->by_name[i]->name.len));
    }
    return 0;
}

static int find_alignment(const struct gguf *gguf, uint32_t *ret_alignment, struct fault *ret_fault)
{
    static const char key[] = "general.alignment";
    uint32_t alignment = DEFAULT_ALIGNMENT;
    int error = find_entry(gguf, key) ? gguf_get_u32(gguf, key, &alignment, ret_fault) : 0;

    if (error)
        return error;
    if (alignment == 0 || (alignment & (alignment - 1)) != 0)
        return fault_set(ret_fault, -EBADMSG, "%s is %u; it must be a power of two", key,
                         alignment);
    *ret_alignment = alignment;
    return 0;
}

/* Makes offsets absolute; each tensor must be aligned and inside the source. */
static int place_tensors(struct gguf *gguf, struct fault *ret_fault)
{
    char shown[SHOWN_BYTES];
    uint64_t size = gguf->source.size, data;
    uint32_t alignment = 0;
    int error = find_alignment(gguf, &alignment, ret_fault);

    if (error)
        return error;
    data = ((uint64_t)gguf->header_bytes + alignment - 1) & ~((uint64_t)alignment - 1);
    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        struct gguf_tensor *t = &gguf->tensors[i];

        if (t->offset % alignment != 0)
            return fault_set(ret_fault, -EBADMSG,
                             "tensor %s lies at offset %llu, no multiple of the alignment %u",
                             show(shown, t->name.bytes, t->name.len), (unsigned long long)t->offset,
                             alignment);
        if (data > size || t->offset > size - data || t->bytes > size - data - t->offset)
            return fault_set(
                ret_fault, -EBADMSG,
                "the data of tensor %s (%llu bytes at offset %llu) goes beyond the end "
                "of the file (%llu bytes): it is damaged or was not copied whole",
                show(shown, t->name.bytes, t->name.len), (unsigned long long)t->bytes,
                (unsigned long long)t->offset, (unsigned long long)size);
        t->offset += data;
    }
    return 0;
}

/* No byte belongs to two tensors; those of unknown size only need a beginning of their own. */
static int refuse_overlaps(const struct gguf *gguf, struct fault *ret_fault)
{
    char before_shown[SHOWN_BYTES], shown[SHOWN_BYTES];
    _cleanup_free_ const struct gguf_tensor **by_offset = NULL;

    by_offset = calloc(MAX(gguf->n_tensors, 1), sizeof(*by_offset));
    if (!by_offset)
        return fault_set(ret_fault, -ENOMEM, "no memory for %u tensors", gguf->n_tensors);
    for (uint32_t i = 0; i < gguf->n_tensors; i++)
        by_offset[i] = &gguf->tensors[i];
    qsort(by_offset, gguf->n_tensors, sizeof(*by_offset), compare_offsets);
    for (uint32_t i = 1; i < gguf->n_tensors; i++) {
        const struct gguf_tensor *before = by_offset[i - 1], *t = by_offset[i];
        if (t->offset < before->offset + MAX(before->bytes, (uint64_t)1))
            return fault_set(ret_fault, -EBADMSG, "tensors %s and %s overlap in the file",
                             show(before_shown, before->name.bytes, before->name.len),
                             show(shown, t->name.bytes, t->name.len));
    }
    return 0;
}

static int read_header(struct header_reader *r, struct gguf *gguf)
{
    uint64_t n_tensors = 0, n_keys = 0;
    int error = read_magic(r, &n_tensors, &n_keys);

    if (!error)
        error = read_entries(r, gguf, n_keys);
    if (!error)
        error = read_tensors(r, gguf, n_tensors);
    return error;
}

/* Takes the bytes over from the reader; what was read beyond the header is given back, and names
 * follow where the bytes went. */
static void adopt_header(struct gguf *gguf, struct header_reader *r)
{
    const char *old = (const char *)r->bytes;

    gguf->header_bytes = r->at;
    if (r->owned) {
        uint8_t *trimmed = realloc(r->owned, r->at);
        gguf->owned = trimmed ? trimmed : r->owned;
        r->owned = NULL;
        gguf->header = gguf->owned;
    } else {
        gguf->header = r->bytes;
    }
    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        struct gguf_string *name = &gguf->tensors[i].name;
        name->bytes = (const char *)gguf->header + (name->bytes - old);
    }
    gguf->hash = hash_bytes(gguf->header, gguf->header_bytes);
}

DEFINE_CLEANUP(struct gguf *, gguf_free)

int gguf_open(const struct gguf_source *source, struct gguf **ret_gguf, struct fault *ret_fault)
{
    _cleanup_(gguf_freep) struct gguf *gguf = calloc(1, sizeof(*gguf));
    struct header_reader r = {.source = source, .fault = ret_fault};
    int error;

    if (!gguf)
        return fault_set(ret_fault, -ENOMEM, "no memory for a model's header");
    gguf->source = *source;
    if (source->fd < 0) {
        r.bytes = source->memory;
        r.have = (size_t)MIN(source->size, (uint64_t)GGUF_MAX_HEADER_BYTES);
    }
    error = read_header(&r, gguf);
    if (error) {
        free(r.owned);
        return error;
    }
    adopt_header(gguf, &r);
    error = sort_names(gguf, ret_fault);
    if (!error)
        error = place_tensors(gguf, ret_fault);
    if (!error)
        error = refuse_overlaps(gguf, ret_fault);
    if (error)
        return error;
    *ret_gguf = TAKE_PTR(gguf);
    return 0;
}

struct gguf *gguf_free(struct gguf *gguf)
{
    if (!gguf)
        return NULL;
    for (uint32_t i = 0; i < gguf->n_entries; i++)
        free(gguf->entries[i].strings);
    free(gguf->entries);
    free(gguf->tensors);
    free(gguf->by_name);
    free(gguf->owned);
    free(gguf);
    return NULL;
}

/* ---- keys ---- */

static int fault_absent(const char *key, struct fault *ret_fault)
{
    return fault_set(ret_fault, -ENOENT, "key %s is missing", key);
}

static int fault_type(const char *key, const struct entry *entry, const char *wanted,
                      struct fault *ret_fault)
{
    bool array = entry->type == VALUE_ARRAY;

    return fault_set(ret_fault, -EBADMSG, "key %s is of type %s%s, expected %s", key,
                     array ? "array of " : "",
                     value_types[array ? entry->element : entry->type].name, wanted);
}

/* An integer of any width as a signed one; false where `type` is none or it does not fit. */
static bool load_integer(const uint8_t *from, enum value_type type, int64_t *ret)
{
    uint64_t raw = value_types[type].bytes ? load_le(from, value_types[type].bytes) : 0;

    switch (type) {
    case VALUE_U8:
    case VALUE_U16:
    case VALUE_U32: *ret = (int64_t)raw; return true;
    case VALUE_U64: *ret = (int64_t)raw; return raw <= INT64_MAX;
    case VALUE_I8: *ret = (int8_t)raw; return true;
    case VALUE_I16: *ret = (int16_t)raw; return true;
    case VALUE_I32: *ret = (int32_t)raw; return true;
    case VALUE_I64: *ret = (int64_t)raw; return true;
    default: return false;
    }
}

static bool is_integer(enum value_type type)
{
    return type <= VALUE_I32 || type == VALUE_U64 || type == VALUE_I64;
}

int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *ret, struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);
    int64_t value;

    if (!entry)
        return fault_absent(key, ret_fault);
    if (!is_integer(entry->type))
        return fault_type(key, entry, "an integer", ret_fault);
    if (!load_integer(gguf->header + entry->value_at, entry->type, &value) || value < 0 ||
        value > UINT32_MAX)
        return fault_set(ret_fault, -EBADMSG, "the value of key %s is not in 0..%u", key,
                         UINT32_MAX);
    *ret = (uint32_t)value;
    return 0;
}

int gguf_get_f32(const struct gguf *gguf, const char *key, float *ret, struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);
    float value;

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_F32 && entry->type != VALUE_F64)
        return fault_type(key, entry, "f32", ret_fault);
    if (entry->type == VALUE_F32)
        value = load_f32(gguf->header + entry->value_at);
    else
        value = (float)load_f64(gguf->header + entry->value_at);
    if (!isfinite(value))
        return fault_set(ret_fault, -EBADMSG, "the value of key %s is not a finite number", key);
    *ret = value;
    return 0;
}

int gguf_get_bool(const struct gguf *gguf, const char *key, bool *ret, struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_BOOL)
        return fault_type(key, entry, "bool", ret_fault);
    if (gguf->header[entry->value_at] > 1)
        return fault_set(ret_fault, -EBADMSG, "the value of key %s is %u; a bool is 0 or 1", key,
                         gguf->header[entry->value_at]);
    *ret = gguf->header[entry->value_at] == 1;
    return 0;
}

int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *ret,
                    struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_STRING)
        return fault_type(key, entry, "string", ret_fault);
    *ret = (struct gguf_string){(const char *)gguf->header + entry->value_at, (size_t)entry->n};
    return 0;
}

int gguf_get_array(const struct gguf *gguf, const char *key, uint64_t *ret_n,
                   struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_ARRAY)
        return fault_type(key, entry, "an array", ret_fault);
    *ret_n = entry->n;
    return 0;
}

static struct gguf_string string_at(const struct gguf *gguf, const struct entry *entry, uint64_t i)
{
    const uint8_t *at = gguf->header + entry->strings[i];

    return (struct gguf_string){(const char *)at + 8, (size_t)load_le(at, 8)};
}

int gguf_array_string(const struct gguf *gguf, const char *key, uint64_t index,
                      struct gguf_string *ret)
{
    const struct entry *entry = find_entry(gguf, key);

    if (!entry)
        return -ENOENT;
    if (entry->type != VALUE_ARRAY || entry->element != VALUE_STRING)
        return -EBADMSG;
    if (index >= entry->n)
        return -ERANGE;
    *ret = string_at(gguf, entry, index);
    return 0;
}

int gguf_get_strings(const struct gguf *gguf, const char *key, struct gguf_string **ret,
                     uint64_t *ret_n, struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);
    struct gguf_string *strings;

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_ARRAY || entry->element != VALUE_STRING)
        return fault_type(key, entry, "array of string", ret_fault);
    strings = calloc(MAX(entry->n, 1), sizeof(*strings));
    if (!strings)
        return fault_set(ret_fault, -ENOMEM, "no memory for the strings of key %s", key);
    for (uint64_t i = 0; i < entry->n; i++)
        strings[i] = string_at(gguf, entry, i);
    *ret = strings;
    *ret_n = entry->n;
    return 0;
}

int gguf_get_f32s(const struct gguf *gguf, const char *key, float **ret, uint64_t *ret_n,
                  struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);
    _cleanup_free_ float *values = NULL;

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_ARRAY || (entry->element != VALUE_F32 && entry->element != VALUE_F64))
        return fault_type(key, entry, "array of f32", ret_fault);
    values = calloc(MAX(entry->n, 1), sizeof(*values));
    if (!values)
        return fault_set(ret_fault, -ENOMEM, "no memory for the numbers of key %s", key);
    for (uint64_t i = 0; i < entry->n; i++) {
        const uint8_t *at = gguf->header + entry->value_at + i * value_types[entry->element].bytes;
        values[i] = entry->element == VALUE_F32 ? load_f32(at) : (float)load_f64(at);
        if (isnan(values[i]))
            return fault_set(ret_fault, -EBADMSG, "element %llu of key %s is not a number",
                             (unsigned long long)i, key);
    }
    *ret = TAKE_PTR(values);
    *ret_n = entry->n;
    return 0;
}

int gguf_get_i32s(const struct gguf *gguf, const char *key, int32_t **ret, uint64_t *ret_n,
                  struct fault *ret_fault)
{
    const struct entry *entry = find_entry(gguf, key);
    _cleanup_free_ int32_t *values = NULL;

    if (!entry)
        return fault_absent(key, ret_fault);
    if (entry->type != VALUE_ARRAY || !is_integer(entry->element))
        return fault_type(key, entry, "array of i32", ret_fault);
    values = calloc(MAX(entry->n, 1), sizeof(*values));
    if (!values)
        return fault_set(ret_fault, -ENOMEM, "no memory for the numbers of key %s", key);
    for (uint64_t i = 0; i < entry->n; i++) {
        const uint8_t *at = gguf->header + entry->value_at + i * value_types[entry->element].bytes;
        int64_t value;
        if (!load_integer(at, entry->element, &value) || value < INT32_MIN || value > INT32_MAX)
            return fault_set(ret_fault, -EBADMSG, "element %llu of key %s does not fit 32 bits",
                             (unsigned long long)i, key);
        values[i] = (int32_t)value;
    }
    *ret = TAKE_PTR(values);
    *ret_n = entry->n;
    return 0;
}

/* ---- tensors ---- */

uint64_t gguf_n_tensors(const struct gguf *gguf)
{
    return gguf->n_tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, uint64_t index)
{
    return index < gguf->n_tensors ? &gguf->tensors[index] : NULL;
}

const struct gguf_tensor *gguf_find(const struct gguf *gguf, const char *name)
{
    size_t len = strlen(name);
    uint32_t low = 0, high = gguf->n_tensors;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct gguf_tensor *t = gguf->by_name[middle];
        int order = compare_bytes(name, len, t->name.bytes, t->name.len);
        if (order == 0)
            return t;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

int gguf_read(const struct gguf *gguf, const struct gguf_tensor *tensor, uint64_t offset, void *to,
              size_t len, struct fault *ret_fault)
{
    char shown[SHOWN_BYTES];
    int error;

    show(shown, tensor->name.bytes, tensor->name.len);
    if (offset > tensor->bytes || len > tensor->bytes - offset)
        return fault_set(ret_fault, -EINVAL,
                         "tensor %s has %llu bytes; %zu from %llu on are wanted", shown,
                         (unsigned long long)tensor->bytes, len, (unsigned long long)offset);
    if (gguf->source.fd < 0) {
        memcpy(to, gguf->source.memory + tensor->offset + offset, len);
        return 0;
    }
    error = read_at(gguf->source.fd, to, len, tensor->offset + offset);
    if (error == -ENODATA)
        return fault_set(ret_fault, -ENODATA,
                         "the file ends inside tensor %s: it became shorter while it was read",
                         shown);
    if (error)
        return fault_set(ret_fault, -EIO, "tensor %s cannot be read: %s", shown, strerror(-error));
    return 0;
}

uint64_t gguf_row_bytes(enum gguf_type type, uint64_t cols)
{
    uint64_t bytes;

    if ((unsigned)type >= ELEMENTSOF(tensor_types) || tensor_types[type].block_bytes == 0 ||
        cols % tensor_types[type].block != 0)
        return 0;
    if (__builtin_mul_overflow(cols / tensor_types[type].block,
                               (uint64_t)tensor_types[type].block_bytes, &bytes))
        return 0;
    return bytes;
}

const char *gguf_type_name(enum gguf_type type)
{
    return (unsigned)type < ELEMENTSOF(tensor_types) ? tensor_types[type].name : NULL;
}

uint64_t gguf_header_hash(const struct gguf *gguf)
{
    return gguf->hash;
}
