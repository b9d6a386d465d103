#include "daemon/serve/text_budget.h"

static uint64_t spent_us(const struct text_budget *budget, const struct text_spent *spent)
{
    return spent->wakeup == budget->wakeup ? spent->us : 0;
}

bool text_budget_allows(const struct text_budget *budget, const struct text_spent *user)
{
    return spent_us(budget, &budget->all) < TEXT_BUDGET_US &&
           spent_us(budget, user) < TEXT_BUDGET_PER_UID_US;
}

static void spend(const struct text_budget *budget, struct text_spent *spent, uint64_t us)
{
    spent->us = spent_us(budget, spent) + us;
    spent->wakeup = budget->wakeup;
}

void text_budget_spend(struct text_budget *budget, struct text_spent *user, uint64_t us)
{
    spend(budget, &budget->all, us);
    spend(budget, user, us);
}
