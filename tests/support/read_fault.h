/* Disks that misbehave: what the program reads goes through here and fails as a test says.
 *
 * A test linked with read_fault_dep has pread and preadv2 of everything that is linked statically
 * pass through. Hides: the linker's --wrap. Threads: any may read; the test sets faults while
 * nobody does, or where a race does not matter. */
#ifndef HEARTH_TESTS_SUPPORT_READ_FAULT_H
#define HEARTH_TESTS_SUPPORT_READ_FAULT_H

#include <stdatomic.h>
#include <stdbool.h>

struct read_faults {
    _Atomic int spare;                       /* reads that go well before the faults below begin */
    _Atomic int eio;                         /* so many reads fail with EIO */
    _Atomic bool interrupted;                /* every other call fails with EINTR */
    _Atomic bool short_reads;                /* a read brings at most 4096 bytes */
    _Atomic bool no_direct;                  /* O_DIRECT reads are refused */
    _Atomic bool no_nowait;                  /* the file system does not know RWF_NOWAIT */
    _Atomic bool nothing_cached;             /* RWF_NOWAIT finds nothing */
    _Atomic int n_reads, n_direct, n_cached; /* what was asked for so far */
};

extern struct read_faults read_faults;

#endif
