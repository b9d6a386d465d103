/* Tokenizer: text to token ids and back, as the model's file says.
 *
 * Two kinds: `llama` (SentencePiece with scores and byte tokens) and `gpt2` (byte-level BPE with
 * merges behind a pre-tokenizer regular expression). Special tokens in text are not parsed: they
 * are plain text. Merging is O(n log n); PCRE2 runs with match and depth limits.
 *
 * Hides: vocabularies, merge order, normalisation, the PCRE2 library. Thread: immutable once made,
 * any number of threads may encode at once. */
#ifndef HEARTH_ENGINE_TOKENIZER_H
#define HEARTH_ENGINE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"

struct tokenizer;

/* -EBADMSG (malformed), -ENOTSUP (a kind or a pre-tokenizer that is not known, named), -ENOMEM.
 * Copies what it needs. */
int tokenizer_new(const struct gguf *gguf, struct tokenizer **ret_tokenizer,
                  struct fault *ret_fault);
struct tokenizer *tokenizer_free(struct tokenizer *tokenizer);

/* Ids of the text, no special tokens added. The caller frees *ret_ids (malloc, never NULL on
 * success). Control tokens are never made from text; the tokens that a file marks as added by its
 * user are found before anything merges, the longest first.
 *
 * Any bytes are taken. A byte that is not part of well-formed UTF-8 becomes the token of that byte
 * and joins nothing, so pieces give it back unchanged; the `llama` kind writes the unknown token
 * instead where the file has no byte tokens.
 *
 * At most one id a byte plus one, twice that with added tokens. -E2BIG for a text of more than 256
 * MiB and where PCRE2's limits are exceeded (a run of more than four million blanks), -ENOMEM. A
 * short text lives on the stack but for its ids and PCRE2's match data; a long word takes up to 84
 * bytes of scratch memory a byte while it merges. */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t text_bytes,
                     int32_t **ret_ids, size_t *ret_n);

/* The bytes that a token adds to a text (a blank for ▁, the byte of a byte token, nothing for
 * control tokens and ids out of range). Not terminated; lives as long as the tokenizer. A token may
 * hold part of a UTF-8 sequence. */
struct gguf_string tokenizer_piece(const struct tokenizer *tokenizer, int32_t id);

uint32_t tokenizer_n_vocab(const struct tokenizer *tokenizer);
/* -1 where the file names none. */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);
int32_t tokenizer_eos(const struct tokenizer *tokenizer);
/* Whether text begins with BOS (the file's add_bos_token, or the kind's default). */
bool tokenizer_adds_bos(const struct tokenizer *tokenizer);
/* End of generation: EOS, EOT and what the file marks as such. */
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id);
/* Heap bytes held. */
size_t tokenizer_bytes(const struct tokenizer *tokenizer);

#endif
