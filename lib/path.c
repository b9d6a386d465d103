/* Where a daemon listens, and where it leaves the names of its models: paths follow from the main
 * socket's path alone. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"
#include "lib/wire.h"

#define SYSTEM_SOCKET "/run/hearth/hearth.sock"
#define SYSTEM_LIST   "/var/lib/hearth/models.list"
#define SOCKET_NAME   "hearth.sock"

/* A list beyond this many bytes is not one that a daemon wrote. */
#define LIST_MAX_BYTES (4u << 20)

_Static_assert(HEARTH_LIST_PATH_BYTES >= PATH_MAX, "a list's path may be any path");

static int path_copy(const char *from, char ret_path[HEARTH_PATH_BYTES])
{
    size_t len = strlen(from);
    if (len == 0)
        return -ENOENT;
    if (len >= HEARTH_PATH_BYTES)
        return -ENAMETOOLONG;
    memcpy(ret_path, from, len + 1);
    return 0;
}

int hearth_socket_path(const char *explicit_path, char ret_path[HEARTH_PATH_BYTES])
{
    if (explicit_path)
        return path_copy(explicit_path, ret_path);
    const char *named = secure_getenv("HEARTH_SOCKET");
    if (named && *named)
        return path_copy(named, ret_path);
    const char *runtime = secure_getenv("XDG_RUNTIME_DIR");
    if (runtime && *runtime) {
        char path[HEARTH_PATH_BYTES];
        int n = snprintf(path, sizeof(path), "%s/hearth/" SOCKET_NAME, runtime);
        if (n > 0 && (size_t)n < sizeof(path) && access(path, F_OK) == 0)
            return path_copy(path, ret_path);
    }
    return path_copy(SYSTEM_SOCKET, ret_path);
}

/* Length of `DIR/` when the path is DIR/hearth.sock (0 for the name alone), SIZE_MAX else. */
static size_t socket_dir_len(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    return strcmp(name, SOCKET_NAME) == 0 ? (size_t)(name - path) : SIZE_MAX;
}

int hearth_status_path(const char *socket_path, char ret_path[HEARTH_PATH_BYTES])
{
    char path[HEARTH_PATH_BYTES];
    size_t dir_len = socket_dir_len(socket_path);
    int n = dir_len == SIZE_MAX ? snprintf(path, sizeof(path), "%s.status", socket_path)
                                : snprintf(path, sizeof(path), "%.*sdaemon/status.sock",
                                           dir_len < INT_MAX ? (int)dir_len : INT_MAX, socket_path);
    if (n < 0 || (size_t)n >= sizeof(path))
        return -ENAMETOOLONG;
    return path_copy(path, ret_path);
}

int hearth_list_path(const char *socket_path, char ret_path[HEARTH_LIST_PATH_BYTES])
{
    char path[HEARTH_LIST_PATH_BYTES];
    int n;
    if (strcmp(socket_path, SYSTEM_SOCKET) == 0) {
        n = snprintf(path, sizeof(path), "%s", SYSTEM_LIST);
    } else if (socket_dir_len(socket_path) == SIZE_MAX) {
        n = snprintf(path, sizeof(path), "%s.models", socket_path);
    } else {
        const char *state = secure_getenv("XDG_STATE_HOME"), *home = secure_getenv("HOME");
        if (state && *state)
            n = snprintf(path, sizeof(path), "%s/hearth/models.list", state);
        else if (home && *home)
            n = snprintf(path, sizeof(path), "%s/.local/state/hearth/models.list", home);
        else
            return -ENOENT;
    }
    if (n < 0 || (size_t)n >= sizeof(path))
        return -ENAMETOOLONG;
    memcpy(ret_path, path, (size_t)n + 1);
    return 0;
}

static bool name_char(char c, bool first)
{
    bool letter = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
    return letter || (!first && (c == '.' || c == '_' || c == '-'));
}

bool hearth_model_name_valid(const char *name)
{
    size_t len = 0;
    for (; name[len]; len++)
        if (len >= WIRE_MAX_MODEL_NAME || !name_char(name[len], len == 0))
            return false;
    return len > 0;
}

DEFINE_CLEANUP(FILE *, fclose)

int hearth_list_names(const char *socket_path, hearth_name_fn fn, void *userdata)
{
    char path[HEARTH_LIST_PATH_BYTES];
    int r = hearth_list_path(socket_path, path);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    /* Not blocking, so that a FIFO in the list's place hangs nobody. */
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR ? 0 : -errno;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    _cleanup_(fclosep) FILE *file = fdopen(fd, "re");
    if (!file)
        return -errno;
    (void)TAKE_FD(fd);

    char line[WIRE_MAX_MODEL_NAME + 2];
    size_t total = 0;
    int n = 0;
    bool rest = false; /* inside a line longer than a name */
    while (total < LIST_MAX_BYTES && fgets(line, sizeof(line), file)) {
        size_t len = strcspn(line, "\n");
        total += len + 1;
        bool whole = line[len] == '\n' || feof(file);
        line[len] = '\0';
        if (whole && !rest && hearth_model_name_valid(line)) {
            fn(userdata, line);
            n++;
        }
        rest = !whole;
    }
    return ferror(file) ? -EIO : n;
}
