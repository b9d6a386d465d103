/* The tree: which files the mount has, and which inode number each of them is.
 *
 * Fixed files and directories stand in a table. Two directories follow the daemon: `models` has one
 * directory a model, `metrics` one file a metric; tree_follow() tells the tree their names now. A
 * name keeps its inode number while it is known, also when it vanishes and comes back; a number is
 * never given to another name, so that a kernel which remembers an old one gets ENOENT and looks
 * again.
 *
 * Hides: the tables, the numbering, the memory of names. Knows neither FUSE nor the daemon.
 * Thread: the caller's. */
#ifndef HEARTH_FS_TREE_H
#define HEARTH_FS_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The number FUSE gives the root of every mount. */
#define TREE_ROOT 1u
/* Names remembered in each of the two directories; beyond it vanished names are forgotten, and
 * where that is not enough the newest are left out. */
#define TREE_NAMES_MAX 4096u
/* Longest name of a model or metric, without the terminator. */
#define TREE_NAME_MAX 128u

enum tree_what {
    TREE_DIR,
    /* One of each. */
    TREE_README,
    TREE_VERSION,
    TREE_STATUS,
    TREE_PROMETHEUS,
    TREE_POOL,
    TREE_BATCHER,
    TREE_STREAMING,
    TREE_LOADER,
    TREE_EVENTS,
    /* One a metric. */
    TREE_METRIC,
    /* One a model. */
    TREE_STATE,
    TREE_PROGRESS,
    TREE_PRELOAD,
    TREE_PINNED,
    TREE_KEEP_ALIVE,
    TREE_HOLD,
    TREE_WAIT,
    TREE_ERROR,
    TREE_INFO,
    TREE_MEMORY,
    TREE_STATS,
};

enum tree_set { TREE_MODELS, TREE_METRICS, _TREE_SET_MAX };

/* A node as tree_get() shows it. The strings are valid until the next tree_follow(). */
struct tree_node {
    uint64_t ino;
    uint64_t parent;
    enum tree_what what;
    mode_t mode;         /* type and permissions */
    const char *name;    /* in its directory; "" for the root */
    const char *subject; /* the model or metric it belongs to, NULL for the fixed ones */
};

struct tree;

int tree_new(struct tree **ret_tree);
struct tree *tree_free(struct tree *tree);

/* The names of a directory from now on; those that are none (hearth_model_name_valid(), which fits
 * metrics as well) are left out.
 * 0 or -ENOMEM (the names before the failure are there). */
int tree_follow(struct tree *tree, enum tree_set set, const char *const *names, size_t n_names);

/* 0, or -ENOENT for a number that is nothing or belongs to a name that has vanished. */
int tree_get(const struct tree *tree, uint64_t ino, struct tree_node *ret_node);
/* 0, -ENOENT, or -ENOTDIR where `parent` is a file. */
int tree_lookup(const struct tree *tree, uint64_t parent, const char *name,
                struct tree_node *ret_node);
/* Calls `fn` for every node of a directory until it returns non-zero, which is returned;
 * -ENOENT, -ENOTDIR. */
typedef int (*tree_visit_fn)(void *userdata, const struct tree_node *node);
int tree_each(const struct tree *tree, uint64_t dir, tree_visit_fn fn, void *userdata);
/* Whether what the directory holds depends on the daemon. */
bool tree_follows(uint64_t dir);

#endif
