/* Models that need others: `models.NAME.needs`, loaded first, and failing with them. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/model/registry_internal.h"

static char **needs_of(const struct model_entry *entry)
{
    static char *none[] = {NULL};

    return entry->config && entry->config->needs ? entry->config->needs : none;
}

static bool needs(const struct model_entry *entry, const struct model_entry *need)
{
    for (char **name = needs_of(entry); *name; name++)
        if (strcmp(*name, need->name) == 0)
            return true;
    return false;
}

/* On its way in. */
static bool is_coming(const struct model_entry *entry)
{
    return entry->state == MODEL_QUEUED || entry->state == MODEL_LOADING ||
           entry->state == MODEL_WARMING;
}

static void fail_for_want_of(struct registry *registry, struct model_entry *entry, const char *name,
                             const struct model_entry *need)
{
    char sentence[FAULT_TEXT_BYTES];

    if (need)
        snprintf(sentence, sizeof(sentence), "%.64s needs %.64s, which failed: %.160s", entry->name,
                 name, need->error);
    else
        snprintf(
            sentence, sizeof(sentence),
            "%.64s needs %.64s, and there is no such model any more: bring it back, or take it "
            "out of models.%.64s.needs",
            entry->name, name, entry->name);
    /* Its own file is well: it may be tried again. */
    entry->identity = (struct file_identity){0};
    registry_fail(registry, entry, need ? need->code : CODE_LOAD_FAILED, sentence);
}

bool registry_needs_are_ready(struct registry *registry, struct model_entry *entry)
{
    bool ready = true;

    for (char **name = needs_of(entry); *name; name++) {
        struct model_entry *need = registry_find(registry, *name);
        int r = need ? registry_want_for(registry, need, entry->priority, entry->asker, false) : -1;

        if (entry->state != MODEL_QUEUED || entry->task)
            return false; /* the end of one of them has brought it on, or down, already */
        if (r < 0) {
            fail_for_want_of(registry, entry, *name, need);
            return false;
        }
        ready = ready && r == 0;
    }
    return ready;
}

bool registry_is_needed(const struct registry *registry, const struct model_entry *need)
{
    for (const struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (is_coming(e) && needs(e, need))
            return true;
    return false;
}

/* The first entry that waits for this one. */
static struct model_entry *first_waiting(const struct registry *registry,
                                         const struct model_entry *need, uint64_t after_turn)
{
    struct model_entry *first = NULL;

    for (struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (e->state == MODEL_QUEUED && !e->task && e->turn > after_turn && needs(e, need) &&
            (!first || e->turn < first->turn))
            first = e;
    return first;
}

void registry_need_changed(struct registry *registry, struct model_entry *need)
{
    uint64_t turn = 0, last = registry->turns;
    struct model_entry *entry;

    /* By their turns: what begins or fails here may change any entry. */
    while ((entry = first_waiting(registry, need, turn)) && entry->turn <= last) {
        turn = entry->turn;
        if (need->state == MODEL_FAILED)
            fail_for_want_of(registry, entry, need->name, need);
        else if (need->state == MODEL_READY)
            registry_start_queued(registry, entry);
    }
}

void registry_use_needs(struct registry *registry, const struct model_entry *entry)
{
    for (char **name = needs_of(entry); *name; name++) {
        struct model_entry *need = registry_find(registry, *name);

        if (need)
            need->last_used_us = need->idle_since_us = registry_now_us(registry);
    }
}

/* ---- the configuration ---- */

static bool has_item(const struct catalog *catalog, const char *name)
{
    for (size_t i = 0; i < catalog->n_items; i++)
        if (strcmp(catalog->items[i].name, name) == 0)
            return true;
    return false;
}

int registry_check_config(const struct config *config, struct fault *ret_fault)
{
    struct catalog *catalog = NULL;
    bool any = false;
    int r;

    for (size_t i = 0; i < config->n_models; i++)
        any = any || config->models[i].needs;
    if (!any)
        return 0;
    r = catalog_read(config, &catalog);
    if (r < 0)
        return fault_set(ret_fault, r, "cannot list the models: %s", strerror(-r));
    for (size_t i = 0; i < config->n_models && r == 0; i++)
        for (char **name = config->models[i].needs; name && *name && r == 0; name++)
            if (!has_item(catalog, *name))
                r = fault_set(ret_fault, -EINVAL,
                              "models.%.64s.needs: expected names of models, and there is no model "
                              "%.64s; put its file into a models directory or take it out",
                              config->models[i].name, *name);
    catalog_free(catalog);
    return r;
}
