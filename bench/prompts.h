/* Prompts for the load generator: one text, a file's lines, or texts made up so that each has the
 * same number of tokens and they differ from the first on. */
#ifndef HEARTH_BENCH_PROMPTS_H
#define HEARTH_BENCH_PROMPTS_H

#include <stddef.h>
#include <stdint.h>

/* Tokens of a made-up prompt, BOS among them. */
#define PROMPT_TOKENS 5u
/* Most prompts, and the longest line of a file. */
#define PROMPTS_MAX 1000000u

struct prompts {
    char **texts;
    size_t n, capacity;
};

/* -errno with a sentence; what was made before a failure is given back by prompts_done(). */
int prompts_one(struct prompts *prompts, const char *text);
int prompts_file(struct prompts *prompts, const char *path, char ret_message[320]);
/* Asks the daemon at `socket_path` how many tokens candidates have (4 and BOS are wanted). */
int prompts_distinct(struct prompts *prompts, size_t n, uint64_t seed, const char *socket_path,
                     const char *model, char ret_message[320]);
void prompts_done(struct prompts *prompts);

#endif
