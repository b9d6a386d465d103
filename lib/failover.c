/* A request that outlives its connection: run on the pool, and sent again where the connection
 * breaks. The same request with the same seed gives the same text, so what was delivered is named
 * in `skip_bytes` and computed again without being sent; the fingerprint says whether "the same"
 * still holds. Vectors and token ids come in one piece, and are just asked for again. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/client.h"
#include "lib/pool.h"
#include "lib/sized.h"

/* A request that ends the daemon must not end it for ever. */
#define MAX_FAILOVERS 3u
/* How often a daemon that has just gone is looked for. */
#define LOOK_FIRST_US 5000u
#define LOOK_MOST_US  200000u
/* How long the end of a cancelled request is waited for, so that its connection can be kept. */
#define CANCEL_US       1000000u
#define MAX_FINGERPRINT 64u

enum ending {
    RUNNING,
    ENDED,   /* the caller has had the end */
    BROKEN,  /* nobody said how it ended: to be sent again */
    CHANGED, /* what runs now would give another text */
    DROPPED, /* cancelled, and the caller has not had the end */
};

/* One call of hearth_pool_complete() or the like, over all its attempts. */
struct job {
    struct hearth_pool *pool;
    struct pool_call call; /* has the connection of this attempt */
    uint16_t type;         /* WIRE_COMPLETE, WIRE_CHAT, WIRE_EMBED, WIRE_TOKENIZE */
    struct hearth_generate request;
    hearth_reply_fn fn;
    void *userdata;
    uint64_t began_us, deadline_us;
    uint64_t given_skip_bytes, given_deadline_us; /* as the caller's request has them */
    uint64_t delivered_bytes, delivered_items;
    uint64_t items; /* that have come in this attempt */
    bool origin;    /* seed and fingerprint are known */
    uint8_t fingerprint[MAX_FINGERPRINT];
    size_t fingerprint_bytes;
    bool checked;       /* this attempt's fingerprint is the one that was asked for */
    bool resumed;       /* this attempt goes on behind delivered text */
    enum ending ending; /* of this attempt */
    bool passed_on;     /* the daemon has been told to stop */
    struct fault why;   /* of the last break */
    uint32_t failovers;
};

static void deliver(struct job *job, const struct hearth_reply *reply)
{
    if (job->fn)
        job->fn(job->userdata, reply);
}

/* An end that the daemon did not say. */
static int end_with(struct job *job, enum wire_code code, const char *sentence)
{
    struct hearth_reply reply = {
        .kind = HEARTH_ERROR, .code = wire_code_name(code), .sentence = sentence};
    deliver(job, &reply);
    return 0;
}

/* ---- what comes in ---- */

/* Keeps what a repetition needs, or holds a repetition against it. False where it does not match.
 */
static bool take_origin(struct job *job, const struct hearth_reply *reply)
{
    if (job->checked || !reply->fingerprint)
        return true;
    if (job->resumed) {
        job->checked = reply->fingerprint_bytes == job->fingerprint_bytes &&
                       memcmp(reply->fingerprint, job->fingerprint, job->fingerprint_bytes) == 0 &&
                       (!reply->has_seed || reply->seed == job->request.seed);
        return job->checked;
    }
    job->checked = true;
    job->origin = reply->has_seed && reply->fingerprint_bytes <= sizeof(job->fingerprint);
    if (!job->origin)
        return true;
    job->request.seed = reply->seed;
    job->request.has_seed = true;
    job->fingerprint_bytes = reply->fingerprint_bytes;
    memcpy(job->fingerprint, reply->fingerprint, reply->fingerprint_bytes);
    return true;
}

static void take_tokens(struct job *job, const struct hearth_reply *reply)
{
    if (!take_origin(job, reply)) {
        job->ending = CHANGED;
        return;
    }
    if (job->resumed && !job->checked) {
        job->ending = CHANGED; /* text of unknown origin */
        return;
    }
    struct hearth_reply tokens = *reply;
    if (job->resumed) {
        /* The caller's stream has begun already. */
        tokens.has_seed = false;
        tokens.seed = 0;
        tokens.variant = NULL;
        tokens.fingerprint = NULL;
        tokens.fingerprint_bytes = 0;
        if (tokens.text_bytes == 0)
            return;
    }
    job->delivered_bytes += tokens.text_bytes;
    deliver(job, &tokens);
}

static void take_error(struct job *job, const struct hearth_reply *reply)
{
    bool goes = strcmp(reply->code, wire_code_name(CODE_SHUTTING_DOWN)) == 0;
    if (goes) /* the word for goaway where only the request has been told */
        job->call.connection->going_away = true;
    if (goes || (reply->lost && job->call.connection->error == -ECONNRESET)) {
        fault_set(&job->why, 0, "%s", reply->sentence);
        job->ending = BROKEN;
        return;
    }
    /* The same request was taken before: what is refused now is the fingerprint, or one of the
     * other two options that make it a repetition. */
    if (job->resumed && strcmp(reply->code, wire_code_name(CODE_BAD_REQUEST)) == 0) {
        job->ending = CHANGED;
        return;
    }
    job->ending = ENDED;
    deliver(job, reply);
}

/* What came of an embedding or a tokenizing before it broke does not come again. */
static void take_item(struct job *job, const struct hearth_reply *reply)
{
    if (job->items++ < job->delivered_items)
        return;
    job->delivered_items++;
    deliver(job, reply);
}

static void take_reply(void *userdata, const struct hearth_reply *reply)
{
    struct job *job = userdata;
    if (job->ending != RUNNING)
        return;
    if (job->call.cancelled) {
        if (reply->kind == HEARTH_DONE || reply->kind == HEARTH_ERROR)
            job->ending = DROPPED;
    } else if (reply->kind == HEARTH_TOKENS) {
        take_tokens(job, reply);
    } else if (reply->kind == HEARTH_ERROR) {
        take_error(job, reply);
    } else if (reply->kind == HEARTH_DONE && !take_origin(job, reply)) {
        job->ending = CHANGED;
    } else if (reply->kind == HEARTH_DONE) {
        job->ending = ENDED;
        deliver(job, reply);
    } else {
        take_item(job, reply);
    }
}

/* ---- one attempt ---- */

/* The request as it must be asked now. -ETIME where its own deadline is over. */
static int prepare(struct job *job)
{
    struct hearth_generate *request = &job->request;
    job->ending = RUNNING;
    job->checked = false;
    job->items = 0;
    job->resumed = job->delivered_bytes > 0;
    if (job->resumed) {
        request->skip_bytes = job->given_skip_bytes + job->delivered_bytes;
        request->fingerprint = job->fingerprint;
        request->fingerprint_bytes = job->fingerprint_bytes;
    }
    if (job->given_deadline_us) {
        uint64_t gone = client_now_us() - job->began_us;
        if (job->failovers > 0 && gone >= job->given_deadline_us)
            return -ETIME;
        request->deadline_us = job->given_deadline_us - (job->failovers > 0 ? gone : 0);
    }
    return 0;
}

static uint64_t time_left(const struct job *job)
{
    uint64_t now = client_now_us();
    if (job->deadline_us == UINT64_MAX)
        return UINT64_MAX;
    return job->deadline_us > now ? job->deadline_us - now : 0;
}

static int ask(struct job *job, struct hearth *h, uint64_t *ret_id)
{
    const struct hearth_generate *request = &job->request;
    switch (job->type) {
    case WIRE_CHAT: return hearth_chat(h, request, take_reply, job, ret_id);
    case WIRE_EMBED: return hearth_embed(h, request, take_reply, job, ret_id);
    case WIRE_TOKENIZE:
        return hearth_tokenize(h, request->model, request->prompt, request->prompt_bytes,
                               take_reply, job, ret_id);
    default: return hearth_complete(h, request, take_reply, job, ret_id);
    }
}

/* Asks the daemon to stop what has been cancelled in a callback, and gives it some time for it. */
static void pass_on_cancel(struct job *job, struct hearth *h, uint64_t id)
{
    if (!job->call.cancelled || job->passed_on)
        return;
    job->passed_on = true;
    hearth_cancel(h, id);
    job->deadline_us = MIN(job->deadline_us, client_now_us() + CANCEL_US);
}

/* Runs the request on one connection: 0 with the attempt's ending, or a negative errno. */
static int attempt(struct job *job)
{
    struct hearth *h = job->call.connection;
    uint64_t id;
    int r = ask(job, h, &id);
    if (r == -ESHUTDOWN || r == -ECONNRESET) {
        fault_set(&job->why, 0, "%s", hearth_message(h));
        job->ending = BROKEN;
        return 0;
    }
    if (r < 0) {
        pool_set_message(job->pool, hearth_message(h));
        return r;
    }
    /* Ends with the request, the connection or the deadline. */
    while (job->ending == RUNNING) {
        pass_on_cancel(job, h, id);
        r = hearth_wait(h, time_left(job));
        if (job->ending == RUNNING && time_left(job) == 0) {
            pool_set_message(job->pool, "the request did not end in time: its connection is "
                                        "closed, which cancels it");
            return -ETIMEDOUT;
        }
        if (job->ending == RUNNING && r < 0 && r != -EINTR)
            return r;
    }
    return 0;
}

/* ---- from one attempt to the next ---- */

/* A connection for the next attempt. A daemon that has been there, or says that it goes, is given
 * time to come back. */
static int connect_again(struct job *job)
{
    uint64_t pause = LOOK_FIRST_US;
    /* Ends at POOL_RESTART_US. */
    for (;;) {
        int r = pool_call_acquire(job->pool, &job->call, time_left(job));
        if (r >= 0 || !pool_daemon_may_return(job->pool, r) || time_left(job) == 0)
            return r;
        pool_call_pause(job->pool, &job->call, MIN(pause, time_left(job)));
        pause = MIN(pause * 2, (uint64_t)LOOK_MOST_US);
    }
}

/* Whether the broken request is to be sent again; where not, the caller has its end. */
static bool try_again(struct job *job)
{
    bool possible = job->delivered_bytes == 0 || job->origin;
    if (possible && job->failovers < MAX_FAILOVERS) {
        job->failovers++;
        pool_count_failover(job->pool);
        return true;
    }
    struct hearth_reply reply = {.kind = HEARTH_ERROR,
                                 .code = wire_code_name(CODE_INTERNAL),
                                 .sentence = job->why.text,
                                 .lost = true};
    deliver(job, &reply);
    return false;
}

static int run(struct job *job)
{
    do {
        int r = connect_again(job);
        if (r < 0)
            return r;
        r = prepare(job);
        if (r == 0)
            r = attempt(job);
        pool_call_release(job->pool, &job->call);
        if (job->call.cancelled && job->ending != ENDED) {
            pool_set_message(job->pool, "the request was cancelled");
            return -ECANCELED;
        }
        if (r == -ETIME)
            return end_with(job, CODE_DEADLINE,
                            "the deadline passed while the request was sent again");
        if (r < 0)
            return r;
        if (job->ending == CHANGED)
            return end_with(job, CODE_SHUTTING_DOWN,
                            "the daemon was replaced by one that would go on with another text: "
                            "ask again from the beginning");
    } while (job->ending == BROKEN && try_again(job));
    return 0;
}

static int generate(struct hearth_pool *pool, uint16_t type, const struct hearth_generate *request,
                    hearth_reply_fn fn, void *userdata, uint64_t timeout_us)
{
    struct job job = {.pool = pool,
                      .type = type,
                      .request = HEARTH_GENERATE_INIT,
                      .fn = fn,
                      .userdata = userdata};
    int r = sized_read(&sized_generate, request, &job.request, &job.why);
    if (r < 0) {
        pool_set_message(pool, job.why.text);
        return r;
    }
    if (job.request.manual_credit) {
        pool_set_message(pool, "manual_credit needs a connection of one's own: acquire one");
        return -EINVAL;
    }
    job.began_us = client_now_us();
    if (__builtin_add_overflow(job.began_us, timeout_us, &job.deadline_us))
        job.deadline_us = UINT64_MAX;
    job.given_skip_bytes = job.request.skip_bytes;
    job.given_deadline_us = job.request.deadline_us;
    pool_call_begin(pool, &job.call, userdata);
    r = run(&job);
    pool_call_end(pool, &job.call);
    return r;
}

int hearth_pool_complete(struct hearth_pool *pool, const struct hearth_generate *request,
                         hearth_reply_fn fn, void *userdata, uint64_t timeout_us)
{
    return generate(pool, WIRE_COMPLETE, request, fn, userdata, timeout_us);
}

int hearth_pool_chat(struct hearth_pool *pool, const struct hearth_generate *request,
                     hearth_reply_fn fn, void *userdata, uint64_t timeout_us)
{
    return generate(pool, WIRE_CHAT, request, fn, userdata, timeout_us);
}

int hearth_pool_embed(struct hearth_pool *pool, const struct hearth_generate *request,
                      hearth_reply_fn fn, void *userdata, uint64_t timeout_us)
{
    return generate(pool, WIRE_EMBED, request, fn, userdata, timeout_us);
}

int hearth_pool_tokenize(struct hearth_pool *pool, const char *model, const char *text,
                         size_t text_bytes, hearth_reply_fn fn, void *userdata, uint64_t timeout_us)
{
    struct hearth_generate request = HEARTH_GENERATE_INIT;
    request.model = model;
    request.prompt = text;
    request.prompt_bytes = text_bytes;
    return generate(pool, WIRE_TOKENIZE, &request, fn, userdata, timeout_us);
}
