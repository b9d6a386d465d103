/* Pre-tokenizer: cuts a text into words before byte pairs are merged.
 *
 * A model's file names its rule (`tokenizer.ggml.pre`); the rule is a regular expression that the
 * model was trained with. Words are consecutive and leave nothing out.
 *
 * Hides PCRE2 (just-in-time compiled where the system allows writable code, interpreted where not,
 * with the same words), its limits, and the differences between Unicode versions. Thread: a
 * pretokenizer is immutable once made; a run belongs to one caller. */
#ifndef HEARTH_ENGINE_PRETOKENIZER_H
#define HEARTH_ENGINE_PRETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"
#include "lib/fault.h"

struct pretokenizer;

/* How much one word may cost. Match and depth count PCRE2's steps of backtracking; the default
 * leaves room for a run of 16 million blanks and takes well under a second. */
struct pretokenizer_limits {
    uint32_t match;
    uint32_t depth;
    uint32_t heap_kib;
    bool no_jit; /* always interpret */
};
extern const struct pretokenizer_limits pretokenizer_default_limits;

/* By the name in the file. -ENOTSUP naming it and the known ones, -ENOMEM. `limits` NULL: the
 * default. */
int pretokenizer_new(struct gguf_string name, const struct pretokenizer_limits *limits,
                     struct pretokenizer **ret_pretokenizer, struct fault *ret_fault);
struct pretokenizer *pretokenizer_free(struct pretokenizer *pretokenizer);

/* Models of this rule take a whole word that is a token as it is, without merging. */
bool pretokenizer_takes_whole_words(const struct pretokenizer *pretokenizer);
/* Models of this rule begin with BOS unless their file says otherwise. */
bool pretokenizer_adds_bos(const struct pretokenizer *pretokenizer);
bool pretokenizer_is_compiled(const struct pretokenizer *pretokenizer);
size_t pretokenizer_bytes(const struct pretokenizer *pretokenizer);

/* The memory of one caller's matching. */
struct pretokenizer_run {
    void *match_data;
};
int pretokenizer_begin(const struct pretokenizer *pretokenizer, struct pretokenizer_run *ret_run);
void pretokenizer_end(struct pretokenizer_run *run);

/* The end of the word that begins at `at` < `len`; what lies before `at` is not looked at. The
 * text must be well-formed UTF-8; `ascii` says that it has no byte above 0x7f. -E2BIG where a limit
 * is exceeded, -ENOMEM. */
int pretokenizer_word(const struct pretokenizer *pretokenizer, struct pretokenizer_run *run,
                      const char *text, size_t len, size_t at, bool ascii, size_t *ret_end);

#endif
