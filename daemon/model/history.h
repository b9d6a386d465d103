/* The history: the last requests for models, kept for the daemon's next life.
 *
 * What the predictor was told, in order: a ring of HISTORY_MAX_REQUESTS requests (which model, how
 * long after the one before, whether it was ready) and the models' names and sizes. Told again to a
 * new predictor, it makes it know what the old one knew.
 *
 * As bytes: a magic that names the version, two counts, the models, the requests, a checksum; all
 * little-endian. Bytes that are not exactly so are refused as a whole. Hides the ring and the
 * format. Thread: the caller's; the file functions may wait for a disk. */
#ifndef HEARTH_MODEL_HISTORY_H
#define HEARTH_MODEL_HISTORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/model/predictor.h"
#include "lib/fault.h"

#define HISTORY_MAX_REQUESTS 4096u
/* No history is longer as bytes. */
#define HISTORY_MAX_BYTES ((size_t)128 << 10)

struct history;

int history_new(struct history **ret_history);
struct history *history_free(struct history *history);

/* A request that the predictor has counted. */
void history_add(struct history *history, const char *name, uint64_t bytes, bool ready,
                 uint64_t now_us);
size_t history_length(const struct history *history);
/* Tells the predictor all of it, as if the last request had come at `now_us`, which must be later
 * than the whole history is long: HISTORY_LONGEST_US always is. */
void history_tell(const struct history *history, struct predictor *predictor, uint64_t now_us);
#define HISTORY_LONGEST_US ((uint64_t)HISTORY_MAX_REQUESTS * UINT32_MAX * 1000)

/* As bytes, malloc'd; -ENOMEM. */
int history_write(const struct history *history, uint8_t **ret_bytes, size_t *ret_n);
/* -EBADMSG with a sentence; -ENOMEM. */
int history_read(const uint8_t *bytes, size_t n, struct history **ret_history,
                 struct fault *ret_fault);

/* Replaces the file in one step, and makes its folder. -errno. */
int history_save(const char *path, const uint8_t *bytes, size_t n);
/* -ENOENT: there is none; -EBADMSG, -errno with a sentence. */
int history_load(const char *path, struct history **ret_history, struct fault *ret_fault);

#endif
