/* Holds: who keeps which model loaded.
 *
 * A table of (model, user) pairs with how many holds each has, and the sums that limits need. Hides
 * the table. Thread: the reactor. */
#ifndef HEARTH_MODEL_HOLDS_H
#define HEARTH_MODEL_HOLDS_H

#include <stdbool.h>
#include <stdint.h>

struct holds;
struct model_entry;

int holds_new(struct holds **ret_holds);
/* Returns NULL. */
struct holds *holds_free(struct holds *holds);

/* One more; counted in entry->holds, too. -ENOMEM. */
int holds_take(struct holds *holds, struct model_entry *entry, uint32_t uid);
/* One that was taken less. */
void holds_give(struct holds *holds, struct model_entry *entry, uint32_t uid);

/* All holds of a user. */
uint32_t holds_of(const struct holds *holds, uint32_t uid);
/* Whether somebody other than the user holds the model. */
bool holds_by_others(const struct holds *holds, const struct model_entry *entry, uint32_t uid);
/* Memory of the models that nothing but this user's holds keeps: neither a pin nor anybody else. */
uint64_t holds_bytes(const struct holds *holds, uint32_t uid);

#endif
