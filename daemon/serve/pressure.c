#include "daemon/serve/pressure.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "daemon/serve/batcher.h"
#include "daemon/serve/request.h"
#include "lib/cleanup.h"

/* Requests that have a sequence. */
struct holders {
    struct request *first, *last;
};

/* A user; kept for the daemon's life, as the batcher keeps his engine time. */
struct payer {
    uint32_t uid;
    struct kv_account account;
    struct holders parked; /* of his, the longest parked first */
    struct payer *next;
};

struct pressure {
    struct pressure_options options;
    struct payer *payers;
    struct holders running; /* that are not parked: who may give way after those */
    struct request *parked_first, *parked_last; /* with a sequence or without */
    uint32_t n_holders;                         /* running and parked */
    uint64_t n_parkings, parked_bytes;
    /* Is in an open step and gives way when that is over; one at a time. */
    struct request *doomed;
};

int pressure_new(const struct pressure_options *options, struct pressure **ret_pressure)
{
    struct pressure *pressure = calloc(1, sizeof(*pressure));

    if (!pressure)
        return -ENOMEM;
    pressure->options = *options;
    *ret_pressure = pressure;
    return 0;
}

struct pressure *pressure_free(struct pressure *pressure)
{
    if (!pressure)
        return NULL;
    while (pressure->payers) {
        struct payer *payer = pressure->payers;

        pressure->payers = payer->next;
        free(payer);
    }
    free(pressure);
    return NULL;
}

/* ---- users ---- */

static struct payer *payer_find(const struct pressure *pressure, uint32_t uid)
{
    struct payer *payer = pressure->payers;

    while (payer && payer->uid != uid)
        payer = payer->next;
    return payer;
}

static struct payer *payer_get(struct pressure *pressure, uint32_t uid)
{
    struct payer *payer = payer_find(pressure, uid);

    if (payer)
        return payer;
    payer = calloc(1, sizeof(*payer));
    if (!payer)
        return NULL;
    payer->uid = uid;
    payer->next = pressure->payers;
    pressure->payers = payer;
    return payer;
}

uint64_t pressure_uid_bytes(const struct pressure *pressure, uint32_t uid)
{
    const struct payer *payer = payer_find(pressure, uid);

    return payer ? payer->account.bytes : 0;
}

void pressure_stats(const struct pressure *pressure, struct pressure_stats *ret_stats)
{
    struct pressure_stats stats = {0};

    for (const struct payer *payer = pressure->payers; payer; payer = payer->next)
        stats.most_uid_bytes = MAX(stats.most_uid_bytes, payer->account.bytes);
    stats.parked_bytes = pressure->parked_bytes;
    *ret_stats = stats;
}

/* ---- who has a sequence, who is parked ---- */

static struct holders *holders_of(struct pressure *pressure, struct request *request)
{
    return request->kv.is_parked ? &request->kv.payer->parked : &pressure->running;
}

/* It has a sequence. */
static void holder_add(struct pressure *pressure, struct request *request)
{
    struct holders *holders = holders_of(pressure, request);

    request->kv.previous = holders->last;
    request->kv.next = NULL;
    if (holders->last)
        holders->last->kv.next = request;
    else
        holders->first = request;
    holders->last = request;
    pressure->n_holders++;
    if (request->kv.is_parked)
        pressure->parked_bytes += sequence_bytes(request->sequence);
}

static void holder_remove(struct pressure *pressure, struct request *request)
{
    struct holders *holders = holders_of(pressure, request);

    if (request->kv.previous)
        request->kv.previous->kv.next = request->kv.next;
    else
        holders->first = request->kv.next;
    if (request->kv.next)
        request->kv.next->kv.previous = request->kv.previous;
    else
        holders->last = request->kv.previous;
    request->kv.previous = request->kv.next = NULL;
    pressure->n_holders--;
    if (request->kv.is_parked)
        pressure->parked_bytes -= sequence_bytes(request->sequence);
}

/* It is parked, or it is not: among those that have a sequence it stands elsewhere. */
static void set_parked(struct pressure *pressure, struct request *request, bool parked)
{
    if (request->sequence)
        holder_remove(pressure, request);
    request->kv.is_parked = parked;
    if (request->sequence)
        holder_add(pressure, request);
}

static void release(struct pressure *pressure, struct request *request)
{
    if (pressure->doomed == request)
        pressure->doomed = NULL;
    if (!request->sequence)
        return;
    holder_remove(pressure, request);
    request->sequence = sequence_retire(request->sequence, request->ids);
}

void pressure_end(struct pressure *pressure, struct request *request)
{
    release(pressure, request);
    pressure_unpark(pressure, request);
}

void pressure_park(struct pressure *pressure, struct request *request)
{
    if (request->kv.is_parked)
        return;
    set_parked(pressure, request, true);
    request->kv.parked_serial = ++pressure->n_parkings;
    request->kv.parked_us = clock_now_us(pressure->options.clock);
    request->kv.parked_next = NULL;
    request->kv.parked_previous = pressure->parked_last;
    if (pressure->parked_last)
        pressure->parked_last->kv.parked_next = request;
    else
        pressure->parked_first = request;
    pressure->parked_last = request;
}

void pressure_unpark(struct pressure *pressure, struct request *request)
{
    if (!request->kv.is_parked)
        return;
    set_parked(pressure, request, false);
    if (request->kv.parked_previous)
        request->kv.parked_previous->kv.parked_next = request->kv.parked_next;
    else
        pressure->parked_first = request->kv.parked_next;
    if (request->kv.parked_next)
        request->kv.parked_next->kv.parked_previous = request->kv.parked_previous;
    else
        pressure->parked_last = request->kv.parked_previous;
    request->kv.parked_previous = request->kv.parked_next = NULL;
}

/* ---- giving way ---- */

static void give_way(struct pressure *pressure, struct request *request)
{
    request->kv.n_computed = MAX(request->kv.n_computed, request->job.fed);
    request->kv.short_us = clock_now_us(pressure->options.clock);
    release(pressure, request);
    batcher_preempt(pressure->options.batcher, &request->job);
    metrics_add(pressure->options.metrics, M_PREEMPTIONS, 1);
}

/* The parked one that gives way first: of this user, or of any (NULL). */
static struct request *find_parked(const struct pressure *pressure, const struct payer *payer)
{
    struct request *longest = NULL;

    if (payer)
        return payer->parked.first;
    for (payer = pressure->payers; payer; payer = payer->next) {
        struct request *first = payer->parked.first;

        if (first && (!longest || first->kv.parked_serial < longest->kv.parked_serial))
            longest = first;
    }
    return longest;
}

static bool take_parked(struct pressure *pressure, const struct payer *payer)
{
    struct request *parked = find_parked(pressure, payer);

    if (parked)
        give_way(pressure, parked);
    return parked != NULL;
}

static const struct request *oldest_holder(const struct pressure *pressure)
{
    const struct request *oldest = NULL;

    for (const struct request *r = pressure->running.first; r; r = r->kv.next)
        if (!oldest || r->job.serial < oldest->job.serial)
            oldest = r;
    return oldest;
}

/* Whether `a` gives way before `b` to a request for the model: of the user who holds more, where he
 * has one of the same model (a slab of another's comes free only with its last page), the younger.
 */
static bool gives_way_before(const struct request *a, const struct request *b,
                             const struct runner_model *model)
{
    uint64_t a_bytes = a->kv.payer->account.bytes, b_bytes = b->kv.payer->account.bytes;
    bool a_same = a->runner_model == model, b_same = b->runner_model == model;

    if (a->kv.payer != b->kv.payer && a_bytes != b_bytes)
        return a_bytes > b_bytes;
    if (a_same != b_same)
        return a_same;
    return a->job.serial > b->job.serial;
}

/* Who gives way to one that grows: anybody but the oldest. NULL: nobody. */
static struct request *victim_of_growth(const struct pressure *pressure,
                                        const struct request *request)
{
    const struct request *oldest = oldest_holder(pressure);
    struct request *victim = NULL;

    for (struct request *r = pressure->running.first; r; r = r->kv.next)
        if (r != oldest && (!victim || gives_way_before(r, victim, request->runner_model)))
            victim = r;
    return victim;
}

/* What a request needs that wants to begin. */
struct need {
    const struct request *request;
    uint64_t bytes;
    bool waited;                  /* for memory, and for long */
    const struct request *oldest; /* that runs; only looked for where it has waited */
};

/* Whether `r` gives way to one that begins: of a user who holds more than his share, where the
 * other stays within his. To one that has waited for long also who came later, and those of a user
 * who holds more than the other's would then, but for the oldest that runs. */
static bool gives_way_to(const struct pressure *pressure, const struct request *r,
                         const struct need *need)
{
    const struct payer *own = need->request->kv.payer;
    uint64_t bytes = r->kv.payer->account.bytes, wanted = own->account.bytes + need->bytes;

    if (r->job.known < r->kv.safe_tokens)
        return false;
    if (r->kv.payer != own && bytes > pressure->options.per_uid_bytes &&
        wanted <= pressure->options.per_uid_bytes)
        return true;
    return need->waited && (r->job.serial > need->request->job.serial ||
                            (r->kv.payer != own && bytes > wanted && r != need->oldest));
}

/* Who gives way to one that begins; with `own` only of its own user. NULL: nobody. */
static struct request *victim_of_beginning(const struct pressure *pressure, const struct need *need,
                                           bool own)
{
    struct request *victim = NULL;

    for (struct request *r = pressure->running.first; r; r = r->kv.next)
        if (gives_way_to(pressure, r, need) && (!own || r->kv.payer == need->request->kv.payer) &&
            (!victim || gives_way_before(r, victim, need->request->runner_model)))
            victim = r;
    return victim;
}

/* Whether there would be enough if all gave way that do; shared tiles count for each who has them,
 * so it may turn out not to be. */
static bool would_do(const struct pressure *pressure, const struct need *need)
{
    struct engine_kv_stats kv;
    uint64_t bytes;

    engine_kv_stats(pressure->options.engine, &kv);
    bytes = kv.budget_bytes - kv.used_bytes;
    for (const struct request *r = pressure->running.first; r; r = r->kv.next)
        if (gives_way_to(pressure, r, need))
            bytes += sequence_bytes(r->sequence);
    return bytes >= need->bytes;
}

/* It gives way now, or when its step is over. False: memory has not come free. */
static bool evict(struct pressure *pressure, struct request *victim)
{
    if (!victim || pressure->doomed)
        return false;
    if (victim->job.chunk > 0) {
        pressure->doomed = victim;
        return false;
    }
    give_way(pressure, victim);
    return true;
}

void pressure_step_over(struct pressure *pressure)
{
    struct request *doomed = pressure->doomed;

    if (!doomed || doomed->job.chunk > 0)
        return;
    pressure->doomed = NULL;
    /* One that was parked meanwhile is taken when somebody asks again. */
    if (!doomed->kv.is_parked)
        give_way(pressure, doomed);
}

/* ---- begin and grow ---- */

static uint32_t most_tokens(const struct request *request, uint32_t context_tokens)
{
    uint64_t most = request->n_prompt;

    if (request->kind == REQUEST_COMPLETE)
        most += request->max_tokens;
    return (uint32_t)MIN(most, context_tokens);
}

/* With `bytes` more its user has more than his share, while others wait. Who has nothing may have
 * one, however large: alone it runs, and beside others it takes turns with them. */
static bool over_share(const struct pressure *pressure, const struct request *request,
                       uint64_t bytes)
{
    const struct payer *payer = request->kv.payer;

    return payer->account.bytes > 0 &&
           payer->account.bytes + bytes > pressure->options.per_uid_bytes &&
           batcher_others_wait(pressure->options.batcher, payer->uid);
}

/* Somebody gives way to a request that begins. False: nobody does now. */
static bool make_way(struct pressure *pressure, struct request *request, struct need *need)
{
    struct request *victim;

    if (take_parked(pressure, NULL))
        return true;
    if (need->waited && !would_do(pressure, need)) {
        /* Nobody goes in vain: it waits for those that came before it, and asks again then. */
        request->kv.tried_us = clock_now_us(pressure->options.clock);
        need->waited = false;
    }
    victim = victim_of_beginning(pressure, need, false);
    return evict(pressure, victim);
}

/* Its user comes down to what lets it begin. False: he does not now. */
static bool make_way_within(struct pressure *pressure, const struct need *need)
{
    if (take_parked(pressure, need->request->kv.payer))
        return true;
    return need->waited && evict(pressure, victim_of_beginning(pressure, need, true));
}

/* A reservation of whole pages: what sequence_room() says then is what a step may fill. */
static uint32_t whole_pages(uint32_t n_tokens)
{
    return (n_tokens + KV_TILE - 1) / KV_TILE * KV_TILE;
}

/* It has its memory. */
static void begun(struct pressure *pressure, struct request *request)
{
    uint64_t now = clock_now_us(pressure->options.clock);

    request->job.fed = sequence_length(request->sequence);
    request->job.room = sequence_room(request->sequence);
    if (request->kv.short_us && now - request->kv.short_us >= BATCHER_PATIENCE_US)
        request->kv.safe_tokens = request->n_ids + PRESSURE_TURN_TOKENS;
    request->kv.short_us = 0;
    holder_add(pressure, request);
}

/* It got none; what the batcher is told. */
static int denied(struct pressure *pressure, struct request *request, int error)
{
    /* Whoever has been computed before must not fail: others' ends bring memory. */
    if (error == -ENOMEM && request->kv.n_computed > 0 && pressure->n_holders > 0)
        error = -EAGAIN;
    if ((error == -EAGAIN || error == -EDQUOT) && !request->kv.short_us)
        request->kv.short_us = clock_now_us(pressure->options.clock);
    return error;
}

/* For memory, since it was first denied it or last tried in vain to take it from others. */
static bool has_waited(const struct pressure *pressure, const struct request *request)
{
    uint64_t since_us = MAX(request->kv.short_us, request->kv.tried_us);

    return request->kv.short_us &&
           clock_now_us(pressure->options.clock) - since_us >= BATCHER_PATIENCE_US;
}

int pressure_begin(struct pressure *pressure, struct request *request, struct model *model)
{
    uint32_t context_tokens = engine_context_tokens(pressure->options.engine, model);
    uint32_t most = most_tokens(request, context_tokens);
    struct sequence_start start = {
        .reserve_tokens = whole_pages(MIN(request->n_ids + PRESSURE_MARGIN_TOKENS, most)),
        .most_tokens = most,
        /* An embedding is the mean of all hidden states: it has to compute them. */
        .share = pressure->options.prefix_cache && request->kind == REQUEST_COMPLETE,
        .pools = request->kind == REQUEST_EMBED,
        .owner = pressure->options.share_with_all ? 0 : request->job.uid,
        .ids = request->ids,
        .n_ids = request->n_ids,
    };
    struct need need = {
        .request = request,
        .bytes = engine_kv_bytes(pressure->options.engine, model, start.reserve_tokens),
        .waited = has_waited(pressure, request),
    };
    int r;

    if (need.waited)
        need.oldest = oldest_holder(pressure);
    if (request->n_ids > context_tokens)
        return -ENOSPC;
    request->kv.payer = payer_get(pressure, request->job.uid);
    if (!request->kv.payer)
        return denied(pressure, request, -ENOMEM);
    start.account = &request->kv.payer->account;
    while (over_share(pressure, request, need.bytes))
        if (!make_way_within(pressure, &need))
            return denied(pressure, request, -EDQUOT);
    do {
        r = sequence_begin(pressure->options.engine, model, &start, &request->sequence,
                           &request->prefix_wait);
    } while (r == -EAGAIN && make_way(pressure, request, &need));
    if (r < 0)
        return denied(pressure, request, r);
    begun(pressure, request);
    return 0;
}

int pressure_grow(struct pressure *pressure, struct request *request)
{
    int r;

    while ((r = sequence_reserve(request->sequence, whole_pages(request->job.known))) == -EAGAIN) {
        struct request *victim;

        if (take_parked(pressure, NULL))
            continue;
        victim = victim_of_growth(pressure, request);
        if (!evict(pressure, victim) || victim == request)
            return r;
    }
    if (r < 0) {
        /* No memory for the table of its pages: it gives back what it has and tries again. */
        give_way(pressure, request);
        return r;
    }
    request->job.room = sequence_room(request->sequence);
    return 0;
}

/* ---- parked for long ---- */

struct request *pressure_overdue(struct pressure *pressure, uint64_t now_us, uint64_t *ret_next_us)
{
    struct request *first = pressure->parked_first;

    *ret_next_us = UINT64_MAX;
    if (!first)
        return NULL;
    *ret_next_us = first->kv.parked_us + pressure->options.park_timeout_us;
    if (*ret_next_us > now_us)
        return NULL;
    if (first->sequence)
        give_way(pressure, first);
    return first;
}
