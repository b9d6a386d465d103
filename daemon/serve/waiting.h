/* Requests that wait for their models.
 *
 * Each model that is on its way has a line of those that wait for it, in the order of their coming;
 * names that nobody knows have one, too, until a look through the directories is over. When the
 * model is ready the line goes on to it; when it is lost, or a deadline passes, each is told.
 *
 * Hides the lines. Thread: the reactor's. */
#ifndef HEARTH_SERVE_WAITING_H
#define HEARTH_SERVE_WAITING_H

#include "daemon/serve/service_internal.h"

/* Lets a request wait for a model; NULL: for the look that may bring its wanted_name. It is refused
 * and gone where there is no memory. */
void waiting_begin(struct service *service, struct request *request, struct model_entry *entry);
/* Takes it out of its line, which goes with its last. */
void waiting_leave(struct service *service, struct request *request);
/* Brings a generation to its model, which is loaded where it is not; waiting_want() counts it among
 * the model's requests first. */
void waiting_bring(struct service *service, struct request *request, struct model_entry *entry);
void waiting_want(struct service *service, struct request *request, struct model_entry *entry);
/* The name is not known; a look through the directories may bring it. */
void waiting_look(struct service *service, struct request *request, const char *name);
/* Ends a generation that never came to its model. */
void waiting_end(struct service *service, struct request *request);
/* The same with an error; orders, too. */
void waiting_refuse(struct service *service, struct request *request, enum wire_code code,
                    const char *sentence);

/* The model is ready: its line goes on. */
void waiting_ready(struct service *service, struct model_entry *entry);
/* It will not be: its line ends. */
void waiting_lost(struct service *service, struct model_entry *entry, enum wire_code code,
                  const char *sentence);
/* Tells those who follow its load how far it is. */
void waiting_progress(struct service *service, struct model_entry *entry);
/* A look through the directories is over. */
void waiting_looked(struct service *service);
/* Ends those whose deadline has passed, and finds the next to come. */
void waiting_expire(struct service *service, uint64_t now);

#endif
