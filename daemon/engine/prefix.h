/* Prefixes: what one sequence computed, for others that begin with the same ids.
 *
 * A prefix is one tile: the pages of all layers for 16 positions, known by the tile before it (its
 * parent), its 16 ids, its model and its owner. A chain of them from position 0 is the beginning of
 * a text. Only whole tiles are shared, so nobody ever writes into one that another reads.
 *
 * A sequence registers the whole tiles of its prompt when it begins and makes them; others see them
 * once they are computed. A tile that no sequence uses stays until its memory is wanted, the one
 * longest unused first. Users of a tile are users of its parent too and are let go from the far
 * end, so that of all unused tiles no parent is older than its children: evicting the oldest never
 * leaves a chain without its beginning. Bounded by the KV budget, as each holds pages of it.
 *
 * For the engine's own files. Thread: the engine thread. */
#ifndef HEARTH_ENGINE_PREFIX_H
#define HEARTH_ENGINE_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/kernels.h"

struct kv_account;
struct model;
struct prefix;
struct sequence;

struct prefix_cache {
    struct prefix **buckets; /* NULL until the first is kept */
    size_t n_buckets;        /* a power of two */
    size_t n_prefixes;
    struct prefix *oldest, *newest; /* unused ones */
    uint64_t unused_bytes;          /* of their pages */
};

struct prefix {
    struct prefix *next; /* in its bucket */
    struct prefix *parent;
    struct prefix *older, *newer; /* while unused */
    struct model *model;
    const struct sequence *maker; /* is computing it; NULL: it is there */
    uint64_t hash;
    uint32_t owner, tile;     /* its place in the chain */
    uint32_t n_users;         /* sequences */
    struct kv_account *payer; /* while used */
    int32_t ids[KV_TILE];
    void *pages[]; /* one a layer */
};

/* All that is left, when no sequence is. */
void prefix_cache_done(struct prefix_cache *cache);

/* The tile of these 16 ids after `parent`, or NULL. `ret_hash` is what prefix_insert() wants. */
struct prefix *prefix_find(const struct prefix_cache *cache, const struct model *model,
                           uint32_t owner, const struct prefix *parent, const int32_t *ids,
                           uint64_t *ret_hash);
/* A new one with one user, which owns the pages from now on: every `stride`-th of `pages`, already
 * counted at the payer. NULL: no memory. */
struct prefix *prefix_insert(struct prefix_cache *cache, struct model *model, uint32_t owner,
                             struct prefix *parent, const int32_t *ids, uint64_t hash,
                             const struct sequence *maker, struct kv_account *payer,
                             void *const *pages, size_t stride);
/* One user more, who pays where there was none. */
void prefix_use(struct prefix_cache *cache, struct prefix *prefix, struct kv_account *payer);
/* One user less, of `last` and all before it. Those that were not computed are gone with their
 * maker. */
void prefix_let_go(struct prefix_cache *cache, struct prefix *last);
/* Gives back unused ones, the oldest first, until `bytes` have come free. False: there was none. */
bool prefix_reclaim(struct prefix_cache *cache, uint64_t bytes);
/* Gives back all of a model without sequences. */
void prefix_forget(struct prefix_cache *cache, const struct model *model);

#endif
