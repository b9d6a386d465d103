/* The `gpt2` kind: byte-level BPE. This version refuses it by name. */
#include <errno.h>

#include "daemon/engine/tokenizer_internal.h"

size_t bpe_decode(const struct tokenizer *t, struct gguf_string token, uint8_t type, char *to,
                  bool *ret_indexed)
{
    (void)t, (void)token, (void)type, (void)to;
    *ret_indexed = false;
    return 0;
}

int bpe_load(struct tokenizer *t, const struct gguf *gguf, struct fault *ret_fault)
{
    (void)t, (void)gguf;
    return fault_set(ret_fault, -ENOTSUP, "tokenizer: kind \"gpt2\" is not in this version");
}

int bpe_encode(struct encoder *e, const char *text, size_t len)
{
    (void)e, (void)text, (void)len;
    return -ENOTSUP;
}

bool pretokenizer_adds_bos(const struct pretokenizer *pretokenizer)
{
    (void)pretokenizer;
    return false;
}

void pretokenizer_end(struct pretokenizer_run *run)
{
    (void)run;
}

struct pretokenizer *pretokenizer_free(struct pretokenizer *pretokenizer)
{
    (void)pretokenizer;
    return NULL;
}
