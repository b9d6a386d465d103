/* The catalog: which names there are, and why others are not. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/model/builtin.h"
#include "daemon/model/catalog.h"

struct shelf {
    char dir[64];
    struct config *config;
    struct catalog *catalog;
};

static void build_shelf(struct shelf *shelf)
{
    *shelf = (struct shelf){.dir = "/tmp/hearth-shelf-XXXXXX"};
    cr_assert_not_null(mkdtemp(shelf->dir));
    cr_assert_eq(config_new(&shelf->config), 0);
}

/* A directory of models below the shelf, or the path of one that does not exist. */
static void add_directory(struct shelf *shelf, const char *name, bool make)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/%s", shelf->dir, name);
    if (make)
        cr_assert_eq(mkdir(path, 0755), 0);
    cr_assert_eq(config_add_models_dir(shelf->config, path), 0);
}

static void add_file(struct shelf *shelf, const char *name)
{
    char path[512];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", shelf->dir, name);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    cr_assert(fd >= 0, "%s", path);
    close(fd);
}

static void configure(struct shelf *shelf, const char *yaml)
{
    struct fault fault;
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/hearth.yaml", shelf->dir);
    file = fopen(path, "we");
    cr_assert_not_null(file);
    fputs(yaml, file);
    fclose(file);
    cr_assert_eq(config_load(shelf->config, path, &fault), 0, "%s", fault.text);
}

static void look(struct shelf *shelf)
{
    shelf->catalog = catalog_free(shelf->catalog);
    cr_assert_eq(catalog_read(shelf->config, &shelf->catalog), 0);
}

static const struct catalog_item *find(const struct shelf *shelf, const char *name)
{
    for (size_t i = 0; i < shelf->catalog->n_items; i++)
        if (strcmp(shelf->catalog->items[i].name, name) == 0)
            return &shelf->catalog->items[i];
    return NULL;
}

static bool noted(const struct shelf *shelf, const char *text)
{
    for (size_t i = 0; i < shelf->catalog->n_notes; i++)
        if (strstr(shelf->catalog->notes[i], text))
            return true;
    return false;
}

static void clear_shelf(struct shelf *shelf)
{
    char command[128];

    catalog_free(shelf->catalog);
    config_free(shelf->config);
    snprintf(command, sizeof(command), "rm -rf %s", shelf->dir);
    cr_assert_eq(system(command), 0);
}

Test(catalog, names_follow_the_contract)
{
    char longest[WIRE_MAX_MODEL_NAME + 2];
    static const char *const good[] = {"a", "9", "ember", "Qwen2.5-0.5B_q8", "a..", "x-"};
    static const char *const bad[] = {"",    ".a",  "-a",       "_a",  "a/b", "../a",
                                      "a b", "a\n", "\xc3\xa9", "a%s", "a:b", "a*"};

    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        cr_expect(model_name_valid(good[i], strlen(good[i])), "%s", good[i]);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        cr_expect_not(model_name_valid(bad[i], strlen(bad[i])), "%s", bad[i]);
    cr_expect_not(model_name_valid("a\0b", 3), "a zero byte");
    memset(longest, 'a', sizeof(longest));
    cr_expect(model_name_valid(longest, WIRE_MAX_MODEL_NAME));
    cr_expect_not(model_name_valid(longest, WIRE_MAX_MODEL_NAME + 1));
}

Test(catalog, files_are_found_and_sorted_by_name)
{
    struct shelf shelf;

    build_shelf(&shelf);
    add_directory(&shelf, "m", true);
    add_file(&shelf, "m/zebra.gguf");
    add_file(&shelf, "m/apple.gguf");
    add_file(&shelf, "m/Upper.gguf");
    add_file(&shelf, "m/notes.txt");
    add_file(&shelf, "m/model.gguf.part");
    add_file(&shelf, "m/.gguf");
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 4);
    cr_assert_str_eq(shelf.catalog->items[0].name, "Upper");
    cr_assert_str_eq(shelf.catalog->items[1].name, "apple");
    cr_assert_str_eq(shelf.catalog->items[2].name, BUILTIN_NAME);
    cr_assert_str_eq(shelf.catalog->items[3].name, "zebra");
    cr_assert_eq(shelf.catalog->n_notes, 0, "%s", shelf.catalog->notes[0]);
    cr_assert_null(shelf.catalog->items[2].path, "the built-in model has no file");
    clear_shelf(&shelf);
}

Test(catalog, the_first_directory_wins_with_a_note)
{
    struct shelf shelf;

    build_shelf(&shelf);
    add_directory(&shelf, "first", true);
    add_directory(&shelf, "second", true);
    add_file(&shelf, "second/one.gguf");
    add_file(&shelf, "second/two.gguf");
    add_file(&shelf, "first/one.gguf");
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 3);
    cr_assert_not_null(strstr(find(&shelf, "one")->path, "/first/one.gguf"));
    cr_assert_not_null(strstr(find(&shelf, "two")->path, "/second/two.gguf"));
    cr_assert_eq(shelf.catalog->n_notes, 1);
    cr_assert(noted(&shelf, "/second/one.gguf is left out"));
    cr_assert(noted(&shelf, "/first/one.gguf"), "and by what it was taken");
    clear_shelf(&shelf);
}

Test(catalog, names_that_cannot_be_used_are_noted)
{
    struct shelf shelf;
    char name[200];

    build_shelf(&shelf);
    add_directory(&shelf, "m", true);
    add_file(&shelf, "m/with blank.gguf");
    add_file(&shelf, "m/.hidden.gguf");
    add_file(&shelf, "m/good.gguf");
    memset(name, 'n', sizeof(name));
    memcpy(name, "m/", 2);
    strcpy(name + 2 + WIRE_MAX_MODEL_NAME + 1, ".gguf");
    add_file(&shelf, name);
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 2);
    cr_assert_eq(shelf.catalog->n_notes, 3);
    cr_assert(noted(&shelf, "with blank.gguf is left out"));
    cr_assert(noted(&shelf, ".hidden.gguf is left out"));
    cr_assert(noted(&shelf, "nnnn.gguf is left out"));
    clear_shelf(&shelf);
}

Test(catalog, a_missing_directory_is_nothing_and_a_wrong_one_is_noted)
{
    struct shelf shelf;

    build_shelf(&shelf);
    add_directory(&shelf, "missing", false);
    add_file(&shelf, "file");
    add_directory(&shelf, "file", false);
    add_directory(&shelf, "m", true);
    add_file(&shelf, "m/one.gguf");
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 2, "the others are read all the same");
    cr_assert_eq(shelf.catalog->n_notes, 1);
    cr_assert(noted(&shelf, "/file cannot be read: Not a directory"));
    clear_shelf(&shelf);
}

Test(catalog, a_configured_path_goes_before_the_directories)
{
    struct shelf shelf;

    build_shelf(&shelf);
    configure(&shelf, "models:\n"
                      "  one: {path: /elsewhere/weights.bin, pinned: yes}\n"
                      "  two: {keep_alive: 5s}\n"
                      "  absent: {pinned: yes}\n");
    add_directory(&shelf, "m", true);
    add_file(&shelf, "m/one.gguf");
    add_file(&shelf, "m/two.gguf");
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 3, "an entry without a file is no model");
    cr_assert_str_eq(find(&shelf, "one")->path, "/elsewhere/weights.bin");
    cr_assert(find(&shelf, "one")->config->pinned);
    cr_assert_eq(find(&shelf, "two")->config->keep_alive_us, 5000000);
    cr_assert_null(find(&shelf, BUILTIN_NAME)->config);
    cr_assert(noted(&shelf, "/m/one.gguf is left out"));
    clear_shelf(&shelf);
}

Test(catalog, a_file_may_take_the_built_in_models_place)
{
    struct shelf shelf;

    build_shelf(&shelf);
    configure(&shelf, "models: {" BUILTIN_NAME ": {context: 64}}\n");
    add_directory(&shelf, "m", true);
    look(&shelf);
    cr_assert_null(find(&shelf, BUILTIN_NAME)->path);
    cr_assert_eq(find(&shelf, BUILTIN_NAME)->config->context, 64);
    add_file(&shelf, "m/" BUILTIN_NAME ".gguf");
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, 1);
    cr_assert_not_null(find(&shelf, BUILTIN_NAME)->path);
    cr_assert_eq(shelf.catalog->n_notes, 0);
    clear_shelf(&shelf);
}

Test(catalog, models_and_notes_are_bounded)
{
    struct shelf shelf;
    char name[32];

    build_shelf(&shelf);
    add_directory(&shelf, "m", true);
    for (unsigned i = 0; i < CATALOG_MAX_MODELS + 20; i++) {
        snprintf(name, sizeof(name), "m/n%05u.gguf", i);
        add_file(&shelf, name);
    }
    look(&shelf);
    cr_assert_eq(shelf.catalog->n_items, CATALOG_MAX_MODELS);
    cr_assert_eq(shelf.catalog->n_notes, CATALOG_MAX_NOTES);
    cr_assert(noted(&shelf, "there are more than 4096 models"));
    cr_assert_not_null(find(&shelf, BUILTIN_NAME), "a fresh request still finds the default model");
    clear_shelf(&shelf);
}
