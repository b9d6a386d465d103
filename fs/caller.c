#include "fs/caller.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"

static_assert(CALLER_GIDS_MAX <= HEARTH_MAX_GROUPS, "libhearth takes all of a caller's groups");

/* The groups stand in the first kilobytes; what is behind is not read. */
#define STATUS_BYTES_MAX 8192u

/* The text behind "Key:" at the beginning of a line, NULL where there is none. The kernel escapes
 * line ends in the name of a process, so no other line can look like this one. */
static const char *line_of(const char *status, const char *key)
{
    size_t len = strlen(key);

    for (const char *line = status; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, len) == 0 && line[len] == ':')
            return line + len + 1;
    }
    return NULL;
}

/* The next number of a line; false at its end, and for one that the text's end may have cut. */
static bool next_number(const char **at, uint32_t *ret_number)
{
    const char *p = *at + strspn(*at, " \t");
    uint64_t number = 0;
    size_t digits = strspn(p, "0123456789");

    if (digits == 0 || digits > 10 || !p[digits])
        return false;
    for (size_t i = 0; i < digits; i++)
        number = number * 10 + (uint64_t)(p[i] - '0');
    if (number > UINT32_MAX)
        return false;
    *at = p + digits;
    *ret_number = (uint32_t)number;
    return true;
}

/* "Uid:" and "Gid:" give four numbers: real, effective, saved, and the filesystem's. */
static bool fs_id_is(const char *status, const char *key, uint32_t expected)
{
    const char *at = line_of(status, key);
    uint32_t number = 0;

    for (int i = 0; i < 4; i++)
        if (!at || !next_number(&at, &number))
            return false;
    return number == expected;
}

void caller_add_groups(struct caller *caller, const char *status)
{
    const char *at = line_of(status, "Groups");
    uint32_t gid;

    if (!at || !fs_id_is(status, "Uid", caller->uid) || !fs_id_is(status, "Gid", caller->gids[0]))
        return;
    while (caller->n_gids < CALLER_GIDS_MAX && next_number(&at, &gid))
        caller->gids[caller->n_gids++] = gid;
}

void caller_init(struct caller *caller, uid_t uid, gid_t gid, pid_t pid)
{
    char path[32], text[STATUS_BYTES_MAX];
    size_t used = 0;
    ssize_t n = 1;
    _cleanup_close_ int fd = -1;

    *caller = (struct caller){.uid = uid, .n_gids = 1, .gids = {gid}};
    if (pid <= 0)
        return;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    while (used < sizeof(text) - 1 && n > 0) {
        n = read(fd, text + used, sizeof(text) - 1 - used);
        if (n < 0)
            return;
        used += (size_t)n;
    }
    text[used] = '\0';
    caller_add_groups(caller, text);
}
