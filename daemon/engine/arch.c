#include "daemon/engine/arch.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

static const struct arch *const archs[] = {&arch_llama};

const struct arch *arch_find(struct gguf_string name)
{
    for (size_t i = 0; i < ELEMENTSOF(archs); i++)
        if (strlen(archs[i]->name) == name.len && memcmp(archs[i]->name, name.bytes, name.len) == 0)
            return archs[i];
    return NULL;
}

const char *arch_names(void)
{
    return "llama";
}

/* One key of the architecture: "<arch>.<suffix>". */
struct key {
    char text[96];
};

static struct key key_of(const char *arch, const char *suffix)
{
    struct key key;

    snprintf(key.text, sizeof(key.text), "%s.%s", arch, suffix);
    return key;
}

/* A count, within 1..max; `fallback` where the key is absent, 0: it must be there. A file may give
 * one a layer: they must then all be the same. */
static int read_count(const struct gguf *gguf, const char *arch, const char *suffix, uint32_t max,
                      uint32_t fallback, uint32_t *ret, struct fault *ret_fault)
{
    struct key key = key_of(arch, suffix);
    _cleanup_free_ int32_t *counts = NULL;
    uint64_t n = 0;
    uint32_t value = 0;
    int r;

    if (gguf_get_array(gguf, key.text, &n, NULL) == 0) {
        r = gguf_get_i32s(gguf, key.text, &counts, &n, ret_fault);
        if (r < 0)
            return r;
        for (uint64_t i = 0; i < n; i++)
            if (counts[i] != counts[0])
                return fault_set(ret_fault, -ENOTSUP,
                                 "%s differs between layers, which this version does not support",
                                 key.text);
        value = n > 0 && counts[0] > 0 ? (uint32_t)counts[0] : 0;
    } else {
        r = gguf_get_u32(gguf, key.text, &value, ret_fault);
        if (r == -ENOENT && fallback > 0)
            value = fallback;
        else if (r == -ENOENT)
            return fault_set(ret_fault, -EBADMSG, "the model lacks the key %s", key.text);
        else if (r < 0)
            return r;
    }
    if (value == 0 || value > max)
        return fault_set(ret_fault, -EBADMSG, "%s is %u; it must be within 1 and %u", key.text,
                         value, max);
    *ret = value;
    return 0;
}

/* A finite float above 0; `fallback` where the key is absent, 0: it must be there. */
static int read_positive(const struct gguf *gguf, const char *arch, const char *suffix,
                         float fallback, float *ret, struct fault *ret_fault)
{
    struct key key = key_of(arch, suffix);
    float value = fallback;
    int r = gguf_get_f32(gguf, key.text, &value, ret_fault);

    if (r == -ENOENT && !(fallback > 0))
        return fault_set(ret_fault, -EBADMSG, "the model lacks the key %s", key.text);
    if (r < 0 && r != -ENOENT)
        return r;
    if (!(value > 0) || !isfinite(value))
        return fault_set(ret_fault, -EBADMSG, "%s is %g; it must be above 0", key.text,
                         (double)value);
    *ret = value;
    return 0;
}

/* Scaling of positions: none, linear, or (by a tensor, so nothing here) llama3. */
static int read_rope_scaling(const struct gguf *gguf, const char *arch, struct hparams *hparams,
                             struct fault *ret_fault)
{
    struct key key = key_of(arch, "rope.scaling.type");
    struct gguf_string type = {.bytes = "none", .len = 4};
    float factor;
    int r;

    hparams->rope_position_scale = 1;
    r = gguf_get_string(gguf, key.text, &type, ret_fault);
    if (r < 0 && r != -ENOENT)
        return r;
    if (r == -ENOENT) { /* the older form */
        r = read_positive(gguf, arch, "rope.scale_linear", 1, &factor, ret_fault);
        if (r == 0)
            hparams->rope_position_scale = 1 / factor;
        return r;
    }
    if (type.len == 4 && memcmp(type.bytes, "none", 4) == 0)
        return 0;
    if (type.len == 6 && memcmp(type.bytes, "linear", 6) == 0) {
        r = read_positive(gguf, arch, "rope.scaling.factor", 1, &factor, ret_fault);
        if (r == 0)
            hparams->rope_position_scale = 1 / factor;
        return r;
    }
    return fault_set(ret_fault, -ENOTSUP,
                     "%s is \"%.*s\"; this version knows none, linear and the factors of "
                     "rope_freqs.weight",
                     key.text, (int)MIN(type.len, 32u), type.bytes);
}

/* Shapes of the heads: what the file gives and what follows from it. */
static int read_heads(const struct gguf *gguf, const char *arch, struct hparams *hparams,
                      struct fault *ret_fault)
{
    uint32_t value_length;
    int r;

    r = read_count(gguf, arch, "attention.head_count", ARCH_MAX_HEADS, 0, &hparams->n_heads,
                   ret_fault);
    if (r < 0)
        return r;
    r = read_count(gguf, arch, "attention.head_count_kv", ARCH_MAX_HEADS, hparams->n_heads,
                   &hparams->n_kv_heads, ret_fault);
    if (r < 0)
        return r;
    if (hparams->n_heads % hparams->n_kv_heads != 0)
        return fault_set(ret_fault, -EBADMSG,
                         "%u attention heads cannot share %u heads of keys and values",
                         hparams->n_heads, hparams->n_kv_heads);
    r = read_count(gguf, arch, "attention.key_length", ARCH_MAX_WIDTH,
                   MAX(hparams->n_embd / hparams->n_heads, 1u), &hparams->head_dim, ret_fault);
    if (r < 0)
        return r;
    if (gguf_get_u32(gguf, key_of(arch, "attention.key_length").text, &value_length, NULL) < 0 &&
        hparams->n_embd % hparams->n_heads != 0)
        return fault_set(ret_fault, -EBADMSG, "%u dimensions do not divide into %u attention heads",
                         hparams->n_embd, hparams->n_heads);
    r = read_count(gguf, arch, "attention.value_length", ARCH_MAX_WIDTH, hparams->head_dim,
                   &value_length, ret_fault);
    if (r < 0)
        return r;
    if (value_length != hparams->head_dim)
        return fault_set(ret_fault, -ENOTSUP,
                         "keys of %u and values of %u dimensions: this version wants them equal",
                         hparams->head_dim, value_length);
    if ((uint64_t)hparams->n_heads * hparams->head_dim > ARCH_MAX_WIDTH)
        return fault_set(ret_fault, -EBADMSG, "%u heads of %u dimensions are beyond any model",
                         hparams->n_heads, hparams->head_dim);
    hparams->attention_scale = (float)(1.0 / sqrt(hparams->head_dim));
    return 0;
}

static int read_rope(const struct gguf *gguf, const char *arch, struct hparams *hparams,
                     struct fault *ret_fault)
{
    int r;

    r = read_count(gguf, arch, "rope.dimension_count", ARCH_MAX_WIDTH, hparams->head_dim,
                   &hparams->n_rot, ret_fault);
    if (r < 0)
        return r;
    if (hparams->n_rot > hparams->head_dim || hparams->n_rot % 2 != 0)
        return fault_set(ret_fault, -EBADMSG,
                         "%s.rope.dimension_count is %u; it must be even and at most %u, the size "
                         "of a head",
                         arch, hparams->n_rot, hparams->head_dim);
    r = read_positive(gguf, arch, "rope.freq_base", 10000, &hparams->rope_base, ret_fault);
    if (r < 0)
        return r;
    return read_rope_scaling(gguf, arch, hparams, ret_fault);
}

int arch_read_decoder(const struct gguf *gguf, const char *arch, struct hparams *hparams,
                      struct fault *ret_fault)
{
    int r;

    r = read_count(gguf, arch, "embedding_length", ARCH_MAX_WIDTH, 0, &hparams->n_embd, ret_fault);
    if (r < 0)
        return r;
    r = read_count(gguf, arch, "block_count", ARCH_MAX_LAYERS, 0, &hparams->n_layers, ret_fault);
    if (r < 0)
        return r;
    r = read_count(gguf, arch, "feed_forward_length", ARCH_MAX_WIDTH, 0, &hparams->n_ff, ret_fault);
    if (r < 0)
        return r;
    r = read_count(gguf, arch, "context_length", ARCH_MAX_CONTEXT, 0, &hparams->context_tokens,
                   ret_fault);
    if (r < 0)
        return r;
    r = read_positive(gguf, arch, "attention.layer_norm_rms_epsilon", 0, &hparams->norm_eps,
                      ret_fault);
    if (r < 0)
        return r;
    r = read_heads(gguf, arch, hparams, ret_fault);
    if (r < 0)
        return r;
    return read_rope(gguf, arch, hparams, ret_fault);
}
