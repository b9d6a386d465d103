/* Users' own files as models: a descriptor that came with a `warm` frame, and who may see what it
 * becomes.
 *
 * Hides the rules about descriptors. Thread: the reactor, which never waits for such a file. */
#ifndef HEARTH_SERVE_FILES_H
#define HEARTH_SERVE_FILES_H

#include "daemon/serve/service_internal.h"

/* A frame came with the descriptor peer->file_fd: -EINVAL, the connection must end. */
int files_check(struct peer *peer, uint16_t type, struct refusal *ret_refusal);
/* `warm` of the file in peer->file_fd, which is taken over. */
void files_warm(struct service *service, struct peer *peer, uint64_t id,
                const struct request_options *options);

/* Whether the model is there for this user: others' files are not. */
bool files_may_see(const struct service *service, const struct peer *peer,
                   const struct request_options *options, const struct model_entry *entry);
/* registry_find() as this user sees it. */
struct model_entry *files_find_model(const struct service *service, const struct peer *peer,
                                     const struct request_options *options, const char *name);

#endif
