/* The batcher in virtual time: who is in the next step, with how many columns, and who pays. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/serve/batcher_internal.h"
#include "lib/cleanup.h"

struct world {
    struct batcher *batcher;
    struct lane *lane;
    uint64_t now_us;
    uint64_t wake_us;
};

/* What `admit` says to this user's jobs, and how much room others get. */
static uint32_t denied_uid;
static int denial;
static uint32_t n_grown;
static bool may_grow;

static int admit(void *userdata, struct job *job)
{
    (void)userdata;
    job->room = job->known;
    return denial && job->uid == denied_uid ? denial : 0;
}

static int grow(void *userdata, struct job *job)
{
    (void)userdata;
    if (!may_grow)
        return -EAGAIN;
    n_grown++;
    job->room = job->known;
    return 0;
}

static void begin_world(struct world *world, struct batcher_options options)
{
    *world = (struct world){.now_us = 1000000};
    options.admit = admit;
    options.max_columns = 1024;
    if (!options.chunk_target_us)
        options.chunk_target_us = 20000;
    cr_assert_eq(batcher_new(&options, &world->batcher), 0);
    cr_assert_eq(lane_new(world->batcher, NULL, &world->lane), 0);
}

#define WORLD(name, ...)                                            \
    struct world name##_of_this_test, *name = &name##_of_this_test; \
    begin_world(name, (struct batcher_options){__VA_ARGS__})

static struct job job_of(struct lane *lane, uint32_t uid, uint32_t known, uint64_t arrived_us)
{
    return (struct job){.lane = lane, .uid = uid, .known = known, .arrived_us = arrived_us};
}

/* Composes and closes one step of `us`; every job then knows one token more, unless `ends`. */
static uint32_t step(struct world *world, struct lane *lane, uint64_t us, bool ends)
{
    const struct batch *batch;
    struct job *jobs[512];
    uint32_t n;

    if (!batcher_compose(world->batcher, lane, world->now_us, &batch))
        return 0;
    n = batch->n_jobs;
    memcpy(jobs, batch->jobs, n * sizeof(*jobs));
    batcher_charge(lane, us);
    batcher_close(world->batcher, lane, us);
    world->now_us += us;
    for (uint32_t i = 0; i < n; i++) {
        if (jobs[i]->fed < jobs[i]->known)
            continue;
        if (ends)
            batcher_remove(world->batcher, jobs[i]);
        else
            jobs[i]->known++;
    }
    return n;
}

static bool runs(const struct job *job)
{
    return job->state == JOB_RUNNING;
}

static void end_world(struct world *world)
{
    lane_free(world->lane);
    batcher_free(world->batcher);
}

static void add(struct world *world, struct job *job)
{
    cr_assert_eq(batcher_add(world->batcher, job), 0);
}

Test(batcher, an_idle_engine_starts_at_once)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job job = job_of(world->lane, 1, 5, world->now_us);

    cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
    cr_assert_eq(world->wake_us, UINT64_MAX);
    add(world, &job);
    cr_assert_eq(batcher_pick(world->batcher, world->now_us, &world->wake_us), world->lane);
    cr_assert_eq(step(world, world->lane, 100, true), 1);
    cr_assert_eq(job.fed, 5);
    end_world(world);
}

Test(batcher, arrivals_gather_while_a_step_runs)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job first = job_of(world->lane, 1, 5, 1), more[3];
    const struct batch *batch;

    add(world, &first);
    cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
    for (int i = 0; i < 3; i++) {
        more[i] = job_of(world->lane, 1, 4, 2);
        add(world, &more[i]);
    }
    cr_assert_eq(batch->n_jobs, 1);
    batcher_close(world->batcher, world->lane, 100);
    batcher_remove(world->batcher, &first);
    cr_assert_eq(step(world, world->lane, 100, true), 3);
    end_world(world);
}

Test(batcher, jobs_join_and_leave_between_steps)
{
    WORLD(world, .max_batch = 4, .min_batch = 1);
    struct job a = job_of(world->lane, 1, 3, 1), b = job_of(world->lane, 1, 3, 2);

    add(world, &a);
    cr_assert_eq(step(world, world->lane, 10, false), 1);
    add(world, &b);
    cr_assert_eq(step(world, world->lane, 10, false), 2);
    batcher_remove(world->batcher, &a);
    cr_assert_eq(step(world, world->lane, 10, false), 1);
    cr_assert_eq(b.known, 5);
    batcher_remove(world->batcher, &b);
    end_world(world);
}

Test(batcher, the_batch_is_full_at_max_batch_and_the_rest_waits)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job jobs[20];
    const struct batch *batch;

    for (int i = 0; i < 20; i++) {
        jobs[i] = job_of(world->lane, 1, 2, (uint64_t)i);
        add(world, &jobs[i]);
    }
    cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
    cr_assert_eq(batch->n_jobs, 8);
    cr_assert_eq(batch->n_runnable, 8);
    cr_assert_eq(batcher_n_waiting(world->batcher), 12);
    for (int i = 0; i < 8; i++)
        cr_assert_eq(batch->jobs[i], &jobs[i], "the earliest go first");
    batcher_close(world->batcher, world->lane, 10);
    for (int i = 0; i < 20; i++)
        batcher_remove(world->batcher, &jobs[i]);
    end_world(world);
}

Test(batcher, min_batch_waits_no_longer_than_max_delay)
{
    WORLD(world, .max_batch = 8, .min_batch = 3, .max_delay_us = 500);
    struct job jobs[3];

    jobs[0] = job_of(world->lane, 1, 2, world->now_us);
    add(world, &jobs[0]);
    cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
    cr_assert_eq(world->wake_us, world->now_us + 500);
    cr_assert_not_null(batcher_pick(world->batcher, world->now_us + 500, &world->wake_us));
    for (int i = 1; i < 3; i++) {
        jobs[i] = job_of(world->lane, 1, 2, world->now_us);
        add(world, &jobs[i]);
    }
    cr_assert_not_null(batcher_pick(world->batcher, world->now_us, &world->wake_us),
                       "there are enough");
    cr_assert_eq(step(world, world->lane, 10, true), 3);
    end_world(world);
}

Test(batcher, urgent_ones_of_a_user_go_before_his_others)
{
    WORLD(world, .max_batch = 2, .min_batch = 1);
    struct job jobs[4];
    const struct batch *batch;

    for (int i = 0; i < 4; i++) {
        jobs[i] = job_of(world->lane, 1, 2, (uint64_t)i);
        jobs[i].priority = i < 2;
        add(world, &jobs[i]);
    }
    cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
    cr_assert_eq(batch->jobs[0], &jobs[2]);
    cr_assert_eq(batch->jobs[1], &jobs[3]);
    batcher_close(world->batcher, world->lane, 10);
    for (int i = 0; i < 4; i++)
        batcher_remove(world->batcher, &jobs[i]);
    end_world(world);
}

/* Not only to a place: also to the columns of a step. */
Test(batcher, an_urgent_prompt_goes_before_a_long_one_that_runs)
{
    WORLD(world, .max_batch = 4, .min_batch = 1, .chunk_target_us = 1000);
    struct job patient = job_of(world->lane, 1, 100000, 1), urgent[2];

    patient.priority = 1;
    add(world, &patient);
    for (int i = 0; i < 10; i++)
        step(world, world->lane, 1000, false);
    for (int i = 0; i < 2; i++) {
        urgent[i] = job_of(world->lane, 1, 90, world->now_us);
        add(world, &urgent[i]);
    }
    for (uint32_t fed = patient.fed; urgent[1].fed < 90; fed = patient.fed) {
        step(world, world->lane, 1000, false);
        cr_assert(patient.fed == fed || urgent[1].fed == 90, "it had columns before them");
        cr_assert(urgent[1].fed == 0 || urgent[0].fed >= 90, "the order of arrival");
    }
    batcher_remove(world->batcher, &patient);
    for (int i = 0; i < 2; i++)
        batcher_remove(world->batcher, &urgent[i]);
    end_world(world);
}

Test(batcher, prompts_are_cut_by_predicted_time)
{
    WORLD(world, .max_batch = 4, .min_batch = 1, .chunk_target_us = 1000);
    struct job job = job_of(world->lane, 1, 4000, 1);
    const struct batch *batch;
    uint32_t last = 0;

    add(world, &job);
    for (int i = 0; i < 30; i++) { /* the model takes 5 us a column: 200 columns are 1 ms */
        cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
        last = batch->n_columns;
        cr_assert_leq(last, 1024);
        batcher_close(world->batcher, world->lane, 5 * (uint64_t)last);
        if (job.fed == job.known)
            break;
    }
    cr_assert(job.fed > 1000, "%u", job.fed);
    batcher_remove(world->batcher, &job);
    cr_assert(last <= 210 || last == job.known % 200, "%u", last);
    end_world(world);
}

Test(batcher, a_long_prompt_does_not_keep_others_from_generating)
{
    WORLD(world, .max_batch = 4, .min_batch = 1, .chunk_target_us = 1000);
    struct job small = job_of(world->lane, 1, 2, 1), large = job_of(world->lane, 1, 100000, 2);
    const struct batch *batch;

    add(world, &small);
    step(world, world->lane, 10, false);
    add(world, &large);
    for (int i = 0; i < 20; i++) {
        uint32_t known = small.known;
        cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
        cr_assert_eq(batch->jobs[0], &small);
        cr_assert_eq(small.chunk, 1);
        cr_assert_eq(batch->n_jobs, 2);
        batcher_close(world->batcher, world->lane, 5 * (uint64_t)batch->n_columns);
        cr_assert_eq(small.fed, known);
        small.known++;
    }
    batcher_remove(world->batcher, &small);
    batcher_remove(world->batcher, &large);
    end_world(world);
}

/* Somebody's long prompt is computed beside another user's short one, not before it. */
Test(batcher, a_long_prompt_does_not_keep_another_users_out)
{
    WORLD(world, .max_batch = 4, .min_batch = 1, .chunk_target_us = 1000);
    struct job large = job_of(world->lane, 1, 100000, 1), small;
    uint32_t steps = 0;

    add(world, &large);
    for (int i = 0; i < 10; i++)
        step(world, world->lane, 1000, false);
    small = job_of(world->lane, 2, 50, world->now_us);
    add(world, &small);
    for (; small.fed < 50 && steps < 10; steps++)
        step(world, world->lane, 1000, false);
    cr_assert_leq(steps, 2, "%u steps", steps);
    cr_assert(large.fed > 0);
    batcher_remove(world->batcher, &small);
    batcher_remove(world->batcher, &large);
    end_world(world);
}

/* On a slow model those that generate fill the time of a step alone. */
Test(batcher, those_that_generate_do_not_keep_a_prompt_out)
{
    WORLD(world, .max_batch = 200, .min_batch = 1, .chunk_target_us = 20000);
    struct job crowd[100], late;
    uint32_t steps = 0;

    for (int i = 0; i < 100; i++) {
        crowd[i] = job_of(world->lane, 1, 2, (uint64_t)i);
        add(world, &crowd[i]);
    }
    for (int i = 0; i < 30; i++)
        step(world, world->lane, 1000000, false);
    late = job_of(world->lane, 2, 64, world->now_us);
    add(world, &late);
    for (; late.fed < 64 && steps < 20; steps++)
        step(world, world->lane, 1000000, false);
    cr_assert_leq(steps, 4, "a page a step at least: %u steps", steps);
    for (int i = 0; i < 100; i++)
        batcher_remove(world->batcher, &crowd[i]);
    batcher_remove(world->batcher, &late);
    end_world(world);
}

Test(batcher, parked_jobs_are_not_advanced_until_unparked)
{
    WORLD(world, .max_batch = 4, .min_batch = 1);
    struct job a = job_of(world->lane, 1, 2, 1), b = job_of(world->lane, 1, 2, 2);

    add(world, &a);
    add(world, &b);
    step(world, world->lane, 10, false);
    batcher_park(world->batcher, &a);
    cr_assert_eq(batcher_n_parked(world->batcher), 1);
    cr_assert_eq(step(world, world->lane, 10, false), 1);
    cr_assert_eq(a.known, 3);
    batcher_park(world->batcher, &b);
    cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
    batcher_unpark(world->batcher, &a);
    cr_assert_eq(step(world, world->lane, 10, false), 1);
    cr_assert_eq(a.known, 4);
    batcher_remove(world->batcher, &a);
    batcher_remove(world->batcher, &b);
    cr_assert_eq(batcher_n_parked(world->batcher), 0);
    end_world(world);
}

Test(batcher, removal_is_right_in_every_state)
{
    WORLD(world, .max_batch = 1, .min_batch = 1);
    struct job running = job_of(world->lane, 1, 2, 1), waiting = job_of(world->lane, 1, 2, 2),
               parked = job_of(world->lane, 1, 2, 3);

    add(world, &parked);
    batcher_park(world->batcher, &parked);
    add(world, &running);
    step(world, world->lane, 10, false);
    add(world, &waiting);
    batcher_remove(world->batcher, &waiting);
    batcher_remove(world->batcher, &running);
    batcher_remove(world->batcher, &parked);
    batcher_remove(world->batcher, &parked); /* once more does nothing */
    cr_assert_eq(lane_n_jobs(world->lane), 0);
    cr_assert_eq(batcher_n_waiting(world->batcher) + batcher_n_running(world->batcher) +
                     batcher_n_parked(world->batcher),
                 0);
    end_world(world);
}

Test(batcher, deadlines_come_out_in_their_order)
{
    WORLD(world, .max_batch = 64, .min_batch = 1);
    struct job jobs[50];
    uint64_t last = 0;

    for (int i = 0; i < 50; i++) {
        jobs[i] = job_of(world->lane, 1, 2, 1);
        jobs[i].deadline_us = 1000 + (uint64_t)(i * 7919 % 50) * 10;
        add(world, &jobs[i]);
    }
    cr_assert_null(batcher_expired(world->batcher, 999));
    for (int i = 0; i < 50; i++) {
        struct job *job = batcher_expired(world->batcher, 5000);
        cr_assert_not_null(job);
        cr_assert_geq(job->deadline_us, last);
        last = job->deadline_us;
        batcher_remove(world->batcher, job);
    }
    cr_assert_null(batcher_expired(world->batcher, 5000));
    end_world(world);
}

Test(batcher, one_in_the_open_step_expires_after_it)
{
    WORLD(world, .max_batch = 4, .min_batch = 1);
    struct job job = job_of(world->lane, 1, 2, 1);
    const struct batch *batch;

    job.deadline_us = 100;
    add(world, &job);
    cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
    cr_assert_null(batcher_expired(world->batcher, 200));
    batcher_close(world->batcher, world->lane, 10);
    cr_assert_eq(batcher_expired(world->batcher, 200), &job);
    batcher_remove(world->batcher, &job);
    end_world(world);
}

/* However the ones before it in the order stand. */
Test(batcher, one_behind_those_in_the_open_step_expires_at_once)
{
    WORLD(world, .max_batch = 2, .min_batch = 1);
    static const uint64_t deadlines[] = {100, 900, 950, 920, 200, 150};
    struct job jobs[6];
    const struct batch *batch;

    /* The first two run; behind them are ones that are due and ones that are not. */
    for (int i = 0; i < 6; i++) {
        jobs[i] = job_of(world->lane, 1, 2, (uint64_t)i);
        jobs[i].deadline_us = deadlines[i];
        add(world, &jobs[i]);
    }
    cr_assert(batcher_compose(world->batcher, world->lane, 0, &batch));
    cr_assert(jobs[0].chunk > 0 && jobs[1].chunk > 0);
    cr_expect_null(batcher_expired(world->batcher, 149));
    cr_expect_eq(batcher_expired(world->batcher, 150), &jobs[5]);
    cr_expect_eq(batcher_expired(world->batcher, 250), &jobs[5], "the earliest of two");
    batcher_remove(world->batcher, &jobs[5]);
    cr_expect_eq(batcher_expired(world->batcher, 250), &jobs[4]);
    batcher_remove(world->batcher, &jobs[4]);
    cr_expect_null(batcher_expired(world->batcher, 250));
    cr_expect_eq(batcher_expired(world->batcher, 930), &jobs[3]);
    batcher_close(world->batcher, world->lane, 10);
    cr_expect_eq(batcher_expired(world->batcher, 930), &jobs[0]);
    for (int i = 0; i < 4; i++)
        batcher_remove(world->batcher, &jobs[i]);
    end_world(world);
}

Test(batcher, the_wake_up_time_is_the_next_deadline)
{
    WORLD(world, .max_batch = 4, .min_batch = 1);
    struct job job = job_of(world->lane, 1, 2, 1);

    job.deadline_us = 777;
    add(world, &job);
    batcher_park(world->batcher, &job);
    cr_assert_null(batcher_pick(world->batcher, 1, &world->wake_us));
    cr_assert_eq(world->wake_us, 777);
    batcher_remove(world->batcher, &job);
    end_world(world);
}

static int admit_two(void *userdata, struct job *job)
{
    uint32_t *left = userdata;

    (void)job;
    if (*left == 0)
        return -EAGAIN;
    (*left)--;
    return 0;
}

Test(batcher, without_kv_memory_jobs_wait_until_somebody_leaves)
{
    uint32_t left = 2;
    struct batcher_options options = {.max_batch = 8,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit_two,
                                      .userdata = &left};
    struct world world = {0};
    struct job jobs[4];
    const struct batch *batch;

    cr_assert_eq(batcher_new(&options, &world.batcher), 0);
    cr_assert_eq(lane_new(world.batcher, NULL, &world.lane), 0);
    for (int i = 0; i < 4; i++) {
        jobs[i] = job_of(world.lane, 1, 2, (uint64_t)i);
        add(&world, &jobs[i]);
    }
    cr_assert(batcher_compose(world.batcher, world.lane, 0, &batch));
    cr_assert_eq(batch->n_jobs, 2);
    cr_assert_eq(batch->n_runnable, 2, "those without memory cannot run");
    batcher_close(world.batcher, world.lane, 10);
    batcher_park(world.batcher, &jobs[0]);
    batcher_park(world.batcher, &jobs[1]);
    cr_assert_not(batcher_compose(world.batcher, world.lane, 0, &batch), "nothing can be admitted");
    cr_assert_null(batcher_pick(world.batcher, 0, &world.wake_us), "no spinning on that");
    left = 1;
    batcher_remove(world.batcher, &jobs[0]);
    cr_assert_eq(step(&world, world.lane, 10, true), 1);
    for (int i = 1; i < 4; i++)
        batcher_remove(world.batcher, &jobs[i]);
    end_world(&world);
}

static int admit_none(void *userdata, struct job *job)
{
    (void)userdata;
    (void)job;
    return -ENOSPC;
}

Test(batcher, what_can_never_be_admitted_comes_out_refused)
{
    struct batcher_options options = {.max_batch = 8,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit_none};
    struct world world = {0};
    const struct batch *batch;
    struct job job;

    cr_assert_eq(batcher_new(&options, &world.batcher), 0);
    cr_assert_eq(lane_new(world.batcher, NULL, &world.lane), 0);
    job = job_of(world.lane, 1, 2, 1);
    job.deadline_us = 5;
    add(&world, &job);
    cr_assert_not(batcher_compose(world.batcher, world.lane, 0, &batch));
    cr_assert_eq(batcher_refused(world.batcher), &job);
    cr_assert_null(batcher_refused(world.batcher));
    cr_assert_eq(job.state, JOB_IDLE);
    cr_assert_null(batcher_expired(world.batcher, 10), "its deadline went with it");
    end_world(&world);
}

/* A step that the engine could not begin says nothing of how long steps take. */
Test(batcher, an_abandoned_step_computes_nothing_and_teaches_nothing)
{
    WORLD(world, .max_batch = 8, .min_batch = 1, .chunk_target_us = 1000, .adaptive_us = 1000);
    struct job job = job_of(world->lane, 1, 100000, 1);
    uint64_t narrowed, widened, least_us;
    const struct batch *batch;
    uint32_t n_columns, width;

    add(world, &job);
    for (int i = 0; i < 40; i++)
        step(world, world->lane, 1000, false);
    least_us = batcher_foresee(&job).own_us;
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    n_columns = batch->n_columns;
    width = batcher_width(world->batcher, &narrowed, &widened);
    for (int i = 0; i < 40; i++) {
        uint32_t fed = job.fed;
        batcher_abandon(world->batcher, world->lane);
        cr_assert(job.fed == fed && job.chunk == 0 && !lane_step_open(world->lane));
        cr_assert_null(batcher_expired(world->batcher, UINT64_MAX));
        cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    }
    cr_expect_eq(batch->n_columns, n_columns, "%u of %u", batch->n_columns, n_columns);
    cr_expect_eq(batcher_width(world->batcher, &narrowed, &widened), width);
    cr_expect_eq(batcher_foresee(&job).own_us, least_us);
    batcher_abandon(world->batcher, world->lane);
    batcher_remove(world->batcher, &job);
    end_world(world);
}

/* Lets two users with a backlog each run `steps` steps; the first one's share of engine time. */
static double share_of_first(uint32_t first_jobs, uint32_t second_jobs, uint32_t steps)
{
    WORLD(world, .max_batch = 32, .min_batch = 1);
    uint32_t n = first_jobs + second_jobs;
    struct job *jobs = calloc(n, sizeof(*jobs));
    double share;

    for (uint32_t i = 0; i < n; i++) {
        jobs[i] = job_of(world->lane, i < first_jobs ? 1 : 2, 5, i);
        add(world, &jobs[i]);
    }
    for (uint32_t s = 0; s < steps; s++) {
        step(world, world->lane, 1000, true);
        for (uint32_t i = 0; i < n; i++) /* whoever was answered asks again */
            if (jobs[i].state == JOB_IDLE) {
                jobs[i] = job_of(world->lane, i < first_jobs ? 1 : 2, 5, world->now_us);
                add(world, &jobs[i]);
            }
    }
    share = (double)batcher_uid_us(world->batcher, 1) /
            (double)(batcher_uid_us(world->batcher, 1) + batcher_uid_us(world->batcher, 2));
    for (uint32_t i = 0; i < n; i++)
        batcher_remove(world->batcher, &jobs[i]);
    free(jobs);
    end_world(world);
    return share;
}

Test(batcher, users_share_engine_time_whatever_they_ask_for)
{
    double share = share_of_first(504, 128, 300);

    cr_assert(share > 0.45 && share < 0.55, "%.3f", share);
}

Test(batcher, a_user_with_one_request_is_in_the_next_step)
{
    WORLD(world, .max_batch = 32, .min_batch = 1);
    struct job crowd[500], one;

    for (int i = 0; i < 500; i++) {
        crowd[i] = job_of(world->lane, 1, 5, (uint64_t)i);
        add(world, &crowd[i]);
    }
    for (int i = 0; i < 5; i++)
        step(world, world->lane, 1000, true);
    one = job_of(world->lane, 2, 5, world->now_us);
    add(world, &one);
    step(world, world->lane, 1000, true);
    cr_assert_eq(one.fed, 5, "it had to wait behind the crowd");
    for (int i = 0; i < 500; i++)
        batcher_remove(world->batcher, &crowd[i]);
    end_world(world);
}

/* Places that a user's long answers have are not his until they end. */
Test(batcher, a_user_with_one_request_need_not_wait_for_anothers_long_answers)
{
    static const uint32_t places[] = {1, 4, 32};

    for (int round = 0; round < 3; round++) {
        WORLD(world, .max_batch = places[round], .min_batch = 1);
        struct job crowd[32], one;
        uint32_t steps = 0;

        for (uint32_t i = 0; i < places[round]; i++) {
            crowd[i] = job_of(world->lane, 1, 5, i);
            add(world, &crowd[i]);
        }
        for (int i = 0; i < 50; i++)
            cr_assert_eq(step(world, world->lane, 1000, false), places[round]);
        one = job_of(world->lane, 2, 5, world->now_us);
        add(world, &one);
        for (; one.fed < 5 && steps < 100; steps++)
            cr_assert_eq(step(world, world->lane, 1000, false), places[round]);
        cr_expect_leq(steps, 2, "%u steps of %u places", steps, places[round]);
        batcher_remove(world->batcher, &one);
        cr_assert_eq(step(world, world->lane, 1000, false), places[round], "its place went back");
        for (uint32_t i = 0; i < places[round]; i++)
            batcher_remove(world->batcher, &crowd[i]);
        end_world(world);
    }
}

/* Users with so many endless answers each share `places`: the least and the most engine time that
 * one had, of an equal share, and how often a place changed hands. */
static void share_places(uint32_t places, uint32_t n_users, uint32_t n_each, double *ret_least,
                         double *ret_most, uint32_t *ret_changes)
{
    WORLD(world, .max_batch = places, .min_batch = 1);
    const uint32_t n = n_users * n_each, n_steps = 2000;
    struct job *jobs = calloc(n, sizeof(*jobs));
    bool *had_place = calloc(n, sizeof(*had_place));

    for (uint32_t i = 0; i < n; i++)
        jobs[i] = job_of(world->lane, 1 + i / n_each, 5, i);
    for (uint32_t i = 0; i < n_each; i++)
        add(world, &jobs[i]);
    for (uint32_t s = 0; s < 50; s++)
        step(world, world->lane, 1000, false);
    for (uint32_t i = n_each; i < n; i++)
        add(world, &jobs[i]);
    *ret_changes = 0;
    for (uint32_t s = 0; s < n_steps; s++) {
        cr_assert_eq(step(world, world->lane, 1000, false), places, "a place was left empty");
        cr_assert_eq(batcher_batch(world->lane)->n_runnable, places);
        for (uint32_t i = 0; i < n; i++) {
            *ret_changes += runs(&jobs[i]) && !had_place[i];
            had_place[i] = runs(&jobs[i]);
        }
    }
    *ret_least = 1e9;
    *ret_most = 0;
    for (uint32_t uid = 1; uid <= n_users; uid++) {
        double us = (double)batcher_uid_us(world->batcher, uid) - (uid == 1 ? 50000 : 0);
        *ret_least = MIN(*ret_least, us * n_users / (n_steps * 1000.0));
        *ret_most = MAX(*ret_most, us * n_users / (n_steps * 1000.0));
    }
    for (uint32_t i = 0; i < n; i++)
        batcher_remove(world->batcher, &jobs[i]);
    free(jobs);
    free(had_place);
    end_world(world);
}

Test(batcher, users_with_long_answers_share_places_by_engine_time)
{
    static const struct {
        uint32_t places, n_users, n_each;
    } cases[] = {{32, 2, 32}, {32, 2, 128}, {4, 3, 8}, {5, 2, 5}, {1, 2, 3}, {8, 20, 2}};

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        double least, most;
        uint32_t changes;

        share_places(cases[i].places, cases[i].n_users, cases[i].n_each, &least, &most, &changes);
        cr_expect(least > 0.9 && most < 1.1, "case %zu: %.3f to %.3f of a share", i, least, most);
        cr_log_info("case %zu: %.3f to %.3f of a share, %u changes in 2000 steps", i, least, most,
                    changes);
        /* Where they divide evenly, nobody moves once all are level; where not, one is handed on;
         * and with more users than places each lasts as long as its user is behind the others. */
        if (cases[i].n_users <= cases[i].places)
            cr_expect_leq(changes, cases[i].places % cases[i].n_users ? 2000u : 100u,
                          "case %zu: %u changes", i, changes);
    }
}

Test(batcher, urgent_ones_take_the_places_of_their_users_others)
{
    WORLD(world, .max_batch = 4, .min_batch = 1);
    struct job patient[2][2], urgent[3];

    for (int i = 0; i < 4; i++) {
        struct job *job = &patient[i / 2][i % 2];
        *job = job_of(world->lane, 1 + (uint32_t)i / 2, 5, (uint64_t)i);
        job->priority = 1;
        add(world, job);
    }
    for (int i = 0; i < 10; i++)
        cr_assert_eq(step(world, world->lane, 1000, false), 4);
    for (int i = 0; i < 3; i++) {
        urgent[i] = job_of(world->lane, 1, 1, world->now_us);
        add(world, &urgent[i]);
    }
    cr_assert_eq(step(world, world->lane, 1000, false), 4);
    cr_expect(runs(&urgent[0]) && runs(&urgent[1]) && !runs(&urgent[2]), "his places are two");
    cr_expect(runs(&patient[1][0]) && runs(&patient[1][1]), "another's are not touched");
    cr_expect(patient[0][0].admitted && patient[0][0].fed > 5, "it keeps what it has");
    for (int i = 0; i < 3; i++)
        batcher_remove(world->batcher, &urgent[i]);
    cr_assert_eq(step(world, world->lane, 1000, false), 4);
    cr_expect(runs(&patient[0][0]) && runs(&patient[0][1]));
    for (int i = 0; i < 4; i++)
        batcher_remove(world->batcher, &patient[i / 2][i % 2]);
    end_world(world);
}

Test(batcher, coming_back_from_idle_saves_nothing_up)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job a = job_of(world->lane, 1, 2, 1), b;
    struct lane *other;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    add(world, &a);
    for (int i = 0; i < 100; i++)
        step(world, world->lane, 1000, false);
    b = job_of(other, 2, 2, world->now_us);
    add(world, &b);
    /* Had the second user saved up 100 ms, the first would not be served for a hundred steps. */
    for (int i = 0; i < 10; i++) {
        struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        step(world, lane, 1000, false);
    }
    cr_assert(a.known >= 105, "%u", a.known);
    batcher_remove(world->batcher, &a);
    batcher_remove(world->batcher, &b);
    lane_free(other);
    end_world(world);
}

static uint32_t n_known(const struct world *world, struct lane *other)
{
    uint32_t n = 0;

    for (const struct account *a = world->batcher->accounts; a; a = a->next)
        n++;
    for (const struct share *s = world->lane->shares; s; s = s->next)
        n++;
    for (const struct share *s = other->shares; s; s = s->next)
        n++;
    return n;
}

/* What is kept of users is bounded by those that are there, however many have been. */
Test(batcher, users_that_are_gone_and_owe_nothing_are_forgotten)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job steady = job_of(world->lane, 1, 2, 1), *jobs = calloc(64, sizeof(*jobs));
    struct lane *other;
    uint32_t most = 0;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    for (uint32_t i = 0; i < 2500; i++) { /* one after the other */
        jobs[0] = job_of(i % 2 ? world->lane : other, 10 + i, 3, i);
        add(world, &jobs[0]);
        cr_assert_eq(step(world, jobs[0].lane, 100, true), 1);
        cr_assert_eq(n_known(world, other), 0, "user %u", i);
    }
    add(world, &steady);
    for (uint32_t i = 0; i < 7500; i++) { /* beside one that goes on, on two models, 64 at a time */
        struct job *job = &jobs[i % 64];
        if (job->state != JOB_IDLE)
            batcher_remove(world->batcher, job);
        *job = job_of(i % 3 ? world->lane : other, 10000 + i, 3, i);
        add(world, job);
        for (int n = 0; n < 8; n++) {
            struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
            step(world, lane, 100, false);
        }
        most = MAX(most, n_known(world, other));
    }
    cr_expect_leq(most, 4 * 64, "%u", most);
    for (uint32_t i = 0; i < 64; i++)
        batcher_remove(world->batcher, &jobs[i]);
    for (int i = 0; i < 1000; i++)
        step(world, world->lane, 100, false);
    cr_expect_eq(n_known(world, other), 2, "the one that is there: %u", n_known(world, other));
    batcher_remove(world->batcher, &steady);
    cr_expect_eq(n_known(world, other), 0);
    lane_free(other);
    free(jobs);
    end_world(world);
}

/* Who has had more than the others finds that again, however short he was away. */
Test(batcher, who_goes_and_comes_back_has_paid_nothing_off)
{
    WORLD(world, .max_batch = 1, .min_batch = 1);
    struct job greedy = job_of(world->lane, 1, 500, 1), modest;
    const struct batch *batch;
    uint32_t steps = 0;

    add(world, &greedy);
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    modest = job_of(world->lane, 2, 2, 2);
    add(world, &modest);
    batcher_charge(world->lane, 50000);
    batcher_close(world->batcher, world->lane, 50000);
    batcher_remove(world->batcher, &greedy);
    step(world, world->lane, 100, false);
    greedy = job_of(world->lane, 1, 1, world->now_us);
    add(world, &greedy);
    for (; greedy.fed == 0 && steps < 10000; steps++)
        step(world, world->lane, 100, false);
    cr_expect(steps > 450 && steps < 550, "%u steps of 100 us make up for 50 ms", steps);
    batcher_remove(world->batcher, &greedy);
    batcher_remove(world->batcher, &modest);
    end_world(world);
}

/* One who comes when nobody is there for a moment is no better off than beside somebody. */
Test(batcher, a_moment_without_work_makes_nobodys_idle_time_count)
{
    WORLD(world, .max_batch = 1, .min_batch = 1);
    struct job early = job_of(world->lane, 2, 2, 1), a, b;

    add(world, &early);
    step(world, world->lane, 100, true);
    for (int i = 0; i < 100; i++) { /* the other works alone, one request after the other */
        a = job_of(world->lane, 1, 2, world->now_us);
        add(world, &a);
        step(world, world->lane, 1000, true);
    }
    b = job_of(world->lane, 2, 2, world->now_us);
    a = job_of(world->lane, 1, 2, world->now_us);
    add(world, &b);
    add(world, &a);
    for (int i = 0; i < 20; i++)
        step(world, world->lane, 1000, false);
    cr_expect(a.known > 8 && b.known > 8, "%u and %u", a.known, b.known);
    batcher_remove(world->batcher, &a);
    batcher_remove(world->batcher, &b);
    end_world(world);
}

Test(batcher, one_users_models_take_turns_by_time)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job slow, fast = job_of(world->lane, 1, 2, 1);
    struct lane *other;
    uint64_t slow_us = 0, fast_us = 0;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    slow = job_of(other, 1, 2, 1);
    add(world, &slow);
    add(world, &fast);
    for (int i = 0; i < 2000; i++) {
        struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        uint64_t us = lane == other ? 1000 : 10;
        *(lane == other ? &slow_us : &fast_us) += us;
        step(world, lane, us, false);
    }
    cr_assert(fast_us > slow_us * 4 / 10, "%lu of %lu us", fast_us, slow_us);
    batcher_remove(world->batcher, &slow);
    batcher_remove(world->batcher, &fast);
    lane_free(other);
    end_world(world);
}

/* Within a user priority goes before time, over his models too; between users it does not. */
Test(batcher, an_urgent_job_goes_before_its_users_others_on_another_model)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job patient = job_of(world->lane, 1, 2, 1), others = job_of(world->lane, 2, 2, 1),
               urgent;
    struct lane *other;
    uint32_t n_steps[2] = {0};

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    patient.priority = 1;
    add(world, &patient);
    for (int i = 0; i < 10; i++)
        step(world, world->lane, 1000, false);
    urgent = job_of(other, 1, 2, world->now_us);
    add(world, &urgent);
    for (int i = 0; i < 50; i++) {
        cr_assert_eq(batcher_pick(world->batcher, world->now_us, &world->wake_us), other);
        step(world, other, 1000, false);
    }
    add(world, &others);
    for (int i = 0; i < 100; i++) {
        struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        n_steps[lane == other]++;
        step(world, lane, 1000, false);
    }
    cr_expect(n_steps[0] > 30, "another user had %u of 100 steps", n_steps[0]);
    batcher_remove(world->batcher, &urgent);
    batcher_remove(world->batcher, &others);
    cr_expect_eq(batcher_pick(world->batcher, world->now_us, &world->wake_us), world->lane);
    cr_expect_eq(step(world, world->lane, 1000, false), 1);
    batcher_remove(world->batcher, &patient);
    lane_free(other);
    end_world(world);
}

/* One that has no KV memory does not keep its user's other model from working. */
Test(batcher, an_urgent_job_without_memory_stands_in_nobodys_way)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job running[2], urgent;
    struct lane *other, *lane;
    const struct batch *batch;
    uint32_t n_patient = 0;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    for (int i = 0; i < 2; i++) {
        running[i] = job_of(i ? other : world->lane, 1, 2, 1);
        running[i].priority = 1;
        add(world, &running[i]);
        step(world, running[i].lane, 1000, false);
    }
    denied_uid = 1;
    denial = -EAGAIN;
    urgent = job_of(other, 1, 2, 1);
    add(world, &urgent);
    for (int i = 0; i < 100; i++) {
        lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        if (!lane_step_open(lane))
            cr_assert(batcher_compose(world->batcher, lane, world->now_us, &batch));
        batcher_charge(lane, 100);
        if (i % 2) {
            batcher_close(world->batcher, lane, 100);
            running[lane == other].known++;
        }
        n_patient += lane == world->lane;
    }
    cr_expect(n_patient > 20, "%u of 100 slices", n_patient);
    for (int i = 0; i < 2; i++) {
        if (lane_step_open(running[i].lane))
            batcher_close(world->batcher, running[i].lane, 100);
        batcher_remove(world->batcher, &running[i]);
    }
    batcher_remove(world->batcher, &urgent);
    lane_free(other);
    end_world(world);
}

Test(batcher, five_thousand_at_once_all_end)
{
    WORLD(world, .max_batch = 200, .min_batch = 1);
    struct job *jobs = calloc(5000, sizeof(*jobs));
    uint32_t steps = 0, rows = 0, n;

    for (uint32_t i = 0; i < 5000; i++) {
        jobs[i] = job_of(world->lane, i % 3, 5, i);
        add(world, &jobs[i]);
    }
    while ((n = step(world, world->lane, 100, true)) > 0) {
        steps++;
        rows += n;
    }
    cr_assert_eq(rows, 5000);
    cr_assert_eq(steps, 25, "%u steps", steps);
    free(jobs);
    end_world(world);
}

/* Between its refusal and its handing out a job's client may be gone: the job is freed then. */
Test(batcher, a_refused_job_can_be_removed_before_it_is_handed_out)
{
    struct batcher_options options = {.max_batch = 8,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit_none};
    struct world world = {0};
    const struct batch *batch;
    struct job jobs[3];

    cr_assert_eq(batcher_new(&options, &world.batcher), 0);
    cr_assert_eq(lane_new(world.batcher, NULL, &world.lane), 0);
    for (int i = 0; i < 3; i++) {
        jobs[i] = job_of(world.lane, 1, 2, 1);
        jobs[i].deadline_us = 5;
        add(&world, &jobs[i]);
    }
    cr_assert_not(batcher_compose(world.batcher, world.lane, 0, &batch));
    batcher_remove(world.batcher, &jobs[1]);
    cr_assert_eq(jobs[1].state, JOB_IDLE);
    batcher_park(world.batcher, &jobs[0]); /* does nothing to one refused */
    cr_assert_eq(batcher_expired(world.batcher, 10), &jobs[0], "still the batcher's");
    batcher_remove(world.batcher, &jobs[0]);
    cr_assert_eq(batcher_refused(world.batcher), &jobs[2]);
    cr_assert_null(batcher_refused(world.batcher), "the removed ones are not handed out");
    cr_assert_eq(lane_n_jobs(world.lane), 0);
    end_world(&world);
}

/* The reason of the lane's next step, which takes `us` and ends its jobs where `ends` says so. */
static enum batch_reason reason_of_step(struct world *world, bool ends)
{
    enum batch_reason reason;

    batcher_pick(world->batcher, world->now_us, &world->wake_us);
    cr_assert_gt(step(world, world->lane, 100, ends), 0);
    reason = batcher_batch(world->lane)->reason;
    batcher_pick(world->batcher, world->now_us, &world->wake_us);
    return reason;
}

Test(batcher, each_step_says_why_it_was_dispatched)
{
    WORLD(world, .max_batch = 3, .min_batch = 1);
    struct job jobs[6];

    for (int i = 0; i < 6; i++)
        jobs[i] = job_of(world->lane, 1, 2, 1);
    add(world, &jobs[0]);
    cr_assert_eq(reason_of_step(world, false), BATCH_IDLE);
    cr_assert_eq(reason_of_step(world, false), BATCH_CONTINUED);
    add(world, &jobs[1]);
    cr_assert_eq(reason_of_step(world, false), BATCH_GATHERED);
    for (int i = 2; i < 6; i++)
        add(world, &jobs[i]);
    cr_assert_eq(reason_of_step(world, false), BATCH_FULL);
    cr_assert_eq(reason_of_step(world, false), BATCH_FULL, "full goes before continued");
    for (int i = 0; i < 5; i++)
        batcher_remove(world->batcher, &jobs[i]);
    cr_assert_eq(reason_of_step(world, true), BATCH_GATHERED, "the last one found room");
    jobs[0] = job_of(world->lane, 1, 2, 1);
    add(world, &jobs[0]);
    cr_assert_eq(reason_of_step(world, true), BATCH_IDLE);
    end_world(world);
}

Test(batcher, a_step_that_waited_for_company_says_what_ended_that)
{
    WORLD(world, .max_batch = 8, .min_batch = 2, .max_delay_us = 500);
    struct job jobs[2];

    for (int round = 0; round < 3; round++) {
        enum batch_reason expected[] = {BATCH_MAX_DELAY, BATCH_MIN_BATCH, BATCH_DEADLINE};
        uint64_t limit_us = round == 2 ? 200 : 500;
        jobs[0] = job_of(world->lane, 1, 2, world->now_us);
        jobs[1] = job_of(world->lane, 2, 2, world->now_us);
        /* Its prompt is two columns; a column takes about 10 us as far as a new lane knows. */
        jobs[0].deadline_us = round == 2 ? world->now_us + 300 : 0;
        add(world, &jobs[0]);
        cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
        cr_assert_leq(world->wake_us, world->now_us + limit_us + 100);
        if (round == 1)
            add(world, &jobs[1]);
        else
            world->now_us = world->wake_us;
        cr_assert_eq(reason_of_step(world, true), expected[round], "round %d", round);
        cr_assert(jobs[0].deadline_us == 0 || world->now_us - 100 <= jobs[0].deadline_us);
    }
    end_world(world);
}

/* A deadline counts for the waiting of its own lane alone, and the earliest of those that wait. */
Test(batcher, a_deadline_ends_the_waiting_for_company_whatever_else_is_due)
{
    WORLD(world, .max_batch = 8, .min_batch = 4, .max_delay_us = 5000);
    struct job parked = job_of(world->lane, 1, 2, 1), elsewhere, jobs[3];
    struct lane *other;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    parked.deadline_us = world->now_us + 100;
    add(world, &parked);
    batcher_park(world->batcher, &parked);
    elsewhere = job_of(other, 2, 2, world->now_us);
    elsewhere.deadline_us = world->now_us + 200;
    add(world, &elsewhere);
    for (int i = 0; i < 3; i++) {
        jobs[i] = job_of(world->lane, 1, 2, world->now_us);
        jobs[i].deadline_us = world->now_us + 3000 - (uint64_t)i * 500;
        add(world, &jobs[i]);
    }
    batcher_remove(world->batcher, &elsewhere);
    cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
    cr_expect_eq(world->wake_us, world->now_us + 100, "the parked one's end");
    batcher_remove(world->batcher, &parked);
    add(world, &elsewhere);
    cr_assert_null(batcher_pick(world->batcher, world->now_us, &world->wake_us));
    cr_expect_eq(world->wake_us, world->now_us + 180, "the other lane's prompt");
    parked = job_of(world->lane, 1, 2, 1);
    parked.deadline_us = world->now_us + 100;
    add(world, &parked);
    batcher_park(world->batcher, &parked);
    world->now_us += 1981; /* the third one's deadline less its prompt of two columns */
    cr_expect_eq(batcher_pick(world->batcher, world->now_us, &world->wake_us), other);
    batcher_remove(world->batcher, &elsewhere);
    cr_expect_eq(batcher_pick(world->batcher, world->now_us, &world->wake_us), world->lane);
    cr_expect_eq(step(world, world->lane, 100, true), 3);
    cr_expect_eq(batcher_batch(world->lane)->reason, BATCH_DEADLINE);
    batcher_remove(world->batcher, &parked);
    lane_free(other);
    end_world(world);
}

/* ---- KV memory ---- */

Test(batcher, who_is_denied_memory_is_passed_by_others_only_for_a_while)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job denied, first, second, third;
    struct lane *other;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    denied_uid = 1;
    denial = -EAGAIN;
    denied = job_of(world->lane, 1, 5, 1);
    first = job_of(world->lane, 2, 5, 2);
    add(world, &denied);
    add(world, &first);
    cr_expect_eq(step(world, world->lane, 10, false), 1);
    cr_expect(runs(&first) && !runs(&denied), "it holds up nobody in its own lane");
    second = job_of(other, 2, 5, 3);
    add(world, &second);
    cr_expect_eq(step(world, other, 10, false), 1, "nor in others");
    world->now_us += BATCHER_PATIENCE_US;
    third = job_of(other, 3, 5, 4);
    add(world, &third);
    cr_expect_eq(step(world, other, 10, false), 1, "what runs goes on");
    cr_expect(!runs(&third), "nobody else begins");
    denial = 0;
    cr_expect_eq(step(world, world->lane, 10, false), 2);
    cr_expect(runs(&denied));
    cr_expect_eq(step(world, other, 10, false), 2);
    cr_expect(runs(&third));
    for (struct job *const *job = (struct job *const[]){&denied, &first, &second, &third, NULL};
         *job; job++)
        batcher_remove(world->batcher, *job);
    lane_free(other);
    end_world(world);
}

/* One that was denied for long and goes away holds up nobody any more. */
Test(batcher, a_claim_to_memory_goes_with_its_jobs)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job denied = job_of(world->lane, 1, 5, 1), other = job_of(world->lane, 2, 5, 2);

    denied_uid = 1;
    denial = -EAGAIN;
    add(world, &denied);
    cr_expect_eq(step(world, world->lane, 10, false), 0);
    world->now_us += BATCHER_PATIENCE_US;
    add(world, &other);
    cr_expect_eq(step(world, world->lane, 10, false), 0);
    batcher_remove(world->batcher, &denied);
    cr_expect_eq(step(world, world->lane, 10, false), 1);
    batcher_remove(world->batcher, &other);
    end_world(world);
}

Test(batcher, who_has_all_he_may_have_holds_up_only_himself)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job denied, own, others;
    struct lane *other;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    denied_uid = 1;
    denial = -EDQUOT;
    denied = job_of(world->lane, 1, 5, 1);
    add(world, &denied);
    cr_expect_eq(step(world, world->lane, 10, false), 0);
    world->now_us += BATCHER_PATIENCE_US;
    denied_uid = 0; /* the same user may have some for his other model: it is not its turn */
    own = job_of(other, 1, 5, 2);
    others = job_of(other, 2, 5, 3);
    add(world, &own);
    add(world, &others);
    cr_expect_eq(step(world, other, 10, false), 1);
    cr_expect(runs(&others) && !runs(&own));
    cr_expect_eq(step(world, world->lane, 10, false), 1);
    cr_expect_eq(step(world, other, 10, false), 2);
    batcher_remove(world->batcher, &denied);
    batcher_remove(world->batcher, &own);
    batcher_remove(world->batcher, &others);
    lane_free(other);
    end_world(world);
}

Test(batcher, preempted_jobs_begin_anew_in_the_order_of_their_arrival)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job jobs[4];
    const struct batch *batch;

    for (int i = 0; i < 4; i++) {
        jobs[i] = job_of(world->lane, 1, 5, (uint64_t)i);
        add(world, &jobs[i]);
    }
    step(world, world->lane, 10, false);
    batcher_preempt(world->batcher, &jobs[1]);
    batcher_preempt(world->batcher, &jobs[3]);
    batcher_preempt(world->batcher, &jobs[0]);
    cr_expect(jobs[1].state == JOB_WAITING && jobs[1].fed == 0 && jobs[1].known == 6);
    cr_expect_eq(batcher_n_waiting(world->batcher), 3);
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    cr_assert_eq(batch->n_jobs, 4);
    cr_expect(batch->jobs[0] == &jobs[2] && jobs[2].chunk == 1);
    for (int i = 0; i < 3; i++) {
        struct job *next = &jobs[i < 2 ? i : 3];
        cr_expect_eq(batch->jobs[1 + i], next);
        cr_expect_eq(next->chunk, 6, "with all that it knows");
    }
    batcher_close(world->batcher, world->lane, 10);
    for (int i = 0; i < 4; i++)
        batcher_remove(world->batcher, &jobs[i]);
    end_world(world);
}

/* They come back in any order, and go on in that of their arrival: first those that kept their
 * memory, which waits with them. */
Test(batcher, unparked_jobs_go_on_in_the_order_of_their_arrival)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job jobs[5], *expected[] = {&jobs[0], &jobs[2], &jobs[4], &jobs[1], &jobs[3]};
    const struct batch *batch;

    for (int i = 0; i < 5; i++) {
        jobs[i] = job_of(world->lane, 1, 5, (uint64_t)i);
        add(world, &jobs[i]);
    }
    step(world, world->lane, 10, false);
    for (int i = 0; i < 5; i++)
        batcher_park(world->batcher, &jobs[i]);
    batcher_preempt(world->batcher, &jobs[1]);
    batcher_preempt(world->batcher, &jobs[3]);
    cr_expect_eq(batcher_n_parked(world->batcher), 5, "a parked one stays parked");
    for (int i = 0; i < 5; i++)
        batcher_unpark(world->batcher, &jobs[i * 3 % 5]);
    denied_uid = 1;
    denial = -EAGAIN; /* who has its memory does not wait for those that have none */
    cr_expect_eq(step(world, world->lane, 10, false), 3);
    cr_expect(runs(&jobs[0]) && runs(&jobs[2]) && runs(&jobs[4]));
    for (int i = 0; i < 5; i += 2)
        batcher_park(world->batcher, &jobs[i]);
    for (int i = 0; i < 5; i += 2)
        batcher_unpark(world->batcher, &jobs[4 - i]);
    denial = 0;
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    cr_assert_eq(batch->n_jobs, 5);
    for (int i = 0; i < 5; i++)
        cr_expect_eq(batch->jobs[i], expected[i], "place %d", i);
    batcher_close(world->batcher, world->lane, 10);
    for (int i = 0; i < 5; i++)
        batcher_remove(world->batcher, &jobs[i]);
    end_world(world);
}

Test(batcher, a_job_parked_where_its_memory_was_full_goes_on)
{
    WORLD(world, .max_batch = 8, .min_batch = 1, .grow = grow);
    struct job a = job_of(world->lane, 1, 5, 1);

    may_grow = true;
    add(world, &a);
    cr_expect_eq(step(world, world->lane, 10, false), 1);
    cr_expect(a.known > a.room, "the next token needs more memory");
    batcher_park(world->batcher, &a);
    batcher_unpark(world->batcher, &a);
    cr_expect_eq(step(world, world->lane, 10, false), 1, "its lane stood still");
    batcher_remove(world->batcher, &a);
    end_world(world);
}

Test(batcher, a_job_that_cannot_grow_is_left_out)
{
    WORLD(world, .max_batch = 8, .min_batch = 1, .grow = grow);
    struct job a = job_of(world->lane, 1, 5, 1), b = job_of(world->lane, 1, 5, 2);
    const struct batch *batch;

    may_grow = true;
    add(world, &a);
    add(world, &b);
    cr_expect_eq(step(world, world->lane, 10, false), 2);
    cr_expect_eq(n_grown, 0, "admission gave them what they knew");
    cr_expect_eq(step(world, world->lane, 10, false), 2);
    cr_expect_eq(n_grown, 2);
    may_grow = false;
    a.room = 100;
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    cr_expect(batch->n_jobs == 1 && batch->jobs[0] == &a && batch->n_runnable == 1);
    batcher_close(world->batcher, world->lane, 10);
    a.known++;
    may_grow = true;
    cr_expect_eq(step(world, world->lane, 10, false), 2);
    batcher_remove(world->batcher, &a);
    batcher_remove(world->batcher, &b);
    end_world(world);
}

struct pressed {
    struct batcher *batcher;
    struct job *victim; /* whose memory goes to the next that is admitted */
    bool denies;        /* and even that is not enough */
};

static int admit_pressed(void *userdata, struct job *job)
{
    struct pressed *pressed = userdata;

    job->room = 100;
    if (pressed->victim)
        batcher_preempt(pressed->batcher, pressed->victim);
    pressed->victim = NULL;
    return pressed->denies ? -EAGAIN : 0;
}

/* Who joins takes the memory of one that runs: as many run as before, and yet one has come. */
Test(batcher, why_a_step_goes_does_not_depend_on_who_gave_way)
{
    struct pressed pressed = {0};
    struct batcher_options options = {.max_batch = 8,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit_pressed,
                                      .userdata = &pressed};
    struct world world = {0};
    struct job jobs[3];

    cr_assert_eq(batcher_new(&options, &world.batcher), 0);
    cr_assert_eq(lane_new(world.batcher, NULL, &world.lane), 0);
    pressed.batcher = world.batcher;
    for (int i = 0; i < 3; i++)
        jobs[i] = job_of(world.lane, 1, 2, 1);
    add(&world, &jobs[0]);
    add(&world, &jobs[1]);
    cr_assert_eq(reason_of_step(&world, false), BATCH_IDLE);
    add(&world, &jobs[2]);
    pressed.victim = &jobs[1];
    pressed.denies = true;
    cr_expect_eq(reason_of_step(&world, false), BATCH_CONTINUED, "nobody came");
    cr_expect(runs(&jobs[0]) && !runs(&jobs[1]) && !runs(&jobs[2]));
    pressed.denies = false;
    pressed.victim = &jobs[0];
    cr_expect_eq(reason_of_step(&world, false), BATCH_GATHERED);
    for (int i = 0; i < 3; i++)
        batcher_remove(world.batcher, &jobs[i]);
    end_world(&world);
}

/* What batch efficiency is measured against: all that could run, as many as there may be places;
 * who is denied memory, or held for what another computes, could not. */
Test(batcher, runnable_are_those_that_wait_too)
{
    WORLD(world, .max_batch = 32, .min_batch = 1, .adaptive_us = 100);
    struct job jobs[40], denied = job_of(world->lane, 2, 5, 1);
    const struct batch *batch;

    denied_uid = 2;
    denial = -EAGAIN;
    add(world, &denied);
    for (int i = 0; i < 40; i++) {
        jobs[i] = job_of(world->lane, 1, 1, (uint64_t)i);
        add(world, &jobs[i]);
    }
    cr_expect_eq(step(world, world->lane, 10000, false), 32);
    cr_expect_eq(batcher_batch(world->lane)->n_runnable, 32);
    for (int i = 0; i < 20; i++) /* far too long: it narrows to the least */
        step(world, world->lane, 10000, false);
    for (int i = 0; i < 20; i++) {
        batcher_remove(world->batcher, &jobs[i]);
        jobs[i] = job_of(world->lane, 1, 1, (uint64_t)i);
        add(world, &jobs[i]);
    }
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    cr_expect(batch->n_jobs == 16 && batch->n_runnable == 32, "%u of %u", batch->n_jobs,
              batch->n_runnable);
    batcher_close(world->batcher, world->lane, 10000);
    for (int i = 6; i < 40; i++)
        batcher_remove(world->batcher, &jobs[i]);
    cr_assert(batcher_compose(world->batcher, world->lane, world->now_us, &batch));
    cr_expect(batch->n_jobs == 6 && batch->n_runnable == 6, "one is denied memory: %u of %u",
              batch->n_jobs, batch->n_runnable);
    batcher_close(world->batcher, world->lane, 10000);
    for (int i = 0; i < 6; i++)
        batcher_remove(world->batcher, &jobs[i]);
    batcher_remove(world->batcher, &denied);
    end_world(world);
}

static int admit_evens(void *userdata, struct job *job)
{
    (void)userdata;
    return job->arrived_us % 2 ? -ENOMEM : 0;
}

/* What is wrong with one request ends that one: its batch goes on with all the others. */
Test(batcher, those_that_are_refused_take_nobodys_place)
{
    struct batcher_options options = {.max_batch = 8,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = 1024,
                                      .admit = admit_evens};
    struct world world = {.now_us = 1};
    struct job jobs[40];
    uint32_t refused = 0, rows = 0, n;

    cr_assert_eq(batcher_new(&options, &world.batcher), 0);
    cr_assert_eq(lane_new(world.batcher, NULL, &world.lane), 0);
    for (int i = 0; i < 40; i++) {
        jobs[i] = job_of(world.lane, 1 + (uint32_t)i % 3, 2, (uint64_t)i);
        add(&world, &jobs[i]);
    }
    while ((n = step(&world, world.lane, 10, true)) > 0) {
        cr_assert(n == 8 || rows + n == 20, "%u of 8 places", n);
        rows += n;
    }
    for (struct job *job; (job = batcher_refused(world.batcher)); refused++)
        cr_assert_eq(job->arrived_us % 2, 1);
    cr_assert_eq(rows, 20);
    cr_assert_eq(refused, 20);
    end_world(&world);
}

/* One user has two models, the other shares one of them; both always have more to do. */
Test(batcher, users_share_engine_time_over_several_models)
{
    WORLD(world, .max_batch = 16, .min_batch = 1);
    struct job *jobs = calloc(300, sizeof(*jobs));
    struct lane *slow;
    double share;

    cr_assert_eq(lane_new(world->batcher, NULL, &slow), 0);
    for (int i = 0; i < 300; i++) {
        jobs[i] = job_of(i % 3 == 0 ? slow : world->lane, i % 3 == 2 ? 2 : 1, 5, (uint64_t)i);
        add(world, &jobs[i]);
    }
    for (int s = 0; s < 3000; s++) {
        struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        step(world, lane, lane == slow ? 9000 : 700, true);
        for (int i = 0; i < 300; i++) {
            struct job again = job_of(jobs[i].lane, jobs[i].uid, 5, world->now_us);
            if (jobs[i].state != JOB_IDLE)
                continue;
            jobs[i] = again;
            add(world, &jobs[i]);
        }
    }
    share = (double)batcher_uid_us(world->batcher, 2) /
            (double)(batcher_uid_us(world->batcher, 1) + batcher_uid_us(world->batcher, 2));
    cr_assert(share > 0.45 && share < 0.55, "%.3f", share);
    for (int i = 0; i < 300; i++)
        batcher_remove(world->batcher, &jobs[i]);
    free(jobs);
    lane_free(slow);
    end_world(world);
}

/* Who waits for memory has had no engine time: that must not put his model's steps before those of
 * others, since he is not in them. */
Test(batcher, who_waits_for_memory_does_not_draw_the_engine_to_his_model)
{
    WORLD(world, .max_batch = 8, .min_batch = 1);
    struct job before = job_of(world->lane, 2, 5, 1), denied, other_job;
    uint32_t n_other = 0;
    struct lane *other;
    const struct batch *batch;

    cr_assert_eq(lane_new(world->batcher, NULL, &other), 0);
    denied_uid = 1;
    denial = -EAGAIN;
    add(world, &before);
    step(world, world->lane, 1000, false);
    denied = job_of(world->lane, 1, 5, 2);
    other_job = job_of(other, 3, 5, 3);
    add(world, &denied);
    add(world, &other_job);
    for (int i = 0; i < 100; i++) {
        struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
        struct job *job = lane == other ? &other_job : &before;

        if (!lane_step_open(lane))
            cr_assert(batcher_compose(world->batcher, lane, world->now_us, &batch));
        batcher_charge(lane, 100);
        if (i % 2) {
            batcher_close(world->batcher, lane, 100);
            job->known++;
        }
        n_other += lane == other;
    }
    cr_expect(n_other > 30, "the other model had %u of 100 slices", n_other);
    for (struct lane *const *lane = (struct lane *const[]){world->lane, other, NULL}; *lane; lane++)
        if (lane_step_open(*lane))
            batcher_close(world->batcher, *lane, 100);
    batcher_remove(world->batcher, &before);
    batcher_remove(world->batcher, &denied);
    batcher_remove(world->batcher, &other_job);
    lane_free(other);
    end_world(world);
}
