/* The table of configuration keys: each key's place, kind, default, bounds and sentence, once.
 *
 * Hides how a value's text becomes a field: the defaults are texts of this table, read by the same
 * functions as a file's. Used by config*.c alone. Thread: the caller's. */
#ifndef HEARTH_DAEMON_CONFIG_TABLE_H
#define HEARTH_DAEMON_CONFIG_TABLE_H

#include "daemon/config.h"

enum config_kind {
    KIND_NAME,     /* char *: a model's name */
    KIND_PATH,     /* char *: an absolute path */
    KIND_PATHS,    /* char **: absolute paths */
    KIND_NAMES,    /* char **: models' names */
    KIND_ACCOUNTS, /* char **: users or groups */
    KIND_DURATION, /* uint64_t, microseconds */
    KIND_SIZE,     /* uint64_t, bytes */
    KIND_SHARE,    /* struct config_size */
    KIND_COUNT,    /* uint32_t */
    KIND_RANK,     /* int32_t, from -max to max */
    KIND_FLAG,     /* bool */
    KIND_CHOICE,   /* an enum, numbered like `words` */
};

struct config_key {
    const char *path; /* "limits.queue"; a model's begin with CONFIG_MODEL_PREFIX */
    enum config_kind kind;
    size_t offset;            /* in struct config or struct config_model */
    uint64_t min, max;        /* durations, sizes (and the bytes of a share), counts, ranks */
    const char *zero;         /* the word that stands for 0, where there is one */
    const char *const *words; /* choices, NULL-terminated */
    const char *text;         /* the default, as a file would give it; NULL: none */
    const char *text_words;   /* the default in words, where `text` does not say it */
    const char *sentence;
    bool later; /* taken and checked, but nothing follows from it in this version */
};

#define CONFIG_MODEL_PREFIX "models.NAME"
/* Longest "expected ..." of config_key_expects(). */
#define CONFIG_EXPECTS_BYTES 160

extern const struct config_key config_keys[];
extern const size_t n_config_keys;

/* The key of this path, or NULL. */
const struct config_key *config_key_find(const char *path);
/* Whether the path is a section: some key's path begins with it and a dot. */
bool config_section_known(const char *path);
/* The known path most like an unknown one. */
const char *config_key_nearest(const char *path);

bool config_key_is_list(const struct config_key *key);
/* What the key takes, to follow the word "expected". */
void config_key_expects(const struct config_key *key, char ret_text[CONFIG_EXPECTS_BYTES]);
/* Reads one value (or one more element of a list) into `base`, a config or a config_model.
 * -EINVAL: not what is expected; -ENOSPC: a list is full; -ENOMEM. */
int config_key_read(const struct config_key *key, void *base, const char *text);
/* Frees what the key's field holds and leaves it empty. */
void config_key_clear(const struct config_key *key, void *base);
/* Sets every default of the table's part (the models' or the others). -ENOMEM. */
int config_defaults(void *base, bool of_model);
/* Clears every field of that part. */
void config_clear(void *base, bool of_model);

/* [A-Za-z0-9][A-Za-z0-9._-]{0,127} */
bool config_name_valid(const char *name);
/* Appends a copy to a NULL-terminated list, at `at` (SIZE_MAX: the end). -ENOSPC, -ENOMEM. */
int config_list_insert(char ***list, size_t at, const char *text);
char **config_list_free(char **list);

/* Adds a model with the table's defaults. -EEXIST, -ENOSPC, -ENOMEM. The pointer is valid until the
 * next call. */
int config_add_model(struct config *config, const char *name, struct config_model **ret_model);

#endif
