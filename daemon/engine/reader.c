#include "daemon/engine/reader.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* How far ahead the kernel is told of what will be read through the page cache. */
#define AHEAD_BYTES (8u << 20)

void reader_init(struct reader *reader, const struct gguf_source *source, bool direct)
{
    char path[40];

    *reader = (struct reader){.source = *source, .direct_fd = -1};
    if (source->fd < 0)
        return;
    if (direct) {
        /* A descriptor of its own on the very same file, whatever its path leads to by now. */
        snprintf(path, sizeof(path), "/proc/self/fd/%d", source->fd);
        reader->direct_fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_DIRECT);
    }
    /* Both are hints. Asking what is cached must not make the kernel read ahead: it would fetch
     * the whole file a second time. */
    (void)posix_fadvise(source->fd, 0, 0,
                        reader->direct_fd >= 0 ? POSIX_FADV_RANDOM : POSIX_FADV_SEQUENTIAL);
}

void reader_done(struct reader *reader)
{
    if (reader->direct_fd >= 0)
        close(reader->direct_fd);
    reader->direct_fd = -1;
}

size_t reader_room(size_t len)
{
    return (len + 2 * READER_ALIGN - 1) & ~(size_t)(READER_ALIGN - 1);
}

/* At least `least` of `len` bytes: 0, -ENODATA, -errno. */
static int read_bytes(int fd, uint8_t *to, size_t len, size_t least, uint64_t offset)
{
    size_t done = 0;

    while (done < least) {
        ssize_t n = pread(fd, to + done, len - done, (off_t)(offset + done));

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0)
            return -ENODATA;
        if (n > 0)
            done += (size_t)n;
    }
    return 0;
}

/* Reads what is cached, without waiting for a disk: the bytes it got, 0 where the first one is not
 * cached, or -EOPNOTSUPP. */
static ssize_t read_cached(int fd, uint8_t *to, size_t len, uint64_t offset)
{
    struct iovec iov = {to, len};
    ssize_t n;

    do
        n = preadv2(fd, &iov, 1, (off_t)offset, RWF_NOWAIT);
    while (n < 0 && errno == EINTR);
    if (n >= 0)
        return n;
    return errno == EAGAIN ? 0 : -EOPNOTSUPP;
}

static int read_through_cache(struct reader *reader, uint64_t offset, size_t len, uint8_t *buffer)
{
    (void)posix_fadvise(reader->source.fd, (off_t)(offset + len), AHEAD_BYTES, POSIX_FADV_WILLNEED);
    return read_bytes(reader->source.fd, buffer, len, len, offset);
}

/* From now on everything goes through the page cache. */
static int give_direct_up(struct reader *reader, _Atomic bool *why, uint64_t offset, size_t len,
                          uint8_t *buffer)
{
    if (!atomic_exchange(why, true))
        (void)posix_fadvise(reader->source.fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    return read_through_cache(reader, offset, len, buffer);
}

static int read_direct(struct reader *reader, uint64_t offset, size_t len, uint8_t *buffer,
                       const uint8_t **ret_at)
{
    uint64_t begin = offset & ~(uint64_t)(READER_ALIGN - 1);
    size_t skip = (size_t)(offset - begin);
    size_t most = (skip + len + READER_ALIGN - 1) & ~(size_t)(READER_ALIGN - 1);
    size_t done = 0;

    assert(most <= reader_room(len));
    while (done < skip + len) {
        ssize_t n = pread(reader->direct_fd, buffer + done, most - done, (off_t)(begin + done));

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0)
            return -ENODATA;
        if (n <= 0)
            continue;
        done += (size_t)n;
        /* Only the file's end is short, and what follows has to be aligned again. */
        if (done < skip + len && done % READER_ALIGN != 0)
            done &= ~(size_t)(READER_ALIGN - 1);
        if (done < skip + len && (size_t)n < READER_ALIGN)
            return -ENODATA;
    }
    atomic_fetch_add_explicit(&reader->direct_bytes, len, memory_order_relaxed);
    *ret_at = buffer + skip;
    return 0;
}

int reader_read(struct reader *reader, uint64_t offset, size_t len, uint8_t *buffer,
                const uint8_t **ret_at)
{
    ssize_t cached = 0;
    int r;

    if (reader->source.fd < 0) {
        if (offset > reader->source.size || len > reader->source.size - offset)
            return -ENODATA;
        *ret_at = reader->source.memory + offset;
        return 0;
    }
    *ret_at = buffer;
    if (reader->direct_fd < 0 || atomic_load(&reader->direct_fails) ||
        atomic_load(&reader->cache_unknown))
        return read_through_cache(reader, offset, len, buffer);
    /* One byte tells; asking for all would have the kernel begin to cache what is not there. */
    cached = read_cached(reader->source.fd, buffer, MIN(len, (size_t)1), offset);
    if (cached > 0)
        cached = read_cached(reader->source.fd, buffer, len, offset);
    if (cached == (ssize_t)len)
        return 0;
    if (cached < 0)
        return give_direct_up(reader, &reader->cache_unknown, offset, len, buffer);
    r = read_direct(reader, offset, len, buffer, ret_at);
    if (r != -EINVAL && r != -EOPNOTSUPP)
        return r;
    *ret_at = buffer;
    return give_direct_up(reader, &reader->direct_fails, offset, len, buffer);
}
