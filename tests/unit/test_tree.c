#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "fs/tree.h"
#include "lib/cleanup.h"

static struct tree *tree;

static void setup(void)
{
    cr_assert(tree_new(&tree) == 0);
}

static void teardown(void)
{
    tree = tree_free(tree);
}

TestSuite(tree, .init = setup, .fini = teardown);

/* Walks "a/b/c" from the root. */
static int walk(const char *path, struct tree_node *ret_node)
{
    char copy[256], *save = NULL;
    int r = tree_get(tree, TREE_ROOT, ret_node);

    strcpy(copy, path);
    for (char *name = strtok_r(copy, "/", &save); r == 0 && name; name = strtok_r(NULL, "/", &save))
        r = tree_lookup(tree, ret_node->ino, name, ret_node);
    return r;
}

static void follow(enum tree_set set, size_t n, const char *const *names)
{
    cr_assert(tree_follow(tree, set, names, n) == 0);
}
#define FOLLOW(set, ...) \
    follow(set, ELEMENTSOF(((const char *[]){__VA_ARGS__})), (const char *[]){__VA_ARGS__})

static int collect(void *userdata, const struct tree_node *node)
{
    char *text = userdata;

    strcat(text, node->name);
    strcat(text, " ");
    return 0;
}

Test(tree, has_every_fixed_file_of_the_contract)
{
    static const struct {
        const char *path;
        enum tree_what what;
        mode_t mode;
    } cases[] = {
        {"README", TREE_README, 0444},
        {"version", TREE_VERSION, 0444},
        {"status", TREE_STATUS, 0444},
        {"metrics/hearth.prom", TREE_PROMETHEUS, 0444},
        {"pool/stats", TREE_POOL, 0444},
        {"batcher/stats", TREE_BATCHER, 0444},
        {"streaming/stats", TREE_STREAMING, 0444},
        {"loader/stats", TREE_LOADER, 0444},
        {"events", TREE_EVENTS, 0440},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct tree_node node;
        cr_assert(walk(cases[i].path, &node) == 0, "%s", cases[i].path);
        cr_assert(node.what == cases[i].what, "%s", cases[i].path);
        cr_assert(node.mode == (S_IFREG | cases[i].mode), "%s", cases[i].path);
        cr_assert(node.subject == NULL);
    }
}

Test(tree, gives_each_model_its_files_with_their_modes)
{
    static const struct {
        const char *name;
        enum tree_what what;
        mode_t mode;
    } cases[] = {
        {"state", TREE_STATE, 0444},     {"progress", TREE_PROGRESS, 0444},
        {"preload", TREE_PRELOAD, 0664}, {"wait", TREE_WAIT, 0440},
        {"error", TREE_ERROR, 0444},     {"info", TREE_INFO, 0444},
        {"memory", TREE_MEMORY, 0444},   {"stats", TREE_STATS, 0444},
        {"pinned", TREE_PINNED, 0664},   {"keep_alive", TREE_KEEP_ALIVE, 0664},
        {"hold", TREE_HOLD, 0660},
    };

    FOLLOW(TREE_MODELS, "ember");
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        char path[64];
        struct tree_node node;
        snprintf(path, sizeof(path), "models/ember/%s", cases[i].name);
        cr_assert(walk(path, &node) == 0, "%s", path);
        cr_assert(node.what == cases[i].what && node.mode == (S_IFREG | cases[i].mode), "%s", path);
        cr_assert_str_eq(node.subject, "ember");
    }
}

Test(tree, numbers_lead_back_to_the_same_nodes)
{
    struct tree_node found, got;
    static const char *const paths[] = {"models/a/state", "models/b", "metrics/steps_total",
                                        "metrics/hearth.prom", "pool"};

    FOLLOW(TREE_MODELS, "a", "b");
    FOLLOW(TREE_METRICS, "steps_total");
    for (size_t i = 0; i < ELEMENTSOF(paths); i++) {
        cr_assert(walk(paths[i], &found) == 0, "%s", paths[i]);
        cr_assert(tree_get(tree, found.ino, &got) == 0, "%s", paths[i]);
        cr_assert(got.what == found.what && got.parent == found.parent && got.name == found.name);
    }
}

Test(tree, lists_a_directory_in_the_order_the_names_came)
{
    char text[256] = "";
    struct tree_node node;

    FOLLOW(TREE_MODELS, "zebra", "ant");
    cr_assert(walk("models", &node) == 0);
    cr_assert(tree_each(tree, node.ino, collect, text) == 0);
    cr_assert_str_eq(text, "zebra ant ");
}

Test(tree, lists_the_root_without_itself)
{
    char text[256] = "";

    cr_assert(tree_each(tree, TREE_ROOT, collect, text) == 0);
    cr_assert_str_eq(text,
                     "README version status models metrics pool batcher streaming loader events ");
}

Test(tree, a_vanished_model_is_gone_with_all_its_files)
{
    struct tree_node model, state, node;

    FOLLOW(TREE_MODELS, "a", "b");
    cr_assert(walk("models/b", &model) == 0);
    cr_assert(walk("models/b/state", &state) == 0);
    FOLLOW(TREE_MODELS, "a");
    cr_assert(tree_get(tree, model.ino, &node) == -ENOENT);
    cr_assert(tree_get(tree, state.ino, &node) == -ENOENT);
    cr_assert(walk("models/b", &node) == -ENOENT);
    cr_assert(tree_each(tree, model.ino, collect, (char[8]){""}) == -ENOENT);
    cr_assert(walk("models/a/state", &node) == 0);
}

Test(tree, a_model_that_comes_back_has_its_old_number)
{
    struct tree_node before, after;

    FOLLOW(TREE_MODELS, "a", "b");
    cr_assert(walk("models/b/state", &before) == 0);
    FOLLOW(TREE_MODELS, "a");
    FOLLOW(TREE_MODELS, "c", "b", "a");
    cr_assert(walk("models/b/state", &after) == 0);
    cr_assert(before.ino == after.ino);
}

Test(tree, a_forgotten_name_leaves_its_number_to_nobody)
{
    static char texts[TREE_NAMES_MAX][16];
    static const char *names[TREE_NAMES_MAX];
    struct tree_node old, node;

    FOLLOW(TREE_MODELS, "old");
    cr_assert(walk("models/old", &old) == 0);
    for (size_t i = 0; i < TREE_NAMES_MAX; i++) {
        snprintf(texts[i], sizeof(texts[i]), "m%zu", i);
        names[i] = texts[i];
    }
    follow(TREE_MODELS, TREE_NAMES_MAX, names);
    cr_assert(walk("models/m4095", &node) == 0);
    cr_assert(tree_get(tree, old.ino, &node) == -ENOENT);
    FOLLOW(TREE_MODELS, "old");
    cr_assert(walk("models/old", &node) == 0);
    cr_assert(node.ino != old.ino);
    cr_assert(tree_get(tree, old.ino, &node) == -ENOENT);
}

Test(tree, more_names_than_the_bound_are_left_out)
{
    static char texts[TREE_NAMES_MAX + 10][16];
    static const char *names[TREE_NAMES_MAX + 10];
    struct tree_node node;

    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        snprintf(texts[i], sizeof(texts[i]), "m%zu", i);
        names[i] = texts[i];
    }
    follow(TREE_MODELS, ELEMENTSOF(names), names);
    cr_assert(walk("models/m4095", &node) == 0);
    cr_assert(walk("models/m4096", &node) == -ENOENT);
}

Test(tree, names_that_cannot_be_names_are_left_out)
{
    char longest[TREE_NAME_MAX + 1], longer[TREE_NAME_MAX + 2];
    struct tree_node node;

    memset(longest, 'x', TREE_NAME_MAX);
    longest[TREE_NAME_MAX] = '\0';
    memset(longer, 'y', TREE_NAME_MAX + 1);
    longer[TREE_NAME_MAX + 1] = '\0';
    FOLLOW(TREE_MODELS, "..", ".", "", "a/b", "-x", "_x", "a b", "\xc3\xa4", "a\n", longest, longer,
           "Llama-3.2_1B.Q4");
    cr_assert(walk("models/Llama-3.2_1B.Q4", &node) == 0);
    char all[512] = "";
    cr_assert(walk("models", &node) == 0);
    cr_assert(tree_each(tree, node.ino, collect, all) == 0);
    cr_assert(strlen(all) == TREE_NAME_MAX + 1 + strlen("Llama-3.2_1B.Q4 "));
}

Test(tree, a_name_given_twice_is_one)
{
    char text[64] = "";
    struct tree_node node;

    FOLLOW(TREE_MODELS, "a", "a");
    cr_assert(walk("models", &node) == 0);
    cr_assert(tree_each(tree, node.ino, collect, text) == 0);
    cr_assert_str_eq(text, "a ");
}

Test(tree, numbers_of_nothing_are_refused)
{
    static const uint64_t inos[] = {0, 40, 63, 64, 100, UINT64_MAX, 1ull << 63};
    struct tree_node node, model;

    FOLLOW(TREE_MODELS, "a");
    FOLLOW(TREE_METRICS, "up");
    cr_assert(walk("models/a", &model) == 0);
    for (size_t i = 0; i < ELEMENTSOF(inos); i++)
        if (inos[i] != model.ino)
            cr_assert(tree_get(tree, inos[i], &node) == -ENOENT, "%lu", (unsigned long)inos[i]);
    cr_assert(tree_get(tree, model.ino + 60, &node) == -ENOENT);
    cr_assert(walk("metrics/up", &model) == 0);
    cr_assert(tree_get(tree, model.ino + 1, &node) == -ENOENT);
}

Test(tree, a_file_is_no_directory)
{
    struct tree_node file, node;

    FOLLOW(TREE_MODELS, "a");
    cr_assert(walk("models/a/state", &file) == 0);
    cr_assert(tree_lookup(tree, file.ino, "x", &node) == -ENOTDIR);
    cr_assert(tree_each(tree, file.ino, collect, NULL) == -ENOTDIR);
    cr_assert(walk("status", &file) == 0);
    cr_assert(tree_lookup(tree, file.ino, "x", &node) == -ENOTDIR);
}

Test(tree, says_which_directories_follow_the_daemon)
{
    struct tree_node node;

    FOLLOW(TREE_MODELS, "a");
    cr_assert(walk("models", &node) == 0 && tree_follows(node.ino));
    cr_assert(walk("metrics", &node) == 0 && tree_follows(node.ino));
    cr_assert(walk("pool", &node) == 0 && !tree_follows(node.ino));
    cr_assert(walk("models/a", &node) == 0 && !tree_follows(node.ino));
    cr_assert(!tree_follows(TREE_ROOT));
}
