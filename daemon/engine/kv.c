#include "daemon/engine/kv.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "lib/cleanup.h"

/* One slab; what concerns a run of slabs stands in its first. */
struct slab {
    uint32_t next, prev; /* the space's list of runs with pages to give */
    uint32_t n_used;     /* pages taken */
    uint32_t n_fresh;    /* pages ever taken from this run: the rest has not been touched by it */
    uint32_t free_page;  /* first page that came back, KV_NONE; each holds the next one's number */
    bool taken;          /* belongs to a space, or to a run's first slab */
    bool dirty;          /* has memory behind it */
};

struct kv_pool {
    uint8_t *mapping; /* what mmap gave */
    size_t mapping_bytes;
    uint8_t *base; /* aligned to a slab */
    uint32_t n_slabs, n_taken, n_dirty_free;
    uint32_t lowest_free; /* no free slab below */
    uint64_t used_bytes;
    struct slab slabs[];
};

int kv_pool_new(uint64_t budget_bytes, struct kv_pool **ret_pool, struct fault *ret_fault)
{
    _cleanup_free_ struct kv_pool *pool = NULL;
    uint64_t n_slabs = budget_bytes / KV_SLAB_BYTES;

    if (n_slabs == 0)
        return fault_set(ret_fault, -EINVAL,
                         "the KV budget of %llu bytes holds no slab of %u bytes; give it more",
                         (unsigned long long)budget_bytes, KV_SLAB_BYTES);
    if (n_slabs >= KV_NONE)
        return fault_set(ret_fault, -EINVAL, "the KV budget of %llu bytes is beyond any machine",
                         (unsigned long long)budget_bytes);
    pool = calloc(1, sizeof(*pool) + n_slabs * sizeof(pool->slabs[0]));
    if (!pool)
        return fault_set(ret_fault, -ENOMEM, "no memory for the table of KV slabs");
    pool->n_slabs = (uint32_t)n_slabs;
    pool->mapping_bytes = (n_slabs + 1) * KV_SLAB_BYTES;
    pool->mapping = mmap(NULL, pool->mapping_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pool->mapping == MAP_FAILED)
        return fault_set(ret_fault, -ENOMEM, "no address space for a KV budget of %llu bytes (%s)",
                         (unsigned long long)budget_bytes, strerror(errno));
    pool->base = (uint8_t *)(((uintptr_t)pool->mapping + KV_SLAB_BYTES - 1) &
                             ~(uintptr_t)(KV_SLAB_BYTES - 1));
    *ret_pool = TAKE_PTR(pool);
    return 0;
}

struct kv_pool *kv_pool_free(struct kv_pool *pool)
{
    if (!pool)
        return NULL;
    assert(pool->n_taken == 0);
    munmap(pool->mapping, pool->mapping_bytes);
    free(pool);
    return NULL;
}

uint64_t kv_pool_budget_bytes(const struct kv_pool *pool)
{
    return (uint64_t)pool->n_slabs * KV_SLAB_BYTES;
}

uint64_t kv_pool_used_bytes(const struct kv_pool *pool)
{
    return pool->used_bytes;
}

void kv_space_init(struct kv_space *space, struct kv_pool *pool, size_t page_bytes)
{
    assert(page_bytes >= 64 && page_bytes % 64 == 0);
    space->pool = pool;
    space->page_bytes = page_bytes;
    space->pages_per_run = page_bytes <= KV_SLAB_BYTES ? (uint32_t)(KV_SLAB_BYTES / page_bytes) : 1;
    space->slabs_per_run = (uint32_t)((page_bytes + KV_SLAB_BYTES - 1) / KV_SLAB_BYTES);
    space->open = KV_NONE;
    atomic_store_explicit(&space->used_bytes, 0, memory_order_relaxed);
}

/* Pages taken; n < 0: given back. Of the counter there is one writer. */
static void count_pages(struct kv_space *space, int64_t n)
{
    uint64_t bytes = (uint64_t)n * space->page_bytes;

    space->pool->used_bytes += bytes;
    atomic_store_explicit(&space->used_bytes,
                          atomic_load_explicit(&space->used_bytes, memory_order_relaxed) + bytes,
                          memory_order_relaxed);
}

static uint8_t *run_memory(const struct kv_pool *pool, uint32_t run)
{
    return pool->base + (size_t)run * KV_SLAB_BYTES;
}

/* A run's place in the list of those that have pages to give. */
static void run_link(struct kv_space *space, uint32_t run)
{
    struct slab *slabs = space->pool->slabs;

    slabs[run].prev = KV_NONE;
    slabs[run].next = space->open;
    if (space->open != KV_NONE)
        slabs[space->open].prev = run;
    space->open = run;
}

static void run_unlink(struct kv_space *space, uint32_t run)
{
    struct slab *slabs = space->pool->slabs;

    if (slabs[run].prev != KV_NONE)
        slabs[slabs[run].prev].next = slabs[run].next;
    else
        space->open = slabs[run].next;
    if (slabs[run].next != KV_NONE)
        slabs[slabs[run].next].prev = slabs[run].prev;
}

/* The lowest run of free adjacent slabs becomes the space's, or -EAGAIN. Low slabs first, so that
 * those with memory behind them are used again. */
static int run_take(struct kv_space *space)
{
    struct kv_pool *pool = space->pool;
    uint32_t length = space->slabs_per_run, found = 0, run, i;

    if (pool->n_slabs - pool->n_taken < length)
        return -EAGAIN;
    for (i = pool->lowest_free; i < pool->n_slabs && found < length; i++)
        found = pool->slabs[i].taken ? 0 : found + 1;
    if (found < length)
        return -EAGAIN;
    run = i - length;
    for (i = run; i < run + length; i++) {
        pool->slabs[i].taken = true;
        if (pool->slabs[i].dirty)
            pool->n_dirty_free--;
        pool->slabs[i].dirty = true;
    }
    pool->n_taken += length;
    while (pool->lowest_free < pool->n_slabs && pool->slabs[pool->lowest_free].taken)
        pool->lowest_free++;
    pool->slabs[run].n_used = 0;
    pool->slabs[run].n_fresh = 0;
    pool->slabs[run].free_page = KV_NONE;
    run_link(space, run);
    return 0;
}

static void run_give(struct kv_space *space, uint32_t run)
{
    struct kv_pool *pool = space->pool;

    run_unlink(space, run);
    for (uint32_t i = run; i < run + space->slabs_per_run; i++) {
        pool->slabs[i].taken = false;
        if (pool->n_dirty_free >= KV_KEPT_SLABS &&
            madvise(run_memory(pool, i), KV_SLAB_BYTES, MADV_DONTNEED) == 0)
            pool->slabs[i].dirty = false;
        else
            pool->n_dirty_free++;
    }
    pool->n_taken -= space->slabs_per_run;
    pool->lowest_free = MIN(pool->lowest_free, run);
}

/* One page of an open run. */
static void *page_take(struct kv_space *space)
{
    struct kv_pool *pool = space->pool;
    uint32_t run = space->open;
    struct slab *slab = &pool->slabs[run];
    uint32_t page = slab->free_page;
    uint8_t *memory;

    if (page == KV_NONE) {
        page = slab->n_fresh++;
        memory = run_memory(pool, run) + page * space->page_bytes;
    } else {
        memory = run_memory(pool, run) + page * space->page_bytes;
        memcpy(&slab->free_page, memory, sizeof(slab->free_page));
    }
    assert(page < space->pages_per_run);
    if (++slab->n_used == space->pages_per_run)
        run_unlink(space, run);
    return memory;
}

static void page_give(struct kv_space *space, void *memory)
{
    struct kv_pool *pool = space->pool;
    size_t offset = (size_t)((uint8_t *)memory - pool->base);
    uint32_t run = (uint32_t)(offset / KV_SLAB_BYTES);
    struct slab *slab = &pool->slabs[run];
    uint32_t page = (uint32_t)((offset - (size_t)run * KV_SLAB_BYTES) / space->page_bytes);

    assert(slab->taken && slab->n_used > 0);
    memcpy(memory, &slab->free_page, sizeof(slab->free_page));
    slab->free_page = page;
    if (slab->n_used-- == space->pages_per_run)
        run_link(space, run);
    if (slab->n_used == 0)
        run_give(space, run);
}

uint64_t kv_space_most(const struct kv_space *space)
{
    return (uint64_t)(space->pool->n_slabs / space->slabs_per_run) * space->pages_per_run;
}

int kv_take(struct kv_space *space, uint32_t n, void **ret_pages)
{
    if (n > kv_space_most(space))
        return -ENOSPC;
    for (uint32_t i = 0; i < n; i++) {
        if (space->open == KV_NONE && run_take(space) < 0) {
            count_pages(space, i);
            kv_give(space, i, ret_pages);
            return -EAGAIN;
        }
        ret_pages[i] = page_take(space);
    }
    count_pages(space, n);
    return 0;
}

void kv_give(struct kv_space *space, uint32_t n, void *const *pages)
{
    for (uint32_t i = n; i-- > 0;)
        page_give(space, pages[i]);
    count_pages(space, -(int64_t)n);
}
