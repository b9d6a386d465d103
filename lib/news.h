/* The words of the daemon's news that its readers have to know too: the sections of its values, and
 * what a reader of events gets in place of those it has missed.
 *
 * Hides nothing: it is the one place where these are stated. The wire carries them as text. */
#ifndef HEARTH_LIB_NEWS_H
#define HEARTH_LIB_NEWS_H

#include <inttypes.h>

/* Sections that `metrics` answers with and `subscribe values` pushes. The flat ones are lines of a
 * key and a value; they are what `metrics` without a name means. */
#define NEWS_POOL          "pool"
#define NEWS_BATCHER       "batcher"
#define NEWS_STREAMING     "streaming"
#define NEWS_LOADER        "loader"
#define NEWS_PROMETHEUS    "prometheus"
#define NEWS_FLAT_SECTIONS NEWS_POOL, NEWS_BATCHER, NEWS_STREAMING, NEWS_LOADER

/* Events kept for a slow reader, by the daemon and again by hearthfs. */
#define NEWS_EVENTS_KEPT 1024u
/* The line that says how many (uint64_t) a reader has missed, without its end. */
#define NEWS_LOST_FORMAT "{\"event\":\"lost\",\"count\":%" PRIu64 "}"

#endif
