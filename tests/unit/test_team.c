/* Team: every chunk once, results seen by the caller, any number of jobs one after another. */
#include <criterion/criterion.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "daemon/engine/team.h"
#include "lib/cleanup.h"

#define CHUNKS 1000u

struct work {
    uint32_t times[CHUNKS];
    uint32_t round;
    uint32_t n_threads;
};

static void mark(void *arg, uint32_t chunk, uint32_t thread)
{
    struct work *work = arg;

    cr_assert_lt(thread, work->n_threads);
    work->times[chunk] += work->round;
}

static struct team *make_team(uint32_t threads)
{
    struct team *team = NULL;

    cr_assert_eq(team_new(threads, &team, NULL), 0);
    return team;
}

Test(team, does_every_chunk_once)
{
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct team *team = make_team(threads);
        struct work work = {.n_threads = team_threads(team)};
        uint32_t expected = 0;

        for (work.round = 1; work.round <= 300; work.round++) {
            uint32_t n = 1 + work.round * 37 % CHUNKS;

            memset(work.times, 0, sizeof(work.times));
            team_run(team, mark, &work, n);
            expected = work.round;
            for (uint32_t i = 0; i < CHUNKS; i++)
                cr_assert_eq(work.times[i], i < n ? expected : 0);
        }
        team_free(team);
    }
}

/* Helpers that have gone to sleep wake up for the next job. */
Test(team, goes_on_after_a_rest)
{
    struct team *team = make_team(2);
    struct work work = {.round = 1, .n_threads = team_threads(team)};

    for (uint32_t i = 1; i <= 20; i++) {
        usleep(3000);
        team_run(team, mark, &work, CHUNKS);
        cr_assert_eq(work.times[CHUNKS - 1], i);
    }
    team_free(team);
}

Test(team, is_never_larger_than_the_cpus_allowed)
{
    cpu_set_t one, before;
    struct team *team;

    cr_assert_eq(sched_getaffinity(0, sizeof(before), &before), 0);
    CPU_ZERO(&one);
    for (uint32_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &before)) {
            CPU_SET(cpu, &one);
            break;
        }
    cr_assert_eq(sched_setaffinity(0, sizeof(one), &one), 0);
    team = make_team(8);
    cr_expect_eq(team_threads(team), 1);
    cr_expect_eq(team_min_us(team), 0);
    team_free(team);
    cr_assert_eq(sched_setaffinity(0, sizeof(before), &before), 0);
    team = make_team(1000000);
    cr_expect_leq(team_threads(team), TEAM_MAX_THREADS);
    cr_expect_leq(team_threads(team), (uint32_t)CPU_COUNT(&before));
    team_free(team);
}
