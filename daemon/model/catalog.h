/* The catalog: which models there are on disk.
 *
 * Looks through the models directories for NAME.gguf, adds what the configuration names and what is
 * built in; the first that has a name keeps it. A plain function over directories, safe on any
 * thread, so that a slow disk holds up nobody but the thread that asks.
 *
 * Hides directories and the rules of names. */
#ifndef HEARTH_MODEL_CATALOG_H
#define HEARTH_MODEL_CATALOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/config.h"
#include "lib/wire.h"

/* Most models of a catalog; more are left out, with a note. */
#define CATALOG_MAX_MODELS 4096u
/* Most notes kept of one look. */
#define CATALOG_MAX_NOTES 16u

struct catalog_item {
    char name[WIRE_MAX_MODEL_NAME + 1];
    char *path; /* NULL: built in */
    const struct config_model *config;
    uint64_t bytes; /* of the file at the time of the look; 0: it could not be asked */
};

struct catalog {
    struct catalog_item *items; /* sorted by name */
    size_t n_items;
    char
        *notes[CATALOG_MAX_NOTES]; /* what is worth a warning: doubles, names that cannot be used */
    size_t n_notes;
};

/* `[A-Za-z0-9][A-Za-z0-9._-]{0,127}` */
bool model_name_valid(const char *name, size_t len);

/* -ENOMEM; a directory that cannot be read is left out (with a note unless it does not exist). */
int catalog_read(const struct config *config, struct catalog **ret_catalog);
struct catalog *catalog_free(struct catalog *catalog);

#endif
