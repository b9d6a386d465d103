/* KV memory under pressure, in virtual time: who gives way to whom, and that everybody gets to the
 * end. Sequences and pages are the engine's own; nothing is computed. */
#include <errno.h>
#include <stdlib.h>

#include "tests/support/alloc_fail.h"
#include "tests/support/engine_run.h"
#include "tests/support/gguf_make.h"

#include "daemon/engine/kv.h"
#include "daemon/serve/batcher.h"
#include "daemon/serve/pressure.h"
#include "daemon/serve/request.h"
#include "lib/cleanup.h"

/* One slab: so many tiles of 16 tokens. */
#define BUDGET_TILES 31u
#define STEP_US      1000u
#define MOST_LIVE    64u

struct world {
    struct clock clock;
    uint64_t now_us;
    uint8_t *bytes;
    struct metrics *metrics;
    struct engine *engine;
    struct model *model;
    struct batcher *batcher;
    struct lane *lanes[2];
    struct pressure *pressure;
    struct request *live[MOST_LIVE];
    uint32_t n_live, n_ended;
    uint64_t tile_bytes, wake_us;
};

static uint64_t world_now_us(const struct clock *clock)
{
    return ((const struct world *)clock)->now_us;
}

static int admit(void *userdata, struct job *job)
{
    struct world *world = userdata;

    return pressure_begin(world->pressure, job_request(job), world->model);
}

static bool ready(void *userdata, const struct job *job)
{
    (void)userdata;
    return prefix_wait_over(&job_request((struct job *)job)->prefix_wait);
}

static int grow(void *userdata, struct job *job)
{
    struct world *world = userdata;

    return pressure_grow(world->pressure, job_request(job));
}

static struct gguf_source make_source(struct world *world)
{
    struct model_plan plan = tiny_model_plan();
    struct fault fault = {0};
    size_t len;

    plan.dim = 512;
    plan.kv_heads = plan.heads;
    plan.type = PLAN_Q8_0;
    plan.context = 1024;
    cr_assert_eq(make_model_bytes(&plan, &world->bytes, &len, &fault), 0, "%s", fault.text);
    return memory_source(world->bytes, len);
}

/* `share_tiles`: kv_per_uid. */
static struct world *world_new(uint32_t share_tiles, bool prefix_cache)
{
    static struct world the_world;
    struct world *world = &the_world;
    struct engine_options engine = {
        .kernels = test_kernels("scalar"), .threads = 1, .kv_budget_bytes = KV_SLAB_BYTES};
    struct batcher_options batching = {.max_batch = MOST_LIVE,
                                       .min_batch = 1,
                                       .chunk_target_us = 20000,
                                       .max_columns = ENGINE_MAX_COLUMNS,
                                       .admit = admit,
                                       .ready = ready,
                                       .grow = grow,
                                       .userdata = world};
    struct pressure_options options = {.prefix_cache = prefix_cache, .park_timeout_us = 30000000};

    *world = (struct world){.clock = {.now_us = world_now_us}, .now_us = 1000000};
    cr_assert_eq(metrics_new(&world->metrics), 0);
    cr_assert_eq(engine_new(&engine, &world->engine, NULL), 0);
    world->model = test_model(engine.kernels, make_source(world));
    world->tile_bytes = engine_kv_bytes(world->engine, world->model, KV_TILE);
    cr_assert_eq(KV_SLAB_BYTES / world->tile_bytes, BUDGET_TILES);
    options.per_uid_bytes = share_tiles * world->tile_bytes;
    cr_assert_eq(batcher_new(&batching, &world->batcher), 0);
    for (int i = 0; i < 2; i++)
        cr_assert_eq(lane_new(world->batcher, NULL, &world->lanes[i]), 0);
    options.engine = world->engine;
    options.batcher = world->batcher;
    options.metrics = world->metrics;
    options.clock = &world->clock;
    cr_assert_eq(pressure_new(&options, &world->pressure), 0);
    return world;
}

static void end(struct world *world, struct request *request)
{
    uint32_t at = 0;

    while (world->live[at] != request)
        at++;
    world->live[at] = world->live[--world->n_live];
    world->n_ended++;
    batcher_remove(world->batcher, &request->job);
    pressure_end(world->pressure, request);
    request_free(request);
}

static void world_free(struct world *world)
{
    struct engine_kv_stats kv;

    while (world->n_live > 0)
        end(world, world->live[0]);
    engine_kv_stats(world->engine, &kv);
    cr_expect(kv.used_bytes == 0 && kv.sequences == 0, "memory did not come back");
    for (int i = 0; i < 2; i++)
        lane_free(world->lanes[i]);
    batcher_free(world->batcher);
    model_free(world->model);
    engine_free(world->engine);
    pressure_free(world->pressure);
    metrics_free(world->metrics);
    free(world->bytes);
}

static struct request *add(struct world *world, uint32_t lane, uint32_t uid, uint32_t n_prompt,
                           uint32_t max_tokens)
{
    struct request *request = request_new();

    cr_assert(request && world->n_live < MOST_LIVE);
    request->kind = REQUEST_COMPLETE;
    request->ids = calloc(n_prompt + max_tokens, sizeof(*request->ids));
    for (uint32_t i = 0; i < n_prompt; i++)
        request->ids[i] = (int32_t)((i * 7 + world->n_live + world->n_ended) % 300);
    request->n_ids = request->n_prompt = n_prompt;
    request->max_tokens = max_tokens;
    request->runner_model = (struct runner_model *)&world->lanes[lane]; /* only compared */
    request->job = (struct job){
        .lane = world->lanes[lane], .uid = uid, .known = n_prompt, .arrived_us = world->now_us};
    world->live[world->n_live++] = request;
    cr_assert_eq(batcher_add(world->batcher, &request->job), 0);
    return request;
}

static uint32_t tiles(const struct request *request)
{
    return request->sequence ? sequence_room(request->sequence) / KV_TILE : 0;
}

static uint64_t uid_tiles(const struct world *world, uint32_t uid)
{
    return pressure_uid_bytes(world->pressure, uid) / world->tile_bytes;
}

/* What a step gave: a token each that has computed all it knew; who has all its tokens, ends. */
static void take_results(struct world *world, struct job **jobs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct request *request = job_request(jobs[i]);

        if (request->job.fed < request->job.known)
            continue;
        request->ids[request->n_ids++] = 7;
        request->job.known++;
        if (request->n_ids == request->n_prompt + request->max_tokens)
            end(world, request);
    }
    pressure_step_over(world->pressure);
}

/* A whole step of the lane: how many were in it. */
static uint32_t step(struct world *world, uint32_t lane)
{
    struct job *jobs[MOST_LIVE];
    const struct batch *batch;
    uint32_t n;

    world->now_us += STEP_US;
    if (!batcher_compose(world->batcher, world->lanes[lane], world->now_us, &batch))
        return 0;
    n = batch->n_jobs;
    memcpy(jobs, batch->jobs, n * sizeof(*jobs));
    batcher_charge(world->lanes[lane], STEP_US);
    batcher_close(world->batcher, world->lanes[lane], STEP_US);
    take_results(world, jobs, n);
    return n;
}

/* One slice of the lane that is due, as the engine thread does it; a step has three. False: there
 * is nothing to do. */
static bool slice(struct world *world)
{
    struct lane *lane = batcher_pick(world->batcher, world->now_us, &world->wake_us);
    static uint32_t n_slices[2];
    struct job *jobs[MOST_LIVE];
    const struct batch *batch;
    uint32_t which = lane == world->lanes[1], n;

    if (!lane)
        return false;
    world->now_us += STEP_US / 3;
    if (!lane_step_open(lane)) {
        n_slices[which] = 0;
        if (!batcher_compose(world->batcher, lane, world->now_us, &batch))
            return true;
    }
    batcher_charge(lane, STEP_US / 3);
    if (++n_slices[which] < 3)
        return true;
    batch = batcher_batch(lane);
    n = batch->n_jobs;
    memcpy(jobs, batch->jobs, n * sizeof(*jobs));
    batcher_close(world->batcher, lane, STEP_US);
    take_results(world, jobs, n);
    return true;
}

/* What must hold at any time. */
static void check(const struct world *world)
{
    struct engine_kv_stats kv;
    struct pressure_stats stats;
    uint64_t paid = 0, parked = 0;

    for (uint32_t uid = 0; uid < 4; uid++)
        paid += pressure_uid_bytes(world->pressure, uid);
    engine_kv_stats(world->engine, &kv);
    cr_assert_eq(paid, kv.used_bytes, "users pay for %lu of %lu bytes", paid, kv.used_bytes);
    cr_assert_leq(kv.used_bytes, KV_SLAB_BYTES);
    for (uint32_t i = 0; i < world->n_live; i++) {
        const struct request *r = world->live[i];
        cr_assert_eq(r->job.admitted, r->sequence != NULL);
        cr_assert(r->job.fed <= r->job.known && r->job.fed <= r->job.room);
        if (r->kv.is_parked && r->sequence)
            parked += sequence_bytes(r->sequence);
    }
    pressure_stats(world->pressure, &stats);
    cr_assert_eq(stats.parked_bytes, parked, "%lu parked bytes, not %lu", stats.parked_bytes,
                 parked);
}

static uint64_t preemptions(const struct world *world)
{
    return metrics_get(world->metrics, M_PREEMPTIONS);
}

/* Runs until all have ended. */
static void run_out(struct world *world, uint32_t most_slices)
{
    for (uint32_t n = 0; world->n_live > 0; n++) {
        cr_assert_lt(n, most_slices, "%u have not ended", world->n_live);
        cr_assert(slice(world), "%u wait for ever", world->n_live);
        check(world);
        cr_assert_null(batcher_refused(world->batcher));
    }
}

/* ---- admission and growth ---- */

Test(pressure, a_request_begins_with_its_prompt_and_a_little_and_grows_by_pages)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *request = add(world, 0, 1, 20, 300), *whole = add(world, 0, 1, 20, 5);
    uint32_t last = 0;

    step(world, 0);
    cr_expect_eq(tiles(request), 3, "20 + 16 tokens are %u tiles", tiles(request));
    cr_expect_eq(tiles(whole), 2, "no more than prompt and answer");
    for (uint32_t n = 0; n < 299; n++) {
        last = tiles(request);
        cr_assert_geq(request->job.room, request->job.known - 1);
        cr_assert_leq(last, MAX(3u, (request->job.known + KV_TILE - 1) / KV_TILE));
        step(world, 0);
    }
    cr_expect_eq(world->n_ended, 2);
    cr_expect_eq(last, 20);
    cr_expect_eq(preemptions(world), 0);
    world_free(world);
}

/* ---- the order of giving way ---- */

static uint64_t prefix_tiles(const struct world *world)
{
    struct engine_kv_stats kv;

    engine_kv_stats(world->engine, &kv);
    return kv.prefix_bytes / world->tile_bytes;
}

/* A text of uid 3 that is computed and kept: 4 tiles. */
static void keep_prefix(struct world *world)
{
    struct prefix_wait wait;
    struct sequence *sequence;
    int32_t ids[64] = {1, 2, 3};
    struct sequence_start start = {
        .reserve_tokens = 64, .share = true, .owner = 3, .ids = ids, .n_ids = 64};

    cr_assert_eq(sequence_begin(world->engine, world->model, &start, &sequence, &wait), 0);
    test_feed(world->engine, world->model, sequence, ids, 64, 64);
    sequence_retire(sequence, ids);
    cr_assert_eq(prefix_tiles(world), 4);
}

static void park(struct world *world, struct request *request)
{
    batcher_park(world->batcher, &request->job);
    pressure_park(world->pressure, request);
}

static void unpark(struct world *world, struct request *request)
{
    pressure_unpark(world->pressure, request);
    batcher_unpark(world->batcher, &request->job);
}

/* One grows until everything else has gone: prefixes, the parked ones (the longest first), then the
 * youngest of the user who holds most, and of the others. */
Test(pressure, prefixes_then_parked_then_the_youngest_of_who_holds_most)
{
    struct world *world = world_new(BUDGET_TILES, true);
    struct request *oldest, *parked[2], *rich[2], *poor, *order[5];
    uint32_t n = 0, at;

    keep_prefix(world);
    oldest = add(world, 0, 1, 16, 400);
    rich[0] = add(world, 0, 2, 70, 2);   /* 5 tiles, ends soon in the other lane's absence */
    rich[1] = add(world, 0, 2, 70, 2);   /* 5 */
    poor = add(world, 0, 3, 40, 2);      /* 3 */
    parked[0] = add(world, 0, 3, 40, 2); /* 3 */
    parked[1] = add(world, 0, 2, 40, 2); /* 3 */
    step(world, 0);
    cr_assert_eq(uid_tiles(world, 2), 13);
    /* Only the oldest is computed from here on: the others have not got their steps. */
    park(world, parked[1]);
    park(world, parked[0]);
    order[0] = parked[1];
    order[1] = parked[0];
    order[2] = rich[1];
    order[3] = rich[0];
    order[4] = poor;
    for (at = 0; at < 5; n++) {
        uint32_t before = at;

        cr_assert_lt(n, 40);
        oldest->job.known = oldest->n_ids += KV_TILE;
        cr_assert_eq(pressure_grow(world->pressure, oldest), 0);
        if (prefix_tiles(world) > 0)
            cr_assert_eq(preemptions(world), 0, "somebody gave way before an unused prefix");
        while (at < 5 && !order[at]->sequence)
            at++;
        cr_assert_eq(preemptions(world), at, "the %u. gave way out of turn", at + 1);
        cr_assert_leq(at, before + 1);
    }
    /* Nobody is left: it may have all there is. */
    oldest->job.known = BUDGET_TILES * KV_TILE;
    cr_expect_eq(pressure_grow(world->pressure, oldest), 0);
    cr_expect_eq(uid_tiles(world, 1), BUDGET_TILES);
    oldest->n_ids = oldest->n_prompt; /* its ids were not that many */
    world_free(world);
}

Test(pressure, the_youngest_gives_way_to_itself_and_waits_first)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *old = add(world, 0, 1, 215, 100), *young = add(world, 0, 1, 215, 100), *next;

    for (uint32_t i = 0; i < 16; i++)
        step(world, 0);
    cr_assert(tiles(old) + tiles(young) == BUDGET_TILES - 1 && preemptions(world) == 0);
    for (uint32_t i = 0; i < 40 && preemptions(world) == 0; i++)
        step(world, 0);
    cr_expect_eq(preemptions(world), 1);
    cr_expect(old->sequence && !young->sequence);
    cr_expect_eq(young->job.state, JOB_WAITING);
    cr_expect_eq(young->job.fed, 0);
    cr_expect_eq(young->job.known, young->n_ids, "it keeps what it knows");
    next = add(world, 0, 1, 8, 4);
    cr_expect_eq(step(world, 0), 1);
    cr_expect_null(next->sequence, "who came later does not pass");
    world_free(world);
}

/* The victim is in an open step of another model: it gives way when that is over, and meanwhile
 * nobody else has to. */
Test(pressure, who_is_in_an_open_step_gives_way_after_it)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *oldest = add(world, 0, 1, 100, 200), *mine = add(world, 0, 1, 20, 200);
    struct request *rich = add(world, 1, 2, 300, 100);
    const struct batch *open;

    step(world, 0);
    while (rich->job.fed < 300 || tiles(oldest) + tiles(mine) + tiles(rich) < BUDGET_TILES) {
        step(world, 1);
        if (rich->job.fed >= 300)
            step(world, 0);
    }
    while (oldest->job.known <= oldest->job.room) /* until it needs another page */
        step(world, 0);
    cr_assert(preemptions(world) == 0 && mine->sequence);
    cr_assert(batcher_compose(world->batcher, world->lanes[1], world->now_us, &open));
    cr_assert_eq(rich->job.chunk, 1);
    step(world, 0);
    cr_expect(rich->sequence && mine->sequence && preemptions(world) == 0);
    cr_expect_eq(oldest->job.fed, oldest->job.known - 1, "it was left out of the step");
    batcher_close(world->batcher, world->lanes[1], STEP_US);
    take_results(world, (struct job *[]){&rich->job}, 1);
    cr_expect_null(rich->sequence);
    cr_expect_eq(rich->n_ids, rich->job.known);
    step(world, 0);
    cr_expect_eq(oldest->job.fed, oldest->job.known - 1 + 0, "it goes on");
    cr_expect(oldest->job.room >= oldest->job.known - 1 && mine->sequence);
    world_free(world);
}

/* ---- shares ---- */

Test(pressure, a_user_alone_has_all_and_gives_way_when_somebody_comes)
{
    struct world *world = world_new(16, false);
    struct request *mine[10], *other[3];

    for (uint32_t i = 0; i < 10; i++)
        mine[i] = add(world, 0, 1, 33, 400); /* 4 tiles each */
    step(world, 0);
    cr_assert_eq(uid_tiles(world, 1), 28);
    for (uint32_t i = 0; i < 3; i++)
        other[i] = add(world, 1, 2, 60, 10); /* 5 tiles each */
    step(world, 1);
    for (uint32_t i = 0; i < 3; i++)
        cr_expect(other[i]->sequence, "the newcomer's %u. has no memory", i + 1);
    cr_expect_eq(uid_tiles(world, 1), 16, "not more than needed gives way");
    for (uint32_t i = 0; i < 7; i++)
        cr_expect_eq(mine[i]->sequence != NULL, i < 4, "the youngest give way, not %u", i);
    /* The other is not let above his own share by taking from the first. */
    add(world, 1, 2, 60, 10);
    step(world, 1);
    cr_expect_eq(uid_tiles(world, 2), 15);
    cr_expect_eq(uid_tiles(world, 1), 16);
    world_free(world);
}

Test(pressure, while_another_waits_a_user_begins_nothing_beyond_his_share)
{
    struct world *world = world_new(8, false);
    struct request *other;

    for (uint32_t i = 0; i < 3; i++)
        add(world, 0, 1, 33, 400); /* 4 tiles each */
    step(world, 0);
    cr_assert_eq(uid_tiles(world, 1), 12, "alone he may have more");
    other = add(world, 1, 2, 10, 4); /* waits in its lane, which has no step yet */
    add(world, 0, 1, 33, 400);
    step(world, 0);
    cr_expect_eq(uid_tiles(world, 1), 12);
    step(world, 1);
    cr_expect(other->sequence, "there is room enough: nobody had to give way for it");
    cr_expect_eq(preemptions(world), 0);
    step(world, 0);
    cr_expect_eq(uid_tiles(world, 1), 16, "nobody waits any more");
    world_free(world);
}

/* A request larger than its user's share, beside a user who never stops: both get on. */
Test(pressure, a_request_larger_than_the_share_takes_turns)
{
    struct world *world = world_new(8, false);
    struct request *giant = add(world, 0, 1, 200, 250), *last = giant;
    uint32_t n_small = 0, n_steps;

    for (n_steps = 0; n_steps < 40000 && world->live[0] == giant; n_steps++) {
        bool there = false;

        /* As much of the other's as the budget has room for, again and again. */
        while (world->n_live < 12) {
            last = add(world, 1, 2, 30, 20 + n_small % 7);
            n_small++;
        }
        cr_assert(slice(world));
        check(world);
        for (uint32_t i = 0; i < world->n_live; i++)
            there |= world->live[i] == giant;
        if (!there)
            break;
    }
    cr_assert(last != giant);
    cr_expect_lt(n_steps, 40000, "the giant is at token %u", giant->n_ids);
    cr_expect_gt(preemptions(world), 0);
    cr_expect_gt(world->n_ended, 30, "the other user got only %u", world->n_ended);
    world_free(world);
}

/* Another's texts, which came before and are long, leave no room for a large request; small ones
 * go on beside it, and give way to it once there is enough. */
Test(pressure, a_large_request_that_waits_holds_up_nobody_for_long)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *before = add(world, 0, 3, 150, 340), *large;
    uint32_t ended, n;

    while (before->job.fed < 150)
        slice(world);
    large = add(world, 0, 1, 340, 20); /* 23 tiles */
    for (n = 0, ended = 0; before->n_ids < 480; n++) {
        while (world->n_live < 6)
            add(world, 1, 2, 30, 60);
        ended = world->n_ended;
        cr_assert(slice(world));
        check(world);
        cr_assert_null(large->sequence);
        cr_assert_lt(n, 20000);
    }
    cr_expect_gt(ended, 8, "the small ones stood still: %u ended", ended);
    for (n = 0; before != NULL; n++) {
        bool there = false;

        cr_assert(slice(world));
        for (uint32_t i = 0; i < world->n_live; i++)
            there |= world->live[i] == before;
        if (!there)
            before = NULL;
        cr_assert_lt(n, 20000);
    }
    for (n = 0; !large->sequence; n++) {
        while (world->n_live < 6)
            add(world, 1, 2, 30, 60);
        cr_assert(slice(world));
        check(world);
        cr_assert_lt(n, 3000000 / (STEP_US / 3), "it waits on although there is enough");
    }
    run_out(world, 100000);
    world_free(world);
}

/* Two users fill the budget, each within his share; the third gets his part after a while. */
Test(pressure, a_third_user_is_not_kept_out_by_two)
{
    struct world *world = world_new(16, false);
    struct request *third;

    for (uint32_t i = 0; i < 8; i++)
        add(world, 0, 1 + i % 2, 33, 400); /* 4 tiles each */
    step(world, 0);
    cr_assert_geq(uid_tiles(world, 1) + uid_tiles(world, 2), 28);
    third = add(world, 1, 3, 60, 10); /* 5 tiles */
    step(world, 1);
    cr_expect_null(third->sequence, "nobody holds more than his share");
    world->now_us += 2 * BATCHER_PATIENCE_US;
    step(world, 1);
    cr_expect(third->sequence);
    cr_expect_eq(preemptions(world), 1);
    world_free(world);
}

/* ---- everybody gets to the end ---- */

static uint64_t oldest_that_holds(const struct world *world)
{
    uint64_t serial = UINT64_MAX;

    for (uint32_t i = 0; i < world->n_live; i++)
        if (world->live[i]->sequence)
            serial = MIN(serial, world->live[i]->job.serial);
    return serial;
}

static const struct request *find(const struct world *world, uint64_t serial)
{
    for (uint32_t i = 0; i < world->n_live; i++)
        if (world->live[i]->job.serial == serial)
            return world->live[i];
    return NULL;
}

/* Each needs almost the whole budget: the oldest that runs gives way only to one that came before
 * it, and so they end one after the other. */
Test(pressure, a_budget_of_one_sequence_serves_them_all)
{
    struct world *world = world_new(BUDGET_TILES, false);
    uint64_t oldest = UINT64_MAX;
    uint32_t n = 0;

    for (uint32_t i = 0; i < 12; i++)
        add(world, i % 2, 1 + i % 3, 40 + i, 420);
    for (; world->n_live > 0; n++) {
        const struct request *was = find(world, oldest);

        uint64_t now = oldest_that_holds(world);

        cr_assert(!was || was->sequence || now < oldest, "the oldest gave way to a younger one");
        oldest = now;
        cr_assert_lt(n, 12 * 3 * 2 * 460, "%u have not ended", world->n_live);
        cr_assert(slice(world), "%u wait for ever", world->n_live);
        check(world);
    }
    cr_expect_eq(world->n_ended, 12);
    cr_expect_gt(preemptions(world), 0);
    world_free(world);
}

/* Requests of all sizes, users and models come, are parked, come back and are cancelled. */
Test(pressure, whatever_happens_nobody_is_lost)
{
    for (unsigned seed = 1; seed <= 12; seed++) {
        struct world *world = world_new(4 + seed * 2, seed % 2);
        uint32_t n_added = 0;

        srand(seed);
        for (uint32_t n = 0; n < 6000; n++) {
            struct request *any = world->n_live ? world->live[rand() % world->n_live] : NULL;
            int what = rand() % 24;

            if (what < 2 && world->n_live < 30) {
                add(world, rand() % 2, rand() % 3, 1 + rand() % 250, 1 + rand() % 200);
                n_added++;
            } else if (what == 2 && any && any->job.chunk == 0 && any->job.fed > 0) {
                park(world, any);
            } else if (what == 3 && any && any->kv.is_parked) {
                unpark(world, any);
            } else if (what == 4 && any && any->job.chunk == 0 && rand() % 4 == 0) {
                end(world, any);
            } else {
                slice(world);
            }
            check(world);
        }
        for (uint32_t i = 0; i < world->n_live; i++)
            if (world->live[i]->kv.is_parked)
                unpark(world, world->live[i]);
        run_out(world, 200000);
        cr_expect_eq(world->n_ended, n_added);
        world_free(world);
    }
}

/* No memory for the table of a sequence's pages: it gives way and comes back. */
Test(pressure, a_lack_of_memory_while_growing_costs_time_alone)
{
    for (unsigned at = 1;; at++) {
        struct world *world = world_new(BUDGET_TILES, false);
        bool failed;

        add(world, 0, 1, 10, 200);
        add(world, 0, 1, 10, 150);
        step(world, 0);
        alloc_fail_at(at);
        for (uint32_t i = 0; i < 100; i++)
            step(world, 0);
        failed = alloc_fail_done();
        if (failed)
            cr_expect_eq(preemptions(world), 1);
        run_out(world, 10000);
        cr_expect_eq(world->n_ended, 2);
        world_free(world);
        if (!failed)
            break;
    }
}

/* ---- parked for long ---- */

Test(pressure, those_parked_too_long_are_named_in_their_order)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *a = add(world, 0, 1, 20, 100), *b = add(world, 0, 1, 20, 100);
    uint64_t next_us, parked_us;

    step(world, 0);
    cr_expect_null(pressure_overdue(world->pressure, world->now_us, &next_us));
    cr_expect_eq(next_us, UINT64_MAX);
    park(world, b);
    world->now_us += 5000000;
    park(world, a);
    parked_us = world->now_us;
    cr_expect_null(pressure_overdue(world->pressure, world->now_us, &next_us));
    cr_expect_eq(next_us, parked_us + 25000000);
    cr_expect_eq(pressure_overdue(world->pressure, next_us, &next_us), b);
    cr_expect(!b->sequence && a->sequence, "its memory goes at that time");
    pressure_unpark(world->pressure, b);
    cr_expect_null(pressure_overdue(world->pressure, next_us, &next_us));
    cr_expect_eq(next_us, parked_us + 30000000);
    world->now_us = parked_us + 29000000; /* a little credit came: its time begins anew */
    unpark(world, a);
    park(world, a);
    cr_expect_null(pressure_overdue(world->pressure, parked_us + 40000000, &next_us));
    cr_expect_eq(next_us, parked_us + 59000000);
    world_free(world);
}

Test(pressure, the_figures_name_parked_memory_and_the_largest_user)
{
    struct world *world = world_new(BUDGET_TILES, false);
    struct request *a = add(world, 0, 1, 60, 100);
    struct pressure_stats stats;

    add(world, 0, 2, 20, 100);
    step(world, 0);
    pressure_stats(world->pressure, &stats);
    cr_expect_eq(stats.most_uid_bytes, 5 * world->tile_bytes);
    cr_expect_eq(stats.parked_bytes, 0);
    park(world, a);
    pressure_stats(world->pressure, &stats);
    cr_expect_eq(stats.parked_bytes, 5 * world->tile_bytes);
    unpark(world, a);
    check(world);
    world_free(world);
}
