/* KV memory: pages out of slabs, all or none, slabs that change hands. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/engine/kv.h"
#include "lib/cleanup.h"

#define PAGE 4096u

static struct kv_pool *make_pool(uint32_t slabs)
{
    struct kv_pool *pool = NULL;

    cr_assert_eq(kv_pool_new((uint64_t)slabs * KV_SLAB_BYTES, &pool, NULL), 0);
    return pool;
}

/* Every page can be written from end to end without touching another. */
Test(kv, pages_do_not_overlap)
{
    struct kv_pool *pool = make_pool(3);
    struct kv_space space;
    void *pages[3 * 682];
    uint32_t n = ELEMENTSOF(pages);

    kv_space_init(&space, pool, 3072); /* does not divide a slab */
    cr_assert_eq(kv_take(&space, n, pages), 0);
    cr_expect_eq(kv_pool_used_bytes(pool), n * 3072);
    for (uint32_t i = 0; i < n; i++)
        memset(pages[i], (int)i, 3072);
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *bytes = pages[i];

        cr_assert_eq((uintptr_t)bytes % 64, 0);
        cr_assert(bytes[0] == (uint8_t)i && memcmp(bytes, bytes + 1, 3071) == 0, "page %u", i);
    }
    kv_give(&space, n, pages);
    cr_expect_eq(kv_pool_used_bytes(pool), 0);
    kv_pool_free(pool);
}

Test(kv, takes_all_or_none)
{
    struct kv_pool *pool = make_pool(2);
    struct kv_space space;
    void *pages[2 * KV_SLAB_BYTES / PAGE + 1], *more[512];
    uint32_t most = 2 * KV_SLAB_BYTES / PAGE;

    kv_space_init(&space, pool, PAGE);
    cr_expect_eq(kv_take(&space, most + 1, pages), -ENOSPC);
    cr_assert_eq(kv_take(&space, most - 100, pages), 0);
    cr_expect_eq(kv_take(&space, 101, more), -EAGAIN);
    cr_expect_eq(kv_pool_used_bytes(pool), (most - 100) * PAGE);
    cr_expect_eq(kv_take(&space, 100, more), 0);
    cr_expect_eq(kv_take(&space, 1, more + 100), -EAGAIN);
    kv_give(&space, 100, more);
    cr_expect_eq(kv_take(&space, 100, more), 0);
    kv_give(&space, 100, more);
    kv_give(&space, most - 100, pages);
    kv_pool_free(pool);
}

/* What one model gives back another can have, in pages of its own size. */
Test(kv, empty_slabs_change_hands)
{
    struct kv_pool *pool = make_pool(4);
    struct kv_space small, large;
    void *pages[4 * KV_SLAB_BYTES / PAGE], *big[4];
    uint32_t most = ELEMENTSOF(pages);

    kv_space_init(&small, pool, PAGE);
    kv_space_init(&large, pool, KV_SLAB_BYTES);
    for (uint32_t round = 0; round < 3; round++) {
        cr_assert_eq(kv_take(&small, most, pages), 0);
        cr_expect_eq(kv_take(&large, 1, big), -EAGAIN);
        kv_give(&small, most, pages);
        cr_assert_eq(kv_take(&large, 4, big), 0);
        cr_expect_eq(kv_take(&small, 1, pages), -EAGAIN);
        kv_give(&large, 4, big);
    }
    cr_expect_eq(kv_pool_used_bytes(pool), 0);
    kv_pool_free(pool);
}

/* A page larger than a slab lies in adjacent ones, and waits until enough of them are free. */
Test(kv, large_pages_span_adjacent_slabs)
{
    struct kv_pool *pool = make_pool(5);
    struct kv_space large, small;
    const size_t bytes = 2 * (size_t)KV_SLAB_BYTES + 64;
    void *page[2], *single[3];

    kv_space_init(&large, pool, bytes);
    kv_space_init(&small, pool, KV_SLAB_BYTES);
    cr_expect_eq(kv_take(&large, 2, page), -ENOSPC);
    cr_assert_eq(kv_take(&large, 1, page), 0);
    memset(page[0], 7, bytes);
    cr_assert_eq(kv_take(&small, 2, single), 0);
    memset(single[0], 8, KV_SLAB_BYTES);
    memset(single[1], 9, KV_SLAB_BYTES);
    cr_expect_eq(((uint8_t *)page[0])[bytes - 1], 7);
    kv_give(&large, 1, page);
    cr_assert_eq(kv_take(&small, 1, &single[2]), 0); /* now no three in a row are free */
    cr_expect_eq(kv_take(&large, 1, page), -EAGAIN);
    kv_give(&small, 1, &single[2]);
    cr_expect_eq(kv_take(&large, 1, page), 0);
    kv_give(&large, 1, page);
    kv_give(&small, 2, single);
    kv_pool_free(pool);
}

/* Bytes of the pages' memory that are really there. */
static uint64_t resident(void *memory, size_t bytes)
{
    unsigned char here[16384];
    uint64_t n = 0;

    cr_assert_leq(bytes / 4096, sizeof(here));
    cr_assert_eq(mincore(memory, bytes, here), 0);
    for (size_t i = 0; i < bytes / 4096; i++)
        n += here[i] & 1;
    return n * 4096;
}

/* Taking touches nothing; of what was used and is free again only some slabs keep their memory. */
Test(kv, memory_comes_with_use_and_goes_with_a_burst)
{
    const uint32_t n = KV_KEPT_SLABS + 14;
    struct kv_pool *pool = make_pool(n);
    struct kv_space space;
    void *pages[KV_KEPT_SLABS + 14], *lowest;

    kv_space_init(&space, pool, KV_SLAB_BYTES);
    cr_assert_eq(kv_take(&space, n, pages), 0);
    lowest = pages[0];
    cr_expect_leq(resident(lowest, (size_t)n * KV_SLAB_BYTES), 4096);
    for (uint32_t i = 0; i < n; i++)
        memset(pages[i], 1, KV_SLAB_BYTES);
    cr_expect_eq(resident(lowest, (size_t)n * KV_SLAB_BYTES), (uint64_t)n * KV_SLAB_BYTES);
    kv_give(&space, n, pages);
    cr_expect_leq(resident(lowest, (size_t)n * KV_SLAB_BYTES),
                  (uint64_t)KV_KEPT_SLABS * KV_SLAB_BYTES);
    cr_expect_geq(resident(lowest, (size_t)n * KV_SLAB_BYTES),
                  (uint64_t)(KV_KEPT_SLABS - 1) * KV_SLAB_BYTES);
    cr_assert_eq(kv_take(&space, n, pages), 0);
    kv_give(&space, n, pages);
    kv_pool_free(pool);
}

/* Random taking and giving of several spaces: nothing is given twice, everything comes back. */
Test(kv, random_use_keeps_the_books)
{
    static const size_t sizes[] = {64, 2048, 100032, 3u << 20};
    struct kv_pool *pool = make_pool(16);
    struct kv_space spaces[4];
    struct {
        void *pages[8];
        uint32_t n, space;
    } held[200] = {0};
    uint64_t state = 3, used = 0, of_spaces;

    for (uint32_t i = 0; i < 4; i++)
        kv_space_init(&spaces[i], pool, sizes[i]);
    for (uint32_t round = 0; round < 200000; round++) {
        state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
        uint32_t slot = (state >> 33) % ELEMENTSOF(held), space = (state >> 45) % 4;
        uint32_t n = 1 + (state >> 50) % 8;

        if (held[slot].n > 0) {
            for (uint32_t i = 0; i < held[slot].n; i++)
                cr_assert_eq(*(uint32_t *)held[slot].pages[i], slot, "round %u", round);
            kv_give(&spaces[held[slot].space], held[slot].n, held[slot].pages);
            used -= held[slot].n * sizes[held[slot].space];
            held[slot].n = 0;
        } else if (kv_take(&spaces[space], n, held[slot].pages) == 0) {
            for (uint32_t i = 0; i < n; i++)
                *(uint32_t *)held[slot].pages[i] = slot;
            held[slot].n = n;
            held[slot].space = space;
            used += n * sizes[space];
        }
        cr_assert_eq(kv_pool_used_bytes(pool), used);
        of_spaces = 0;
        for (uint32_t i = 0; i < 4; i++)
            of_spaces += atomic_load(&spaces[i].used_bytes);
        cr_assert_eq(of_spaces, used, "what the spaces have is what the pool gave");
    }
    for (uint32_t i = 0; i < ELEMENTSOF(held); i++)
        if (held[i].n > 0)
            kv_give(&spaces[held[i].space], held[i].n, held[i].pages);
    cr_expect_eq(kv_pool_used_bytes(pool), 0);
    kv_pool_free(pool);
}
