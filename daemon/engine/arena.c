#include "daemon/engine/arena.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* A huge page of every processor that this runs on. */
#define HUGE_BYTES ((size_t)2 << 20)

static size_t down_to_huge(size_t bytes)
{
    return bytes & ~(HUGE_BYTES - 1);
}

static size_t up_to_page(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    return (bytes + page - 1) & ~(page - 1);
}

/* Whole pages without memory behind them yet, from a multiple of HUGE_BYTES on. NULL: none. */
static uint8_t *map_aligned(size_t bytes, int protection)
{
    size_t before;
    uint8_t *at;

    if (bytes > SIZE_MAX / 2)
        return NULL;
    at = mmap(NULL, bytes + HUGE_BYTES, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return NULL;
    before = -(uintptr_t)at & (HUGE_BYTES - 1);
    if (before > 0)
        munmap(at, before);
    if (before < HUGE_BYTES)
        munmap(at + before + bytes, HUGE_BYTES - before);
    return at + before;
}

/* Moves the legacy to a place with room for `whole` bytes, where it grows or shrinks to as many;
 * NULL: it is as it was. */
static uint8_t *move(const struct arena_legacy *legacy, size_t whole)
{
    uint8_t *to = map_aligned(whole, PROT_NONE);

    /* Where that fails the kernel may have dropped the place first, and another thread may have got
     * it: it is left alone, which costs addresses and no memory. */
    if (to && mremap(legacy->at, legacy->bytes, whole, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
        return to;
    return NULL;
}

int arena_init(struct arena *arena, size_t bytes, bool huge, struct arena_legacy *legacy)
{
    size_t whole = up_to_page(bytes), old = 0;
    uint8_t *memory = NULL;

    assert(bytes > 0);
    *arena = (struct arena){0};
    if (legacy && whole >= bytes)
        memory = move(legacy, whole);
    if (memory) {
        old = MIN(legacy->bytes, whole);
        legacy->bytes = 0; /* the arena's now, or given back */
    }
    arena_legacy_free(legacy);
    if (!memory && whole >= bytes)
        memory = map_aligned(whole, PROT_READ | PROT_WRITE);
    if (!memory)
        return -ENOMEM;
    /* Huge pages mean fewer TLB misses, but clearing one keeps a CPU for milliseconds. Refused, it
     * is only slower. */
    if (old < whole)
        (void)madvise(memory + old, whole - old, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    else
        memset(memory + bytes, 0, whole - bytes);
    *arena = (struct arena){.memory = memory, .bytes = bytes, .recycled_bytes = MIN(old, bytes)};
    return 0;
}

void arena_settle(const struct arena *arena)
{
    (void)madvise(arena->memory, up_to_page(arena->bytes), MADV_HUGEPAGE);
}

void arena_done(struct arena *arena)
{
    arena_leave(arena, 0);
}

struct arena_legacy *arena_leave(struct arena *arena, size_t most)
{
    size_t whole = up_to_page(arena->bytes), kept = down_to_huge(MIN(whole, most));
    struct arena_legacy *legacy = kept > 0 ? malloc(sizeof(*legacy)) : NULL;

    if (legacy)
        *legacy = (struct arena_legacy){.at = arena->memory, .bytes = kept};
    else
        kept = 0;
    if (kept < whole)
        munmap(arena->memory + kept, whole - kept);
    *arena = (struct arena){0};
    return legacy;
}

struct arena_legacy *arena_legacy_free(struct arena_legacy *legacy)
{
    if (legacy && legacy->bytes > 0)
        munmap(legacy->at, legacy->bytes);
    free(legacy);
    return NULL;
}
