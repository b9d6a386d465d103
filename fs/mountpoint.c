#include "fs/mountpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/cleanup.h"

#define FUSE_DEVICE "/dev/fuse"
#define FD_MOUNT    "/dev/fd/"
#define MOUNTINFO   "/proc/self/mountinfo"

extern char **environ;

bool mountpoint_is_fd(const char *path)
{
    return strncmp(path, FD_MOUNT, strlen(FD_MOUNT)) == 0;
}

/* ---- what a hearthfs has left ---- */

/* The next word of a line of mountinfo, with its octal escapes resolved, as far as there is room.
 */
static const char *next_word(const char *line, char *ret_word, size_t size)
{
    size_t n = 0;

    line += *line == ' ';
    while (*line && *line != ' ' && *line != '\n') {
        char c = *line++;
        if (c == '\\' && strspn(line, "01234567") >= 3) {
            c = (char)((line[0] - '0') * 64 + (line[1] - '0') * 8 + (line[2] - '0'));
            line += 3;
        }
        if (n + 1 < size)
            ret_word[n++] = c;
    }
    ret_word[n] = '\0';
    return line;
}

int mountpoint_line_is_ours(const char *line, const char *path)
{
    char word[PATH_MAX];
    const char *rest = line, *dash = strstr(line, " - ");

    /* id, parent, device, root, mount point, ..., "-", type */
    for (int i = 0; i < 5; i++)
        rest = next_word(rest, word, sizeof(word));
    if (!dash || dash < rest - 1 || strcmp(word, path) != 0)
        return -ENOENT;
    next_word(dash + 2, word, sizeof(word));
    return strcmp(word, MOUNTPOINT_TYPE) == 0;
}

/* realpath(3) would ask the dead mount itself: the folder it is in is asked instead. */
static char *real_path_of(const char *path)
{
    _cleanup_free_ char *copy = strdup(path), *folder = NULL;
    char *slash, *real = NULL;
    const char *name;

    if (!copy)
        return NULL;
    for (size_t n = strlen(copy); n > 1 && copy[n - 1] == '/'; n--)
        copy[n - 1] = '\0';
    slash = strrchr(copy, '/');
    name = slash ? slash + 1 : copy;
    if (slash)
        *slash = '\0';
    folder = realpath(!slash ? "." : slash == copy ? "/" : copy, NULL);
    if (!folder || asprintf(&real, "%s/%s", strcmp(folder, "/") == 0 ? "" : folder, name) < 0)
        return NULL;
    return real;
}

/* Whether the topmost mount there, which is the last named, is a hearthfs's. */
static bool is_ours(const char *real_path)
{
    FILE *file = fopen(MOUNTINFO, "re");
    _cleanup_free_ char *line = NULL;
    size_t size = 0;
    bool ours = false;

    if (!file)
        return false;
    while (getline(&line, &size, file) > 0) {
        int r = mountpoint_line_is_ours(line, real_path);
        if (r >= 0)
            ours = r;
    }
    fclose(file);
    return ours;
}

/* As fusermount3 -u does it, but also where somebody still has a file of it open. */
static int unmount(const char *path)
{
    const char *const args[] = {"fusermount3", "-u", "-q", "-z", "--", path, NULL};
    pid_t pid;
    int status;

    if (geteuid() == 0)
        return umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 ? -errno : 0;
    if (posix_spawnp(&pid, args[0], NULL, NULL, (char *const *)args, environ) != 0)
        return -ENOENT;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -EPERM;
}

/* How the mount at the top answers: 0 or a negative errno. A dead hearthfs's attributes may still
 * be in the kernel's cache: its root is opened. What is not ours is not touched more than needed.
 */
static int probe(const char *path, bool ours)
{
    struct stat st;
    int fd;

    if (!ours)
        return stat(path, &st) < 0 ? -errno : 0;
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    close(fd);
    return -EBUSY;
}

/* Clears away what killed ones have left. 0 or a negative errno; -EBUSY: one lives there. */
static int clear(const char *path)
{
    _cleanup_free_ char *real_path = real_path_of(path);
    int r = -ENOTCONN;

    for (int i = 0; i <= MOUNTPOINT_DEAD_MAX && r == -ENOTCONN; i++) {
        bool ours = real_path && is_ours(real_path);
        r = probe(path, ours);
        if (r == -ENOTCONN && (!ours || unmount(real_path) < 0))
            break;
    }
    return r;
}

/* ---- before the mount ---- */

static int check_device(struct fault *ret_fault)
{
    if (access(FUSE_DEVICE, R_OK | W_OK) == 0)
        return 0;
    if (errno == EACCES)
        return fault_set(ret_fault, -EACCES,
                         "%s may not be opened by this user; let root give access with "
                         "`chmod 0666 %s`, or mount as root",
                         FUSE_DEVICE, FUSE_DEVICE);
    return fault_set(
        ret_fault, -errno,
        "%s cannot be opened (%s); load the kernel module with `modprobe fuse`, or give "
        "the container the device",
        FUSE_DEVICE, strerror(errno));
}

int mountpoint_prepare(const char *path, struct fault *ret_fault)
{
    struct stat st;
    int r;

    if (mountpoint_is_fd(path))
        return 0;
    r = clear(path);
    if (r == -ENOTCONN)
        return fault_set(ret_fault, r,
                         "%s still carries the mount of a filesystem that has died; run "
                         "`fusermount3 -u %s` (or `umount %s` as root) and start again",
                         path, path, path);
    if (r == -EBUSY)
        return fault_set(ret_fault, r,
                         "%s carries a hearthfs that works; end that one first, or mount elsewhere",
                         path);
    if (r == -ENOENT)
        return fault_set(ret_fault, r, "%s does not exist; make it with `mkdir -p %s`", path, path);
    if (r == 0 && stat(path, &st) < 0)
        r = -errno;
    if (r < 0)
        return fault_set(ret_fault, r, "%s cannot be used as a mount point: %s", path,
                         strerror(-r));
    if (!S_ISDIR(st.st_mode))
        return fault_set(ret_fault, -ENOTDIR, "%s is not a directory; a mount point has to be one",
                         path);
    return check_device(ret_fault);
}
