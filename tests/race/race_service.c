/* A whole daemon under ThreadSanitizer, with sixteen clients that load, unload, pin, hold and ask
 * for models in any order, beside readers of events and values. Every answer must be the same text,
 * every request must end, and in the end nothing may be held. */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/config.h"
#include "daemon/engine/kernels.h"
#include "daemon/log.h"
#include "daemon/model/builtin.h"
#include "daemon/net/server.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

#define N_CLIENTS    16u
#define N_OPERATIONS 1000u
#define N_READERS    3u
#define PATIENCE_US  50000000u
#define TEXT_BYTES   256u

static const char *const names[] = {"a", "b", "c", "d"};
static const struct clock real_clock = {.now_us = clock_monotonic_us};

struct world {
    char dir[64], socket[96];
    _Atomic uint32_t operations, answers, refusals, news, pushes, clients_left;
    pthread_mutex_t lock;
    char text[TEXT_BYTES]; /* the answer, once one is there; under the lock */
};

struct client {
    struct world *world;
    struct hearth *h;
    unsigned random;
    uint64_t hold; /* 0: none */
};

/* What a request has brought. */
struct outcome {
    char text[TEXT_BYTES];
    size_t len;
    const char *code;
    uint32_t items, ends;
};

static unsigned next_random(struct client *client, unsigned bound)
{
    client->random = client->random * 1103515245u + 12345u;
    return client->random / 65536 % bound;
}

/* How a request on a crowded daemon may end besides well. */
static const char *allowed(const char *code)
{
    static const char *const codes[] = {"cancelled", "no-memory", "shutting-down"};

    for (size_t i = 0; i < ELEMENTSOF(codes); i++)
        if (strcmp(code, codes[i]) == 0)
            return codes[i];
    fprintf(stderr, "ended with %s\n", code);
    return NULL;
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct outcome *outcome = userdata;

    if (reply->kind == HEARTH_ITEM)
        outcome->items++;
    if (reply->kind == HEARTH_DONE || reply->kind == HEARTH_ERROR)
        outcome->ends++;
    if (reply->kind == HEARTH_ERROR)
        assert((outcome->code = allowed(reply->code)));
    if (reply->kind == HEARTH_TOKENS && outcome->len + reply->text_bytes < TEXT_BYTES) {
        memcpy(outcome->text + outcome->len, reply->text, reply->text_bytes);
        outcome->len += reply->text_bytes;
    }
}

static struct hearth *must_connect(struct world *world, bool status)
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES] = "";
    int r;

    options.socket_path = world->socket;
    options.status_socket = status;
    r = hearth_connect(&options, &h, message);
    if (r < 0)
        fprintf(stderr, "%s\n", message);
    assert(r == 0);
    return h;
}

static void finish(struct client *client, uint64_t id, struct outcome *outcome)
{
    assert(hearth_finish(client->h, id, PATIENCE_US) == 0);
    assert(outcome->ends == 1);
    atomic_fetch_add(&client->world->operations, 1);
    if (outcome->code)
        atomic_fetch_add(&client->world->refusals, 1);
}

static void complete(struct client *client, const char *name, bool cancelled)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct outcome outcome = {0};
    struct world *world = client->world;
    uint64_t id;

    request.model = name;
    request.prompt = "Once upon a time";
    request.max_tokens = 4;
    request.temperature = 0;
    request.keep_alive_us = next_random(client, 8) ? 0 : 1000;
    assert(hearth_complete(client->h, &request, on_reply, &outcome, &id) == 0);
    if (cancelled)
        hearth_cancel(client->h, id);
    finish(client, id, &outcome);
    if (cancelled || outcome.code)
        return;
    atomic_fetch_add(&world->answers, 1);
    pthread_mutex_lock(&world->lock);
    if (!world->text[0])
        memcpy(world->text, outcome.text, sizeof(world->text));
    assert(strcmp(world->text, outcome.text) == 0);
    pthread_mutex_unlock(&world->lock);
}

static void order(struct client *client, const char *name, unsigned what)
{
    struct hearth_set set = HEARTH_SET_INIT;
    struct outcome outcome = {0};
    uint64_t id;
    int r;

    set.model = name;
    set.has_preload = what < 2;
    set.preload = what == 1;
    set.has_pinned = what == 2 || what == 3;
    set.pinned = what == 3;
    if (what <= 3)
        r = hearth_set(client->h, &set, on_reply, &outcome, &id);
    else if (what == 4)
        r = hearth_unload(client->h, name, on_reply, &outcome, &id);
    else if (what == 5)
        r = hearth_reload(client->h, on_reply, &outcome, &id);
    else
        r = hearth_warm(client->h, name, what == 6, on_reply, &outcome, &id);
    assert(r == 0);
    finish(client, id, &outcome);
}

static void let_go(struct client *client)
{
    if (!client->hold)
        return;
    hearth_cancel(client->h, client->hold); /* -ENOENT where it has ended by itself */
    assert(hearth_finish(client->h, client->hold, PATIENCE_US) == 0);
    client->hold = 0;
    atomic_fetch_add(&client->world->operations, 1);
}

static void on_hold(void *userdata, const struct hearth_reply *reply)
{
    (void)userdata;
    if (reply->kind == HEARTH_ERROR && !reply->lost)
        assert(allowed(reply->code));
}

static void hold(struct client *client, const char *name)
{
    let_go(client);
    assert(hearth_hold(client->h, name, on_hold, NULL, &client->hold) == 0);
    if (next_random(client, 4) > 0)
        return;
    hearth_free(client->h); /* the connection's end lets go, too */
    client->h = must_connect(client->world, false);
    client->hold = 0;
}

static void *run_client(void *userdata)
{
    static const unsigned orders[] = {0, 1, 4, 4, 4, 5, 6, 7};
    struct client *client = userdata;
    struct world *world = client->world;

    client->h = must_connect(world, false);
    while (atomic_load(&world->operations) < N_OPERATIONS) {
        const char *name = names[next_random(client, ELEMENTSOF(names))];
        unsigned chance = next_random(client, 16);
        if (chance < 6)
            complete(client, name, chance == 0);
        else if (chance == 6)
            hold(client, name);
        else if (chance < 9)
            let_go(client);
        else if (chance < 11)
            order(client, name, 2); /* what is pinned is let go soon */
        else if (chance == 11 && next_random(client, 4) == 0)
            order(client, name, 3);
        else
            order(client, name, orders[next_random(client, ELEMENTSOF(orders))]);
    }
    let_go(client);
    hearth_free(client->h);
    if (atomic_fetch_sub(&world->clients_left, 1) == 1)
        kill(getpid(), SIGTERM);
    return NULL;
}

/* ---- readers ---- */

struct reader {
    struct world *world;
    const char *what;
    uint32_t seen, ends;
};

static void on_news(void *userdata, const struct hearth_reply *reply)
{
    struct reader *reader = userdata;

    if (reply->kind == HEARTH_ITEM && (reply->text || reply->state))
        reader->seen++;
    else if (reply->kind == HEARTH_ERROR)
        reader->ends++;
}

static void *run_reader(void *userdata)
{
    struct reader *reader = userdata;
    struct hearth *h = must_connect(reader->world, true);
    uint64_t id;

    assert(hearth_act_for(h, 1000, NULL, 0) == 0);
    assert(hearth_subscribe(h, reader->what, on_news, reader, &id) == 0);
    while (reader->ends == 0 && hearth_wait(h, PATIENCE_US) >= 0)
        ;
    assert(reader->ends == 1 && reader->seen > 0);
    hearth_free(h);
    return NULL;
}

/* ---- the daemon ---- */

static void write_models(const struct world *world)
{
    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        char path[128];
        snprintf(path, sizeof(path), "%s/%s.gguf", world->dir, names[i]);
        FILE *file = fopen(path, "w");
        assert(file && fwrite(builtin_bytes(), 1, builtin_size(), file) == builtin_size());
        assert(fclose(file) == 0);
    }
}

static struct config *make_config(const struct world *world)
{
    struct config *config = NULL;

    assert(config_new(&config) == 0);
    assert(config_add_models_dir(config, world->dir) == 0);
    assert(config_set_state_dir(config, world->dir) == 0);
    /* Room for two of the four. */
    config->engine.kv_budget = (struct config_size){.bytes = 8u << 20};
    config->memory_budget = (struct config_size){.bytes = (8u << 20) + builtin_size() * 5 / 2};
    return config;
}

static void block_signals(void)
{
    sigset_t signals;

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
}

int main(void)
{
    struct world world = {.dir = "/tmp/hearth-race-XXXXXX",
                          .lock = PTHREAD_MUTEX_INITIALIZER,
                          .clients_left = N_CLIENTS};
    struct server_options options = {.clock = &real_clock};
    struct client clients[N_CLIENTS];
    struct reader readers[N_READERS];
    pthread_t threads[N_CLIENTS + N_READERS];
    struct server *server = NULL;
    struct metrics *metrics;
    struct config *config;
    struct fault fault = {0};
    char command[96];

    assert(mkdtemp(world.dir));
    snprintf(world.socket, sizeof(world.socket), "%s/s", world.dir);
    write_models(&world);
    block_signals();
    log_open(LOG_ERR);
    config = make_config(&world);
    assert(metrics_new(&metrics) == 0);
    assert(kernels_choose(NULL, &options.kernels, NULL) == 0);
    options.config = config;
    options.metrics = metrics;
    options.socket_path = world.socket;
    if (server_new(&options, &server, &fault) < 0) {
        fprintf(stderr, "%s\n", fault.text);
        return 1;
    }
    for (uint32_t i = 0; i < N_READERS; i++) {
        readers[i] = (struct reader){.world = &world, .what = i == 0 ? "events" : "values"};
        pthread_create(&threads[N_CLIENTS + i], NULL, run_reader, &readers[i]);
    }
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = (struct client){.world = &world, .random = i + 1};
        pthread_create(&threads[i], NULL, run_client, &clients[i]);
    }
    assert(server_run(server) == 0);
    for (uint32_t i = 0; i < ELEMENTSOF(threads); i++)
        pthread_join(threads[i], NULL);
    assert(metrics_get(metrics, M_QUEUE) == 0);
    assert(metrics_get(metrics, M_KV_USED) == 0);
    server_free(server);
    assert(atomic_load(&world.answers) > 0);
    printf("%u operations, %u answers, %u refused, %llu loads\n", world.operations, world.answers,
           world.refusals, (unsigned long long)metrics_get(metrics, M_LOADS));
    printf("%u events, %u and %u items of values\n", readers[0].seen, readers[1].seen,
           readers[2].seen);
    metrics_free(metrics);
    config_free(config);
    snprintf(command, sizeof(command), "rm -rf %s", world.dir);
    return system(command) == 0 ? 0 : 1;
}
