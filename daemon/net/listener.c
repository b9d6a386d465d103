#include "daemon/net/listener.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* Connections that wait to be accepted; the kernel caps it at net.core.somaxconn. */
#define LISTEN_BACKLOG 4096

#define SOCKET_MODE  0660
#define SOCKET_GROUP "hearth"

static int address_of(const char *path, struct sockaddr_un *ret_address, struct fault *ret_fault)
{
    memset(ret_address, 0, sizeof(*ret_address));
    ret_address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof(ret_address->sun_path))
        return fault_set(ret_fault, -ENAMETOOLONG,
                         "socket path %s is longer than the %zu bytes a socket's name may have",
                         path, sizeof(ret_address->sun_path) - 1);
    memcpy(ret_address->sun_path, path, strlen(path) + 1);
    return 0;
}

/* Whether somebody answers on the path. */
static bool answered(const struct sockaddr_un *address)
{
    _cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return false;
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0)
        return true;
    return errno == EAGAIN; /* its backlog is full */
}

/* Makes the directory of a path where it is missing (one level), for a private socket. */
static int make_directory(const char *path, mode_t mode, struct fault *ret_fault)
{
    char directory[HEARTH_PATH_BYTES];
    char *slash;

    snprintf(directory, sizeof(directory), "%s", path);
    slash = strrchr(directory, '/');
    if (!slash || slash == directory)
        return 0;
    *slash = 0;
    if (mkdir(directory, mode) < 0 && errno != EEXIST)
        return fault_set(ret_fault, -errno, "cannot make the directory %s: %s", directory,
                         strerror(errno));
    return 0;
}

static int bind_failed(const char *path, struct fault *ret_fault)
{
    int error = errno;

    return fault_set(ret_fault, -error, "cannot listen on %s: %s", path, strerror(error));
}

/* Two daemons that start at once must not take each other's file for a stale one: what is between
 * the look and the bind happens under a lock of the directory. */
static int lock_directory(const char *path)
{
    char directory[HEARTH_PATH_BYTES];
    char *slash;
    int fd;

    snprintf(directory, sizeof(directory), "%s", path);
    slash = strrchr(directory, '/');
    if (slash)
        slash[slash == directory] = 0;
    fd = open(slash ? directory : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0)
        flock(fd, LOCK_EX);
    return fd;
}

static int bind_path(const char *path, int *ret_fd, struct fault *ret_fault)
{
    _cleanup_close_ int lock = lock_directory(path);
    _cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const struct group *group;
    struct sockaddr_un address;
    struct stat st;
    int r = address_of(path, &address, ret_fault);

    (void)lock; /* held until the end of the scope; a directory that cannot be locked is used anyway
                 */
    if (r < 0)
        return r;
    if (fd < 0)
        return bind_failed(path, ret_fault);
    if (answered(&address))
        return fault_set(ret_fault, -EADDRINUSE,
                         "another daemon already answers on %s; stop it or choose another --socket",
                         path);
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return fault_set(ret_fault, -EEXIST,
                             "%s exists and is not a socket; remove it or choose another --socket",
                             path);
        unlink(path);
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return bind_failed(path, ret_fault);
    group = getgrnam(SOCKET_GROUP);
    if (group && chown(path, (uid_t)-1, group->gr_gid) < 0) {
        /* not a member of the group: the socket stays its owner's */
    }
    if (chmod(path, SOCKET_MODE) < 0 || listen(fd, LISTEN_BACKLOG) < 0) {
        r = bind_failed(path, ret_fault);
        unlink(path);
        return r;
    }
    *ret_fd = TAKE_FD(fd);
    return 0;
}

/* The socket systemd passed: 1, or 0 if it passed none. */
static int take_activated(struct listener *listener, struct fault *ret_fault)
{
    struct sockaddr_un address;
    socklen_t len = sizeof(address);
    int n = sd_listen_fds(1);

    if (n < 0)
        return fault_set(ret_fault, n, "cannot take the sockets passed: %s", strerror(-n));
    if (n == 0)
        return 0;
    if (n > 1 || sd_is_socket_unix(SD_LISTEN_FDS_START, SOCK_STREAM, 1, NULL, 0) <= 0)
        return fault_set(ret_fault, -EINVAL,
                         "%d descriptors were passed; expected one listening Unix stream socket",
                         n);
    listener->main_fd = SD_LISTEN_FDS_START;
    if (fcntl(listener->main_fd, F_SETFL, fcntl(listener->main_fd, F_GETFL) | O_NONBLOCK) < 0)
        return fault_set(ret_fault, -errno, "cannot set up the socket passed: %s", strerror(errno));
    memset(&address, 0, sizeof(address));
    if (getsockname(listener->main_fd, (struct sockaddr *)&address, &len) < 0 ||
        address.sun_path[0] != '/')
        return fault_set(ret_fault, -EINVAL, "the socket passed has no path in the file system");
    snprintf(listener->path, sizeof(listener->path), "%.*s", (int)sizeof(address.sun_path),
             address.sun_path);
    listener->activated = true;
    return 1;
}

int listener_path(const char *path, char ret_path[HEARTH_PATH_BYTES])
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    int n;

    if (path || getenv("HEARTH_SOCKET") || geteuid() == 0 || !runtime || runtime[0] != '/')
        return hearth_socket_path(path, ret_path);
    n = snprintf(ret_path, HEARTH_PATH_BYTES, "%s/hearth/hearth.sock", runtime);
    return n < HEARTH_PATH_BYTES ? 0 : -ENAMETOOLONG;
}

int listener_open(struct listener *ret_listener, const char *path, struct fault *ret_fault)
{
    struct listener listener = {.main_fd = -1, .status_fd = -1};
    int r = take_activated(&listener, ret_fault);

    if (r == 0) {
        r = listener_path(path, listener.path);
        if (r < 0)
            return fault_set(ret_fault, r, "socket path %s is too long", path ? path : "");
        r = make_directory(listener.path, 0755, ret_fault);
        if (r == 0)
            r = bind_path(listener.path, &listener.main_fd, ret_fault);
    }
    if (r >= 0)
        r = hearth_status_path(listener.path, listener.status_path);
    if (r == -ENAMETOOLONG)
        fault_set(ret_fault, r, "the status socket's path, %s.status, is too long", listener.path);
    if (r >= 0)
        r = make_directory(listener.status_path, 0755, ret_fault);
    if (r >= 0)
        r = bind_path(listener.status_path, &listener.status_fd, ret_fault);
    if (r < 0) {
        listener_close(&listener);
        return r;
    }
    *ret_listener = listener;
    return 0;
}

void listener_close(struct listener *listener)
{
    if (listener->main_fd >= 0) {
        if (!listener->activated)
            unlink(listener->path);
        close(listener->main_fd);
    }
    if (listener->status_fd >= 0) {
        unlink(listener->status_path);
        close(listener->status_fd);
    }
    listener->main_fd = listener->status_fd = -1;
}
