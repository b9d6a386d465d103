/* Made-up models: the same everywhere, complete, and such that the engine takes them. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/tokenizer.h"
#include "lib/cleanup.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/gguf_make.h"

struct made {
    uint8_t *bytes;
    size_t len;
    struct gguf *gguf;
};

static struct made make(const struct model_plan *plan)
{
    struct made made = {NULL};
    struct fault fault = {""};
    struct gguf_source source;

    cr_assert_eq(make_model_bytes(plan, &made.bytes, &made.len, &fault), 0, "%s", fault.text);
    source = memory_source(made.bytes, made.len);
    cr_assert_eq(gguf_open(&source, &made.gguf, &fault), 0, "%s", fault.text);
    return made;
}

static void unmake(struct made *made)
{
    gguf_free(made->gguf);
    free(made->bytes);
}

static uint64_t checksum(const uint8_t *bytes, size_t len)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (size_t i = 0; i < len; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

Test(model_maker, the_same_plan_gives_the_same_bytes)
{
    struct model_plan plan = tiny_model_plan();
    struct made a = make(&plan), b = make(&plan), c;

    cr_assert_eq(a.len, b.len);
    cr_expect_eq(memcmp(a.bytes, b.bytes, a.len), 0);
    plan.seed = 2;
    c = make(&plan);
    cr_expect_eq(c.len, a.len);
    cr_expect_neq(memcmp(a.bytes, c.bytes, a.len), 0);
    unmake(&a);
    unmake(&b);
    unmake(&c);
}

/* Benchmarks of different machines and compilers are about the same file. */
Test(model_maker, bytes_are_what_they_always_were)
{
    struct model_plan plan = tiny_model_plan();
    struct made made;

    plan.type = PLAN_Q4_K_M;
    plan.dim = 256;
    made = make(&plan);
    cr_expect_eq(checksum(made.bytes, made.len), 0xe6f2c9be76b89af5u, "%016llx",
                 (unsigned long long)checksum(made.bytes, made.len));
    unmake(&made);
}

Test(model_maker, every_architecture_and_type_is_complete)
{
    static const struct {
        enum plan_arch arch;
        enum vocabulary_kind vocabulary;
        uint64_t per_layer, besides;
    } archs[] = {
        {PLAN_LLAMA, VOCABULARY_LLAMA, 9, 3}, {PLAN_QWEN2, VOCABULARY_GPT2, 12, 3},
        {PLAN_QWEN3, VOCABULARY_GPT2, 11, 3}, {PLAN_GEMMA3, VOCABULARY_LLAMA, 13, 2},
        {PLAN_BERT, VOCABULARY_BERT, 16, 5},
    };

    for (size_t a = 0; a < ELEMENTSOF(archs); a++) {
        for (int type = 0; type < PLAN_N_TYPES; type++) {
            struct model_plan plan = tiny_model_plan();
            struct made made;
            uint64_t end = 0;
            plan.arch = archs[a].arch;
            plan.vocabulary = archs[a].vocabulary;
            plan.type = (enum plan_type)type;
            plan.dim = plan.ff = 256;
            plan.kv_heads = plan.arch == PLAN_BERT ? plan.heads : plan.kv_heads;
            made = make(&plan);
            cr_expect_eq(gguf_n_tensors(made.gguf), archs[a].per_layer * 2 + archs[a].besides);
            for (uint64_t i = 0; i < gguf_n_tensors(made.gguf); i++) {
                const struct gguf_tensor *t = gguf_tensor_at(made.gguf, i);
                cr_expect(t->bytes > 0 && t->offset >= end);
                end = t->offset + t->bytes;
            }
            cr_expect_eq(end + gguf_writer_padding(end), made.len, "the file ends with its data");
            unmake(&made);
        }
    }
}

static enum gguf_type type_of(const struct made *made, const char *name)
{
    const struct gguf_tensor *t = gguf_find(made->gguf, name);

    cr_assert_not_null(t, "%s", name);
    return t->type;
}

Test(model_maker, q4_k_m_is_a_mix)
{
    struct model_plan plan = tiny_model_plan();
    struct made made;

    plan.type = PLAN_Q4_K_M;
    plan.dim = plan.ff = 256;
    plan.layers = 4;
    made = make(&plan);
    cr_expect_eq(type_of(&made, "output.weight"), GGUF_Q6_K);
    cr_expect_eq(type_of(&made, "token_embd.weight"), GGUF_Q4_K);
    cr_expect_eq(type_of(&made, "blk.0.attn_v.weight"), GGUF_Q4_K);
    cr_expect_eq(type_of(&made, "blk.3.attn_v.weight"), GGUF_Q6_K);
    cr_expect_eq(type_of(&made, "blk.3.ffn_down.weight"), GGUF_Q6_K);
    cr_expect_eq(type_of(&made, "blk.3.ffn_up.weight"), GGUF_Q4_K);
    cr_expect_eq(type_of(&made, "blk.3.ffn_norm.weight"), GGUF_F32);
    unmake(&made);
    plan.tied = true;
    made = make(&plan);
    cr_expect_null(gguf_find(made.gguf, "output.weight"));
    cr_expect_eq(type_of(&made, "token_embd.weight"), GGUF_Q6_K);
    unmake(&made);
}

Test(model_maker, rows_that_blocks_do_not_divide_get_another_type)
{
    struct model_plan plan = tiny_model_plan();
    struct made made;

    plan.type = PLAN_Q4_K;
    plan.dim = 64;
    plan.ff = 100;
    made = make(&plan);
    cr_expect_eq(type_of(&made, "blk.0.attn_q.weight"), GGUF_Q8_0);
    cr_expect_eq(type_of(&made, "blk.0.ffn_down.weight"), GGUF_F16);
    unmake(&made);
}

Test(model_maker, weights_have_a_sensible_scale)
{
    struct model_plan plan = tiny_model_plan();
    struct made made = make(&plan);
    static const struct {
        const char *name;
        double mean, deviation;
    } cases[] = {
        {"token_embd.weight", 0, 1 / 8.0}, /* rows of 64 */
        {"blk.1.attn_q.weight", 0, 1 / 8.0},
        {"blk.0.ffn_down.weight", 0, 0.10206}, /* rows of 96 */
        {"output_norm.weight", 1, 0.1},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        const struct gguf_tensor *t = gguf_find(made.gguf, cases[i].name);
        size_t n = t->bytes / sizeof(float);
        _cleanup_free_ float *values = malloc(t->bytes);
        double sum = 0, squares = 0, mean, deviation,
               slack = 4 * cases[i].deviation / sqrt((double)n);
        cr_assert_eq(gguf_read(made.gguf, t, 0, values, t->bytes, NULL), 0);
        for (size_t k = 0; k < n; k++) {
            sum += values[k];
            squares += (double)values[k] * values[k];
        }
        mean = sum / (double)n;
        deviation = sqrt(squares / (double)n - mean * mean);
        cr_expect(fabs(mean - cases[i].mean) < slack, "%s: mean %g", cases[i].name, mean);
        cr_expect(fabs(deviation - cases[i].deviation) < slack, "%s: deviation %g", cases[i].name,
                  deviation);
    }
    unmake(&made);
}

static int compare_strings(const void *a, const void *b)
{
    const struct gguf_string *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, MIN(x->len, y->len));

    return order ? order : (x->len > y->len) - (x->len < y->len);
}

Test(model_maker, no_token_occurs_twice)
{
    static const uint32_t sizes[] = {400, 3000, 40000};

    for (size_t s = 0; s < ELEMENTSOF(sizes); s++) {
        for (int kind = VOCABULARY_LLAMA; kind <= VOCABULARY_BERT; kind++) {
            struct model_plan plan = tiny_model_plan();
            _cleanup_free_ struct gguf_string *tokens = NULL;
            struct made made;
            uint64_t n = 0;
            plan.dim = 8;
            plan.arch = kind == VOCABULARY_BERT ? PLAN_BERT : PLAN_LLAMA;
            plan.kv_heads = plan.heads;
            plan.vocabulary = (enum vocabulary_kind)kind;
            plan.vocab = sizes[s];
            made = make(&plan);
            cr_assert_eq(gguf_get_strings(made.gguf, "tokenizer.ggml.tokens", &tokens, &n, NULL),
                         0);
            cr_assert_eq(n, sizes[s]);
            qsort(tokens, n, sizeof(*tokens), compare_strings);
            for (uint64_t i = 1; i < n; i++)
                cr_assert_neq(compare_strings(&tokens[i - 1], &tokens[i]), 0, "%.*s",
                              (int)tokens[i].len, tokens[i].bytes);
            unmake(&made);
        }
    }
}

/* Every token of a text comes back as it was, and merging finds the pieces of several letters. */
Test(model_maker, its_tokenizers_take_any_text)
{
    static const char text[] =
        "Once upon a time, 7 embers glowed; \xc3\xa9\xe2\x82\xac\xf0\x9f\x94\xa5!\n";

    for (int kind = VOCABULARY_LLAMA; kind <= VOCABULARY_GPT2; kind++) {
        struct model_plan plan = tiny_model_plan();
        struct tokenizer *tokenizer = NULL;
        struct fault fault = {""};
        _cleanup_free_ int32_t *ids = NULL;
        char back[256];
        size_t n = 0, len = 0;
        struct made made;
        plan.vocabulary = (enum vocabulary_kind)kind;
        plan.vocab = 3000;
        made = make(&plan);
        cr_assert_eq(tokenizer_new(made.gguf, &tokenizer, &fault), 0, "%s", fault.text);
        cr_assert_eq(tokenizer_encode(tokenizer, text, sizeof(text) - 1, &ids, &n), 0);
        cr_expect_lt(n, 40u, "%zu ids: nothing was merged", n);
        for (size_t i = 0; i < n; i++) {
            struct gguf_string piece = tokenizer_piece(tokenizer, ids[i]);
            cr_assert_leq(len + piece.len, sizeof(back));
            memcpy(back + len, piece.bytes, piece.len);
            len += piece.len;
        }
        /* SentencePiece puts a blank before a text. */
        cr_expect_eq(len, sizeof(text) - 1 + (kind == VOCABULARY_LLAMA));
        cr_expect_eq(memcmp(back + (kind == VOCABULARY_LLAMA), text, sizeof(text) - 1), 0);
        tokenizer_free(tokenizer);
        unmake(&made);
    }
}

Test(model_maker, impossible_plans_are_refused_with_a_reason)
{
    static const struct {
        const char *needle;
        uint32_t dim, layers, heads, kv_heads, ff, vocab, context;
        enum plan_arch arch;
        enum vocabulary_kind vocabulary;
    } cases[] = {
        {"dim is 0", 0, 1, 1, 1, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"layers is 0", 8, 0, 1, 1, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"heads is 0", 8, 1, 0, 1, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"kv-heads is 0", 8, 1, 1, 0, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"ff is 0", 8, 1, 1, 1, 0, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"vocab is 259", 8, 1, 1, 1, 8, 259, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"vocab is 256", 8, 1, 1, 1, 8, 256, 8, PLAN_LLAMA, VOCABULARY_GPT2},
        {"context is 0", 8, 1, 1, 1, 8, 300, 0, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"3 heads do not divide", 8, 1, 3, 1, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"is odd", 6, 1, 2, 1, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"3 KV heads", 16, 1, 4, 3, 8, 300, 8, PLAN_LLAMA, VOCABULARY_LLAMA},
        {"as many KV heads", 16, 1, 4, 2, 8, 300, 8, PLAN_BERT, VOCABULARY_BERT},
        {"go together", 16, 1, 4, 4, 8, 300, 8, PLAN_BERT, VOCABULARY_LLAMA},
        {"go together", 16, 1, 4, 4, 8, 300, 8, PLAN_LLAMA, VOCABULARY_BERT},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct model_plan plan = {
            .arch = cases[i].arch,
            .vocabulary = cases[i].vocabulary,
            .dim = cases[i].dim,
            .layers = cases[i].layers,
            .heads = cases[i].heads,
            .kv_heads = cases[i].kv_heads,
            .ff = cases[i].ff,
            .vocab = cases[i].vocab,
            .context = cases[i].context,
        };
        struct fault fault = {""};
        uint8_t *bytes = NULL;
        size_t len;
        cr_expect_eq(make_model_bytes(&plan, &bytes, &len, &fault), -EINVAL, "%s", cases[i].needle);
        cr_expect_not_null(strstr(fault.text, cases[i].needle), "%s: %s", cases[i].needle,
                           fault.text);
        free(bytes);
    }
}

static int refuse_after(void *userdata, const void *bytes, size_t len)
{
    size_t *left = userdata;

    (void)bytes;
    if (len > *left)
        return -ENOSPC;
    *left -= len;
    return 0;
}

Test(model_maker, a_sink_that_refuses_ends_the_making)
{
    struct model_plan plan = tiny_model_plan();
    static const size_t rooms[] = {0, 10000, 60000, 300000};

    for (size_t i = 0; i < ELEMENTSOF(rooms); i++) {
        size_t left = rooms[i];
        struct fault fault = {""};
        cr_expect_eq(model_make(&plan, refuse_after, &left, &fault), -ENOSPC);
        cr_expect_not_null(strstr(fault.text, "No space left"));
    }
}

static int swallow(void *userdata, const void *bytes, size_t len)
{
    (void)userdata;
    (void)bytes;
    (void)len;
    return 0;
}

Test(model_maker, running_out_of_memory_is_told_wherever_it_happens)
{
    for (int kind = VOCABULARY_LLAMA; kind <= VOCABULARY_BERT; kind++) {
        struct model_plan plan = tiny_model_plan();
        unsigned n = 0;
        int error;
        plan.arch = kind == VOCABULARY_BERT ? PLAN_BERT : PLAN_LLAMA;
        plan.kv_heads = plan.heads;
        plan.vocabulary = (enum vocabulary_kind)kind;
        do {
            struct fault fault = {""};
            bool failed;
            alloc_fail_at(++n);
            error = model_make(&plan, swallow, NULL, &fault);
            failed = alloc_fail_done();
            cr_assert_eq(error, failed ? -ENOMEM : 0, "allocation %u: %d", n, error);
            cr_assert_lt(n, 1000u);
        } while (error);
        cr_expect_gt(n, 20u, "only %u allocations were seen", n - 1);
    }
}

Test(model_maker, plans_speak_the_names_of_files)
{
    enum plan_arch arch;
    enum plan_type type;
    enum vocabulary_kind kind;

    cr_expect(plan_arch_from_name("gemma3", &arch) == 0 && arch == PLAN_GEMMA3);
    cr_expect(plan_type_from_name("Q4_K_M", &type) == 0 && type == PLAN_Q4_K_M);
    cr_expect(plan_vocabulary_from_name("gpt2", &kind) == 0 && kind == VOCABULARY_GPT2);
    cr_expect_eq(plan_arch_from_name("mamba", &arch), -EINVAL);
    cr_expect_eq(plan_type_from_name("q5_k", &type), -EINVAL);
    cr_expect_eq(plan_vocabulary_from_name("", &kind), -EINVAL);
}
