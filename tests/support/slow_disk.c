/* slow-disk FILE MOUNTPOINT NAME DELAY_US [FAIL_FROM [HANG_AFTER [flush]]]: FILE as MOUNTPOINT/NAME,
 * on a disk on which each read takes DELAY_US and, from the offset FAIL_FROM on (-1: never), fails
 * with EIO. Reads after the first HANG_AFTER (-1: none), and with `flush` every close, hang until
 * SIGUSR1. Ends on SIGTERM and unmounts. */
#define FUSE_USE_VERSION 31

#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *name;
static int file_fd;
static useconds_t delay_us;
static off_t fail_from = INT64_MAX;
static long hang_after = -1;
static bool flush_hangs;
static _Atomic long n_reads;
static volatile sig_atomic_t goes_on;

/* Largest read that is answered at once: a model of a megabyte takes several. */
#define READ_BYTES (128 << 10)

static void *slow_init(struct fuse_conn_info *connection, struct fuse_config *config)
{
    connection->max_read = READ_BYTES;
    config->direct_io = 1;
    return NULL;
}

static int slow_getattr(const char *path, struct stat *st, struct fuse_file_info *info)
{
    (void)info;
    if (strcmp(path, "/") == 0) {
        memset(st, 0, sizeof(*st));
        st->st_mode = S_IFDIR | 0755;
        st->st_nlink = 2;
        return 0;
    }
    if (strcmp(path + 1, name) != 0)
        return -ENOENT;
    return fstat(file_fd, st) < 0 ? -errno : 0;
}

static int slow_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset,
                        struct fuse_file_info *info, enum fuse_readdir_flags flags)
{
    (void)path;
    (void)offset;
    (void)info;
    (void)flags;
    fill(buffer, name, NULL, 0, 0);
    return 0;
}

static int slow_open(const char *path, struct fuse_file_info *info)
{
    (void)info;
    return strcmp(path + 1, name) == 0 ? 0 : -ENOENT;
}

static void go_on(int signal)
{
    (void)signal;
    goes_on = 1;
}

static void hang(void)
{
    while (!goes_on)
        usleep(10000);
}

static int slow_flush(const char *path, struct fuse_file_info *info)
{
    (void)path;
    (void)info;
    if (flush_hangs)
        hang();
    return 0;
}

static int slow_read(const char *path, char *buffer, size_t size, off_t offset,
                     struct fuse_file_info *info)
{
    ssize_t n;

    (void)path;
    (void)info;
    usleep(delay_us);
    if (hang_after >= 0 && ++n_reads > hang_after)
        hang();
    if (offset + (off_t)size > fail_from)
        return -EIO;
    n = pread(file_fd, buffer, size, offset);
    return n < 0 ? -errno : (int)n;
}

static const struct fuse_operations operations = {.init = slow_init,
                                                  .getattr = slow_getattr,
                                                  .readdir = slow_readdir,
                                                  .open = slow_open,
                                                  .read = slow_read,
                                                  .flush = slow_flush};

int main(int argc, char **argv)
{
    char foreground[] = "-f", max_read[] = "-omax_read=131072";
    struct sigaction released = {.sa_handler = go_on}; /* one that restarts hides a SIGTERM */
    char *arguments[] = {argv[0], foreground, max_read, argc > 2 ? argv[2] : NULL, NULL};

    if (argc < 5)
        return 2;
    file_fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (file_fd < 0)
        return 1;
    name = argv[3];
    delay_us = (useconds_t)strtoul(argv[4], NULL, 10);
    if (argc > 5 && argv[5][0] != '-')
        fail_from = strtoll(argv[5], NULL, 10);
    if (argc > 6)
        hang_after = strtol(argv[6], NULL, 10);
    flush_hangs = argc > 7;
    sigaction(SIGUSR1, &released, NULL);
    return fuse_main(4, arguments, &operations, NULL);
}
