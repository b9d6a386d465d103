/* The order of answers: those of a connection complete in the order of its requests
 * (batching.preserve_order).
 *
 * Completions, embeddings and tokenizations of a peer stand in a line as they came. One that ends
 * before those in front of it keeps its `done` or `error` until they have ended: text, vectors and
 * ids go as they come. What is kept is the request without its ids, text and model; it still counts
 * in limits.queue, which so bounds it. No stream waits for another's turn, only endings do: an
 * earlier one that is parked holds up later endings, never their credit or their computing.
 *
 * Kept answers go at the end of the wake-up, from answer_order_settle(), so that nobody who walks
 * over requests sees another one vanish. Hides the line. Thread: the reactor. */
#ifndef HEARTH_SERVE_ANSWER_ORDER_H
#define HEARTH_SERVE_ANSWER_ORDER_H

#include "daemon/serve/service_internal.h"

/* It takes its place behind those that its peer has asked for before. */
void answer_order_join(struct service *service, struct request *request);
/* It leaves the line, if it is in one (its peer is still known). */
void answer_order_leave(struct service *service, struct request *request);
/* It has ended. True: somebody is before it, and its answer is kept (STAGE_ANSWERED). */
bool answer_order_keep(struct service *service, struct request *request);
/* Gives the answers whose turn has come. True: there were some. */
bool answer_order_settle(struct service *service);

#endif
