#include "daemon/model/holds.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "daemon/model/registry.h"
#include "lib/hash.h"

/* Without padding, for it is compared as bytes. */
struct hold_key {
    struct model_entry *entry;
    uint64_t uid;
};
static_assert(sizeof(struct hold_key) == sizeof(void *) + sizeof(uint64_t), "no padding");

/* Gone with its last hold. */
struct hold_row {
    struct hold_key key;
    uint32_t n;
    UT_hash_handle hh;
};

struct holds {
    struct hold_row *rows;
};

static struct hold_key key_of(const struct model_entry *entry, uint32_t uid)
{
    return (struct hold_key){.entry = (struct model_entry *)entry, .uid = uid};
}

static struct hold_row *find_row(const struct holds *holds, const struct model_entry *entry,
                                 uint32_t uid)
{
    struct hold_key key = key_of(entry, uid);
    struct hold_row *row;

    HASH_FIND(hh, holds->rows, &key, sizeof(key), row);
    return row;
}

int holds_new(struct holds **ret_holds)
{
    struct holds *holds = calloc(1, sizeof(*holds));

    if (!holds)
        return -ENOMEM;
    *ret_holds = holds;
    return 0;
}

struct holds *holds_free(struct holds *holds)
{
    struct hold_row *row, *next;

    if (!holds)
        return NULL;
    HASH_ITER (hh, holds->rows, row, next) {
        HASH_DEL(holds->rows, row);
        free(row);
    }
    free(holds);
    return NULL;
}

int holds_take(struct holds *holds, struct model_entry *entry, uint32_t uid)
{
    struct hold_row *row = find_row(holds, entry, uid);

    if (!row) {
        row = calloc(1, sizeof(*row));
        if (!row)
            return -ENOMEM;
        row->key = key_of(entry, uid);
        HASH_ADD(hh, holds->rows, key, sizeof(row->key), row);
        if (!hash_added(&row->hh)) {
            free(row);
            return -ENOMEM;
        }
    }
    row->n++;
    entry->holds++;
    return 0;
}

void holds_give(struct holds *holds, struct model_entry *entry, uint32_t uid)
{
    struct hold_row *row = find_row(holds, entry, uid);

    assert(row && row->n > 0 && entry->holds > 0);
    entry->holds--;
    if (--row->n > 0)
        return;
    HASH_DEL(holds->rows, row);
    free(row);
}

uint32_t holds_of(const struct holds *holds, uint32_t uid)
{
    uint32_t n = 0;

    for (const struct hold_row *row = holds->rows; row; row = row->hh.next)
        if (row->key.uid == uid)
            n += row->n;
    return n;
}

bool holds_by_others(const struct holds *holds, const struct model_entry *entry, uint32_t uid)
{
    const struct hold_row *own = find_row(holds, entry, uid);

    return entry->holds > (own ? own->n : 0);
}

uint64_t holds_bytes(const struct holds *holds, uint32_t uid)
{
    uint64_t bytes = 0;

    for (const struct hold_row *row = holds->rows; row; row = row->hh.next) {
        const struct model_entry *entry = row->key.entry;
        if (row->key.uid == uid && row->n == entry->holds && !entry->pinned)
            bytes += registry_need_bytes(entry);
    }
    return bytes;
}
