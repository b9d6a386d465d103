#include "daemon/serve/admission.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/catalog.h"
#include "lib/cleanup.h"

/* Bounds of numbers that would make no sense beyond. */
#define MAX_MAX_TOKENS  1000000u
#define MAX_TOP_K       1000000u
#define MAX_TEMPERATURE 100.0f
#define MAX_PENALTY     100.0f
#define MAX_DEADLINE_US (24ull * 3600 * 1000000)
/* As in the configuration. */
#define MAX_KEEP_ALIVE_US (365ull * 24 * 3600 * 1000000)

struct admission {
    const struct config *config;
    struct account_entry *accounts;
    uint32_t n_connections, n_requests;
    uint64_t input_bytes;
};

/* ---- options ---- */

#define FOR(type) (1u << (type))
#define GENERATE  (FOR(WIRE_COMPLETE) | FOR(WIRE_CHAT))
#define WITH_TEXT (GENERATE | FOR(WIRE_EMBED) | FOR(WIRE_TOKENIZE))

/* Which requests take which critical option: elsewhere it is misplaced. */
static bool misplaced(uint16_t tag, uint16_t type)
{
    uint32_t types;

    switch (tag) {
    case TAG_STOP:
    case TAG_SKIP_BYTES:
    case TAG_FINGERPRINT: types = GENERATE; break;
    case TAG_DEADLINE_US: types = WITH_TEXT | FOR(WIRE_WARM); break;
    case TAG_ON_BEHALF_OF: return false; /* the caller knows which socket it came through */
    default: return true;
    }
    return type > 31 || !(types & FOR(type));
}

static int bad(struct refusal *refusal, uint16_t tag, const char *expected)
{
    return refusal_set(refusal, CODE_BAD_REQUEST, wire_tag_name(tag), "%s: expected %s",
                       wire_tag_name(tag), expected);
}

static int number(const struct wire_option *option, uint64_t least, uint64_t most,
                  const char *expected, uint64_t *ret_value, struct refusal *refusal)
{
    uint64_t value;

    if (wire_option_number(option, &value) < 0 || value < least || value > most)
        return bad(refusal, option->tag, expected);
    *ret_value = value;
    return 0;
}

static int real(const struct wire_option *option, float least, float most, const char *expected,
                float *ret_value, struct refusal *refusal)
{
    float value;

    if (wire_option_real(option, &value) < 0 || value < least || value > most)
        return bad(refusal, option->tag, expected);
    *ret_value = value;
    return 0;
}

static int model_name(const struct wire_option *option, struct request_options *options,
                      struct refusal *refusal)
{
    if (!model_name_valid((const char *)option->value, option->len))
        return bad(refusal, option->tag,
                   "a model's name: letters, digits, '.', '_' and '-', beginning with a letter or "
                   "digit, at most 128");
    memcpy(options->model, option->value, option->len);
    options->model[option->len] = 0;
    return 0;
}

static int stop_string(const struct wire_option *option, struct request_options *options,
                       struct refusal *refusal)
{
    struct stream_stops *stops = &options->stops;

    if (option->len == 0 || option->len > STREAM_MAX_STOP_BYTES ||
        !wire_utf8_valid(option->value, option->len))
        return bad(refusal, option->tag, "UTF-8 text of 1 to 64 bytes");
    if (stops->n == STREAM_MAX_STOPS)
        return bad(refusal, option->tag, "at most 8 of them");
    memcpy(stops->text[stops->n], option->value, option->len);
    stops->len[stops->n++] = (uint8_t)option->len;
    return 0;
}

static int on_behalf(const struct wire_option *option, struct request_options *options,
                     struct refusal *refusal)
{
    if (option->len < 4 || option->len % 4 != 0 || option->len > 4 * (1 + PEER_MAX_GROUPS))
        return bad(refusal, option->tag, "a uid and at most 256 gids");
    options->on_behalf = true;
    memcpy(&options->uid, option->value, sizeof(options->uid));
    options->gids = option->value + 4;
    options->n_gids = option->len / 4 - 1;
    return 0;
}

/* Options of the text itself. */
static int parse_text(const struct wire_option *option, struct request_options *options,
                      struct refusal *refusal)
{
    switch (option->tag) {
    case TAG_MODEL: return model_name(option, options, refusal);
    case TAG_PROMPT:
        options->prompt = (const char *)option->value;
        options->prompt_bytes = option->len;
        return 0;
    case TAG_IDS:
        if (option->len % 4 != 0)
            return bad(refusal, option->tag, "32-bit numbers");
        options->ids = option->value;
        options->n_ids = option->len / 4;
        return 0;
    case TAG_STOP: return stop_string(option, options, refusal);
    case TAG_NAME:
        if (option->len >= sizeof(options->name) || !wire_utf8_valid(option->value, option->len))
            return bad(refusal, option->tag, "a name of at most 63 bytes");
        memcpy(options->name, option->value, option->len);
        options->name[option->len] = 0;
        return 0;
    case TAG_FINGERPRINT:
        if (option->len != sizeof(options->fingerprint))
            return bad(refusal, option->tag, "the 8 bytes that came with the first tokens");
        options->has_fingerprint = true;
        memcpy(&options->fingerprint, option->value, sizeof(options->fingerprint));
        return 0;
    case TAG_ON_BEHALF_OF: return on_behalf(option, options, refusal);
    default: return 1;
    }
}

static int parse_sampling(const struct wire_option *option, struct request_options *options,
                          struct refusal *refusal)
{
    struct sampler_params *params = &options->params;
    uint64_t value = 0;
    int r;

    switch (option->tag) {
    case TAG_TEMPERATURE:
        return real(option, 0, MAX_TEMPERATURE, "a number from 0 to 100", &params->temperature,
                    refusal);
    case TAG_TOP_P: return real(option, 0, 1, "a number from 0 to 1", &params->top_p, refusal);
    case TAG_MIN_P: return real(option, 0, 1, "a number from 0 to 1", &params->min_p, refusal);
    case TAG_REPEAT_PENALTY:
        return real(option, 0.01f, MAX_PENALTY, "a number from 0.01 to 100",
                    &params->repeat_penalty, refusal);
    case TAG_TOP_K:
        r = number(option, 0, MAX_TOP_K, "a number from 0 to 1000000", &value, refusal);
        if (r == 0)
            params->top_k = (uint32_t)value;
        return r;
    case TAG_SEED:
        options->has_seed = true;
        return number(option, 0, UINT64_MAX, "a number", &params->seed, refusal);
    default: return 1;
    }
}

static int parse_numbers(const struct wire_option *option, struct request_options *options,
                         struct refusal *refusal)
{
    uint64_t value = 0;
    int r;

    switch (option->tag) {
    case TAG_STREAM:
        r = number(option, 0, 1, "0 or 1", &value, refusal);
        options->stream = value;
        return r;
    case TAG_IGNORE_EOS:
        r = number(option, 0, 1, "0 or 1", &value, refusal);
        options->ignore_eos = value;
        return r;
    case TAG_WAIT:
        r = number(option, 0, 1, "0 or 1", &value, refusal);
        options->wait = value;
        return r;
    case TAG_MAX_TOKENS:
        r = number(option, 1, MAX_MAX_TOKENS, "a number from 1 to 1000000", &value, refusal);
        options->max_tokens = (uint32_t)value;
        return r;
    case TAG_PRIORITY:
        r = number(option, 0, 1, "0 (interactive) or 1 (batch)", &value, refusal);
        options->priority = (uint32_t)value;
        return r;
    case TAG_CREDIT:
        options->has_credit = true;
        return number(option, 0, UINT64_MAX, "a number of bytes", &options->credit, refusal);
    case TAG_DEADLINE_US:
        return number(option, 1, MAX_DEADLINE_US, "1 us to 24 hours", &options->deadline_us,
                      refusal);
    case TAG_SKIP_BYTES:
        return number(option, 0, UINT64_MAX, "a number of bytes", &options->skip_bytes, refusal);
    default: return 1;
    }
}

/* What `set` sets. */
static int parse_values(const struct wire_option *option, struct request_options *options,
                        struct refusal *refusal)
{
    uint64_t value = 0;
    int r;

    switch (option->tag) {
    case TAG_PRELOAD:
        r = number(option, 0, 1, "0 or 1", &value, refusal);
        options->has_preload = true;
        options->preload = value;
        return r;
    case TAG_PINNED:
        r = number(option, 0, 1, "0 or 1", &value, refusal);
        options->has_pinned = true;
        options->pinned = value;
        return r;
    case TAG_KEEP_ALIVE_US:
        options->has_keep_alive = true;
        return number(option, 0, MAX_KEEP_ALIVE_US, "0 (none) to 365 days in microseconds",
                      &options->keep_alive_us, refusal);
    default: return 1;
    }
}

static void set_defaults(struct request_options *options)
{
    memset(options, 0, sizeof(*options));
    options->stream = true;
    options->max_tokens = 256;
    options->params = (struct sampler_params){
        .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1.0f};
}

int admission_parse(uint16_t type, const uint8_t *body, size_t body_len,
                    struct request_options *ret_options, struct refusal *ret_refusal)
{
    struct wire_reader reader;
    struct wire_option option;
    int r, refused = 0;

    set_defaults(ret_options);
    wire_reader_init(&reader, body, body_len);
    while ((r = wire_reader_next(&reader, &option)) > 0) {
        if (refused < 0)
            continue; /* the rest is still walked, to find a frame that is malformed */
        if ((option.tag & WIRE_TAG_CRITICAL) && misplaced(option.tag, type)) {
            const char *name = wire_tag_name(option.tag);
            refused = refusal_set(ret_refusal, CODE_BAD_REQUEST, name,
                                  "option %s (tag 0x%04x) is not known here and must be understood",
                                  name ? name : "unknown", option.tag);
            continue;
        }
        refused = parse_text(&option, ret_options, ret_refusal);
        if (refused == 1)
            refused = parse_sampling(&option, ret_options, ret_refusal);
        if (refused == 1)
            refused = parse_numbers(&option, ret_options, ret_refusal);
        if (refused == 1)
            refused = parse_values(&option, ret_options, ret_refusal);
    }
    if (r < 0)
        return -EBADMSG;
    return MIN(refused, 0);
}

/* ---- accounts ---- */

int admission_new(const struct config *config, struct admission **ret_admission)
{
    struct admission *admission = calloc(1, sizeof(*admission));

    if (!admission)
        return -ENOMEM;
    admission->config = config;
    *ret_admission = admission;
    return 0;
}

struct admission *admission_free(struct admission *admission)
{
    struct account_entry *account, *next;

    if (!admission)
        return NULL;
    HASH_ITER (hh, admission->accounts, account, next) {
        HASH_DEL(admission->accounts, account);
        free(account);
    }
    free(admission);
    return NULL;
}

static struct account_entry *account_new(struct admission *admission, uint32_t uid)
{
    struct account_entry *account = calloc(1, sizeof(*account));

    if (!account)
        return NULL;
    account->uid = uid;
    HASH_ADD(hh, admission->accounts, uid, sizeof(account->uid), account);
    if (!hash_added(&account->hh))
        free(TAKE_PTR(account));
    return account;
}

static int busy(struct refusal *refusal, const char *what, uint64_t limit, const char *key)
{
    return refusal_busy(refusal, RETRY_AFTER_US, "%s (%s is %llu); try again shortly", what, key,
                        (unsigned long long)limit);
}

struct account_entry *admission_connect(struct admission *admission, uint32_t uid,
                                        struct refusal *ret_refusal)
{
    const struct config *config = admission->config;
    struct account_entry *account;

    if (admission->n_connections >= config->limits.connections) {
        busy(ret_refusal, "all connections are taken", config->limits.connections,
             "limits.connections");
        return NULL;
    }
    HASH_FIND(hh, admission->accounts, &uid, sizeof(uid), account);
    if (account && account->n_connections >= config->limits.connections_per_uid) {
        busy(ret_refusal, "this user has all the connections allowed",
             config->limits.connections_per_uid, "limits.connections_per_uid");
        return NULL;
    }
    if (!account) {
        account = account_new(admission, uid);
        if (!account) {
            refusal_set(ret_refusal, CODE_NO_MEMORY, NULL, "no memory for another user");
            return NULL;
        }
    }
    account->n_connections++;
    admission->n_connections++;
    return account;
}

/* An account lives as long as something is counted in it. */
static void account_drop(struct admission *admission, struct account_entry *account)
{
    if (account->n_connections > 0 || account->n_requests > 0 || account->input_bytes > 0)
        return;
    HASH_DEL(admission->accounts, account);
    free(account);
}

void admission_disconnect(struct admission *admission, struct account_entry *account)
{
    account->n_connections--;
    admission->n_connections--;
    account_drop(admission, account);
}

int admission_enter(struct admission *admission, struct account_entry *account,
                    struct refusal *ret_refusal)
{
    const struct config *config = admission->config;

    if (admission->n_requests >= config->limits.queue)
        return busy(ret_refusal, "the queue is full", config->limits.queue, "limits.queue");
    if (account->n_requests >= config->limits.queue_per_uid)
        return busy(ret_refusal, "this user's queue is full", config->limits.queue_per_uid,
                    "limits.queue_per_uid");
    account->n_requests++;
    admission->n_requests++;
    return 0;
}

void admission_leave(struct admission *admission, struct account_entry *account)
{
    account->n_requests--;
    admission->n_requests--;
    account_drop(admission, account);
}

/* Beside nothing else everything fits: a frame has a limit of its own. */
static bool fits_beside(uint64_t others, uint64_t limit, size_t bytes)
{
    return others == 0 || (others <= limit && bytes <= limit - others);
}

bool admission_resize_input(struct admission *admission, struct account_entry *account,
                            size_t *held, size_t bytes)
{
    const struct config *config = admission->config;

    if (bytes > *held &&
        (!fits_beside(account->input_bytes - *held, config->limits.input_bytes_per_uid, bytes) ||
         !fits_beside(admission->input_bytes - *held, config->limits.input_bytes, bytes)))
        return false;
    admission->input_bytes += bytes - *held; /* modulo 2^64, where it shrinks */
    account->input_bytes += bytes - *held;
    *held = bytes;
    return true;
}

bool admission_hold_input(struct admission *admission, struct account_entry *account, size_t bytes)
{
    size_t held = 0;

    return admission_resize_input(admission, account, &held, bytes);
}

int refusal_input(struct refusal *ret_refusal)
{
    return refusal_busy(ret_refusal, INPUT_RETRY_US,
                        "too much input waits already (limits.input_bytes, input_bytes_per_uid); "
                        "try again shortly");
}

void admission_release_input(struct admission *admission, struct account_entry *account,
                             size_t bytes)
{
    admission->input_bytes -= bytes;
    account->input_bytes -= bytes;
    account_drop(admission, account);
}

uint32_t admission_n_requests(const struct admission *admission)
{
    return admission->n_requests;
}

uint32_t admission_n_connections(const struct admission *admission)
{
    return admission->n_connections;
}
