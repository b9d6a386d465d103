/* A connector: one attempt to connect to the daemon, on a thread of its own.
 *
 * Connecting and the exchange of hellos can take as long as a daemon takes to start, or for ever
 * where it is stopped; the loop that serves files must not wait for that. The attempt ends with a
 * descriptor becoming readable. At most one attempt a socket is under way at a time (the link sees
 * to that), and each ends by its timeout.
 *
 * Hides: the thread. It and the caller share the attempt; whoever lets go last frees it, so that an
 * attempt can be abandoned without waiting for it. */
#ifndef HEARTH_FS_CONNECTOR_H
#define HEARTH_FS_CONNECTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "lib/hearth.h"

struct connector;

int connector_start(const char *socket_path, bool status_socket, uint64_t timeout_us,
                    struct connector **ret_connector);
/* Readable once the attempt is over. */
int connector_fd(const struct connector *connector);
/* -EINPROGRESS, or how it ended: 0 and the connection, which is the caller's from then on, or
 * hearth_connect()'s error. To be asked once after the end. */
int connector_result(struct connector *connector, struct hearth **ret_hearth);
/* Lets go; a connection that was not taken is closed. Returns NULL. */
struct connector *connector_free(struct connector *connector);

#endif
