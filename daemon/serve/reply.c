#include "daemon/serve/reply.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "lib/cleanup.h"

int refusal_set(struct refusal *ret_refusal, enum wire_code code, const char *option,
                const char *format, ...)
{
    va_list ap;

    *ret_refusal = (struct refusal){.code = code, .option = option};
    va_start(ap, format);
    vsnprintf(ret_refusal->sentence, sizeof(ret_refusal->sentence), format, ap);
    va_end(ap);
    return -EINVAL;
}

int refusal_busy(struct refusal *ret_refusal, uint64_t retry_us, const char *format, ...)
{
    va_list ap;

    *ret_refusal = (struct refusal){.code = CODE_BUSY, .retry_after_us = retry_us};
    va_start(ap, format);
    vsnprintf(ret_refusal->sentence, sizeof(ret_refusal->sentence), format, ap);
    va_end(ap);
    return -EINVAL;
}

struct wire_buffer *reply_begin(struct peer *peer, enum wire_type type, uint64_t id)
{
    peer->tail = NULL;
    wire_begin(&peer->out, (uint16_t)type, id);
    return &peer->out;
}

void reply_end(struct peer *peer)
{
    wire_end(&peer->out); /* a failed allocation shows in out.failed: the connection is closed */
    peer->wants_flush(peer);
}

void reply_refusal(struct peer *peer, uint64_t id, const struct refusal *refusal)
{
    struct wire_buffer *out;

    if (!peer)
        return;
    out = reply_begin(peer, WIRE_ERROR, id);
    wire_put_text(out, TAG_CODE, wire_code_name(refusal->code));
    wire_put_text(out, TAG_SENTENCE, refusal->sentence);
    if (refusal->option)
        wire_put_text(out, TAG_OPTION, refusal->option);
    if (refusal->code == CODE_BUSY)
        wire_put_number(out, TAG_RETRY_AFTER_US, refusal->retry_after_us);
    reply_end(peer);
}

void reply_error(struct peer *peer, uint64_t id, enum wire_code code, const char *format, ...)
{
    struct refusal refusal = {.code = code};
    va_list ap;

    va_start(ap, format);
    vsnprintf(refusal.sentence, sizeof(refusal.sentence), format, ap);
    va_end(ap);
    reply_refusal(peer, id, &refusal);
}

void reply_done(struct peer *peer, uint64_t id)
{
    reply_begin(peer, WIRE_DONE, id);
    reply_end(peer);
}

void reply_goaway(struct peer *peer, const char *why)
{
    struct wire_buffer *out = reply_begin(peer, WIRE_GOAWAY, 0);

    wire_put_text(out, TAG_SENTENCE, why);
    reply_end(peer);
}

void reply_text_item(struct peer *peer, uint64_t id, const char *name, const char *text, size_t len)
{
    struct wire_buffer *out = reply_begin(peer, WIRE_ITEM, id);

    wire_put_text(out, TAG_NAME, name);
    wire_put_bytes(out, TAG_TEXT, text, len);
    reply_end(peer);
}

static void put_origin(struct wire_buffer *out, const struct request *request, const char *variant,
                       uint64_t fingerprint)
{
    wire_put_number(out, TAG_SEED, request->params.seed);
    wire_put_text(out, TAG_VARIANT, variant);
    wire_put_bytes(out, TAG_FINGERPRINT, &fingerprint, sizeof(fingerprint));
}

bool reply_tokens(struct request *request, const char *text, size_t len, const char *variant,
                  uint64_t fingerprint)
{
    struct peer *peer = request->peer;
    struct wire_buffer *out;

    if (peer->tail == request && wire_extend(&peer->out, text, len) == 0)
        return false;
    out = reply_begin(peer, WIRE_TOKENS, request->key.id);
    if (!request->first_sent)
        put_origin(out, request, variant, fingerprint);
    request->first_sent = true;
    wire_put_bytes(out, TAG_TEXT, text, len);
    reply_end(peer);
    peer->tail = request;
    return true;
}

static const char *reason_name(enum end_reason reason)
{
    static const char *const names[] = {[END_STOP] = "stop",
                                        [END_LENGTH] = "length",
                                        [END_CONTEXT] = "context",
                                        [END_CANCELLED] = "cancelled"};

    return names[reason];
}

static uint64_t span(uint64_t from, uint64_t to)
{
    return from && to > from ? to - from : 0;
}

void reply_ended(struct request *request, const char *variant, uint64_t fingerprint)
{
    struct wire_buffer *out;
    uint64_t first;

    if (!request->peer)
        return;
    if (request->reason == END_ERROR) {
        struct refusal refusal = {
            .code = request->code, .option = request->option, .retry_after_us = RETRY_AFTER_US};
        snprintf(refusal.sentence, sizeof(refusal.sentence), "%s",
                 request->sentence ? request->sentence : "the daemon is out of memory");
        reply_refusal(request->peer, request->key.id, &refusal);
        return;
    }
    first = request->first_token_us ? request->first_token_us : request->ended_us;
    out = reply_begin(request->peer, WIRE_DONE, request->key.id);
    wire_put_text(out, TAG_REASON, reason_name(request->reason));
    wire_put_number(out, TAG_PROMPT_TOKENS, request->n_prompt);
    wire_put_number(out, TAG_COMPLETION_TOKENS, request->n_ids - request->n_prompt);
    wire_put_number(out, TAG_QUEUED_US, span(request->ready_us, request->started_us));
    wire_put_number(out, TAG_LOAD_US, span(request->received_us, request->ready_us));
    wire_put_number(out, TAG_PREFILL_US, span(request->started_us, first));
    wire_put_number(out, TAG_DECODE_US, span(first, request->ended_us));
    put_origin(out, request, variant, fingerprint);
    reply_end(request->peer);
}
