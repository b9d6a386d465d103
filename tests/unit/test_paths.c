/* Paths that follow from the main socket's, and the list of names for the time without a daemon. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"

static char dir[64];

static void make_dir(void)
{
    snprintf(dir, sizeof(dir), "/tmp/hearth-test-XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
    unsetenv("HEARTH_SOCKET");
    unsetenv("XDG_RUNTIME_DIR");
}

static void remove_dir(void)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    cr_assert_eq(system(command), 0);
}

TestSuite(paths, .init = make_dir, .fini = remove_dir);

Test(paths, a_named_socket_is_taken_as_it_is)
{
    char path[HEARTH_PATH_BYTES];
    setenv("HEARTH_SOCKET", "/variable/s", 1);
    cr_assert_eq(hearth_socket_path("/named/s", path), 0);
    cr_assert_str_eq(path, "/named/s");
    cr_assert_eq(hearth_socket_path(NULL, path), 0);
    cr_assert_str_eq(path, "/variable/s", "though it does not exist");
    setenv("HEARTH_SOCKET", "", 1);
    cr_assert_eq(hearth_socket_path(NULL, path), 0);
    cr_assert_str_eq(path, "/run/hearth/hearth.sock");
}

Test(paths, the_users_socket_comes_before_the_systems_where_it_exists)
{
    char path[HEARTH_PATH_BYTES], users[HEARTH_PATH_BYTES];
    setenv("XDG_RUNTIME_DIR", dir, 1);
    cr_assert_eq(hearth_socket_path(NULL, path), 0);
    cr_assert_str_eq(path, "/run/hearth/hearth.sock");
    snprintf(users, sizeof(users), "%s/hearth", dir);
    cr_assert_eq(mkdir(users, 0700), 0);
    strcat(users, "/hearth.sock");
    int fd = open(users, O_CREAT | O_WRONLY, 0600);
    cr_assert_geq(fd, 0);
    close(fd);
    cr_assert_eq(hearth_socket_path(NULL, path), 0);
    cr_assert_str_eq(path, users);
}

Test(paths, a_path_that_no_socket_can_have_is_refused)
{
    char path[HEARTH_PATH_BYTES] = "before", longest[HEARTH_PATH_BYTES + 1];
    memset(longest, 'p', sizeof(longest));
    longest[HEARTH_PATH_BYTES] = '\0';
    cr_assert_eq(hearth_socket_path(longest, path), -ENAMETOOLONG);
    cr_assert_str_eq(path, "before");
    longest[HEARTH_PATH_BYTES - 1] = '\0';
    cr_assert_eq(hearth_socket_path(longest, path), 0);
    cr_assert_eq(hearth_status_path(longest, path), -ENAMETOOLONG);
    cr_assert_eq(hearth_socket_path("", path), -ENOENT);
}

Test(paths, the_status_socket_follows_from_the_main_one)
{
    static const char *const cases[][2] = {
        {"/run/hearth/hearth.sock", "/run/hearth/daemon/status.sock"},
        {"/tmp/x/hearth.sock", "/tmp/x/daemon/status.sock"},
        {"hearth.sock", "daemon/status.sock"},
        {"/tmp/s", "/tmp/s.status"},
        {"/tmp/my-hearth.sock", "/tmp/my-hearth.sock.status"},
        {"/tmp/hearth.sock/s", "/tmp/hearth.sock/s.status"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        char path[HEARTH_PATH_BYTES];
        cr_assert_eq(hearth_status_path(cases[i][0], path), 0);
        cr_assert_str_eq(path, cases[i][1]);
    }
}

Test(paths, the_list_follows_from_the_main_socket)
{
    char path[HEARTH_LIST_PATH_BYTES];
    setenv("XDG_STATE_HOME", "/state", 1);
    setenv("HOME", "/home/u", 1);
    cr_assert_eq(hearth_list_path("/run/hearth/hearth.sock", path), 0);
    cr_assert_str_eq(path, "/var/lib/hearth/models.list");
    cr_assert_eq(hearth_list_path("/run/user/1/hearth/hearth.sock", path), 0);
    cr_assert_str_eq(path, "/state/hearth/models.list");
    unsetenv("XDG_STATE_HOME");
    cr_assert_eq(hearth_list_path("/run/user/1/hearth/hearth.sock", path), 0);
    cr_assert_str_eq(path, "/home/u/.local/state/hearth/models.list");
    unsetenv("HOME");
    cr_assert_eq(hearth_list_path("/run/user/1/hearth/hearth.sock", path), -ENOENT);
    cr_assert_eq(hearth_list_path("/tmp/s", path), 0);
    cr_assert_str_eq(path, "/tmp/s.models");
}

static void collect(void *userdata, const char *name)
{
    strcat(userdata, name);
    strcat(userdata, ",");
}

Test(paths, the_list_gives_names_and_nothing_else)
{
    char socket[HEARTH_PATH_BYTES], list[HEARTH_PATH_BYTES + 8], names[1024] = "";
    snprintf(socket, sizeof(socket), "%s/s", dir);
    snprintf(list, sizeof(list), "%s.models", socket);
    cr_assert_eq(hearth_list_names(socket, collect, names), 0, "no list, no names");
    FILE *file = fopen(list, "w");
    fputs("ember\n../../etc/passwd\n\n.hidden\ntiny-2.Q4_K_M\nwith blank\n", file);
    for (int i = 0; i < 5000; i++)
        fputc('x', file);
    fputs("\n\033[31mred\nlast", file);
    fclose(file);
    cr_assert_eq(hearth_list_names(socket, collect, names), 3);
    cr_assert_str_eq(names, "ember,tiny-2.Q4_K_M,last,");
}

Test(paths, a_list_that_is_no_file_hangs_nobody)
{
    char socket[HEARTH_PATH_BYTES], list[HEARTH_PATH_BYTES + 8], names[16] = "";
    snprintf(socket, sizeof(socket), "%s/s", dir);
    snprintf(list, sizeof(list), "%s.models", socket);
    cr_assert_eq(mkfifo(list, 0600), 0);
    cr_assert_eq(hearth_list_names(socket, collect, names), -EINVAL);
}

Test(paths, model_names_are_what_the_registry_takes)
{
    static const struct {
        const char *name;
        bool valid;
    } cases[] = {{"a", true},        {"Llama-3.2_1B.Q4", true},
                 {"7b", true},       {"", false},
                 {".a", false},      {"-a", false},
                 {"_a", false},      {"a/b", false},
                 {"a b", false},     {"a\n", false},
                 {"\xc3\xa4", false}};
    char longest[130];
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        cr_assert_eq(hearth_model_name_valid(cases[i].name), cases[i].valid, "%s", cases[i].name);
    memset(longest, 'n', sizeof(longest));
    longest[129] = '\0';
    cr_assert_not(hearth_model_name_valid(longest));
    longest[128] = '\0';
    cr_assert(hearth_model_name_valid(longest));
}
