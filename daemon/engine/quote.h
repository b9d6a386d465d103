/* Quoting: a string out of a file, made fit for a sentence.
 *
 * Files are not trusted: their strings may hold escape sequences for a terminal, or megabytes.
 * Hides the bound and which bytes are shown. Thread: any. */
#ifndef HEARTH_ENGINE_QUOTE_H
#define HEARTH_ENGINE_QUOTE_H

#include "daemon/engine/gguf.h"

#define QUOTE_BYTES 49

/* Printable ASCII as it is, a question mark for any other byte, cut to the size of `to`. */
static inline const char *quote(struct gguf_string s, char to[static QUOTE_BYTES])
{
    size_t n = s.len < QUOTE_BYTES - 1 ? s.len : QUOTE_BYTES - 1;
    for (size_t i = 0; i < n; i++)
        to[i] = s.bytes[i] >= 0x20 && s.bytes[i] <= 0x7e ? s.bytes[i] : '?';
    to[n] = '\0';
    return to;
}

#endif
