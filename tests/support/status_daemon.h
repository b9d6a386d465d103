/* A daemon's status side, made up for tests: a thread that listens on a main socket and its status
 * socket and answers hello, ping, status, models, metrics, warm, unload, set, hold and subscribe
 * from what the test has told it. It pushes values to who has subscribed to them when the test
 * changes one.
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
/* The code with which warm, unload, set and hold end; NULL: done. */
void status_daemon_refuse(struct status_daemon *daemon, const char *code);
/* Sends goaway to everybody who is there now. */
void status_daemon_go_away(struct status_daemon *daemon);
/* Closes every connection, keeps listening. */
void status_daemon_hang_up(struct status_daemon *daemon);
/* Refuses to push values, as an older daemon does. */
void status_daemon_push(struct status_daemon *daemon, bool push);
/* Sends an event to who has subscribed; `lost` > 0: that many are missing. */
void status_daemon_event(struct status_daemon *daemon, const char *text, uint64_t lost);
/* Ends every hold with a code. */
void status_daemon_break_holds(struct status_daemon *daemon, const char *code);
/* Holds there are now. */
uint64_t status_daemon_holds(struct status_daemon *daemon);
/* In whose name the last order came: "self", or its uid and gids, separated by blanks. */
void status_daemon_get_caller(struct status_daemon *daemon, char *ret_text, size_t size);
/* Requests of a type seen so far; hellos count connections. */
uint64_t status_daemon_count(struct status_daemon *daemon, enum wire_type type);

#endif
