/* An arena: the memory of one model's weights, and what it leaves to a successor.
 *
 * New memory is a large part of what a load costs: the kernel clears each page, and on a virtual
 * machine the host may have to find it first. A model that goes may leave its memory to one that
 * comes instead: the pages are moved into the successor's arena as they are, without copying or
 * clearing. So a new arena holds zeros in its new part and a former model's weights in the other:
 * whoever fills it writes every byte, padding included, before anybody reads it; what lies beyond
 * the arena's bytes in its last page is cleared here.
 *
 * A legacy is whole runs of 2 MiB from an address that is a multiple of it, so that huge pages stay
 * huge; the rest is given back.
 *
 * Hides mappings, page sizes, how pages move. Threads: each arena and each legacy has one owner at
 * a time; the functions may wait for the kernel for tens of milliseconds a gigabyte, so they are
 * not for the reactor. */
#ifndef HEARTH_ENGINE_ARENA_H
#define HEARTH_ENGINE_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena {
    uint8_t *memory; /* NULL: none */
    size_t bytes;
    size_t recycled_bytes; /* of these, from its beginning, a predecessor's */
};

/* Memory of a model that is gone, for one that comes. */
struct arena_legacy {
    uint8_t *at;
    size_t bytes;
};

/* An arena of `bytes` > 0, aligned to 2 MiB. `huge`: its new part should come in huge pages.
 * `legacy` (may be NULL) is taken over: as much of it as fits becomes the arena's beginning, or
 * none where the kernel does not move it. -ENOMEM. */
int arena_init(struct arena *arena, size_t bytes, bool huge, struct arena_legacy *legacy);
/* It is filled: the kernel may gather its small pages to huge ones. */
void arena_settle(const struct arena *arena);
/* Gives all memory back. */
void arena_done(struct arena *arena);
/* The same, but up to `most` bytes are left to a successor; NULL: nothing is. */
struct arena_legacy *arena_leave(struct arena *arena, size_t most);
/* Gives it back. Returns NULL. */
struct arena_legacy *arena_legacy_free(struct arena_legacy *legacy);

#endif
