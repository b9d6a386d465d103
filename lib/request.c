/* What goes out: each public request function puts its options into one frame. */
#include <endian.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "lib/client.h"
#include "lib/sized.h"

static const struct hearth_generate generate_defaults = HEARTH_GENERATE_INIT;

static int refuse(struct hearth *h, const char *sentence)
{
    return fault_set(&h->message, -EINVAL, "%s", sentence);
}

/* The caller's struct in this library's size: its own where they agree, else a copy. */
static int generate_view(struct hearth *h, const struct hearth_generate *given,
                         struct hearth_generate *copy, const struct hearth_generate **ret_view)
{
    if (given->size == sizeof(*given)) {
        *ret_view = given;
        return 0;
    }
    *copy = generate_defaults;
    *ret_view = copy;
    return sized_read(&sized_generate, given, copy, &h->message);
}

static int generate_check(struct hearth *h, const struct hearth_generate *g)
{
    if (!isfinite(g->temperature) || !isfinite(g->top_p) || !isfinite(g->min_p) ||
        !isfinite(g->repeat_penalty))
        return refuse(h, "a sampling option is not a finite number");
    if (g->n_stops > WIRE_MAX_STOPS)
        return refuse(h, "more than 8 stop strings");
    for (size_t i = 0; i < g->n_stops; i++) {
        size_t len = strlen(g->stops[i]);
        if (len == 0 || len > WIRE_MAX_STOP_BYTES)
            return refuse(h, "a stop string must have 1 to 64 bytes");
    }
    if (g->n_ids > UINT32_MAX / sizeof(int32_t))
        return refuse(h, "more ids than a frame can hold");
    return 0;
}

static void put_ids(struct wire_buffer *out, const int32_t *ids, size_t n)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    wire_put_bytes(out, TAG_IDS, ids, n * sizeof(*ids));
#else
#error "token ids are sent in little-endian order: swap them here"
#endif
}

static void put_input(struct wire_buffer *out, uint16_t type, const struct hearth_generate *g)
{
    if (g->model)
        wire_put_text(out, TAG_MODEL, g->model);
    if (type == WIRE_CHAT)
        for (size_t i = 0; i < g->n_messages; i++) {
            wire_put_text(out, TAG_ROLE, g->messages[i].role);
            wire_put_text(out, TAG_CONTENT, g->messages[i].content);
        }
    else if (g->prompt)
        wire_put_bytes(out, TAG_PROMPT, g->prompt,
                       g->prompt_bytes ? g->prompt_bytes : strlen(g->prompt));
    else
        put_ids(out, g->ids, g->n_ids);
}

static void put_real_unless(struct wire_buffer *out, uint16_t tag, float value, float standard)
{
    if (value != standard)
        wire_put_real(out, tag, value);
}

/* Only what differs from the protocol's defaults is sent. */
static void put_sampling(struct wire_buffer *out, const struct hearth_generate *g)
{
    const struct hearth_generate *d = &generate_defaults;
    if (g->max_tokens != d->max_tokens)
        wire_put_number(out, TAG_MAX_TOKENS, g->max_tokens);
    put_real_unless(out, TAG_TEMPERATURE, g->temperature, d->temperature);
    if (g->top_k != d->top_k)
        wire_put_number(out, TAG_TOP_K, g->top_k);
    put_real_unless(out, TAG_TOP_P, g->top_p, d->top_p);
    put_real_unless(out, TAG_MIN_P, g->min_p, d->min_p);
    put_real_unless(out, TAG_REPEAT_PENALTY, g->repeat_penalty, d->repeat_penalty);
    if (g->has_seed)
        wire_put_number(out, TAG_SEED, g->seed);
    for (size_t i = 0; i < g->n_stops; i++)
        wire_put_text(out, TAG_STOP, g->stops[i]);
    if (g->ignore_eos)
        wire_put_number(out, TAG_IGNORE_EOS, 1);
}

static void put_service(struct wire_buffer *out, const struct hearth_generate *g)
{
    if (g->deadline_us)
        wire_put_number(out, TAG_DEADLINE_US, g->deadline_us);
    if (g->batch_priority)
        wire_put_number(out, TAG_PRIORITY, 1);
    if (g->keep_alive_us)
        wire_put_number(out, TAG_KEEP_ALIVE_US, g->keep_alive_us);
    if (g->skip_bytes)
        wire_put_number(out, TAG_SKIP_BYTES, g->skip_bytes);
    if (g->fingerprint_bytes)
        wire_put_bytes(out, TAG_FINGERPRINT, g->fingerprint, g->fingerprint_bytes);
}

static void put_stream(struct hearth *h, struct request *request, const struct hearth_generate *g)
{
    uint64_t credit = g->credit ? g->credit : h->initial_credit;
    if (!g->manual_credit) {
        credit = MAX(credit, (uint64_t)CLIENT_MIN_CREDIT_BYTES);
        request->credit_step = credit / 2;
    }
    if (g->credit)
        wire_put_number(&h->out, TAG_CREDIT, credit);
    if (g->no_stream)
        wire_put_number(&h->out, TAG_STREAM, 0);
}

static int generate(struct hearth *h, uint16_t type, const struct hearth_generate *given,
                    hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    struct hearth_generate copy;
    const struct hearth_generate *g = NULL;
    struct request *request;
    int r = generate_view(h, given, &copy, &g);
    if (r < 0)
        return r;
    if (type == WIRE_CHAT ? g->n_messages == 0 : !g->prompt && g->n_ids == 0)
        return refuse(h, type == WIRE_CHAT ? "a chat needs at least one message"
                                           : "a request needs a prompt or token ids");
    r = generate_check(h, g);
    if (r < 0)
        return r;
    r = client_request_begin(h, type, fn, userdata, &request);
    if (r < 0)
        return r;
    put_input(&h->out, type, g);
    if (type != WIRE_EMBED) {
        put_sampling(&h->out, g);
        put_stream(h, request, g);
    }
    put_service(&h->out, g);
    return client_request_end(h, request, ret_id);
}

int hearth_complete(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                    void *userdata, uint64_t *ret_id)
{
    return generate(h, WIRE_COMPLETE, request, fn, userdata, ret_id);
}

int hearth_chat(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                void *userdata, uint64_t *ret_id)
{
    return generate(h, WIRE_CHAT, request, fn, userdata, ret_id);
}

int hearth_embed(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                 void *userdata, uint64_t *ret_id)
{
    return generate(h, WIRE_EMBED, request, fn, userdata, ret_id);
}

int hearth_tokenize(struct hearth *h, const char *model, const char *text, size_t text_bytes,
                    hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    struct request *request;
    int r = client_request_begin(h, WIRE_TOKENIZE, fn, userdata, &request);
    if (r < 0)
        return r;
    if (model)
        wire_put_text(&h->out, TAG_MODEL, model);
    wire_put_bytes(&h->out, TAG_PROMPT, text, text_bytes);
    return client_request_end(h, request, ret_id);
}

/* A request of at most one word and one flag. */
static int simple(struct hearth *h, uint16_t type, uint16_t word_tag, const char *word,
                  uint16_t flag_tag, hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    struct request *request;
    int r = client_request_begin(h, type, fn, userdata, &request);
    if (r < 0)
        return r;
    if (word)
        wire_put_text(&h->out, word_tag, word);
    if (flag_tag)
        wire_put_number(&h->out, flag_tag, 1);
    return client_request_end(h, request, ret_id);
}

int hearth_models(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                  uint64_t *ret_id)
{
    return simple(h, WIRE_MODELS, TAG_MODEL, model, 0, fn, userdata, ret_id);
}

int hearth_warm(struct hearth *h, const char *model, bool wait, hearth_reply_fn fn, void *userdata,
                uint64_t *ret_id)
{
    return simple(h, WIRE_WARM, TAG_MODEL, model, wait ? TAG_WAIT : 0, fn, userdata, ret_id);
}

int hearth_warm_fd(struct hearth *h, int fd, bool wait, hearth_reply_fn fn, void *userdata,
                   uint64_t *ret_id)
{
    struct request *request;
    uint64_t id;
    int r = client_pass_fd(h, fd);
    if (r < 0)
        return r;
    r = client_request_begin(h, WIRE_WARM, fn, userdata, &request);
    if (r == 0) {
        if (wait)
            wire_put_number(&h->out, TAG_WAIT, 1);
        r = client_request_end(h, request, &id);
    }
    if (r < 0) {
        close(TAKE_FD(h->passing_fd));
        return r;
    }
    h->passing_at = h->out.frame_at;
    h->passing_end = h->out.len;
    if (ret_id)
        *ret_id = id;
    return 0;
}

int hearth_unload(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                  uint64_t *ret_id)
{
    return simple(h, WIRE_UNLOAD, TAG_MODEL, model, 0, fn, userdata, ret_id);
}

int hearth_set(struct hearth *h, const struct hearth_set *given, hearth_reply_fn fn, void *userdata,
               uint64_t *ret_id)
{
    struct request *request;
    struct hearth_set set = HEARTH_SET_INIT;
    int r = sized_read(&sized_set, given, &set, &h->message);
    if (r < 0)
        return r;
    if (!set.model)
        return refuse(h, "a model is needed");
    r = client_request_begin(h, WIRE_SET, fn, userdata, &request);
    if (r < 0)
        return r;
    wire_put_text(&h->out, TAG_MODEL, set.model);
    if (set.has_preload)
        wire_put_number(&h->out, TAG_PRELOAD, set.preload);
    if (set.has_pinned)
        wire_put_number(&h->out, TAG_PINNED, set.pinned);
    if (set.has_keep_alive)
        wire_put_number(&h->out, TAG_KEEP_ALIVE_US, set.keep_alive_us);
    return client_request_end(h, request, ret_id);
}

int hearth_hold(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                uint64_t *ret_id)
{
    return simple(h, WIRE_HOLD, TAG_MODEL, model, 0, fn, userdata, ret_id);
}

int hearth_reload(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    return simple(h, WIRE_RELOAD, 0, NULL, 0, fn, userdata, ret_id);
}

int hearth_subscribe(struct hearth *h, const char *what, hearth_reply_fn fn, void *userdata,
                     uint64_t *ret_id)
{
    return simple(h, WIRE_SUBSCRIBE, TAG_NAME, what, 0, fn, userdata, ret_id);
}

int hearth_act_for(struct hearth *h, uint32_t uid, const uint32_t *gids, size_t n_gids)
{
    if (n_gids > HEARTH_MAX_GROUPS)
        return fault_set(&h->message, -E2BIG, "more than %u groups: leave some out",
                         HEARTH_MAX_GROUPS);
    size_t bytes = sizeof(uint32_t) * (1 + n_gids);
    uint8_t *acting = malloc(bytes);
    if (!acting)
        return fault_set(&h->message, -ENOMEM, "no memory for an identity");
    for (size_t i = 0; i <= n_gids; i++) {
        uint32_t word = htole32(i == 0 ? uid : gids[i - 1]);
        memcpy(acting + sizeof(word) * i, &word, sizeof(word));
    }
    free(h->acting);
    h->acting = acting;
    h->acting_bytes = bytes;
    return 0;
}

void hearth_act_for_self(struct hearth *h)
{
    free(h->acting);
    h->acting = NULL;
    h->acting_bytes = 0;
}

int hearth_status(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    return simple(h, WIRE_STATUS, 0, NULL, 0, fn, userdata, ret_id);
}

int hearth_metrics(struct hearth *h, const char *section, hearth_reply_fn fn, void *userdata,
                   uint64_t *ret_id)
{
    return simple(h, WIRE_METRICS, TAG_NAME, section, 0, fn, userdata, ret_id);
}

int hearth_null(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    return simple(h, WIRE_NULL, 0, NULL, 0, fn, userdata, ret_id);
}

int hearth_ping(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id)
{
    return simple(h, WIRE_PING, 0, NULL, 0, fn, userdata, ret_id);
}
