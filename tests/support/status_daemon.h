/* A daemon's status side, made up for tests: a thread that listens on a main socket and its status
 * socket and answers hello, status, models, metrics, warm and unload from what the test has told
 * it.
 *
 * Hides: sockets, frames, the thread. All functions may be called from the test's thread at any
 * time; what they change holds for the next request. */
#ifndef HEARTH_TESTS_SUPPORT_STATUS_DAEMON_H
#define HEARTH_TESTS_SUPPORT_STATUS_DAEMON_H

#include <stdbool.h>
#include <stdint.h>

#include "lib/wire.h"

struct status_daemon;

/* Listens on PATH and PATH.status, with one cold model, `alpha`, of 1,000 bytes. Aborts the test on
 * failure. */
struct status_daemon *status_daemon_start(const char *path);
/* Listens on PATH alone; the status socket comes with the first connection there, as with a daemon
 * that is started by it. */
struct status_daemon *status_daemon_start_activated(const char *path);
/* Closes everything, removes the sockets. NULL is allowed; returns NULL. */
struct status_daemon *status_daemon_stop(struct status_daemon *daemon);

/* Gives its one model another name. */
void status_daemon_set_model(struct status_daemon *daemon, const char *name);
void status_daemon_set_state(struct status_daemon *daemon, const char *state);
/* Reads, but gives no answer and no hello until it is unmuted; then it answers all at once. */
void status_daemon_mute(struct status_daemon *daemon, bool mute);
/* The code with which warm and unload end; NULL: done. */
void status_daemon_refuse(struct status_daemon *daemon, const char *code);
/* Sends goaway to everybody who is there now. */
void status_daemon_go_away(struct status_daemon *daemon);
/* Closes every connection, keeps listening. */
void status_daemon_hang_up(struct status_daemon *daemon);
/* Requests of a type seen so far; hellos count connections. */
uint64_t status_daemon_count(struct status_daemon *daemon, enum wire_type type);

#endif
