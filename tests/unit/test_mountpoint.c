#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/mountpoint.h"
#include "lib/cleanup.h"

Test(mountpoint, lines_of_mountinfo_are_told_apart)
{
    static const struct {
        const char *line, *path;
        int said;
    } cases[] = {
        {"36 35 0:41 / /run/h ro,nosuid shared:1 - fuse.hearthfs hearth rw", "/run/h", 1},
        {"36 35 0:41 / /run/h ro,nosuid - fuse.hearthfs hearth rw\n", "/run/h", 1},
        {"36 35 0:41 / /run/h ro,nosuid - fuse.other hearth rw", "/run/h", 0},
        {"36 35 0:41 / /run/h ro,nosuid - fuse.hearthfs2 hearth rw", "/run/h", 0},
        {"36 35 0:41 / /run/h2 ro,nosuid - fuse.hearthfs hearth rw", "/run/h", -ENOENT},
        {"36 35 0:41 /run/h / ro,nosuid - fuse.hearthfs hearth rw", "/run/h", -ENOENT},
        {"36 35 0:41 / /a\\040b\\134c rw - fuse.hearthfs hearth rw", "/a b\\c", 1},
        {"36 35 0:41 / /a\\04 rw - fuse.hearthfs hearth rw", "/a\\04", 1},
        {"36 35 0:41 / /run/h", "/run/h", -ENOENT},
        {"36 35 0:41 / /run/h rw fuse.hearthfs hearth rw", "/run/h", -ENOENT},
        {" - fuse.hearthfs", "/run/h", -ENOENT},
        {"", "/run/h", -ENOENT},
        {"\n", "", -ENOENT},
        {"36 35 0:41 / /run/h rw - ", "/run/h", 0},
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        cr_assert_eq(mountpoint_line_is_ours(cases[i].line, cases[i].path), cases[i].said, "%zu",
                     i);
}

Test(mountpoint, long_lines_are_cut_and_match_nothing)
{
    static char line[100000] = "1 2 3 / /";

    memset(line + 9, 'x', sizeof(line) - 10);
    cr_assert_eq(mountpoint_line_is_ours(line, "/x"), -ENOENT);
    strcpy(line + 9000, " rw - fuse.hearthfs h rw");
    cr_assert_eq(mountpoint_line_is_ours(line, "/x"), -ENOENT);
}

Test(mountpoint, a_folder_is_left_as_it_is)
{
    char dir[] = "/tmp/hearth-point-XXXXXX", file[64], text[80];
    struct fault fault;

    cr_assert(mkdtemp(dir));
    int r = mountpoint_prepare(dir, &fault);
    cr_assert(r == 0 || strstr(fault.text, "/dev/fuse"), "%s", fault.text);
    cr_assert(access(dir, F_OK) == 0);
    snprintf(file, sizeof(file), "%s/f", dir);
    cr_assert_eq(mountpoint_prepare(file, &fault), -ENOENT);
    snprintf(text, sizeof(text), "mkdir -p %s", file);
    cr_assert(strstr(fault.text, text), "%s", fault.text);
    FILE *made = fopen(file, "w");
    cr_assert(made);
    fclose(made);
    cr_assert_eq(mountpoint_prepare(file, &fault), -ENOTDIR);
    cr_assert(mountpoint_is_fd("/dev/fd/3") && !mountpoint_is_fd("/dev/fd"));
    cr_assert_eq(mountpoint_prepare("/dev/fd/3", &fault), 0);
    unlink(file);
    rmdir(dir);
}
