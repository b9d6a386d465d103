#include "bench/load.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"
#include "lib/wire.h"

#define EVENT_BATCH   256
#define PROGRESS_US   100000u
#define LAST_REPLY_US 30000000u /* how long answers are waited for after the end */

struct load;

struct connection {
    struct load *load;
    struct hearth *hearth;
    struct slot *slots, *free_slots;
    uint32_t events;
    bool dirty;
    struct connection *next_dirty;
};

/* One request under way. */
struct slot {
    struct connection *connection;
    uint64_t intended_us, first_us;
    struct slot *next, *next_free;
};

struct load {
    const struct load_options *options;
    struct load_result *result;
    struct connection *connections;
    struct connection *dirty;
    int epoll_fd;
    uint64_t begin_us, end_us; /* of the measurement */
    uint64_t next_us;          /* open loop: the next request's time */
    uint64_t n_sent, n_live, n_done;
    uint32_t turn;
    uint64_t random;
    bool over;
};

static uint64_t now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

/* xorshift64* (Vigna 2016): a uniform number in (0, 1]. */
static double uniform(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return ((double)((*state * 0x2545f4914f6cdd1du) >> 11) + 1) / 9007199254740992.0;
}

static void submit(struct connection *c, uint64_t intended_us);

static void count_error(struct load *load, const struct hearth_reply *reply)
{
    int code =
        reply->lost || !reply->code ? -1 : wire_code_from_name(reply->code, strlen(reply->code));

    load->result->errors++;
    load->result->codes[code < 0 ? LOAD_CODES - 1 : (unsigned)code]++;
    if (!load->result->message[0])
        snprintf(load->result->message, sizeof(load->result->message), "%s: %s",
                 reply->code ? reply->code : "lost", reply->sentence ? reply->sentence : "");
}

static void count_end(struct load *load, const struct slot *slot, const struct hearth_reply *reply,
                      uint64_t now)
{
    load->n_done++;
    /* Only what was meant to leave within the measurement counts, warm-up does not. */
    if (slot->intended_us < load->begin_us || slot->intended_us >= load->end_us)
        return;
    if (reply->kind == HEARTH_ERROR) {
        count_error(load, reply);
        return;
    }
    load->result->requests++;
    load->result->tokens += reply->completion_tokens;
    histogram_add(&load->result->latency, now - slot->intended_us);
    if (slot->first_us)
        histogram_add(&load->result->first_token, slot->first_us - slot->intended_us);
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct slot *slot = userdata;
    struct connection *c = slot->connection;
    struct load *load = c->load;
    uint64_t now;

    if (reply->kind == HEARTH_TOKENS || reply->kind == HEARTH_ITEM) {
        if (!slot->first_us)
            slot->first_us = now_us();
        return;
    }
    now = now_us();
    count_end(load, slot, reply, now);
    slot->next_free = c->free_slots;
    c->free_slots = slot;
    load->n_live--;
    if (load->options->rate <= 0 && !load->over && !reply->lost)
        submit(c, now);
}

/* The model whose turn it is. */
static const char *model_now(const struct load_options *options, uint64_t begin_us, uint64_t now)
{
    if (!options->other_model || now < begin_us)
        return options->model;
    return (now - begin_us) / options->turn_us % 2 ? options->other_model : options->model;
}

static int send_request(struct load *load, struct connection *c, struct slot *slot)
{
    const struct load_options *options = load->options;
    struct hearth_generate generate = HEARTH_GENERATE_INIT;

    if (options->kind == LOAD_NULL)
        return hearth_null(c->hearth, on_reply, slot, NULL);
    generate.model = model_now(options, load->begin_us, slot->intended_us);
    generate.prompt = options->prompts[load->n_sent % options->n_prompts];
    generate.max_tokens = options->max_tokens;
    generate.no_stream = !options->stream;
    generate.temperature = 0;
    generate.ignore_eos = true;
    return options->kind == LOAD_EMBED
               ? hearth_embed(c->hearth, &generate, on_reply, slot, NULL)
               : hearth_complete(c->hearth, &generate, on_reply, slot, NULL);
}

static struct slot *take_slot(struct connection *c)
{
    struct slot *slot = c->free_slots;

    if (slot) {
        c->free_slots = slot->next_free;
        return slot;
    }
    slot = malloc(sizeof(*slot));
    if (slot) {
        *slot = (struct slot){.connection = c, .next = c->slots};
        c->slots = slot;
    }
    return slot;
}

static void submit(struct connection *c, uint64_t intended_us)
{
    struct load *load = c->load;
    struct slot *slot = take_slot(c);

    if (!slot)
        return;
    slot->intended_us = intended_us;
    slot->first_us = 0;
    load->n_live++;
    if (send_request(load, c, slot) < 0) {
        struct hearth_reply failed = {.kind = HEARTH_ERROR, .lost = true};
        failed.sentence = hearth_message(c->hearth);
        load->over = true;
        on_reply(slot, &failed);
    }
    load->n_sent++;
    if (!c->dirty) {
        c->dirty = true;
        c->next_dirty = load->dirty;
        load->dirty = c;
    }
}

static void flush(struct load *load)
{
    struct connection *c;

    while ((c = load->dirty)) {
        short events;
        load->dirty = c->next_dirty;
        c->dirty = false;
        hearth_dispatch(c->hearth);
        events = hearth_events(c->hearth);
        if ((uint32_t)events != c->events) {
            struct epoll_event event = {.events = (uint32_t)events, .data.ptr = c};
            epoll_ctl(load->epoll_fd, EPOLL_CTL_MOD, hearth_fd(c->hearth), &event);
            c->events = (uint32_t)events;
        }
    }
}

static int connect_all(struct load *load)
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;

    options.socket_path = load->options->socket_path;
    options.client_name = "hearth-bench";
    for (uint32_t i = 0; i < load->options->connections; i++) {
        struct connection *c = &load->connections[i];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        int r = hearth_connect(&options, &c->hearth, load->result->message);
        if (r < 0)
            return r;
        c->load = load;
        c->events = EPOLLIN;
        if (epoll_ctl(load->epoll_fd, EPOLL_CTL_ADD, hearth_fd(c->hearth), &event) < 0)
            return -errno;
    }
    return 0;
}

/* Sends what is due; open loop: the requests whose time has come. */
static void send_due(struct load *load, uint64_t now)
{
    const struct load_options *options = load->options;

    while (options->rate > 0 && load->next_us <= now && !load->over) {
        submit(&load->connections[load->turn++ % options->connections], load->next_us);
        load->next_us += (uint64_t)(-log(uniform(&load->random)) * 1e6 / options->rate + 0.5);
    }
}

static void loop(struct load *load)
{
    struct epoll_event events[EVENT_BATCH];
    uint64_t report_us = 0, now;

    while ((now = now_us()) < load->end_us || load->n_live > 0) {
        if (load->options->stop && atomic_load(load->options->stop))
            load->end_us = MIN(load->end_us, MAX(now, load->begin_us));
        uint64_t wake_us = MIN(load->end_us, report_us);
        struct timespec timeout = {0};
        int n;
        if (now >= load->end_us) {
            load->over = true;
            wake_us = now + PROGRESS_US;
            if (load->options->abandon || now > load->end_us + LAST_REPLY_US)
                break;
        }
        send_due(load, now);
        if (load->options->rate > 0 && !load->over)
            wake_us = MIN(wake_us, load->next_us);
        flush(load);
        if (now >= report_us) {
            report_us = now + PROGRESS_US;
            if (load->options->progress)
                load->options->progress(load->options->userdata,
                                        ((double)now - (double)load->begin_us) / 1e6, load->n_done);
        }
        if (wake_us > now)
            timeout.tv_nsec = (long)MIN(wake_us - now, 999999u) * 1000;
        n = epoll_pwait2(load->epoll_fd, events, EVENT_BATCH, &timeout, NULL);
        if (n < 0 && errno == ENOSYS) /* a kernel before 5.11, or valgrind */
            n = epoll_wait(load->epoll_fd, events, EVENT_BATCH,
                           (int)((timeout.tv_nsec + 999999) / 1000000));
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (hearth_dispatch(c->hearth) < 0)
                load->over = true;
        }
    }
}

/* What nobody answered is an error. */
static void count_unanswered(struct load *load)
{
    struct load_result *result = load->result;

    if (load->options->abandon)
        return;
    result->errors += load->n_live;
    result->codes[LOAD_CODES - 1] += load->n_live;
    if (load->n_live > 0 && !result->message[0])
        snprintf(result->message, sizeof(result->message), "%llu requests had no answer after %u s",
                 (unsigned long long)load->n_live, LAST_REPLY_US / 1000000u);
}

static void load_done(struct load *load)
{
    for (uint32_t i = 0; i < load->options->connections; i++) {
        struct connection *c = &load->connections[i];
        struct slot *slot;
        hearth_free(c->hearth);
        while ((slot = c->slots)) {
            c->slots = slot->next;
            free(slot);
        }
    }
    free(load->connections);
    close(load->epoll_fd);
}

static int run_kept(const struct load_options *options, struct load_result *result)
{
    struct load load = {.options = options, .result = result, .random = options->seed | 1};
    int r;

    load.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    load.connections = calloc(options->connections, sizeof(*load.connections));
    if (!load.connections || load.epoll_fd < 0)
        return -ENOMEM;
    r = connect_all(&load);
    load.begin_us = now_us() + options->warmup_us;
    load.end_us = load.begin_us + options->duration_us;
    load.next_us = now_us();
    for (uint32_t i = 0; r == 0 && options->rate <= 0 && i < options->in_flight; i++)
        for (uint32_t c = 0; c < options->connections; c++)
            submit(&load.connections[c], now_us());
    if (r == 0)
        loop(&load);
    count_unanswered(&load);
    result->duration_s = (double)(load.end_us - load.begin_us) / 1e6;
    load_done(&load);
    return r;
}

/* ---- a connection for each request: a thread for each that are open at once ---- */

struct fresh_thread {
    const struct load_options *options;
    struct load_result result;
    uint64_t begin_us, end_us;
    _Atomic uint64_t *n_done; /* of all threads */
    uint32_t index;
    pthread_t thread;
};

struct fresh_request {
    struct load load;
    struct connection connection;
    struct slot slot;
    bool ended;
};

static void on_fresh_reply(void *userdata, const struct hearth_reply *reply)
{
    struct fresh_request *request = userdata;

    if (reply->kind == HEARTH_TOKENS || reply->kind == HEARTH_ITEM) {
        if (!request->slot.first_us)
            request->slot.first_us = now_us();
        return;
    }
    count_end(&request->load, &request->slot, reply, now_us());
}

static void fresh_once(struct fresh_thread *self, uint64_t n)
{
    const struct load_options *options = self->options;
    struct hearth_options connect = HEARTH_OPTIONS_INIT;
    struct hearth_generate generate = HEARTH_GENERATE_INIT;
    struct fresh_request request = {0};
    struct hearth *hearth = NULL;
    char message[HEARTH_MESSAGE_BYTES] = "";
    uint64_t id = 0;
    int r;

    request.load = (struct load){.options = options,
                                 .result = &self->result,
                                 .begin_us = self->begin_us,
                                 .end_us = self->end_us};
    request.slot.intended_us = now_us();
    connect.socket_path = options->socket_path;
    r = hearth_connect(&connect, &hearth, message);
    generate.model = model_now(options, self->begin_us, request.slot.intended_us);
    generate.prompt =
        options->n_prompts > 0
            ? options->prompts[(n * options->connections + self->index) % options->n_prompts]
            : "";
    generate.max_tokens = options->max_tokens;
    generate.no_stream = !options->stream;
    generate.temperature = 0;
    generate.ignore_eos = true;
    if (r == 0 && options->kind == LOAD_NULL)
        r = hearth_null(hearth, on_fresh_reply, &request, &id);
    else if (r == 0 && options->kind == LOAD_EMBED)
        r = hearth_embed(hearth, &generate, on_fresh_reply, &request, &id);
    else if (r == 0)
        r = hearth_complete(hearth, &generate, on_fresh_reply, &request, &id);
    if (r == 0)
        r = hearth_finish(hearth, id, LAST_REPLY_US);
    if (r < 0) {
        struct hearth_reply failed = {.kind = HEARTH_ERROR, .lost = true, .sentence = message};
        count_end(&request.load, &request.slot, &failed, now_us());
    }
    hearth_free(hearth);
    atomic_fetch_add_explicit(self->n_done, 1, memory_order_relaxed);
}

static void *fresh_main(void *argument)
{
    struct fresh_thread *self = argument;

    for (uint64_t n = 0; now_us() < self->end_us; n++)
        fresh_once(self, n);
    return NULL;
}

static void merge(struct load_result *result, const struct load_result *other)
{
    result->requests += other->requests;
    result->errors += other->errors;
    result->tokens += other->tokens;
    histogram_merge(&result->latency, &other->latency);
    histogram_merge(&result->first_token, &other->first_token);
    for (uint32_t i = 0; i < LOAD_CODES; i++)
        result->codes[i] += other->codes[i];
    if (!result->message[0])
        memcpy(result->message, other->message, sizeof(result->message));
}

static void fresh_progress(const struct load_options *options, uint64_t begin_us,
                           const _Atomic uint64_t *n_done)
{
    uint64_t now, end_us = begin_us + options->duration_us;

    while (options->progress && (now = now_us()) < end_us) {
        options->progress(options->userdata, ((double)now - (double)begin_us) / 1e6,
                          atomic_load_explicit(n_done, memory_order_relaxed));
        usleep((useconds_t)MIN(end_us - now, PROGRESS_US));
    }
}

static int run_fresh(const struct load_options *options, struct load_result *result)
{
    struct fresh_thread *threads = calloc(options->connections, sizeof(*threads));
    uint64_t begin_us = now_us() + options->warmup_us;
    _Atomic uint64_t n_done = 0;
    uint32_t n = 0;
    int r = threads ? 0 : -ENOMEM;

    for (; r == 0 && n < options->connections; n++) {
        threads[n].options = options;
        threads[n].begin_us = begin_us;
        threads[n].end_us = begin_us + options->duration_us;
        threads[n].index = n;
        threads[n].n_done = &n_done;
        r = -pthread_create(&threads[n].thread, NULL, fresh_main, &threads[n]);
        if (r < 0)
            break;
    }
    if (r == 0)
        fresh_progress(options, begin_us, &n_done);
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(threads[i].thread, NULL);
        merge(result, &threads[i].result);
    }
    free(threads);
    return r;
}

int load_run(const struct load_options *options, struct load_result *ret_result)
{
    int r;

    memset(ret_result, 0, sizeof(*ret_result));
    ret_result->duration_s = (double)options->duration_us / 1e6;
    r = options->fresh ? run_fresh(options, ret_result) : run_kept(options, ret_result);
    return r;
}
