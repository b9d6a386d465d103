/* Forecasts in virtual time: what is foreseen is never more than what it takes, and not nothing. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "daemon/serve/batcher.h"
#include "daemon/serve/forecast.h"

Test(forecast, says_nothing_before_it_has_measured)
{
    struct forecast forecast = {0};

    for (uint32_t i = 0; i < FORECAST_MIN_STEPS; i++) {
        cr_assert_eq(forecast_us(&forecast, 100000, 1024), 0);
        forecast_step(&forecast, 10, 1000);
    }
    cr_assert_gt(forecast_us(&forecast, 100000, 1024), 0);
    cr_assert_eq(forecast_us(&forecast, 0, 1024), 0, "no work takes no time");
}

Test(forecast, wider_steps_than_any_measured_may_cost_no_more)
{
    struct forecast forecast = {0};

    for (int i = 0; i < 20; i++)
        forecast_step(&forecast, 1, 8000); /* all of it may be reading weights */
    cr_assert_eq(forecast_us(&forecast, 1, 1024), 8000);
    cr_assert_eq(forecast_us(&forecast, 1024, 1024), 8000);
    cr_assert_eq(forecast_us(&forecast, 10240, 1024), 80000);
    for (int i = 0; i < 20; i++)
        forecast_step(&forecast, 1024, 100000);
    cr_assert_eq(forecast_us(&forecast, 10240, 1024), 1000000, "measured now");
    cr_assert_eq(forecast_us(&forecast, 1, 1024), 8000);
}

Test(forecast, the_best_that_was_measured_counts_and_fades)
{
    struct forecast forecast = {0};

    for (int i = 0; i < 50; i++)
        forecast_step(&forecast, 100, i == 20 ? 1000 : 5000);
    cr_assert_lt(forecast_us(&forecast, 100, 128), 2500, "one good step is enough to be careful");
    for (int i = 0; i < 1000; i++)
        forecast_step(&forecast, 100, 5000);
    cr_assert_gt(forecast_us(&forecast, 100, 128), 3000, "but not for ever");
}

/* ---- the batcher's foresight, against what then happens ---- */

#define N_JOBS 800u

struct subject {
    struct job job;
    uint32_t tokens; /* it will generate */
    uint32_t kept;   /* of its prompt, tokens that are there already */
    uint64_t added_us, first_us, least_us;
    bool gone;
};

struct simulation {
    struct batcher *batcher;
    struct lane *lanes[2];
    struct subject *subjects;
    uint64_t now_us;
    unsigned random;
    unsigned n_lanes, n_uids;
};

static unsigned next_random(struct simulation *sim, unsigned bound)
{
    sim->random = sim->random * 1103515245u + 12345u;
    return sim->random / 65536 % bound;
}

static int admit(void *userdata, struct job *job)
{
    (void)userdata;
    job->fed = ((struct subject *)job)->kept;
    return 0;
}

/* What a request asks for, by the kind of load. */
static void make(struct simulation *sim, struct subject *s, int load)
{
    uint32_t prompt = 1 + next_random(sim, load == 1 ? 900 : 20), tokens = load == 4 ? 100 : 1;

    if (load == 2)
        tokens = 1 + next_random(sim, 2) * 200;
    *s = (struct subject){.tokens = tokens,
                          .kept = load == 3 && next_random(sim, 2) ? prompt - 1 : 0,
                          .added_us = sim->now_us};
    s->job = (struct job){.lane = sim->lanes[sim->n_lanes > 1 && next_random(sim, 8) == 0],
                          .uid = next_random(sim, sim->n_uids),
                          .priority = next_random(sim, 4) == 0,
                          .arrived_us = sim->now_us,
                          .known = prompt,
                          .least_prompt = load == 3 ? 1 : prompt,
                          .most_tokens = next_random(sim, 2) ? 256 : s->tokens};
}

static void add_some(struct simulation *sim, uint32_t *n, uint32_t upto, int load)
{
    for (; *n < upto && *n < N_JOBS; (*n)++) {
        struct subject *s = &sim->subjects[*n];
        struct foreseen foreseen;
        make(sim, s, load);
        cr_assert_eq(batcher_add(sim->batcher, &s->job), 0);
        foreseen = batcher_foresee(&s->job);
        s->least_us = foreseen.wait_us + foreseen.own_us;
    }
}

/* One step, whose time is fixed + columns, give or take a fifth. */
static bool step(struct simulation *sim)
{
    uint64_t wake_us, us;
    struct lane *lane = batcher_pick(sim->batcher, sim->now_us, &wake_us);
    const struct batch *batch;
    struct subject *in_step[64];
    uint32_t n;

    if (!lane)
        return false;
    cr_assert(batcher_compose(sim->batcher, lane, sim->now_us, &batch));
    n = batch->n_jobs;
    us = (lane == sim->lanes[1] ? 3000 : 300) + batch->n_columns * 20;
    us = us * (80 + next_random(sim, 41)) / 100;
    for (uint32_t i = 0; i < n; i++)
        in_step[i] = (struct subject *)batch->jobs[i];
    batcher_charge(lane, us);
    batcher_close(sim->batcher, lane, us);
    sim->now_us += us;
    for (uint32_t i = 0; i < n; i++) {
        struct subject *s = in_step[i];
        if (s->job.fed < s->job.known)
            continue;
        if (!s->first_us)
            s->first_us = sim->now_us;
        if (++s->job.known - s->job.prompt >= s->tokens) {
            batcher_remove(sim->batcher, &s->job);
            s->gone = true;
        }
    }
    return true;
}

struct outcome {
    uint32_t wrong;  /* would have been refused with the time it then took */
    double foreseen; /* mean of what was foreseen over what it took, of the later half */
};

static struct outcome simulate(int load, unsigned n_lanes, unsigned n_uids, unsigned seed)
{
    struct batcher_options options = {.max_batch = 32,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit};
    struct simulation sim = {
        .now_us = 1000000, .random = seed, .n_lanes = n_lanes, .n_uids = n_uids};
    struct outcome outcome = {0};
    uint32_t n = 0, counted = 0;

    sim.subjects = calloc(N_JOBS, sizeof(*sim.subjects));
    cr_assert_eq(batcher_new(&options, &sim.batcher), 0);
    for (int i = 0; i < 2; i++)
        cr_assert_eq(lane_new(sim.batcher, NULL, &sim.lanes[i]), 0);
    while (n < N_JOBS) { /* bursts, now and then with nothing left of the last */
        add_some(&sim, &n, n + 1 + next_random(&sim, 200), load);
        for (uint32_t i = next_random(&sim, load == 4 ? 600 : 30); i > 0 && step(&sim); i--)
            ;
    }
    while (step(&sim))
        ;
    for (uint32_t i = 0; i < N_JOBS; i++) {
        const struct subject *s = &sim.subjects[i];
        struct foreseen least = {.own_us = s->least_us};
        cr_assert(s->gone && s->first_us);
        outcome.wrong += foreseen_late(&least, s->first_us, s->added_us);
        if (i >= N_JOBS / 2) {
            outcome.foreseen += (double)s->least_us / (double)(s->first_us - s->added_us);
            counted++;
        }
    }
    outcome.foreseen /= counted;
    for (int i = 0; i < 2; i++)
        lane_free(sim.lanes[i]);
    batcher_free(sim.batcher);
    free(sim.subjects);
    return outcome;
}

Test(forecast, no_request_is_refused_that_would_have_been_in_time)
{
    /* What is foreseen at least, where one user has one model: prompts that may be there already
     * and answers of any length say little beforehand. */
    static const struct {
        const char *name;
        double least;
    } loads[] = {{"one token", 0.35},
                 {"long prompts", 0.5},
                 {"long and short answers", 0},
                 {"kept beginnings", 0},
                 {"long answers", 0.15}};

    for (int load = 0; load < 5; load++) {
        for (unsigned users = 1; users <= 3; users++) {
            double foreseen = 0;
            for (unsigned seed = 1; seed <= 6; seed++) {
                struct outcome outcome = simulate(load, users > 1 ? 2 : 1, users, seed);
                cr_expect_eq(outcome.wrong, 0, "%s, %u users, seed %u: %u wrong", loads[load].name,
                             users, seed, outcome.wrong);
                foreseen += outcome.foreseen / 6;
            }
            cr_log_info("%s, %u users: %.2f of the time foreseen", loads[load].name, users,
                        foreseen);
            if (users == 1)
                cr_expect_geq(foreseen, loads[load].least, "%s: only %.2f of the time foreseen",
                              loads[load].name, foreseen);
        }
    }
}

static struct foreseen late_one(struct batcher *batcher, struct lane *lane, uint32_t uid,
                                uint32_t prompt)
{
    struct job job = {
        .lane = lane, .uid = uid, .known = prompt, .least_prompt = prompt, .most_tokens = 1};
    struct foreseen foreseen;

    cr_assert_eq(batcher_add(batcher, &job), 0);
    foreseen = batcher_foresee(&job);
    batcher_remove(batcher, &job);
    return foreseen;
}

/* The numbers of a queue that is known: 10 us a column. */
Test(forecast, counts_the_work_ahead_in_the_fair_order)
{
    struct batcher_options options = {.max_batch = 32,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1000,
                                      .admit = admit};
    struct subject crowd[100];
    struct batcher *batcher;
    struct lane *lane;
    const struct batch *batch;
    struct foreseen foreseen;

    cr_assert_eq(batcher_new(&options, &batcher), 0);
    cr_assert_eq(lane_new(batcher, NULL, &lane), 0);
    foreseen = late_one(batcher, lane, 1, 100);
    cr_assert_eq(foreseen.wait_us + foreseen.own_us, 0, "nothing was measured");
    cr_assert_not(foreseen_late(&foreseen, 1, 1000000));
    for (int i = 0; i < 20; i++) { /* steps of 1000 columns, 10 ms each */
        crowd[0] = (struct subject){.job = {.lane = lane, .uid = 3, .known = 1000}};
        cr_assert_eq(batcher_add(batcher, &crowd[0].job), 0);
        cr_assert(batcher_compose(batcher, lane, 0, &batch));
        batcher_charge(lane, 10000);
        batcher_close(batcher, lane, 10000);
        batcher_remove(batcher, &crowd[0].job);
    }
    for (int i = 0; i < 100; i++) {
        crowd[i] = (struct subject){
            .job = {.lane = lane, .uid = 1, .known = 1000, .least_prompt = 1000, .most_tokens = 1}};
        cr_assert_eq(batcher_add(batcher, &crowd[i].job), 0);
    }
    foreseen = late_one(batcher, lane, 1, 100);
    cr_assert_eq(foreseen.wait_us, 1000000, "behind its user's 100 prompts: %lu", foreseen.wait_us);
    cr_assert(foreseen.own_us >= 1000, "%lu", foreseen.own_us);
    foreseen = late_one(batcher, lane, 2, 100);
    cr_assert_eq(foreseen.wait_us, 0, "another user's come first where his are behind");
    cr_assert(foreseen_late(&(struct foreseen){.wait_us = 1000, .own_us = 1000}, 2499, 1000));
    cr_assert_not(foreseen_late(&(struct foreseen){.wait_us = 1000, .own_us = 1000}, 2500, 1000),
                  "a quarter of slack");
    for (int i = 0; i < 100; i++)
        batcher_remove(batcher, &crowd[i].job);
    lane_free(lane);
    batcher_free(batcher);
}

/* What of its prompt is there is known once it has its memory: then the rest is held against its
 * deadline. */
Test(forecast, a_prompt_too_long_for_its_deadline_comes_out_refused)
{
    struct batcher_options options = {.max_batch = 32,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1000,
                                      .admit = admit};
    struct subject s, kept;
    struct batcher *batcher;
    struct lane *lane;
    const struct batch *batch;

    cr_assert_eq(batcher_new(&options, &batcher), 0);
    cr_assert_eq(lane_new(batcher, NULL, &lane), 0);
    for (int round = 0; round < 20; round++) {
        s = (struct subject){.job = {.lane = lane, .uid = 1, .known = 1000}};
        cr_assert_eq(batcher_add(batcher, &s.job), 0);
        cr_assert(batcher_compose(batcher, lane, 0, &batch));
        batcher_close(batcher, lane, 10000);
        batcher_remove(batcher, &s.job);
    }
    s = (struct subject){
        .job = {.lane = lane, .uid = 1, .known = 10000, .least_prompt = 1, .deadline_us = 50000}};
    kept = s;
    kept.kept = 9000;
    cr_assert_eq(batcher_add(batcher, &s.job), 0);
    cr_assert_eq(batcher_add(batcher, &kept.job), 0);
    struct foreseen early = batcher_foresee(&s.job);
    cr_assert_not(foreseen_late(&early, 50000, 0), "it might all be there");
    cr_assert(batcher_compose(batcher, lane, 0, &batch));
    cr_assert_eq(batch->n_jobs, 1);
    cr_assert_eq(batch->jobs[0], &kept.job);
    cr_assert_eq(batcher_refused(batcher), &s.job);
    cr_assert_eq(s.job.foreseen.own_us, 100000, "%lu", s.job.foreseen.own_us);
    batcher_close(batcher, lane, 10000);
    batcher_remove(batcher, &kept.job);
    lane_free(lane);
    batcher_free(batcher);
}
