/* Questions about models and state: what is answered at once from what the reactor knows.
 *
 * Hides the items that `models`, `metrics` and `status` consist of. The options are parsed.
 * Thread: the reactor. */
#ifndef HEARTH_SERVE_QUESTIONS_H
#define HEARTH_SERVE_QUESTIONS_H

#include "daemon/serve/service_internal.h"

void question_models(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options);
void question_status(struct service *service, struct peer *peer, uint64_t id);
void question_metrics(struct service *service, struct peer *peer, uint64_t id,
                      const struct request_options *options);

/* The items, as frames of a buffer. */
void question_put_model(struct wire_buffer *out, uint64_t id, const struct model_entry *entry);
void question_put_section(struct service *service, struct wire_buffer *out, uint64_t id,
                          const char *name);
void question_put_status(struct service *service, struct wire_buffer *out, uint64_t id);
/* A model's item alone, as a reply; and one of progress, for who follows its load. */
void question_reply_model(struct peer *peer, uint64_t id, const struct model_entry *entry);
void question_progress(struct request *request, const struct model_entry *entry);

#endif
