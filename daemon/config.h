/* Configuration: everything an administrator can set, with defaults and bounds.
 *
 * One table (config_table.c) gives each key its place, kind, default, bounds and sentence; the YAML
 * parser (config_yaml.c), `hearthd --check`, the error for an unknown key (with the nearest known
 * one) and docs/configuration.md come from it.
 *
 * Hides: libyaml, units, key names. Thread: read-only after loading. */
#ifndef HEARTH_DAEMON_CONFIG_H
#define HEARTH_DAEMON_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "lib/fault.h"

enum config_preload { PRELOAD_LAZY, PRELOAD_EAGER, PRELOAD_NONE };
enum config_prediction { PREDICTION_ON, PREDICTION_OFF, PREDICTION_DRY_RUN };
enum config_kv { KV_F16, KV_F32 };
enum config_sharing { SHARING_UID, SHARING_ALL };

/* A size in bytes, or a share of something known later. */
struct config_size {
    uint64_t bytes;   /* when percent is 0 */
    uint32_t percent; /* 1..100 */
};

struct config_model {
    char *name;
    char *path; /* NULL: NAME.gguf in the models directories */
    enum config_preload preload;
    int32_t priority;
    bool pinned;
    uint64_t keep_alive_us; /* 0: none */
    uint32_t context;       /* tokens; 0: the model's own */
    char **needs;           /* NULL-terminated */
};

/* Bounds on what a file may hold. */
#define CONFIG_FILE_BYTES  ((size_t)1 << 20)
#define CONFIG_VALUE_BYTES 4096u
#define CONFIG_MAX_LIST    64u
#define CONFIG_MAX_MODELS  1024u

struct config {
    char *default_model;
    char **models_dirs; /* NULL-terminated; the first that has a name wins */
    size_t n_flag_dirs; /* how many of them came from config_add_models_dir() */
    bool dirs_given;    /* false: the rest of them are the defaults */
    char *state_dir;
    struct config_size memory_budget; /* of RAM or the cgroup's limit */
    uint64_t idle_exit_us, drain_timeout_us;
    char **admin_users, **admin_groups;
    struct {
        uint32_t connections, connections_per_uid;
        uint32_t queue, queue_per_uid;
        uint64_t frame, stream_buffer;
        uint64_t input_bytes, input_bytes_per_uid;
        uint32_t holds_per_uid;
        struct config_size memory_per_uid; /* of memory_budget */
    } limits;
    struct {
        bool enabled;
        uint32_t max_batch, min_batch;
        uint64_t max_delay_us;
        uint64_t adaptive_us; /* target latency; 0: off */
        bool preserve_order;
    } batching;
    struct {
        bool enabled;
        uint64_t credit;
        uint64_t park_timeout_us;
    } streaming;
    struct {
        bool async;
        uint32_t max_concurrent, per_uid;
        uint64_t timeout_us;
        uint32_t retries;
        enum config_prediction prediction;
    } loading;
    struct {
        uint32_t threads; /* 0: the CPUs allowed */
        enum config_kv kv;
        struct config_size kv_budget;  /* of memory_budget */
        struct config_size kv_per_uid; /* of kv_budget */
        uint64_t chunk_target_us;
        bool prefix_cache;
        enum config_sharing prefix_sharing;
    } engine;
    struct config_model *models;
    size_t n_models;
};

/* The defaults (state_dir and models_dirs from the environment). */
int config_new(struct config **ret_config);
struct config *config_free(struct config *config);
/* Reads a YAML file into it. Errors: "FILE:LINE: KEY: expected ...". -EINVAL for what is in the
 * file, -EFBIG beyond CONFIG_FILE_BYTES, else the errno of opening or reading it, -ENOMEM. After a
 * failure some keys are read and some are not: the configuration is good for config_free() alone.
 */
int config_load(struct config *config, const char *path, struct fault *ret_fault);
/* Checks what belongs together (cycles of `needs`, min_batch <= max_batch). */
int config_check(const struct config *config, struct fault *ret_fault);
/* Puts a directory behind those given so far by this function and before the file's: the flags
 * --models, in their order, after config_load(). The first call drops the defaults. */
int config_add_models_dir(struct config *config, const char *path);
int config_set_state_dir(struct config *config, const char *path);
const struct config_model *config_find_model(const struct config *config, const char *name);
/* A share resolved against `whole`. */
uint64_t config_size_of(struct config_size size, uint64_t whole);
/* RAM or the cgroup's limit, whichever is less, bytes. */
uint64_t config_machine_memory(void);

/* What the configuration's sizes come to on this machine; worked out once, at the start. */
struct config_memory {
    uint64_t machine_bytes;
    uint64_t budget_bytes; /* memory_budget */
    uint64_t kv_bytes;     /* of it, for keys and values */
    uint64_t kv_per_uid_bytes;
    uint64_t models_bytes;         /* of it, for models */
    uint64_t models_per_uid_bytes; /* limits.memory_per_uid */
};
struct config_memory config_memory_of(const struct config *config, uint64_t machine_bytes);

/* The reference table as Markdown: docs/configuration.md is this text (hearthd --print-keys). */
void config_print_keys(FILE *out);

#endif
