#include "fs/link_internal.h"

#include <errno.h>
#include <string.h>

/* How a subscription ended by itself; its end by our own wish is not told (the id is 0 then). */
static void feed_end(struct feed *feed, const struct hearth_reply *reply)
{
    feed->id = 0;
    feed->error = reply->kind == HEARTH_ERROR ? link_code_errno(reply->code) : EIO;
}

static bool is_item(const struct hearth_reply *reply)
{
    return reply->kind == HEARTH_ITEM || reply->kind == HEARTH_TOKENS;
}

static void on_values(void *userdata, const struct hearth_reply *reply)
{
    struct link *link = userdata;

    if (reply->id != link->values.id || reply->lost)
        return;
    if (is_item(reply)) {
        mirror_push(link->mirror, reply, link->now_us);
        return;
    }
    feed_end(&link->values, reply);
    mirror_unfed(link->mirror, true, link->now_us);
}

static void on_events(void *userdata, const struct hearth_reply *reply)
{
    struct link *link = userdata;

    if (reply->id != link->events_feed.id || reply->lost)
        return;
    mirror_heard(link->mirror, link->now_us);
    if (!is_item(reply))
        feed_end(&link->events_feed, reply);
    else if (reply->lost_events > 0)
        events_push_lost(link->events, reply->lost_events);
    else
        events_push(link->events, reply->text);
}

/* Asks the daemon to end it. Its end is not waited for. */
static void unsubscribe(struct link *link, struct feed *feed)
{
    uint64_t id = feed->id;

    feed->id = 0;
    if (link->hearth && id != 0)
        (void)hearth_cancel(link->hearth, id);
}

int feed_values(struct link *link)
{
    int r;

    link_look_begin(link);
    r = hearth_subscribe(link->hearth, "values", on_values, link, &link->values.id);
    link_look_end(link);
    if (r == 0)
        mirror_feeding(link->mirror, link->now_us);
    return r;
}

/* Events may not wait until somebody needs values: who opens the file misses nothing from then on.
 * A failure here shows at the next question, too. */
static void feed_events(struct link *link)
{
    link_look_begin(link);
    (void)hearth_subscribe(link->hearth, "events", on_events, link, &link->events_feed.id);
    link_look_end(link);
}

void feeds_step(struct link *link)
{
    if (!link->hearth || hearth_going_away(link->hearth))
        return;
    if (!link->values.wanted && link->values.id != 0) {
        unsubscribe(link, &link->values);
        mirror_unfed(link->mirror, false, link->now_us);
    }
    if (!link->events_feed.wanted)
        unsubscribe(link, &link->events_feed);
    else if (link->events_feed.id == 0 && link->events_feed.error == 0)
        feed_events(link);
}

void feeds_lost(struct link *link)
{
    link->values.id = link->events_feed.id = 0;
    link->values.error = link->events_feed.error = 0;
}

size_t feeds_standing(const struct link *link)
{
    return (link->values.id != 0) + (link->events_feed.id != 0);
}

void link_want_values(struct link *link, bool wanted)
{
    link->values.wanted = wanted;
}

void link_want_events(struct link *link, bool wanted)
{
    link->events_feed.wanted = wanted;
}

int link_events_error(const struct link *link)
{
    return link->events_feed.error;
}
