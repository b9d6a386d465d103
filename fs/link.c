#include "fs/link.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "fs/connector.h"
#include "lib/cleanup.h"

/* An order's way: NEW until it is known whether a daemon runs; STARTING while one is being started
 * for it; SENT until the daemon acknowledges; ENDED when it can be freed. */
enum order_phase { ORDER_NEW, ORDER_STARTING, ORDER_SENT, ORDER_ENDED };

struct link_order {
    struct link *link;
    enum order_phase phase;
    bool load;
    char model[MIRROR_NAME_MAX + 1];
    uint64_t id;       /* of the request, when SENT */
    uint64_t since_us; /* how fresh the finding that no daemon runs must be */
    uint64_t deadline_us;
    link_order_fn fn; /* NULL: dropped */
    void *userdata;
    struct link_order *prev, *next;
};

struct part_slot {
    struct link *link;
    enum mirror_part part;
};

struct link {
    char socket_path[HEARTH_PATH_BYTES];
    char status_path[HEARTH_PATH_BYTES];
    struct mirror *mirror;     /* borrowed */
    struct hearth *hearth;     /* the status connection, NULL while there is none */
    struct connector *knock;   /* the attempt at the status socket */
    struct connector *starter; /* the attempt at the main socket */
    struct part_slot slots[_MIRROR_PART_MAX];
    struct link_order *orders;
    size_t n_orders;
    uint64_t now_us; /* of the call under way, for the callbacks inside it */
};

int link_new(const char *socket_path, struct mirror *mirror, struct link **ret_link)
{
    struct link *link = calloc(1, sizeof(*link));
    int r;

    if (!link)
        return -ENOMEM;
    link->mirror = mirror;
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        link->slots[part] = (struct part_slot){link, part};
    r = -ENAMETOOLONG;
    if (strlen(socket_path) < sizeof(link->socket_path)) {
        strcpy(link->socket_path, socket_path);
        r = hearth_status_path(socket_path, link->status_path);
    }
    if (r < 0) {
        free(link);
        return r;
    }
    *ret_link = link;
    return 0;
}

/* ---- orders ---- */

int link_code_errno(const char *code)
{
    static const struct {
        const char *code;
        int error;
    } table[] = {
        {"forbidden", EACCES},     {"bad-request", EINVAL}, {"busy", EBUSY},
        {"no-such-model", ENOENT}, {"load-failed", EIO},
    };

    for (size_t i = 0; code && i < ELEMENTSOF(table); i++)
        if (strcmp(table[i].code, code) == 0)
            return table[i].error;
    return EIO;
}

/* Tells whoever waits, once. The order itself is freed by sweep(). */
static void order_end(struct link_order *order, int error)
{
    link_order_fn fn = order->fn;

    order->phase = ORDER_ENDED;
    order->fn = NULL;
    if (fn)
        fn(order->userdata, error);
}

static void on_order_reply(void *userdata, const struct hearth_reply *reply)
{
    struct link_order *order = userdata;
    struct link *link = order->link;

    if (reply->kind == HEARTH_ITEM || reply->kind == HEARTH_TOKENS)
        return;
    if (!reply->lost) {
        mirror_heard(link->mirror, link->now_us);
        mirror_expire(link->mirror, link->now_us);
    }
    order_end(order, reply->kind == HEARTH_DONE ? 0 : -link_code_errno(reply->code));
}

static void sweep(struct link *link)
{
    struct link_order *order, *next;

    DL_FOREACH_SAFE (link->orders, order, next) {
        if (order->phase != ORDER_ENDED)
            continue;
        DL_DELETE(link->orders, order);
        link->n_orders--;
        free(order);
    }
}

int link_order(struct link *link, bool load, const char *model, link_order_fn fn, void *userdata,
               uint64_t now_us, struct link_order **ret_order)
{
    struct link_order *order;

    if (link->n_orders >= LINK_ORDERS_MAX)
        return -EAGAIN;
    if (strlen(model) > MIRROR_NAME_MAX)
        return -EINVAL;
    order = calloc(1, sizeof(*order));
    if (!order)
        return -ENOMEM;
    order->link = link;
    order->load = load;
    strcpy(order->model, model);
    order->fn = fn;
    order->userdata = userdata;
    order->since_us = now_us;
    order->deadline_us = now_us + LINK_ORDER_US;
    DL_APPEND(link->orders, order);
    link->n_orders++;
    *ret_order = order;
    return 0;
}

void link_drop(struct link *link, struct link_order *order)
{
    order->fn = NULL;
    order->deadline_us = UINT64_MAX;
    if (order->phase == ORDER_SENT)
        /* Its end still comes, and frees it; where even that fails, the connection's end does. */
        (void)hearth_cancel(link->hearth, order->id);
    else
        order->phase = ORDER_ENDED;
}

/* ---- connections ---- */

/* Closes the status connection; what was under way on it has no answer. */
static void hang_up(struct link *link)
{
    struct link_order *order;

    link->hearth = hearth_free(link->hearth);
    DL_FOREACH (link->orders, order)
        if (order->phase == ORDER_SENT)
            order_end(order, -EIO);
}

/* The names a daemon has left behind. */
struct names {
    char **at;
    size_t n;
};

static void names_add(void *userdata, const char *name)
{
    struct names *names = userdata;

    if (names->n < MIRROR_MODELS_MAX && (names->at[names->n] = strdup(name)))
        names->n++;
}

static void find_absent(struct link *link)
{
    struct names names = {.at = calloc(MIRROR_MODELS_MAX, sizeof(*names.at))};

    if (names.at)
        (void)hearth_list_names(link->socket_path, names_add, &names);
    /* Without a list the names that the daemon said last are the best there is. */
    mirror_absent(link->mirror, names.n > 0 ? (const char *const *)names.at : NULL, names.n,
                  link->now_us);
    for (size_t i = 0; i < names.n; i++)
        free(names.at[i]);
    free(names.at);
}

/* What the failed attempt or request says about the daemon. */
static void fail(struct link *link, int error)
{
    if (link->hearth)
        hang_up(link);
    switch (error) {
    case -ESHUTDOWN: mirror_going(link->mirror, link->now_us); break;
    case -ETIMEDOUT:
    case -EBUSY:
    case -EINTR:
    case -EAGAIN: mirror_deaf(link->mirror, link->now_us); break;
    default: find_absent(link); break;
    }
}

static void knock(struct link *link)
{
    int r;

    mirror_connecting(link->mirror, link->now_us);
    /* The common case without a daemon needs no thread. */
    if (access(link->status_path, F_OK) < 0 && errno == ENOENT) {
        fail(link, -ENOENT);
        return;
    }
    r = connector_start(link->socket_path, true, LINK_KNOCK_US, &link->knock);
    if (r < 0)
        fail(link, -EAGAIN); /* no thread to be had says nothing about the daemon */
}

static void on_part_reply(void *userdata, const struct hearth_reply *reply)
{
    struct part_slot *slot = userdata;

    mirror_take(slot->link->mirror, slot->part, reply, slot->link->now_us);
}

static int ask_part(struct link *link, enum mirror_part part)
{
    static const char *const sections[_MIRROR_PART_MAX] = {
        [MIRROR_PROMETHEUS] = "prometheus", [MIRROR_POOL] = "pool",
        [MIRROR_BATCHER] = "batcher",       [MIRROR_STREAMING] = "streaming",
        [MIRROR_LOADER] = "loader",
    };
    struct part_slot *slot = &link->slots[part];

    switch (part) {
    case MIRROR_STATUS: return hearth_status(link->hearth, on_part_reply, slot, NULL);
    case MIRROR_MODELS: return hearth_models(link->hearth, NULL, on_part_reply, slot, NULL);
    default: return hearth_metrics(link->hearth, sections[part], on_part_reply, slot, NULL);
    }
}

static void ask(struct link *link)
{
    mirror_asked(link->mirror, link->now_us);
    for (int part = 0; part < _MIRROR_PART_MAX; part++) {
        int r = ask_part(link, part);
        if (r == -ESHUTDOWN) {
            fail(link, r);
            return;
        }
        if (r < 0) {
            hang_up(link);
            mirror_lost(link->mirror);
            return;
        }
    }
}

static void take_knock(struct link *link)
{
    struct hearth *hearth = NULL;
    int r = connector_result(link->knock, &hearth);

    if (r == -EINPROGRESS)
        return;
    link->knock = connector_free(link->knock);
    if (r < 0) {
        fail(link, r);
        return;
    }
    link->hearth = hearth;
    mirror_connected(link->mirror, link->now_us);
}

/* The start is over, well or not, for all who wait for it. */
static void take_starter(struct link *link)
{
    struct hearth *hearth = NULL;
    struct link_order *order;
    int r = connector_result(link->starter, &hearth);

    if (r == -EINPROGRESS)
        return;
    hearth_free(hearth);
    link->starter = connector_free(link->starter);
    if (r == -ENOENT)
        r = -ECONNREFUSED; /* ENOENT from write(2) would speak of the model */
    DL_FOREACH (link->orders, order) {
        if (order->phase != ORDER_STARTING)
            continue;
        if (r < 0)
            order_end(order, r);
        else
            order->since_us = link->now_us;
    }
}

/* ---- steps ---- */

static int order_send(struct link *link, struct link_order *order)
{
    if (order->load)
        return hearth_warm(link->hearth, order->model, false, on_order_reply, order, &order->id);
    return hearth_unload(link->hearth, order->model, on_order_reply, order, &order->id);
}

/* Starts a daemon for this order, or joins the start under way. */
static void order_start(struct link *link, struct link_order *order)
{
    int r = 0;

    if (!link->starter)
        r = connector_start(link->socket_path, false, LINK_START_US, &link->starter);
    if (r < 0) {
        order_end(order, -EAGAIN);
        return;
    }
    order->phase = ORDER_STARTING;
    order->deadline_us = link->now_us + LINK_START_US;
}

/* Whoever waits is told; the order stays until its reply has come, which must find it. */
static void order_expire(struct link *link, struct link_order *order)
{
    link_order_fn fn = order->fn;

    if (order->phase != ORDER_SENT) {
        order_end(order, -ETIMEDOUT);
        return;
    }
    link_drop(link, order);
    if (fn)
        fn(order->userdata, -ETIMEDOUT);
}

static void order_go(struct link *link, struct link_order *order)
{
    int r;

    order->phase = ORDER_SENT;
    r = order_send(link, order);
    if (r == -ESHUTDOWN) {
        order->phase = ORDER_NEW;
        order->since_us = link->now_us;
        fail(link, r);
    } else if (r < 0) {
        order_end(order, r == -EINVAL ? r : -EIO);
    }
}

static void order_step(struct link *link, struct link_order *order)
{
    if (order->phase == ORDER_ENDED)
        return;
    if (link->now_us >= order->deadline_us) {
        order_expire(link, order);
        return;
    }
    if (order->phase == ORDER_SENT)
        return;
    if (link->hearth)
        order_go(link, order);
    else if (order->phase == ORDER_NEW && mirror_is_absent(link->mirror, order->since_us)) {
        if (order->load)
            order_start(link, order);
        else
            order_end(order, 0); /* nothing is loaded where nothing runs */
    } else if (!link->knock && !link->starter && link->now_us >= order->since_us + LINK_RETRY_US) {
        order->since_us = link->now_us;
    }
}

static bool is_waiting(const struct link_order *order)
{
    return order->phase == ORDER_NEW || order->phase == ORDER_STARTING;
}

/* One round; true where it has found out something that moves the orders on. */
static bool step_once(struct link *link, uint64_t since_us)
{
    uint64_t changes = mirror_changes(link->mirror);
    struct link_order *order;

    DL_FOREACH (link->orders, order) {
        order_step(link, order);
        if (is_waiting(order))
            since_us = MAX(since_us, order->since_us);
    }
    sweep(link);
    if (since_us == 0 || link->knock)
        return false;
    switch (mirror_next(link->mirror, since_us)) {
    case MIRROR_CONNECT: knock(link); break;
    case MIRROR_ASK: ask(link); break;
    case MIRROR_NOTHING: break;
    }
    return mirror_changes(link->mirror) != changes;
}

void link_step(struct link *link, uint64_t since_us, uint64_t now_us)
{
    /* Finding nobody, starting a daemon, looking again: more rounds there are not in one moment. */
    const int max_rounds = 4;

    link->now_us = now_us;
    for (int round = 0; round < max_rounds && step_once(link, since_us); round++)
        continue;
}

void link_dispatch(struct link *link, uint64_t now_us)
{
    link->now_us = now_us;
    if (link->hearth) {
        int r = hearth_dispatch(link->hearth);
        if (r < 0) {
            hang_up(link);
            mirror_lost(link->mirror);
        } else if (hearth_going_away(link->hearth) && hearth_in_flight(link->hearth) == 0) {
            fail(link, -ESHUTDOWN);
        }
    }
    if (link->knock)
        take_knock(link);
    if (link->starter)
        take_starter(link);
    sweep(link);
}

size_t link_poll(const struct link *link, struct pollfd ret_fds[LINK_FDS_MAX])
{
    size_t n = 0;

    if (link->hearth)
        ret_fds[n++] =
            (struct pollfd){.fd = hearth_fd(link->hearth), .events = hearth_events(link->hearth)};
    if (link->knock)
        ret_fds[n++] = (struct pollfd){.fd = connector_fd(link->knock), .events = POLLIN};
    if (link->starter)
        ret_fds[n++] = (struct pollfd){.fd = connector_fd(link->starter), .events = POLLIN};
    return n;
}

uint64_t link_due_us(const struct link *link, uint64_t now_us)
{
    const struct link_order *order;
    uint64_t due_us = UINT64_MAX;

    DL_FOREACH (link->orders, order) {
        due_us = MIN(due_us, order->deadline_us);
        if (is_waiting(order) && !link->knock && !link->starter)
            due_us = MIN(due_us, MAX(now_us, order->since_us + LINK_RETRY_US));
    }
    return due_us;
}

struct link *link_free(struct link *link)
{
    struct link_order *order;

    if (!link)
        return NULL;
    DL_FOREACH (link->orders, order) {
        order->fn = NULL;
        order->phase = ORDER_ENDED;
    }
    link->hearth = hearth_free(link->hearth);
    connector_free(link->knock);
    connector_free(link->starter);
    sweep(link);
    free(link);
    return NULL;
}
