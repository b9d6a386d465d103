/* Turns of users whose texts wait to be tokenized: one each, round and round, each user's in the
 * order in which they came.
 *
 * A line of the users' first texts, each with the user's others behind it, through fields of the
 * requests: nothing is allocated. Finding a user walks the line, which is as long as there are
 * users with texts that wait. Thread: the tokenizer thread. */
#ifndef HEARTH_SERVE_TEXT_TURNS_H
#define HEARTH_SERVE_TEXT_TURNS_H

struct request;

struct text_turns {
    struct request *first, *last;
};

void text_turns_add(struct text_turns *turns, struct request *request);
/* The text whose turn it is, or NULL; its user goes behind the others. */
struct request *text_turns_take(struct text_turns *turns);

#endif
