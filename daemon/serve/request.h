/* A request's state: what is known of it from its frame to its end.
 *
 * Owned by the reactor, lent to the engine thread between runner_submit() and the RUNNER_ENDED
 * event. Each group of fields says whose it is in that time. */
#ifndef HEARTH_SERVE_REQUEST_H
#define HEARTH_SERVE_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/engine.h"
#include "daemon/engine/sampler.h"
#include "daemon/serve/batcher.h"
#include "daemon/serve/pressure.h"
#include "daemon/serve/streaming.h"
#include "lib/hash.h"
#include "lib/wire.h"

struct peer;
struct account_entry;
struct model_entry;
struct runner_model;

enum request_kind {
    REQUEST_COMPLETE,
    REQUEST_EMBED,
    REQUEST_TOKENIZE,
    REQUEST_WARM, /* with `wait`: follows a load */
    REQUEST_HOLD,
    REQUEST_RELOAD,
    REQUEST_SUBSCRIBE,
    REQUEST_ORDER, /* about a model that a look through the directories may bring */
};

/* Whether it is one about models, not one for a model's work. */
static inline bool request_is_order(enum request_kind kind)
{
    return kind >= REQUEST_WARM;
}

enum request_stage {
    STAGE_NEW,        /* in no list, with no thread */
    STAGE_LOADING,    /* waits for its model */
    STAGE_TOKENIZING, /* its text is with the tokenizer thread */
    STAGE_ENGINE,     /* lent to the engine thread */
    STAGE_ANSWERED,   /* ended; its answer is kept until its turn (answer_order.h) */
    STAGE_ASLEEP,     /* its reader is away, and the engine thread has handed it back */
    STAGE_STANDING,   /* stays until something happens: a hold, a reload, a subscription */
};

enum end_reason { END_STOP, END_LENGTH, END_CONTEXT, END_CANCELLED, END_ERROR };

struct request_key {
    uint64_t connection; /* peer->number */
    uint64_t id;
};

struct request {
    /* Reactor's throughout. */
    UT_hash_handle hh; /* among all live requests, by key */
    struct request_key key;
    struct peer *peer;                         /* NULL once the client is gone */
    struct request *peer_previous, *peer_next; /* the client's live requests; those that are over */
    struct request *model_previous, *model_next; /* those that wait for the model, or that stand */
    struct request *line_previous, *line_next;   /* the client's whose answers go in order */
    bool in_line;
    struct account_entry *account; /* the uid's */
    struct model_entry *model;     /* counted in its in_use; NULL: none now */
    enum request_kind kind;
    enum request_stage stage;
    bool cancelled;         /* its client asked for the end, or is gone */
    bool expelled;          /* its end was asked for by the daemon */
    char *wanted_name;      /* of a model not known on arrival, or let go of; NULL else */
    bool first_sent;        /* the first `tokens` frame has gone */
    uint32_t messages_sent; /* to the engine thread */
    uint32_t late;          /* of these, answered by RUNNER_LATE */
    bool over;              /* freed once all of them are answered */
    uint32_t n_counted;     /* generated tokens that its model was told of */
    uint64_t keep_alive_us; /* wished for; 0: nothing */
    uint64_t look;          /* reload: the number of the one it waits for */
    void *reader;           /* of a subscription: the place it has among the readers */
    bool values;            /* a subscription to values, not to events */
    uint16_t order;         /* the frame's type; its body is the text */
    size_t input_bytes;     /* counted against limits.input_bytes: its text, then its ids */

    /* Set before the request is lent, then read by both. */
    char *text; /* the prompt until it is tokenized */
    size_t text_bytes;
    struct sampler_params params;
    struct stream_stops *stops; /* NULL: none */
    uint32_t max_tokens;
    bool ignore_eos;
    bool has_fingerprint; /* of the stream that this one continues */
    uint64_t fingerprint;
    uint64_t received_us, ready_us /* when its model was ready */, submitted_us;
    struct runner_model *runner_model;

    /* The tokenizer thread's while lent: the user's next text; and of his first one, his last and
     * the next user's first. */
    struct request *text_next, *text_last, *text_next_user;

    /* The engine thread's while lent. */
    struct request *lent_previous, *lent_next; /* all that are lent */
    struct job job;
    struct sequence *sequence;
    struct prefix_wait prefix_wait; /* while held: for what */
    struct holding kv;
    int32_t *ids; /* prompt, then what was generated */
    uint32_t n_prompt, n_ids, ids_capacity;
    uint64_t started_us, first_token_us, ended_us;
    float *vector; /* embed: n_vector floats, malloc'd */
    uint32_t n_vector;
    enum end_reason reason; /* with END_ERROR the code and the sentence */
    enum wire_code code;
    const char *option;      /* the option that the error is about; NULL: none */
    char *sentence;          /* malloc'd; NULL: the code alone (out of memory) */
    uint32_t messages_taken; /* while it was lent */
    bool handed_back;
    bool ended; /* nothing more is computed; text may still wait for credit */

    /* Shared as its own header says. */
    struct stream stream;
};

struct request *request_new(void);
struct request *request_free(struct request *request);
/* Notes the failure that ends it (the first one stays). */
__attribute__((format(printf, 3, 4))) void
request_fail(struct request *request, enum wire_code code, const char *format, ...);
static inline struct request *job_request(struct job *job)
{
    return (struct request *)((char *)job - offsetof(struct request, job));
}

#endif
