/* UTF-8: where one well-formed character ends.
 *
 * Well-formed as in the Unicode standard, table 3-7: no overlong forms, no surrogates, nothing
 * above U+10FFFF, nothing cut off. Hides the byte patterns. Thread: any. */
#ifndef HEARTH_ENGINE_UTF8_H
#define HEARTH_ENGINE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of the character at `text` (1..4), or 0 when the `left` bytes (at least one) begin with
 * something that is not a well-formed character. */
static inline unsigned utf8_char_bytes(const char *text, size_t left)
{
    const uint8_t *b = (const uint8_t *)text;
    if (b[0] < 0x80)
        return 1;
    if (b[0] < 0xc2 || b[0] > 0xf4 || left < 2 || (b[1] & 0xc0) != 0x80)
        return 0;
    if (b[0] < 0xe0)
        return 2;
    if ((b[0] == 0xe0 && b[1] < 0xa0) || (b[0] == 0xed && b[1] > 0x9f) ||
        (b[0] == 0xf0 && b[1] < 0x90) || (b[0] == 0xf4 && b[1] > 0x8f))
        return 0;
    if (left < 3 || (b[2] & 0xc0) != 0x80)
        return 0;
    if (b[0] < 0xf0)
        return 3;
    if (left < 4 || (b[3] & 0xc0) != 0x80)
        return 0;
    return 4;
}

static inline bool utf8_valid(const char *text, size_t len)
{
    for (size_t at = 0; at < len;) {
        unsigned n = utf8_char_bytes(text + at, len - at);
        if (n == 0)
            return false;
        at += n;
    }
    return true;
}

#endif
