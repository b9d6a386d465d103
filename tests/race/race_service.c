/* A whole daemon under ThreadSanitizer, with sixteen clients that load, unload, pin, hold and ask
 * for models in any order, beside readers of events and values. They ask for short texts and for
 * long ones that the tokenizer thread takes, for vectors, several at once, with deadlines; they
 * read at once, byte by byte, or so late that their streams are put to sleep, and they cancel or
 * leave in the middle. A second daemon answers in order. Where root allows it the clients are three
 * users.
 *
 * The models differ. Each is asked each question once while nobody else asks anything: that is its
 * answer, no other model's, and every later one must be the same. Every request must end, and in
 * the end nothing may be held. */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/config.h"
#include "daemon/engine/kernels.h"
#include "daemon/log.h"
#include "daemon/net/server.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"
#include "tests/support/gguf_make.h"

#define N_CLIENTS       16u
#define N_MODELS        4u
#define N_OPERATIONS    1500u /* one daemon's */
#define N_READERS       3u
#define N_AT_ONCE       5u
#define PATIENCE_US     50000000u
#define TICK_US         2000u
#define MOST_TICKS      20000u
#define PARK_TIMEOUT_US 10000u
#define MOST_DOZES      50u /* of PARK_TIMEOUT_US */
#define TEXT_BYTES      512u
#define LONG_WORDS      120u /* " grandmother": more bytes than the reactor tokenizes itself */

static const char *const names[N_MODELS] = {"a", "b", "c", "d"};
static const struct clock real_clock = {.now_us = clock_monotonic_us};
static char long_prompt[LONG_WORDS * sizeof(" grandmother")];

/* What is asked; a model's answer to each is always the same. */
enum question { SHORT_TEXT, LONG_TEXT, STORY, VECTOR, N_QUESTIONS };

struct answer {
    char text[TEXT_BYTES];
    size_t len;
};

struct world {
    char dir[64], socket[96];
    struct metrics *metrics;
    bool in_order; /* batching.preserve_order */
    bool users;    /* the clients are several */
    _Atomic uint32_t operations, refusals, clients_left, slept, left, late;
    /* Passed when the models' own answers are there, which do not change from then on. */
    pthread_barrier_t all_asked_alone;
    struct answer answers[N_MODELS][N_QUESTIONS];
    _Atomic uint32_t n_answers[N_MODELS][N_QUESTIONS]; /* compared with these */
};

struct client {
    struct world *world;
    struct hearth *h;
    uid_t uid;
    bool is_first;
    unsigned random;
    uint32_t n_ends;
    uint64_t hold; /* 0: none */
};

/* What a request has brought. */
struct outcome {
    struct client *client;
    uint32_t model;
    enum question question;
    uint64_t id;
    struct answer answer;
    const char *code; /* of its error, or NULL */
    bool cancelled, hurried;
    uint32_t items, ends, place; /* which of the client's ends it was */
};

static unsigned next_random(struct client *client, unsigned bound)
{
    client->random = client->random * 1103515245u + 12345u;
    return client->random / 65536 % bound;
}

/* How a request on a crowded daemon may end besides well. */
static const char *allowed(const struct client *client, const char *code, bool hurried)
{
    static const char *const codes[] = {"cancelled", "no-memory", "shutting-down"};
    static const char *const of_users[] = {"forbidden", "busy"}; /* by rights, by limits */

    for (size_t i = 0; i < ELEMENTSOF(codes); i++)
        if (strcmp(code, codes[i]) == 0)
            return codes[i];
    for (size_t i = 0; client->uid != geteuid() && i < ELEMENTSOF(of_users); i++)
        if (strcmp(code, of_users[i]) == 0)
            return of_users[i];
    if (hurried && strcmp(code, "deadline") == 0)
        return "deadline";
    fprintf(stderr, "ended with %s\n", code);
    return NULL;
}

static void keep(struct outcome *outcome, const void *bytes, size_t n)
{
    struct answer *answer = &outcome->answer;

    assert(answer->len + n <= TEXT_BYTES);
    memcpy(answer->text + answer->len, bytes, n);
    answer->len += n;
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct outcome *outcome = userdata;
    struct client *client = outcome->client;

    if (reply->kind == HEARTH_ITEM)
        outcome->items++;
    if (reply->kind == HEARTH_DONE || reply->kind == HEARTH_ERROR) {
        outcome->ends++;
        outcome->place = client->n_ends++;
    }
    if (reply->kind == HEARTH_ERROR) {
        outcome->code = allowed(client, reply->code, outcome->hurried);
        assert(outcome->code);
    }
    if (reply->kind == HEARTH_TOKENS)
        keep(outcome, reply->text, reply->text_bytes);
    if (reply->kind == HEARTH_ITEM && reply->vector)
        keep(outcome, reply->vector, MIN(reply->n_vector * sizeof(float), TEXT_BYTES));
}

/* As the client's user: the thread's own uid, so that others are what they are meanwhile. */
static void become(uid_t uid)
{
    assert(syscall(SYS_setresuid, -1, uid, -1) == 0);
}

static struct hearth *must_connect(struct world *world, bool status, uid_t uid)
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    struct hearth *h = NULL;
    char message[HEARTH_MESSAGE_BYTES] = "";
    uid_t own = geteuid();
    int r;

    options.socket_path = world->socket;
    options.status_socket = status;
    if (uid != own)
        become(uid);
    r = hearth_connect(&options, &h, message);
    if (uid != own)
        become(own);
    if (r < 0)
        fprintf(stderr, "%s\n", message);
    assert(r == 0);
    return h;
}

/* The connection's end is the end of all that it had. */
static void come_back(struct client *client)
{
    client->h = hearth_free(client->h);
    client->h = must_connect(client->world, false, client->uid);
    client->hold = 0;
}

static void finish(struct client *client, uint64_t id, struct outcome *outcome)
{
    assert(hearth_finish(client->h, id, PATIENCE_US) == 0);
    assert(outcome->ends == 1);
    atomic_fetch_add(&client->world->operations, 1);
    if (outcome->code)
        atomic_fetch_add(&client->world->refusals, 1);
}

/* ---- questions ---- */

static struct hearth_generate make_request(struct client *client, uint32_t model,
                                           enum question question)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;

    request.model = names[model];
    request.prompt = question == LONG_TEXT ? long_prompt : "Once upon a time";
    request.max_tokens = question == STORY ? 24 : 4;
    request.ignore_eos = true;
    request.temperature = 0;
    request.keep_alive_us = next_random(client, 8) ? 0 : 1000;
    return request;
}

static void ask(struct client *client, uint32_t model, enum question question,
                const struct hearth_generate *request, struct outcome *outcome)
{
    int r;

    *outcome = (struct outcome){.client = client,
                                .model = model,
                                .question = question,
                                .hurried = request->deadline_us > 0};
    if (question == VECTOR)
        r = hearth_embed(client->h, request, on_reply, outcome, &outcome->id);
    else
        r = hearth_complete(client->h, request, on_reply, outcome, &outcome->id);
    assert(r == 0);
}

static void cancel(struct outcome *outcome)
{
    hearth_cancel(outcome->client->h, outcome->id); /* -ENOENT where it has ended by itself */
    outcome->cancelled = true;
}

static bool same(const struct answer *a, const struct answer *b)
{
    return a->len == b->len && memcmp(a->text, b->text, a->len) == 0;
}

static void settle(struct outcome *outcome)
{
    struct client *client = outcome->client;
    struct world *world = client->world;

    finish(client, outcome->id, outcome);
    if (outcome->code && strcmp(outcome->code, "deadline") == 0)
        atomic_fetch_add(&world->late, 1);
    if (outcome->cancelled || outcome->code)
        return;
    assert(same(&outcome->answer, &world->answers[outcome->model][outcome->question]));
    atomic_fetch_add(&world->n_answers[outcome->model][outcome->question], 1);
}

/* Every question to every model, by the first client while all others wait. */
static void ask_alone(struct client *client)
{
    struct world *world = client->world;

    for (uint32_t i = 0; i < N_MODELS * N_QUESTIONS; i++) {
        uint32_t model = i / N_QUESTIONS;
        enum question question = i % N_QUESTIONS;
        struct answer *answer = &world->answers[model][question];
        struct hearth_generate request = make_request(client, model, question);
        struct outcome outcome;

        ask(client, model, question, &request, &outcome);
        finish(client, outcome.id, &outcome);
        assert(!outcome.code && outcome.answer.len > 0);
        *answer = outcome.answer;
        for (uint32_t other = 0; other < model; other++)
            assert(!same(answer, &world->answers[other][question]));
    }
}

static void ask_one(struct client *client, uint32_t model)
{
    enum question question = next_random(client, N_QUESTIONS);
    struct hearth_generate request = make_request(client, model, question);
    struct outcome outcome;

    if (next_random(client, 6) == 0)
        request.deadline_us = 1 + next_random(client, 20000);
    request.no_stream = next_random(client, 4) == 0;
    ask(client, model, question, &request, &outcome);
    if (next_random(client, 6) == 0)
        cancel(&outcome);
    settle(&outcome);
}

/* Several at once, of one model or of many; with preserve_order they end as they were asked. */
static void ask_several(struct client *client, uint32_t model)
{
    struct outcome outcomes[N_AT_ONCE];
    bool spread = next_random(client, 2);

    for (uint32_t i = 0; i < N_AT_ONCE; i++) {
        enum question question = next_random(client, N_QUESTIONS);
        uint32_t whose = spread ? next_random(client, N_MODELS) : model;
        struct hearth_generate request = make_request(client, whose, question);
        ask(client, whose, question, &request, &outcomes[i]);
    }
    if (next_random(client, 3) == 0)
        cancel(&outcomes[next_random(client, N_AT_ONCE)]);
    for (uint32_t i = 0; i < N_AT_ONCE; i++)
        settle(&outcomes[i]);
    for (uint32_t i = 1; client->world->in_order && i < N_AT_ONCE; i++)
        assert(outcomes[i].place > outcomes[i - 1].place);
}

enum manner { READS_SLOWLY, DOZES, CANCELS, LEAVES, N_MANNERS };

/* A reader that has its mind elsewhere once the story has begun: until a stream is asleep, or for
 * ever. False: it has left. */
static bool behave(struct client *client, struct outcome *outcome, enum manner manner)
{
    struct world *world = client->world;

    if (manner == DOZES) {
        for (uint32_t i = 0; i < MOST_DOZES && metrics_get(world->metrics, M_STREAMS_ASLEEP) == 0;
             i++)
            usleep(PARK_TIMEOUT_US);
        if (metrics_get(world->metrics, M_STREAMS_ASLEEP) > 0)
            atomic_fetch_add(&world->slept, 1);
    } else if (manner == CANCELS) {
        cancel(outcome);
    } else if (manner == LEAVES) {
        atomic_fetch_add(&world->operations, 1);
        atomic_fetch_add(&world->left, 1);
        come_back(client);
        return false;
    }
    return true;
}

/* A story in credit of a few bytes: less than a character, at times. */
static void read_slowly(struct client *client, uint32_t model)
{
    struct hearth_generate request = make_request(client, model, STORY);
    enum manner manner = next_random(client, N_MANNERS);
    struct outcome outcome;
    bool begun = false;

    request.manual_credit = true;
    request.credit = 3;
    ask(client, model, STORY, &request, &outcome);
    for (uint32_t ticks = 0; outcome.ends == 0; ticks++) {
        int r = hearth_wait(client->h, TICK_US);
        assert((r >= 0 || r == -ETIMEDOUT) && ticks < MOST_TICKS);
        if (!begun && outcome.answer.len > 8 && outcome.ends == 0) {
            begun = true;
            if (!behave(client, &outcome, manner))
                return;
        }
        hearth_credit(client->h, outcome.id, 1 + next_random(client, 8)); /* -ENOENT: it is over */
    }
    settle(&outcome);
}

/* ---- orders ---- */

static void order(struct client *client, const char *name, unsigned what)
{
    struct hearth_set set = HEARTH_SET_INIT;
    struct outcome outcome = {.client = client};
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

static void give_order(struct client *client, uint32_t model)
{
    static const unsigned orders[] = {0, 1, 4, 4, 4, 5, 6, 7};

    order(client, names[model], orders[next_random(client, ELEMENTSOF(orders))]);
}

/* What is pinned is let go soon. */
static void unpin(struct client *client, uint32_t model)
{
    order(client, names[model], next_random(client, 12) ? 2 : 3);
}

static void let_go(struct client *client, uint32_t model)
{
    (void)model; /* whichever it holds */
    if (!client->hold)
        return;
    hearth_cancel(client->h, client->hold); /* -ENOENT where it has ended by itself */
    assert(hearth_finish(client->h, client->hold, PATIENCE_US) == 0);
    client->hold = 0;
    atomic_fetch_add(&client->world->operations, 1);
}

static void on_hold(void *userdata, const struct hearth_reply *reply)
{
    if (reply->kind == HEARTH_ERROR && !reply->lost)
        assert(allowed(userdata, reply->code, false));
}

static void hold(struct client *client, uint32_t model)
{
    let_go(client, model);
    assert(hearth_hold(client->h, names[model], on_hold, client, &client->hold) == 0);
    if (next_random(client, 4) == 0)
        come_back(client); /* the connection's end lets go, too */
}

static void *run_client(void *userdata)
{
    static void (*const operations[])(struct client *, uint32_t) = {
        ask_one, ask_one,     ask_one,     ask_several, ask_several, hold,  let_go,     let_go,
        unpin,   read_slowly, read_slowly, read_slowly, unpin,       unpin, give_order, give_order};
    struct client *client = userdata;
    struct world *world = client->world;

    client->h = must_connect(world, false, client->uid);
    if (client->is_first)
        ask_alone(client);
    pthread_barrier_wait(&world->all_asked_alone);
    while (atomic_load(&world->operations) < N_OPERATIONS) {
        uint32_t model = next_random(client, N_MODELS);
        operations[next_random(client, ELEMENTSOF(operations))](client, model);
    }
    let_go(client, 0);
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
    struct hearth *h = must_connect(reader->world, true, geteuid());
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

/* The size of one; they are all of the same shape. */
static uint64_t write_models(const struct world *world)
{
    struct model_plan plan = tiny_model_plan();
    struct stat st;

    plan.type = PLAN_F16;
    plan.vocab = 3000; /* the long text is no more than its context */
    plan.context = 2048;
    for (uint32_t i = 0; i < N_MODELS; i++) {
        char path[128];
        snprintf(path, sizeof(path), "%s/%s.gguf", world->dir, names[i]);
        plan.seed = i;
        assert(make_model_file(&plan, path, NULL) == 0);
        assert(chmod(path, 0644) == 0 && stat(path, &st) == 0);
    }
    return (uint64_t)st.st_size;
}

static struct config *make_config(const struct world *world, uint64_t model_bytes)
{
    struct config *config = NULL;

    assert(config_new(&config) == 0);
    assert(config_add_models_dir(config, world->dir) == 0);
    assert(config_set_state_dir(config, world->dir) == 0);
    /* Room for two of the four at work, whose steps take as much as their weights. */
    config->engine.kv_budget = (struct config_size){.bytes = 8u << 20};
    config->memory_budget = (struct config_size){.bytes = (8u << 20) + model_bytes * 5};
    config->streaming.park_timeout_us = PARK_TIMEOUT_US;
    config->batching.preserve_order = world->in_order;
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

/* Starts all, serves until the last client has gone, and joins them. */
static void serve(struct world *world, struct server *server)
{
    static struct client clients[N_CLIENTS];
    struct reader readers[N_READERS];
    pthread_t threads[N_CLIENTS + N_READERS];

    for (uint32_t i = 0; i < N_READERS; i++) {
        readers[i] = (struct reader){.world = world, .what = i == 0 ? "events" : "values"};
        pthread_create(&threads[N_CLIENTS + i], NULL, run_reader, &readers[i]);
    }
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] =
            (struct client){.world = world, .is_first = i == 0, .random = i + 1, .uid = geteuid()};
        if (world->users && i % 4 > 1)
            clients[i].uid = 1000 + i % 4;
        pthread_create(&threads[i], NULL, run_client, &clients[i]);
    }
    assert(server_run(server) == 0);
    for (uint32_t i = 0; i < ELEMENTSOF(threads); i++)
        pthread_join(threads[i], NULL);
    printf("%u events, %u and %u items of values\n", readers[0].seen, readers[1].seen,
           readers[2].seen);
}

static void report(const struct world *world)
{
    printf("%s, %s: %u operations, %u refused, %u too late, %u slept, %u left, %lu loads; answers",
           world->in_order ? "in order" : "as they come",
           world->users ? "three users" : "one user, as only root can be others", world->operations,
           world->refusals, world->late, world->slept, world->left,
           metrics_get(world->metrics, M_LOADS));
    for (uint32_t i = 0; i < N_MODELS * N_QUESTIONS; i++) {
        uint32_t n = world->n_answers[i / N_QUESTIONS][i % N_QUESTIONS];
        printf(" %u", n);
        assert(n > 0);
    }
    printf("\n");
    assert(world->left > 0 && world->slept > 0);
}

static void run(bool in_order)
{
    static struct world world;
    struct server_options options = {.clock = &real_clock};
    struct server *server = NULL;
    struct config *config;
    struct fault fault = {0};
    char command[96];

    world = (struct world){.dir = "/tmp/hearth-race-XXXXXX",
                           .clients_left = N_CLIENTS,
                           .in_order = in_order,
                           .users = geteuid() == 0};
    assert(mkdtemp(world.dir));
    snprintf(world.socket, sizeof(world.socket), "%s/s", world.dir);
    pthread_barrier_init(&world.all_asked_alone, NULL, N_CLIENTS);
    config = make_config(&world, write_models(&world));
    assert(metrics_new(&world.metrics) == 0);
    assert(kernels_choose(NULL, &options.kernels, NULL) == 0);
    options.config = config;
    options.metrics = world.metrics;
    options.socket_path = world.socket;
    if (server_new(&options, &server, &fault) < 0)
        fprintf(stderr, "%s\n", fault.text);
    assert(server);
    if (world.users) /* others find the socket, too */
        assert(chmod(world.dir, 0711) == 0 && chmod(world.socket, 0666) == 0);
    serve(&world, server);
    assert(metrics_get(world.metrics, M_QUEUE) == 0);
    assert(metrics_get(world.metrics, M_KV_USED) == 0);
    server_free(server);
    report(&world);
    metrics_free(world.metrics);
    config_free(config);
    pthread_barrier_destroy(&world.all_asked_alone);
    snprintf(command, sizeof(command), "rm -rf %s", world.dir);
    assert(system(command) == 0);
}

int main(void)
{
    for (uint32_t i = 0; i < LONG_WORDS; i++)
        strcat(long_prompt, " grandmother");
    block_signals();
    log_open(LOG_ERR);
    run(false);
    run(true);
    return 0;
}
