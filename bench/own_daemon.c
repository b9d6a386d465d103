#include "bench/own_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/daemon.h"
#include "lib/cleanup.h"

#define START_LIMIT_MS   10000
#define EXIT_INTERRUPTED 130

/* A longer $TMPDIR is not used: a socket's path has to fit below it. */
#define TMPDIR_MOST 64u

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

static sigset_t ending_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    return set;
}

/* What the guard has to end: the folder there is, if there is one. */
static _Atomic(struct own_daemon *) guarded;
static _Atomic bool interrupted;

static void be_quiet(void)
{
    int fd = open("/dev/null", O_WRONLY | O_CLOEXEC);

    if (fd >= 0)
        dup2(fd, STDERR_FILENO);
}

/* Waits for a signal that ends the benchmark, and leaves nothing behind. */
static void *guard_main(void *argument)
{
    struct own_daemon *daemon;
    sigset_t ending;
    int signal;
    pid_t pid;

    (void)argument;

    ending = ending_signals();
    if (sigwait(&ending, &signal) != 0)
        return NULL;
    atomic_store(&interrupted, true);
    daemon = atomic_load(&guarded);
    /* What the others say now, they say of a daemon that was taken from them. */
    be_quiet();
    pid = daemon ? daemon->pid : 0;
    if (pid > 0 && kill(pid, SIGKILL) == 0)
        waitpid(pid, NULL, 0);
    if (daemon)
        nftw(daemon->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    _exit(EXIT_INTERRUPTED);
}

/* The guard runs until the program ends. */
static int start_guard(struct own_daemon *daemon)
{
    sigset_t ending = ending_signals();
    pthread_t thread;
    int r;

    atomic_store(&guarded, daemon);
    pthread_sigmask(SIG_BLOCK, &ending, NULL);
    r = pthread_create(&thread, NULL, guard_main, NULL);
    if (r != 0)
        return bench_fail("cannot start a thread: %s", strerror(r));
    pthread_detach(thread);
    return BENCH_DONE;
}

int own_daemon_new(struct own_daemon *daemon)
{
    const char *tmp = getenv("TMPDIR");

    *daemon = (struct own_daemon){0};
    snprintf(daemon->dir, sizeof(daemon->dir), "%s/hearth-bench-XXXXXX",
             tmp && strlen(tmp) <= TMPDIR_MOST ? tmp : "/tmp");
    if (!mkdtemp(daemon->dir)) {
        daemon->dir[0] = 0;
        return bench_fail("cannot make a temporary folder: %s", strerror(errno));
    }
    snprintf(daemon->models, sizeof(daemon->models), "%s/models", daemon->dir);
    snprintf(daemon->socket_path, sizeof(daemon->socket_path), "%s/s", daemon->dir);
    if (mkdir(daemon->models, 0755) < 0)
        return bench_fail("cannot make %s: %s", daemon->models, strerror(errno));
    return start_guard(daemon);
}

static void find_program(char path[4096])
{
    ssize_t n = readlink("/proc/self/exe", path, 4000);
    char *slash;

    path[n > 0 ? n : 0] = 0;
    for (int i = 0; i < 2; i++)
        if ((slash = strrchr(path, '/')))
            *slash = 0;
    strcat(path, "/daemon/hearthd");
    if (access(path, X_OK) < 0)
        strcpy(path, "hearthd");
}

static int write_config(const char *path, const char *yaml)
{
    FILE *file = fopen(path, "we");

    if (!file)
        return bench_fail("cannot write %s: %s", path, strerror(errno));
    fputs(yaml, file);
    return fclose(file) == 0 ? BENCH_DONE : bench_fail("cannot write %s", path);
}

/* In the child: no signal blocked, stderr in the log, gone with its parent. */
_Noreturn static void become(const struct own_daemon *daemon, const char *program,
                             const char *config, const char *log)
{
    sigset_t none;
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0644);

    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (fd >= 0)
        dup2(fd, STDERR_FILENO);
    execlp(program, "hearthd", "--config", config, "--socket", daemon->socket_path, "--models",
           daemon->models, "--state-dir", daemon->dir, NULL);
    _exit(127);
}

static bool has_ended(struct own_daemon *daemon)
{
    if (waitpid(daemon->pid, NULL, WNOHANG) != daemon->pid)
        return false;
    daemon->pid = 0;
    return true;
}

/* The log's last line, as what went wrong. */
static int say_log(const char *log)
{
    char line[512] = "";
    FILE *file = fopen(log, "re");

    while (file && fgets(line, sizeof(line), file))
        ;
    if (file)
        fclose(file);
    line[strcspn(line, "\n")] = 0;
    return bench_fail("hearthd did not start: %s", line[0] ? line : "it said nothing");
}

int own_daemon_start(struct own_daemon *daemon, const char *yaml)
{
    char config[128], log[128], program[4096], message[320];
    pid_t pid;

    snprintf(config, sizeof(config), "%s/hearth.yaml", daemon->dir);
    snprintf(log, sizeof(log), "%s/log", daemon->dir);
    if (write_config(config, yaml) != BENCH_DONE)
        return BENCH_FAILED;
    find_program(program);
    daemon->pid = fork();
    if (daemon->pid == 0)
        become(daemon, program, config, log);
    if (daemon->pid < 0) {
        daemon->pid = 0;
        return bench_fail("cannot start hearthd: %s", strerror(errno));
    }
    for (int ms = 0; ms < START_LIMIT_MS; ms += 10) {
        if (daemon_pid(daemon->socket_path, &pid, message) == 0)
            return BENCH_DONE;
        if (has_ended(daemon))
            return say_log(log);
        usleep(10000);
    }
    return bench_fail("hearthd does not answer on %s", daemon->socket_path);
}

void own_daemon_stop(struct own_daemon *daemon)
{
    if (daemon->pid <= 0)
        return;
    kill(daemon->pid, SIGTERM);
    waitpid(daemon->pid, NULL, 0);
    daemon->pid = 0;
}

void own_daemon_done(struct own_daemon *daemon)
{
    while (atomic_load(&interrupted))
        pause(); /* the guard ends the program */
    own_daemon_stop(daemon);
    atomic_store(&guarded, NULL);
    if (daemon->dir[0])
        nftw(daemon->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    daemon->dir[0] = 0;
}
