#include "daemon/serve/text_turns.h"

#include <stddef.h>

#include "daemon/serve/request.h"

static void put_last(struct text_turns *turns, struct request *head)
{
    head->text_next_user = NULL;
    if (turns->first)
        turns->last->text_next_user = head;
    else
        turns->first = head;
    turns->last = head;
}

void text_turns_add(struct text_turns *turns, struct request *request)
{
    struct request *head = turns->first;

    request->text_next = NULL;
    while (head && head->job.uid != request->job.uid)
        head = head->text_next_user;
    if (head) {
        head->text_last->text_next = request;
        head->text_last = request;
    } else {
        request->text_last = request;
        put_last(turns, request);
    }
}

struct request *text_turns_take(struct text_turns *turns)
{
    struct request *request = turns->first, *next;

    if (!request)
        return NULL;
    turns->first = request->text_next_user;
    next = request->text_next;
    if (next) {
        next->text_last = request->text_last;
        put_last(turns, next);
    }
    return request;
}
