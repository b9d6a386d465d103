/* What the machine gives: processor, CPUs, memory, descriptors, FUSE. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/child.h"
#include "cli/doctor.h"
#include "cli/output.h"
#include "lib/cleanup.h"

/* A look at a mount answers within this, or the filesystem hangs. */
#define MOUNT_LIMIT_US 2000000u
/* Descriptors beside the connections: what the daemon opens for itself. */
#define OWN_DESCRIPTORS 256u

/* ---- processor ---- */

/* The kernels that were chosen, and why no better ones. */
static void check_kernels(struct doctor *d)
{
    char chosen[32], running[32], lack[96];
    if (!doctor_text(d->check, "kernels", 0, chosen, sizeof(chosen)))
        return; /* its own warning says why */
    bool lacks = doctor_text(d->check, "kernels_lack", 0, lack, sizeof(lack));
    char *what = lacks ? strchr(lack, ' ') : NULL;
    if (what)
        *what++ = '\0';
    if (doctor_text(d->status, "kernels", 0, running, sizeof(running)) &&
        strcmp(running, chosen) != 0)
        doctor_find(d, DOCTOR_WARNING, "cpu",
                    "unset HEARTH_CPU where hearthd starts, and restart it",
                    "the daemon runs with %s kernels, and this machine has %s", running, chosen);
    else if (strcmp(chosen, "scalar") == 0)
        doctor_find(d, DOCTOR_WARNING, "cpu",
                    what ? "use a processor (or a virtual machine's CPU model) that has it"
                         : "unset HEARTH_CPU",
                    "scalar kernels, many times slower than others%s%s",
                    what ? ": the processor lacks " : "", what ? what : "");
    else if (what && strcmp(lack, chosen) != 0)
        doctor_find(d, DOCTOR_OK, "cpu", NULL, "%s kernels; for %s the processor lacks %s", chosen,
                    lack, what);
    else
        doctor_find(d, DOCTOR_OK, "cpu", NULL, "%s kernels, the best there are", chosen);
}

/* How many CPUs a list like "0-3,8" names. */
static unsigned list_count(const char *list)
{
    unsigned n = 0;
    while (list && *list >= '0' && *list <= '9') {
        char *end;
        unsigned long first = strtoul(list, &end, 10), last = first;
        if (*end == '-')
            last = strtoul(end + 1, &end, 10);
        n += last >= first && last - first < 65536 ? (unsigned)(last - first + 1) : 0;
        list = *end == ',' ? end + 1 : NULL;
    }
    return n;
}

/* The value of a line "Key:\tvalue" of /proc/PID/status and its like. */
static bool colon_value(const char *text, const char *key, char *ret, size_t size)
{
    size_t len = strlen(key);
    for (const char *line = text; line && *line;) {
        size_t line_len = strcspn(line, "\n");
        if (line_len > len && strncmp(line, key, len) == 0 && line[len] == ':') {
            const char *value = line + len + 1;
            value += strspn(value, " \t");
            snprintf(ret, size, "%.*s", (int)strcspn(value, "\n"), value);
            return true;
        }
        line += line_len + (line[line_len] == '\n');
    }
    return false;
}

/* CPUs that one group's quota allows; 0: no quota. */
static double quota_of(const struct doctor *d, bool v2, const char *mount, const char *group)
{
    char path[1024];
    double quota = 0, period = 0;
    if (v2) {
        snprintf(path, sizeof(path), "%s%s/cpu.max", mount, group);
        _cleanup_free_ char *text = doctor_read(d, path);
        if (!text || sscanf(text, "%lf %lf", &quota, &period) != 2)
            return 0;
    } else {
        snprintf(path, sizeof(path), "%s%s/cpu.cfs_quota_us", mount, group);
        _cleanup_free_ char *quota_text = doctor_read(d, path);
        snprintf(path, sizeof(path), "%s%s/cpu.cfs_period_us", mount, group);
        _cleanup_free_ char *period_text = doctor_read(d, path);
        quota = quota_text ? strtod(quota_text, NULL) : 0;
        period = period_text ? strtod(period_text, NULL) : 0;
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* The least quota of the subject's group and of all above it. */
static double cpu_quota(const struct doctor *d)
{
    char path[64];
    double least = 0;
    snprintf(path, sizeof(path), "/proc/%s/cgroup", d->subject);
    _cleanup_free_ char *groups = doctor_read(d, path);
    char *rest = groups, *line;
    while (rest && (line = strsep(&rest, "\n"))) {
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        bool v2 = controllers[1] == '\0', v1 = strncmp(controllers + 1, "cpu", 3) == 0 &&
                                               strncmp(controllers + 1, "cpuset", 6) != 0;
        while (v2 || v1) {
            double quota = quota_of(d, v2, v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu", group);
            least = quota > 0 && (least == 0 || quota < least) ? quota : least;
            char *slash = strrchr(group, '/');
            if (!slash)
                break;
            *slash = '\0';
        }
    }
    return least;
}

static void check_cpus(struct doctor *d)
{
    char path[64], allowed_list[4096] = "";
    snprintf(path, sizeof(path), "/proc/%s/status", d->subject);
    _cleanup_free_ char *status = doctor_read(d, path);
    _cleanup_free_ char *online_list = doctor_read(d, "/sys/devices/system/cpu/online");
    colon_value(status, "Cpus_allowed_list", allowed_list, sizeof(allowed_list));
    unsigned allowed = list_count(allowed_list), online = list_count(online_list);
    uint64_t threads = doctor_number(d->check, "threads", allowed);
    double quota = cpu_quota(d);
    if (allowed == 0)
        return;
    if (quota > 0 && quota < (double)MIN(threads, (uint64_t)allowed))
        doctor_find(d, DOCTOR_WARNING, "cpus",
                    "set engine.threads to the whole CPUs of the limit, or raise CPUQuota=",
                    "the cgroup gives %.1f CPUs to %" PRIu64
                    " engine threads: they stand still for "
                    "part of the time",
                    quota, MIN(threads, (uint64_t)allowed));
    else if (threads > allowed)
        doctor_find(d, DOCTOR_WARNING, "cpus", "set engine.threads: auto",
                    "engine.threads is %" PRIu64
                    ", and only %u CPUs are allowed: that many are used",
                    threads, allowed);
    else if (online > allowed)
        doctor_find(d, DOCTOR_OK, "cpus", NULL, "%u of %u CPUs are allowed, %" PRIu64 " threads",
                    allowed, online, threads);
    else
        doctor_find(d, DOCTOR_OK, "cpus", NULL, "all %u CPUs are allowed, %" PRIu64 " threads",
                    allowed, threads);
}

void doctor_cpu(struct doctor *d)
{
    check_kernels(d);
    check_cpus(d);
}

/* ---- memory ---- */

static uint64_t meminfo_bytes(const char *meminfo, const char *key)
{
    char text[64];
    return colon_value(meminfo, key, text, sizeof(text)) ? strtoull(text, NULL, 10) * 1024 : 0;
}

void doctor_memory(struct doctor *d)
{
    char b[SIZE_TEXT_BYTES], m[SIZE_TEXT_BYTES], a[SIZE_TEXT_BYTES];
    _cleanup_free_ char *meminfo = doctor_read(d, "/proc/meminfo");
    uint64_t budget = doctor_number(d->status, "memory_budget_bytes",
                                    doctor_number(d->check, "memory_budget_bytes", 0));
    uint64_t machine =
        doctor_number(d->check, "machine_memory_bytes", meminfo_bytes(meminfo, "MemTotal"));
    uint64_t available = meminfo_bytes(meminfo, "MemAvailable");
    uint64_t own =
        doctor_number(d->status, "model_bytes", 0) + doctor_number(d->status, "kv_bytes", 0);
    if (budget == 0 || machine == 0 || available == 0)
        return;
    size_text(budget, b);
    size_text(machine, m);
    size_text(available, a);
    if (budget > machine)
        doctor_find(d, DOCTOR_PROBLEM, "memory", "set memory_budget to less, such as 60%",
                    "memory_budget is %s, and the machine (or the cgroup) has %s: loads will meet "
                    "the out-of-memory killer",
                    b, m);
    else if (budget > available + own)
        doctor_find(d, DOCTOR_WARNING, "memory",
                    "end what else uses memory, or set memory_budget to less",
                    "memory_budget is %s, and %s are available now: others use the rest", b, a);
    else
        doctor_find(d, DOCTOR_OK, "memory", NULL, "memory_budget is %s of %s, %s are available", b,
                    m, a);
}

/* ---- descriptors ---- */

void doctor_descriptors(struct doctor *d)
{
    char path[64];
    const char *line;
    snprintf(path, sizeof(path), "/proc/%s/limits", d->subject);
    _cleanup_free_ char *limits = doctor_read(d, path);
    uint64_t want = doctor_number(d->check, "connections", 4096) + OWN_DESCRIPTORS;
    unsigned long long hard;
    line = limits ? strstr(limits, "\nMax open files") : NULL;
    if (!line || sscanf(line, " Max open files %*s %llu", &hard) != 1)
        return;
    if (hard >= want)
        doctor_find(d, DOCTOR_OK, "files", NULL,
                    "%llu descriptors are allowed, enough for limits.connections", hard);
    else if (d->running || !doctor_is_system(d))
        doctor_find(
            d, DOCTOR_WARNING, "files",
            "raise LimitNOFILE= of the unit or 'ulimit -Hn', or set limits.connections lower",
            "%llu descriptors are allowed, and limits.connections wants %" PRIu64, hard, want);
}

/* ---- FUSE ---- */

/* In a process of its own: a filesystem that hangs, hangs it. */
static int read_status_file(int fd, const void *userdata)
{
    char path[DOCTOR_PATH_BYTES], text[64] = "";
    snprintf(path, sizeof(path), "%s/status", (const char *)userdata);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = file >= 0 ? read(file, text, sizeof(text) - 1) : -1;
    if (n < 0)
        return errno;
    return write(fd, text, strcspn(text, "\n")) < 0;
}

/* The system's mount is there for everybody; another may be anybody's. */
static void check_mount(struct doctor *d, const char *point)
{
    bool is_system = strcmp(point, "/run/hearth/fs") == 0;
    enum doctor_level bad = is_system ? DOCTOR_PROBLEM : DOCTOR_WARNING;
    struct child_result *result = malloc(sizeof(*result));
    char real[DOCTOR_PATH_BYTES], again[240] = "systemctl restart hearthfs.service";
    if (!result)
        return;
    if (!is_system)
        snprintf(again, sizeof(again), "fusermount3 -uz '%.180s', and start hearthfs again", point);
    int r = child_call(read_status_file, doctor_path(d, point, real), MOUNT_LIMIT_US, result);
    if (r < 0)
        doctor_find(d, bad, "mount", again, "%s does not answer", point);
    else if (result->status == EACCES)
        doctor_find(d, DOCTOR_OK, "mount", NULL, "%s is another user's", point);
    else if (result->status != 0)
        doctor_find(d, bad, "mount", again, "%s cannot be read: %s", point,
                    strerror(result->status));
    else
        doctor_find(d, DOCTOR_OK, "mount", NULL, "%s says %s", point, result->out);
    free(result);
}

/* Lines of mountinfo: "ID PARENT DEV ROOT POINT OPTIONS [FIELDS...] - TYPE SOURCE OPTIONS". */
static size_t check_mounts(struct doctor *d)
{
    _cleanup_free_ char *mounts = doctor_read(d, "/proc/self/mountinfo");
    size_t n = 0;
    char *rest = mounts, *line;
    while (rest && (line = strsep(&rest, "\n"))) {
        char point[4096], type[64];
        const char *tail = strstr(line, " - ");
        if (!tail || sscanf(line, "%*s %*s %*s %*s %4095s", point) != 1 ||
            sscanf(tail, " - %63s", type) != 1 || strncmp(type, "fuse", 4) != 0)
            continue;
        if (!strstr(type, "hearthfs") && strcmp(point, "/run/hearth/fs") != 0)
            continue;
        check_mount(d, point);
        n++;
    }
    return n;
}

static bool in_path(const struct doctor *d, const char *name, char ret[DOCTOR_PATH_BYTES])
{
    static const char *const folders[] = {"/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin",
                                          "/sbin"};
    for (size_t i = 0; i < ELEMENTSOF(folders); i++) {
        char path[64];
        snprintf(path, sizeof(path), "%s/%s", folders[i], name);
        if (access(doctor_path(d, path, ret), X_OK) == 0)
            return true;
    }
    return false;
}

void doctor_fuse(struct doctor *d)
{
    char device[DOCTOR_PATH_BYTES], program[DOCTOR_PATH_BYTES];
    struct stat st;
    bool root = d->caller.uid == 0;
    size_t n_mounts = check_mounts(d);
    if (stat(doctor_path(d, "/dev/fuse", device), &st) < 0)
        doctor_find(d, DOCTOR_WARNING, "fuse", "modprobe fuse; in a container pass /dev/fuse in",
                    "there is no /dev/fuse: hearthfs cannot mount (everything else works)");
    else if (!root && access(device, R_OK | W_OK) < 0)
        doctor_find(d, DOCTOR_WARNING, "fuse", "chmod 0666 /dev/fuse, as root",
                    "/dev/fuse may not be opened by you: your own hearthfs cannot mount");
    else if (!in_path(d, "fusermount3", program))
        doctor_find(d, DOCTOR_WARNING, "fuse", "apt-get install fuse3",
                    "fusermount3 is not installed: hearthfs cannot mount");
    else if (!root && stat(program, &st) == 0 && !(st.st_mode & S_ISUID))
        doctor_find(d, DOCTOR_WARNING, "fuse", "chmod u+s the file, as root",
                    "fusermount3 is not setuid: only root can mount hearthfs");
    else if (n_mounts == 0)
        doctor_find(d, DOCTOR_OK, "fuse", NULL, "hearthfs can mount; none is mounted");
    else
        doctor_find(d, DOCTOR_OK, "fuse", NULL, "hearthfs can mount");
}
