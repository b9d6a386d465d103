#include <criterion/criterion.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fs/events.h"
#include "lib/cleanup.h"
#include "lib/news.h"

static struct events *events;
static struct events_reader reader;

static void setup(void)
{
    cr_assert(events_new(&events) == 0);
    events_reader_init(events, &reader);
}

static void teardown(void)
{
    events_reader_done(&reader);
    events = events_free(events);
}

TestSuite(events, .init = setup, .fini = teardown);

/* What one read of `size` bytes gives. */
static const char *take(struct events_reader *who, size_t size)
{
    static char text[NEWS_EVENTS_KEPT * 64];
    size_t bytes = 77;

    cr_assert(size < sizeof(text));
    cr_assert(events_read(events, who, text, size, &bytes) == 0);
    cr_assert(bytes <= size);
    text[bytes] = '\0';
    return text;
}

Test(events, come_as_lines_in_their_order)
{
    cr_assert(!events_pending(events, &reader));
    cr_assert_str_eq(take(&reader, 100), "");
    events_push(events, "{\"a\":1}");
    events_push(events, "{\"a\":2}\n");
    cr_assert(events_pending(events, &reader));
    cr_assert_str_eq(take(&reader, 100), "{\"a\":1}\n{\"a\":2}\n");
    cr_assert(!events_pending(events, &reader));
    cr_assert_str_eq(take(&reader, 100), "");
}

Test(events, each_reader_begins_where_he_came_and_has_his_own_place)
{
    struct events_reader late;

    events_push(events, "1");
    events_reader_init(events, &late);
    events_push(events, "2");
    cr_assert_str_eq(take(&late, 100), "2\n");
    cr_assert_str_eq(take(&reader, 100), "1\n2\n");
    events_push(events, "3");
    cr_assert_str_eq(take(&reader, 100), "3\n");
    cr_assert_str_eq(take(&late, 100), "3\n");
    events_reader_done(&late);
}

Test(events, lines_that_do_not_fit_come_next)
{
    events_push(events, "first");
    events_push(events, "second");
    cr_assert_str_eq(take(&reader, 8), "first\n");
    cr_assert_str_eq(take(&reader, 8), "second\n");
}

Test(events, a_line_longer_than_the_room_comes_in_parts)
{
    events_push(events, "0123456789");
    events_push(events, "next");
    cr_assert_str_eq(take(&reader, 4), "0123");
    cr_assert(events_pending(events, &reader));
    cr_assert_str_eq(take(&reader, 1), "4");
    cr_assert_str_eq(take(&reader, 6), "56789\n");
    cr_assert_str_eq(take(&reader, 100), "next\n");
}

Test(events, a_part_is_followed_by_its_rest_whatever_comes_meanwhile)
{
    char lost[64];

    events_push(events, "0123456789");
    cr_assert_str_eq(take(&reader, 4), "0123");
    for (unsigned i = 0; i < NEWS_EVENTS_KEPT + 5; i++)
        events_push(events, "x");
    snprintf(lost, sizeof(lost), "456789\n" NEWS_LOST_FORMAT "\nx\n", (uint64_t)5);
    cr_assert_str_eq(take(&reader, strlen(lost)), lost);
}

Test(events, who_is_overtaken_is_told_how_many_he_missed)
{
    char lost[64];

    for (unsigned i = 0; i < NEWS_EVENTS_KEPT; i++)
        events_push(events, "old");
    cr_assert(strncmp(take(&reader, 8), "old\nold\n", 8) == 0, "so many are kept");
    for (unsigned i = 0; i < NEWS_EVENTS_KEPT + 10; i++)
        events_push(events, "new");
    snprintf(lost, sizeof(lost), NEWS_LOST_FORMAT "\n", (uint64_t)(NEWS_EVENTS_KEPT - 2 + 10));
    cr_assert_str_eq(take(&reader, strlen(lost)), lost);
    cr_assert_str_eq(take(&reader, 4), "new\n");
}

Test(events, what_the_daemon_left_out_is_told_in_its_place)
{
    char text[128];

    events_push(events, "a");
    events_push_lost(events, 7);
    events_push_lost(events, 2);
    events_push(events, "b");
    snprintf(text, sizeof(text), "a\n" NEWS_LOST_FORMAT "\nb\n", (uint64_t)9);
    cr_assert_str_eq(take(&reader, 200), text);
    events_push_lost(events, 1);
    cr_assert(events_pending(events, &reader));
    snprintf(text, sizeof(text), NEWS_LOST_FORMAT "\n", (uint64_t)1);
    cr_assert_str_eq(take(&reader, 200), text);
}

Test(events, a_loss_that_is_lost_itself_counts_whole)
{
    char lost[64];

    events_push_lost(events, 7);
    events_push(events, "gone");
    for (uint32_t i = 0; i < NEWS_EVENTS_KEPT; i++)
        events_push(events, "x");
    snprintf(lost, sizeof(lost), NEWS_LOST_FORMAT "\n", (uint64_t)8);
    cr_assert_str_eq(take(&reader, strlen(lost)), lost);
    events_push_lost(events, 3);
    for (uint32_t i = 0; i < NEWS_EVENTS_KEPT; i++)
        events_push(events, "y");
    snprintf(lost, sizeof(lost), NEWS_LOST_FORMAT "\n", (uint64_t)NEWS_EVENTS_KEPT + 3);
    cr_assert_str_eq(take(&reader, strlen(lost)), lost);
}

Test(events, lines_of_hostile_sizes_count_as_lost)
{
    _cleanup_free_ char *line = malloc(EVENTS_LINE_BYTES_MAX + 1);
    char text[128];

    memset(line, 'x', EVENTS_LINE_BYTES_MAX);
    line[EVENTS_LINE_BYTES_MAX] = '\0';
    events_push(events, line);
    events_push(events, "");
    events_push(events, NULL);
    events_push(events, "\n");
    events_push(events, "one\ntwo");
    snprintf(text, sizeof(text), NEWS_LOST_FORMAT "\none\n", (uint64_t)4);
    cr_assert_str_eq(take(&reader, 200), text);
}

Test(events, a_read_without_room_takes_nothing)
{
    events_push(events, "a");
    cr_assert_str_eq(take(&reader, 0), "");
    cr_assert_str_eq(take(&reader, 10), "a\n");
}
