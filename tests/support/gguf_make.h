/* Models for tests: whole GGUF files in memory or on disk, made on the spot.
 *
 * A test takes tiny_model_plan(), changes what it is about and makes it; a test about headers
 * writes its own with bench/gguf_writer.h. Hides: that the writer is the one behind
 * bench/make-model. Thread: the caller's. */
#ifndef HEARTH_TESTS_SUPPORT_GGUF_MAKE_H
#define HEARTH_TESTS_SUPPORT_GGUF_MAKE_H

#include <stddef.h>
#include <stdint.h>

#include "bench/model_maker.h"
#include "daemon/engine/gguf.h"

/* A llama of 64 wide, 2 layers, 4 heads on 2 KV heads, FF 96, 400 tokens, context 128, F32, output
 * not tied: about 330 KB. */
struct model_plan tiny_model_plan(void);

/* The file's bytes (malloc'd, the caller frees). -EINVAL, -ENOMEM, with a sentence. */
int make_model_bytes(const struct model_plan *plan, uint8_t **ret_bytes, size_t *ret_len,
                     struct fault *ret_fault);
/* The same, written to `path` (created, or replaced in place). Negative errno besides. */
int make_model_file(const struct model_plan *plan, const char *path, struct fault *ret_fault);
/* A source over bytes in memory. */
struct gguf_source memory_source(const void *bytes, size_t len);

#endif
