/* Reader: bytes of a model's file, the cheapest way there is to each.
 *
 * What the page cache has is copied from there; what it has not is read past it, by O_DIRECT, so
 * that a load neither copies twice nor drives other files out of memory. Where a file system
 * refuses that, or the caller does not want it, everything goes through the page cache, with a hint
 * of what comes next. A source in memory is not copied at all.
 *
 * Hides: which way was taken, alignment, short and interrupted reads.
 * Threads: any number of them, each with a buffer of its own. */
#ifndef HEARTH_ENGINE_READER_H
#define HEARTH_ENGINE_READER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/engine/gguf.h"

/* What O_DIRECT is asked for in: multiples of it suit every disk there is. */
#define READER_ALIGN 4096u

struct reader {
    struct gguf_source source;
    int direct_fd;              /* the same file by O_DIRECT; -1: not that way */
    _Atomic bool direct_fails;  /* a read by it was refused */
    _Atomic bool cache_unknown; /* the file system cannot say what it has cached */
    _Atomic uint64_t direct_bytes;
};

/* `direct`: past the page cache where that may be. */
void reader_init(struct reader *reader, const struct gguf_source *source, bool direct);
void reader_done(struct reader *reader);

/* Bytes of a buffer that a read of `len` bytes needs; it is aligned to READER_ALIGN. */
size_t reader_room(size_t len);
/* Reads; *ret_at is where they are: in the buffer, or in the source's memory. -ENODATA: the file
 * ends before; else the errno of the read. */
int reader_read(struct reader *reader, uint64_t offset, size_t len, uint8_t *buffer,
                const uint8_t **ret_at);

#endif
