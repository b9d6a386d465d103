#include "tests/support/read_fault.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

struct read_faults read_faults;

ssize_t __real_pread64(int fd, void *to, size_t len, off_t offset);
ssize_t __wrap_pread64(int fd, void *to, size_t len, off_t offset);
ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags);

static bool take_one(_Atomic int *count)
{
    int n = atomic_load(count);

    while (n > 0)
        if (atomic_compare_exchange_weak(count, &n, n - 1))
            return true;
    return false;
}

static int fault_now(int call)
{
    if (take_one(&read_faults.spare))
        return 0;
    if (atomic_load(&read_faults.interrupted) && call % 2 == 0)
        return EINTR;
    return take_one(&read_faults.eio) ? EIO : 0;
}

ssize_t __wrap_pread64(int fd, void *to, size_t len, off_t offset)
{
    bool direct = fcntl(fd, F_GETFL) & O_DIRECT;
    int error = fault_now(atomic_fetch_add(&read_faults.n_reads, 1));

    if (direct) {
        atomic_fetch_add(&read_faults.n_direct, 1);
        if (atomic_load(&read_faults.no_direct))
            error = EINVAL;
    }
    if (error) {
        errno = error;
        return -1;
    }
    if (atomic_load(&read_faults.short_reads) && len > 4096)
        len = 4096;
    return __real_pread64(fd, to, len, offset);
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    atomic_fetch_add(&read_faults.n_cached, 1);
    if (atomic_load(&read_faults.no_nowait) || atomic_load(&read_faults.nothing_cached)) {
        errno = atomic_load(&read_faults.no_nowait) ? EOPNOTSUPP : EAGAIN;
        return -1;
    }
    return __real_preadv64v2(fd, iov, n, offset, flags);
}
