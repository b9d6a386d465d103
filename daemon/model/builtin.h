/* The built-in model: ember's file, inside the program. Hides how it got there. */
#ifndef HEARTH_MODEL_BUILTIN_H
#define HEARTH_MODEL_BUILTIN_H

#include <stddef.h>
#include <stdint.h>

#define BUILTIN_NAME "ember"

const uint8_t *builtin_bytes(void);
size_t builtin_size(void);

#endif
