/* Generations: completions, embeddings and tokenizations, from their options to their one end.
 *
 * One is let in, waits for its model where that is not ready (waiting.h), has its text made ids on
 * the reactor or the tokenizer thread, goes to the engine thread and comes back from it, perhaps to
 * sleep (asleep.h) and go there again. Whatever stops it on the way, its client is told once.
 *
 * Hides those steps, and who may do what to a request in each stage. Thread: the reactor. */
#ifndef HEARTH_SERVE_GENERATION_H
#define HEARTH_SERVE_GENERATION_H

#include "daemon/serve/service_internal.h"

/* Lets one in, or refuses it. */
void generation_begin(struct service *service, struct peer *peer, uint64_t id,
                      enum request_kind kind, const struct request_options *options);
/* It goes on to its model, which is ready. */
void generation_start(struct service *service, struct request *request);
/* The tokenizer thread is done with it (see text_thread_take()). */
void generation_tokenized(void *userdata, struct request *request);
/* Its ids count as its user's input while it has them, instead of its text: they may be larger than
 * that was, and those of a stream that sleeps are kept as long as its reader stays away. The
 * request is not lent. Where they are too much it has failed. */
void generation_count_ids(struct service *service, struct request *request);
/* Its text goes to its client. True: a parked stream may go on. */
bool generation_text(struct service *service, struct request *request, const char *text,
                     size_t len);
/* Its client takes more text. */
void generation_credit(struct service *service, struct request *request,
                       const struct request_options *options);
/* Its parked stream was granted room. */
void generation_unpark(struct service *service, struct request *request);

/* Its client wants its end, or is gone. It may have ended, and be freed, afterwards. */
void generation_cancel(struct service *service, struct request *request);
/* The daemon ends what runs on the model, or on all where it is NULL. */
void generation_expel(struct service *service, const struct model_entry *entry);
/* Its model counts it as a use no longer. */
void generation_unuse_model(struct service *service, struct request *request);
/* It has been with its model, or has none: tells its client how it ended, now or when its turn
 * comes (answer_order.h), and frees it once nobody knows it any more. */
void generation_end(struct service *service, struct request *request);

#endif
