/* What failover.c needs of a pool beside its public calls: counting, and saying why a call failed.
 * Not installed, not exported.
 *
 * Hides: the pool's lock. Thread: any. */
#ifndef HEARTH_LIB_POOL_H
#define HEARTH_LIB_POOL_H

#include "lib/hearth.h"

void pool_count_failover(struct hearth_pool *pool);
void pool_set_message(struct hearth_pool *pool, const char *sentence);

#endif
