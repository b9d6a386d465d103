#include "fs/tree.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "lib/cleanup.h"
#include "lib/hash.h"
#include "lib/hearth.h"

/* Numbers below 64 are rows of `fixed`; above, a name's id and six bits that say which file of it.
 */
#define FILE_BITS 6u
#define FILE_MASK ((1u << FILE_BITS) - 1u)

#define DIR_MODE      (S_IFDIR | 0555)
#define VALUE_MODE    (S_IFREG | 0444)
#define WRITABLE_MODE (S_IFREG | 0664)
#define HOLD_MODE     (S_IFREG | 0660)
#define WAITING_MODE  (S_IFREG | 0440)

enum {
    INO_ROOT = TREE_ROOT,
    INO_README,
    INO_VERSION,
    INO_STATUS,
    INO_MODELS,
    INO_METRICS,
    INO_PROMETHEUS,
    INO_POOL_DIR,
    INO_POOL,
    INO_BATCHER_DIR,
    INO_BATCHER,
    INO_STREAMING_DIR,
    INO_STREAMING,
    INO_LOADER_DIR,
    INO_LOADER,
    INO_EVENTS,
    _INO_FIXED_MAX,
};

struct row {
    uint64_t parent;
    const char *name;
    enum tree_what what;
    mode_t mode;
};

static const struct row fixed[_INO_FIXED_MAX] = {
    [INO_ROOT] = {INO_ROOT, "", TREE_DIR, DIR_MODE},
    [INO_README] = {INO_ROOT, "README", TREE_README, VALUE_MODE},
    [INO_VERSION] = {INO_ROOT, "version", TREE_VERSION, VALUE_MODE},
    [INO_STATUS] = {INO_ROOT, "status", TREE_STATUS, VALUE_MODE},
    [INO_MODELS] = {INO_ROOT, "models", TREE_DIR, DIR_MODE},
    [INO_METRICS] = {INO_ROOT, "metrics", TREE_DIR, DIR_MODE},
    [INO_PROMETHEUS] = {INO_METRICS, "hearth.prom", TREE_PROMETHEUS, VALUE_MODE},
    [INO_POOL_DIR] = {INO_ROOT, "pool", TREE_DIR, DIR_MODE},
    [INO_POOL] = {INO_POOL_DIR, "stats", TREE_POOL, VALUE_MODE},
    [INO_BATCHER_DIR] = {INO_ROOT, "batcher", TREE_DIR, DIR_MODE},
    [INO_BATCHER] = {INO_BATCHER_DIR, "stats", TREE_BATCHER, VALUE_MODE},
    [INO_STREAMING_DIR] = {INO_ROOT, "streaming", TREE_DIR, DIR_MODE},
    [INO_STREAMING] = {INO_STREAMING_DIR, "stats", TREE_STREAMING, VALUE_MODE},
    [INO_LOADER_DIR] = {INO_ROOT, "loader", TREE_DIR, DIR_MODE},
    [INO_LOADER] = {INO_LOADER_DIR, "stats", TREE_LOADER, VALUE_MODE},
    [INO_EVENTS] = {INO_ROOT, "events", TREE_EVENTS, WAITING_MODE},
};
static_assert(_INO_FIXED_MAX <= (1u << FILE_BITS), "fixed numbers end where ids begin");

/* The files of a model; their number is the place here, from 1 on (0 is the directory). */
static const struct {
    const char *name;
    enum tree_what what;
    mode_t mode;
} model_files[] = {
    {"state", TREE_STATE, VALUE_MODE},
    {"progress", TREE_PROGRESS, VALUE_MODE},
    {"preload", TREE_PRELOAD, WRITABLE_MODE},
    {"pinned", TREE_PINNED, WRITABLE_MODE},
    {"keep_alive", TREE_KEEP_ALIVE, WRITABLE_MODE},
    {"hold", TREE_HOLD, HOLD_MODE},
    {"wait", TREE_WAIT, WAITING_MODE},
    {"error", TREE_ERROR, VALUE_MODE},
    {"info", TREE_INFO, VALUE_MODE},
    {"memory", TREE_MEMORY, VALUE_MODE},
    {"stats", TREE_STATS, VALUE_MODE},
};
static_assert(ELEMENTSOF(model_files) <= FILE_MASK, "a file's number fits its bits");

struct name {
    uint64_t id;
    uint64_t seen; /* the tree_follow() that named it last */
    enum tree_set set;
    char text[TREE_NAME_MAX + 1];
    UT_hash_handle by_text;
    UT_hash_handle by_id;
};

struct tree {
    struct name *ids;                  /* by id, of both sets */
    struct name *names[_TREE_SET_MAX]; /* by text, in the order they first came */
    uint64_t follows[_TREE_SET_MAX];   /* calls of tree_follow(): `seen` of the names there now */
    uint64_t last_id;
};

static const uint64_t set_dir[_TREE_SET_MAX] = {
    [TREE_MODELS] = INO_MODELS,
    [TREE_METRICS] = INO_METRICS,
};

int tree_new(struct tree **ret_tree)
{
    struct tree *tree = calloc(1, sizeof(*tree));

    if (!tree)
        return -ENOMEM;
    *ret_tree = tree;
    return 0;
}

static void name_forget(struct tree *tree, struct name *name)
{
    HASH_DELETE(by_text, tree->names[name->set], name);
    HASH_DELETE(by_id, tree->ids, name);
    free(name);
}

struct tree *tree_free(struct tree *tree)
{
    if (!tree)
        return NULL;
    for (int set = 0; set < _TREE_SET_MAX; set++) {
        struct name *name, *next;
        HASH_ITER (by_text, tree->names[set], name, next)
            name_forget(tree, name);
    }
    free(tree);
    return NULL;
}

/* A name that is remembered from now on; NULL without memory. */
static struct name *name_add(struct tree *tree, enum tree_set set, const char *text, size_t len)
{
    struct name *name = calloc(1, sizeof(*name));

    if (!name)
        return NULL;
    name->id = ++tree->last_id;
    name->set = set;
    memcpy(name->text, text, len);
    HASH_ADD_KEYPTR(by_text, tree->names[set], name->text, len, name);
    if (!hash_added(&name->by_text)) {
        free(name);
        return NULL;
    }
    HASH_ADD(by_id, tree->ids, id, sizeof(name->id), name);
    if (!hash_added(&name->by_id)) {
        HASH_DELETE(by_text, tree->names[set], name);
        free(name);
        return NULL;
    }
    return name;
}

static bool name_is_there(const struct tree *tree, const struct name *name)
{
    return name->seen == tree->follows[name->set];
}

/* Makes room for one more name: false when every remembered name is there now. */
static bool make_room(struct tree *tree, enum tree_set set)
{
    struct name *name, *next;

    if (HASH_CNT(by_text, tree->names[set]) < TREE_NAMES_MAX)
        return true;
    HASH_ITER (by_text, tree->names[set], name, next)
        if (!name_is_there(tree, name))
            name_forget(tree, name);
    return HASH_CNT(by_text, tree->names[set]) < TREE_NAMES_MAX;
}

int tree_follow(struct tree *tree, enum tree_set set, const char *const *names, size_t n_names)
{
    uint64_t now = ++tree->follows[set];

    for (size_t i = 0; i < n_names; i++) {
        struct name *name;
        size_t len = strlen(names[i]);

        if (!hearth_model_name_valid(names[i]))
            continue;
        HASH_FIND(by_text, tree->names[set], names[i], len, name);
        if (!name) {
            if (!make_room(tree, set))
                continue;
            name = name_add(tree, set, names[i], len);
            if (!name)
                return -ENOMEM;
        }
        name->seen = now;
    }
    return 0;
}

static void node_fixed(uint64_t ino, struct tree_node *ret_node)
{
    const struct row *row = &fixed[ino];

    *ret_node = (struct tree_node){
        .ino = ino,
        .parent = row->parent,
        .what = row->what,
        .mode = row->mode,
        .name = row->name,
    };
}

/* File number `file` of a name: 0 is what the name itself is. */
static int node_named(const struct name *name, size_t file, struct tree_node *ret_node)
{
    uint64_t top = name->id << FILE_BITS;

    if (file == 0) {
        bool model = name->set == TREE_MODELS;
        *ret_node = (struct tree_node){
            .ino = top,
            .parent = set_dir[name->set],
            .what = model ? TREE_DIR : TREE_METRIC,
            .mode = model ? DIR_MODE : VALUE_MODE,
            .name = name->text,
            .subject = name->text,
        };
        return 0;
    }
    if (name->set != TREE_MODELS || file > ELEMENTSOF(model_files))
        return -ENOENT;
    *ret_node = (struct tree_node){
        .ino = top | file,
        .parent = top,
        .what = model_files[file - 1].what,
        .mode = model_files[file - 1].mode,
        .name = model_files[file - 1].name,
        .subject = name->text,
    };
    return 0;
}

static const struct name *name_of(const struct tree *tree, uint64_t ino)
{
    struct name *name;
    uint64_t id = ino >> FILE_BITS;

    HASH_FIND(by_id, tree->ids, &id, sizeof(id), name);
    return name && name_is_there(tree, name) ? name : NULL;
}

int tree_get(const struct tree *tree, uint64_t ino, struct tree_node *ret_node)
{
    const struct name *name;

    if (ino <= FILE_MASK) {
        if (ino < INO_ROOT || ino >= _INO_FIXED_MAX)
            return -ENOENT;
        node_fixed(ino, ret_node);
        return 0;
    }
    name = name_of(tree, ino);
    return name ? node_named(name, ino & FILE_MASK, ret_node) : -ENOENT;
}

/* tree_each() reads one directory in three parts: rows of the table, the names it follows, a
 * model's files. Each directory has something in at most two of them. */
static int each_fixed(uint64_t dir, tree_visit_fn fn, void *userdata)
{
    for (uint64_t ino = INO_ROOT + 1; ino < _INO_FIXED_MAX; ino++) {
        struct tree_node node;
        int r;

        if (fixed[ino].parent != dir)
            continue;
        node_fixed(ino, &node);
        r = fn(userdata, &node);
        if (r)
            return r;
    }
    return 0;
}

static int each_name(const struct tree *tree, enum tree_set set, tree_visit_fn fn, void *userdata)
{
    for (const struct name *name = tree->names[set]; name; name = name->by_text.next) {
        struct tree_node node;
        int r;

        if (!name_is_there(tree, name))
            continue;
        r = node_named(name, 0, &node);
        if (!r)
            r = fn(userdata, &node);
        if (r)
            return r;
    }
    return 0;
}

static int each_file(const struct name *name, tree_visit_fn fn, void *userdata)
{
    for (size_t file = 1; file <= ELEMENTSOF(model_files); file++) {
        struct tree_node node;
        int r = node_named(name, file, &node);

        if (!r)
            r = fn(userdata, &node);
        if (r)
            return r;
    }
    return 0;
}

int tree_each(const struct tree *tree, uint64_t dir, tree_visit_fn fn, void *userdata)
{
    struct tree_node node;
    int r = tree_get(tree, dir, &node);

    if (r < 0)
        return r;
    if (!S_ISDIR(node.mode))
        return -ENOTDIR;
    if (node.subject) {
        const struct name *name = name_of(tree, dir);
        return name ? each_file(name, fn, userdata) : -ENOENT;
    }
    r = each_fixed(dir, fn, userdata);
    for (int set = 0; !r && set < _TREE_SET_MAX; set++)
        if (set_dir[set] == dir)
            r = each_name(tree, set, fn, userdata);
    return r;
}

struct wanted {
    const char *name;
    struct tree_node *ret_node;
};

static int match(void *userdata, const struct tree_node *node)
{
    struct wanted *wanted = userdata;

    if (strcmp(node->name, wanted->name) != 0)
        return 0;
    *wanted->ret_node = *node;
    return 1;
}

int tree_lookup(const struct tree *tree, uint64_t parent, const char *name,
                struct tree_node *ret_node)
{
    struct wanted wanted = {name, ret_node};
    int r;

    for (int set = 0; set < _TREE_SET_MAX; set++) {
        struct name *found;

        if (set_dir[set] != parent)
            continue;
        HASH_FIND(by_text, tree->names[set], name, strlen(name), found);
        if (found && name_is_there(tree, found))
            return node_named(found, 0, ret_node);
        r = each_fixed(parent, match, &wanted);
        return r > 0 ? 0 : -ENOENT;
    }
    r = tree_each(tree, parent, match, &wanted);
    if (r < 0)
        return r;
    return r > 0 ? 0 : -ENOENT;
}

bool tree_follows(uint64_t dir)
{
    for (int set = 0; set < _TREE_SET_MAX; set++)
        if (set_dir[set] == dir)
            return true;
    return false;
}
