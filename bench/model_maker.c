#include "bench/model_maker.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "bench/quantise.h"
#include "bench/random.h"
#include "lib/cleanup.h"

/* Rows are gathered up to about this much before the sink sees them. */
#define PIECE_BYTES (1u << 20)
#define NAME_BYTES  64u

static const char *const arch_names[PLAN_N_ARCHS] = {
    [PLAN_LLAMA] = "llama",   [PLAN_QWEN2] = "qwen2", [PLAN_QWEN3] = "qwen3",
    [PLAN_GEMMA3] = "gemma3", [PLAN_BERT] = "bert",
};

/* `matrices` is the type of most matrices, `file_type` the format's number for the whole file. */
static const struct {
    const char *name;
    enum gguf_type matrices;
    uint32_t file_type;
} types[PLAN_N_TYPES] = {
    [PLAN_F32] = {"f32", GGUF_F32, 0},     [PLAN_F16] = {"f16", GGUF_F16, 1},
    [PLAN_BF16] = {"bf16", GGUF_BF16, 32}, [PLAN_Q8_0] = {"q8_0", GGUF_Q8_0, 7},
    [PLAN_Q4_0] = {"q4_0", GGUF_Q4_0, 2},  [PLAN_Q4_K] = {"q4_k", GGUF_Q4_K, 14},
    [PLAN_Q6_K] = {"q6_k", GGUF_Q6_K, 18}, [PLAN_Q4_K_M] = {"q4_k_m", GGUF_Q4_K, 15},
};

static const char *const vocabulary_names[] = {
    [VOCABULARY_LLAMA] = "llama",
    [VOCABULARY_GPT2] = "gpt2",
    [VOCABULARY_BERT] = "bert",
};

/* A tensor's extent, as the plan gives it. */
enum extent {
    NONE, /* one-dimensional */
    EMBD,
    VOCAB,
    FF,
    Q,    /* all heads */
    KV,   /* all KV heads */
    HEAD, /* one head */
    CONTEXT,
    SEGMENTS, /* bert's token types */
};

enum role {
    MATRIX,
    OUTPUT,   /* the widest matrix; a mix gives it more bits */
    DELICATE, /* v and down: a mix gives them more bits in half of the layers */
    TABLE,    /* two-dimensional, always F32 */
    NORM,
    BIAS,
};

#define ON(arch)   (1u << (arch))
#define DECODERS   (ON(PLAN_LLAMA) | ON(PLAN_QWEN2) | ON(PLAN_QWEN3) | ON(PLAN_GEMMA3))
#define HEAD_NORMS (ON(PLAN_QWEN3) | ON(PLAN_GEMMA3))
#define QKV_BIASES (ON(PLAN_QWEN2) | ON(PLAN_BERT))
#define EVERYWHERE (DECODERS | ON(PLAN_BERT))

struct tensor_kind {
    const char *name; /* in layers without "blk.N." */
    enum extent cols, rows;
    enum role role;
    unsigned archs;
};

static const struct tensor_kind model_tensors[] = {
    {"token_embd.weight", EMBD, VOCAB, MATRIX, EVERYWHERE},
    {"position_embd.weight", EMBD, CONTEXT, TABLE, ON(PLAN_BERT)},
    {"token_types.weight", EMBD, SEGMENTS, TABLE, ON(PLAN_BERT)},
    {"token_embd_norm.weight", EMBD, NONE, NORM, ON(PLAN_BERT)},
    {"token_embd_norm.bias", EMBD, NONE, BIAS, ON(PLAN_BERT)},
    {"output_norm.weight", EMBD, NONE, NORM, DECODERS},
    {"output.weight", EMBD, VOCAB, OUTPUT, DECODERS},
};

static const struct tensor_kind layer_tensors[] = {
    {"attn_norm.weight", EMBD, NONE, NORM, DECODERS},
    {"attn_q.weight", EMBD, Q, MATRIX, EVERYWHERE},
    {"attn_q.bias", Q, NONE, BIAS, QKV_BIASES},
    {"attn_q_norm.weight", HEAD, NONE, NORM, HEAD_NORMS},
    {"attn_k.weight", EMBD, KV, MATRIX, EVERYWHERE},
    {"attn_k.bias", KV, NONE, BIAS, QKV_BIASES},
    {"attn_k_norm.weight", HEAD, NONE, NORM, HEAD_NORMS},
    {"attn_v.weight", EMBD, KV, DELICATE, EVERYWHERE},
    {"attn_v.bias", KV, NONE, BIAS, QKV_BIASES},
    {"attn_output.weight", Q, EMBD, MATRIX, EVERYWHERE},
    {"attn_output.bias", EMBD, NONE, BIAS, ON(PLAN_BERT)},
    {"attn_output_norm.weight", EMBD, NONE, NORM, ON(PLAN_BERT)},
    {"attn_output_norm.bias", EMBD, NONE, BIAS, ON(PLAN_BERT)},
    {"post_attention_norm.weight", EMBD, NONE, NORM, ON(PLAN_GEMMA3)},
    {"ffn_norm.weight", EMBD, NONE, NORM, DECODERS},
    {"ffn_gate.weight", EMBD, FF, MATRIX, DECODERS},
    {"ffn_up.weight", EMBD, FF, MATRIX, EVERYWHERE},
    {"ffn_up.bias", FF, NONE, BIAS, ON(PLAN_BERT)},
    {"ffn_down.weight", FF, EMBD, DELICATE, EVERYWHERE},
    {"ffn_down.bias", EMBD, NONE, BIAS, ON(PLAN_BERT)},
    {"post_ffw_norm.weight", EMBD, NONE, NORM, ON(PLAN_GEMMA3)},
    {"layer_output_norm.weight", EMBD, NONE, NORM, ON(PLAN_BERT)},
    {"layer_output_norm.bias", EMBD, NONE, BIAS, ON(PLAN_BERT)},
};

/* One tensor to be made. */
struct made_tensor {
    char name[NAME_BYTES];
    enum role role;
    enum gguf_type type;
    uint64_t cols, rows;
    uint32_t n_dims;
};

/* ---- plans ---- */

struct model_plan model_plan_default(void)
{
    return (struct model_plan){
        .arch = PLAN_LLAMA,
        .type = PLAN_Q8_0,
        .vocabulary = VOCABULARY_LLAMA,
        .dim = 256,
        .layers = 4,
        .heads = 8,
        .kv_heads = 4,
        .ff = 512,
        .vocab = 3000,
        .context = 1024,
        .seed = 1,
    };
}

int plan_arch_from_name(const char *name, enum plan_arch *ret_arch)
{
    for (size_t i = 0; i < ELEMENTSOF(arch_names); i++) {
        if (strcasecmp(name, arch_names[i]) == 0) {
            *ret_arch = (enum plan_arch)i;
            return 0;
        }
    }
    return -EINVAL;
}

int plan_type_from_name(const char *name, enum plan_type *ret_type)
{
    for (size_t i = 0; i < ELEMENTSOF(types); i++) {
        if (strcasecmp(name, types[i].name) == 0) {
            *ret_type = (enum plan_type)i;
            return 0;
        }
    }
    return -EINVAL;
}

int plan_vocabulary_from_name(const char *name, enum vocabulary_kind *ret_kind)
{
    for (size_t i = 0; i < ELEMENTSOF(vocabulary_names); i++) {
        if (strcasecmp(name, vocabulary_names[i]) == 0) {
            *ret_kind = (enum vocabulary_kind)i;
            return 0;
        }
    }
    return -EINVAL;
}

static int check_bounds(const struct model_plan *plan, struct fault *ret_fault)
{
    const struct {
        const char *name;
        uint32_t value, least, most;
    } bounds[] = {
        {"dim", plan->dim, 2, 1u << 16},
        {"layers", plan->layers, 1, 1024},
        {"heads", plan->heads, 1, 1024},
        {"kv-heads", plan->kv_heads, 1, 1024},
        {"ff", plan->ff, 1, 1u << 20},
        {"vocab", plan->vocab, vocabulary_least(plan->vocabulary), VOCABULARY_MAX_TOKENS},
        {"context", plan->context, 1, 1u << 24},
    };

    for (size_t i = 0; i < ELEMENTSOF(bounds); i++) {
        if (bounds[i].value < bounds[i].least || bounds[i].value > bounds[i].most)
            return fault_set(ret_fault, -EINVAL, "%s is %u; it must be %u to %u", bounds[i].name,
                             bounds[i].value, bounds[i].least, bounds[i].most);
    }
    return 0;
}

int model_plan_check(const struct model_plan *plan, struct fault *ret_fault)
{
    int error = check_bounds(plan, ret_fault);

    if (error)
        return error;
    if (plan->dim % plan->heads != 0)
        return fault_set(ret_fault, -EINVAL, "%u heads do not divide a dim of %u", plan->heads,
                         plan->dim);
    if (plan->dim / plan->heads % 2 != 0)
        return fault_set(ret_fault, -EINVAL,
                         "a head of %u (dim %u / %u heads) is odd; positions turn pairs",
                         plan->dim / plan->heads, plan->dim, plan->heads);
    if (plan->heads % plan->kv_heads != 0)
        return fault_set(ret_fault, -EINVAL, "%u KV heads do not divide %u heads", plan->kv_heads,
                         plan->heads);
    if (plan->arch == PLAN_BERT && plan->kv_heads != plan->heads)
        return fault_set(ret_fault, -EINVAL, "bert has as many KV heads as heads (%u)",
                         plan->heads);
    if ((plan->arch == PLAN_BERT) != (plan->vocabulary == VOCABULARY_BERT))
        return fault_set(ret_fault, -EINVAL,
                         "the bert tokenizer and the bert architecture go together");
    return 0;
}

/* ---- tensors ---- */

static uint64_t extent_of(const struct model_plan *plan, enum extent extent)
{
    switch (extent) {
    case EMBD:
    case Q: return plan->dim;
    case VOCAB: return plan->vocab;
    case FF: return plan->ff;
    case KV: return (uint64_t)plan->dim / plan->heads * plan->kv_heads;
    case HEAD: return plan->dim / plan->heads;
    case CONTEXT: return plan->context;
    case SEGMENTS: return 2;
    default: return 1;
    }
}

static bool is_tied(const struct model_plan *plan)
{
    return plan->tied || plan->arch == PLAN_GEMMA3;
}

/* The layers in which a mix spends more on its delicate matrices: the first and last eighth and
 * every third one between. */
static bool is_favoured(uint32_t layer, uint32_t layers)
{
    return layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
}

static enum gguf_type type_of(const struct model_plan *plan, enum role role, bool embedding,
                              uint32_t layer, uint64_t cols)
{
    enum gguf_type type = types[plan->type].matrices;

    if (role == NORM || role == BIAS || role == TABLE)
        return GGUF_F32;
    if (plan->type == PLAN_Q4_K_M && (role == OUTPUT || (embedding && is_tied(plan)) ||
                                      (role == DELICATE && is_favoured(layer, plan->layers))))
        type = GGUF_Q6_K;
    if (gguf_row_bytes(type, cols) != 0)
        return type;
    return gguf_row_bytes(GGUF_Q8_0, cols) != 0 ? GGUF_Q8_0 : GGUF_F16;
}

static struct made_tensor make_tensor(const struct model_plan *plan, const struct tensor_kind *kind,
                                      uint32_t layer)
{
    struct made_tensor t = {
        .role = kind->role,
        .cols = extent_of(plan, kind->cols),
        .rows = extent_of(plan, kind->rows),
        .n_dims = kind->rows == NONE ? 1 : 2,
    };

    t.type = type_of(plan, kind->role, kind == &model_tensors[0], layer, t.cols);
    return t;
}

/* All tensors of the plan in the order of the file. Returns their number; `ret` may be NULL. */
static size_t list_tensors(const struct model_plan *plan, struct made_tensor *ret)
{
    size_t n = 0;

    for (size_t i = 0; i < ELEMENTSOF(model_tensors); i++) {
        const struct tensor_kind *kind = &model_tensors[i];
        if (!(kind->archs & ON(plan->arch)) || (kind->role == OUTPUT && is_tied(plan)))
            continue;
        if (ret) {
            ret[n] = make_tensor(plan, kind, 0);
            snprintf(ret[n].name, NAME_BYTES, "%s", kind->name);
        }
        n++;
    }
    for (uint32_t layer = 0; layer < plan->layers; layer++) {
        for (size_t i = 0; i < ELEMENTSOF(layer_tensors); i++) {
            const struct tensor_kind *kind = &layer_tensors[i];
            if (!(kind->archs & ON(plan->arch)))
                continue;
            if (ret) {
                ret[n] = make_tensor(plan, kind, layer);
                snprintf(ret[n].name, NAME_BYTES, "blk.%u.%s", layer, kind->name);
            }
            n++;
        }
    }
    return n;
}

/* ---- the header ---- */

/* A key below the architecture's name. */
static const char *arch_key(const struct model_plan *plan, char key[static NAME_BYTES],
                            const char *rest)
{
    snprintf(key, NAME_BYTES, "%s.%s", arch_names[plan->arch], rest);
    return key;
}

static void write_shape(const struct model_plan *plan, struct gguf_writer *w)
{
    char key[NAME_BYTES];

    gguf_put_u32(w, arch_key(plan, key, "vocab_size"), plan->vocab);
    gguf_put_u32(w, arch_key(plan, key, "context_length"), plan->context);
    gguf_put_u32(w, arch_key(plan, key, "embedding_length"), plan->dim);
    gguf_put_u32(w, arch_key(plan, key, "block_count"), plan->layers);
    gguf_put_u32(w, arch_key(plan, key, "feed_forward_length"), plan->ff);
    gguf_put_u32(w, arch_key(plan, key, "attention.head_count"), plan->heads);
    if (plan->arch == PLAN_BERT) {
        gguf_put_f32(w, arch_key(plan, key, "attention.layer_norm_epsilon"), 1e-12f);
        gguf_put_bool(w, arch_key(plan, key, "attention.causal"), false);
        gguf_put_u32(w, arch_key(plan, key, "pooling_type"), 1); /* the mean */
        return;
    }
    gguf_put_u32(w, arch_key(plan, key, "attention.head_count_kv"), plan->kv_heads);
    gguf_put_f32(w, arch_key(plan, key, "attention.layer_norm_rms_epsilon"), 1e-5f);
    gguf_put_u32(w, arch_key(plan, key, "attention.key_length"), plan->dim / plan->heads);
    gguf_put_u32(w, arch_key(plan, key, "attention.value_length"), plan->dim / plan->heads);
    gguf_put_f32(w, arch_key(plan, key, "rope.freq_base"),
                 plan->arch == PLAN_LLAMA ? 10000.0f : 1000000.0f);
    if (plan->arch == PLAN_LLAMA)
        gguf_put_u32(w, arch_key(plan, key, "rope.dimension_count"), plan->dim / plan->heads);
    if (plan->arch == PLAN_GEMMA3)
        gguf_put_u32(w, arch_key(plan, key, "attention.sliding_window"),
                     MAX(plan->context / 8, 1u));
}

static int write_header(const struct model_plan *plan, const struct made_tensor *tensors,
                        size_t n_tensors, uint8_t **ret_header, size_t *ret_bytes)
{
    struct gguf_writer *w;
    char name[NAME_BYTES];
    int error = gguf_writer_new(3, &w);

    if (error)
        return error;
    snprintf(name, sizeof(name), "made-%s", arch_names[plan->arch]);
    gguf_put_string(w, "general.architecture", arch_names[plan->arch]);
    gguf_put_string(w, "general.name", name);
    snprintf(name, sizeof(name), "random weights, seed %llu", (unsigned long long)plan->seed);
    gguf_put_string(w, "general.description", name);
    gguf_put_u32(w, "general.file_type", types[plan->type].file_type);
    gguf_put_u32(w, "general.quantization_version", 2);
    write_shape(plan, w);
    error = vocabulary_write(plan->vocabulary, plan->vocab, w);
    for (size_t i = 0; i < n_tensors; i++) {
        const uint64_t dims[2] = {tensors[i].cols, tensors[i].rows};
        gguf_put_tensor(w, tensors[i].name, tensors[i].type, dims, tensors[i].n_dims);
    }
    if (!error)
        error = gguf_writer_finish(w, ret_header, ret_bytes);
    gguf_writer_free(w);
    return error;
}

/* ---- the data ---- */

/* A row's own beginning: a row depends on seed, tensor and number alone. */
static uint64_t random_begin(uint64_t seed, const char *tensor, uint64_t row)
{
    uint64_t state = seed;

    for (const char *c = tensor; *c; c++)
        state = random_next(&state) ^ (unsigned char)*c;
    state = random_next(&state) ^ row;
    return random_next(&state);
}

/* Nearly normal numbers: the sum of four 16-bit ones, whose mean is 131,070 and whose standard
 * deviation is sqrt(4 * (65536^2 - 1) / 12) = 37,837. Integers up to the last product. */
static void random_row(uint64_t state, float mean, float deviation, float *ret, uint64_t n)
{
    const float unit = deviation / 37837.0f;

    for (uint64_t i = 0; i < n; i++) {
        uint64_t x = random_next(&state);
        int sum =
            (int)(x & 0xffff) + (int)(x >> 16 & 0xffff) + (int)(x >> 32 & 0xffff) + (int)(x >> 48);
        ret[i] = mean + (float)(sum - 131070) * unit;
    }
}

static void make_row(const struct model_plan *plan, const struct made_tensor *t, uint64_t row,
                     float *ret)
{
    uint64_t state = random_begin(plan->seed, t->name, row);

    switch (t->role) {
    case NORM: random_row(state, 1, 0.1f, ret, t->cols); break;
    case BIAS: random_row(state, 0, 0.1f, ret, t->cols); break;
    default: random_row(state, 0, 1 / sqrtf((float)t->cols), ret, t->cols); break;
    }
}

static int make_data(const struct model_plan *plan, const struct made_tensor *t, model_sink sink,
                     void *userdata)
{
    static const uint8_t zeros[GGUF_WRITER_ALIGNMENT];
    const uint64_t row_bytes = gguf_row_bytes(t->type, t->cols);
    const uint64_t piece_rows = MIN(t->rows, MAX(PIECE_BYTES / row_bytes, (uint64_t)1));
    _cleanup_free_ float *values = calloc(t->cols, sizeof(*values));
    _cleanup_free_ uint8_t *piece = malloc(piece_rows * row_bytes);

    if (!values || !piece)
        return -ENOMEM;
    for (uint64_t row = 0; row < t->rows; row += piece_rows) {
        uint64_t n = MIN(piece_rows, t->rows - row);
        int error;
        for (uint64_t i = 0; i < n; i++) {
            make_row(plan, t, row + i, values);
            error = quantise_row(t->type, values, t->cols, piece + i * row_bytes);
            if (error)
                return error;
        }
        error = sink(userdata, piece, n * row_bytes);
        if (error)
            return error;
    }
    return sink(userdata, zeros, gguf_writer_padding(t->rows * row_bytes));
}

int model_make(const struct model_plan *plan, model_sink sink, void *userdata,
               struct fault *ret_fault)
{
    _cleanup_free_ struct made_tensor *tensors = NULL;
    _cleanup_free_ uint8_t *header = NULL;
    size_t n_tensors, header_bytes = 0;
    int error = model_plan_check(plan, ret_fault);

    if (error)
        return error;
    n_tensors = list_tensors(plan, NULL);
    tensors = calloc(n_tensors, sizeof(*tensors));
    if (!tensors)
        return fault_set(ret_fault, -ENOMEM, "no memory for %zu tensors", n_tensors);
    list_tensors(plan, tensors);
    error = write_header(plan, tensors, n_tensors, &header, &header_bytes);
    if (!error)
        error = sink(userdata, header, header_bytes);
    for (size_t i = 0; i < n_tensors && !error; i++)
        error = make_data(plan, &tensors[i], sink, userdata);
    if (error)
        return fault_set(ret_fault, error, "the model could not be made: %s", strerror(-error));
    return 0;
}

static int write_to_fd(void *userdata, const void *bytes, size_t len)
{
    const uint8_t *at = bytes;

    while (len > 0) {
        ssize_t n = write(*(int *)userdata, at, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        at += n;
        len -= (size_t)n;
    }
    return 0;
}

int model_make_to_fd(const struct model_plan *plan, int fd, struct fault *ret_fault)
{
    return model_make(plan, write_to_fd, &fd, ret_fault);
}
