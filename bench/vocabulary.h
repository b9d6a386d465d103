/* Vocabularies for made-up models: all the keys a tokenizer wants, generated to any size.
 *
 * Beside the symbols that every text needs (bytes or characters) a vocabulary holds pieces of
 * letters: all of two symbols, then all of three, and so on, until it is full, the most frequent
 * English letters first. Each piece is its own prefix and one more letter, both in the vocabulary
 * and earlier, so that merging reaches it. Nothing here is borrowed from a trained vocabulary.
 *
 * Hides: the pieces' enumeration, the byte alphabet. Thread: pure. */
#ifndef HEARTH_BENCH_VOCABULARY_H
#define HEARTH_BENCH_VOCABULARY_H

#include <stdint.h>

#include "bench/gguf_writer.h"

enum vocabulary_kind {
    VOCABULARY_LLAMA, /* SentencePiece: <unk> <s> </s>, 256 byte tokens, scored pieces */
    VOCABULARY_GPT2,  /* byte-level BPE: the byte alphabet, merges, <|endoftext|> last */
    VOCABULARY_BERT,  /* WordPiece: [PAD] [UNK] [CLS] [SEP] [MASK], words, continuations */
};

#define VOCABULARY_MAX_TOKENS 1000000u

/* The smallest vocabulary of a kind. */
uint32_t vocabulary_least(enum vocabulary_kind kind);
/* Writes the tokenizer.ggml.* keys of a vocabulary of n tokens (vocabulary_least() to
 * VOCABULARY_MAX_TOKENS). -ENOMEM. */
int vocabulary_write(enum vocabulary_kind kind, uint32_t n, struct gguf_writer *writer);

#endif
