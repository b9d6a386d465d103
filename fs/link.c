#include "fs/link_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* In whose name anybody's values are asked for: somebody who owns nothing. */
#define NOBODY 65534u

int link_new(const char *socket_path, struct mirror *mirror, struct events *events,
             struct link **ret_link)
{
    struct link *link = calloc(1, sizeof(*link));
    int r;

    if (!link)
        return -ENOMEM;
    link->mirror = mirror;
    link->events = events;
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

/* ---- connections ---- */

/* Closes the status connection; what was under way on it has no answer. */
static void hang_up(struct link *link)
{
    link->hearth = hearth_free(link->hearth);
    feeds_lost(link);
    orders_lost(link);
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

void link_fail(struct link *link, int error)
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
        link_fail(link, -ENOENT);
        return;
    }
    r = connector_start(link->socket_path, true, LINK_KNOCK_US, &link->knock);
    if (r < 0)
        link_fail(link, -EAGAIN); /* no thread to be had says nothing about the daemon */
}

static void on_part_reply(void *userdata, const struct hearth_reply *reply)
{
    struct part_slot *slot = userdata;

    mirror_take(slot->link->mirror, slot->part, reply, slot->link->now_us);
}

void link_look_begin(struct link *link)
{
    if (link->speaks_for_others)
        (void)hearth_act_for(link->hearth, NOBODY, NULL, 0);
}

void link_look_end(struct link *link)
{
    hearth_act_for_self(link->hearth);
}

static void on_ping_reply(void *userdata, const struct hearth_reply *reply)
{
    struct link *link = userdata;

    if (!reply->lost)
        mirror_ponged(link->mirror, link->now_us);
}

static int ask_part(struct link *link, enum mirror_part part)
{
    struct part_slot *slot = &link->slots[part];

    switch (part) {
    case MIRROR_STATUS: return hearth_status(link->hearth, on_part_reply, slot, NULL);
    case MIRROR_MODELS: return hearth_models(link->hearth, NULL, on_part_reply, slot, NULL);
    default: return hearth_metrics(link->hearth, mirror_section(part), on_part_reply, slot, NULL);
    }
}

static int ask_parts(struct link *link)
{
    int r = 0;

    mirror_asked(link->mirror, link->now_us);
    link_look_begin(link);
    for (int part = 0; part < _MIRROR_PART_MAX && r == 0; part++)
        r = ask_part(link, part);
    link_look_end(link);
    return r;
}

static int ping(struct link *link)
{
    mirror_pinged(link->mirror, link->now_us);
    return hearth_ping(link->hearth, on_ping_reply, link, NULL);
}

static void ask(struct link *link, enum mirror_action action)
{
    int r = 0;

    switch (action) {
    case MIRROR_FEED: r = feed_values(link); break;
    case MIRROR_PING: r = ping(link); break;
    case MIRROR_ASK: r = ask_parts(link); break;
    default: break;
    }
    if (r == -ESHUTDOWN) {
        link_fail(link, r);
    } else if (r < 0) {
        hang_up(link);
        mirror_lost(link->mirror);
    }
}

/* Whether the daemon runs under our own uid: it has bound the status socket itself. */
static bool speaks_for_others(const struct hearth *hearth)
{
    struct ucred peer;
    socklen_t len = sizeof(peer);

    return getsockopt(hearth_fd(hearth), SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 &&
           peer.uid == geteuid();
}

static void take_knock(struct link *link)
{
    struct hearth *hearth = NULL;
    int r = connector_result(link->knock, &hearth);

    if (r == -EINPROGRESS)
        return;
    link->knock = connector_free(link->knock);
    if (r < 0) {
        link_fail(link, r);
        return;
    }
    link->hearth = hearth;
    link->speaks_for_others = speaks_for_others(hearth);
    mirror_connected(link->mirror, link->now_us);
}

static void take_starter(struct link *link)
{
    struct hearth *hearth = NULL;
    int r = connector_result(link->starter, &hearth);

    if (r == -EINPROGRESS)
        return;
    hearth_free(hearth);
    link->starter = connector_free(link->starter);
    /* ENOENT from write(2) would speak of the model. */
    orders_started(link, r == -ENOENT ? -ECONNREFUSED : r);
}

/* ---- steps ---- */

/* One round; true where it has found out something that moves the orders on. */
static bool step_once(struct link *link, uint64_t since_us)
{
    uint64_t changes = mirror_changes(link->mirror);
    enum mirror_action action;

    since_us = orders_step(link, since_us);
    feeds_step(link);
    if (since_us == 0 || link->knock)
        return false;
    action = mirror_next(link->mirror, since_us);
    if (action == MIRROR_CONNECT)
        knock(link);
    else if (action != MIRROR_NOTHING)
        ask(link, action);
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
        } else if (hearth_going_away(link->hearth) &&
                   hearth_in_flight(link->hearth) <= feeds_standing(link) + link->n_holds) {
            link_fail(link, -ESHUTDOWN);
        }
    }
    if (link->knock)
        take_knock(link);
    if (link->starter)
        take_starter(link);
    orders_sweep(link);
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
    return orders_due_us(link, now_us);
}

struct link *link_free(struct link *link)
{
    if (!link)
        return NULL;
    link->hearth = hearth_free(link->hearth);
    connector_free(link->knock);
    connector_free(link->starter);
    orders_free(link);
    free(link);
    return NULL;
}
