#include "daemon/serve/rights.h"

#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/log.h"

struct rights {
    uint32_t *uids, *gids;
    size_t n_uids, n_gids;
};

static size_t count(char **names)
{
    size_t n = 0;

    while (names && names[n])
        n++;
    return n;
}

int rights_new(const struct config *config, struct rights **ret_rights)
{
    struct rights *rights = calloc(1, sizeof(*rights));
    size_t n_users = count(config->admin_users), n_groups = count(config->admin_groups);

    if (!rights)
        return -ENOMEM;
    rights->uids = calloc(n_users + 1, sizeof(*rights->uids));
    rights->gids = calloc(n_groups + 1, sizeof(*rights->gids));
    if (!rights->uids || !rights->gids) {
        rights_free(rights);
        return -ENOMEM;
    }
    for (size_t i = 0; i < n_users; i++) {
        const struct passwd *user = getpwnam(config->admin_users[i]);
        if (user)
            rights->uids[rights->n_uids++] = user->pw_uid;
        else
            log_warning("admin.users: there is no user %s; left out", config->admin_users[i]);
    }
    for (size_t i = 0; i < n_groups; i++) {
        const struct group *group = getgrnam(config->admin_groups[i]);
        if (group)
            rights->gids[rights->n_gids++] = group->gr_gid;
        else
            log_warning("admin.groups: there is no group %s; left out", config->admin_groups[i]);
    }
    *ret_rights = rights;
    return 0;
}

struct rights *rights_free(struct rights *rights)
{
    if (!rights)
        return NULL;
    free(rights->uids);
    free(rights->gids);
    free(rights);
    return NULL;
}

int rights_acting_uid(const struct peer *peer, const struct request_options *options,
                      uint32_t *ret_uid, struct refusal *ret_refusal)
{
    if (!options->on_behalf) {
        *ret_uid = peer->uid;
        return 0;
    }
    if (!peer->status_only || peer->uid != geteuid())
        return refusal_set(ret_refusal, CODE_FORBIDDEN, wire_tag_name(TAG_ON_BEHALF_OF),
                           "on-behalf-of is taken from the daemon's own user on the status socket "
                           "alone");
    *ret_uid = options->uid;
    return 0;
}

static bool among(const uint32_t *list, size_t n, uint32_t value)
{
    for (size_t i = 0; i < n; i++)
        if (list[i] == value)
            return true;
    return false;
}

static bool peer_in_groups(const struct rights *rights, const struct peer *peer)
{
    gid_t groups[PEER_MAX_GROUPS];
    socklen_t len = sizeof(groups);

    if (among(rights->gids, rights->n_gids, peer->gid))
        return true;
    if (rights->n_gids == 0 || getsockopt(peer->fd, SOL_SOCKET, SO_PEERGROUPS, groups, &len) < 0)
        return false;
    for (size_t i = 0; i < len / sizeof(*groups); i++)
        if (among(rights->gids, rights->n_gids, groups[i]))
            return true;
    return false;
}

bool rights_is_admin(const struct rights *rights, const struct peer *peer,
                     const struct request_options *options)
{
    uint32_t uid = options->on_behalf ? options->uid : peer->uid;

    if (uid == 0 || uid == geteuid() || among(rights->uids, rights->n_uids, uid))
        return true;
    if (!options->on_behalf)
        return peer_in_groups(rights, peer);
    for (size_t i = 0; i < options->n_gids; i++) {
        uint32_t gid;
        memcpy(&gid, options->gids + 4 * i, sizeof(gid));
        if (among(rights->gids, rights->n_gids, gid))
            return true;
    }
    return false;
}
