#include "daemon/serve/files.h"

#include <errno.h>
#include <unistd.h>

#include "daemon/serve/orders.h"
#include "daemon/serve/standing.h"
#include "lib/cleanup.h"

bool service_takes_file(const struct service *service, const struct peer *peer)
{
    return !peer->status_only && !service->draining &&
           registry_takes_file(service->registry, peer->uid);
}

void service_drop_file(struct service *service, uint32_t uid, int fd)
{
    registry_drop_file(service->registry, uid, fd);
}

/* The daemon's own uid is hearthfs, which shows what it sees to everybody; but root is root. */
static bool sees_all(const struct service *service, const struct peer *peer,
                     const struct request_options *options)
{
    uint32_t uid = options->on_behalf ? options->uid : peer->uid;

    return rights_is_admin(service->rights, peer, options) && (uid == 0 || uid != geteuid());
}

bool files_may_see(const struct service *service, const struct peer *peer,
                   const struct request_options *options, const struct model_entry *entry)
{
    uint32_t uid = options->on_behalf ? options->uid : peer->uid;

    return !entry->file || entry->file->uid == uid || sees_all(service, peer, options);
}

struct model_entry *files_find_model(const struct service *service, const struct peer *peer,
                                     const struct request_options *options, const char *name)
{
    struct model_entry *entry = registry_find(service->registry, name);

    return entry && files_may_see(service, peer, options, entry) ? entry : NULL;
}

int files_check(struct peer *peer, uint16_t type, struct refusal *ret_refusal)
{
    if (type != WIRE_WARM)
        return refusal_set(ret_refusal, CODE_BAD_FRAME, NULL,
                           "a file's descriptor goes with a warm frame alone");
    if (peer->file_fd >= 0 && registry_check_file(peer->file_fd, &peer->file_bytes) < 0)
        return refusal_set(ret_refusal, CODE_BAD_FRAME, NULL,
                           "the descriptor is not of a regular file that was opened for reading "
                           "alone");
    return 0;
}

void files_warm(struct service *service, struct peer *peer, uint64_t id,
                const struct request_options *options)
{
    struct passed_file file = {
        .fd = TAKE_FD(peer->file_fd), .uid = peer->uid, .bytes = peer->file_bytes, .holder = peer};
    struct model_entry *entry = NULL;
    struct refusal refusal;
    struct fault fault;
    int r;

    if (options->model[0]) {
        refusal_set(&refusal, CODE_BAD_REQUEST, "model",
                    "model: a file that is passed gets its name from the daemon; leave it out");
        reply_refusal(peer, id, &refusal);
        service_drop_file(service, peer->uid, file.fd);
        return;
    }
    r = registry_add_file(service->registry, &file, &entry, &fault);
    if (r < 0) {
        standing_refuse(service, peer, id, r, &fault);
        return;
    }
    r = registry_want_for(service->registry, entry, LOAD_WARM, peer->uid, false);
    if (r < 0) {
        reply_error(peer, id, entry->code, "%s", entry->error);
        return;
    }
    entry->wanted = true;
    order_follow(service, peer, id, entry, options);
}
