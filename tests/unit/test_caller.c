#include <criterion/criterion.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fs/caller.h"
#include "lib/cleanup.h"

/* What a status may look like, around the lines that count. */
static char text[20000];

static const char *status(const char *uids, const char *gids, const char *groups)
{
    snprintf(text, sizeof(text),
             "Name:\tcat\\nGroups:\\t0\nUmask:\t0022\nState:\tD (disk sleep)\nNgid:\t0\n"
             "Uid:\t%s\nGid:\t%s\nFDSize:\t64\nGroups:\t%s\nNStgid:\t1\n",
             uids, gids, groups);
    return text;
}

static void expect(const struct caller *caller, size_t n, const uint32_t *gids)
{
    cr_assert_eq(caller->n_gids, n);
    for (size_t i = 0; i < n; i++)
        cr_assert_eq(caller->gids[i], gids[i]);
}
#define EXPECT(caller, ...) \
    expect(caller, ELEMENTSOF(((uint32_t[]){__VA_ARGS__})), (uint32_t[]){__VA_ARGS__})

static struct caller someone(void)
{
    struct caller caller;

    caller_init(&caller, 1000, 100, 0);
    return caller;
}

Test(caller, has_the_groups_that_the_kernel_names)
{
    struct caller caller = someone();

    EXPECT(&caller, 100);
    caller_add_groups(&caller,
                      status("1000\t1000\t1000\t1000", "100\t100\t100\t100", "27 44 100 "));
    EXPECT(&caller, 100, 27, 44, 100);
    cr_assert_eq(caller.uid, 1000);
}

Test(caller, is_believed_by_its_filesystem_ids_alone)
{
    struct caller caller = someone();

    caller_add_groups(&caller, status("0\t0\t0\t1000", "5\t5\t5\t100", "27"));
    EXPECT(&caller, 100, 27);
}

Test(caller, of_another_identity_has_no_groups)
{
    static const char *const uids[] = {"1000\t1000\t1000\t0", "0\t0\t0\t0", "1000\t1000\t1000", "",
                                       "1000 1000 1000 x",    "-1 -1 -1 -1"};

    for (size_t i = 0; i < ELEMENTSOF(uids); i++) {
        struct caller caller = someone();
        caller_add_groups(&caller, status(uids[i], "100 100 100 100", "0 27"));
        EXPECT(&caller, 100);
        caller = someone();
        caller_add_groups(&caller, status("1000 1000 1000 1000", uids[i], "0 27"));
        EXPECT(&caller, 100);
    }
}

Test(caller, takes_no_group_from_a_text_that_is_cut_or_strange)
{
    static const char *const cases[] = {
        "",
        "Groups:\t27\n",
        "Uid:\t1000 1000 1000 1000\nGroups:\t27\n",
        "xUid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t27\n",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t2",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t4294967296 2 \n",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t99999999999 2 \n",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t-2 2 \n",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:\t",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups:",
        "Uid:\t1000 1000 1000 1000\nGid:\t100 100 100 100\nGroups",
        "\n\n\n",
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct caller caller = someone();
        caller_add_groups(&caller, cases[i]);
        cr_assert_eq(caller.n_gids, 1, "%s", cases[i]);
    }
}

Test(caller, of_many_groups_keeps_the_first)
{
    struct caller caller = someone();
    char groups[12 * 300] = "";

    for (int i = 0; i < 300; i++)
        sprintf(groups + strlen(groups), "%d ", 4000000 + i);
    caller_add_groups(&caller, status("1000 1000 1000 1000", "100 100 100 100", groups));
    cr_assert_eq(caller.n_gids, CALLER_GIDS_MAX);
    cr_assert_eq(caller.gids[CALLER_GIDS_MAX - 1], 4000000 + CALLER_GIDS_MAX - 2);
}

Test(caller, that_has_gone_has_no_groups)
{
    struct caller caller;
    pid_t pid = fork();

    if (pid == 0)
        _exit(0);
    cr_assert(waitpid(pid, NULL, 0) == pid);
    caller_init(&caller, getuid(), getgid(), pid);
    cr_assert_eq(caller.n_gids, 1);
    caller_init(&caller, getuid(), getgid(), -5);
    cr_assert_eq(caller.n_gids, 1);
}

Test(caller, is_read_from_the_process_itself)
{
    struct caller caller;
    gid_t groups[CALLER_GIDS_MAX];
    int n = getgroups((int)ELEMENTSOF(groups), groups);

    cr_assert(n >= 0);
    caller_init(&caller, geteuid(), getegid(), getpid());
    cr_assert_eq(caller.n_gids, MIN((size_t)n + 1, CALLER_GIDS_MAX));
    for (int i = 0; i < n && i + 1 < (int)CALLER_GIDS_MAX; i++)
        cr_assert_eq(caller.gids[i + 1], groups[i]);
}

Test(caller, whose_process_acts_under_another_uid_has_no_groups)
{
    struct caller caller;

    caller_init(&caller, geteuid() + 1, getegid(), getpid());
    cr_assert_eq(caller.n_gids, 1);
}
