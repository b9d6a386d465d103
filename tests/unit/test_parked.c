#include <criterion/criterion.h>
#include <errno.h>

#include "fs/parked.h"

static struct parked_list list;

Test(parked, blocked_readers_of_one_uid_are_bounded_and_others_have_room)
{
    static struct parked readers[PARKED_LONG_PER_UID_MAX + 1], other;

    for (unsigned i = 0; i < PARKED_LONG_PER_UID_MAX; i++) {
        readers[i] = (struct parked){.uid = 1000, .is_long = true};
        cr_assert(parked_add(&list, &readers[i]) == 0);
    }
    readers[PARKED_LONG_PER_UID_MAX] = (struct parked){.uid = 1000, .is_long = true};
    cr_assert(parked_add(&list, &readers[PARKED_LONG_PER_UID_MAX]) == -EAGAIN);
    other = (struct parked){.uid = 1001, .is_long = true};
    cr_assert(parked_add(&list, &other) == 0);
    parked_remove(&list, &readers[3]);
    cr_assert(parked_add(&list, &readers[PARKED_LONG_PER_UID_MAX]) == 0);
}

Test(parked, short_waits_have_bounds_of_their_own)
{
    static struct parked waits[PARKED_MAX + 1];

    for (unsigned i = 0; i < PARKED_PER_UID_MAX; i++) {
        waits[i] = (struct parked){.uid = 1000};
        cr_assert(parked_add(&list, &waits[i]) == 0);
    }
    waits[PARKED_MAX] = (struct parked){.uid = 1000};
    cr_assert(parked_add(&list, &waits[PARKED_MAX]) == -EAGAIN, "one user takes all the room");
    for (unsigned i = PARKED_PER_UID_MAX; i < PARKED_MAX; i++) {
        waits[i] = (struct parked){.uid = 1001};
        cr_assert(parked_add(&list, &waits[i]) == 0);
    }
    waits[PARKED_MAX].uid = 1002;
    cr_assert(parked_add(&list, &waits[PARKED_MAX]) == -EAGAIN);
    parked_remove(&list, &waits[0]);
    cr_assert(parked_add(&list, &waits[PARKED_MAX]) == 0);
}

Test(parked, the_first_who_may_not_wait_any_longer_is_known)
{
    struct parked late = {.until_us = 30}, early = {.until_us = 10}, held = {.is_long = true};

    cr_assert(parked_due_us(&list) == UINT64_MAX);
    cr_assert(parked_add(&list, &held) == 0);
    cr_assert(parked_due_us(&list) == UINT64_MAX, "a long wait is due by itself");
    cr_assert(parked_add(&list, &late) == 0);
    cr_assert(parked_add(&list, &early) == 0);
    cr_assert(parked_due_us(&list) == 10);
    parked_remove(&list, &early);
    cr_assert(parked_due_us(&list) == 30);
}

Test(parked, the_newest_wish_decides_what_is_asked_for)
{
    struct parked old = {.since_us = 10}, young = {.since_us = 30}, middle = {.since_us = 20};

    cr_assert(parked_since_us(&list) == 0);
    cr_assert(parked_add(&list, &old) == 0);
    cr_assert(parked_add(&list, &young) == 0);
    cr_assert(parked_add(&list, &middle) == 0);
    cr_assert(parked_since_us(&list) == 30);
    parked_remove(&list, &young);
    cr_assert(parked_since_us(&list) == 20);
    parked_remove(&list, &old);
    parked_remove(&list, &middle);
    cr_assert(parked_since_us(&list) == 0 && list.n == 0);
}

Test(parked, knows_whether_anybody_waits_for_more_than_the_next_copy)
{
    struct parked brief = {.since_us = 1}, blocked = {.is_long = true};

    cr_assert(!parked_any_long(&list));
    cr_assert(parked_add(&list, &brief) == 0);
    cr_assert(!parked_any_long(&list));
    cr_assert(parked_add(&list, &blocked) == 0);
    cr_assert(parked_any_long(&list));
}
