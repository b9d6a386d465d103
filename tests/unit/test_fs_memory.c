/* The parts of hearthfs without memory: each allocation of each of them fails once. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/events.h"
#include "fs/link.h"
#include "fs/mirror.h"
#include "fs/render.h"
#include "fs/tree.h"
#include "lib/cleanup.h"
#include "tests/support/alloc_fail.h"

#define FAILURES_MAX 1000u

static struct mirror *mirror;
static uint64_t now = 1000000;

/* Runs `part` with its first, second, ... allocation failing, until none fails; how many did.
 * `part` has to survive each. */
static unsigned each_failure(void (*part)(bool fails))
{
    for (unsigned n = 1; n < FAILURES_MAX; n++) {
        alloc_fail_at(n);
        part(true);
        if (!alloc_fail_done()) {
            part(false);
            return n - 1;
        }
    }
    cr_assert_fail("it never comes through");
    return 0;
}

static void push(const struct hearth_reply *item)
{
    struct hearth_reply reply = *item;

    reply.kind = HEARTH_ITEM;
    mirror_push(mirror, &reply, now);
}

static void push_all(void)
{
    push(&(struct hearth_reply){
        .model = "a", .state = "failed", .info = "x 1", .stats = "y 2", .sentence = "why"});
    push(&(struct hearth_reply){.model = "b", .state = "cold"});
    push(&(struct hearth_reply){.name = "pool", .text = "open 1"});
    push(&(struct hearth_reply){.name = "prometheus",
                                .text = "# TYPE hearth_a gauge\nhearth_a 1\n"
                                        "# TYPE hearth_b gauge\nhearth_b{model=\"x\"} 1\n"});
    push(&(struct hearth_reply){.state = "running", .version = "1"});
}

static void fill_mirror(bool fails)
{
    mirror = NULL;
    if (mirror_new(&mirror) < 0) {
        cr_assert(fails);
        return;
    }
    mirror_connecting(mirror, now);
    mirror_connected(mirror, now);
    mirror_feeding(mirror, now);
    push_all();
    cr_assert(mirror_answers(mirror, now, now), "a copy in part is better than none");
    if (!fails) {
        cr_assert_eq(mirror_n_models(mirror), 2);
        cr_assert_str_eq(mirror_model(mirror, "a")->sentence, "why");
    }
    mirror = mirror_free(mirror);
}

Test(fs_memory, the_mirror_leaves_out_what_it_has_no_room_for)
{
    cr_assert_geq(each_failure(fill_mirror), 2);
}

static void follow_tree(bool fails)
{
    static const char *const names[] = {"a", "b", "c"};
    struct tree *tree;
    struct tree_node node;
    int r = tree_new(&tree);

    if (r < 0) {
        cr_assert(fails && r == -ENOMEM);
        return;
    }
    r = tree_follow(tree, TREE_MODELS, names, ELEMENTSOF(names));
    cr_assert(r == 0 || (fails && r == -ENOMEM));
    r = tree_follow(tree, TREE_MODELS, names, ELEMENTSOF(names));
    cr_assert(r == 0 || fails);
    cr_assert(r < 0 || (tree_lookup(tree, TREE_ROOT, "models", &node) == 0 &&
                        tree_lookup(tree, node.ino, "c", &node) == 0));
    tree_free(tree);
}

Test(fs_memory, the_tree_follows_when_there_is_memory_again)
{
    cr_assert_geq(each_failure(follow_tree), 4);
}

static void render_all(bool fails)
{
    static const enum tree_what whats[] = {TREE_README, TREE_STATUS, TREE_PROMETHEUS, TREE_POOL};
    char **names = NULL, *text;
    size_t n, bytes;
    int r;

    for (size_t i = 0; i < ELEMENTSOF(whats); i++) {
        struct tree_node node = {.what = whats[i]};
        r = render_node(mirror, &node, now, &text, &bytes);
        cr_assert(r == 0 || (fails && r == -ENOMEM));
        if (r == 0)
            free(text);
    }
    r = render_metric_names(mirror_text(mirror, MIRROR_PROMETHEUS), &names, &n);
    cr_assert(r == 0 || (fails && r == -ENOMEM));
    if (r == 0)
        render_names_free(names, n);
}

Test(fs_memory, a_text_is_whole_or_not_given)
{
    cr_assert(mirror_new(&mirror) == 0);
    mirror_connecting(mirror, now);
    mirror_connected(mirror, now);
    mirror_feeding(mirror, now);
    push_all();
    cr_assert_geq(each_failure(render_all), 1);
    mirror = mirror_free(mirror);
}

static void tell_events(bool fails)
{
    struct events *events;
    struct events_reader reader;
    char text[256];
    size_t bytes = 0, told = 0;
    int r = events_new(&events);

    if (r < 0) {
        cr_assert(fails && r == -ENOMEM);
        return;
    }
    events_reader_init(events, &reader);
    events_push(events, "0123456789");
    events_push(events, "another");
    for (int i = 0; i < 20; i++) {
        r = events_read(events, &reader, text, 4, &bytes);
        cr_assert(r == 0 || (fails && r == -ENOMEM));
        told += r == 0 ? bytes : 0;
    }
    cr_assert(fails || told == 19);
    cr_assert(!events_pending(events, &reader), "it never comes to the end");
    events_reader_done(&reader);
    events_free(events);
}

Test(fs_memory, an_event_without_room_counts_as_lost)
{
    cr_assert_geq(each_failure(tell_events), 3);
}

static void give_order(bool fails)
{
    struct caller caller = {.uid = 1, .n_gids = 1};
    struct link_request request = {LINK_LOAD, "a", 0, &caller};
    struct link_order *order;
    struct events *events = NULL;
    struct link *link = NULL;
    int r = events_new(&events);

    if (r == 0 && !mirror)
        r = mirror_new(&mirror);
    if (r == 0)
        r = link_new("/nowhere/at/all", mirror, events, &link);
    if (r == 0)
        r = link_order(link, &request, NULL, NULL, now, &order);
    cr_assert(r == 0 || (fails && r == -ENOMEM));
    if (r == 0)
        link_drop(link, order);
    link_free(link);
    events_free(events);
    mirror = mirror_free(mirror);
}

Test(fs_memory, an_order_without_room_is_not_taken)
{
    cr_assert_geq(each_failure(give_order), 5);
}
