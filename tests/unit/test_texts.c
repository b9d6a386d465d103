/* Texts on their way to ids: whose turn it is, and how much of it the reactor does. */
#include <criterion/criterion.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/model.h"
#include "daemon/model/builtin.h"
#include "daemon/model/registry.h"
#include "daemon/serve/text_budget.h"
#include "daemon/serve/text_thread.h"
#include "daemon/serve/text_turns.h"

static struct request *text_of_user(uint32_t uid)
{
    struct request *request = request_new();

    cr_assert_not_null(request);
    request->job.uid = uid;
    return request;
}

Test(texts, users_take_turns_and_keep_their_order)
{
    static const uint32_t came[] = {1, 1, 1, 1, 2, 1, 3, 2, 1};
    static const size_t goes[] = {0, 4, 6, 1, 7, 2, 3, 5, 8};
    struct request *requests[9];
    struct text_turns turns = {0};

    for (size_t i = 0; i < 9; i++) {
        requests[i] = text_of_user(came[i]);
        text_turns_add(&turns, requests[i]);
    }
    for (size_t i = 0; i < 9; i++)
        cr_assert_eq(text_turns_take(&turns), requests[goes[i]], "turn %zu", i);
    cr_assert_null(text_turns_take(&turns));
    for (size_t i = 0; i < 9; i++)
        request_free(requests[i]);
}

Test(texts, one_who_comes_late_waits_for_one_of_a_crowd)
{
    struct request *crowd[500], *late = text_of_user(2);
    struct text_turns turns = {0};
    uint32_t before = 0, after = 0;

    for (size_t i = 0; i < 500; i++) {
        crowd[i] = text_of_user(1);
        text_turns_add(&turns, crowd[i]);
    }
    for (int i = 0; i < 10; i++)
        cr_assert_eq(text_turns_take(&turns), crowd[i]);
    text_turns_add(&turns, late);
    while (text_turns_take(&turns) != late)
        before++;
    cr_assert_leq(before, 1);
    while (text_turns_take(&turns))
        after++;
    cr_assert_eq(before + after, 490);
    for (size_t i = 0; i < 500; i++)
        request_free(crowd[i]);
    request_free(late);
}

/* Whatever comes and goes, each text comes out once. */
Test(texts, nothing_is_lost_whatever_comes_and_goes)
{
    struct text_turns turns = {0};
    uint32_t in = 0, out = 0, last[5] = {0}, n[5] = {0};
    unsigned random = 3;

    while (in < 5000 || out < in) {
        random = random * 1103515245u + 12345u;
        if (in < 5000 && random / 65536 % 5 < 3) {
            struct request *request = text_of_user(random / 1048576 % 5);
            request->max_tokens = ++n[request->job.uid];
            text_turns_add(&turns, request);
            in++;
        } else {
            struct request *request = text_turns_take(&turns);
            cr_assert_eq(request == NULL, out == in);
            if (!request)
                continue;
            cr_assert_eq(request->max_tokens, ++last[request->job.uid]);
            request_free(request);
            out++;
        }
    }
}

Test(texts, a_wake_up_has_a_bound_for_all_and_one_for_each_user)
{
    struct text_budget budget = {0};
    struct text_spent users[10] = {0};

    for (int wakeup = 0; wakeup < 3; wakeup++) {
        uint64_t all = 0;
        text_budget_wake(&budget);
        for (int i = 0; i < 10; i++) {
            uint64_t own = 0;
            while (text_budget_allows(&budget, &users[i])) {
                text_budget_spend(&budget, &users[i], 30);
                own += 30;
            }
            all += own;
            cr_assert_leq(own, TEXT_BUDGET_PER_UID_US + 30);
            cr_assert(own >= TEXT_BUDGET_PER_UID_US || all >= TEXT_BUDGET_US);
        }
        cr_assert(all >= TEXT_BUDGET_US && all <= TEXT_BUDGET_US + 30, "%lu", all);
    }
    text_budget_wake(&budget);
    for (int i = 0; i < 100000; i++)
        text_budget_spend(&budget, &users[0], 0);
    cr_assert(text_budget_allows(&budget, &users[0]), "texts that take no time cost nothing");
}

#define N_TEXTS 200u

static void count_back(void *userdata, struct request *request)
{
    uint32_t *n = userdata;

    cr_assert(request->reason != END_ERROR);
    cr_assert_null(request->text);
    cr_assert_gt(request->n_ids, 0);
    (*n)++;
}

Test(texts, all_come_back_from_the_thread_with_the_ids_of_their_text)
{
    struct gguf_source source = {.fd = -1, .memory = builtin_bytes(), .size = builtin_size()};
    struct model_load_options options = {0};
    struct model_entry entry = {0};
    struct request *requests[N_TEXTS];
    struct text_thread *thread;
    uint32_t n = 0;

    cr_assert_eq(kernels_choose(NULL, &options.kernels, NULL), 0);
    cr_assert_eq(model_load(&source, &options, NULL, &entry.model, NULL), 0);
    cr_assert_eq(text_thread_new(N_TEXTS, &thread, NULL), 0);
    for (uint32_t i = 0; i < N_TEXTS; i++) {
        requests[i] = text_of_user(i % 3);
        requests[i]->kind = i % 2 ? REQUEST_TOKENIZE : REQUEST_COMPLETE;
        requests[i]->model = &entry;
        requests[i]->text = malloc(64);
        requests[i]->text_bytes =
            (size_t)snprintf(requests[i]->text, 64, "Once upon a time %u dogs", i);
        cr_assert_eq(text_thread_submit(thread, requests[i]), 0);
    }
    while (n < N_TEXTS) {
        struct pollfd pollfd = {.fd = text_thread_fd(thread), .events = POLLIN};
        cr_assert_eq(poll(&pollfd, 1, 30000), 1, "only %u came back", n);
        text_thread_take(thread, count_back, &n);
    }
    for (uint32_t i = 0; i < N_TEXTS; i++) {
        struct request *alone = text_of_user(0);
        alone->text = malloc(64);
        alone->text_bytes = (size_t)snprintf(alone->text, 64, "Once upon a time %u dogs", i);
        cr_assert_eq(request_tokenize(alone, entry.model, i % 2), 0);
        cr_assert_eq(requests[i]->n_ids, alone->n_ids);
        cr_assert_arr_eq(requests[i]->ids, alone->ids, alone->n_ids * sizeof(int32_t));
        request_free(alone);
        request_free(requests[i]);
    }
    text_thread_free(thread);
    model_free(entry.model);
}
