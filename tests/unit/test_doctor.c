/* hearth doctor: machines that are not this one, made of files, and what is found wrong with them.
 */
#include <criterion/criterion.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "cli/doctor.h"
#include "lib/cleanup.h"

static char root[64];
static struct doctor *d;

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static void setup(void)
{
    strcpy(root, "/tmp/hearth-test-XXXXXX");
    cr_assert_not_null(mkdtemp(root));
    d = calloc(1, sizeof(*d));
    d->root = root;
    d->caller.uid = 12345;
    strcpy(d->socket, "/run/hearth/hearth.sock");
    strcpy(d->status_socket, "/run/hearth/daemon/status.sock");
    strcpy(d->subject, "self");
}

static void teardown(void)
{
    nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    free(d->status);
    free(d->check);
    free(d);
}

TestSuite(doctor, .init = setup, .fini = teardown);

static const char *real(const char *path)
{
    static char full[DOCTOR_PATH_BYTES];
    return doctor_path(d, path, full);
}

/* A file of that machine, with the folders above it. */
static void put(const char *path, const char *text)
{
    char full[DOCTOR_PATH_BYTES];
    doctor_path(d, path, full);
    for (char *slash = full + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        mkdir(full, 0755);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    cr_assert_not_null(file, "%s", full);
    fputs(text, file);
    fclose(file);
}

static void set(char **lines, const char *text)
{
    free(*lines);
    *lines = text ? strdup(text) : NULL;
}

/* The only finding since the last look, if it says so. */
static void found(enum doctor_level level, const char *says, const char *remedy)
{
    cr_assert_eq(d->n, 1u, "%zu findings, wanted '%s'; the first: %s", d->n, says,
                 d->n ? d->findings[0].text : "-");
    const struct doctor_finding *f = &d->findings[0];
    cr_expect_eq(f->level, level, "%s: %s", doctor_level_word(f->level), f->text);
    cr_expect(strstr(f->text, says), "'%s' does not say '%s'", f->text, says);
    if (remedy)
        cr_expect(strstr(f->remedy, remedy), "'%s' does not say '%s'", f->remedy, remedy);
    else
        cr_expect_str_empty(f->remedy);
    d->n = 0;
}

static void found_nothing(void)
{
    cr_assert_eq(d->n, 0u, "found: %s", d->n ? d->findings[0].text : "");
}

Test(doctor, says_which_kernels_and_why_no_better_ones)
{
    doctor_cpu(d);
    found_nothing(); /* without hearthd --check nothing is known */
    set(&d->check, "kernels avx512\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "avx512 kernels, the best", NULL);
    set(&d->check, "kernels avx2\nkernels_lack avx512 AVX-512 VNNI\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "avx2 kernels; for avx512 the processor lacks AVX-512 VNNI", NULL);
    set(&d->check, "kernels scalar\nkernels_lack avx512 AVX2\nkernels_lack avx2 AVX2\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "the processor lacks AVX2", "a processor");
    set(&d->check, "kernels scalar\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "scalar kernels", "unset HEARTH_CPU");
    set(&d->check, "kernels avx512\n");
    set(&d->status, "kernels avx2\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "runs with avx2 kernels, and this machine has avx512", "HEARTH_CPU");
}

Test(doctor, compares_threads_with_the_cpus_that_are_allowed)
{
    put("/proc/self/status", "Name:\thearthd\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8\n");
    put("/sys/devices/system/cpu/online", "0-15\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "5 of 16 CPUs are allowed, 5 threads", NULL);
    put("/sys/devices/system/cpu/online", "0-3,8\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "all 5 CPUs are allowed", NULL);
    set(&d->check, "threads 6\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "engine.threads is 6, and only 5", "auto");
    put("/proc/self/status", "Cpus_allowed_list:\t4-2\n");
    doctor_cpu(d);
    found_nothing();
}

Test(doctor, takes_the_least_quota_of_all_groups_above)
{
    put("/proc/7/status", "Cpus_allowed_list:\t0-3\n");
    put("/sys/devices/system/cpu/online", "0-3\n");
    strcpy(d->subject, "7");
    put("/proc/7/cgroup", "0::/a/b\n");
    put("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    put("/sys/fs/cgroup/a/cpu.max", "150000 100000\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "1.5 CPUs to 4 engine threads", "CPUQuota");
    put("/sys/fs/cgroup/a/cpu.max", "800000 100000\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "all 4", NULL);
    /* version 1, whose controllers share lines */
    put("/proc/7/cgroup", "4:memory:/x\n3:cpuset:/x\n2:cpu,cpuacct:/x\nnonsense\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000\n");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
    doctor_cpu(d);
    found(DOCTOR_WARNING, "0.5 CPUs", "engine.threads");
    put("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n");
    doctor_cpu(d);
    found(DOCTOR_OK, "all 4", NULL);
}

Test(doctor, compares_the_budget_with_memory)
{
    doctor_memory(d);
    found_nothing();
    put("/proc/meminfo", "MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n");
    set(&d->check, "machine_memory_bytes 8589934592\nmemory_budget_bytes 4294967296\n");
    doctor_memory(d);
    found(DOCTOR_OK, "memory_budget is 4.0GiB of 8.0GiB, 4.0GiB are available", NULL);
    set(&d->check, "machine_memory_bytes 8589934592\nmemory_budget_bytes 5368709120\n");
    doctor_memory(d);
    found(DOCTOR_WARNING, "4.0GiB are available now", "memory_budget");
    set(&d->status, "memory_budget_bytes 5368709120\nmodel_bytes 2147483648\n"); /* counted once */
    doctor_memory(d);
    found(DOCTOR_OK, "5.0GiB of 8.0GiB", NULL);
    set(&d->status, "memory_budget_bytes 5368709120\nmodel_bytes 536870912\nkv_bytes 536870912\n");
    doctor_memory(d);
    found(DOCTOR_OK, "5.0GiB of 8.0GiB", NULL);
    set(&d->status, "memory_budget_bytes 17179869184\n");
    doctor_memory(d);
    found(DOCTOR_PROBLEM, "16GiB, and the machine (or the cgroup) has 8.0GiB", "60%");
}

Test(doctor, compares_descriptors_with_connections)
{
    doctor_descriptors(d);
    found_nothing();
    put("/proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\n"
                             "Max open files            1024                 4352        files\n");
    doctor_descriptors(d);
    found(DOCTOR_OK, "4352 descriptors", NULL);
    set(&d->check, "connections 16384\n");
    doctor_descriptors(d);
    found_nothing(); /* the unit has a limit of its own, which this shell's says nothing about */
    d->running = true;
    doctor_descriptors(d);
    found(DOCTOR_WARNING, "4352 descriptors are allowed, and limits.connections wants 16640",
          "LimitNOFILE");
}

Test(doctor, says_what_keeps_hearthfs_from_mounting)
{
    doctor_fuse(d);
    found(DOCTOR_WARNING, "there is no /dev/fuse", "modprobe");
    put("/dev/fuse", "");
    chmod(real("/dev/fuse"), 0666);
    doctor_fuse(d);
    found(DOCTOR_WARNING, "fusermount3 is not installed", "apt-get install fuse3");
    put("/usr/bin/fusermount3", "");
    chmod(real("/usr/bin/fusermount3"), 0755);
    doctor_fuse(d);
    found(DOCTOR_WARNING, "not setuid", "chmod u+s");
    chmod(real("/usr/bin/fusermount3"), 04755);
    doctor_fuse(d);
    found(DOCTOR_OK, "none is mounted", NULL);
    if (geteuid() != 0) {
        chmod(real("/dev/fuse"), 0600 & ~0600u);
        doctor_fuse(d);
        found(DOCTOR_WARNING, "may not be opened by you", "chmod 0666");
    }
}

Test(doctor, reads_what_mounts_say)
{
    d->caller.uid = 0;
    put("/dev/fuse", "");
    put("/usr/bin/fusermount3", "");
    chmod(real("/usr/bin/fusermount3"), 0755);
    put("/proc/self/mountinfo",
        "1 0 0:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:2 / /home/u/other rw - fuse.sshfs host: rw\n"
        "3 1 0:3 / /run/hearth/fs rw,nosuid shared:1 - fuse.hearthfs hearth rw\n"
        "broken line\n");
    put("/run/hearth/fs/status", "running\nmore\n");
    doctor_fuse(d);
    cr_assert_eq(d->n, 2u);
    d->n = 1;
    found(DOCTOR_OK, "/run/hearth/fs says running", NULL);
    remove(real("/run/hearth/fs/status"));
    doctor_fuse(d);
    d->n = 1;
    found(DOCTOR_PROBLEM, "/run/hearth/fs cannot be read: No such file",
          "restart hearthfs.service");
    put("/proc/self/mountinfo", "3 1 0:3 / /home/u/m rw - fuse.hearthfs hearth rw\n");
    put("/home/u/m/status", "");
    remove(real("/home/u/m/status"));
    cr_assert_eq(mkfifo(real("/home/u/m/status"), 0644), 0); /* opening it hangs */
    doctor_fuse(d);
    d->n = 1;
    found(DOCTOR_WARNING, "/home/u/m does not answer", "fusermount3 -uz '/home/u/m'");
}

Test(doctor, tells_a_socket_from_what_is_none)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "does not exist", "hearthd &");
    d->named = true;
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "does not exist", "hearthd --socket /run/hearth/hearth.sock &");
    put("/run/systemd/system/x", "");
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "does not exist", "systemctl enable --now hearthd.socket");
    put(d->socket, "");
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "is no socket", "remove it");
    remove(real(d->socket));
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    strcpy(address.sun_path, real(d->socket));
    cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    chmod(real(d->socket), 0660);
    d->caller.uid = 0;
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "nobody listens on", "systemctl");
    put("/proc/net/unix", "Num       RefCount Protocol Flags    Type St Inode Path\n"
                          "0000: 00000002 00000000 00010000 0001 01 1 /run/hearth/other.sock\n"
                          "0000: 00000003 00000000 00000000 0001 03 2 /run/hearth/hearth.sock\n"
                          "0000: 00000003 00000000 00000000 0001 03 3\n");
    doctor_socket(d);
    found(DOCTOR_PROBLEM, "nobody listens on", "systemctl");
    put("/proc/net/unix", "0000: 00000002 00000000 00010000 0001 01 1 /run/hearth/hearth.sock\n");
    doctor_socket(d);
    found(DOCTOR_OK, "the first request starts a daemon", NULL);
    chmod(real(d->socket), 0666);
    d->running = true;
    doctor_socket(d);
    cr_assert_eq(d->n, 2u);
    cr_expect_eq(d->findings[1].level, DOCTOR_WARNING);
    cr_expect(strstr(d->findings[1].text, "every user"));
    close(fd);
}

Test(doctor, tells_who_may_open_the_socket)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    put("/run/hearth/x", "");
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    strcpy(address.sun_path, real(d->socket));
    cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    d->running = true;
    const struct {
        mode_t mode;
        bool owner, group;
        bool may;
    } cases[] = {
        {0660, false, false, false}, {0660, false, true, true}, {0600, true, false, true},
        {0600, false, true, false},  {0060, true, true, false}, {0060, false, true, true},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        chmod(real(d->socket), cases[i].mode);
        /* one that is neither is somebody who is not there */
        d->caller.uid = cases[i].owner ? geteuid() : 12345;
        d->caller.groups[0] = cases[i].group ? getegid() : 12345;
        d->caller.n_groups = 1;
        if (d->caller.uid == 0)
            continue; /* root may all */
        doctor_socket(d);
        cr_expect_eq(d->n, cases[i].may ? 1u : 2u, "case %zu", i);
        cr_expect_eq(doctor_count(d, DOCTOR_PROBLEM), cases[i].may ? 0u : 1u, "case %zu", i);
        d->n = 0;
    }
    close(fd);
}

/* systemctl as this test wants it. */
static void systemctl(const char *script)
{
    char path[256];
    put("/run/systemd/system/x", "");
    put("/bin/systemctl", script);
    chmod(real("/bin/systemctl"), 0755);
    snprintf(path, sizeof(path), "%s/bin:/usr/bin:/bin", root);
    setenv("PATH", path, 1);
}

static void units(const char *socket, const char *service)
{
    char script[2048];
    snprintf(script, sizeof(script),
             "#!/bin/sh\ncat <<END\nId=hearthd.socket\n%s\n\nId=hearthd.service\n%s\n\n"
             "Id=hearthfs.service\nLoadState=not-found\nEND\n",
             socket, service);
    systemctl(script);
    doctor_systemd(d);
}

/* The finding that begins with these words. */
static const struct doctor_finding *finding(const char *begins)
{
    for (size_t i = 0; i < d->n; i++)
        if (strncmp(d->findings[i].text, begins, strlen(begins)) == 0)
            return &d->findings[i];
    cr_assert_fail("nothing begins with '%s' (%zu findings)", begins, d->n);
    return NULL;
}

Test(doctor, says_how_the_units_are)
{
    const char *good =
        "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nResult=success";
    const char *idle =
        "LoadState=loaded\nActiveState=inactive\nUnitFileState=indirect\nNRestarts=0";
    doctor_systemd(d);
    found_nothing(); /* no systemd */
    units(good, idle);
    cr_expect_eq(finding("hearthd.socket is active")->level, DOCTOR_OK);
    cr_expect_eq(finding("hearthd.service is inactive")->level, DOCTOR_OK);
    d->n = 0;
    units("LoadState=loaded\nActiveState=inactive\nUnitFileState=disabled",
          "LoadState=loaded\nActiveState=active\nNRestarts=3");
    cr_expect_eq(finding("hearthd.socket is inactive: nobody")->level, DOCTOR_PROBLEM);
    cr_expect(strstr(finding("hearthd.service has died")->text, "again 3 times"));
    d->n = 0;
    units("LoadState=loaded\nActiveState=active\nUnitFileState=disabled",
          "LoadState=loaded\nActiveState=failed\nResult=exit-code");
    cr_expect_eq(finding("hearthd.socket will not be there")->level, DOCTOR_WARNING);
    const struct doctor_finding *f = finding("hearthd.service has failed (exit-code)");
    cr_expect_eq(f->level, DOCTOR_PROBLEM);
    cr_expect(strstr(f->remedy, "journalctl -u hearthd.service") &&
                  strstr(f->remedy, "start hearthd.socket"),
              "%s", f->remedy);
    d->n = 0;
    units("LoadState=not-found", "LoadState=not-found");
    cr_expect_eq(finding("hearthd.socket is not installed")->level, DOCTOR_WARNING);
    d->n = 0;
    systemctl("#!/bin/sh\necho no bus >&2\nexit 1\n");
    doctor_systemd(d);
    cr_expect_eq(finding("systemctl does not say how the units are: no bus")->level,
                 DOCTOR_WARNING);
}

Test(doctor, asks_hearthd_with_the_flags_that_the_daemon_runs_with)
{
    char path[DOCTOR_PATH_BYTES];
    put("/hearthd", "#!/bin/sh\necho config /a/b.yaml\necho args \"$@\"\n");
    chmod(real("/hearthd"), 0755);
    strcpy(path, real("/hearthd"));
    d->hearthd = path;
    doctor_config(d);
    found(DOCTOR_OK, "/a/b.yaml has no error", NULL);
    char args[200];
    cr_assert(doctor_text(d->check, "args", 0, args, sizeof(args)));
    cr_expect_str_eq(args, "--check");
    d->named = true;
    set(&d->check, NULL);
    doctor_config(d);
    cr_assert(doctor_text(d->check, "args", 0, args, sizeof(args)));
    cr_expect_str_eq(args, "--check --socket /run/hearth/hearth.sock");
    d->named = false;
    put("/etc/hearth/hearth.yaml", "");
    set(&d->check, NULL);
    doctor_config(d);
    cr_assert(doctor_text(d->check, "args", 0, args, sizeof(args)));
    cr_expect_str_eq(args, "--check --config /etc/hearth/hearth.yaml --state-dir /var/lib/hearth");
    d->n = 0;
    FILE *file = fopen(real("/proc/77/cmdline"), "w");
    cr_assert_null(file);
    put("/proc/77/cmdline", "");
    file = fopen(real("/proc/77/cmdline"), "w");
    const char words[] =
        "/usr/sbin/hearthd\0--verbose\0--models\0/m\0--config=/c\0--evil\0--socket";
    fwrite(words, 1, sizeof(words), file);
    fclose(file);
    d->running = true;
    strcpy(d->subject, "77");
    set(&d->check, NULL);
    doctor_config(d);
    cr_assert(doctor_text(d->check, "args", 0, args, sizeof(args)));
    cr_expect_str_eq(args, "--check --models /m --config=/c");
}

Test(doctor, passes_on_what_is_wrong_with_the_configuration)
{
    char path[DOCTOR_PATH_BYTES];
    put("/hearthd", "#!/bin/sh\necho 'hearthd: /a.yaml:3: bad' >&2\necho more >&2\nexit 2\n");
    chmod(real("/hearthd"), 0755);
    strcpy(path, real("/hearthd"));
    d->hearthd = path;
    doctor_config(d);
    found(DOCTOR_PROBLEM, "/a.yaml:3: bad", "--check");
    put("/hearthd", "#!/bin/sh\nkill -9 $$\n");
    doctor_config(d);
    found(DOCTOR_PROBLEM, "hearthd --check failed", NULL);
    d->hearthd = "/nowhere/hearthd";
    doctor_config(d);
    found(DOCTOR_WARNING, "hearthd was not found", "install");
    put("/hearthd", "#!/bin/sh\necho config none\n");
    d->hearthd = path;
    doctor_config(d);
    found(DOCTOR_OK, "no file, so the defaults", NULL);
}

Test(doctor, looks_through_the_models_directories)
{
    set(&d->check, "models_dir /m\nmodels_dir /absent\nwarning /m/x.gguf is left out\n");
    strcpy(d->socket, "/tmp/s");
    put("/m/good.gguf", "");
    put("/m/secret.gguf", "");
    put("/m/readme.txt", "");
    chmod(real("/m/secret.gguf"), 0600);
    if (geteuid() == d->caller.uid)
        d->caller.uid++;
    doctor_models(d);
    const struct doctor_finding *f = finding("/m/secret.gguf cannot be read by the daemon's user");
    cr_expect_eq(f->level, DOCTOR_WARNING);
    cr_expect_str_eq(f->remedy, "chmod a+r '/m/secret.gguf'");
    cr_expect_eq(finding("/m: 2 files of models")->level, DOCTOR_OK);
    cr_expect_eq(finding("/absent is not there")->level, DOCTOR_OK);
    cr_expect_eq(finding("/m/x.gguf is left out")->level, DOCTOR_WARNING);
    cr_expect_eq(d->n, 4u);
    d->n = 0;
    chmod(real("/m"), 0700);
    doctor_models(d);
    finding(geteuid() == 0 ? "/m cannot be read by the daemon's user" : "/m");
    remove(real("/m/good.gguf"));
    d->n = 0;
    put("/absent", "no directory");
    doctor_models(d);
    cr_expect_eq(finding("/absent cannot be read by you: Not a directory")->level, DOCTOR_WARNING);
}

Test(doctor, keeps_findings_to_a_line_and_to_their_number)
{
    doctor_find(d, DOCTOR_OK, "a", NULL, "one\ntwo");
    found(DOCTOR_OK, "one", NULL);
    for (size_t i = 0; i < 2 * DOCTOR_MAX_FINDINGS; i++)
        doctor_find(d, DOCTOR_WARNING, "a", "b", "%zu", i);
    cr_expect_eq(d->n, DOCTOR_MAX_FINDINGS);
    cr_expect_eq(doctor_count(d, DOCTOR_WARNING), DOCTOR_MAX_FINDINGS);
    char text[4];
    cr_expect_not(doctor_text("key value\n", "ke", 0, text, sizeof(text)));
    cr_expect_not(doctor_text(NULL, "ke", 0, text, sizeof(text)));
    cr_assert(doctor_text("k a\nk bcdefg\n", "k", 1, text, sizeof(text)));
    cr_expect_str_eq(text, "bcd");
    cr_expect_eq(doctor_number("n 12x\n", "n", 7), 12u);
    cr_expect_eq(doctor_number("n x\nm 99999999999999999999999\n", "n", 7), 7u);
    cr_expect_eq(doctor_number("m 99999999999999999999999\n", "m", 7), 7u);
}
