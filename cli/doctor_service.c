/* What hearth itself is like here: daemon, socket, units, configuration, models. */
#include <dirent.h>
#include <errno.h>
#include <grp.h>
#include <inttypes.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/child.h"
#include "cli/cli.h"
#include "cli/doctor.h"
#include "lib/cleanup.h"

#define CONNECT_LIMIT_US 2000000u
#define ANSWER_LIMIT_US  2000000u
#define CHECK_LIMIT_US   20000000u
#define SYSTEM_CONFIG    "/etc/hearth/hearth.yaml"
#define SYSTEM_STATE     "/var/lib/hearth"
#define SERVICE_USER     "hearth"
#define SERVICE_GROUP    "hearth"

static bool systemd_runs(const struct doctor *d)
{
    char path[DOCTOR_PATH_BYTES];
    return access(doctor_path(d, "/run/systemd/system", path), F_OK) == 0;
}

static const char *how_to_start(const struct doctor *d, char text[240])
{
    if (doctor_is_system(d) && systemd_runs(d))
        return "systemctl enable --now hearthd.socket";
    if (!d->named && d->caller.uid != 0)
        return "hearthd &"; /* on a socket of the user's own */
    snprintf(text, 240, "hearthd --socket %s &", d->socket);
    return text;
}

/* ---- the daemon ---- */

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct doctor *d = userdata;
    char remedy[240];
    if (reply->kind != HEARTH_ITEM)
        return;
    if (reply->model && reply->state && strcmp(reply->state, "failed") == 0) {
        snprintf(remedy, sizeof(remedy), "mend its file, then: hearth warm %s", reply->model);
        doctor_find(d, DOCTOR_WARNING, "models", remedy, "%s failed to load: %s", reply->model,
                    reply->sentence ? reply->sentence : "it was not said why");
    } else if (!reply->model && reply->info && !d->status) {
        d->status = strdup(reply->info);
        if (reply->version)
            snprintf(d->version, sizeof(d->version), "%s", reply->version);
    }
}

static bool ask(struct doctor *d, struct hearth *h)
{
    uint64_t deadline_us = cli_now_us() + ANSWER_LIMIT_US;
    if (hearth_status(h, on_reply, d, NULL) < 0 || hearth_models(h, NULL, on_reply, d, NULL) < 0)
        return false;
    while (hearth_in_flight(h) > 0) {
        uint64_t now = cli_now_us();
        if (now >= deadline_us || hearth_wait(h, deadline_us - now) < 0)
            return false;
    }
    return true;
}

static void found_running(struct doctor *d, struct hearth *h)
{
    struct ucred peer = {0};
    socklen_t len = sizeof(peer);
    getsockopt(hearth_fd(h), SOL_SOCKET, SO_PEERCRED, &peer, &len);
    d->running = true;
    d->pid = peer.pid;
    d->uid = peer.uid;
    snprintf(d->subject, sizeof(d->subject), "%ld", (long)peer.pid);
}

static const char *how_to_restart(const struct doctor *d)
{
    return doctor_is_system(d) && systemd_runs(d) ? "systemctl restart hearthd.service"
                                                  : "end that process and start hearthd again";
}

void doctor_daemon(struct doctor *d)
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;
    char message[HEARTH_MESSAGE_BYTES] = "";
    _cleanup_(hearth_freep) struct hearth *h = NULL;
    options.socket_path = d->socket;
    options.status_socket = true;
    options.client_name = "hearth doctor";
    options.connect_timeout_us = CONNECT_LIMIT_US;
    snprintf(d->subject, sizeof(d->subject), "self");
    int r = hearth_connect(&options, &h, message);
    if (r == -ENOENT || r == -ECONNREFUSED) {
        doctor_find(d, DOCTOR_OK, "daemon", NULL, "none runs now");
        return;
    }
    if (r < 0 && r != -EACCES) {
        doctor_find(d, DOCTOR_PROBLEM, "daemon", how_to_restart(d), "%s", message);
        return;
    }
    if (r == -EACCES) {
        doctor_find(d, DOCTOR_WARNING, "daemon", NULL, "%s may not be opened by you",
                    d->status_socket);
        return;
    }
    found_running(d, h);
    if (!ask(d, h))
        doctor_find(d, DOCTOR_PROBLEM, "daemon", how_to_restart(d),
                    "process %ld listens on %s and does not answer", (long)d->pid,
                    d->status_socket);
    else if (strcmp(d->version, HEARTH_VERSION) != 0)
        doctor_find(d, DOCTOR_WARNING, "daemon", how_to_restart(d),
                    "version %s runs (process %ld), and hearth is %s", d->version, (long)d->pid,
                    HEARTH_VERSION);
    else
        doctor_find(d, DOCTOR_OK, "daemon", NULL, "version %s runs, process %ld", d->version,
                    (long)d->pid);
}

/* ---- the socket ---- */

/* Whether somebody listens, as /proc/net/unix tells ("Num RefCount Protocol Flags Type St Inode
 * Path"): connecting would start a daemon. */
static bool listened_on(const struct doctor *d)
{
    _cleanup_free_ char *sockets = doctor_read(d, "/proc/net/unix");
    char *rest = sockets, *line;
    while (rest && (line = strsep(&rest, "\n"))) {
        unsigned flags;
        int at = 0;
        if (sscanf(line, "%*s %*s %*s %x %*s %*s %*s %n", &flags, &at) == 1 && at > 0 &&
            (flags & 0x10000) && strcmp(line + at, d->socket) == 0)
            return true;
    }
    return false;
}

static bool in_groups(const struct doctor_caller *caller, gid_t gid)
{
    for (int i = 0; i < caller->n_groups; i++)
        if (caller->groups[i] == gid)
            return true;
    return false;
}

/* Whether the mode's bits (as of "others": 04, 02, 01) allow it. */
static bool may(const struct stat *st, const struct doctor_caller *caller, mode_t bits)
{
    if (caller->uid == 0)
        return true;
    if (st->st_uid == caller->uid)
        return (st->st_mode >> 6 & bits) == bits;
    if (in_groups(caller, st->st_gid))
        return (st->st_mode >> 3 & bits) == bits;
    return (st->st_mode & bits) == bits;
}

static bool member_by_name(const struct group *group, const char *user)
{
    for (char **member = group->gr_mem; member && *member; member++)
        if (strcmp(*member, user) == 0)
            return true;
    return false;
}

static void check_access(struct doctor *d, const struct stat *st)
{
    const struct passwd *user = getpwuid(d->caller.uid);
    const struct group *group = getgrgid(st->st_gid);
    char remedy[240] = "run hearth as its owner or as root";
    if (may(st, &d->caller, 02)) {
        if (st->st_mode & 02)
            doctor_find(d, DOCTOR_WARNING, "access", "give it mode 0660 (SocketMode= of its unit)",
                        "every user of the machine may use %s", d->socket);
        return;
    }
    if (user && group && (st->st_mode >> 3 & 02) && member_by_name(group, user->pw_name))
        doctor_find(d, DOCTOR_PROBLEM, "access", "log in again",
                    "you are in the group %s, but this session is older than that", group->gr_name);
    else {
        if (user && group && (st->st_mode >> 3 & 02))
            snprintf(remedy, sizeof(remedy), "usermod -aG %s %s, as root, and log in again",
                     group->gr_name, user->pw_name);
        doctor_find(d, DOCTOR_PROBLEM, "access", remedy,
                    "%s may not be opened by you: mode %04o, owner %ld, group %ld", d->socket,
                    (unsigned)(st->st_mode & 07777), (long)st->st_uid, (long)st->st_gid);
    }
}

void doctor_socket(struct doctor *d)
{
    char real[DOCTOR_PATH_BYTES], text[240];
    struct stat st;
    if (lstat(doctor_path(d, d->socket, real), &st) < 0) {
        int error = errno;
        doctor_find(d, DOCTOR_PROBLEM, "socket", error == ENOENT ? how_to_start(d, text) : NULL,
                    "%s %s", d->socket,
                    error == ENOENT ? "does not exist: nobody listens" : strerror(error));
        return;
    }
    if (!S_ISSOCK(st.st_mode)) {
        doctor_find(d, DOCTOR_PROBLEM, "socket", "remove it", "%s is there and is no socket",
                    d->socket);
        return;
    }
    if (d->running)
        doctor_find(d, DOCTOR_OK, "socket", NULL, "%s is the daemon's", d->socket);
    else if (listened_on(d))
        doctor_find(d, DOCTOR_OK, "socket", NULL,
                    "%s is listened on: the first request starts a daemon", d->socket);
    else
        doctor_find(d, DOCTOR_PROBLEM, "socket", how_to_start(d, text),
                    "nobody listens on %s: a daemon that died has left it", d->socket);
    check_access(d, &st);
}

/* ---- units ---- */

/* The value of "Key=value" within one unit's lines. */
static const char *property(const char *block, const char *key, char value[64])
{
    size_t len = strlen(key);
    value[0] = '\0';
    for (const char *line = block; *line && *line != '\n';
         line += strcspn(line, "\n"), line += !!*line)
        if (strncmp(line, key, len) == 0 && line[len] == '=')
            snprintf(value, 64, "%.*s", (int)strcspn(line + len + 1, "\n"), line + len + 1);
    return value;
}

static void check_unit(struct doctor *d, const char *block)
{
    char id[64], load[64], active[64], result[64], file[64], restarts[64], remedy[240];
    bool is_socket = strcmp(property(block, "Id", id), "hearthd.socket") == 0;
    bool is_daemon = strcmp(id, "hearthd.service") == 0;
    if (strcmp(property(block, "LoadState", load), "not-found") == 0) {
        if (is_socket)
            doctor_find(d, DOCTOR_WARNING, "systemd", "install the units (meson install -C build)",
                        "%s is not installed", id);
        return;
    }
    property(block, "ActiveState", active);
    property(block, "Result", result);
    property(block, "UnitFileState", file);
    if (strcmp(active, "failed") == 0) {
        snprintf(remedy, sizeof(remedy),
                 "journalctl -u %s -n 20, mend it, then: systemctl reset-failed '%s'; systemctl "
                 "start %s",
                 is_socket ? "hearthd.service" : id, "hearth*", is_daemon ? "hearthd.socket" : id);
        doctor_find(d, DOCTOR_PROBLEM, "systemd", remedy, "%s has failed (%s)", id, result);
    } else if (is_socket && strcmp(active, "active") != 0) {
        doctor_find(d, DOCTOR_PROBLEM, "systemd", "systemctl enable --now hearthd.socket",
                    "%s is %s: nobody listens for requests", id, active);
    } else if (is_socket && strcmp(file, "disabled") == 0) {
        doctor_find(d, DOCTOR_WARNING, "systemd", "systemctl enable hearthd.socket",
                    "%s will not be there after the next start of the machine", id);
    } else if (is_daemon && strtol(property(block, "NRestarts", restarts), NULL, 10) > 0) {
        doctor_find(d, DOCTOR_WARNING, "systemd", "journalctl -u hearthd.service -n 50",
                    "%s has died and been started again %s times", id, restarts);
    } else {
        doctor_find(d, DOCTOR_OK, "systemd", NULL, "%s is %s", id, active);
    }
}

void doctor_systemd(struct doctor *d)
{
    static const char *const show[] = {
        "systemctl",        "show",
        "--no-pager",       "--property=Id,LoadState,ActiveState,UnitFileState,Result,NRestarts",
        "hearthd.socket",   "hearthd.service",
        "hearthfs.service", NULL};
    struct child_result *result;
    if (!doctor_is_system(d) || !systemd_runs(d) || !(result = malloc(sizeof(*result))))
        return;
    if (child_run(show, CHECK_LIMIT_US, result) < 0 || result->status != 0) {
        doctor_find(d, DOCTOR_WARNING, "systemd", "systemctl status 'hearth*'",
                    "systemctl does not say how the units are: %s", result->err);
    } else {
        for (char *block = result->out; block && *block;) {
            char *next = strstr(block, "\n\n");
            check_unit(d, block);
            block = next ? next + 2 : NULL;
        }
    }
    free(result);
    if (!getgrnam(SERVICE_GROUP))
        doctor_find(d, DOCTOR_PROBLEM, "systemd", "systemd-sysusers",
                    "there is no group %s: the socket cannot be made", SERVICE_GROUP);
}

/* ---- configuration ---- */

#define MAX_FLAGS 64

/* The daemon's program: beside this one, where a build or an installation has it, or in $PATH. */
static const char *find_hearthd(const struct doctor *d, char path[DOCTOR_PATH_BYTES])
{
    static const char *const places[] = {"hearthd", "../daemon/hearthd", "../sbin/hearthd"};
    char self[4096];
    ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (d->hearthd)
        return d->hearthd;
    if (len > 0) {
        self[len] = '\0';
        char *slash = strrchr(self, '/');
        if (slash)
            slash[1] = '\0';
        for (size_t i = 0; i < ELEMENTSOF(places); i++) {
            snprintf(path, DOCTOR_PATH_BYTES, "%s%s", self, places[i]);
            if (access(path, X_OK) == 0)
                return path;
        }
    }
    if (access("/usr/sbin/hearthd", X_OK) == 0)
        return "/usr/sbin/hearthd";
    return "hearthd";
}

/* Those flags of a running daemon that say what it reads, out of its command line (words that end
 * with NUL bytes). The result points into `words`. */
static int running_flags(const char *words, size_t len, const char *argv[], int argc)
{
    static const char *const known[] = {"--config", "--models", "--socket", "--state-dir"};
    for (size_t at = 0; at < len && argc + 2 < MAX_FLAGS; at += strlen(words + at) + 1) {
        const char *word = words + at;
        for (size_t i = 0; i < ELEMENTSOF(known); i++) {
            size_t n = strlen(known[i]), next = at + strlen(word) + 1;
            if (strncmp(word, known[i], n) != 0 || (word[n] && word[n] != '='))
                continue;
            if (word[n] == '=') {
                argv[argc++] = word;
            } else if (next < len) {
                argv[argc++] = word;
                argv[argc++] = words + next;
            }
        }
    }
    return argc;
}

static int default_flags(const struct doctor *d, const char *argv[], int argc)
{
    char real[DOCTOR_PATH_BYTES];
    if (doctor_is_system(d) && access(doctor_path(d, SYSTEM_CONFIG, real), F_OK) == 0) {
        argv[argc++] = "--config";
        argv[argc++] = SYSTEM_CONFIG;
        argv[argc++] = "--state-dir";
        argv[argc++] = SYSTEM_STATE;
    } else if (d->named) {
        argv[argc++] = "--socket";
        argv[argc++] = d->socket;
    }
    return argc;
}

/* The first line without the program's name before it. */
static const char *first_line(char *text)
{
    text[strcspn(text, "\n")] = '\0';
    return strncmp(text, "hearthd: ", 9) == 0 ? text + 9 : text;
}

static void checked(struct doctor *d, struct child_result *result)
{
    char config[480] = "none";
    if (result->status != 0) {
        doctor_find(d, DOCTOR_PROBLEM, "config",
                    result->status == 2 ? "mend it; 'hearthd --check --config FILE' looks again"
                                        : NULL,
                    "%s", *result->err ? first_line(result->err) : "hearthd --check failed");
        return;
    }
    d->check = strdup(result->out);
    doctor_text(d->check, "config", 0, config, sizeof(config));
    if (strcmp(config, "none") == 0)
        doctor_find(d, DOCTOR_OK, "config", NULL, "no file, so the defaults");
    else
        doctor_find(d, DOCTOR_OK, "config", NULL, "%s has no error", config);
}

void doctor_config(struct doctor *d)
{
    static const char *const service_env[] = {
        "env", "-u",         "XDG_DATA_HOME",       "-u", "XDG_STATE_HOME", "-u", "XDG_CONFIG_HOME",
        "-u",  "HEARTH_CPU", ("HOME=" SYSTEM_STATE)};
    char path[DOCTOR_PATH_BYTES], cmdline[64];
    const char *argv[MAX_FLAGS + ELEMENTSOF(service_env) + 4];
    int argc = 0;
    /* The unit's environment is not this shell's. */
    for (size_t i = 0; i < ELEMENTSOF(service_env) && doctor_is_system(d); i++)
        argv[argc++] = service_env[i];
    argv[argc++] = find_hearthd(d, path);
    argv[argc++] = "--check";
    size_t len = 0;
    struct child_result *result = malloc(sizeof(*result));
    snprintf(cmdline, sizeof(cmdline), "/proc/%s/cmdline", d->subject);
    _cleanup_free_ char *words = d->running ? doctor_read_bytes(d, cmdline, &len) : NULL;
    if (!result)
        return;
    argc = words ? running_flags(words, len, argv, argc) : default_flags(d, argv, argc);
    argv[argc] = NULL;
    int r = child_run(argv, CHECK_LIMIT_US, result);
    if (r == -ENOENT)
        doctor_find(d, DOCTOR_WARNING, "config", "install hearthd, or put it into $PATH",
                    "hearthd was not found: its configuration and models were not looked at");
    else if (r < 0)
        doctor_find(d, DOCTOR_WARNING, "config", NULL, "hearthd --check did not end: %s",
                    strerror(-r));
    else
        checked(d, result);
    free(result);
}

/* ---- models ---- */

/* Who reads the models: the daemon's user, as far as it is known. */
static void reader_of(const struct doctor *d, struct doctor_caller *ret)
{
    const struct passwd *user = NULL;
    if (d->running)
        user = getpwuid(d->uid);
    else if (doctor_is_system(d))
        user = getpwnam(SERVICE_USER);
    *ret = d->caller;
    if (!user)
        return;
    ret->uid = user->pw_uid;
    ret->n_groups = DOCTOR_MAX_GROUPS;
    if (getgrouplist(user->pw_name, user->pw_gid, ret->groups, &ret->n_groups) < 0)
        ret->n_groups = 0;
}

static bool is_gguf(const struct dirent *entry)
{
    size_t len = strlen(entry->d_name);
    return len > 5 && strcmp(entry->d_name + len - 5, ".gguf") == 0;
}

static void check_files(struct doctor *d, const char *dir, DIR *files,
                        const struct doctor_caller *reader)
{
    const struct dirent *entry;
    size_t n = 0;
    while ((entry = readdir(files))) {
        struct stat st;
        char remedy[240];
        if (!is_gguf(entry) || fstatat(dirfd(files), entry->d_name, &st, 0) < 0)
            continue;
        n++;
        if (may(&st, reader, 04))
            continue;
        snprintf(remedy, sizeof(remedy), "chmod a+r '%.90s/%.100s'", dir, entry->d_name);
        doctor_find(d, DOCTOR_WARNING, "models", remedy,
                    "%s/%s cannot be read by the daemon's user (uid %ld)", dir, entry->d_name,
                    (long)reader->uid);
    }
    doctor_find(d, DOCTOR_OK, "models", NULL, "%s: %zu files of models", dir, n);
}

static void check_directory(struct doctor *d, const char *dir, const struct doctor_caller *reader)
{
    char real[DOCTOR_PATH_BYTES], remedy[240];
    struct stat st;
    DIR *files;
    if (stat(doctor_path(d, dir, real), &st) < 0 && errno == ENOENT) {
        doctor_find(d, DOCTOR_OK, "models", NULL, "%s is not there: models may be put there", dir);
        return;
    }
    files = opendir(real);
    if (!files) {
        doctor_find(d, DOCTOR_WARNING, "models", "look as root", "%s cannot be read by you: %s",
                    dir, strerror(errno));
        return;
    }
    snprintf(remedy, sizeof(remedy), "chmod a+rx '%.200s'", dir);
    if (!may(&st, reader, 05))
        doctor_find(d, DOCTOR_WARNING, "models", remedy,
                    "%s cannot be read by the daemon's user (uid %ld)", dir, (long)reader->uid);
    else
        check_files(d, dir, files, reader);
    closedir(files);
}

void doctor_models(struct doctor *d)
{
    char text[480];
    struct doctor_caller *reader = malloc(sizeof(*reader));
    if (!reader)
        return;
    reader_of(d, reader);
    for (size_t i = 0; doctor_text(d->check, "models_dir", i, text, sizeof(text)); i++)
        check_directory(d, text, reader);
    free(reader);
    for (size_t i = 0; doctor_text(d->check, "warning", i, text, sizeof(text)); i++)
        doctor_find(d, DOCTOR_WARNING, "models", NULL, "%s", text);
}
