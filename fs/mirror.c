#include "fs/mirror.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/news.h"

enum phase { APART, CONNECTING, CONNECTED };

/* How values come over the connection there is. */
enum feed { FEED_NONE, FEED_PUSHED, FEED_ASKED };

/* What is awaited beside parts, as further bits of `missing`. */
#define MISSING_PUSH (1u << _MIRROR_PART_MAX)
#define MISSING_PONG (2u << _MIRROR_PART_MAX)
static_assert(_MIRROR_PART_MAX + 2 <= 32, "what is awaited is a bit of `missing`");

struct models {
    struct mirror_model *at;
    size_t n;
    size_t capacity;
    size_t hint; /* where the next one is looked for first: they come in the same order each time */
};

struct mirror {
    enum phase phase;
    enum feed feed;
    bool pushing;        /* in the middle of a push */
    bool push_is_full;   /* models that it does not name are gone */
    uint64_t push_us;    /* when it began */
    uint32_t missing;    /* a bit for all that is awaited */
    uint64_t asked_us;   /* the connection attempt or question under way */
    uint64_t heard_us;   /* the daemon's last word */
    uint64_t copy_us;    /* when the copy held; 0: there is none of this connection */
    uint64_t looked_us;  /* end of the last attempt that found no way in */
    uint64_t expired_us; /* what was asked for before is worth nothing */
    uint64_t deaf_until; /* until then unresponsive, whatever is under way */
    bool absent;         /* the last attempt found nobody */
    bool going;          /* the last connection ended with a goaway */
    bool starting;       /* somebody has knocked at the main socket to have one started */
    uint64_t changes;
    char status[MIRROR_WORD_BYTES]; /* the daemon's own word */
    char *version;
    struct models models;
    struct models incoming; /* items of the answer that is not complete yet */
    char *texts[_MIRROR_PART_MAX];
};

int mirror_new(struct mirror **ret_mirror)
{
    struct mirror *mirror = calloc(1, sizeof(*mirror));

    if (!mirror)
        return -ENOMEM;
    strcpy(mirror->status, "inactive");
    *ret_mirror = mirror;
    return 0;
}

static void model_done(struct mirror_model *model)
{
    free(model->info);
    free(model->stats);
    free(model->sentence);
}

static void models_done(struct models *models)
{
    for (size_t i = 0; i < models->n; i++)
        model_done(&models->at[i]);
    free(models->at);
    *models = (struct models){0};
}

struct mirror *mirror_free(struct mirror *mirror)
{
    if (!mirror)
        return NULL;
    models_done(&mirror->models);
    models_done(&mirror->incoming);
    for (int part = 0; part < _MIRROR_PART_MAX; part++)
        free(mirror->texts[part]);
    free(mirror->version);
    free(mirror);
    return NULL;
}

/* ---- trust ---- */

static bool waits_for_word(const struct mirror *mirror)
{
    return mirror->phase == CONNECTING || (mirror->phase == CONNECTED && mirror->missing);
}

static uint64_t patience_end_us(const struct mirror *mirror)
{
    return MAX(mirror->asked_us + MIRROR_PATIENCE_US, mirror->heard_us + MIRROR_SILENCE_US);
}

static bool is_silent(const struct mirror *mirror, uint64_t now_us)
{
    return now_us < mirror->deaf_until ||
           (waits_for_word(mirror) && now_us >= patience_end_us(mirror));
}

/* When the newest finding was asked for: a copy, or that nobody is there. 0: there is none. */
static uint64_t found_us(const struct mirror *mirror)
{
    return mirror->phase == CONNECTED ? mirror->copy_us : mirror->looked_us;
}

static bool is_found(const struct mirror *mirror, uint64_t since_us)
{
    return found_us(mirror) > 0 && found_us(mirror) >= MAX(since_us, mirror->expired_us);
}

bool mirror_answers(const struct mirror *mirror, uint64_t since_us, uint64_t now_us)
{
    if (is_silent(mirror, now_us))
        return true;
    if (mirror->phase != CONNECTED && !mirror->absent && !mirror->going)
        return false;
    return is_found(mirror, since_us);
}

enum mirror_action mirror_next(const struct mirror *mirror, uint64_t since_us)
{
    if (waits_for_word(mirror) || is_found(mirror, since_us))
        return MIRROR_NOTHING;
    if (mirror->phase != CONNECTED)
        return MIRROR_CONNECT;
    switch (mirror->feed) {
    case FEED_NONE: return MIRROR_FEED;
    case FEED_ASKED: return MIRROR_ASK;
    case FEED_PUSHED: break;
    }
    return mirror->expired_us > mirror->copy_us ? MIRROR_ASK : MIRROR_PING;
}

static uint64_t watch_us(const struct mirror *mirror)
{
    return mirror->feed == FEED_PUSHED ? MIRROR_PULSE_US : MIRROR_AGE_US;
}

uint64_t mirror_watch_since_us(const struct mirror *mirror, uint64_t now_us)
{
    return now_us > watch_us(mirror) ? now_us - watch_us(mirror) : 1;
}

uint64_t mirror_due_us(const struct mirror *mirror, bool watching, uint64_t now_us)
{
    uint64_t due_us = UINT64_MAX;

    if (now_us < mirror->deaf_until)
        due_us = mirror->deaf_until;
    if (waits_for_word(mirror)) {
        if (now_us < patience_end_us(mirror))
            due_us = MIN(due_us, patience_end_us(mirror));
    } else if (watching) {
        due_us = MIN(due_us, MAX(found_us(mirror) + watch_us(mirror), now_us));
    }
    return due_us;
}

void mirror_expire(struct mirror *mirror, uint64_t now_us)
{
    /* A push that came in the same moment may have been before it. */
    mirror->expired_us = now_us + 1;
}

/* ---- reading ---- */

bool mirror_is_connected(const struct mirror *mirror)
{
    return mirror->phase == CONNECTED;
}

uint64_t mirror_held_us(const struct mirror *mirror)
{
    return found_us(mirror);
}

uint64_t mirror_changes(const struct mirror *mirror)
{
    return mirror->changes;
}

const char *mirror_status(const struct mirror *mirror, uint64_t now_us)
{
    if (is_silent(mirror, now_us))
        return "unresponsive";
    return mirror->phase != CONNECTED && mirror->starting ? "starting" : mirror->status;
}

const char *mirror_version(const struct mirror *mirror)
{
    return mirror->version;
}

bool mirror_is_absent(const struct mirror *mirror, uint64_t since_us)
{
    return mirror->phase == APART && mirror->absent && is_found(mirror, since_us);
}

size_t mirror_n_models(const struct mirror *mirror)
{
    return mirror->models.n;
}

const struct mirror_model *mirror_model_at(const struct mirror *mirror, size_t index)
{
    assert(index < mirror->models.n);
    return &mirror->models.at[index];
}

const struct mirror_model *mirror_model(const struct mirror *mirror, const char *name)
{
    for (size_t i = 0; i < mirror->models.n; i++)
        if (strcmp(mirror->models.at[i].name, name) == 0)
            return &mirror->models.at[i];
    return NULL;
}

const char *mirror_text(const struct mirror *mirror, enum mirror_part part)
{
    return mirror->texts[part] ? mirror->texts[part] : "";
}

/* ---- what the daemon says ---- */

void mirror_heard(struct mirror *mirror, uint64_t now_us)
{
    mirror->heard_us = now_us;
    mirror->deaf_until = 0;
}

/* A copy that ends at MIRROR_TEXT_BYTES_MAX; NULL for nothing, and where memory is short. */
static char *text_copy(const char *text)
{
    return text && text[0] ? strndup(text, MIRROR_TEXT_BYTES_MAX) : NULL;
}

/* Lower-case letters only: it becomes a file's only line. */
static void word_copy(char ret_word[MIRROR_WORD_BYTES], const char *word)
{
    size_t n = word ? strspn(word, "abcdefghijklmnopqrstuvwxyz") : 0;

    if (n == 0 || n >= MIRROR_WORD_BYTES || word[n])
        return;
    memcpy(ret_word, word, n + 1);
}

/* A new entry at the end, NULL where a bound or memory forbids one. */
static struct mirror_model *models_add(struct models *models, const char *name)
{
    struct mirror_model *model;
    size_t len = name ? strlen(name) : 0;

    if (len == 0 || len > MIRROR_NAME_MAX || models->n >= MIRROR_MODELS_MAX)
        return NULL;
    if (models->n == models->capacity) {
        size_t capacity = MAX(16u, models->capacity * 2);
        struct mirror_model *at = realloc(models->at, capacity * sizeof(*at));
        if (!at)
            return NULL;
        models->at = at;
        models->capacity = capacity;
    }
    model = &models->at[models->n++];
    *model = (struct mirror_model){.state = "cold"};
    memcpy(model->name, name, len + 1);
    return model;
}

static void model_fill(struct mirror_model *model, const struct hearth_reply *reply)
{
    model_done(model);
    model->named = true;
    word_copy(model->state, reply->state);
    model->done_bytes = reply->done_bytes;
    model->total_bytes = reply->total_bytes;
    model->memory_bytes = reply->memory_bytes;
    model->preload = reply->preload;
    model->pinned = reply->pinned;
    model->keep_alive_us = reply->keep_alive_us;
    model->holds = reply->holds;
    model->info = text_copy(reply->info);
    model->stats = text_copy(reply->stats);
    model->sentence = text_copy(reply->sentence);
}

static void take_model(struct mirror *mirror, const struct hearth_reply *reply)
{
    struct mirror_model *model = models_add(&mirror->incoming, reply->model);

    if (model)
        model_fill(model, reply);
}

static void take_item(struct mirror *mirror, enum mirror_part part,
                      const struct hearth_reply *reply)
{
    switch (part) {
    case MIRROR_MODELS: take_model(mirror, reply); break;
    case MIRROR_STATUS:
        word_copy(mirror->status, reply->state);
        if (reply->version && reply->version[0]) {
            free(mirror->version);
            mirror->version = text_copy(reply->version);
        }
        break;
    default:
        free(mirror->texts[part]);
        mirror->texts[part] = text_copy(reply->text);
        break;
    }
}

static void copy_holds(struct mirror *mirror, uint64_t at_us)
{
    mirror->copy_us = MAX(mirror->copy_us, at_us);
}

/* The part's answer is complete; an error leaves what was there. */
static void take_end(struct mirror *mirror, enum mirror_part part, bool good)
{
    if (part == MIRROR_MODELS) {
        if (good) {
            models_done(&mirror->models);
            mirror->models = mirror->incoming;
            mirror->incoming = (struct models){0};
        } else {
            models_done(&mirror->incoming);
        }
    }
    mirror->missing &= ~(1u << part);
    if (!mirror->missing)
        copy_holds(mirror, mirror->asked_us);
    mirror->changes++;
}

void mirror_take(struct mirror *mirror, enum mirror_part part, const struct hearth_reply *reply,
                 uint64_t now_us)
{
    assert(part < _MIRROR_PART_MAX);
    if (mirror->phase != CONNECTED || !(mirror->missing & (1u << part)) || reply->lost)
        return;
    mirror_heard(mirror, now_us);
    switch (reply->kind) {
    case HEARTH_ITEM: take_item(mirror, part, reply); break;
    case HEARTH_DONE: take_end(mirror, part, true); break;
    case HEARTH_ERROR: take_end(mirror, part, false); break;
    case HEARTH_TOKENS: break;
    }
}

/* ---- pushes ---- */

void mirror_feeding(struct mirror *mirror, uint64_t now_us)
{
    assert(mirror->phase == CONNECTED && !mirror->missing);
    mirror->feed = FEED_PUSHED;
    mirror->pushing = false;
    mirror->missing = MISSING_PUSH;
    mirror->asked_us = now_us;
}

static struct mirror_model *models_find(struct models *models, const char *name)
{
    for (size_t i = 0; i < models->n; i++) {
        size_t at = (models->hint + i) % models->n;
        if (strcmp(models->at[at].name, name) == 0) {
            models->hint = at + 1;
            return &models->at[at];
        }
    }
    return NULL;
}

static void models_remove(struct models *models, struct mirror_model *model)
{
    size_t at = (size_t)(model - models->at);

    model_done(model);
    models->n--;
    memmove(model, model + 1, (models->n - at) * sizeof(*model));
}

static void push_model(struct mirror *mirror, const struct hearth_reply *reply)
{
    struct mirror_model *model = models_find(&mirror->models, reply->model);
    bool gone = !reply->state || !reply->state[0];

    if (gone && model)
        models_remove(&mirror->models, model);
    if (gone)
        return;
    if (!model)
        model = models_add(&mirror->models, reply->model);
    if (model)
        model_fill(model, reply);
}

const char *mirror_section(enum mirror_part part)
{
    static const char *const sections[_MIRROR_PART_MAX] = {
        [MIRROR_PROMETHEUS] = NEWS_PROMETHEUS, [MIRROR_POOL] = NEWS_POOL,
        [MIRROR_BATCHER] = NEWS_BATCHER,       [MIRROR_STREAMING] = NEWS_STREAMING,
        [MIRROR_LOADER] = NEWS_LOADER,
    };
    return sections[part];
}

static void push_text(struct mirror *mirror, const struct hearth_reply *reply)
{
    for (int part = 0; part < _MIRROR_PART_MAX; part++) {
        const char *section = mirror_section(part);
        if (section && strcmp(section, reply->name) == 0)
            take_item(mirror, part, reply);
    }
}

static void push_begins(struct mirror *mirror, bool full, uint64_t now_us)
{
    mirror->pushing = true;
    mirror->push_us = now_us;
    mirror->push_is_full = full;
    for (size_t i = 0; full && i < mirror->models.n; i++)
        mirror->models.at[i].named = false;
}

static void push_ends(struct mirror *mirror)
{
    for (size_t i = mirror->models.n; mirror->push_is_full && i-- > 0;)
        if (!mirror->models.at[i].named)
            models_remove(&mirror->models, &mirror->models.at[i]);
    mirror->pushing = false;
    mirror->missing &= ~MISSING_PUSH;
    copy_holds(mirror, mirror->push_us);
    mirror->changes++;
}

void mirror_push(struct mirror *mirror, const struct hearth_reply *reply, uint64_t now_us)
{
    if (mirror->phase != CONNECTED || mirror->feed != FEED_PUSHED || reply->lost)
        return;
    mirror_heard(mirror, now_us);
    if (!mirror->pushing || reply->lost_events > 0)
        push_begins(mirror, reply->lost_events > 0 || (mirror->missing & MISSING_PUSH), now_us);
    if (reply->lost_events > 0)
        return;
    if (reply->model) {
        push_model(mirror, reply);
    } else if (reply->name) {
        push_text(mirror, reply);
    } else {
        take_item(mirror, MIRROR_STATUS, reply);
        push_ends(mirror);
    }
}

void mirror_unfed(struct mirror *mirror, bool refused, uint64_t now_us)
{
    if (mirror->phase != CONNECTED)
        return;
    mirror->feed = refused ? FEED_ASKED : FEED_NONE;
    mirror->pushing = false;
    mirror->missing &= ~MISSING_PUSH;
    mirror_heard(mirror, now_us);
}

void mirror_pinged(struct mirror *mirror, uint64_t now_us)
{
    assert(mirror->phase == CONNECTED && !mirror->missing);
    mirror->missing = MISSING_PONG;
    mirror->asked_us = now_us;
}

/* What had changed before the ping has been pushed before the pong, or is about to be. */
void mirror_ponged(struct mirror *mirror, uint64_t now_us)
{
    if (mirror->phase != CONNECTED || !(mirror->missing & MISSING_PONG))
        return;
    mirror_heard(mirror, now_us);
    mirror->missing &= ~MISSING_PONG;
    if (mirror->feed == FEED_PUSHED)
        copy_holds(mirror, mirror->asked_us);
}

/* ---- the connection's life ---- */

static void set_apart(struct mirror *mirror)
{
    models_done(&mirror->incoming);
    mirror->phase = APART;
    mirror->feed = FEED_NONE;
    mirror->pushing = false;
    mirror->missing = 0;
    mirror->copy_us = 0;
    mirror->looked_us = 0;
    mirror->absent = false;
    mirror->going = false;
    mirror->changes++;
}

void mirror_connecting(struct mirror *mirror, uint64_t now_us)
{
    assert(mirror->phase == APART);
    mirror->phase = CONNECTING;
    mirror->asked_us = now_us;
}

void mirror_connected(struct mirror *mirror, uint64_t now_us)
{
    set_apart(mirror);
    mirror->phase = CONNECTED;
    mirror->starting = false;
    strcpy(mirror->status, "running");
    mirror_heard(mirror, now_us);
}

void mirror_starting(struct mirror *mirror, bool starting)
{
    mirror->changes += starting != mirror->starting;
    mirror->starting = starting;
}

void mirror_asked(struct mirror *mirror, uint64_t now_us)
{
    assert(mirror->phase == CONNECTED && !mirror->missing);
    mirror->missing = (1u << _MIRROR_PART_MAX) - 1u;
    mirror->asked_us = now_us;
}

void mirror_lost(struct mirror *mirror)
{
    set_apart(mirror);
}

void mirror_going(struct mirror *mirror, uint64_t now_us)
{
    set_apart(mirror);
    mirror->going = true;
    mirror->looked_us = now_us;
    strcpy(mirror->status, "draining");
    mirror_heard(mirror, now_us);
}

void mirror_deaf(struct mirror *mirror, uint64_t now_us)
{
    set_apart(mirror);
    mirror->looked_us = now_us;
    mirror->deaf_until = now_us + MIRROR_SILENCE_US;
}

/* What no daemon keeps: everything of a model but its name. */
static void model_chill(struct mirror_model *model)
{
    struct mirror_model cold = {.state = "cold"};

    memcpy(cold.name, model->name, sizeof(cold.name));
    model_done(model);
    *model = cold;
}

void mirror_absent(struct mirror *mirror, const char *const *names, size_t n_names, uint64_t now_us)
{
    /* The finding is as old as the attempt: who came while it ran may rely on it only if he asked
     * before it began. */
    uint64_t looked_us = mirror->phase == CONNECTING ? mirror->asked_us : now_us;

    set_apart(mirror);
    mirror->looked_us = looked_us;
    mirror->absent = true;
    mirror->deaf_until = 0;
    strcpy(mirror->status, "inactive");
    free(mirror->version);
    mirror->version = NULL;
    for (int part = 0; part < _MIRROR_PART_MAX; part++) {
        free(mirror->texts[part]);
        mirror->texts[part] = NULL;
    }
    if (names) {
        models_done(&mirror->models);
        for (size_t i = 0; i < n_names; i++)
            models_add(&mirror->models, names[i]);
    } else {
        for (size_t i = 0; i < mirror->models.n; i++)
            model_chill(&mirror->models.at[i]);
    }
}
