#include "fs/mirror.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

enum phase { APART, CONNECTING, CONNECTED };

struct models {
    struct mirror_model *at;
    size_t n;
    size_t capacity;
};

struct mirror {
    enum phase phase;
    uint32_t missing;    /* bit a part: asked for and not yet answered */
    uint64_t asked_us;   /* the connection attempt or question under way */
    uint64_t heard_us;   /* the daemon's last word */
    uint64_t copy_us;    /* when the copy was asked for; 0: there is none of this connection */
    uint64_t looked_us;  /* end of the last attempt that found no way in */
    uint64_t expired_us; /* what was asked for before is worth nothing */
    uint64_t deaf_until; /* until then unresponsive, whatever is under way */
    bool absent;         /* the last attempt found nobody */
    bool going;          /* the last connection ended with a goaway */
    uint64_t changes;
    char status[MIRROR_WORD_BYTES]; /* the daemon's own word */
    char *version;
    struct models models;
    struct models incoming; /* items of the answer that is not complete yet */
    char *texts[_MIRROR_PART_MAX];
};
static_assert(_MIRROR_PART_MAX <= 32, "a part is a bit of `missing`");

int mirror_new(struct mirror **ret_mirror)
{
    struct mirror *mirror = calloc(1, sizeof(*mirror));

    if (!mirror)
        return -ENOMEM;
    strcpy(mirror->status, "inactive");
    *ret_mirror = mirror;
    return 0;
}

static void models_done(struct models *models)
{
    for (size_t i = 0; i < models->n; i++) {
        free(models->at[i].info);
        free(models->at[i].stats);
        free(models->at[i].sentence);
    }
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
    return mirror->phase == CONNECTED ? MIRROR_ASK : MIRROR_CONNECT;
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
        due_us = MIN(due_us, MAX(found_us(mirror) + MIRROR_AGE_US, now_us));
    }
    return due_us;
}

void mirror_expire(struct mirror *mirror, uint64_t now_us)
{
    mirror->expired_us = now_us;
}

/* ---- reading ---- */

uint64_t mirror_changes(const struct mirror *mirror)
{
    return mirror->changes;
}

const char *mirror_status(const struct mirror *mirror, uint64_t now_us)
{
    return is_silent(mirror, now_us) ? "unresponsive" : mirror->status;
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

static void take_model(struct mirror *mirror, const struct hearth_reply *reply)
{
    struct mirror_model *model = models_add(&mirror->incoming, reply->model);

    if (!model)
        return;
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
        mirror->copy_us = mirror->asked_us;
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

/* ---- the connection's life ---- */

static void set_apart(struct mirror *mirror)
{
    models_done(&mirror->incoming);
    mirror->phase = APART;
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
    strcpy(mirror->status, "running");
    mirror_heard(mirror, now_us);
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
    free(model->info);
    free(model->stats);
    free(model->sentence);
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
