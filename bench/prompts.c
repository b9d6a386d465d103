#include "bench/prompts.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/random.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

/* Candidates asked about at once, and at most in all for each prompt wanted. */
#define CANDIDATES       256u
#define CANDIDATES_RATIO 200u
#define ANSWER_US        30000000u

static int add(struct prompts *prompts, const char *text, size_t len)
{
    char *copy;

    if (prompts->n == PROMPTS_MAX)
        return -E2BIG;
    if (prompts->n == prompts->capacity) {
        size_t capacity = MAX(2 * prompts->capacity, (size_t)16);
        char **texts = reallocarray(prompts->texts, capacity, sizeof(*texts));
        if (!texts)
            return -ENOMEM;
        prompts->texts = texts;
        prompts->capacity = capacity;
    }
    copy = strndup(text, len);
    if (!copy)
        return -ENOMEM;
    prompts->texts[prompts->n++] = copy;
    return 0;
}

int prompts_one(struct prompts *prompts, const char *text)
{
    return add(prompts, text, strlen(text));
}

int prompts_file(struct prompts *prompts, const char *path, char ret_message[320])
{
    _cleanup_free_ char *line = NULL;
    size_t capacity = 0;
    ssize_t len;
    FILE *file = fopen(path, "re");
    int r = 0;

    if (!file) {
        r = -errno;
        snprintf(ret_message, 320, "cannot read %s: %s", path, strerror(errno));
        return r;
    }
    while (r == 0 && (len = getline(&line, &capacity, file)) >= 0) {
        while (len > 0 && (line[len - 1] == '\n' || line[len - 1] == '\r'))
            len--;
        if (len > 0)
            r = add(prompts, line, (size_t)len);
    }
    fclose(file);
    if (r == 0 && prompts->n == 0)
        r = -ENODATA;
    if (r < 0)
        snprintf(ret_message, 320, "cannot take the prompts of %s: %s", path, strerror(-r));
    return r;
}

/* Words of random letters: their first letters, and so their first tokens, differ. */
static void make_candidate(uint64_t *state, char text[24])
{
    size_t len = 3 + random_next(state) % 10;

    for (size_t i = 0; i < len; i++)
        text[i] = i > 1 && i + 1 < len && random_next(state) % 5 == 0
                      ? ' '
                      : (char)('a' + random_next(state) % 26);
    text[len] = 0;
}

struct candidate {
    char text[24];
    size_t n_ids;
    char *message; /* of the first error; 320 bytes */
};

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct candidate *candidate = userdata;

    if (reply->kind == HEARTH_ITEM)
        candidate->n_ids = reply->n_ids;
    else if (reply->kind == HEARTH_ERROR && !candidate->message[0])
        snprintf(candidate->message, 320, "%s", reply->sentence);
}

/* Asks about one round of candidates and keeps those that have the right number of tokens. */
static int one_round(struct prompts *prompts, size_t n, uint64_t *state, struct hearth *hearth,
                     const char *model, char ret_message[320])
{
    struct candidate candidates[CANDIDATES];
    int r = 0;

    for (size_t i = 0; i < CANDIDATES && r == 0; i++) {
        make_candidate(state, candidates[i].text);
        candidates[i].n_ids = 0;
        candidates[i].message = ret_message;
        r = hearth_tokenize(hearth, model, candidates[i].text, strlen(candidates[i].text), on_reply,
                            &candidates[i], NULL);
    }
    while (r >= 0 && hearth_in_flight(hearth) > 0)
        r = hearth_wait(hearth, ANSWER_US);
    if (r < 0)
        snprintf(ret_message, 320, "%s", hearth_message(hearth));
    else if (ret_message[0])
        r = -EIO;
    for (size_t i = 0; i < CANDIDATES && r >= 0 && prompts->n < n; i++)
        if (candidates[i].n_ids == PROMPT_TOKENS - 1)
            r = add(prompts, candidates[i].text, strlen(candidates[i].text));
    return r;
}

static int compare(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Drops what stands twice. */
static void drop_doubles(struct prompts *prompts)
{
    size_t kept = 0;

    qsort(prompts->texts, prompts->n, sizeof(*prompts->texts), compare);
    for (size_t i = 0; i < prompts->n; i++) {
        if (kept > 0 && strcmp(prompts->texts[kept - 1], prompts->texts[i]) == 0)
            free(prompts->texts[i]);
        else
            prompts->texts[kept++] = prompts->texts[i];
    }
    prompts->n = kept;
}

static void shuffle(struct prompts *prompts, uint64_t *state)
{
    for (size_t i = prompts->n; i > 1; i--) {
        size_t j = random_next(state) % i;
        char *swap = prompts->texts[i - 1];
        prompts->texts[i - 1] = prompts->texts[j];
        prompts->texts[j] = swap;
    }
}

int prompts_distinct(struct prompts *prompts, size_t n, uint64_t seed, const char *socket_path,
                     const char *model, char ret_message[320])
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    struct hearth *hearth;
    uint64_t asked = 0;
    int r;

    ret_message[0] = 0;
    options.socket_path = socket_path;
    r = hearth_connect(&options, &hearth, ret_message);
    if (r < 0)
        return r;
    while (r >= 0 && prompts->n < n && asked < n * CANDIDATES_RATIO + CANDIDATES) {
        r = one_round(prompts, n, &seed, hearth, model, ret_message);
        asked += CANDIDATES;
        if (r >= 0 && prompts->n == n)
            drop_doubles(prompts);
    }
    hearth_free(hearth);
    if (r >= 0 && prompts->n < n) {
        snprintf(ret_message, 320, "found only %zu prompts of %u tokens, %zu were asked for",
                 prompts->n, PROMPT_TOKENS, n);
        r = -ENODATA;
    }
    shuffle(prompts, &seed);
    return r < 0 ? r : 0;
}

void prompts_done(struct prompts *prompts)
{
    for (size_t i = 0; i < prompts->n; i++)
        free(prompts->texts[i]);
    free(prompts->texts);
}
