#include "daemon/config.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/config_table.h"
#include "lib/cleanup.h"

#define SYSTEM_MODELS_DIR "/var/lib/hearth/models"
#define SYSTEM_STATE_DIR  "/var/lib/hearth"

/* $VARIABLE/TAIL, else $HOME/HOME_TAIL/TAIL; only absolute directories count. Allocated, or NULL in
 * *ret_path where neither is set. */
static int user_dir(const char *variable, const char *home_tail, const char *tail, char **ret_path)
{
    const char *dir = getenv(variable), *home = getenv("HOME");
    int n;
    *ret_path = NULL;
    if (dir && dir[0] == '/')
        n = asprintf(ret_path, "%s/%s", dir, tail);
    else if (home && home[0] == '/')
        n = asprintf(ret_path, "%s/%s/%s", home, home_tail, tail);
    else
        return 0;
    return n < 0 ? -ENOMEM : 0;
}

static int default_models_dirs(struct config *config)
{
    _cleanup_free_ char *own = NULL;
    int r = config_list_insert(&config->models_dirs, SIZE_MAX, SYSTEM_MODELS_DIR);
    if (r == 0)
        r = user_dir("XDG_DATA_HOME", ".local/share", "hearth/models", &own);
    if (r == 0 && own)
        r = config_list_insert(&config->models_dirs, SIZE_MAX, own);
    return r;
}

/* systemd gives a service its directory (several, separated by colons, where it has several). */
static int default_state_dir(struct config *config)
{
    const char *given = getenv("STATE_DIRECTORY");
    int r = 0;
    if (given && given[0] == '/')
        config->state_dir = strndup(given, strcspn(given, ":"));
    else
        r = user_dir("XDG_STATE_HOME", ".local/state", "hearth", &config->state_dir);
    if (r == 0 && !config->state_dir)
        config->state_dir = strdup(SYSTEM_STATE_DIR);
    return config->state_dir ? r : -ENOMEM;
}

int config_new(struct config **ret_config)
{
    struct config *config = calloc(1, sizeof(*config));
    if (!config)
        return -ENOMEM;
    int r = config_defaults(config, false);
    if (r == 0)
        r = default_models_dirs(config);
    if (r == 0)
        r = default_state_dir(config);
    if (r < 0) {
        config_free(config);
        return r;
    }
    *ret_config = config;
    return 0;
}

struct config *config_free(struct config *config)
{
    if (!config)
        return NULL;
    for (size_t i = 0; i < config->n_models; i++) {
        config_clear(&config->models[i], true);
        free(config->models[i].name);
    }
    free(config->models);
    config_clear(config, false);
    free(config);
    return NULL;
}

int config_add_model(struct config *config, const char *name, struct config_model **ret_model)
{
    if (config_find_model(config, name))
        return -EEXIST;
    if (config->n_models >= CONFIG_MAX_MODELS)
        return -ENOSPC;
    struct config_model *bigger =
        realloc(config->models, (config->n_models + 1) * sizeof(*config->models));
    if (!bigger)
        return -ENOMEM;
    config->models = bigger;
    struct config_model *model = &bigger[config->n_models];
    *model = (struct config_model){.name = strdup(name)};
    if (!model->name)
        return -ENOMEM;
    config->n_models++; /* from here on config_free() knows it */
    int r = config_defaults(model, true);
    if (r < 0)
        return r;
    *ret_model = model;
    return 0;
}

const struct config_model *config_find_model(const struct config *config, const char *name)
{
    for (size_t i = 0; i < config->n_models; i++)
        if (strcmp(config->models[i].name, name) == 0)
            return &config->models[i];
    return NULL;
}

int config_add_models_dir(struct config *config, const char *path)
{
    if (!config->dirs_given) {
        config->models_dirs = config_list_free(config->models_dirs);
        config->dirs_given = true;
    }
    int r = config_list_insert(&config->models_dirs, config->n_flag_dirs, path);
    if (r == 0)
        config->n_flag_dirs++;
    return r;
}

int config_set_state_dir(struct config *config, const char *path)
{
    char *copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    free(config->state_dir);
    config->state_dir = copy;
    return 0;
}

/* ---- what belongs together ---- */

enum colour { WHITE, ON_PATH, DONE };

/* Walks `needs` from model i; a model met again on its own path closes a cycle, whose models *path
 * then names in their order. Depth is bounded by CONFIG_MAX_MODELS, since no model is entered
 * twice. A name without an entry is a leaf: it may be a file in a models directory. */
static bool find_cycle(const struct config *config, size_t i, unsigned char *colours, size_t *path,
                       size_t *n_path)
{
    if (colours[i] == ON_PATH)
        path[(*n_path)++] = i;
    if (colours[i] != WHITE)
        return colours[i] == ON_PATH;
    colours[i] = ON_PATH;
    path[(*n_path)++] = i;
    for (char **need = config->models[i].needs; need && *need; need++) {
        const struct config_model *next = config_find_model(config, *need);
        if (next && find_cycle(config, (size_t)(next - config->models), colours, path, n_path))
            return true;
    }
    (*n_path)--;
    colours[i] = DONE;
    return false;
}

/* "a needs b needs a", of the path's end from the model on that closes it; long ones are cut. */
static int refuse_cycle(const struct config *config, const size_t *path, size_t n_path,
                        struct fault *ret_fault)
{
    char chain[FAULT_TEXT_BYTES / 2] = "";
    size_t len = 0, i = 0;

    while (path[i] != path[n_path - 1])
        i++;
    for (size_t at = i; at < n_path && len < sizeof(chain); at++)
        len += (size_t)snprintf(chain + len, sizeof(chain) - len, "%s%.64s",
                                at == i ? "" : " needs ", config->models[path[at]].name);
    return fault_set(ret_fault, -EINVAL,
                     "models.%.64s.needs: expected no cycle, and %s; take one of them out",
                     config->models[path[i]].name, chain);
}

static int check_needs(const struct config *config, struct fault *ret_fault)
{
    _cleanup_free_ unsigned char *colours = calloc(config->n_models + 1, 1);
    _cleanup_free_ size_t *path = calloc(config->n_models + 1, sizeof(*path));
    size_t n_path = 0;
    if (!colours || !path)
        return -ENOMEM;
    for (size_t i = 0; i < config->n_models; i++)
        if (find_cycle(config, i, colours, path, &n_path))
            return refuse_cycle(config, path, n_path, ret_fault);
    return 0;
}

int config_check(const struct config *config, struct fault *ret_fault)
{
    if (config->batching.min_batch > config->batching.max_batch)
        return fault_set(ret_fault, -EINVAL,
                         "batching.min_batch: expected at most batching.max_batch (%" PRIu32
                         "), found %" PRIu32,
                         config->batching.max_batch, config->batching.min_batch);
    if (config->limits.input_bytes_per_uid < config->limits.frame)
        return fault_set(ret_fault, -EINVAL,
                         "limits.input_bytes_per_uid: expected at least limits.frame (%" PRIu64
                         " bytes), else no frame of that size could be taken; found %" PRIu64,
                         config->limits.frame, config->limits.input_bytes_per_uid);
    if (config->limits.input_bytes < config->limits.frame)
        return fault_set(ret_fault, -EINVAL,
                         "limits.input_bytes: expected at least limits.frame (%" PRIu64
                         " bytes), else no frame of that size could be taken; found %" PRIu64,
                         config->limits.frame, config->limits.input_bytes);
    return check_needs(config, ret_fault);
}

/* ---- memory ---- */

uint64_t config_size_of(struct config_size size, uint64_t whole)
{
    if (size.percent == 0)
        return size.bytes;
    return whole / 100 * size.percent + whole % 100 * size.percent / 100;
}

struct config_memory config_memory_of(const struct config *config, uint64_t machine_bytes)
{
    uint64_t budget_bytes = config_size_of(config->memory_budget, machine_bytes);
    uint64_t kv_bytes = config_size_of(config->engine.kv_budget, budget_bytes);

    return (struct config_memory){
        .machine_bytes = machine_bytes,
        .budget_bytes = budget_bytes,
        .kv_bytes = kv_bytes,
        .kv_per_uid_bytes = config_size_of(config->engine.kv_per_uid, kv_bytes),
        .models_bytes = budget_bytes > kv_bytes ? budget_bytes - kv_bytes : 0,
        .models_per_uid_bytes = config_size_of(config->limits.memory_per_uid, budget_bytes),
    };
}

/* A limit file's number; UINT64_MAX where there is none ("max", or no such file). */
static uint64_t limit_of(const char *path)
{
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "re");
    if (!file)
        return UINT64_MAX;
    if (fscanf(file, "%" SCNu64, &value) != 1)
        value = UINT64_MAX;
    fclose(file);
    return value;
}

/* The least limit of the group at `group` (cut in place) and of all above it. */
static uint64_t least_limit(const char *mount, char *group, const char *leaf)
{
    uint64_t least = UINT64_MAX;
    for (;;) {
        char path[1024];
        int n = snprintf(path, sizeof(path), "%s%s/%s", mount, group, leaf);
        if (n > 0 && (size_t)n < sizeof(path))
            least = MIN(least, limit_of(path));
        char *slash = strrchr(group, '/');
        if (!slash)
            return least;
        *slash = '\0';
    }
}

/* Lines are "0::/path" (v2) or "N:controllers:/path" (v1). */
static uint64_t cgroup_limit(void)
{
    char line[1024];
    uint64_t least = UINT64_MAX;
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file)
        return least;
    while (fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        uint64_t limit = UINT64_MAX;
        if (controllers[1] == '\0')
            limit = least_limit("/sys/fs/cgroup", group, "memory.max");
        else if (strcmp(controllers + 1, "memory") == 0)
            limit = least_limit("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes");
        least = MIN(least, limit);
    }
    fclose(file);
    return least;
}

uint64_t config_machine_memory(void)
{
    uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    return MIN(ram, cgroup_limit());
}
