/* Under ThreadSanitizer: jobs of every size one after another on a compute team, some after a rest
 * long enough for the helpers to sleep. What chunks write without locks the caller reads. */
#include <assert.h>
#include <stdio.h>
#include <unistd.h>

#include "daemon/engine/team.h"

#define JOBS   20000u
#define CHUNKS 61u
/* A rest after every so many jobs, longer than helpers spin. */
#define REST_EVERY 500u
#define REST_US    2000u

struct work {
    uint32_t cells[CHUNKS];
    uint32_t round;
};

static void add_round(void *arg, uint32_t chunk, uint32_t thread)
{
    struct work *work = arg;

    (void)thread;
    work->cells[chunk] += work->round;
}

int main(void)
{
    struct team *team = NULL;
    struct work work = {0};
    uint32_t expected[CHUNKS] = {0};

    assert(team_new(4, &team, NULL) == 0);
    for (work.round = 1; work.round <= JOBS; work.round++) {
        uint32_t n = 1 + work.round % CHUNKS;

        team_run(team, add_round, &work, n);
        for (uint32_t i = 0; i < n; i++) {
            expected[i] += work.round;
            assert(work.cells[i] == expected[i]);
        }
        if (work.round % REST_EVERY == 0)
            usleep(REST_US);
    }
    printf("%u jobs on %u threads\n", JOBS, team_threads(team));
    team_free(team);
    return 0;
}
