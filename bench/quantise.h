/* Quantisers: rows of floats into the blocks of a GGUF tensor type.
 *
 * Plain round-to-nearest ones, for made-up models and for tests: valid encodings, not the best
 * ones. The same floats give the same bytes on every machine.
 *
 * Hides: the block layouts of the format. Thread: pure. */
#ifndef HEARTH_BENCH_QUANTISE_H
#define HEARTH_BENCH_QUANTISE_H

#include <stdint.h>

#include "daemon/engine/gguf.h"

/* Writes gguf_row_bytes(type, cols) bytes. The values are finite and below 100,000 in magnitude.
 * -ENOTSUP: a type that has no quantiser here (Q5_K) or
 * whose block does not divide cols; nothing is written then. */
int quantise_row(enum gguf_type type, const float *values, uint64_t cols, void *ret_row);

/* IEEE half precision, round to nearest even; overflow becomes infinity. */
uint16_t half_from_float(float value);
float half_to_float(uint16_t half);

#endif
