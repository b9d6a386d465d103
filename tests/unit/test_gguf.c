/* The GGUF reader: what it gives back, what it refuses, and what hostile files may cost. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench/gguf_writer.h"
#include "daemon/engine/gguf.h"
#include "lib/cleanup.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/gguf_make.h"

#define FLIPPED_FILES 20000u
#define MEMORY_SLACK  (32u << 20)

/* ---- a slow, interrupted, failing disk: stands in for pread of the whole program ---- */

static struct {
    size_t most;      /* bytes a call gives; 0: as many as wanted */
    unsigned every;   /* each so many-th call is interrupted; 0: none */
    int fail_at_call; /* this call (from 1) fails with EIO; 0: none */
    unsigned calls;
} disk;

ssize_t pread(int fd, void *to, size_t len, off_t offset)
{
    disk.calls++;
    if (disk.every && disk.calls % disk.every == 0) {
        errno = EINTR;
        return -1;
    }
    if (disk.fail_at_call && disk.calls == (unsigned)disk.fail_at_call) {
        errno = EIO;
        return -1;
    }
    if (disk.most && len > disk.most)
        len = disk.most;
    return syscall(SYS_pread64, fd, to, len, offset);
}

/* ---- builders ---- */

static struct byte_buffer begin(uint32_t version, uint64_t n_tensors, uint64_t n_keys)
{
    struct byte_buffer b = {0};

    byte_buffer_put(&b, "GGUF", 4);
    byte_buffer_number(&b, version, 4);
    byte_buffer_number(&b, n_tensors, 8);
    byte_buffer_number(&b, n_keys, 8);
    return b;
}

static void key(struct byte_buffer *b, const char *name, uint32_t type)
{
    byte_buffer_string(b, name, strlen(name));
    byte_buffer_number(b, type, 4);
}

static void key_u32(struct byte_buffer *b, const char *name, uint32_t value)
{
    key(b, name, 4);
    byte_buffer_number(b, value, 4);
}

static void tensor(struct byte_buffer *b, const char *name, uint32_t n_dims, const uint64_t *dims,
                   uint32_t type, uint64_t offset)
{
    byte_buffer_string(b, name, strlen(name));
    byte_buffer_number(b, n_dims, 4);
    for (uint32_t i = 0; i < n_dims; i++)
        byte_buffer_number(b, dims[i], 8);
    byte_buffer_number(b, type, 4);
    byte_buffer_number(b, offset, 8);
}

/* An F32 vector of 8 elements: 32 bytes. */
static void vector(struct byte_buffer *b, const char *name, uint64_t offset)
{
    tensor(b, name, 1, (uint64_t[]){8}, GGUF_F32, offset);
}

/* Pads to the data and adds `bytes` of them, counting up. */
static void data(struct byte_buffer *b, size_t bytes)
{
    byte_buffer_zeros(b, gguf_writer_padding(b->len));
    for (size_t i = 0; i < bytes; i++)
        byte_buffer_number(b, i, 1);
}

/* Opens exactly `len` bytes (a copy without slack, so that a sanitizer sees a byte too many). */
static int open_exact(const void *bytes, size_t len, uint8_t **ret_copy, struct gguf **ret_gguf,
                      struct fault *ret_fault)
{
    uint8_t *copy = malloc(len ? len : 1);
    struct gguf_source source;

    cr_assert_not_null(copy);
    if (len > 0)
        memcpy(copy, bytes, len);
    source = memory_source(copy, len);
    *ret_copy = copy;
    return gguf_open(&source, ret_gguf, ret_fault);
}

static void assert_printable(const char *text)
{
    for (; *text; text++)
        cr_assert(*text >= ' ' && *text < 0x7f, "a sentence holds the byte %d", *text);
}

/* The file is refused with a sentence that contains `needle`; frees the buffer. */
static void expect_refused(struct byte_buffer *b, const char *needle)
{
    struct gguf *gguf = NULL;
    struct fault fault = {""};
    uint8_t *copy;
    int error = open_exact(b->bytes, b->len, &copy, &gguf, &fault);

    cr_expect_eq(error, -EBADMSG, "%s: %d", needle, error);
    cr_expect_null(gguf);
    cr_expect_not_null(strstr(fault.text, needle), "no \"%s\" in: %s", needle, fault.text);
    assert_printable(fault.text);
    gguf_free(gguf);
    free(copy);
    byte_buffer_done(b);
}

/* A source over a buffer that must open; the buffer has to outlive it. */
static struct gguf *must_open(const struct byte_buffer *b)
{
    struct gguf_source source = memory_source(b->bytes, b->len);
    struct gguf *gguf = NULL;
    struct fault fault = {""};

    cr_assert_eq(gguf_open(&source, &gguf, &fault), 0, "%s", fault.text);
    return gguf;
}

static int memory_file(const void *bytes, size_t len)
{
    int fd = memfd_create("gguf", MFD_CLOEXEC);

    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, bytes, len), (ssize_t)len);
    return fd;
}

static void tiny_model(uint8_t **ret_bytes, size_t *ret_len)
{
    struct model_plan plan = tiny_model_plan();
    struct fault fault = {""};

    cr_assert_eq(make_model_bytes(&plan, ret_bytes, ret_len, &fault), 0, "%s", fault.text);
}

/* Touches everything an open file offers. */
static uint64_t walk(const struct gguf *gguf)
{
    static const char *const keys[] = {"general.name",        "tokenizer.ggml.tokens",
                                       "general.alignment",   "tokenizer.ggml.scores",
                                       "llama.vocab_size",    "tokenizer.ggml.token_type",
                                       "llama.rope.freq_base"};
    uint64_t sum = gguf_header_hash(gguf);

    for (size_t i = 0; i < ELEMENTSOF(keys); i++) {
        _cleanup_free_ struct gguf_string *strings = NULL;
        _cleanup_free_ float *floats = NULL;
        _cleanup_free_ int32_t *numbers = NULL;
        struct gguf_string string;
        struct fault fault;
        uint64_t n = 0;

        if (gguf_get_string(gguf, keys[i], &string, &fault) == 0 && string.len > 0)
            sum += (unsigned char)string.bytes[string.len - 1];
        if (gguf_get_strings(gguf, keys[i], &strings, &n, &fault) == 0) {
            for (uint64_t j = 0; j < n; j++)
                sum += strings[j].len ? (unsigned char)strings[j].bytes[strings[j].len - 1] : 0;
        }
        gguf_get_f32s(gguf, keys[i], &floats, &n, &fault);
        gguf_get_i32s(gguf, keys[i], &numbers, &n, &fault);
    }
    for (uint64_t i = 0; i < gguf_n_tensors(gguf); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(gguf, i);
        uint8_t last = 0;
        if (t->bytes > 0)
            cr_assert_eq(gguf_read(gguf, t, t->bytes - 1, &last, 1, NULL), 0);
        sum += last;
    }
    return sum;
}

/* ---- keys ---- */

Test(gguf, reads_every_type_of_value)
{
    struct byte_buffer b = begin(3, 0, 12);
    struct gguf_string string;
    struct gguf *gguf;
    uint32_t number;
    float real;
    bool truth;
    static const struct {
        const char *name;
        uint32_t type, bytes;
    } integers[] = {{"u8", 0, 1},  {"i8", 1, 1},  {"u16", 2, 2},  {"i16", 3, 2},
                    {"u32", 4, 4}, {"i32", 5, 4}, {"u64", 10, 8}, {"i64", 11, 8}};

    for (size_t i = 0; i < ELEMENTSOF(integers); i++) {
        key(&b, integers[i].name, integers[i].type);
        byte_buffer_number(&b, 100 + i, integers[i].bytes);
    }
    key(&b, "f32", 6);
    byte_buffer_number(&b, 0x3fc00000, 4);
    key(&b, "f64", 12);
    byte_buffer_number(&b, 0x4004000000000000, 8);
    key(&b, "bool", 7);
    byte_buffer_number(&b, 1, 1);
    key(&b, "string", 8);
    byte_buffer_string(&b, "warm", 4);
    gguf = must_open(&b);
    for (size_t i = 0; i < ELEMENTSOF(integers); i++) {
        cr_assert_eq(gguf_get_u32(gguf, integers[i].name, &number, NULL), 0);
        cr_expect_eq(number, 100 + i);
    }
    cr_assert_eq(gguf_get_f32(gguf, "f32", &real, NULL), 0);
    cr_expect_eq(real, 1.5f);
    cr_assert_eq(gguf_get_f32(gguf, "f64", &real, NULL), 0);
    cr_expect_eq(real, 2.5f);
    cr_assert_eq(gguf_get_bool(gguf, "bool", &truth, NULL), 0);
    cr_expect(truth);
    cr_assert_eq(gguf_get_string(gguf, "string", &string, NULL), 0);
    cr_expect(string.len == 4 && memcmp(string.bytes, "warm", 4) == 0);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, reads_version_2_as_version_3)
{
    for (uint32_t version = 2; version <= 3; version++) {
        struct byte_buffer b = begin(version, 1, 1);
        struct gguf *gguf;
        uint32_t number = 0;
        key_u32(&b, "answer", 42);
        vector(&b, "v", 0);
        data(&b, 32);
        gguf = must_open(&b);
        cr_expect_eq(gguf_get_u32(gguf, "answer", &number, NULL), 0);
        cr_expect_eq(number, 42u);
        cr_expect_not_null(gguf_find(gguf, "v"));
        gguf_free(gguf);
        byte_buffer_done(&b);
    }
}

Test(gguf, refuses_other_versions_and_other_files)
{
    static const struct {
        uint32_t version;
        const char *needle;
    } cases[] = {{0, "version 0"}, {1, "version 1"}, {4, "version 4"}, {3u << 24, "big-endian"}};
    struct byte_buffer b;

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        b = begin(cases[i].version, 0, 0);
        expect_refused(&b, cases[i].needle);
    }
    b = begin(3, 0, 0);
    memcpy(b.bytes, "GGML", 4);
    expect_refused(&b, "GGUF");
    b = (struct byte_buffer){0};
    byte_buffer_zeros(&b, 0);
    expect_refused(&b, "beyond the end");
}

Test(gguf, refuses_integers_out_of_range)
{
    struct byte_buffer b = begin(3, 0, 3);
    struct fault fault = {""};
    struct gguf *gguf;
    uint32_t number = 7;

    key(&b, "negative", 5);
    byte_buffer_number(&b, (uint32_t)-1, 4);
    key(&b, "wide", 10);
    byte_buffer_number(&b, UINT64_MAX, 8);
    key(&b, "just_over", 11);
    byte_buffer_number(&b, 1ull << 32, 8);
    gguf = must_open(&b);
    cr_expect_eq(gguf_get_u32(gguf, "negative", &number, &fault), -EBADMSG);
    cr_expect_not_null(strstr(fault.text, "negative"));
    cr_expect_eq(gguf_get_u32(gguf, "wide", &number, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_u32(gguf, "just_over", &number, &fault), -EBADMSG);
    cr_expect_eq(number, 7u, "an out-parameter was written on failure");
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, a_missing_key_is_told_from_one_of_another_type)
{
    struct byte_buffer b = begin(3, 0, 2);
    struct fault fault = {""};
    struct gguf *gguf;
    struct gguf_string string, *strings;
    int32_t *numbers;
    float *floats;
    uint32_t number;
    uint64_t n;
    bool truth;
    float real;

    key(&b, "llama.embedding_length", 8);
    byte_buffer_string(&b, "16", 2);
    key_u32(&b, "count", 3);
    gguf = must_open(&b);
    cr_expect_eq(gguf_get_u32(gguf, "llama.block_count", &number, &fault), -ENOENT);
    cr_expect_not_null(strstr(fault.text, "llama.block_count"));
    cr_expect_eq(gguf_get_u32(gguf, "llama.embedding_length", &number, &fault), -EBADMSG);
    cr_expect_not_null(strstr(fault.text, "llama.embedding_length is of type string"));
    cr_expect_eq(gguf_get_f32(gguf, "count", &real, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_bool(gguf, "count", &truth, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_string(gguf, "count", &string, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_array(gguf, "count", &n, &fault), -EBADMSG);
    cr_expect_eq(gguf_array_string(gguf, "count", 0, &string), -EBADMSG);
    cr_expect_eq(gguf_array_string(gguf, "absent", 0, &string), -ENOENT);
    cr_expect_eq(gguf_get_f32(gguf, "absent", &real, NULL), -ENOENT);
    cr_expect_eq(gguf_get_bool(gguf, "absent", &truth, NULL), -ENOENT);
    cr_expect_eq(gguf_get_string(gguf, "absent", &string, NULL), -ENOENT);
    cr_expect_eq(gguf_get_array(gguf, "absent", &n, NULL), -ENOENT);
    cr_expect_eq(gguf_get_strings(gguf, "absent", &strings, &n, NULL), -ENOENT);
    cr_expect_eq(gguf_get_f32s(gguf, "absent", &floats, &n, NULL), -ENOENT);
    cr_expect_eq(gguf_get_i32s(gguf, "absent", &numbers, &n, NULL), -ENOENT);
    cr_expect_eq(gguf_get_strings(gguf, "count", &strings, &n, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_f32s(gguf, "count", &floats, &n, &fault), -EBADMSG);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, floats_are_finite_and_bools_are_0_or_1)
{
    struct byte_buffer b = begin(3, 0, 4);
    struct gguf *gguf;
    struct fault fault;
    _cleanup_free_ float *floats = NULL;
    float real;
    bool truth;
    uint64_t n;

    key(&b, "nan", 6);
    byte_buffer_number(&b, 0x7fc00000, 4);
    key(&b, "too_large", 12);
    byte_buffer_number(&b, 0x7fe0000000000000, 8);
    key(&b, "neither", 7);
    byte_buffer_number(&b, 2, 1);
    key(&b, "scores", 9);
    byte_buffer_number(&b, 6, 4);
    byte_buffer_number(&b, 1, 8);
    byte_buffer_number(&b, 0x7fc00000, 4);
    gguf = must_open(&b);
    cr_expect_eq(gguf_get_f32(gguf, "nan", &real, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_f32(gguf, "too_large", &real, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_bool(gguf, "neither", &truth, &fault), -EBADMSG);
    cr_expect_eq(gguf_get_f32s(gguf, "scores", &floats, &n, &fault), -EBADMSG);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, arrays_come_whole_and_by_index)
{
    static const char *const words[] = {"", "ember", "ash"};
    struct gguf_writer *w;
    struct byte_buffer b = {0};
    _cleanup_free_ struct gguf_string *strings = NULL;
    _cleanup_free_ float *floats = NULL;
    _cleanup_free_ int32_t *numbers = NULL, *none = NULL;
    struct gguf_string string;
    struct gguf *gguf;
    uint64_t n = 0;

    cr_assert_eq(gguf_writer_new(3, &w), 0);
    gguf_put_strings(w, "words", words, 3);
    gguf_put_f32s(w, "floats", (float[]){0.5f, -INFINITY}, 2);
    gguf_put_i32s(w, "numbers", (int32_t[]){INT32_MIN, 0, INT32_MAX}, 3);
    gguf_put_i32s(w, "none", NULL, 0);
    cr_assert_eq(gguf_writer_finish(w, &b.bytes, &b.len), 0);
    gguf_writer_free(w);
    gguf = must_open(&b);
    cr_assert_eq(gguf_get_strings(gguf, "words", &strings, &n, NULL), 0);
    cr_assert_eq(n, 3u);
    for (uint64_t i = 0; i < n; i++) {
        cr_assert_eq(gguf_array_string(gguf, "words", i, &string), 0);
        cr_expect(string.bytes == strings[i].bytes && string.len == strings[i].len);
        cr_expect(string.len == strlen(words[i]) && !memcmp(string.bytes, words[i], string.len));
    }
    cr_expect_eq(gguf_array_string(gguf, "words", 3, &string), -ERANGE);
    cr_assert_eq(gguf_get_f32s(gguf, "floats", &floats, &n, NULL), 0);
    cr_expect(n == 2 && floats[0] == 0.5f && floats[1] == -INFINITY);
    cr_assert_eq(gguf_get_i32s(gguf, "numbers", &numbers, &n, NULL), 0);
    cr_expect(n == 3 && numbers[0] == INT32_MIN && numbers[2] == INT32_MAX);
    cr_assert_eq(gguf_get_i32s(gguf, "none", &none, &n, NULL), 0);
    cr_expect(n == 0 && none != NULL);
    cr_assert_eq(gguf_get_array(gguf, "words", &n, NULL), 0);
    cr_expect_eq(n, 3u);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, arrays_of_any_integers_are_read_where_they_fit)
{
    struct byte_buffer b = begin(3, 0, 3);
    _cleanup_free_ int32_t *numbers = NULL, *wide = NULL;
    struct fault fault = {""};
    struct gguf *gguf;
    uint64_t n;

    key(&b, "bytes", 9);
    byte_buffer_number(&b, 1, 4);
    byte_buffer_number(&b, 2, 8);
    byte_buffer_number(&b, 0x80, 1);
    byte_buffer_number(&b, 0x7f, 1);
    key(&b, "wide", 9);
    byte_buffer_number(&b, 10, 4);
    byte_buffer_number(&b, 2, 8);
    byte_buffer_number(&b, 1, 8);
    byte_buffer_number(&b, 1ull << 31, 8);
    key_u32(&b, "scalar", 1);
    gguf = must_open(&b);
    cr_assert_eq(gguf_get_i32s(gguf, "bytes", &numbers, &n, &fault), 0);
    cr_expect(n == 2 && numbers[0] == -128 && numbers[1] == 127);
    cr_expect_eq(gguf_get_i32s(gguf, "wide", &wide, &n, &fault), -EBADMSG);
    cr_expect_not_null(strstr(fault.text, "element 1 of key wide"));
    cr_expect_eq(gguf_get_i32s(gguf, "scalar", &wide, &n, &fault), -EBADMSG);
    cr_expect_null(wide);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, keeps_strings_as_bytes_and_shows_them_cleaned)
{
    struct byte_buffer b = begin(3, 0, 1);
    struct gguf_string string;
    struct gguf *gguf;

    key(&b, "general.name", 8);
    byte_buffer_string(&b, "a\0\xff\x1b[31m", 8);
    gguf = must_open(&b);
    cr_assert_eq(gguf_get_string(gguf, "general.name", &string, NULL), 0);
    cr_expect(string.len == 8 && memcmp(string.bytes, "a\0\xff\x1b[31m", 8) == 0);
    gguf_free(gguf);
    byte_buffer_done(&b);
    b = begin(3, 0, 1);
    key(&b, "\x1b[2Jkey\xff", 200);
    byte_buffer_number(&b, 0, 4);
    expect_refused(&b, "key ?[2Jkey?: its value has the unknown type 200");
}

Test(gguf, refuses_a_key_that_occurs_twice)
{
    struct byte_buffer b = begin(3, 0, 3);

    key_u32(&b, "same", 1);
    key_u32(&b, "other", 1);
    key_u32(&b, "same", 1);
    expect_refused(&b, "key same occurs twice");
    b = begin(3, 0, 1);
    key_u32(&b, "", 1);
    byte_buffer_zeros(&b, 8);
    expect_refused(&b, "empty");
}

/* ---- tensors ---- */

Test(gguf, tensors_have_sizes_and_places)
{
    static const struct {
        const char *name;
        enum gguf_type type;
        uint32_t n_dims;
        uint64_t dims[4], bytes;
    } cases[] = {
        {"f32", GGUF_F32, 1, {5, 1, 1, 1}, 20},      {"f16", GGUF_F16, 2, {3, 7, 1, 1}, 42},
        {"bf16", GGUF_BF16, 3, {3, 7, 2, 1}, 84},    {"q8_0", GGUF_Q8_0, 2, {64, 3, 1, 1}, 204},
        {"q4_0", GGUF_Q4_0, 2, {32, 2, 1, 1}, 36},   {"q4_k", GGUF_Q4_K, 2, {512, 2, 1, 1}, 576},
        {"q5_k", GGUF_Q5_K, 1, {256, 1, 1, 1}, 176}, {"q6_k", GGUF_Q6_K, 4, {256, 1, 2, 3}, 1260},
    };
    struct byte_buffer b = {0};
    struct gguf_writer *w;
    struct gguf *gguf;
    uint64_t before = 0;

    cr_assert_eq(gguf_writer_new(3, &w), 0);
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        gguf_put_tensor(w, cases[i].name, cases[i].type, cases[i].dims, cases[i].n_dims);
    cr_assert_eq(gguf_writer_finish(w, &b.bytes, &b.len), 0);
    b.room = b.len;
    byte_buffer_zeros(&b, gguf_writer_data_bytes(w));
    gguf_writer_free(w);
    gguf = must_open(&b);
    cr_assert_eq(gguf_n_tensors(gguf), ELEMENTSOF(cases));
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        const struct gguf_tensor *t = gguf_find(gguf, cases[i].name);
        cr_assert_not_null(t);
        cr_expect_eq(t, gguf_tensor_at(gguf, i));
        cr_expect(t->type == cases[i].type && t->n_dims == cases[i].n_dims);
        cr_expect_eq(memcmp(t->dims, cases[i].dims, sizeof(t->dims)), 0);
        cr_expect_eq(t->bytes, cases[i].bytes);
        cr_expect(t->offset % 32 == 0 && t->offset >= before);
        before = t->offset + t->bytes;
    }
    cr_expect_null(gguf_find(gguf, "q4"));
    cr_expect_null(gguf_tensor_at(gguf, ELEMENTSOF(cases)));
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, row_bytes_and_names_of_types)
{
    cr_expect_eq(gguf_row_bytes(GGUF_F32, 3), 12u);
    cr_expect_eq(gguf_row_bytes(GGUF_Q8_0, 33), 0u, "33 is no multiple of the block");
    cr_expect_eq(gguf_row_bytes(GGUF_Q6_K, 1024), 840u);
    cr_expect_eq(gguf_row_bytes(GGUF_F32, UINT64_MAX), 0u, "the product overflows");
    cr_expect_eq(gguf_row_bytes((enum gguf_type)250, 256), 0u);
    cr_expect_eq(gguf_row_bytes((enum gguf_type)6, 32), 0u, "Q5_0 is not read here");
    cr_expect_str_eq(gguf_type_name(GGUF_Q4_K), "Q4_K");
    cr_expect_str_eq(gguf_type_name((enum gguf_type)6), "Q5_0");
    cr_expect_null(gguf_type_name((enum gguf_type)250));
    cr_expect_null(gguf_type_name((enum gguf_type)4), "a number that was given up");
    cr_expect_null(gguf_type_name((enum gguf_type) - 1));
}

Test(gguf, keeps_the_number_of_an_unknown_type)
{
    struct byte_buffer b = begin(3, 2, 0);
    struct gguf *gguf;
    const struct gguf_tensor *t;
    uint8_t byte;

    tensor(&b, "odd", 2, (uint64_t[]){16, 16}, 250, 0);
    vector(&b, "plain", 1024);
    data(&b, 1024 + 32);
    gguf = must_open(&b);
    t = gguf_find(gguf, "odd");
    cr_assert_not_null(t);
    cr_expect(t->type == 250 && t->bytes == 0);
    cr_expect_eq(gguf_read(gguf, t, 0, &byte, 1, NULL), -EINVAL);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, refuses_impossible_tensors)
{
    static const struct {
        const char *needle;
        uint32_t n_dims;
        uint64_t dims[5];
        uint32_t type;
        uint64_t offset;
    } cases[] = {
        {"5 dimensions", 5, {16, 16, 1, 1, 1}, GGUF_F32, 0},
        {"0 dimensions", 0, {0}, GGUF_F32, 0},
        {"4294967295 dimensions", UINT32_MAX, {1}, GGUF_F32, 0},
        {"dimension of 0", 2, {16, 0}, GGUF_F32, 0},
        {"dimension of 0", 2, {0, 16}, 250, 0},
        {"too large", 3, {1ull << 32, 1ull << 32, 16}, GGUF_F32, 0},
        {"too large", 1, {1ull << 63}, 250, 0},
        {"too large", 2, {1ull << 31, 1ull << 31}, GGUF_F32, 0},
        {"beyond the end", 2, {1ull << 30, 1ull << 30}, GGUF_F32, 0},
        {"no multiple of the 32", 2, {31, 2}, GGUF_Q8_0, 0},
        {"no multiple of the 256", 1, {128}, GGUF_Q4_K, 0},
        {"no multiple of the alignment", 1, {8}, GGUF_F32, 4},
        {"beyond the end", 1, {8}, GGUF_F32, 1u << 30},
        {"beyond the end", 1, {8}, GGUF_F32, UINT64_MAX - 31},
        {"beyond the end", 1, {24}, GGUF_F32, 32},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct byte_buffer b = begin(3, 1, 0);
        tensor(&b, "t", MIN(cases[i].n_dims, 5u), cases[i].dims, cases[i].type, cases[i].offset);
        memcpy(b.bytes + 24 + 9, &cases[i].n_dims, 4);
        data(&b, 64);
        expect_refused(&b, cases[i].needle);
    }
}

Test(gguf, refuses_tensors_that_share_bytes_or_a_name)
{
    struct byte_buffer b = begin(3, 2, 0);
    struct gguf *gguf;

    tensor(&b, "wide", 1, (uint64_t[]){16}, GGUF_F32, 0);
    vector(&b, "inside", 32);
    data(&b, 64);
    expect_refused(&b, "tensors wide and inside overlap");
    b = begin(3, 2, 0);
    vector(&b, "twice", 0);
    vector(&b, "twice", 32);
    data(&b, 64);
    expect_refused(&b, "two tensors are called twice");
    /* Any order and gaps between them are fine. */
    b = begin(3, 2, 0);
    vector(&b, "second", 96);
    vector(&b, "first", 0);
    data(&b, 128);
    gguf = must_open(&b);
    cr_expect_gt(gguf_find(gguf, "second")->offset, gguf_find(gguf, "first")->offset);
    gguf_free(gguf);
    byte_buffer_done(&b);
}

Test(gguf, alignment_is_a_power_of_two)
{
    static const struct {
        uint32_t alignment;
        bool valid;
    } cases[] = {{0, false}, {3, false}, {24, false}, {UINT32_MAX, false}, {1, true}, {64, true}};

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct byte_buffer b = begin(3, 1, 1);
        key_u32(&b, "general.alignment", cases[i].alignment);
        vector(&b, "v", 0);
        if (!cases[i].valid) {
            data(&b, 32);
            expect_refused(&b, "power of two");
            continue;
        }
        while (b.len % cases[i].alignment)
            byte_buffer_zeros(&b, 1);
        byte_buffer_zeros(&b, 32);
        struct gguf *gguf = must_open(&b);
        cr_expect_eq(gguf_find(gguf, "v")->offset, b.len - 32);
        gguf_free(gguf);
        byte_buffer_done(&b);
    }
    struct byte_buffer b = begin(3, 0, 1);
    key(&b, "general.alignment", 8);
    byte_buffer_string(&b, "32", 2);
    expect_refused(&b, "general.alignment is of type string");
}

/* ---- data ---- */

Test(gguf, reads_the_same_from_memory_and_from_a_file)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source sources[2];
    struct gguf *gguf[2] = {NULL, NULL};
    uint8_t got[2][64];
    size_t len;

    tiny_model(&bytes, &len);
    fd = memory_file(bytes, len);
    sources[0] = memory_source(bytes, len);
    sources[1] = (struct gguf_source){.fd = fd, .size = len};
    for (int i = 0; i < 2; i++) {
        const struct gguf_tensor *t;
        cr_assert_eq(gguf_open(&sources[i], &gguf[i], NULL), 0);
        t = gguf_find(gguf[i], "blk.1.ffn_down.weight");
        cr_assert_not_null(t);
        cr_assert_eq(gguf_read(gguf[i], t, 100, got[i], sizeof(got[i]), NULL), 0);
        cr_expect_eq(memcmp(got[i], bytes + t->offset + 100, sizeof(got[i])), 0);
        cr_expect_eq(gguf_read(gguf[i], t, t->bytes - 63, got[i], 64, NULL), -EINVAL);
        cr_expect_eq(gguf_read(gguf[i], t, UINT64_MAX, got[i], 64, NULL), -EINVAL);
        cr_expect_eq(gguf_read(gguf[i], t, t->bytes, got[i], 0, NULL), 0);
    }
    cr_expect_eq(walk(gguf[0]), walk(gguf[1]));
    gguf_free(gguf[0]);
    gguf_free(gguf[1]);
}

Test(gguf, a_file_that_shrinks_is_an_error)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source source;
    struct gguf *gguf = NULL, *again = NULL;
    struct fault fault = {""};
    const struct gguf_tensor *t;
    uint8_t got[64];
    size_t len;

    tiny_model(&bytes, &len);
    fd = memory_file(bytes, len);
    source = (struct gguf_source){.fd = fd, .size = len};
    cr_assert_eq(gguf_open(&source, &gguf, NULL), 0);
    cr_assert_eq(ftruncate(fd, 1000), 0);
    t = gguf_find(gguf, "output.weight");
    cr_assert_not_null(t);
    cr_expect_eq(gguf_read(gguf, t, 0, got, sizeof(got), &fault), -ENODATA);
    cr_expect_not_null(strstr(fault.text, "output.weight"));
    cr_expect_eq(gguf_open(&source, &again, &fault), -EBADMSG, "the size is no longer true");
    cr_expect_null(again);
    gguf_free(gguf);
}

Test(gguf, interrupted_and_short_reads_go_on)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source memory, file;
    struct gguf *whole = NULL, *pieces = NULL;
    size_t len;

    tiny_model(&bytes, &len);
    fd = memory_file(bytes, len);
    memory = memory_source(bytes, len);
    file = (struct gguf_source){.fd = fd, .size = len};
    cr_assert_eq(gguf_open(&memory, &whole, NULL), 0);
    disk.most = 1000;
    disk.every = 3;
    cr_assert_eq(gguf_open(&file, &pieces, NULL), 0);
    if (disk.calls == 0)
        cr_skip_test("pread cannot be stood in for in this build");
    cr_expect_eq(walk(whole), walk(pieces));
    gguf_free(whole);
    gguf_free(pieces);
}

Test(gguf, an_io_error_is_told_from_a_bad_file)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source file;
    struct gguf *gguf = NULL;
    struct fault fault = {""};
    uint8_t got[8];
    size_t len;

    tiny_model(&bytes, &len);
    fd = memory_file(bytes, len);
    file = (struct gguf_source){.fd = fd, .size = len};
    disk.fail_at_call = 1;
    cr_expect_eq(gguf_open(&file, &gguf, &fault), disk.calls ? -EIO : 0);
    if (disk.calls == 0)
        cr_skip_test("pread cannot be stood in for in this build");
    cr_expect_null(gguf);
    disk.fail_at_call = 0;
    cr_assert_eq(gguf_open(&file, &gguf, &fault), 0);
    disk.fail_at_call = (int)disk.calls + 1;
    cr_expect_eq(gguf_read(gguf, gguf_tensor_at(gguf, 0), 0, got, 8, &fault), -EIO);
    cr_expect_not_null(strstr(fault.text, "token_embd.weight cannot be read"));
    gguf_free(gguf);
}

Test(gguf, a_large_vocabulary_is_read_in_few_pieces)
{
    struct model_plan plan = tiny_model_plan();
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source memory, file;
    struct gguf *a = NULL, *b = NULL;
    size_t len;

    plan.vocab = 200000;
    plan.dim = 4;
    plan.heads = plan.kv_heads = 2;
    cr_assert_eq(make_model_bytes(&plan, &bytes, &len, NULL), 0);
    fd = memory_file(bytes, len);
    memory = memory_source(bytes, len);
    file = (struct gguf_source){.fd = fd, .size = len};
    cr_assert_eq(gguf_open(&memory, &a, NULL), 0);
    disk.calls = 0;
    cr_assert_eq(gguf_open(&file, &b, NULL), 0);
    cr_expect_leq(disk.calls, 12u, "%u reads", disk.calls);
    cr_expect_eq(walk(a), walk(b));
    gguf_free(a);
    gguf_free(b);
}

Test(gguf, the_hash_is_of_the_header_alone)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    struct gguf *gguf = NULL;
    struct gguf_source source;
    uint64_t hash;
    size_t len;

    tiny_model(&bytes, &len);
    source = memory_source(bytes, len);
    cr_assert_eq(gguf_open(&source, &gguf, NULL), 0);
    hash = gguf_header_hash(gguf);
    gguf_free(gguf);
    bytes[len - 1] ^= 1;
    cr_assert_eq(gguf_open(&source, &gguf, NULL), 0);
    cr_expect_eq(gguf_header_hash(gguf), hash);
    gguf_free(gguf);
    *(uint8_t *)memmem(bytes, len, "made-llama", 10) ^= 1;
    cr_assert_eq(gguf_open(&source, &gguf, NULL), 0);
    cr_expect_neq(gguf_header_hash(gguf), hash);
    gguf_free(gguf);
}

/* ---- hostile files ---- */

/* Headers whose counts and lengths are lies. */
static void hostile_claims(void)
{
    struct byte_buffer b;

    b = begin(3, 0, 1ull << 60);
    expect_refused(&b, "claims 1152921504606846976 keys");
    b = begin(3, 0, GGUF_MAX_KEYS);
    expect_refused(&b, "more than it has room for");
    b = begin(3, UINT64_MAX, 0);
    expect_refused(&b, "claims 18446744073709551615 tensors");
    b = begin(3, GGUF_MAX_TENSORS, 0);
    expect_refused(&b, "more than it has room for");
    b = begin(3, 0, 1);
    byte_buffer_number(&b, 1ull << 62, 8);
    byte_buffer_zeros(&b, 64);
    expect_refused(&b, "claims 4611686018427387904 bytes");
    b = begin(3, 0, 1);
    key(&b, "general.name", 8);
    byte_buffer_number(&b, GGUF_MAX_STRING_BYTES, 8);
    expect_refused(&b, "key general.name: a string at byte");
    b = begin(3, 0, 1);
    key(&b, "general.name", 8);
    byte_buffer_number(&b, UINT64_MAX - 7, 8);
    expect_refused(&b, "at most");
    for (uint32_t element = 0; element <= 13; element++) {
        static const uint64_t counts[] = {1ull << 61, UINT64_MAX, GGUF_MAX_ARRAY_ELEMENTS, 100};
        for (size_t i = 0; i < ELEMENTSOF(counts); i++) {
            b = begin(3, 0, 1);
            key(&b, "list", 9);
            byte_buffer_number(&b, element, 4);
            byte_buffer_number(&b, counts[i], 8);
            byte_buffer_zeros(&b, 32);
            expect_refused(&b, "key list: ");
        }
    }
}

Test(gguf, refuses_hostile_counts_and_lengths)
{
    hostile_claims();
}

Test(gguf, refuses_arrays_of_arrays)
{
    struct byte_buffer b = begin(3, 0, 1);

    key(&b, "scores", 9);
    byte_buffer_number(&b, 9, 4);
    byte_buffer_number(&b, 1, 8);
    byte_buffer_zeros(&b, 64);
    expect_refused(&b, "arrays of arrays");
}

static uint64_t address_space_bytes(void)
{
    unsigned long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "re");

    cr_assert_not_null(statm);
    cr_assert_eq(fscanf(statm, "%lu", &pages), 1);
    fclose(statm);
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Sanitizers and valgrind need the address space for themselves. */
static bool address_space_can_be_limited(void)
{
    const char *preload = getenv("LD_PRELOAD");

#if defined(__SANITIZE_ADDRESS__)
    return false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer)
    return false;
#endif
#endif
    return !preload || !strstr(preload, "vgpreload");
}

/* Were memory taken for what a header claims, these would fail for want of it instead. */
Test(gguf, hostile_claims_cost_no_memory)
{
    struct rlimit limit = {address_space_bytes() + MEMORY_SLACK, RLIM_INFINITY};

    if (!address_space_can_be_limited())
        cr_skip_test("the address space cannot be limited in this build");
    cr_assert_eq(setrlimit(RLIMIT_AS, &limit), 0);
    hostile_claims();
}

/* A file of a terabyte, nearly all of it a hole: only GGUF_MAX_HEADER_BYTES of it are looked at. */
Test(gguf, the_header_is_bounded)
{
    static const uint64_t array_bytes = GGUF_MAX_ARRAY_ELEMENTS * 8ull;
    _cleanup_close_ int fd = memfd_create("hole", MFD_CLOEXEC);
    struct gguf_source source = {.fd = fd, .size = 1ull << 40};
    struct gguf *gguf = NULL;
    struct fault fault = {""};
    off_t at = 0;

    cr_assert_geq(fd, 0);
    cr_assert_eq(ftruncate(fd, (off_t)source.size), 0);
    for (int i = 0; i < 3; i++) {
        struct byte_buffer b = i == 0 ? begin(3, 0, 3) : (struct byte_buffer){0};
        key(&b, (const char *[]){"a", "b", "c"}[i], 9);
        byte_buffer_number(&b, 10, 4);
        byte_buffer_number(&b, GGUF_MAX_ARRAY_ELEMENTS, 8);
        cr_assert_eq(pwrite(fd, b.bytes, b.len, at), (ssize_t)b.len);
        at += (off_t)(b.len + array_bytes);
        byte_buffer_done(&b);
    }
    cr_expect_eq(gguf_open(&source, &gguf, &fault), -EBADMSG);
    cr_expect_not_null(strstr(fault.text, "header is larger"), "%s", fault.text);
    cr_expect_null(gguf);
}

Test(gguf, a_file_cut_anywhere_is_refused)
{
    struct byte_buffer b = begin(3, 2, 4);
    size_t whole;

    key(&b, "general.name", 8);
    byte_buffer_string(&b, "cut", 3);
    key_u32(&b, "llama.vocab_size", 2);
    key(&b, "tokenizer.ggml.tokens", 9);
    byte_buffer_number(&b, 8, 4);
    byte_buffer_number(&b, 2, 8);
    byte_buffer_string(&b, "a", 1);
    byte_buffer_string(&b, "b", 1);
    key(&b, "tokenizer.ggml.scores", 9);
    byte_buffer_number(&b, 6, 4);
    byte_buffer_number(&b, 2, 8);
    byte_buffer_zeros(&b, 8);
    vector(&b, "one", 0);
    vector(&b, "two", 32);
    data(&b, 64);
    whole = b.len;
    for (size_t len = 0; len <= whole; len++) {
        struct gguf *gguf = NULL;
        struct fault fault = {""};
        uint8_t *copy;
        int error = open_exact(b.bytes, len, &copy, &gguf, &fault);
        cr_assert_eq(error, len < whole ? -EBADMSG : 0, "%zu of %zu bytes: %d", len, whole, error);
        cr_assert(error == 0 || fault.text[0] != '\0');
        if (gguf)
            walk(gguf);
        gguf_free(gguf);
        free(copy);
    }
    byte_buffer_done(&b);
}

/* Seeded, so that a failure repeats. */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

Test(gguf, flipped_bytes_never_crash, .timeout = 60)
{
    struct model_plan plan = tiny_model_plan();
    _cleanup_free_ uint8_t *bytes = NULL, *broken = NULL;
    uint64_t state = 20261124, opened = 0, refused = 0;
    struct gguf_source source;
    size_t len, header;

    plan.dim = 4;
    plan.heads = plan.kv_heads = 2;
    plan.ff = 4;
    plan.layers = 1;
    plan.vocab = 260;
    cr_assert_eq(make_model_bytes(&plan, &bytes, &len, NULL), 0);
    broken = malloc(len);
    source = memory_source(broken, len);
    /* The data are zeros to the reader; flips go where it looks. */
    header = len - 260 * 4 * 2 * sizeof(float);
    for (uint32_t i = 0; i < FLIPPED_FILES; i++) {
        uint32_t flips = 1 + (uint32_t)(next_random(&state) % 4);
        struct gguf *gguf = NULL;
        struct fault fault = {""};
        int error;

        memcpy(broken, bytes, len);
        for (uint32_t f = 0; f < flips; f++)
            broken[next_random(&state) % header] ^= (uint8_t)(1 + next_random(&state) % 255);
        error = gguf_open(&source, &gguf, &fault);
        cr_assert(error == 0 || error == -EBADMSG, "file %u: %d %s", i, error, fault.text);
        opened += error == 0;
        refused += error != 0;
        if (gguf)
            walk(gguf);
        gguf_free(gguf);
    }
    cr_expect(opened > 0 && refused > 0, "the flips tell nothing: %lu opened, %lu refused",
              (unsigned long)opened, (unsigned long)refused);
}

/* ---- no memory ---- */

Test(gguf, running_out_of_memory_is_told_wherever_it_happens)
{
    _cleanup_free_ uint8_t *bytes = NULL;
    _cleanup_close_ int fd = -1;
    struct gguf_source source;
    unsigned n = 0;
    size_t len;
    int error;

    tiny_model(&bytes, &len);
    fd = memory_file(bytes, len);
    source = (struct gguf_source){.fd = fd, .size = len};
    do {
        _cleanup_free_ struct gguf_string *strings = NULL;
        _cleanup_free_ float *floats = NULL;
        _cleanup_free_ int32_t *numbers = NULL;
        struct gguf *gguf = NULL;
        struct fault fault = {""};
        uint64_t elements;
        bool failed;
        alloc_fail_at(++n);
        error = gguf_open(&source, &gguf, &fault);
        if (!error)
            error = gguf_get_strings(gguf, "tokenizer.ggml.tokens", &strings, &elements, &fault);
        if (!error)
            error = gguf_get_f32s(gguf, "tokenizer.ggml.scores", &floats, &elements, &fault);
        if (!error)
            error = gguf_get_i32s(gguf, "tokenizer.ggml.token_type", &numbers, &elements, &fault);
        failed = alloc_fail_done();
        /* The one that gives unused memory back may fail without harm. */
        cr_assert(error == 0 || (error == -ENOMEM && failed), "allocation %u: %d", n, error);
        cr_assert(error == 0 || strstr(fault.text, "no memory"), "allocation %u: %s", n,
                  fault.text);
        gguf_free(gguf);
        cr_assert_lt(n, 100u);
        if (!failed)
            break;
    } while (true);
    cr_expect_eq(error, 0);
    cr_expect_gt(n, 10u, "only %u allocations were seen", n - 1);
}

/* ---- golden data ---- */

static const char *golden(char path[static PATH_MAX], const char *name)
{
    const char *folder = getenv("HEARTH_GOLDEN");

    snprintf(path, PATH_MAX, "%s/%s", folder ? folder : "../shared/golden", name);
    if (access(path, R_OK) < 0)
        cr_skip_test("golden data are missing: %s", path);
    return path;
}

/* Opens a file by descriptor; the descriptor stays open with the process. */
static int open_file(const char *path, struct gguf **ret_gguf, struct fault *ret_fault)
{
    struct gguf_source source = {.fd = open(path, O_RDONLY | O_CLOEXEC)};
    struct stat st;

    cr_assert(source.fd >= 0 && fstat(source.fd, &st) == 0, "%s", path);
    source.size = (uint64_t)st.st_size;
    return gguf_open(&source, ret_gguf, ret_fault);
}

/* Defects that only show when a model is made of the file: what shows them to the loader. */
static void expect_visible_defect(const char *file, const struct gguf *gguf)
{
    uint32_t number = 0, other = 0;
    uint64_t n = 0;

    if (strcmp(file, "missing-block-count.gguf") == 0) {
        cr_expect_eq(gguf_get_u32(gguf, "llama.block_count", &number, NULL), -ENOENT);
    } else if (strcmp(file, "embedding-length-is-string.gguf") == 0) {
        cr_expect_eq(gguf_get_u32(gguf, "llama.embedding_length", &number, NULL), -EBADMSG);
    } else if (strcmp(file, "tensor-type-250.gguf") == 0) {
        const struct gguf_tensor *t = gguf_find(gguf, "blk.0.attn_q.weight");
        cr_expect(t && t->type == 250 && t->bytes == 0 && !gguf_type_name(t->type));
    } else if (strcmp(file, "vocab-size-mismatch.gguf") == 0) {
        cr_expect_eq(gguf_get_array(gguf, "tokenizer.ggml.tokens", &n, NULL), 0);
        cr_expect_neq(gguf_find(gguf, "token_embd.weight")->dims[1], n);
    } else if (strcmp(file, "head-count-zero.gguf") == 0) {
        cr_expect_eq(gguf_get_u32(gguf, "llama.attention.head_count", &number, NULL), 0);
        cr_expect_eq(number, 0u);
    } else if (strcmp(file, "head-count-kv-above-head-count.gguf") == 0) {
        cr_expect_eq(gguf_get_u32(gguf, "llama.attention.head_count", &number, NULL), 0);
        cr_expect_eq(gguf_get_u32(gguf, "llama.attention.head_count_kv", &other, NULL), 0);
        cr_expect_gt(other, number);
    } else {
        cr_expect_fail("%s was opened", file);
    }
}

Test(gguf, golden_bad_files_meet_their_index)
{
    char path[PATH_MAX], name[NAME_MAX];
    json_t *index = json_load_file(golden(path, "bad/index.json"), 0, NULL), *entry;
    size_t i;

    cr_assert(json_is_array(index));
    cr_assert_geq(json_array_size(index), 26u);
    json_array_foreach(index, i, entry)
    {
        const char *file = json_string_value(json_object_get(entry, "file"));
        const char *expect = json_string_value(json_object_get(entry, "expect"));
        struct gguf *gguf = NULL;
        struct fault fault = {""};
        int error;

        snprintf(name, sizeof(name), "bad/%s", file);
        error = open_file(golden(path, name), &gguf, &fault);
        cr_expect(error == 0 || (error == -EBADMSG && fault.text[0]), "%s: %d", file, error);
        if (strcmp(expect, "load") == 0)
            cr_expect_eq(error, 0, "%s: %s", file, fault.text);
        else if (strcmp(expect, "reject") == 0 && error == 0)
            expect_visible_defect(file, gguf);
        if (gguf)
            walk(gguf);
        gguf_free(gguf);
    }
    json_decref(index);
}

Test(gguf, golden_models_open)
{
    static const struct {
        const char *file;
        uint64_t tensors, tokens;
    } cases[] = {
        {"models/stories260K-f32.gguf", 48, 512},   {"models/syn-llama-q4_k_m.gguf", 39, 3000},
        {"models/syn-qwen2-q8_0.gguf", 50, 3000},   {"models/syn-bert-q8_0.gguf", 69, 3000},
        {"models/tiny-random-f16.gguf", 12, 32000}, {"tokenizer/gpt-2.gguf", 0, 50257},
        {"tokenizer/llama-spm.gguf", 0, 32000},
    };
    char path[PATH_MAX];

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct gguf *gguf = NULL;
        struct fault fault = {""};
        uint64_t n = 0;
        int error = open_file(golden(path, cases[i].file), &gguf, &fault);
        cr_assert_eq(error, 0, "%s: %s", cases[i].file, fault.text);
        cr_expect_eq(gguf_n_tensors(gguf), cases[i].tensors, "%s", cases[i].file);
        cr_expect_eq(gguf_get_array(gguf, "tokenizer.ggml.tokens", &n, NULL), 0);
        cr_expect_eq(n, cases[i].tokens, "%s", cases[i].file);
        walk(gguf);
        gguf_free(gguf);
    }
}
