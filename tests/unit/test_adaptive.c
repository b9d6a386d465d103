/* Adaptive width in virtual time: it comes to the target from either side and stays there. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "daemon/serve/adaptive.h"
#include "daemon/serve/batcher.h"

#define LEAST 16u
#define MOST  1024u

/* A model whose step of c columns takes fixed + per_column x c. */
struct cost {
    double fixed_us, per_column_us;
};

static uint64_t step_us(const struct cost *cost, uint32_t columns)
{
    return (uint64_t)(cost->fixed_us + cost->per_column_us * columns);
}

/* Runs `steps` full steps; how often the width turned round. */
static uint32_t run(struct adaptive *adaptive, const struct cost *cost, uint32_t steps)
{
    uint32_t turns = 0, last = adaptive->width;
    int direction = 0;

    for (uint32_t i = 0; i < steps; i++) {
        int now;
        adaptive_note(adaptive, adaptive->width, step_us(cost, adaptive->width));
        cr_assert(adaptive->width >= LEAST && adaptive->width <= MOST);
        now = (adaptive->width > last) - (adaptive->width < last);
        turns += now != 0 && direction != 0 && now != direction;
        direction = now ? now : direction;
        last = adaptive->width;
    }
    return turns;
}

static const struct cost costs[] = {{0, 50}, {500, 20}, {5000, 50}, {9000, 10}, {100, 300}};

Test(adaptive, comes_to_the_target_from_either_side_without_turning_round)
{
    for (size_t i = 0; i < sizeof(costs) / sizeof(*costs); i++) {
        for (uint32_t start = LEAST; start <= MOST; start += MOST - LEAST) {
            struct adaptive adaptive;
            uint64_t us;
            adaptive_init(&adaptive, 10000, LEAST, MOST);
            adaptive.width = start;
            cr_expect_eq(run(&adaptive, &costs[i], 300), 0, "cost %zu from %u", i, start);
            us = step_us(&costs[i], adaptive.width);
            cr_expect(us <= 11100 && (us >= 8800 || adaptive.width == MOST),
                      "cost %zu from %u: %lu us", i, start, us);
        }
    }
}

Test(adaptive, follows_a_model_that_becomes_slower_and_faster_again)
{
    static const struct cost fast = {1000, 20}, slow = {1000, 200};
    struct adaptive adaptive;

    adaptive_init(&adaptive, 10000, LEAST, MOST);
    for (int round = 0; round < 3; round++) {
        uint64_t us;
        run(&adaptive, &fast, 100);
        us = step_us(&fast, adaptive.width);
        cr_assert(us > 8800 && us < 11100, "%lu us", us);
        run(&adaptive, &slow, 100);
        us = step_us(&slow, adaptive.width);
        cr_assert(us > 8800 && us < 11100, "%lu us", us);
    }
}

Test(adaptive, a_target_that_cannot_be_had_ends_at_the_least_width)
{
    static const struct cost heavy = {70000, 100};
    struct adaptive adaptive;

    adaptive_init(&adaptive, 20000, LEAST, MOST);
    cr_assert_eq(run(&adaptive, &heavy, 100), 0);
    cr_assert_eq(adaptive.width, LEAST);
}

Test(adaptive, noise_and_interrupted_steps_move_it_little)
{
    static const struct cost cost = {1000, 50}; /* 180 columns take 10 ms */
    struct adaptive adaptive;
    uint32_t least = MOST, most = 0;
    unsigned random = 7;

    adaptive_init(&adaptive, 10000, LEAST, MOST);
    run(&adaptive, &cost, 100);
    for (int i = 0; i < 2000; i++) {
        uint64_t us = step_us(&cost, adaptive.width);
        random = random * 1103515245u + 12345u;
        us = us * (95 + random / 65536 % 11) / 100; /* up to 5 % either way */
        if (i % 10 == 0)
            us *= 8; /* something else had the CPU */
        adaptive_note(&adaptive, adaptive.width, us);
        least = adaptive.width < least ? adaptive.width : least;
        most = adaptive.width > most ? adaptive.width : most;
    }
    cr_assert(least > 150 && most < 220, "%u..%u", least, most);
}

Test(adaptive, narrow_steps_say_nothing_of_wider_ones)
{
    struct adaptive adaptive;

    adaptive_init(&adaptive, 10000, LEAST, MOST);
    adaptive.width = 100;
    for (int i = 0; i < 50; i++)
        adaptive_note(&adaptive, 10, 50);
    cr_assert_eq(adaptive.width, 100);
    for (int i = 0; i < 3; i++)
        adaptive_note(&adaptive, 50, 40000);
    cr_assert_lt(adaptive.width, 50, "what was too long at 50 is too long at 100");
}

Test(adaptive, off_it_stays_at_the_most)
{
    struct adaptive adaptive;

    adaptive_init(&adaptive, 0, LEAST, MOST);
    for (int i = 0; i < 50; i++)
        adaptive_note(&adaptive, MOST, 1000000);
    cr_assert_eq(adaptive.width, MOST);
    cr_assert_eq(adaptive.n_narrowed + adaptive.n_widened, 0);
}

static int admit(void *userdata, struct job *job)
{
    (void)userdata;
    (void)job;
    return 0;
}

/* A crowd that generates: what the batcher's steps take in the end, and with how many. */
static uint64_t steps_of_a_crowd(uint64_t target_us, const struct cost *cost, uint32_t *ret_rows)
{
    struct batcher_options options = {.max_batch = 200,
                                      .min_batch = 1,
                                      .chunk_target_us = 20000,
                                      .max_columns = MOST,
                                      .adaptive_us = target_us,
                                      .admit = admit};
    struct job *jobs = calloc(400, sizeof(*jobs));
    const struct batch *batch;
    struct batcher *batcher;
    struct lane *lane;
    uint64_t us = 0;

    cr_assert_eq(batcher_new(&options, &batcher), 0);
    cr_assert_eq(lane_new(batcher, NULL, &lane), 0);
    for (uint32_t i = 0; i < 400; i++) {
        jobs[i] = (struct job){.lane = lane, .uid = 1, .known = 5, .arrived_us = i};
        cr_assert_eq(batcher_add(batcher, &jobs[i]), 0);
    }
    for (int s = 0; s < 3000; s++) {
        struct job *done[200];
        uint32_t n = 0;
        cr_assert(batcher_compose(batcher, lane, 0, &batch));
        us = step_us(cost, batch->n_columns);
        *ret_rows = batch->n_runnable;
        for (uint32_t i = 0; i < batch->n_jobs; i++)
            done[n++] = batch->jobs[i];
        batcher_charge(lane, us);
        batcher_close(batcher, lane, us);
        for (uint32_t i = 0; i < n; i++) {
            if (done[i]->fed == done[i]->known && ++done[i]->known == 45) { /* it has 40 tokens */
                batcher_remove(batcher, done[i]);
                *done[i] = (struct job){.lane = lane, .uid = 1, .known = 5};
                cr_assert_eq(batcher_add(batcher, done[i]), 0);
            }
        }
    }
    for (uint32_t i = 0; i < 400; i++)
        batcher_remove(batcher, &jobs[i]);
    lane_free(lane);
    batcher_free(batcher);
    free(jobs);
    return us;
}

Test(adaptive, steers_the_batch_of_those_that_generate)
{
    static const struct cost cost = {1000, 100};
    uint32_t rows;
    uint64_t us = steps_of_a_crowd(10000, &cost, &rows);

    cr_assert(us > 7000 && us < 12000, "%lu us with %u", us, rows);
    us = steps_of_a_crowd(0, &cost, &rows);
    cr_assert_eq(rows, 200, "without a target the batch is max_batch");
    us = steps_of_a_crowd(50000, &cost, &rows);
    cr_assert_eq(rows, 200, "a target that max_batch keeps anyway changes nothing");
}
