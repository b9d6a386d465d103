#include "fs/parked.h"

#include <errno.h>
#include <utlist.h>

#include "lib/cleanup.h"

static size_t count_long(const struct parked_list *list, uid_t uid)
{
    const struct parked *parked;
    size_t n = 0;

    DL_FOREACH (list->first, parked)
        n += parked->is_long && parked->uid == uid;
    return n;
}

static size_t count(const struct parked_list *list, uid_t uid)
{
    const struct parked *parked;
    size_t n = 0;

    DL_FOREACH (list->first, parked)
        n += parked->uid == uid;
    return n;
}

int parked_add(struct parked_list *list, struct parked *parked)
{
    if (list->n >= PARKED_MAX)
        return -EAGAIN;
    /* Counting them only where it could matter keeps waiting cheap. */
    if (list->n >= PARKED_PER_UID_MAX && count(list, parked->uid) >= PARKED_PER_UID_MAX)
        return -EAGAIN;
    if (parked->is_long && count_long(list, parked->uid) >= PARKED_LONG_PER_UID_MAX)
        return -EAGAIN;
    DL_APPEND(list->first, parked);
    list->n++;
    return 0;
}

void parked_remove(struct parked_list *list, struct parked *parked)
{
    DL_DELETE(list->first, parked);
    list->n--;
}

uint64_t parked_since_us(const struct parked_list *list)
{
    const struct parked *parked;
    uint64_t since_us = 0;

    DL_FOREACH (list->first, parked)
        since_us = MAX(since_us, parked->since_us);
    return since_us;
}

uint64_t parked_due_us(const struct parked_list *list)
{
    const struct parked *parked;
    uint64_t due_us = UINT64_MAX;

    DL_FOREACH (list->first, parked)
        if (!parked->is_long)
            due_us = MIN(due_us, parked->until_us);
    return due_us;
}

bool parked_any_long(const struct parked_list *list)
{
    const struct parked *parked;

    DL_FOREACH (list->first, parked)
        if (parked->is_long)
            return true;
    return false;
}
