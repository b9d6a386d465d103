#include "daemon/model/catalog.h"

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "daemon/model/builtin.h"
#include "lib/cleanup.h"

#define SUFFIX ".gguf"

bool model_name_valid(const char *name, size_t len)
{
    if (len == 0 || len > WIRE_MAX_MODEL_NAME)
        return false;
    for (size_t i = 0; i < len; i++) {
        char c = name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && (i == 0 || (c != '.' && c != '_' && c != '-')))
            return false;
    }
    return true;
}

__attribute__((format(printf, 2, 3))) static void note(struct catalog *catalog, const char *format,
                                                       ...)
{
    va_list ap;

    if (catalog->n_notes == CATALOG_MAX_NOTES)
        return;
    va_start(ap, format);
    if (vasprintf(&catalog->notes[catalog->n_notes], format, ap) >= 0)
        catalog->n_notes++;
    va_end(ap);
}

static const struct catalog_item *find(const struct catalog *catalog, const char *name)
{
    for (size_t i = 0; i < catalog->n_items; i++)
        if (strcmp(catalog->items[i].name, name) == 0)
            return &catalog->items[i];
    return NULL;
}

/* Takes `path` over. */
static int add(struct catalog *catalog, const char *name, char *path,
               const struct config_model *config)
{
    const struct catalog_item *first = find(catalog, name);
    /* A place is kept for the built-in model, which comes last. */
    size_t most = path ? CATALOG_MAX_MODELS - 1 : CATALOG_MAX_MODELS;
    struct catalog_item *items;
    struct stat st;

    if (first || catalog->n_items == most) {
        if (first)
            note(catalog, "%s is left out: the name %s is taken by %s", path ? path : "built-in",
                 name, first->path ? first->path : "the built-in model");
        else
            note(catalog, "%s is left out: there are more than %u models", path,
                 CATALOG_MAX_MODELS);
        free(path);
        return 0;
    }
    items = reallocarray(catalog->items, catalog->n_items + 1, sizeof(*items));
    if (!items) {
        free(path);
        return -ENOMEM;
    }
    catalog->items = items;
    items[catalog->n_items] =
        (struct catalog_item){.path = path,
                              .config = config,
                              .bytes = !path                  ? builtin_size()
                                       : stat(path, &st) == 0 ? (uint64_t)st.st_size
                                                              : 0};
    snprintf(items[catalog->n_items++].name, sizeof(items->name), "%s", name);
    return 0;
}

static int add_file(struct catalog *catalog, const struct config *config, const char *directory,
                    const char *file)
{
    size_t len = strlen(file);
    char name[WIRE_MAX_MODEL_NAME + 1];
    char *path;

    if (len <= strlen(SUFFIX) || strcmp(file + len - strlen(SUFFIX), SUFFIX) != 0)
        return 0;
    len -= strlen(SUFFIX);
    if (!model_name_valid(file, len)) {
        note(catalog,
             "%s/%s is left out: a model's name has letters, digits, '.', '_' and '-' only, begins "
             "with a letter or digit and is at most %u long",
             directory, file, WIRE_MAX_MODEL_NAME);
        return 0;
    }
    memcpy(name, file, len);
    name[len] = 0;
    if (asprintf(&path, "%s/%s", directory, file) < 0)
        return -ENOMEM;
    return add(catalog, name, path, config_find_model(config, name));
}

static int add_directory(struct catalog *catalog, const struct config *config,
                         const char *directory)
{
    struct dirent **files = NULL;
    int n = scandir(directory, &files, NULL, alphasort), r = 0;

    if (n < 0) {
        if (errno != ENOENT)
            note(catalog, "models directory %s cannot be read: %s", directory, strerror(errno));
        return errno == ENOMEM ? -ENOMEM : 0;
    }
    for (int i = 0; i < n; i++) {
        if (r == 0)
            r = add_file(catalog, config, directory, files[i]->d_name);
        free(files[i]);
    }
    free(files);
    return r;
}

/* Entries of the configuration that name a file of their own. */
static int add_configured(struct catalog *catalog, const struct config *config)
{
    for (size_t i = 0; i < config->n_models; i++) {
        const struct config_model *model = &config->models[i];
        char *path;
        int r;
        if (!model->path)
            continue;
        path = strdup(model->path);
        r = path ? add(catalog, model->name, path, model) : -ENOMEM;
        if (r < 0)
            return r;
    }
    return 0;
}

static int compare(const void *a, const void *b)
{
    return strcmp(((const struct catalog_item *)a)->name, ((const struct catalog_item *)b)->name);
}

int catalog_read(const struct config *config, struct catalog **ret_catalog)
{
    struct catalog *catalog = calloc(1, sizeof(*catalog));
    int r;

    if (!catalog)
        return -ENOMEM;
    r = add_configured(catalog, config);
    for (char **directory = config->models_dirs; r == 0 && directory && *directory; directory++)
        r = add_directory(catalog, config, *directory);
    if (r == 0 && !find(catalog, BUILTIN_NAME))
        r = add(catalog, BUILTIN_NAME, NULL, config_find_model(config, BUILTIN_NAME));
    if (r < 0) {
        catalog_free(catalog);
        return r;
    }
    qsort(catalog->items, catalog->n_items, sizeof(*catalog->items), compare);
    *ret_catalog = catalog;
    return 0;
}

struct catalog *catalog_free(struct catalog *catalog)
{
    if (!catalog)
        return NULL;
    for (size_t i = 0; i < catalog->n_items; i++)
        free(catalog->items[i].path);
    for (size_t i = 0; i < catalog->n_notes; i++)
        free(catalog->notes[i]);
    free(catalog->items);
    free(catalog);
    return NULL;
}
