/* libFuzzer on the GGUF reader: any bytes are opened, and what opens is looked at all over.
 * `meson setup build-fuzz -Dfuzz=true` with CC=clang, then
 * `build-fuzz/tests/fuzz_gguf -max_total_time=60 -rss_limit_mb=512 CORPUS SEEDS`, where CORPUS is a
 * folder of its own and SEEDS one with small GGUF files. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/gguf.h"
#include "lib/cleanup.h"

/* Keys of the seeds, so that look-ups hit. */
static const char *const keys[] = {
    "general.name",
    "general.alignment",
    "llama.block_count",
    "llama.rope.freq_base",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.add_bos_token",
};

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

/* Whatever the file says, a sentence fits its buffer and a success comes with a value. */
static void look_up(const struct gguf *gguf, const char *key)
{
    _cleanup_free_ struct gguf_string *strings = NULL;
    _cleanup_free_ float *floats = NULL;
    _cleanup_free_ int32_t *numbers = NULL;
    struct gguf_string string;
    struct fault fault;
    volatile unsigned char touched;
    uint32_t number;
    uint64_t n = 0;
    float real;
    bool truth;

    gguf_get_u32(gguf, key, &number, &fault);
    gguf_get_f32(gguf, key, &real, &fault);
    gguf_get_bool(gguf, key, &truth, &fault);
    gguf_get_array(gguf, key, &n, &fault);
    if (gguf_get_string(gguf, key, &string, &fault) == 0 && string.len > 0)
        touched = (unsigned char)string.bytes[string.len - 1];
    gguf_get_f32s(gguf, key, &floats, &n, &fault);
    gguf_get_i32s(gguf, key, &numbers, &n, &fault);
    if (gguf_get_strings(gguf, key, &strings, &n, &fault) == 0 && n > 0) {
        if (gguf_array_string(gguf, key, n - 1, &string) != 0 || string.len != strings[n - 1].len)
            abort();
        if (string.len > 0)
            touched = (unsigned char)string.bytes[string.len - 1];
    }
    (void)touched;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
    struct gguf_source source = {.fd = -1, .memory = bytes, .size = len};
    struct fault fault;
    struct gguf *gguf = NULL;
    uint64_t end = 0;

    if (gguf_open(&source, &gguf, &fault) < 0)
        return 0;
    for (size_t i = 0; i < ELEMENTSOF(keys); i++)
        look_up(gguf, keys[i]);
    for (uint64_t i = 0; i < gguf_n_tensors(gguf); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(gguf, i);
        uint8_t last;
        if (t->offset > len || t->bytes > len - t->offset)
            abort();
        if (t->bytes > 0 && gguf_read(gguf, t, t->bytes - 1, &last, 1, &fault) < 0)
            abort();
        end = MAX(end, t->offset + t->bytes);
    }
    if (end > len)
        abort();
    gguf_free(gguf);
    return 0;
}
