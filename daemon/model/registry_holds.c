/* What keeps a model loaded: its use, holds, a pin; and for how long after that. */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>

#include "daemon/model/holds.h"
#include "daemon/model/registry_internal.h"

/* ---- use ---- */

/* The user's row, taken from who used the model longest ago where all are taken; NULL where all are
 * in use. */
static struct model_user *user_row(struct model_entry *entry, uint32_t uid)
{
    struct model_user *oldest = NULL;

    for (uint32_t i = 0; i < entry->n_users; i++) {
        struct model_user *user = &entry->users[i];
        if (user->uid == uid)
            return user;
        if (user->in_use == 0 && (!oldest || user->at_us < oldest->at_us))
            oldest = user;
    }
    if (entry->n_users < MODEL_USERS)
        oldest = &entry->users[entry->n_users++];
    if (oldest)
        *oldest = (struct model_user){.uid = uid};
    return oldest;
}

static void note_user(struct model_entry *entry, uint32_t uid, uint64_t now, bool begins)
{
    struct model_user *user = user_row(entry, uid);

    if (!user)
        return; /* enough others use it */
    user->at_us = now;
    if (begins)
        user->in_use++;
    else if (user->in_use > 0)
        user->in_use--;
}

void registry_use(struct registry *registry, struct model_entry *entry, uint32_t uid)
{
    entry->in_use++;
    entry->unused = entry->shrunk = false;
    entry->last_used_us = registry_now_us(registry);
    registry_use_needs(registry, entry);
    note_user(entry, uid, entry->last_used_us, true);
}

/* One thing less uses it: it may have to go. */
static void end_use(struct registry *registry, struct model_entry *entry)
{
    assert(entry->in_use > 0);
    entry->in_use--;
    if (entry->in_use > 0)
        return;
    if (entry->state == MODEL_DRAINING)
        registry->options.ops.detach(registry->options.ops.userdata, entry);
    else if (entry->file && entry->gone)
        registry_file_idle(registry, entry);
    else
        registry_start_waiting(registry);
    registry_foresee(registry);
}

void registry_begin_line(struct model_entry *entry)
{
    entry->in_use++;
}

void registry_end_line(struct registry *registry, struct model_entry *entry)
{
    end_use(registry, entry);
}

void registry_unuse(struct registry *registry, struct model_entry *entry, uint32_t uid,
                    uint64_t keep_alive_us)
{
    entry->last_used_us = entry->idle_since_us = registry_now_us(registry);
    entry->shortened_us = keep_alive_us;
    entry->shortened_by = uid;
    note_user(entry, uid, entry->last_used_us, false);
    end_use(registry, entry);
}

bool registry_used_by_others(const struct registry *registry, const struct model_entry *entry,
                             uint32_t uid)
{
    uint64_t now = registry_now_us(registry);

    for (uint32_t i = 0; i < entry->n_users; i++) {
        const struct model_user *user = &entry->users[i];
        if (user->uid != uid && (user->in_use > 0 || now - user->at_us < MODEL_RECENT_US))
            return true;
    }
    return false;
}

/* ---- what keeps it ---- */

int registry_hold(struct registry *registry, struct model_entry *entry, uint32_t uid, bool bounded,
                  struct fault *ret_fault)
{
    const struct config *config = registry->options.config;
    uint64_t most = registry->options.memory_per_uid_bytes;
    bool kept = entry->pinned || entry->holds > 0; /* by others, or counted already */
    uint64_t bytes = holds_bytes(registry->holds, uid) + (kept ? 0 : registry_need_bytes(entry));

    if (holds_of(registry->holds, uid) >= config->limits.holds_per_uid)
        return fault_set(ret_fault, -EDQUOT,
                         "this user holds as many models as allowed (limits.holds_per_uid is %u); "
                         "let go of one",
                         config->limits.holds_per_uid);
    if (bounded && bytes > most)
        return fault_set(ret_fault, -ENOSPC,
                         "with %s this user's holds would keep %" PRIu64
                         " MiB, and limits.memory_per_uid is %" PRIu64 " MiB; let go of one",
                         entry->name, bytes >> 20, most >> 20);
    if (holds_take(registry->holds, entry, uid) < 0)
        return fault_set(ret_fault, -ENOMEM, "no memory for a hold");
    return 0;
}

void registry_release(struct registry *registry, struct model_entry *entry, uint32_t uid)
{
    holds_give(registry->holds, entry, uid);
    entry->idle_since_us = registry_now_us(registry);
    if (entry->holds > 0)
        return;
    if (entry->dismissed)
        registry_dismiss(registry, entry);
    else if (entry->state == MODEL_READY)
        registry_start_waiting(registry);
}

void registry_dismiss(struct registry *registry, struct model_entry *entry)
{
    entry->wanted = false;
    entry->dismissed = entry->holds > 0;
    if (!entry->dismissed)
        registry_unload(registry, entry);
}

bool registry_held_by_others(const struct registry *registry, const struct model_entry *entry,
                             uint32_t uid)
{
    return holds_by_others(registry->holds, entry, uid);
}

void registry_set_pinned(struct registry *registry, struct model_entry *entry, bool pinned)
{
    entry->pinned = pinned;
    if (!pinned)
        registry_start_waiting(registry);
}

void registry_set_keep_alive(struct registry *registry, struct model_entry *entry,
                             uint64_t keep_alive_us)
{
    (void)registry;
    entry->keep_alive_us = keep_alive_us;
}

uint64_t registry_keep_alive_us(const struct registry *registry, const struct model_entry *entry)
{
    uint64_t own = entry->keep_alive_us, wish = entry->shortened_us;

    /* A request speaks for its user alone: nobody shortens what others use. */
    if (wish == 0 || (own > 0 && own < wish) ||
        registry_used_by_others(registry, entry, entry->shortened_by))
        return own;
    return wish;
}

bool registry_kept_long_enough(const struct registry *registry, const struct model_entry *entry)
{
    uint64_t keep_alive_us;

    if (entry->in_use > 0 || entry->holds > 0 || entry->pinned)
        return false;
    keep_alive_us = registry_keep_alive_us(registry, entry);
    return keep_alive_us > 0 && registry_now_us(registry) - entry->idle_since_us > keep_alive_us;
}
