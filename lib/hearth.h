/* libhearth: talk to the local inference daemon.
 *
 * A connection (`struct hearth`) carries many requests at once; each has an id and a callback that
 * receives its replies in order: any number of HEARTH_TOKENS and HEARTH_ITEM, then exactly one
 * HEARTH_DONE or HEARTH_ERROR, after which the id is free. A connection belongs to one thread.
 * A pool (`struct hearth_pool`) shares connections between threads.
 *
 * Functions return 0 or more on success and a negative errno on failure; the sentence that explains
 * the last failure of a connection is hearth_message(). The daemon's own refusals arrive as
 * HEARTH_ERROR with a code word and a sentence. Option structs begin with their size: set
 * `.size = sizeof(...)` (or use the *_INIT macros), so that later versions can add fields at the end:
 * a struct that is longer than this library's is taken while what it does not know is zero, else
 * -EINVAL.
 *
 * Inside a callback a program may start requests, cancel, grant credit and free the connection; it
 * must not dispatch, wait or finish on the same connection (-EBUSY). A connection freed in one of
 * its own callbacks ends when that dispatch returns, and no further callback runs.
 *
 * The library keeps no global state, installs no signal handlers, raises no SIGPIPE and writes no
 * output. What a daemon sends is not trusted: frames beyond 64 MiB, lengths that do not fit and
 * values of the wrong size end the connection with -EPROTO; what is unknown is skipped.
 *
 * Hides: sockets, frames, partial reads and writes, credit bookkeeping. */
#ifndef HEARTH_H
#define HEARTH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct hearth;      /* one connection */
struct hearth_pool; /* connections shared between threads */

/* ---- where the daemon listens ---- */

/* Longest socket path, terminator included. */
#define HEARTH_PATH_BYTES 108

/* Writes the main socket's path: `explicit_path` if not NULL, else $HEARTH_SOCKET, else
 * $XDG_RUNTIME_DIR/hearth/hearth.sock where that exists, else /run/hearth/hearth.sock. A path that
 * somebody named (the argument, the variable) is taken as it is. -ENAMETOOLONG. */
int hearth_socket_path(const char *explicit_path, char ret_path[HEARTH_PATH_BYTES]);
/* Writes the status socket's path that belongs to a main socket: DIR/hearth.sock has
 * DIR/daemon/status.sock, any other PATH has PATH.status. A look at it never starts the daemon. */
int hearth_status_path(const char *socket_path, char ret_path[HEARTH_PATH_BYTES]);

/* Longest path of the list of model names, terminator included. */
#define HEARTH_LIST_PATH_BYTES 4096
/* Writes the path of the list in which a daemon keeps its models' names for the time when it does
 * not run: /run/hearth/hearth.sock has /var/lib/hearth/models.list, any other DIR/hearth.sock has
 * $XDG_STATE_HOME/hearth/models.list, any other PATH has PATH.models. -ENAMETOOLONG; -ENOENT where
 * neither $XDG_STATE_HOME nor $HOME is set. */
int hearth_list_path(const char *socket_path, char ret_path[HEARTH_LIST_PATH_BYTES]);
typedef void (*hearth_name_fn)(void *userdata, const char *name);
/* Calls `fn` with every name of that list, in the list's order; lines that are no model name are
 * skipped. Returns the number of names (0 where there is no list) or a negative errno. */
int hearth_list_names(const char *socket_path, hearth_name_fn fn, void *userdata);
/* Whether `name` may be a model's name: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. */
bool hearth_model_name_valid(const char *name);

/* ---- one connection ---- */

struct hearth_options {
    size_t size;
    const char *socket_path;     /* as hearth_socket_path(); NULL: the default search */
    bool status_socket;          /* connect to the status socket that belongs to it */
    const char *client_name;     /* shown in the daemon's status; NULL: none */
    uint64_t connect_timeout_us; /* for connect and hello together; 0: 15 s */
};
#define HEARTH_OPTIONS_INIT {.size = sizeof(struct hearth_options)}

/* Connects and exchanges hellos (blocking, bounded by the timeout).
 * -ENOENT / -ECONNREFUSED: no daemon there; -ETIMEDOUT; -EPROTO: not a hearth socket; -EACCES;
 * -ECONNRESET: closed before its hello; -EBUSY: the daemon refused the connection; -ESHUTDOWN: it
 * is going away; -EINTR when a signal came.
 * On failure a sentence is written to `ret_message` (may be NULL). */
#define HEARTH_MESSAGE_BYTES 320
int hearth_connect(const struct hearth_options *options, struct hearth **ret_hearth,
                   char ret_message[HEARTH_MESSAGE_BYTES]);
/* Closes; live requests are cancelled in the daemon and their callbacks are not called again.
 * Returns NULL. */
struct hearth *hearth_free(struct hearth *h);

int hearth_fd(const struct hearth *h);
/* The poll(2) events wanted now: POLLIN, and POLLOUT while requests wait to be sent. */
short hearth_events(const struct hearth *h);
/* Sends what can be sent and handles what has arrived, without blocking; callbacks run inside.
 * Returns the number of replies handled, or a negative errno once the connection is lost
 * (-ECONNRESET, -EPROTO); each live request has then had its HEARTH_ERROR ("internal" code,
 * `lost` set). All that was queued goes out in one send at the end. */
int hearth_dispatch(struct hearth *h);
/* Sends what is queued, waits at most timeout_us (UINT64_MAX: for ever) for something to handle,
 * then dispatches. 0 on timeout; -EINTR when a signal came. */
int hearth_wait(struct hearth *h, uint64_t timeout_us);
/* Dispatches until the request `id` has ended: 0, also where it had ended before. -EINTR, -ETIMEDOUT
 * (the request lives on), -ECANCELED where a callback freed the connection, or the connection's
 * loss. */
int hearth_finish(struct hearth *h, uint64_t id, uint64_t timeout_us);
/* Live requests. */
size_t hearth_in_flight(const struct hearth *h);
/* True once the daemon sent `goaway`: running requests finish, new ones get -ESHUTDOWN. */
bool hearth_going_away(const struct hearth *h);
const char *hearth_message(const struct hearth *h);
/* From the daemon's hello. */
const char *hearth_daemon_version(const struct hearth *h);
int64_t hearth_daemon_pid(const struct hearth *h);
/* Requests sent on this connection so far. */
uint64_t hearth_requests_sent(const struct hearth *h);

/* ---- replies ---- */

enum hearth_reply_kind {
    HEARTH_TOKENS, /* text of a stream */
    HEARTH_ITEM,   /* a list entry, a vector, progress, an event */
    HEARTH_DONE,   /* the request's end */
    HEARTH_ERROR,  /* the request's other end */
};

/* Pointers are valid during the callback only; text is also terminated by a NUL byte that `_bytes`
 * does not count. What a reply does not carry is NULL or 0. */
struct hearth_reply {
    enum hearth_reply_kind kind;
    uint64_t id;
    const char *text;
    size_t text_bytes;
    const int32_t *ids; /* tokenize */
    size_t n_ids;
    const float *vector; /* embed */
    size_t n_vector;
    /* done */
    const char *reason; /* stop, length, context, cancelled */
    uint64_t prompt_tokens, completion_tokens;
    uint64_t queued_us, load_us, prefill_us, decode_us;
    uint64_t seed;
    bool has_seed;
    const char *variant; /* kernel variant that computed it */
    /* error */
    const char *code; /* a word of docs/protocol.md, "Error codes" */
    const char *sentence;
    const char *option;      /* the option it is about */
    uint64_t retry_after_us; /* busy */
    bool lost;               /* the connection broke: nobody said how the request ended */
    /* item */
    const char *model;
    const char *state;
    uint64_t done_bytes, total_bytes, memory_bytes;
    bool preload, pinned;
    uint64_t keep_alive_us, holds;
    const char *info;  /* flat `key value` lines */
    const char *stats; /* flat `key value` lines */
    const char *version;
    uint64_t lost_events;
    const char *name; /* metrics: the section */
    int64_t pid;      /* status */
    /* the first HEARTH_TOKENS and HEARTH_DONE: what a repeated request must match */
    const void *fingerprint;
    size_t fingerprint_bytes;
};

typedef void (*hearth_reply_fn)(void *userdata, const struct hearth_reply *reply);

/* ---- requests: queued for the next dispatch, wait or finish; the id in *ret_id (may be NULL) ----
 * -ESHUTDOWN after goaway, -EMSGSIZE beyond the daemon's frame limit, -EINVAL, -ENOMEM, -ENOBUFS
 * where 64 MiB wait to be sent or 1,048,576 requests live already, -ECONNRESET or -EPROTO once the
 * connection is lost. No callback runs for a request that was not taken. */

struct hearth_message_part {
    const char *role; /* system, user, assistant */
    const char *content;
};

struct hearth_generate {
    size_t size;
    const char *model; /* NULL: the daemon's default */
    const char *prompt;
    size_t prompt_bytes; /* 0 with a prompt: strlen */
    const int32_t *ids;  /* in place of a prompt */
    size_t n_ids;
    const struct hearth_message_part *messages; /* hearth_chat */
    size_t n_messages;
    bool no_stream;       /* text in one frame at the end */
    uint64_t credit;      /* initial bytes (at least 4: a character); 0: the daemon's */
    bool manual_credit;   /* the caller grants more; else the library does as text is delivered */
    uint64_t max_tokens;  /* HEARTH_GENERATE_INIT: 256 */
    float temperature;    /* 0.8; 0: greedy */
    uint32_t top_k;       /* 40; 0: off */
    float top_p;          /* 0.95; 1: off */
    float min_p;          /* 0.05; 0: off */
    float repeat_penalty; /* 1.0: off; over the last 64 tokens */
    uint64_t seed;
    bool has_seed; /* else the daemon chooses one and reports it */
    const char *const *stops;
    size_t n_stops;
    bool ignore_eos;
    uint64_t deadline_us; /* 0: none; from the daemon's receipt */
    bool batch_priority;
    uint64_t skip_bytes;
    const void *fingerprint;
    size_t fingerprint_bytes;
    uint64_t keep_alive_us; /* 0: the model's own */
};
#define HEARTH_GENERATE_INIT                                                                    \
    {.size = sizeof(struct hearth_generate), .max_tokens = 256, .temperature = 0.8f,            \
     .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1.0f}

int hearth_complete(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                    void *userdata, uint64_t *ret_id);
int hearth_chat(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                void *userdata, uint64_t *ret_id);
int hearth_embed(struct hearth *h, const struct hearth_generate *request, hearth_reply_fn fn,
                 void *userdata, uint64_t *ret_id);
int hearth_tokenize(struct hearth *h, const char *model, const char *text, size_t text_bytes,
                    hearth_reply_fn fn, void *userdata, uint64_t *ret_id);
/* One item a model (all fields of "item"); `model` NULL: all. */
int hearth_models(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                  uint64_t *ret_id);
/* Loads in the background; `wait`: progress items until it is over. */
int hearth_warm(struct hearth *h, const char *model, bool wait, hearth_reply_fn fn, void *userdata,
                uint64_t *ret_id);
/* The same of a file that the caller has open, for reading alone (the descriptor stays the caller's).
 * The daemon's items name the model that it becomes ("file-1"): other requests on this connection
 * use it by that name, other users do not see it, and it goes with this connection. -EBUSY: another
 * one has not been sent yet. */
int hearth_warm_fd(struct hearth *h, int fd, bool wait, hearth_reply_fn fn, void *userdata,
                   uint64_t *ret_id);
int hearth_unload(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                  uint64_t *ret_id);
/* Values of a model that stand until the daemon ends; what has no `has_` is left as it is. All of it
 * is set, or with an error nothing. */
struct hearth_set {
    size_t size;
    const char *model;
    bool has_preload, preload; /* 1: as hearth_warm() without `wait`; 0: as hearth_unload() */
    bool has_pinned, pinned;   /* never evicted; administrators alone */
    bool has_keep_alive;
    uint64_t keep_alive_us; /* unloaded so long after its last use; 0: never; administrators alone */
};
#define HEARTH_SET_INIT {.size = sizeof(struct hearth_set)}
/* Done once the daemon has taken it: with `preload` 1 the state is at least "queued". */
int hearth_set(struct hearth *h, const struct hearth_set *set, hearth_reply_fn fn, void *userdata,
               uint64_t *ret_id);
/* Loads the model and keeps it loaded: one item (model, state, holds) once that is taken, then
 * nothing until hearth_cancel() (done, reason "cancelled") or the connection's end lets go of it.
 * An error ends it where the load fails or the daemon ends. An order to unload a model that is held is
 * done at once and takes effect with the last hold's end. */
int hearth_hold(struct hearth *h, const char *model, hearth_reply_fn fn, void *userdata,
                uint64_t *ret_id);
/* The daemon looks through its directories again; done once it has. Administrators alone. */
int hearth_reload(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id);
/* News until hearth_cancel() or the connection's end. `what`:
 * "events" or NULL: one item an event, whose text is a JSON object on one line; one that is late by
 * more than 1,024 of them gets an item with `lost_events` in their place.
 * "values": what hearth_models(), hearth_metrics() and hearth_status() would say, pushed when it
 * changes and at most every 100 ms. A push is: an item for each model that changed, as of
 * hearth_models() (a model that is gone has no `state`); an item (name, text) for each section that
 * changed ("pool", "batcher", "streaming", "loader", "prometheus"); and at its end always one item
 * as of hearth_status(), with neither model nor name. The first push has everything, as has one
 * after the reader has been too slow: it begins with an item whose `lost_events` is not 0, and
 * models that it does not name are gone. */
int hearth_subscribe(struct hearth *h, const char *what, hearth_reply_fn fn, void *userdata,
                     uint64_t *ret_id);

/* Groups that hearth_act_for() takes. */
#define HEARTH_MAX_GROUPS 256u
/* Requests made on this connection from now on are another user's: the daemon holds them to that
 * user's rights and limits. It believes that on the status socket and of its own uid alone; anybody
 * else's requests it then answers with "forbidden". Groups are copied. -E2BIG: too many of them (the
 * identity is as before); -ENOMEM. */
int hearth_act_for(struct hearth *h, uint32_t uid, const uint32_t *gids, size_t n_gids);
/* From now on they are the program's own again. */
void hearth_act_for_self(struct hearth *h);

/* One item: state word, version, info lines. */
int hearth_status(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id);
/* One item whose text is a section: "prometheus", "pool", "batcher", "streaming", "loader", or a
 * metric's name. NULL: all flat sections, one item each. */
int hearth_metrics(struct hearth *h, const char *section, hearth_reply_fn fn, void *userdata,
                   uint64_t *ret_id);
int hearth_null(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id);
int hearth_ping(struct hearth *h, hearth_reply_fn fn, void *userdata, uint64_t *ret_id);

/* Asks the daemon to stop the request; its end still comes (done, reason "cancelled"). -ENOENT: no
 * such live request. */
int hearth_cancel(struct hearth *h, uint64_t id);
/* Lets the stream send `bytes` more (manual_credit). -ENOENT: no such live request. */
int hearth_credit(struct hearth *h, uint64_t id, uint64_t bytes);

/* ---- pool ---- */

struct hearth_pool_options {
    size_t size;
    struct hearth_options connection;
    uint32_t min_connections; /* not closed for being idle; 0 */
    uint32_t max_connections; /* 16 */
    uint64_t idle_timeout_us; /* 5 min; 0: never */
    uint64_t max_age_us;      /* 10 min; 0: never */
    uint64_t health_every_us; /* 30 s; one idle for longer is pinged; 0: never */
    uint64_t health_timeout_us; /* 10 ms; what answers its ping later is closed */
};
#define HEARTH_POOL_OPTIONS_INIT                                                                \
    {.size = sizeof(struct hearth_pool_options),                                                \
     .connection = HEARTH_OPTIONS_INIT, .max_connections = 16,                                  \
     .idle_timeout_us = 300000000, .max_age_us = 600000000, .health_every_us = 30000000,        \
     .health_timeout_us = 10000}

struct hearth_pool_stats {
    size_t size_of; /* sizeof(struct hearth_pool_stats), set by the caller */
    uint64_t created;       /* connections opened */
    uint64_t reused;        /* acquisitions that got one which had carried a request */
    uint64_t failed;        /* connections that could not be opened */
    uint64_t closed_idle;
    uint64_t closed_broken; /* lost, going away, or given back in use */
    uint64_t waits, timeouts;
    uint64_t acquired;        /* acquisitions that succeeded */
    uint32_t open, idle, busy; /* now */
    uint64_t health_passed, health_failed, closed_aged;
    uint64_t failovers; /* how often hearth_pool_complete() and the like sent a request again */
};

/* Opens min_connections; fails where one of them does, as hearth_connect() would. -EINVAL: no
 * connections, more than 4,096, or a wrong size. The options' strings are copied. Thread-safe is all
 * of the pool but its end. */
int hearth_pool_new(const struct hearth_pool_options *options, struct hearth_pool **ret_pool);
/* Every connection must have been released, and no thread may be in a call. Returns NULL. */
struct hearth_pool *hearth_pool_free(struct hearth_pool *pool);
/* A connection for this thread alone until it is released (never hearth_free() it): the idle one
 * used last, else a new one, else the next that comes back within timeout_us: -ETIMEDOUT. Who waits
 * is served in the order of coming. One that the daemon has closed or told to go away, or that is
 * due for a ping and does not answer it, is replaced. Connection errors as hearth_connect(), but no
 * -EINTR. */
int hearth_pool_acquire(struct hearth_pool *pool, uint64_t timeout_us, struct hearth **ret_hearth);
/* Gives it back; one with live requests, a loss or a goaway is closed instead. Asks one idle
 * connection after its health where one is due (health_timeout_us at most). */
void hearth_pool_release(struct hearth_pool *pool, struct hearth *h);
/* Closes what has been idle too long (keeping the minimum), is too old or was told to go away, and
 * pings what is due; call it now and then (acquire and release do part of it). Opens nothing: a
 * look at a daemon that has ended for want of work must not start it again. */
void hearth_pool_maintain(struct hearth_pool *pool);
/* Runs a completion from its beginning to its end on a connection of the pool. 0: `fn` (of this
 * thread; may be NULL) has had the end, HEARTH_DONE or HEARTH_ERROR. A negative errno: there was no
 * end, only the text delivered so far; hearth_pool_get_message() says why. -ETIMEDOUT after
 * timeout_us (UINT64_MAX: never), -ECANCELED after hearth_pool_cancel(), -EINVAL with
 * manual_credit, else as hearth_pool_acquire() and hearth_complete().
 *
 * Where the connection breaks or the daemon goes away, the request is sent again on another one, up
 * to three times: as it was while `fn` has had no text; else with the seed and the fingerprint of
 * the first HEARTH_TOKENS and what was delivered as skip_bytes, so that `fn` never sees a byte
 * twice. Where that cannot be, because the model or the daemon has changed, the end is HEARTH_ERROR
 * with the code "shutting-down". A daemon that the pool has once been connected to is looked for
 * during 10 s from when it was first missed; one that stays away longer is missing at once. `id` in
 * replies differs from one connection to the next and means nothing here. */
int hearth_pool_complete(struct hearth_pool *pool, const struct hearth_generate *request,
                         hearth_reply_fn fn, void *userdata, uint64_t timeout_us);
int hearth_pool_chat(struct hearth_pool *pool, const struct hearth_generate *request,
                     hearth_reply_fn fn, void *userdata, uint64_t timeout_us);
/* The same of an embedding and of a tokenizing. They are sent again as they were; an item that `fn`
 * has had does not come again. */
int hearth_pool_embed(struct hearth_pool *pool, const struct hearth_generate *request,
                      hearth_reply_fn fn, void *userdata, uint64_t timeout_us);
int hearth_pool_tokenize(struct hearth_pool *pool, const char *model, const char *text,
                         size_t text_bytes, hearth_reply_fn fn, void *userdata,
                         uint64_t timeout_us);
/* Ends all calls of these four that run now and have this `userdata`, from any thread or in a
 * callback: each returns -ECANCELED, unless its `fn` has had the end before, and the daemon stops the
 * request. Returns how many there were; one that has not begun is not among them. From a callback of
 * the call itself `fn` is not called again, and the connection stays; from another thread the
 * connection is closed, `fn` may be running still until the call returns, and a call that is being
 * connected returns when that is over (connect_timeout_us). */
int hearth_pool_cancel(struct hearth_pool *pool, const void *userdata);
/* Why the last call that failed did, of any thread; empty when none has. */
void hearth_pool_get_message(struct hearth_pool *pool, char ret_message[HEARTH_MESSAGE_BYTES]);
void hearth_pool_get_stats(struct hearth_pool *pool, struct hearth_pool_stats *ret_stats);

#ifdef __cplusplus
}
#endif

#endif
