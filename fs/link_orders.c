#include "fs/link_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "lib/cleanup.h"

int link_code_errno(const char *code)
{
    static const struct {
        const char *code;
        int error;
    } table[] = {
        {"forbidden", EACCES},     {"bad-request", EINVAL}, {"busy", EBUSY},
        {"no-such-model", ENOENT}, {"load-failed", EIO},    {"no-memory", ENOMEM},
        {"shutting-down", EAGAIN}, {"deadline", ETIMEDOUT}, {"cancelled", ECANCELED},
    };

    for (size_t i = 0; code && i < ELEMENTSOF(table); i++)
        if (strcmp(table[i].code, code) == 0)
            return table[i].error;
    return EIO;
}

static bool is_waiting(const struct link_order *order)
{
    return order->phase == ORDER_NEW || order->phase == ORDER_STARTING;
}

/* Whether it may start a daemon where none runs. */
static bool starts_daemon(const struct link_order *order)
{
    return order->verb == LINK_LOAD || (order->verb == LINK_HOLD && !order->retaken);
}

/* ---- from one phase to the next ---- */

/* Tells whoever waits, once. The order itself is freed by orders_sweep(). */
static void order_end(struct link_order *order, int error)
{
    link_order_fn fn = order->fn;

    order->phase = ORDER_ENDED;
    order->fn = NULL;
    if (fn)
        fn(order->userdata, error);
}

/* Holds have a list of their own: they stay, and the list of orders is walked at every step. */
static void move_to_holds(struct link_order *order, enum order_phase phase)
{
    struct link *link = order->link;

    DL_DELETE(link->orders, order);
    link->n_orders--;
    DL_APPEND(link->holds, order);
    link->n_holds++;
    order->phase = phase;
    link->n_lost += phase == ORDER_LOST;
}

static void move_to_orders(struct link_order *order, enum order_phase phase)
{
    struct link *link = order->link;

    link->n_lost -= order->phase == ORDER_LOST;
    DL_DELETE(link->holds, order);
    link->n_holds--;
    DL_APPEND(link->orders, order);
    link->n_orders++;
    order->phase = phase;
}

static void hold_taken(struct link_order *order)
{
    link_order_fn fn = order->fn;

    move_to_holds(order, ORDER_HELD);
    if (fn && !order->retaken)
        fn(order->userdata, 0);
    order->retaken = true;
}

/* Taken again from the next daemon, at `again_us` or later. */
static void hold_lost(struct link_order *order, uint64_t again_us)
{
    if (order->phase == ORDER_HELD) {
        order->phase = ORDER_LOST;
        order->link->n_lost++;
    } else {
        move_to_holds(order, ORDER_LOST);
    }
    order->since_us = again_us;
}

/* A hold's end that its holder did not ask for. */
static void hold_ended(struct link_order *order, int error)
{
    if (order->retaken && order->fn && error == -EAGAIN) {
        hold_lost(order, order->link->now_us + LINK_RETAKE_US);
        return;
    }
    if (order->phase == ORDER_HELD)
        move_to_orders(order, ORDER_SENT);
    order_end(order, error);
}

static void on_order_reply(void *userdata, const struct hearth_reply *reply)
{
    struct link_order *order = userdata;
    struct link *link = order->link;
    bool hold = order->verb == LINK_HOLD;

    if (reply->lost)
        return; /* orders_lost() knows what that means */
    mirror_heard(link->mirror, link->now_us);
    mirror_expire(link->mirror, link->now_us);
    if (reply->kind == HEARTH_ITEM || reply->kind == HEARTH_TOKENS) {
        if (hold && order->phase == ORDER_SENT && order->fn)
            hold_taken(order);
        return;
    }
    if (hold)
        hold_ended(order, reply->kind == HEARTH_ERROR ? -link_code_errno(reply->code) : -EIO);
    else
        order_end(order, reply->kind == HEARTH_DONE ? 0 : -link_code_errno(reply->code));
}

/* ---- giving one ---- */

static bool holds_are_full(const struct link *link, uint32_t uid)
{
    const struct link_order *hold;
    size_t n = 0;

    if (link->n_holds >= LINK_HOLDS_MAX)
        return true;
    /* Counting them only where it could matter keeps open(2) cheap. */
    if (link->n_holds < LINK_HOLDS_PER_UID_MAX)
        return false;
    DL_FOREACH (link->holds, hold)
        n += hold->caller->uid == uid;
    return n >= LINK_HOLDS_PER_UID_MAX;
}

int link_order(struct link *link, const struct link_request *request, link_order_fn fn,
               void *userdata, uint64_t now_us, struct link_order **ret_order)
{
    struct link_order *order;

    if (strlen(request->model) > MIRROR_NAME_MAX)
        return -EINVAL;
    if (link->n_orders >= LINK_ORDERS_MAX ||
        (request->verb == LINK_HOLD && holds_are_full(link, request->caller->uid)))
        return -EAGAIN;
    order = calloc(1, sizeof(*order));
    if (!order)
        return -ENOMEM;
    order->caller = malloc(sizeof(*order->caller));
    if (!order->caller) {
        free(order);
        return -ENOMEM;
    }
    *order->caller = *request->caller;
    order->link = link;
    order->verb = request->verb;
    strcpy(order->model, request->model);
    order->value = request->value;
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
    if (order->phase == ORDER_HELD)
        move_to_orders(order, ORDER_SENT);
    else if (order->phase == ORDER_LOST)
        move_to_orders(order, ORDER_ENDED);
    if (order->phase == ORDER_SENT) {
        /* Its end still comes, and frees it; where even that fails, the connection's end does. */
        (void)hearth_cancel(link->hearth, order->id);
        mirror_expire(link->mirror, link->now_us);
    } else {
        order->phase = ORDER_ENDED;
    }
}

/* ---- sending ---- */

static int order_send(struct link *link, struct link_order *order)
{
    struct hearth_set set = HEARTH_SET_INIT;

    switch (order->verb) {
    case LINK_LOAD:
        return hearth_warm(link->hearth, order->model, false, on_order_reply, order, &order->id);
    case LINK_UNLOAD:
        return hearth_unload(link->hearth, order->model, on_order_reply, order, &order->id);
    case LINK_HOLD:
        return hearth_hold(link->hearth, order->model, on_order_reply, order, &order->id);
    case LINK_PIN:
        set.has_pinned = true;
        set.pinned = order->value;
        break;
    case LINK_KEEP_ALIVE:
        set.has_keep_alive = true;
        set.keep_alive_us = order->value;
        break;
    }
    set.model = order->model;
    return hearth_set(link->hearth, &set, on_order_reply, order, &order->id);
}

/* Sends it in the name of who gave it, or not at all. */
static int order_send_for(struct link *link, struct link_order *order)
{
    const struct caller *caller = order->caller;
    int r;

    if (caller->uid == geteuid())
        return order_send(link, order);
    if (!link->speaks_for_others)
        return -EACCES;
    r = hearth_act_for(link->hearth, caller->uid, caller->gids, caller->n_gids);
    if (r < 0)
        return r;
    r = order_send(link, order);
    hearth_act_for_self(link->hearth);
    return r;
}

/* 0, or -ESHUTDOWN where the connection takes no more. */
static int order_go(struct link *link, struct link_order *order)
{
    int r = order_send_for(link, order);

    if (r == -ESHUTDOWN)
        order->since_us = link->now_us;
    else if (r < 0)
        order_end(order, r == -EINVAL || r == -EACCES || r == -ENOMEM ? r : -EIO);
    else
        order->phase = ORDER_SENT;
    return r == -ESHUTDOWN ? r : 0;
}

/* ---- steps ---- */

/* Starts a daemon for this order, or joins the start under way. */
static void order_start(struct link *link, struct link_order *order)
{
    int r = 0;

    if (!link->starter) {
        r = connector_start(link->socket_path, false, LINK_START_US, &link->starter);
        mirror_starting(link->mirror, r == 0);
    }
    if (r < 0) {
        order_end(order, -EAGAIN);
        return;
    }
    order->phase = ORDER_STARTING;
    order->deadline_us = link->now_us + LINK_START_US;
}

/* What an order comes to that finds no daemon and may start none: where nothing runs nothing is
 * loaded or pinned, and nothing can be set. */
static int absent_result(const struct link_order *order)
{
    bool undoes = order->verb == LINK_UNLOAD || (order->verb == LINK_PIN && order->value == 0);

    return undoes ? 0 : -ECONNREFUSED;
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

static void order_find_absent(struct link *link, struct link_order *order)
{
    if (starts_daemon(order))
        order_start(link, order);
    else if (order->verb == LINK_HOLD)
        hold_lost(order, link->now_us);
    else
        order_end(order, absent_result(order));
}

/* 0, or -ESHUTDOWN where the connection takes no more. */
static int order_step(struct link *link, struct link_order *order)
{
    if (order->phase == ORDER_ENDED)
        return 0;
    if (link->now_us >= order->deadline_us) {
        order_expire(link, order);
        return 0;
    }
    if (order->phase == ORDER_SENT)
        return 0;
    if (link->hearth)
        return order_go(link, order);
    if (order->phase == ORDER_NEW && mirror_is_absent(link->mirror, order->since_us))
        order_find_absent(link, order);
    else if (!link->knock && !link->starter && link->now_us >= order->since_us + LINK_RETRY_US)
        order->since_us = link->now_us;
    return 0;
}

/* Asks the daemon that runs for the holds that another has ended. */
static void retake_holds(struct link *link)
{
    struct link_order *hold, *next;

    if (link->n_lost == 0 || !link->hearth || hearth_going_away(link->hearth))
        return;
    DL_FOREACH_SAFE (link->holds, hold, next) {
        if (hold->phase != ORDER_LOST || link->now_us < hold->since_us ||
            link->n_orders >= LINK_ORDERS_MAX)
            continue;
        move_to_orders(hold, ORDER_NEW);
        hold->since_us = link->now_us;
        hold->deadline_us = UINT64_MAX; /* nobody waits */
    }
}

uint64_t orders_step(struct link *link, uint64_t since_us)
{
    struct link_order *order, *next;
    bool waiting = false;
    int r = 0;

    retake_holds(link);
    /* A step may take its own order off the list, and append others. */
    for (order = link->orders; order && r == 0; order = next) {
        next = order->next;
        r = order_step(link, order);
    }
    if (r < 0)
        link_fail(link, r);
    DL_FOREACH (link->orders, order) {
        if (!is_waiting(order))
            continue;
        since_us = MAX(since_us, order->since_us);
        waiting = true;
    }
    if (!waiting && !link->starter)
        mirror_starting(link->mirror, false);
    orders_sweep(link);
    /* Somebody who holds wants to know of the next daemon. */
    if (link->n_lost > 0)
        since_us = MAX(since_us, mirror_watch_since_us(link->mirror, link->now_us));
    return since_us;
}

void orders_lost(struct link *link)
{
    struct link_order *order, *next;

    DL_FOREACH (link->holds, order)
        if (order->phase == ORDER_HELD)
            hold_lost(order, link->now_us);
    DL_FOREACH_SAFE (link->orders, order, next) {
        if (order->phase != ORDER_SENT)
            continue;
        if (order->verb == LINK_HOLD)
            hold_ended(order, order->retaken ? -EAGAIN : -EIO);
        else
            order_end(order, -EIO);
    }
}

void orders_started(struct link *link, int error)
{
    struct link_order *order, *next;

    DL_FOREACH_SAFE (link->orders, order, next) {
        if (order->phase != ORDER_STARTING)
            continue;
        if (error < 0)
            order_end(order, error);
        else
            order->since_us = link->now_us;
    }
}

uint64_t orders_due_us(const struct link *link, uint64_t now_us)
{
    const struct link_order *order;
    uint64_t due_us = UINT64_MAX;

    DL_FOREACH (link->orders, order) {
        due_us = MIN(due_us, order->deadline_us);
        if (is_waiting(order) && !link->knock && !link->starter)
            due_us = MIN(due_us, MAX(now_us, order->since_us + LINK_RETRY_US));
    }
    if (link->n_lost > 0)
        DL_FOREACH (link->holds, order)
            if (order->phase == ORDER_LOST && link->hearth)
                due_us = MIN(due_us, MAX(now_us, order->since_us));
    return due_us;
}

static void order_free(struct link_order *order)
{
    free(order->caller);
    free(order);
}

void orders_sweep(struct link *link)
{
    struct link_order *order, *next;

    DL_FOREACH_SAFE (link->orders, order, next) {
        if (order->phase != ORDER_ENDED)
            continue;
        DL_DELETE(link->orders, order);
        link->n_orders--;
        order_free(order);
    }
}

void orders_free(struct link *link)
{
    struct link_order *order, *next;

    DL_FOREACH_SAFE (link->orders, order, next) {
        DL_DELETE(link->orders, order);
        order_free(order);
    }
    DL_FOREACH_SAFE (link->holds, order, next) {
        DL_DELETE(link->holds, order);
        order_free(order);
    }
    link->n_orders = link->n_holds = link->n_lost = 0;
}
