/* The compute team: the engine thread and its helpers on one loop at a time.
 *
 * A job is a loop over n chunks; whoever is there takes chunks from a counter until none is left,
 * so a helper on a busy core, or one still waking up, holds nobody up beyond the chunk it has
 * begun. Helpers spin briefly for the next job and then sleep; none is pinned. Jobs are for work
 * well above team_min_us(): below it the engine thread is faster alone.
 *
 * Hides: threads, the counter, futexes. Thread: team_run() is the engine thread's. */
#ifndef HEARTH_ENGINE_TEAM_H
#define HEARTH_ENGINE_TEAM_H

#include <stdint.h>

#include "lib/fault.h"

/* More helpers are no help to memory-bound work, and each costs a barrier. */
#define TEAM_MAX_THREADS 64u
/* Chunks of one job; the counter has room for more. */
#define TEAM_MAX_CHUNKS (1u << 20)

struct team;

/* Does chunk number `chunk`; `thread` (0: the engine thread) chooses the scratch memory. */
typedef void (*team_fn)(void *arg, uint32_t chunk, uint32_t thread);

/* `threads`, the caller included, is cut to the CPUs this process may run on. -ENOMEM, -EAGAIN. */
int team_new(uint32_t threads, struct team **ret_team, struct fault *ret_fault);
/* Helpers end before it returns. */
struct team *team_free(struct team *team);
uint32_t team_threads(const struct team *team);

/* Runs fn for every chunk 0..n_chunks-1 and returns when all are done; what helpers wrote is then
 * visible to the caller. */
void team_run(struct team *team, team_fn fn, void *arg, uint32_t n_chunks);

/* What one job of the whole team costs beyond its work here, measured once at team_new(): jobs
 * expected to take less than a few times this are done faster alone. 0 for a team of one. */
uint32_t team_min_us(const struct team *team);

#endif
