#include "daemon/model/builtin.h"

/* The assembler puts the file (BUILTIN_PATH, from the build) into read-only data as it is. */
__asm__(".section .rodata.ember, \"a\", @progbits\n"
        ".balign 64\n"
        ".local builtin_begin\n"
        "builtin_begin:\n"
        ".incbin \"" BUILTIN_PATH "\"\n"
        ".local builtin_end\n"
        "builtin_end:\n"
        ".previous\n");

extern const uint8_t builtin_begin[] __attribute__((visibility("hidden")));
extern const uint8_t builtin_end[] __attribute__((visibility("hidden")));

const uint8_t *builtin_bytes(void)
{
    return builtin_begin;
}

size_t builtin_size(void)
{
    return (size_t)(builtin_end - builtin_begin);
}
