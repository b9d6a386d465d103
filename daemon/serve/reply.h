/* Replies: frames from the daemon to a peer, in one place. Hides their options.
 * A peer of NULL (gone) takes nothing. Thread: the reactor. */
#ifndef HEARTH_SERVE_REPLY_H
#define HEARTH_SERVE_REPLY_H

#include "daemon/serve/peer.h"
#include "daemon/serve/request.h"

/* A client who was told `busy` may come again after so long: about the time of a few steps. */
#define RETRY_AFTER_US 50000u

/* Why a request is refused. */
struct refusal {
    enum wire_code code;
    const char *option; /* the option's name; NULL: none */
    uint64_t retry_after_us;
    char sentence[FAULT_TEXT_BYTES];
};

/* Fills a refusal that is for good and returns -EINVAL. */
__attribute__((format(printf, 4, 5))) int refusal_set(struct refusal *ret_refusal,
                                                      enum wire_code code, const char *option,
                                                      const char *format, ...);

/* The same with `busy`: when to come again. */
__attribute__((format(printf, 3, 4))) int refusal_busy(struct refusal *ret_refusal,
                                                       uint64_t retry_us, const char *format, ...);

void reply_refusal(struct peer *peer, uint64_t id, const struct refusal *refusal);
__attribute__((format(printf, 4, 5))) void
reply_error(struct peer *peer, uint64_t id, enum wire_code code, const char *format, ...);
/* A `done` with nothing in it. */
void reply_done(struct peer *peer, uint64_t id);
void reply_goaway(struct peer *peer, const char *why);
/* One `item` with a name and a text. */
void reply_text_item(struct peer *peer, uint64_t id, const char *name, const char *text,
                     size_t len);
/* Opens a frame that the caller fills and closes with reply_end(). */
struct wire_buffer *reply_begin(struct peer *peer, enum wire_type type, uint64_t id);
void reply_end(struct peer *peer);

/* Text of a generation; the first frame names seed, variant and fingerprint. True: in a frame of
 * its own; false: it made the frame before it longer. */
bool reply_tokens(struct request *request, const char *text, size_t len, const char *variant,
                  uint64_t fingerprint);
/* The end of a generation or an embedding: `done` or `error`, as the request says. */
void reply_ended(struct request *request, const char *variant, uint64_t fingerprint);

#endif
