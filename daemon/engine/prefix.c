#include "daemon/engine/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/model.h"

/* The table begins so large and doubles when there are as many prefixes as buckets. */
#define FIRST_BUCKETS 256u

/* ---- the table ---- */

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

/* Of the chain up to these ids: the parent's hash stands for all before. */
static uint64_t chain_hash(const struct model *model, uint32_t owner, const struct prefix *parent,
                           const int32_t *ids)
{
    uint64_t hash = parent ? parent->hash : mix((uintptr_t)model, owner);

    for (uint32_t i = 0; i < KV_TILE; i += 2) {
        uint64_t pair;

        memcpy(&pair, ids + i, sizeof(pair));
        hash = mix(hash, pair);
    }
    return mix(hash, KV_TILE);
}

static struct prefix **bucket_of(const struct prefix_cache *cache, uint64_t hash)
{
    return &cache->buckets[hash & (cache->n_buckets - 1)];
}

/* Room for one more. A table that cannot grow gets longer chains. */
static bool table_reach(struct prefix_cache *cache)
{
    struct prefix_cache larger = {
        .n_buckets = cache->buckets ? 2 * cache->n_buckets : FIRST_BUCKETS,
    };

    if (cache->buckets && cache->n_prefixes < cache->n_buckets)
        return true;
    larger.buckets = calloc(larger.n_buckets, sizeof(*larger.buckets));
    if (!larger.buckets)
        return cache->buckets != NULL;
    for (size_t i = 0; i < cache->n_buckets; i++)
        for (struct prefix *p = cache->buckets[i], *next; p; p = next) {
            struct prefix **bucket = bucket_of(&larger, p->hash);

            next = p->next;
            p->next = *bucket;
            *bucket = p;
        }
    free(cache->buckets);
    cache->buckets = larger.buckets;
    cache->n_buckets = larger.n_buckets;
    return true;
}

struct prefix *prefix_find(const struct prefix_cache *cache, const struct model *model,
                           uint32_t owner, const struct prefix *parent, const int32_t *ids,
                           uint64_t *ret_hash)
{
    uint64_t hash = chain_hash(model, owner, parent, ids);

    *ret_hash = hash;
    if (!cache->buckets)
        return NULL;
    for (struct prefix *p = *bucket_of(cache, hash); p; p = p->next)
        if (p->hash == hash && p->parent == parent && p->model == model && p->owner == owner &&
            memcmp(p->ids, ids, sizeof(p->ids)) == 0)
            return p;
    return NULL;
}

struct prefix *prefix_insert(struct prefix_cache *cache, struct model *model, uint32_t owner,
                             struct prefix *parent, const int32_t *ids, uint64_t hash,
                             const struct sequence *maker, struct kv_account *payer,
                             void *const *pages, size_t stride)
{
    uint32_t n_layers = model->hparams.n_layers;
    struct prefix *prefix, **bucket;

    if (!table_reach(cache))
        return NULL;
    prefix = malloc(sizeof(*prefix) + n_layers * sizeof(prefix->pages[0]));
    if (!prefix)
        return NULL;
    bucket = bucket_of(cache, hash);
    *prefix = (struct prefix){
        .next = *bucket,
        .parent = parent,
        .model = model,
        .maker = maker,
        .hash = hash,
        .owner = owner,
        .tile = parent ? parent->tile + 1 : 0,
        .n_users = 1,
        .payer = payer,
    };
    memcpy(prefix->ids, ids, sizeof(prefix->ids));
    for (uint32_t layer = 0; layer < n_layers; layer++)
        prefix->pages[layer] = pages[layer * stride];
    *bucket = prefix;
    cache->n_prefixes++;
    model->n_prefixes++;
    return prefix;
}

/* ---- unused ones ---- */

static uint64_t tile_bytes(const struct model *model)
{
    return (uint64_t)model->hparams.n_layers * model->kv.page_bytes;
}

static void unused_append(struct prefix_cache *cache, struct prefix *prefix)
{
    prefix->newer = NULL;
    prefix->older = cache->newest;
    if (cache->newest)
        cache->newest->newer = prefix;
    else
        cache->oldest = prefix;
    cache->newest = prefix;
    cache->unused_bytes += tile_bytes(prefix->model);
}

static void unused_remove(struct prefix_cache *cache, struct prefix *prefix)
{
    if (prefix->older)
        prefix->older->newer = prefix->newer;
    else
        cache->oldest = prefix->newer;
    if (prefix->newer)
        prefix->newer->older = prefix->older;
    else
        cache->newest = prefix->older;
    cache->unused_bytes -= tile_bytes(prefix->model);
}

/* Gives the pages back and forgets it; in no list but its bucket's. */
static void prefix_drop(struct prefix_cache *cache, struct prefix *prefix)
{
    struct model *model = prefix->model;
    struct prefix **at;

    for (at = bucket_of(cache, prefix->hash); *at != prefix; at = &(*at)->next)
        ;
    *at = prefix->next;
    cache->n_prefixes--;
    model->n_prefixes--;
    kv_give(&model->kv, model->hparams.n_layers, prefix->pages);
    free(prefix);
}

void prefix_use(struct prefix_cache *cache, struct prefix *prefix, struct kv_account *payer)
{
    assert(!prefix->maker);
    if (prefix->n_users++ > 0)
        return;
    unused_remove(cache, prefix);
    prefix->payer = payer;
    payer->bytes += tile_bytes(prefix->model);
}

void prefix_let_go(struct prefix_cache *cache, struct prefix *last)
{
    for (struct prefix *prefix = last, *parent; prefix; prefix = parent) {
        parent = prefix->parent;
        assert(prefix->n_users > 0);
        if (--prefix->n_users > 0)
            continue;
        prefix->payer->bytes -= tile_bytes(prefix->model);
        if (prefix->maker)
            prefix_drop(cache, prefix);
        else
            unused_append(cache, prefix);
    }
}

static void drop_unused(struct prefix_cache *cache, struct prefix *prefix)
{
    unused_remove(cache, prefix);
    prefix_drop(cache, prefix);
}

bool prefix_reclaim(struct prefix_cache *cache, uint64_t bytes)
{
    uint64_t freed = 0;

    if (!cache->oldest)
        return false;
    while (cache->oldest && freed < bytes) {
        freed += tile_bytes(cache->oldest->model);
        drop_unused(cache, cache->oldest);
    }
    return true;
}

void prefix_forget(struct prefix_cache *cache, const struct model *model)
{
    assert(model->n_sequences == 0);
    for (struct prefix *p = cache->oldest, *newer; p && model->n_prefixes > 0; p = newer) {
        newer = p->newer;
        if (p->model == model)
            drop_unused(cache, p);
    }
    assert(model->n_prefixes == 0);
}

void prefix_cache_done(struct prefix_cache *cache)
{
    prefix_reclaim(cache, UINT64_MAX);
    assert(cache->n_prefixes == 0);
    free(cache->buckets);
    cache->buckets = NULL;
    cache->n_buckets = 0;
}
