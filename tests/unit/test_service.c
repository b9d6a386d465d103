/* The service without a reactor: frames go in from a peer of the test's own, and what its threads
 * have to say is taken when the test takes it. Time stands still but for what the test adds. Where
 * a thread must stand still, a kernel of its work waits at a gate. */
#include <criterion/criterion.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>

#include "daemon/engine/kernels.h"
#include "daemon/model/builtin.h"
#include "daemon/serve/service.h"
#include "lib/cleanup.h"
#include "tests/support/gate.h"

#define LIMIT_MS 20000 /* for whatever must come */

static struct gate step_gate = GATE_SHUT, load_gate = GATE_SHUT;
static const struct kernel_table *scalar;

static void gated_norm(const float *x, const float *weight, uint32_t n, float eps, float *y)
{
    pass_gate(&step_gate);
    scalar->rms_norm(x, weight, n, eps, y);
}

static void gated_pack(struct tensor *tensor, uint32_t row_begin, uint32_t n_rows, const void *rows)
{
    pass_gate(&load_gate);
    scalar->pack(tensor, row_begin, n_rows, rows);
}

static _Atomic uint64_t now_us;

static uint64_t virtual_now(const struct clock *clock)
{
    (void)clock;
    return atomic_load(&now_us);
}

struct world {
    struct clock clock;
    struct kernel_table kernels;
    struct config *config;
    struct metrics *metrics;
    struct service *service;
    struct service_source sources[SERVICE_SOURCES];
    struct peer peer;
    uint64_t last_id;
};

static void wants_flush(struct peer *peer)
{
    (void)peer;
}

/* Both gates are open. */
static void begin(struct world *world)
{
    struct service_options options = {0};
    struct refusal refusal;

    *world = (struct world){.clock = {.now_us = virtual_now}};
    atomic_store(&now_us, 1000000000);
    open_gate(&step_gate);
    open_gate(&load_gate);
    cr_assert_eq(kernels_choose("scalar", &scalar, NULL), 0);
    world->kernels = *scalar;
    world->kernels.rms_norm = gated_norm;
    world->kernels.pack = gated_pack;
    cr_assert_eq(config_new(&world->config), 0);
    cr_assert_eq(config_add_models_dir(world->config, "/nonexistent"), 0); /* the built-in alone */
    world->config->engine.threads = 1;
    world->config->engine.kv_budget = (struct config_size){.bytes = 8u << 20};
    world->config->drain_timeout_us = 100000;
    cr_assert_eq(metrics_new(&world->metrics), 0);
    options = (struct service_options){.config = world->config,
                                       .kernels = &world->kernels,
                                       .metrics = world->metrics,
                                       .clock = &world->clock};
    cr_assert_eq(service_new(&options, &world->service, NULL), 0);
    service_sources(world->service, world->sources);
    world->peer =
        (struct peer){.uid = geteuid(), .file_fd = -1, .number = 1, .wants_flush = wants_flush};
    world->peer.account =
        admission_connect(service_admission(world->service), world->peer.uid, &refusal);
    cr_assert_not_null(world->peer.account);
}

static void take(struct world *world, uint32_t source)
{
    world->sources[source].dispatch(world->service);
}

/* Until somebody has something to say: which it is. */
static uint32_t wait_for_news(const struct world *world)
{
    struct pollfd pollfds[SERVICE_SOURCES];

    for (uint32_t i = 0; i < SERVICE_SOURCES; i++)
        pollfds[i] = (struct pollfd){.fd = world->sources[i].fd, .events = POLLIN};
    cr_assert_gt(poll(pollfds, SERVICE_SOURCES, LIMIT_MS), 0, "nothing comes");
    for (uint32_t i = 0; i + 1 < SERVICE_SOURCES; i++)
        if (pollfds[i].revents)
            return i;
    return SERVICE_SOURCES - 1;
}

/* ---- the peer ---- */

static void send_frame(struct world *world, struct wire_buffer *frame)
{
    struct wire_header header;
    struct refusal refusal;

    cr_assert_eq(wire_end(frame), 0);
    cr_assert_eq(wire_header_read(frame->data, &header), 0);
    service_wake(world->service);
    cr_assert_eq(service_frame(world->service, &world->peer, &header,
                               frame->data + WIRE_HEADER_BYTES, &refusal),
                 0);
    wire_buffer_done(frame);
}

/* Asks for so many tokens; deadline_us 0: when they come. */
static uint64_t ask(struct world *world, uint64_t max_tokens, uint64_t deadline_us)
{
    struct wire_buffer frame = {0};

    wire_begin(&frame, WIRE_COMPLETE, ++world->last_id);
    wire_put_text(&frame, TAG_PROMPT, "Once upon a time");
    wire_put_number(&frame, TAG_MAX_TOKENS, max_tokens);
    wire_put_number(&frame, TAG_IGNORE_EOS, 1);
    if (deadline_us > 0)
        wire_put_number(&frame, TAG_DEADLINE_US, deadline_us);
    send_frame(world, &frame);
    return world->last_id;
}

static void note(struct world *world, enum wire_type type, uint64_t id)
{
    struct wire_buffer frame = {0};

    wire_begin(&frame, type, id);
    send_frame(world, &frame);
}

static void unload(struct world *world)
{
    struct wire_buffer frame = {0};

    wire_begin(&frame, WIRE_UNLOAD, ++world->last_id);
    wire_put_text(&frame, TAG_MODEL, BUILTIN_NAME);
    send_frame(world, &frame);
}

/* How a request has ended: "done", its error's code, or "" while it runs. */
static const char *ending(const struct world *world, uint64_t id)
{
    static char word[32];
    const struct wire_buffer *out = &world->peer.out;

    for (size_t at = 0; at < out->len;) {
        struct wire_header header;
        struct wire_reader reader;
        struct wire_option option;
        cr_assert_eq(wire_header_read(out->data + at, &header), 0);
        wire_reader_init(&reader, out->data + at + WIRE_HEADER_BYTES, header.body_len);
        at += WIRE_HEADER_BYTES + header.body_len;
        if (header.id == id && header.type == WIRE_DONE)
            return "done";
        while (header.id == id && header.type == WIRE_ERROR &&
               wire_reader_next(&reader, &option) > 0)
            if (option.tag == TAG_CODE) {
                snprintf(word, sizeof(word), "%.*s", (int)option.len, (const char *)option.value);
                return word;
            }
    }
    return "";
}

static void expect_ending(struct world *world, uint64_t id, const char *word)
{
    while (!ending(world, id)[0])
        take(world, wait_for_news(world));
    cr_assert_str_eq(ending(world, id), word);
}

static void leave(struct world *world)
{
    service_peer_gone(world->service, &world->peer);
    admission_disconnect(service_admission(world->service), world->peer.account);
    wire_buffer_done(&world->peer.out);
}

static void end(struct world *world)
{
    while (!service_shut_down(world->service))
        take(world, wait_for_news(world));
    service_free(world->service);
    metrics_free(world->metrics);
    config_free(world->config);
}

/* ---- time ---- */

Test(service, a_drain_is_over_when_its_time_is)
{
    struct world world;
    uint64_t id;

    begin(&world);
    expect_ending(&world, ask(&world, 1, 0), "done");
    service_tick(world.service);
    cr_assert_gt(service_due_us(world.service), now_us + 100000, "nothing is due so soon");
    shut_gate(&step_gate);
    id = ask(&world, 50, 0);
    wait_at_gate(&step_gate, 1);
    unload(&world);
    cr_assert_eq(service_due_us(world.service), now_us + 100000);
    service_tick(world.service);
    cr_assert_eq(service_due_us(world.service), now_us + 100000, "a look does not put it off");
    atomic_fetch_add(&now_us, 100000);
    service_tick(world.service);
    cr_assert_gt(service_due_us(world.service), now_us, "once");
    open_gate(&step_gate);
    expect_ending(&world, id, "shutting-down");
    leave(&world);
    end(&world);
}

Test(service, a_deadline_is_due_though_the_model_is_not_there)
{
    struct world world;
    uint64_t id;

    begin(&world);
    shut_gate(&load_gate);
    service_tick(world.service);
    id = ask(&world, 1, 40000);
    cr_assert_eq(service_due_us(world.service), now_us + 40000);
    atomic_fetch_add(&now_us, 40000);
    service_tick(world.service);
    cr_assert_str_eq(ending(&world, id), "deadline");
    cr_assert_gt(service_due_us(world.service), now_us);
    open_gate(&load_gate);
    leave(&world);
    end(&world);
}

/* ---- the end ---- */

/* The engine thread's answer to a message that came too late for a request is under way when all
 * ends: nobody will take it. What is left over is a leak, which a sanitizer's run tells. */
Test(service, in_a_hurry_nothing_is_left_of_a_request_that_is_over)
{
    struct world world;
    uint64_t id;

    begin(&world);
    expect_ending(&world, ask(&world, 1, 0), "done");
    id = ask(&world, 1, 0);
    cr_assert_eq(wait_for_news(&world), 0, "the engine thread has done it");
    shut_gate(&step_gate);
    ask(&world, 50, 0);
    wait_at_gate(&step_gate, 1);
    note(&world, WIRE_CANCEL, id);
    expect_ending(&world, id, "done");
    leave(&world);
    open_gate(&step_gate);
    service_free(world.service);
    metrics_free(world.metrics);
    config_free(world.config);
}
