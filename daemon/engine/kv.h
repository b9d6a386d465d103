/* KV memory: the pages that sequences keep their keys and values in.
 *
 * One pool holds the budget of all models as 2 MiB slabs of address space; memory is touched when
 * it is first written. A space is one model's view of the pool: it takes slabs and carves them into
 * pages of the model's own size (16 positions of one layer), several adjacent slabs where a page is
 * larger than one. A slab whose last page comes back returns to the pool and may serve any model.
 *
 * Hides: slabs, free lists, what is given back to the kernel. A page's content is undefined when it
 * is taken. Thread: the engine thread. */
#ifndef HEARTH_ENGINE_KV_H
#define HEARTH_ENGINE_KV_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/fault.h"

#define KV_SLAB_BYTES (2u << 20)
/* Slabs once used and now free that keep their memory; what is beyond goes back to the kernel. */
#define KV_KEPT_SLABS 16u

struct kv_pool;

/* A budget is rounded down to whole slabs. -EINVAL: less than one slab; -ENOMEM. */
int kv_pool_new(uint64_t budget_bytes, struct kv_pool **ret_pool, struct fault *ret_fault);
/* All pages must have come back. */
struct kv_pool *kv_pool_free(struct kv_pool *pool);
/* Whole slabs of the budget, and bytes of the pages that are taken. */
uint64_t kv_pool_budget_bytes(const struct kv_pool *pool);
uint64_t kv_pool_used_bytes(const struct kv_pool *pool);

struct kv_space {
    struct kv_pool *pool;
    size_t page_bytes;
    uint32_t pages_per_run; /* pages of one run of slabs */
    uint32_t slabs_per_run; /* 1, or what one large page needs */
    uint32_t open;          /* first run with pages to give, KV_NONE when there is none */
    /* Of the pages that are taken. The engine thread writes it, any thread reads. */
    _Atomic uint64_t used_bytes;
};

#define KV_NONE UINT32_MAX

/* page_bytes: a multiple of 64, at least 64. Holds no slab until pages are taken. */
void kv_space_init(struct kv_space *space, struct kv_pool *pool, size_t page_bytes);
/* Pages that the whole pool would give it. */
uint64_t kv_space_most(const struct kv_space *space);
/* Takes n pages, all or none. -ENOSPC: the whole pool would not do; -EAGAIN: not now. */
int kv_take(struct kv_space *space, uint32_t n, void **ret_pages);
void kv_give(struct kv_space *space, uint32_t n, void *const *pages);

#endif
