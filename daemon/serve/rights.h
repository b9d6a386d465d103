/* Rights: who may do what.
 *
 * Identity is what the kernel says of a peer (SO_PEERCRED, SO_PEERGROUPS). Administrators are root,
 * the daemon's own uid, and the users and groups of `admin` in the configuration, looked up once.
 * Hides the look-ups. Thread: the reactor. */
#ifndef HEARTH_SERVE_RIGHTS_H
#define HEARTH_SERVE_RIGHTS_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/config.h"
#include "daemon/serve/admission.h"
#include "daemon/serve/peer.h"

struct rights;

/* Names of the configuration that do not exist are named in the log and left out. */
int rights_new(const struct config *config, struct rights **ret_rights);
struct rights *rights_free(struct rights *rights);

/* The uid a request acts for: the peer's own, or the one it names with `on-behalf-of` where it may.
 * -EINVAL: see the refusal. */
int rights_acting_uid(const struct peer *peer, const struct request_options *options,
                      uint32_t *ret_uid, struct refusal *ret_refusal);
/* Whether that user is an administrator. */
bool rights_is_admin(const struct rights *rights, const struct peer *peer,
                     const struct request_options *options);

#endif
