/* A plan: which tensors of a file make up a model, and where in memory each one goes.
 *
 * An architecture claims its tensors by the calls that arch.h declares; each claim becomes an item.
 * A finished plan is in the order of the file and covers all of it: a tensor that nothing reads (a
 * bias, say) would silently change the answers.
 *
 * Hides: claims, checks of shape and type. Thread: whoever loads; constant once finished. */
#ifndef HEARTH_ENGINE_PLAN_H
#define HEARTH_ENGINE_PLAN_H

#include "daemon/engine/arch.h"

/* Most tensors that are fused to one. */
#define PLAN_MAX_SOURCES 3u

/* One packed tensor or vector and the tensors of the file it is made of, one below the other. */
struct plan_item {
    struct tensor *tensor; /* or: */
    float **vector;
    const struct gguf_tensor *sources[PLAN_MAX_SOURCES];
    uint32_t n_sources;
};

struct plan {
    const struct gguf *gguf;
    const struct kernel_table *kernels;
    struct fault *fault; /* of the call that plans */
    struct plan_item *items;
    size_t n_items, n_room;
};

/* All claims are made: checks that nothing was left over. -ENOTSUP. */
int plan_finish(struct plan *plan);
/* Its bytes in memory, and of the file. */
size_t plan_item_bytes(const struct plan_item *item);
uint64_t plan_item_file_bytes(const struct plan_item *item);
void plan_done(struct plan *plan);

#endif
