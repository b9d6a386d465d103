#include "tests/support/status_daemon.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "lib/cleanup.h"

#define CLIENTS_MAX 32u
#define INPUT_BYTES 65536u
#define TYPES_MAX   32u
#define HOLDS_MAX   128u
#define CALLER_MAX  512u
/* How long a client may leave no room for what it is sent. */
#define SEND_LIMIT_MS 10000

/* A test cannot go on without it. */
#define MUST(expression)         \
    do {                         \
        if (!(expression)) {     \
            perror(#expression); \
            abort();             \
        }                        \
    } while (0)

struct client {
    int fd; /* -1: free */
    bool greeted;
    uint64_t values_id, events_id; /* of its subscriptions; 0: none */
    bool fed;                      /* has had its first push */
    uint64_t holds[HOLDS_MAX];     /* ids; 0: free */
    uint8_t in[INPUT_BYTES];
    size_t n_in;
};

struct status_daemon {
    char path[108], status_path[120];
    int main_fd, status_fd, wake_fd;
    pthread_t thread;
    pthread_mutex_t lock; /* guards all below, and the clients */
    bool over, mute, push;
    char model[64], gone[64], state[32], caller[CALLER_MAX];
    bool pinned;
    uint64_t keep_alive_us;
    const char *refuse;
    uint64_t counts[TYPES_MAX];
    struct client clients[CLIENTS_MAX];
};

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    MUST(fd >= 0);
    MUST(strlen(path) < sizeof(address.sun_path));
    strcpy(address.sun_path, path);
    unlink(path);
    MUST(bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    MUST(listen(fd, 64) == 0);
    return fd;
}

static void client_close(struct client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    client->fd = -1;
    client->n_in = 0;
    client->greeted = client->fed = false;
    client->values_id = client->events_id = 0;
    memset(client->holds, 0, sizeof(client->holds));
}

static void send_all(struct client *client, struct wire_buffer *out)
{
    struct pollfd room = {.fd = client->fd, .events = POLLOUT};
    size_t sent = 0;

    /* Many events at once are more than a socket's buffer; a peer that has gone is noticed when
     * reading. */
    while (sent < out->len) {
        ssize_t n = send(client->fd, out->data + sent, out->len - sent, MSG_NOSIGNAL);
        if (n > 0)
            sent += (size_t)n;
        else if (n == 0 || errno != EAGAIN || poll(&room, 1, SEND_LIMIT_MS) <= 0)
            break;
    }
    wire_buffer_done(out);
}

static void put_end(struct wire_buffer *out, uint64_t id, const char *code)
{
    wire_begin(out, code ? WIRE_ERROR : WIRE_DONE, id);
    if (code) {
        wire_put_text(out, TAG_CODE, code);
        wire_put_text(out, TAG_SENTENCE, "refused, as the test wants it");
    } else {
        wire_put_text(out, TAG_REASON, "stop");
    }
    wire_end(out);
}

static uint64_t n_holds(const struct status_daemon *daemon)
{
    uint64_t n = 0;

    for (size_t i = 0; i < CLIENTS_MAX; i++)
        for (size_t k = 0; k < HOLDS_MAX; k++)
            n += daemon->clients[i].holds[k] != 0;
    return n;
}

static void put_model(const struct status_daemon *daemon, struct wire_buffer *out, uint64_t id)
{
    bool ready = strcmp(daemon->state, "ready") == 0;

    wire_begin(out, WIRE_ITEM, id);
    wire_put_text(out, TAG_MODEL, daemon->model);
    wire_put_text(out, TAG_STATE, daemon->state);
    wire_put_number(out, TAG_DONE_BYTES, ready ? 1000 : 0);
    wire_put_number(out, TAG_TOTAL_BYTES, 1000);
    wire_put_number(out, TAG_PINNED, daemon->pinned);
    wire_put_number(out, TAG_KEEP_ALIVE_US, daemon->keep_alive_us);
    wire_put_number(out, TAG_HOLDS, n_holds(daemon));
    wire_end(out);
}

static void put_status(struct wire_buffer *out, uint64_t id)
{
    wire_begin(out, WIRE_ITEM, id);
    wire_put_text(out, TAG_STATE, "running");
    wire_put_text(out, TAG_VERSION, "7.7.7");
    wire_end(out);
}

static void put_metrics(struct wire_buffer *out, uint64_t id, const char *name)
{
    char text[128];

    if (strcmp(name, "prometheus") == 0)
        strcpy(text, "# TYPE hearth_steps_total counter\nhearth_steps_total 5\n");
    else
        snprintf(text, sizeof(text), "section_%.32s 1\n", name);
    wire_begin(out, WIRE_ITEM, id);
    wire_put_text(out, TAG_NAME, name);
    wire_put_text(out, TAG_TEXT, text);
    wire_end(out);
}

static void put_push(struct status_daemon *daemon, struct client *client)
{
    static const char *const sections[] = {"prometheus", "pool", "batcher", "streaming", "loader"};
    struct wire_buffer out = {0};

    if (client->fed && daemon->gone[0]) {
        wire_begin(&out, WIRE_ITEM, client->values_id);
        wire_put_text(&out, TAG_MODEL, daemon->gone);
        wire_end(&out);
    }
    put_model(daemon, &out, client->values_id);
    for (size_t i = 0; !client->fed && i < ELEMENTSOF(sections); i++)
        put_metrics(&out, client->values_id, sections[i]);
    put_status(&out, client->values_id);
    client->fed = true;
    send_all(client, &out);
}

/* Pushes to all who have subscribed. */
static void push(struct status_daemon *daemon)
{
    for (size_t i = 0; !daemon->mute && i < CLIENTS_MAX; i++)
        if (daemon->clients[i].fd >= 0 && daemon->clients[i].values_id)
            put_push(daemon, &daemon->clients[i]);
    daemon->gone[0] = '\0';
}

static void note_caller(struct status_daemon *daemon, const struct wire_option *option)
{
    size_t used = 0;

    daemon->caller[0] = '\0';
    for (uint32_t at = 0; at + 4 <= option->len && used + 16 < CALLER_MAX; at += 4) {
        uint32_t word;
        memcpy(&word, option->value + at, sizeof(word));
        used += (size_t)snprintf(daemon->caller + used, CALLER_MAX - used, at ? " %u" : "%u",
                                 le32toh(word));
    }
}

/* What a request says, as far as anybody here wants to know. */
struct asked {
    char word[64]; /* model or name */
    bool has_pinned, pinned, has_keep_alive;
    uint64_t keep_alive_us;
};

static void parse(struct status_daemon *daemon, const uint8_t *body, size_t len,
                  struct asked *ret_asked)
{
    struct wire_reader reader;
    struct wire_option option;
    uint64_t number = 0;

    *ret_asked = (struct asked){0};
    strcpy(daemon->caller, "self");
    wire_reader_init(&reader, body, len);
    while (wire_reader_next(&reader, &option) > 0) {
        (void)wire_option_number(&option, &number);
        switch (option.tag) {
        case TAG_MODEL:
        case TAG_NAME:
            snprintf(ret_asked->word, sizeof(ret_asked->word), "%.*s", (int)MIN(option.len, 63u),
                     (const char *)option.value);
            break;
        case TAG_ON_BEHALF_OF: note_caller(daemon, &option); break;
        case TAG_PINNED:
            ret_asked->has_pinned = true;
            ret_asked->pinned = number;
            break;
        case TAG_KEEP_ALIVE_US:
            ret_asked->has_keep_alive = true;
            ret_asked->keep_alive_us = number;
            break;
        default: break;
        }
    }
}

static void set(struct status_daemon *daemon, const struct asked *asked)
{
    if (daemon->refuse)
        return;
    if (asked->has_pinned)
        daemon->pinned = asked->pinned;
    if (asked->has_keep_alive)
        daemon->keep_alive_us = asked->keep_alive_us;
}

static void hold(struct status_daemon *daemon, struct client *client, uint64_t id,
                 struct wire_buffer *out)
{
    for (size_t i = 0; !daemon->refuse && i < HOLDS_MAX; i++) {
        if (client->holds[i])
            continue;
        client->holds[i] = id;
        if (strcmp(daemon->state, "cold") == 0)
            strcpy(daemon->state, "queued");
        put_model(daemon, out, id);
        return;
    }
    put_end(out, id, daemon->refuse ? daemon->refuse : "busy");
}

static void subscribe(struct status_daemon *daemon, struct client *client, uint64_t id,
                      const char *what, struct wire_buffer *out)
{
    bool values = strcmp(what, "values") == 0;

    if (values && !daemon->push) {
        put_end(out, id, "bad-request");
        return;
    }
    if (values) {
        client->values_id = id;
        client->fed = false;
        put_push(daemon, client);
    } else {
        client->events_id = id;
    }
}

static void cancel(struct client *client, uint64_t id, struct wire_buffer *out)
{
    bool found = id == client->values_id || id == client->events_id;

    if (id == client->values_id)
        client->values_id = 0;
    if (id == client->events_id)
        client->events_id = 0;
    for (size_t i = 0; i < HOLDS_MAX; i++)
        if (client->holds[i] == id) {
            client->holds[i] = 0;
            found = true;
        }
    if (found)
        put_end(out, id, NULL);
}

static bool is_order(uint16_t type)
{
    return type == WIRE_WARM || type == WIRE_UNLOAD || type == WIRE_SET || type == WIRE_HOLD;
}

static void answer(struct status_daemon *daemon, struct client *client,
                   const struct wire_header *header, const uint8_t *body)
{
    struct wire_buffer out = {0};
    struct asked asked;
    char caller[CALLER_MAX];

    daemon->counts[header->type % TYPES_MAX]++;
    strcpy(caller, daemon->caller);
    parse(daemon, body, header->body_len, &asked);
    if (!is_order(header->type))
        strcpy(daemon->caller, caller);
    switch (header->type) {
    case WIRE_HELLO:
        wire_append(&out, WIRE_MAGIC, WIRE_MAGIC_BYTES);
        wire_begin(&out, WIRE_HELLO, 0);
        wire_put_text(&out, TAG_VERSION, "7.7.7");
        wire_put_number(&out, TAG_FRAME_LIMIT, WIRE_DEFAULT_FRAME);
        wire_end(&out);
        break;
    case WIRE_PING: put_end(&out, header->id, NULL); break;
    case WIRE_CANCEL: cancel(client, header->id, &out); break;
    case WIRE_STATUS: put_status(&out, header->id); goto done;
    case WIRE_MODELS: put_model(daemon, &out, header->id); goto done;
    case WIRE_METRICS: put_metrics(&out, header->id, asked.word); goto done;
    case WIRE_HOLD: hold(daemon, client, header->id, &out); break;
    case WIRE_SUBSCRIBE: subscribe(daemon, client, header->id, asked.word, &out); break;
    case WIRE_WARM:
        if (!daemon->refuse)
            strcpy(daemon->state, "queued");
        put_end(&out, header->id, daemon->refuse);
        break;
    case WIRE_UNLOAD:
        if (!daemon->refuse)
            strcpy(daemon->state, "cold");
        put_end(&out, header->id, daemon->refuse);
        break;
    case WIRE_SET:
        set(daemon, &asked);
        put_end(&out, header->id, daemon->refuse);
        break;
    default:
        put_end(&out, header->id, "bad-request");
        break;
    done:
        put_end(&out, header->id, NULL);
    }
    send_all(client, &out);
    if (is_order(header->type) || header->type == WIRE_CANCEL)
        push(daemon);
}

/* Answers the whole frames that have arrived. */
static void handle(struct status_daemon *daemon, struct client *client)
{
    size_t at = 0;

    if (!client->greeted) {
        if (client->n_in < WIRE_MAGIC_BYTES)
            return;
        at = WIRE_MAGIC_BYTES;
        client->greeted = true;
    }
    while (client->n_in - at >= WIRE_HEADER_BYTES) {
        struct wire_header header;
        MUST(wire_header_read(client->in + at, &header) == 0);
        if (client->n_in - at < WIRE_HEADER_BYTES + header.body_len)
            break;
        answer(daemon, client, &header, client->in + at + WIRE_HEADER_BYTES);
        at += WIRE_HEADER_BYTES + header.body_len;
    }
    memmove(client->in, client->in + at, client->n_in - at);
    client->n_in -= at;
}

static void accept_one(struct status_daemon *daemon, int listening)
{
    int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    for (size_t i = 0; fd >= 0 && i < CLIENTS_MAX; i++)
        if (daemon->clients[i].fd < 0) {
            daemon->clients[i].fd = fd;
            return;
        }
    if (fd >= 0)
        close(fd);
}

static void read_one(struct status_daemon *daemon, struct client *client)
{
    ssize_t n = recv(client->fd, client->in + client->n_in, sizeof(client->in) - client->n_in, 0);

    if (n <= 0) {
        client_close(client);
        return;
    }
    client->n_in += (size_t)n;
    handle(daemon, client);
}

static void *run(void *userdata)
{
    struct status_daemon *daemon = userdata;

    pthread_mutex_lock(&daemon->lock);
    while (!daemon->over) {
        struct pollfd fds[3 + CLIENTS_MAX] = {
            {.fd = daemon->wake_fd, .events = POLLIN},
            {.fd = daemon->main_fd, .events = POLLIN},
            {.fd = daemon->status_fd, .events = POLLIN},
        };
        uint64_t drained;
        for (size_t i = 0; i < CLIENTS_MAX; i++)
            fds[3 + i] = (struct pollfd){.fd = daemon->clients[i].fd, .events = POLLIN};
        if (daemon->mute)
            for (size_t i = 1; i < ELEMENTSOF(fds); i++)
                fds[i].fd = -1;
        pthread_mutex_unlock(&daemon->lock);
        MUST(poll(fds, ELEMENTSOF(fds), -1) >= 0 || errno == EINTR);
        pthread_mutex_lock(&daemon->lock);
        (void)!read(daemon->wake_fd, &drained, sizeof(drained));
        for (size_t i = 0; i < CLIENTS_MAX; i++)
            if (fds[3 + i].revents && daemon->clients[i].fd == fds[3 + i].fd)
                read_one(daemon, &daemon->clients[i]);
        if (fds[1].revents) {
            accept_one(daemon, daemon->main_fd);
            if (daemon->status_fd < 0)
                daemon->status_fd = listen_at(daemon->status_path);
        }
        if (fds[2].revents)
            accept_one(daemon, daemon->status_fd);
    }
    pthread_mutex_unlock(&daemon->lock);
    return NULL;
}

static struct status_daemon *start(const char *path, bool activated)
{
    struct status_daemon *daemon = calloc(1, sizeof(*daemon));

    MUST(daemon);
    snprintf(daemon->path, sizeof(daemon->path), "%s", path);
    snprintf(daemon->status_path, sizeof(daemon->status_path), "%s.status", path);
    strcpy(daemon->model, "alpha");
    strcpy(daemon->state, "cold");
    strcpy(daemon->caller, "nobody yet");
    daemon->push = true;
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        daemon->clients[i].fd = -1;
    pthread_mutex_init(&daemon->lock, NULL);
    daemon->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    MUST(daemon->wake_fd >= 0);
    daemon->main_fd = listen_at(daemon->path);
    daemon->status_fd = activated ? -1 : listen_at(daemon->status_path);
    MUST(pthread_create(&daemon->thread, NULL, run, daemon) == 0);
    return daemon;
}

struct status_daemon *status_daemon_start(const char *path)
{
    return start(path, false);
}

struct status_daemon *status_daemon_start_activated(const char *path)
{
    return start(path, true);
}

/* Lets the thread look at what has changed, and gives the lock back. */
static void changed(struct status_daemon *daemon)
{
    MUST(write(daemon->wake_fd, &(uint64_t){1}, sizeof(uint64_t)) == sizeof(uint64_t));
    pthread_mutex_unlock(&daemon->lock);
}

struct status_daemon *status_daemon_stop(struct status_daemon *daemon)
{
    if (!daemon)
        return NULL;
    pthread_mutex_lock(&daemon->lock);
    daemon->over = true;
    changed(daemon);
    pthread_join(daemon->thread, NULL);
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        client_close(&daemon->clients[i]);
    close(daemon->main_fd);
    if (daemon->status_fd >= 0)
        close(daemon->status_fd);
    close(daemon->wake_fd);
    unlink(daemon->path);
    unlink(daemon->status_path);
    pthread_mutex_destroy(&daemon->lock);
    free(daemon);
    return NULL;
}

void status_daemon_set_model(struct status_daemon *daemon, const char *name)
{
    pthread_mutex_lock(&daemon->lock);
    if (strcmp(daemon->model, name) != 0)
        strcpy(daemon->gone, daemon->model);
    snprintf(daemon->model, sizeof(daemon->model), "%s", name);
    push(daemon);
    changed(daemon);
}

void status_daemon_set_state(struct status_daemon *daemon, const char *state)
{
    pthread_mutex_lock(&daemon->lock);
    snprintf(daemon->state, sizeof(daemon->state), "%s", state);
    push(daemon);
    changed(daemon);
}

void status_daemon_mute(struct status_daemon *daemon, bool mute)
{
    pthread_mutex_lock(&daemon->lock);
    daemon->mute = mute;
    push(daemon); /* what has changed meanwhile */
    changed(daemon);
}

void status_daemon_refuse(struct status_daemon *daemon, const char *code)
{
    pthread_mutex_lock(&daemon->lock);
    daemon->refuse = code;
    changed(daemon);
}

void status_daemon_go_away(struct status_daemon *daemon)
{
    pthread_mutex_lock(&daemon->lock);
    for (size_t i = 0; i < CLIENTS_MAX; i++) {
        struct wire_buffer out = {0};
        if (daemon->clients[i].fd < 0)
            continue;
        wire_begin(&out, WIRE_GOAWAY, 0);
        wire_end(&out);
        send_all(&daemon->clients[i], &out);
    }
    changed(daemon);
}

void status_daemon_hang_up(struct status_daemon *daemon)
{
    pthread_mutex_lock(&daemon->lock);
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        client_close(&daemon->clients[i]);
    changed(daemon);
}

void status_daemon_push(struct status_daemon *daemon, bool push)
{
    pthread_mutex_lock(&daemon->lock);
    daemon->push = push;
    changed(daemon);
}

void status_daemon_event(struct status_daemon *daemon, const char *text, uint64_t lost)
{
    pthread_mutex_lock(&daemon->lock);
    for (size_t i = 0; i < CLIENTS_MAX; i++) {
        struct wire_buffer out = {0};
        if (daemon->clients[i].fd < 0 || !daemon->clients[i].events_id)
            continue;
        wire_begin(&out, WIRE_ITEM, daemon->clients[i].events_id);
        if (lost > 0)
            wire_put_number(&out, TAG_LOST, lost);
        else
            wire_put_text(&out, TAG_TEXT, text);
        wire_end(&out);
        send_all(&daemon->clients[i], &out);
    }
    changed(daemon);
}

void status_daemon_break_holds(struct status_daemon *daemon, const char *code)
{
    pthread_mutex_lock(&daemon->lock);
    for (size_t i = 0; i < CLIENTS_MAX; i++) {
        struct client *client = &daemon->clients[i];
        for (size_t k = 0; client->fd >= 0 && k < HOLDS_MAX; k++) {
            struct wire_buffer out = {0};
            if (!client->holds[k])
                continue;
            put_end(&out, client->holds[k], code);
            client->holds[k] = 0;
            send_all(client, &out);
        }
    }
    changed(daemon);
}

uint64_t status_daemon_holds(struct status_daemon *daemon)
{
    uint64_t n;

    pthread_mutex_lock(&daemon->lock);
    n = n_holds(daemon);
    pthread_mutex_unlock(&daemon->lock);
    return n;
}

void status_daemon_get_caller(struct status_daemon *daemon, char *ret_text, size_t size)
{
    pthread_mutex_lock(&daemon->lock);
    snprintf(ret_text, size, "%s", daemon->caller);
    pthread_mutex_unlock(&daemon->lock);
}

uint64_t status_daemon_count(struct status_daemon *daemon, enum wire_type type)
{
    uint64_t n;

    pthread_mutex_lock(&daemon->lock);
    n = daemon->counts[type % TYPES_MAX];
    pthread_mutex_unlock(&daemon->lock);
    return n;
}
