#include "daemon/config_table.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "lib/cleanup.h"
#include "lib/wire.h"

#define US   UINT64_C(1)
#define MS   (1000 * US)
#define S    (1000 * MS)
#define HOUR (3600 * S)
#define DAY  (24 * HOUR)
#define KIB  UINT64_C(1024)
#define MIB  (1024 * KIB)
#define GIB  (1024 * MIB)
#define TIB  (1024 * GIB)

static const char *const words_preload[] = {"lazy", "eager", "none", NULL};
static const char *const words_prediction[] = {"on", "off", "dry-run", NULL};
static const char *const words_kv[] = {"f16", "f32", NULL};
static const char *const words_sharing[] = {"uid", "all", NULL};

/* A choice is stored through an int. */
static_assert(sizeof(enum config_preload) == sizeof(int), "enum size");
static_assert(sizeof(enum config_prediction) == sizeof(int), "enum size");
static_assert(sizeof(enum config_kv) == sizeof(int), "enum size");
static_assert(sizeof(enum config_sharing) == sizeof(int), "enum size");

#define AT(field)       .offset = offsetof(struct config, field)
#define MODEL_AT(field) .offset = offsetof(struct config_model, field)
#define MODEL(key)      CONFIG_MODEL_PREFIX "." key

/* clang-format off: a row a key */
const struct config_key config_keys[] = {
    {"default_model", KIND_NAME, AT(default_model), .text = "ember",
     .sentence = "The model of requests that name none."},
    {"models_dirs", KIND_PATHS, AT(models_dirs),
     .text_words = "/var/lib/hearth/models, then $XDG_DATA_HOME/hearth/models "
                   "(~/.local/share/hearth/models)",
     .sentence = "Where model files are looked for; the first directory that has a name wins. "
                 "The flag --models goes before them."},
    {"state_dir", KIND_PATH, AT(state_dir),
     .text_words = "$STATE_DIRECTORY, else $XDG_STATE_HOME/hearth (~/.local/state/hearth)",
     .sentence = "What the daemon remembers. The flag --state-dir goes before it."},
    {"memory_budget", KIND_SHARE, AT(memory_budget), .min = 16 * MIB, .max = 64 * TIB,
     .text = "60%",
     .sentence = "Memory for weights, scratch and KV together; a share is one of RAM, or of the "
                 "cgroup's limit where that is less."},
    {"idle_exit", KIND_DURATION, AT(idle_exit_us), .max = 365 * DAY, .text = "300s",
     .sentence =
         "How long a daemon on an activated socket stays with nothing to do; 0s: for ever."},
    {"drain_timeout", KIND_DURATION, AT(drain_timeout_us), .max = HOUR, .text = "10s",
     .sentence = "How long running requests may go on after SIGTERM, or while their model unloads, "
                 "before they end with `shutting-down`."},

    {"admin.users", KIND_ACCOUNTS, AT(admin_users),
     .sentence = "Users, by name or uid, who may do what root may: unload any model, pin, set "
                 "keep_alive, reload."},
    {"admin.groups", KIND_ACCOUNTS, AT(admin_groups), .sentence = "Groups of such users."},

    {"limits.connections", KIND_COUNT, AT(limits.connections), .min = 1, .max = 1000000,
     .text = "4096", .sentence = "Connections open at once."},
    {"limits.connections_per_uid", KIND_COUNT, AT(limits.connections_per_uid), .min = 1,
     .max = 1000000, .text = "1024", .sentence = "Connections of one uid open at once."},
    {"limits.queue", KIND_COUNT, AT(limits.queue), .min = 1, .max = 1000000, .text = "8192",
     .sentence = "Requests admitted and not yet ended; above it new ones get `busy`."},
    {"limits.queue_per_uid", KIND_COUNT, AT(limits.queue_per_uid), .min = 1, .max = 1000000,
     .text = "4096", .sentence = "The same for one uid."},
    {"limits.frame", KIND_SIZE, AT(limits.frame), .min = 4 * KIB, .max = 64 * MIB, .text = "1MiB",
     .sentence = "Largest body of a frame that is taken."},
    {"limits.stream_buffer", KIND_SIZE, AT(limits.stream_buffer), .min = 4 * KIB, .max = 16 * MIB,
     .text = "64KiB",
     .sentence = "Text of a stream, and unsent replies of a connection, kept for a "
                 "reader that does not read."},
    {"limits.input_bytes", KIND_SIZE, AT(limits.input_bytes), .min = 64 * KIB, .max = 64 * GIB,
     .text = "64MiB",
     .sentence = "Partial frames, and the prompts and texts of live requests; above "
                 "it `busy`, and no further reading."},
    {"limits.input_bytes_per_uid", KIND_SIZE, AT(limits.input_bytes_per_uid), .min = 64 * KIB,
     .max = 64 * GIB, .text = "16MiB", .sentence = "The same for one uid."},
    {"limits.holds_per_uid", KIND_COUNT, AT(limits.holds_per_uid), .max = 65536, .text = "64",
     .sentence = "Holds of one uid at once."},
    {"limits.memory_per_uid", KIND_SHARE, AT(limits.memory_per_uid), .max = 64 * TIB, .text = "50%",
     .sentence = "Models kept by one uid's holds or own files alone; a share is one of "
                 "memory_budget."},

    {"batching.enabled", KIND_FLAG, AT(batching.enabled), .text = "yes",
     .sentence = "Whether sequences share engine steps; `no` takes them one at a time."},
    {"batching.max_batch", KIND_COUNT, AT(batching.max_batch), .min = 1, .max = 512, .text = "200",
     .sentence = "Most sequences in one step."},
    {"batching.min_batch", KIND_COUNT, AT(batching.min_batch), .min = 1, .max = 512, .text = "1",
     .sentence = "With max_delay: a step waits until this many are ready."},
    {"batching.max_delay", KIND_DURATION, AT(batching.max_delay_us), .max = S, .text = "0us",
     .sentence = "Longest that an idle engine waits for more to join; 0us: it never waits."},
    {"batching.adaptive", KIND_DURATION, AT(batching.adaptive_us), .max = 60 * S, .zero = "off",
     .text = "off",
     .sentence = "Time of a step to aim at: the tokens of prompts and the sequences in it are "
                 "steered to that, within max_batch and engine.chunk_target."},
    {"batching.preserve_order", KIND_FLAG, AT(batching.preserve_order), .text = "no",
     .sentence = "Whether a connection's answers complete in the order of its requests."},

    {"streaming.enabled", KIND_FLAG, AT(streaming.enabled), .text = "yes",
     .sentence = "Whether text is sent as it comes; `no` sends it at the end."},
    {"streaming.credit", KIND_SIZE, AT(streaming.credit), .min = 256, .max = 16 * MIB,
     .text = "64KiB", .sentence = "Bytes of text a reader takes at first without saying so."},
    {"streaming.park_timeout", KIND_DURATION, AT(streaming.park_timeout_us), .max = DAY,
     .text = "30s",
     .sentence = "After this long without credit a stream no longer counts as use of "
                 "its model."},

    {"loading.async", KIND_FLAG, AT(loading.async), .text = "yes",
     .sentence = "Whether models load beside running requests; `no` loads one at a time."},
    {"loading.max_concurrent", KIND_COUNT, AT(loading.max_concurrent), .min = 1, .max = 16,
     .text = "3", .sentence = "Loads at once."},
    {"loading.per_uid", KIND_COUNT, AT(loading.per_uid), .min = 1, .max = 16, .text = "2",
     .sentence = "Loads at once that one uid alone waits for."},
    {"loading.timeout", KIND_DURATION, AT(loading.timeout_us), .min = S, .max = DAY, .text = "120s",
     .sentence = "A load without progress for this long has failed."},
    {"loading.retries", KIND_COUNT, AT(loading.retries), .max = 100, .text = "3",
     .sentence = "How often a load that met an I/O error is tried again."},
    {"loading.prediction", KIND_CHOICE, AT(loading.prediction), .words = words_prediction,
     .text = "on",
     .sentence = "Whether models are loaded ahead from what was used before; `dry-run` "
                 "counts and loads nothing."},

    {"engine.threads", KIND_COUNT, AT(engine.threads), .min = 1, .max = 256, .zero = "auto",
     .text = "auto", .text_words = "auto: the CPUs allowed",
     .sentence = "Threads that compute; never more than the CPUs allowed."},
    {"engine.kv", KIND_CHOICE, AT(engine.kv), .words = words_kv, .text = "f16",
     .sentence = "Precision of stored keys and values; f32 is for reference runs."},
    {"engine.kv_budget", KIND_SHARE, AT(engine.kv_budget), .min = 2 * MIB, .max = 64 * TIB,
     .text = "25%", .sentence = "Memory for keys and values; a share is one of memory_budget."},
    {"engine.kv_per_uid", KIND_SHARE, AT(engine.kv_per_uid), .min = 2 * MIB, .max = 64 * TIB,
     .text = "50%",
     .sentence = "What one uid may hold of it while another waits; a share is one of "
                 "kv_budget."},
    {"engine.chunk_target", KIND_DURATION, AT(engine.chunk_target_us), .min = MS, .max = 10 * S,
     .text = "20ms", .sentence = "Time that one step may spend on a prompt."},
    {"engine.prefix_cache", KIND_FLAG, AT(engine.prefix_cache), .text = "yes",
     .sentence = "Whether a prompt's beginning, once computed, is used again."},
    {"engine.prefix_sharing", KIND_CHOICE, AT(engine.prefix_sharing), .words = words_sharing,
     .text = "uid", .sentence = "With whom: requests of the same uid, or all."},

    {MODEL("path"), KIND_PATH, MODEL_AT(path), .text_words = "NAME.gguf in models_dirs",
     .sentence = "The model's file."},
    {MODEL("preload"), KIND_CHOICE, MODEL_AT(preload), .words = words_preload, .text = "lazy",
     .sentence = "When it is loaded: at the first request, at the daemon's start, or (none) at the "
                 "first request and never by prediction."},
    {MODEL("priority"), KIND_RANK, MODEL_AT(priority), .max = 100, .text = "0",
     .sentence = "Of two loads that wait the higher goes first."},
    {MODEL("pinned"), KIND_FLAG, MODEL_AT(pinned), .text = "no",
     .sentence = "Whether it is never evicted."},
    {MODEL("keep_alive"), KIND_DURATION, MODEL_AT(keep_alive_us), .max = 365 * DAY, .zero = "off",
     .text = "off",
     .sentence = "Unloaded this long after its last use; off: it stays until memory "
                 "is wanted."},
    {MODEL("context"), KIND_COUNT, MODEL_AT(context), .min = 16, .max = 16777216, .zero = "auto",
     .text = "auto", .text_words = "auto: the model's own, or what the KV budget gives",
     .sentence = "Most tokens of prompt and answer together."},
    {MODEL("needs"), KIND_NAMES, MODEL_AT(needs), .sentence = "Models that are loaded before it."},
};
/* clang-format on */
const size_t n_config_keys = ELEMENTSOF(config_keys);

static bool key_of_model(const struct config_key *key)
{
    return strncmp(key->path, CONFIG_MODEL_PREFIX ".", sizeof(CONFIG_MODEL_PREFIX)) == 0;
}

const struct config_key *config_key_find(const char *path)
{
    for (size_t i = 0; i < n_config_keys; i++)
        if (strcmp(config_keys[i].path, path) == 0)
            return &config_keys[i];
    return NULL;
}

bool config_section_known(const char *path)
{
    size_t len = strlen(path);
    for (size_t i = 0; i < n_config_keys; i++)
        if (strncmp(config_keys[i].path, path, len) == 0 && config_keys[i].path[len] == '.')
            return true;
    return false;
}

/* ---- the nearest known key ---- */

/* Fewer of a word's bytes are no beginning to guess from. */
#define BEGUN_BYTES 4u

#define NEAREST_BYTES 64 /* of a path that is compared; what is beyond counts as different */

/* Edits (insert, delete, replace, swap neighbours) that lead from a to b. */
static size_t edits(const char *a, const char *b)
{
    size_t na = MIN(strlen(a), (size_t)NEAREST_BYTES), nb = MIN(strlen(b), (size_t)NEAREST_BYTES);
    size_t rows[3][NEAREST_BYTES + 1];
    size_t *two_back = rows[0], *back = rows[1], *row = rows[2];
    for (size_t j = 0; j <= nb; j++)
        back[j] = j;
    for (size_t i = 1; i <= na; i++) {
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = MIN(back[j], row[j - 1]) + 1;
            best = MIN(best, back[j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                best = MIN(best, two_back[j - 2] + 1);
            row[j] = best;
        }
        size_t *spare = two_back;
        two_back = back;
        back = row;
        row = spare;
    }
    return back[nb];
}

static const char *last_part(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot ? dot + 1 : path;
}

/* A known word that was begun and not finished is one edit away. */
static size_t word_distance(const char *word, const char *known)
{
    size_t len = strlen(word);

    return len >= BEGUN_BYTES && strncmp(word, known, len) == 0 ? known[len] != 0
                                                                : edits(word, known);
}

/* The right word in the wrong section is one edit away. */
static size_t path_distance(const char *path, const char *known)
{
    return MIN(word_distance(path, known), word_distance(last_part(path), last_part(known)) + 1);
}

const char *config_key_nearest(const char *path)
{
    static const char *const sections[] = {"admin",   "limits", "batching", "streaming",
                                           "loading", "engine", "models"};
    const char *best = NULL;
    size_t best_distance = SIZE_MAX;
    for (size_t i = 0; i < n_config_keys + ELEMENTSOF(sections); i++) {
        const char *known = i < n_config_keys ? config_keys[i].path : sections[i - n_config_keys];
        size_t distance = path_distance(path, known);
        if (distance < best_distance) {
            best = known;
            best_distance = distance;
        }
    }
    return best;
}

/* ---- lists ---- */

static size_t list_length(char *const *list)
{
    size_t n = 0;
    while (list && list[n])
        n++;
    return n;
}

int config_list_insert(char ***list, size_t at, const char *text)
{
    size_t n = list_length(*list);
    if (n >= CONFIG_MAX_LIST)
        return -ENOSPC;
    char *copy = strdup(text);
    if (!copy)
        return -ENOMEM;
    char **bigger = realloc(*list, (n + 2) * sizeof(*bigger));
    if (!bigger) {
        free(copy);
        return -ENOMEM;
    }
    at = MIN(at, n);
    memmove(bigger + at + 1, bigger + at, (n - at) * sizeof(*bigger));
    bigger[at] = copy;
    bigger[n + 1] = NULL;
    *list = bigger;
    return 0;
}

char **config_list_free(char **list)
{
    for (size_t i = 0; list && list[i]; i++)
        free(list[i]);
    free(list);
    return NULL;
}

bool config_key_is_list(const struct config_key *key)
{
    return key->kind == KIND_PATHS || key->kind == KIND_NAMES || key->kind == KIND_ACCOUNTS;
}

/* ---- values ---- */

struct unit {
    const char *name;
    uint64_t factor;
};

static const struct unit duration_units[] = {
    {"h", HOUR}, {"min", 60 * S}, {"s", S}, {"ms", MS}, {"us", US},
};
static const struct unit size_units[] = {
    {"TiB", TIB}, {"GiB", GIB}, {"MiB", MIB}, {"KiB", KIB}, {"B", 1},
};
static_assert(ELEMENTSOF(duration_units) == ELEMENTSOF(size_units), "one loop reads both");

static const struct unit *units_of(const struct config_key *key)
{
    return key->kind == KIND_DURATION ? duration_units : size_units;
}

/* Digits alone, up to `*ret_end`; strtoull would take blanks and signs. */
static int read_digits(const char *text, uint64_t *ret_value, const char **ret_end)
{
    uint64_t value = 0;
    const char *p = text;
    for (; *p >= '0' && *p <= '9'; p++)
        if (__builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*p - '0'), &value))
            return -EINVAL;
    if (p == text)
        return -EINVAL;
    *ret_value = value;
    *ret_end = p;
    return 0;
}

static int read_with_unit(const struct unit *units, const char *text, uint64_t *ret_value)
{
    uint64_t n;
    const char *end;
    if (read_digits(text, &n, &end) < 0)
        return -EINVAL;
    for (size_t i = 0; i < ELEMENTSOF(size_units); i++)
        if (strcmp(end, units[i].name) == 0)
            return __builtin_mul_overflow(n, units[i].factor, ret_value) ? -EINVAL : 0;
    return -EINVAL;
}

static bool within(const struct config_key *key, uint64_t value)
{
    return value >= key->min && value <= key->max;
}

static int read_quantity(const struct config_key *key, void *field, const char *text)
{
    uint64_t value;
    if (key->zero && strcmp(text, key->zero) == 0)
        value = 0;
    else if (read_with_unit(units_of(key), text, &value) < 0 || !within(key, value))
        return -EINVAL;
    *(uint64_t *)field = value;
    return 0;
}

static int read_share(const struct config_key *key, struct config_size *field, const char *text)
{
    uint64_t value;
    const char *end;
    if (read_digits(text, &value, &end) == 0 && strcmp(end, "%") == 0) {
        if (value < 1 || value > 100)
            return -EINVAL;
        *field = (struct config_size){.percent = (uint32_t)value};
        return 0;
    }
    if (read_with_unit(size_units, text, &value) < 0 || !within(key, value))
        return -EINVAL;
    *field = (struct config_size){.bytes = value};
    return 0;
}

static int read_count(const struct config_key *key, uint32_t *field, const char *text)
{
    uint64_t value;
    const char *end;
    if (key->zero && strcmp(text, key->zero) == 0)
        value = 0;
    else if (read_digits(text, &value, &end) < 0 || *end || !within(key, value))
        return -EINVAL;
    *field = (uint32_t)value;
    return 0;
}

static int read_rank(const struct config_key *key, int32_t *field, const char *text)
{
    uint64_t value;
    const char *end;
    bool negative = *text == '-';
    if (read_digits(text + negative, &value, &end) < 0 || *end || value > key->max)
        return -EINVAL;
    *field = negative ? -(int32_t)value : (int32_t)value;
    return 0;
}

static int read_flag(bool *field, const char *text)
{
    static const char *const words[] = {"no", "yes", "false", "true", "off", "on"};
    for (size_t i = 0; i < ELEMENTSOF(words); i++)
        if (strcasecmp(text, words[i]) == 0) {
            *field = i % 2 == 1;
            return 0;
        }
    return -EINVAL;
}

static int read_choice(const struct config_key *key, int *field, const char *text)
{
    for (int i = 0; key->words[i]; i++)
        if (strcmp(text, key->words[i]) == 0) {
            *field = i;
            return 0;
        }
    return -EINVAL;
}

bool config_name_valid(const char *name)
{
    static const char inner[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t len = strlen(name);
    return len >= 1 && len <= WIRE_MAX_MODEL_NAME && strspn(name, inner) == len &&
           !strchr("._-", name[0]);
}

static bool text_fits(const struct config_key *key, const char *text)
{
    switch (key->kind) {
    case KIND_NAME:
    case KIND_NAMES: return config_name_valid(text);
    case KIND_PATH:
    case KIND_PATHS: return text[0] == '/';
    default: return text[0] != '\0';
    }
}

static int read_text(const struct config_key *key, char **field, const char *text)
{
    if (!text_fits(key, text))
        return -EINVAL;
    char *copy = strdup(text);
    if (!copy)
        return -ENOMEM;
    free(*field);
    *field = copy;
    return 0;
}

int config_key_read(const struct config_key *key, void *base, const char *text)
{
    void *field = (char *)base + key->offset;
    switch (key->kind) {
    case KIND_NAME:
    case KIND_PATH: return read_text(key, field, text);
    case KIND_PATHS:
    case KIND_NAMES:
    case KIND_ACCOUNTS:
        return text_fits(key, text) ? config_list_insert(field, SIZE_MAX, text) : -EINVAL;
    case KIND_DURATION:
    case KIND_SIZE: return read_quantity(key, field, text);
    case KIND_SHARE: return read_share(key, field, text);
    case KIND_COUNT: return read_count(key, field, text);
    case KIND_RANK: return read_rank(key, field, text);
    case KIND_FLAG: return read_flag(field, text);
    case KIND_CHOICE: return read_choice(key, field, text);
    }
    return -EINVAL;
}

void config_key_clear(const struct config_key *key, void *base)
{
    void *field = (char *)base + key->offset;
    if (config_key_is_list(key)) {
        *(char ***)field = config_list_free(*(char ***)field);
    } else if (key->kind == KIND_NAME || key->kind == KIND_PATH) {
        free(*(char **)field);
        *(char **)field = NULL;
    }
}

int config_defaults(void *base, bool of_model)
{
    for (size_t i = 0; i < n_config_keys; i++) {
        const struct config_key *key = &config_keys[i];
        if (key_of_model(key) != of_model || !key->text)
            continue;
        int r = config_key_read(key, base, key->text);
        assert(r != -EINVAL && "a default is within its own key's bounds");
        if (r < 0)
            return r;
    }
    return 0;
}

void config_clear(void *base, bool of_model)
{
    for (size_t i = 0; i < n_config_keys; i++)
        if (key_of_model(&config_keys[i]) == of_model)
            config_key_clear(&config_keys[i], base);
}

/* ---- what a key takes, in words ---- */

/* A number in the largest unit that divides it. */
static void print_quantity(const struct unit *units, uint64_t value, char *text, size_t bytes)
{
    size_t i = 0;
    while (i + 1 < ELEMENTSOF(size_units) && (value % units[i].factor || value < units[i].factor))
        i++;
    if (value == 0 && units == duration_units)
        snprintf(text, bytes, "0s");
    else
        snprintf(text, bytes, "%" PRIu64 "%s", value / units[i].factor, units[i].name);
}

static void expects_range(const struct config_key *key, const char *what, char *text)
{
    char low[32], high[32], word[32] = "";
    if (key->kind == KIND_COUNT) {
        snprintf(low, sizeof(low), "%" PRIu64, key->min);
        snprintf(high, sizeof(high), "%" PRIu64, key->max);
    } else {
        print_quantity(units_of(key), key->min, low, sizeof(low));
        print_quantity(units_of(key), key->max, high, sizeof(high));
    }
    if (key->zero)
        snprintf(word, sizeof(word), "%s or ", key->zero);
    snprintf(text, CONFIG_EXPECTS_BYTES, "%s%s from %s to %s", word, what, low, high);
}

static void expects_words(const struct config_key *key, char *text)
{
    size_t used = 0;
    *text = '\0';
    for (size_t i = 0; key->words[i]; i++) {
        const char *glue = i == 0 ? "" : key->words[i + 1] ? ", " : " or ";
        int n = snprintf(text + used, CONFIG_EXPECTS_BYTES - used, "%s%s", glue, key->words[i]);
        used = MIN(used + (size_t)n, (size_t)CONFIG_EXPECTS_BYTES - 1);
    }
}

void config_key_expects(const struct config_key *key, char ret_text[CONFIG_EXPECTS_BYTES])
{
    static const char *const fixed[] = {
        [KIND_NAME] = "a model's name (letters, digits, `._-`, at most 128)",
        [KIND_PATH] = "an absolute path",
        [KIND_PATHS] = "a list of absolute paths, such as [/srv/models]",
        [KIND_NAMES] = "a list of models' names, such as [ember]",
        [KIND_ACCOUNTS] = "a list of names or numbers, such as [root]",
        [KIND_FLAG] = "yes or no",
    };
    switch (key->kind) {
    case KIND_DURATION:
        expects_range(key, "a time with its unit (us, ms, s, min, h)", ret_text);
        break;
    case KIND_SIZE:
        expects_range(key, "a size with its unit (B, KiB, MiB, GiB, TiB)", ret_text);
        break;
    case KIND_SHARE:
        expects_range(key, "1% to 100%, or a size with its unit (B, KiB, MiB, GiB, TiB)", ret_text);
        break;
    case KIND_COUNT: expects_range(key, "a whole number", ret_text); break;
    case KIND_RANK:
        snprintf(ret_text, CONFIG_EXPECTS_BYTES, "a whole number from -%" PRIu64 " to %" PRIu64,
                 key->max, key->max);
        break;
    case KIND_CHOICE: expects_words(key, ret_text); break;
    default: snprintf(ret_text, CONFIG_EXPECTS_BYTES, "%s", fixed[key->kind]); break;
    }
}

/* ---- the document ---- */

static const char document_head[] =
    "# Configuration\n"
    "\n"
    "hearthd reads one YAML file: the one given with `--config FILE` (the system's unit gives\n"
    "`/etc/hearth/hearth.yaml`), else, unless `--socket` is given, "
    "`$XDG_CONFIG_HOME/hearth/hearth.yaml`\n"
    "where there is one. `hearthd --check --config FILE` reads it and says what is wrong; this "
    "page is\n"
    "what `hearthd --print-keys` prints.\n"
    "\n"
    "Every key may be left out. Times and sizes carry their unit: `50us 5ms 2s 1min 1h`, `64KiB "
    "2MiB\n"
    "8GiB`. Lists are YAML lists. A key that is not known, or given twice, is an error that names "
    "the\n"
    "file, the line, the key and what was expected. Aliases, tags and several documents in one "
    "file\n"
    "are not taken. A file is at most 1 MiB, a value 4096 bytes, a list 64 entries, and there are "
    "at\n"
    "most 1024 entries under `models`.\n"
    "\n"
    "```yaml\n"
    "memory_budget: 8GiB\n"
    "limits: {queue: 1000}\n"
    "models:\n"
    "  story:\n"
    "    path: /srv/models/story-q4.gguf\n"
    "    preload: eager\n"
    "    keep_alive: 1h\n"
    "```\n";

static void print_section(const char *path, FILE *out)
{
    const char *dot = strrchr(path, '.');
    if (dot)
        fprintf(out, "\n## %.*s\n", (int)(dot - path), path);
    else
        fprintf(out, "\n## General\n");
    fputs("\n| key | default | takes | meaning |\n|---|---|---|---|\n", out);
}

static bool same_section(const char *a, const char *b)
{
    const char *dot_a = strrchr(a, '.'), *dot_b = strrchr(b, '.');
    size_t na = dot_a ? (size_t)(dot_a - a) : 0, nb = dot_b ? (size_t)(dot_b - b) : 0;
    return na == nb && memcmp(a, b, na) == 0;
}

void config_print_keys(FILE *out)
{
    fputs(document_head, out);
    for (size_t i = 0; i < n_config_keys; i++) {
        const struct config_key *key = &config_keys[i];
        char expects[CONFIG_EXPECTS_BYTES];
        if (i == 0 || !same_section(config_keys[i - 1].path, key->path))
            print_section(key->path, out);
        config_key_expects(key, expects);
        fprintf(out, "| `%s` | %s | %s | %s%s |\n", key->path,
                key->text_words ? key->text_words
                : key->text     ? key->text
                                : "none",
                expects, key->sentence,
                key->later ? " (Taken and checked; without effect in this version.)" : "");
    }
}
