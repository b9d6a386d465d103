#include "daemon/engine/pretokenizer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "daemon/engine/quote.h"
#include "daemon/engine/utf8.h"
#include "lib/cleanup.h"

/* Character classes. Letters and numbers are those of Unicode 15.1: what PCRE2 knows (14.0 in
 * Debian 12) and what the two versions after it added, from the Unicode character database; in a
 * newer PCRE2 the additions name what it has already. White space is Unicode's White_Space
 * property, written out because PCRE2's \s also takes U+180E, which lost it in Unicode 6.3. */
#define LETTERS                                                                                 \
    "\\p{L}\\x{1123f}-\\x{11240}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}\\x{1342f}" \
    "\\x{13441}-\\x{13446}\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}\\x{1e030}-\\x{1e06d}"       \
    "\\x{1e4d0}-\\x{1e4eb}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
#define NUMBERS "\\p{N}\\x{11f50}-\\x{11f59}\\x{1d2c0}-\\x{1d2d3}\\x{1e4f0}-\\x{1e4f9}"
#define SPACES                                                                               \
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}" \
    "\\x{3000}"

/* The same classes among the characters up to 0x7f: a text of these alone, the common case, goes
 * through the same rule without any table of Unicode. */
#define ASCII_LETTERS "A-Za-z"
#define ASCII_NUMBERS "0-9"
#define ASCII_SPACES  "\\t-\\r "

/* The rules, with their classes as parameters. A last alternative of white space closes the one
 * gap that the published rule of gpt-2 leaves, so that every character belongs to a word. */
#define RULE_GPT2(L, N, S) \
    "'(?:[stmd]|re|ve|ll)| ?[" L "]+| ?[" N "]+| ?[^" S L N "]+|[" S "]+(?![^" S "])|[" S "]+"
#define RULE_LLAMA3(L, N, S, DIGITS)                                                      \
    "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\\r\\n" L N "]?[" L "]+|[" N "]" DIGITS \
    "| ?[^" S L N "]+[\\r\\n]*|[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"
/* Each digit by itself first, then gpt-2 on what lies between: white space before a digit ends a
 * part, so the blank that would have gone with the digit stays with it. */
#define RULE_DIGITS(L, N, S) \
    "'(?:[stmd]|re|ve|ll)| ?[" L "]+|[" N "]| ?[^" S L N "]+|[" S "]+(?![^" S N "])|[" S "]+"

#define BOTH(RULE)                                                                       \
    {                                                                                    \
        RULE(ASCII_LETTERS, ASCII_NUMBERS, ASCII_SPACES), RULE(LETTERS, NUMBERS, SPACES) \
    }
#define BOTH_DIGITS(RULE, DIGITS)                                 \
    {                                                             \
        RULE(ASCII_LETTERS, ASCII_NUMBERS, ASCII_SPACES, DIGITS), \
            RULE(LETTERS, NUMBERS, SPACES, DIGITS)                \
    }

enum {
    FOR_ASCII,
    FOR_UNICODE,
    N_FORMS,
};

struct rule {
    const char *names; /* separated by blanks, one before the first and after the last */
    const char *patterns[N_FORMS];
    bool takes_whole_words;
    bool adds_bos;
};

static const struct rule rules[] = {
    {
        .names = " gpt-2 phi-2 mpt olmo exaone4 ",
        .patterns = BOTH(RULE_GPT2),
    },
    {
        .names = " llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral lfm2 ",
        .patterns = BOTH_DIGITS(RULE_LLAMA3, "{1,3}"),
        .takes_whole_words = true,
        .adds_bos = true,
    },
    {
        .names = " dbrx smaug-bpe glm4 chatglm-bpe ",
        .patterns = BOTH_DIGITS(RULE_LLAMA3, "{1,3}"),
    },
    {
        .names = " qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 ",
        .patterns = BOTH_DIGITS(RULE_LLAMA3, ""),
    },
    {
        .names = " starcoder refact command-r smollm codeshell exaone ",
        .patterns = BOTH(RULE_DIGITS),
    },
};

const struct pretokenizer_limits pretokenizer_default_limits = {
    .match = 4u << 20,
    .depth = 10000,
    .heap_kib = 16 << 10,
};

struct pretokenizer {
    const struct rule *rule;
    pcre2_code *codes[N_FORMS];
    pcre2_match_context *match_context;
    bool compiled[N_FORMS];
    size_t bytes;
};

static const struct rule *rule_of(struct gguf_string name)
{
    if (name.len == 0 || memchr(name.bytes, ' ', name.len))
        return NULL;
    for (size_t i = 0; i < ELEMENTSOF(rules); i++) {
        const char *names = rules[i].names;
        size_t len = strlen(names);
        for (const char *at = names; at < names + len;) {
            const char *hit = memmem(at, (size_t)(names + len - at), name.bytes, name.len);
            if (!hit)
                break;
            if (hit[-1] == ' ' && hit[name.len] == ' ')
                return &rules[i];
            at = hit + 1;
        }
    }
    return NULL;
}

/* All names, each after a blank. */
static void list_names(char *to, size_t size)
{
    size_t n = 0;
    to[0] = '\0';
    for (size_t i = 0; i < ELEMENTSOF(rules); i++) {
        size_t len = strlen(rules[i].names) - 1;
        if (n + len >= size)
            return;
        memcpy(to + n, rules[i].names, len);
        n += len;
        to[n] = '\0';
    }
}

static int refuse(struct gguf_string name, struct fault *ret_fault)
{
    char known[256], shown[QUOTE_BYTES];
    list_names(known, sizeof(known));
    if (name.len == 0)
        return fault_set(ret_fault, -ENOTSUP,
                         "tokenizer: the file names no pre-tokenizer (tokenizer.ggml.pre); known "
                         "are%s",
                         known);
    return fault_set(ret_fault, -ENOTSUP,
                     "tokenizer: pre-tokenizer \"%s\" is not supported; known are%s",
                     quote(name, shown), known);
}

static int compile(struct pretokenizer *p, int form, bool no_jit, struct fault *ret_fault)
{
    uint32_t options = PCRE2_ANCHORED | PCRE2_NO_AUTO_CAPTURE;
    if (form == FOR_UNICODE)
        options |= PCRE2_UTF | PCRE2_UCP;
    int error;
    PCRE2_SIZE offset;
    p->codes[form] = pcre2_compile((PCRE2_SPTR)p->rule->patterns[form], PCRE2_ZERO_TERMINATED,
                                   options, &error, &offset, NULL);
    if (!p->codes[form]) {
        char why[128] = "";
        pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof(why));
        return fault_set(ret_fault, error == PCRE2_ERROR_NOMEMORY ? -ENOMEM : -ENOTSUP,
                         "tokenizer: this system's PCRE2 does not take the rule of%s: %s at %zu; "
                         "it needs version 10.40 with Unicode",
                         p->rule->names, why, offset);
    }
    /* Writable code may be forbidden (MemoryDenyWriteExecute): the interpreter finds the same. */
    p->compiled[form] = !no_jit && pcre2_jit_compile(p->codes[form], PCRE2_JIT_COMPLETE) == 0;
    size_t bytes = 0, jit_bytes = 0;
    pcre2_pattern_info(p->codes[form], PCRE2_INFO_SIZE, &bytes);
    pcre2_pattern_info(p->codes[form], PCRE2_INFO_JITSIZE, &jit_bytes);
    p->bytes += bytes + jit_bytes;
    return 0;
}

DEFINE_CLEANUP(struct pretokenizer *, pretokenizer_free)

int pretokenizer_new(struct gguf_string name, const struct pretokenizer_limits *limits,
                     struct pretokenizer **ret_pretokenizer, struct fault *ret_fault)
{
    const struct rule *rule = rule_of(name);
    if (!rule)
        return refuse(name, ret_fault);
    if (!limits)
        limits = &pretokenizer_default_limits;
    _cleanup_(pretokenizer_freep) struct pretokenizer *p = calloc(1, sizeof(*p));
    if (!p)
        return fault_set(ret_fault, -ENOMEM, "tokenizer: out of memory");
    p->rule = rule;
    p->bytes = sizeof(*p);
    p->match_context = pcre2_match_context_create(NULL);
    if (!p->match_context)
        return fault_set(ret_fault, -ENOMEM, "tokenizer: out of memory");
    pcre2_set_match_limit(p->match_context, limits->match);
    pcre2_set_depth_limit(p->match_context, limits->depth);
    pcre2_set_heap_limit(p->match_context, limits->heap_kib);
    for (int form = 0; form < N_FORMS; form++) {
        int r = compile(p, form, limits->no_jit, ret_fault);
        if (r < 0)
            return r;
    }
    *ret_pretokenizer = TAKE_PTR(p);
    return 0;
}

struct pretokenizer *pretokenizer_free(struct pretokenizer *p)
{
    if (!p)
        return NULL;
    for (int form = 0; form < N_FORMS; form++)
        pcre2_code_free(p->codes[form]);
    pcre2_match_context_free(p->match_context);
    free(p);
    return NULL;
}

bool pretokenizer_takes_whole_words(const struct pretokenizer *pretokenizer)
{
    return pretokenizer->rule->takes_whole_words;
}

bool pretokenizer_adds_bos(const struct pretokenizer *pretokenizer)
{
    return pretokenizer->rule->adds_bos;
}

bool pretokenizer_is_compiled(const struct pretokenizer *pretokenizer)
{
    return pretokenizer->compiled[FOR_ASCII] && pretokenizer->compiled[FOR_UNICODE];
}

size_t pretokenizer_bytes(const struct pretokenizer *pretokenizer)
{
    return pretokenizer->bytes;
}

int pretokenizer_begin(const struct pretokenizer *pretokenizer, struct pretokenizer_run *ret_run)
{
    (void)pretokenizer;
    ret_run->match_data = pcre2_match_data_create(1, NULL);
    return ret_run->match_data ? 0 : -ENOMEM;
}

void pretokenizer_end(struct pretokenizer_run *run)
{
    pcre2_match_data_free(run->match_data);
    run->match_data = NULL;
}

int pretokenizer_word(const struct pretokenizer *pretokenizer, struct pretokenizer_run *run,
                      const char *text, size_t len, size_t at, bool ascii, size_t *ret_end)
{
    int form = ascii ? FOR_ASCII : FOR_UNICODE;
    const pcre2_code *code = pretokenizer->codes[form];
    pcre2_match_data *data = run->match_data;
    int r =
        pretokenizer->compiled[form]
            ? pcre2_jit_match(code, (PCRE2_SPTR)text, len, at, 0, data, pretokenizer->match_context)
            : pcre2_match(code, (PCRE2_SPTR)text, len, at, PCRE2_NO_UTF_CHECK, data,
                          pretokenizer->match_context);
    size_t end = r == 1 ? pcre2_get_ovector_pointer(data)[1] : 0;
    if (r == 1 && end > at && end <= len) {
        *ret_end = end;
        return 0;
    }
    /* No rule leaves a character out; should one ever, the character is its own word. */
    if (r == 1 || r == PCRE2_ERROR_NOMATCH) {
        *ret_end = at + MAX(utf8_char_bytes(text + at, len - at), 1u);
        return 0;
    }
    /* Else the match, depth and heap limits, and the compiled code's stack. */
    return r == PCRE2_ERROR_NOMEMORY ? -ENOMEM : -E2BIG;
}
