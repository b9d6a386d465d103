/* Completes on a pool, in step with a test: pool-client SOCKET MODEL TIMES PAUSE_BYTES.
 *
 * In the first request it stops once PAUSE_BYTES of text have come, and before each later one: it
 * says `paused` on stdout and waits for a line on stdin. Each request's end is a line
 * `end WORD bytes N seed S failovers F created C` (WORD: the reason or the error's code), followed
 * by the N bytes and a newline. Status 1 where a request had no end. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/hearth.h"

#define MOST_BYTES (1u << 20)
#define TIMEOUT_US 40000000u
#define MAX_TOKENS 600
#define CREDIT     256
#define WORD_BYTES 32

struct story {
    char text[MOST_BYTES], end[WORD_BYTES];
    size_t bytes, pause_bytes;
    uint64_t seed;
};

static void pause_here(void)
{
    char line[16];
    printf("paused\n");
    fflush(stdout);
    if (!fgets(line, sizeof(line), stdin))
        exit(1);
}

static void hear(void *userdata, const struct hearth_reply *reply)
{
    struct story *story = userdata;
    const char *end = reply->kind == HEARTH_DONE ? reply->reason : reply->code;
    if (reply->kind != HEARTH_TOKENS) {
        snprintf(story->end, sizeof(story->end), "%s", end);
        if (reply->has_seed)
            story->seed = reply->seed;
        return;
    }
    if (reply->text_bytes > sizeof(story->text) - story->bytes)
        exit(1);
    memcpy(story->text + story->bytes, reply->text, reply->text_bytes);
    story->bytes += reply->text_bytes;
    if (story->pause_bytes > 0 && story->bytes >= story->pause_bytes) {
        story->pause_bytes = 0;
        pause_here();
    }
}

static int tell(struct hearth_pool *pool, const char *model, size_t pause_bytes)
{
    static struct story story;
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    struct hearth_pool_stats stats = {.size_of = sizeof(stats)};
    char message[HEARTH_MESSAGE_BYTES];
    story = (struct story){.pause_bytes = pause_bytes};
    request.model = model;
    request.prompt = "a dog";
    request.max_tokens = MAX_TOKENS;
    request.ignore_eos = true;
    request.temperature = 1;
    request.credit = CREDIT;
    int r = hearth_pool_complete(pool, &request, hear, &story, TIMEOUT_US);
    if (r < 0) {
        hearth_pool_get_message(pool, message);
        fprintf(stderr, "pool-client: %s\n", message);
        return r;
    }
    hearth_pool_get_stats(pool, &stats);
    printf("end %s bytes %zu seed %" PRIu64 " failovers %" PRIu64 " created %" PRIu64 "\n",
           story.end, story.bytes, story.seed, stats.failovers, stats.created);
    fwrite(story.text, 1, story.bytes, stdout);
    printf("\n");
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv)
{
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    struct hearth_pool *pool = NULL;
    if (argc != 5)
        return 2;
    options.connection.socket_path = argv[1];
    options.connection.client_name = "pool-client";
    int times = atoi(argv[3]), r = hearth_pool_new(&options, &pool);
    for (int i = 0; i < times && r == 0; i++) {
        if (i > 0)
            pause_here();
        r = tell(pool, argv[2], i == 0 ? strtoul(argv[4], NULL, 10) : 0);
    }
    hearth_pool_free(pool);
    return r < 0;
}
