/* Text budget: how much of a wake-up the reactor gives to tokenizing.
 *
 * A millisecond in all and a fifth of one for each user, by the time that texts really took; what
 * comes beyond goes to the tokenizer thread. A text that begins within the budget may end beyond
 * it, so one may be overdrawn by a text (which the caller keeps short).
 *
 * A function of what it is told; hides nothing but the sums. Thread: the reactor. */
#ifndef HEARTH_SERVE_TEXT_BUDGET_H
#define HEARTH_SERVE_TEXT_BUDGET_H

#include <stdbool.h>
#include <stdint.h>

#define TEXT_BUDGET_US         1000u
#define TEXT_BUDGET_PER_UID_US 200u

/* What was spent in a wake-up; of one that is over it counts as nothing. */
struct text_spent {
    uint64_t wakeup;
    uint64_t us;
};

struct text_budget {
    uint64_t wakeup; /* the number of the current one */
    struct text_spent all;
};

static inline void text_budget_wake(struct text_budget *budget)
{
    budget->wakeup++;
}

/* Whether another text of the user may be tokenized on the reactor now. */
bool text_budget_allows(const struct text_budget *budget, const struct text_spent *user);
/* It took so long. */
void text_budget_spend(struct text_budget *budget, struct text_spent *user, uint64_t us);

#endif
