/* Notes to the service manager: never a wait. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/net/notify.h"

#define MOST_NOTES 100000

/* A manager that reads nothing by itself, under an abstract name or a path. */
static int manager(char *name, size_t size, bool abstract)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    size_t len;

    snprintf(name, size, "%s-notify-%d", abstract ? "@hearth" : "/tmp/hearth", (int)getpid());
    len = strlen(name);
    memcpy(address.sun_path, name, len);
    if (abstract)
        address.sun_path[0] = 0;
    cr_assert_eq(bind(fd, (struct sockaddr *)&address,
                      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)),
                 0);
    setenv("NOTIFY_SOCKET", name, 1);
    return fd;
}

Test(notify, a_note_comes_as_it_is)
{
    for (int abstract = 0; abstract < 2; abstract++) {
        char name[64], text[64] = "";
        int fd = manager(name, sizeof(name), abstract);
        cr_assert_eq(notify_send("STATUS=well"), 0);
        cr_assert_eq(recv(fd, text, sizeof(text) - 1, 0), 11);
        cr_assert_str_eq(text, "STATUS=well");
        close(fd);
        unlink(name);
    }
}

Test(notify, a_manager_that_does_not_read_is_not_waited_for)
{
    char name[64], text[64] = "";
    int fd = manager(name, sizeof(name), true), r = 0;
    size_t n = 0;

    for (; r == 0 && n < MOST_NOTES; n++)
        r = notify_send("WATCHDOG=1");
    cr_assert_eq(r, -EAGAIN, "%zu were taken, then %d", n, r);
    cr_assert_eq(recv(fd, text, sizeof(text) - 1, 0), 10);
    cr_assert_eq(notify_send("STATUS=again"), 0);
    close(fd);
}

Test(notify, nobody_is_told_where_nobody_asked_and_no_nonsense_is_tried)
{
    char name[200];

    unsetenv("NOTIFY_SOCKET");
    cr_assert_eq(notify_send("STATUS=x"), 0);
    setenv("NOTIFY_SOCKET", "", 1);
    cr_assert_eq(notify_send("STATUS=x"), 0);
    setenv("NOTIFY_SOCKET", "vsock:2:1234", 1);
    cr_assert_eq(notify_send("STATUS=x"), -EINVAL);
    memset(name, 'x', sizeof(name) - 1);
    name[0] = '/';
    name[sizeof(name) - 1] = 0;
    setenv("NOTIFY_SOCKET", name, 1);
    cr_assert_eq(notify_send("STATUS=x"), -EINVAL);
    setenv("NOTIFY_SOCKET", "/nowhere/hearth-notify", 1);
    cr_assert_eq(notify_send("STATUS=x"), -ENOENT);
}
