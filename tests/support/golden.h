/* Golden data for tests: where it is, how its files are read.
 *
 * $HEARTH_GOLDEN names the folder, else ../shared/golden beside the source tree. A test that finds
 * none skips itself, visibly. Everything that goes wrong here fails the test that asked.
 * Thread: the test's. */
#ifndef HEARTH_TESTS_SUPPORT_GOLDEN_H
#define HEARTH_TESTS_SUPPORT_GOLDEN_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"

/* A path below the golden folder, valid until the next call. Skips the test where there is no
 * golden data. */
const char *golden_path(const char *name);
/* A whole file (malloc'd, the caller frees). */
void *golden_bytes(const char *name, size_t *ret_len);
/* A file of n little-endian floats. */
float *golden_floats(const char *name, size_t n);
/* A JSON file (json_decref). */
json_t *golden_json(const char *name);
/* An array of integers as ids (malloc'd). */
int32_t *golden_ids(const json_t *array, uint32_t *ret_n);
/* A file of models/ as a source over its bytes; free source.memory. */
struct gguf_source golden_source(const char *name);

/* ||a - b||^2 / ||b||^2 */
double golden_nmse(const float *a, const float *b, size_t n);

#endif
