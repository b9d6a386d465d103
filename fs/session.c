#include "fs/session.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "fs/fuse_ops.h"
#include "fs/mountpoint.h"
#include "lib/cleanup.h"

#include <fuse_log.h>

#define FUSE_CONF   "/etc/fuse.conf"
#define GROUP       "hearth"
#define OPTIONS_MAX 1024u
/* Requests answered in a row before anything else is looked after. */
#define BURST_MAX 16u

struct session {
    struct mirror *mirror;
    struct events *events;
    struct link *link;
    struct view *view;
    struct fuse_session *fuse;
    bool mounted;
    int signal_fd;
};

/* What libfuse said last, for our own sentence. libfuse's logger takes no userdata, hence the one
 * variable that is global; written and read on the one thread. */
static struct fault fuse_said;

static void on_fuse_log(enum fuse_log_level level, const char *format, va_list ap)
{
    if (level > FUSE_LOG_WARNING)
        return;
    vsnprintf(fuse_said.text, sizeof(fuse_said.text), format, ap);
    fuse_said.text[strcspn(fuse_said.text, "\n")] = '\0';
}

/* ---- before the mount ---- */

/* Whether fusermount3 lets a user open his mount to others. */
static bool conf_allows_others(void)
{
    FILE *file = fopen(FUSE_CONF, "re");
    char line[256];
    bool allowed = false;

    if (!file)
        return false;
    /* As fusermount3 reads it: without comments, and without the blanks around what is left. */
    while (!allowed && fgets(line, sizeof(line), file)) {
        char *word = line + strspn(line, " \t"), *end = word + strcspn(word, "#\n");
        while (end > word && (end[-1] == ' ' || end[-1] == '\t'))
            end--;
        *end = '\0';
        allowed = strcmp(word, "user_allow_other") == 0;
    }
    fclose(file);
    return allowed;
}

/* Whose the files are: root's and the group's where root has mounted (or has handed us the mount's
 * descriptor), the user's own in his own mount. */
static void files_owner(const struct session_options *options, uid_t *ret_uid, gid_t *ret_gid)
{
    const struct group *group = NULL;
    bool for_all = geteuid() == 0 || mountpoint_is_fd(options->mount_point);

    if (for_all)
        group = getgrnam(GROUP);
    *ret_uid = for_all ? 0 : geteuid();
    *ret_gid = group ? group->gr_gid : getegid();
}

/* ---- building up ---- */

static int open_daemon(struct session *session, const struct session_options *options,
                       struct fault *ret_fault)
{
    const char *explicit_path = options->socket_path;
    char socket_path[HEARTH_PATH_BYTES];
    uid_t uid;
    gid_t gid;
    int r = hearth_socket_path(explicit_path, socket_path);

    if (r < 0)
        return fault_set(ret_fault, r, "the socket's path is longer than %u bytes: %s",
                         HEARTH_PATH_BYTES - 1, explicit_path ? explicit_path : "$HEARTH_SOCKET");
    files_owner(options, &uid, &gid);
    r = mirror_new(&session->mirror);
    if (r == 0)
        r = events_new(&session->events);
    if (r == 0)
        r = link_new(socket_path, session->mirror, session->events, &session->link);
    if (r == 0)
        r = view_new(session->mirror, session->link, session->events, uid, gid, &session->view);
    if (r == -ENAMETOOLONG)
        return fault_set(ret_fault, r,
                         "the path of the status socket that belongs to %s is too long",
                         socket_path);
    return r < 0 ? fault_set(ret_fault, r, "out of memory") : 0;
}

static int mount_view(struct session *session, const struct session_options *options,
                      struct fault *ret_fault)
{
    struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
    char text[OPTIONS_MAX];
    int n, r, flags;

    n = snprintf(text, sizeof(text), "fsname=hearth,subtype=hearthfs,default_permissions%s%s%s",
                 geteuid() == 0 || conf_allows_others() ? ",allow_other" : "",
                 options->mount_options ? "," : "",
                 options->mount_options ? options->mount_options : "");
    if (n < 0 || (size_t)n >= sizeof(text))
        return fault_set(ret_fault, -ENAMETOOLONG, "the mount options are longer than %u bytes",
                         OPTIONS_MAX - 1);
    fuse_set_log_func(on_fuse_log);
    r = fuse_opt_add_arg(&args, "hearthfs") | fuse_opt_add_arg(&args, "-o") |
        fuse_opt_add_arg(&args, text);
    if (r == 0)
        session->fuse = fuse_session_new(&args, view_ops(), sizeof(*view_ops()), session->view);
    fuse_opt_free_args(&args);
    if (!session->fuse)
        return fault_set(ret_fault, -EINVAL, "cannot set up FUSE: %s",
                         fuse_said.text[0] ? fuse_said.text : "out of memory");
    if (fuse_session_mount(session->fuse, options->mount_point) != 0)
        return fault_set(ret_fault, -EIO, "cannot mount on %s: %s", options->mount_point,
                         fuse_said.text[0] ? fuse_said.text
                                           : "fusermount3 refused (its reason is above)");
    session->mounted = true;
    flags = fcntl(fuse_session_fd(session->fuse), F_GETFL);
    if (flags < 0 || fcntl(fuse_session_fd(session->fuse), F_SETFL, flags | O_NONBLOCK) < 0)
        return fault_set(ret_fault, -errno, "cannot make the FUSE descriptor non-blocking: %s",
                         strerror(errno));
    return 0;
}

static int open_signals(struct session *session, struct fault *ret_fault)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    /* Threads started later inherit the mask, so a signal always comes through the descriptor. */
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    session->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return session->signal_fd < 0
               ? fault_set(ret_fault, -errno, "cannot take signals: %s", strerror(errno))
               : 0;
}

static void session_done(struct session *session)
{
    /* Parked requests first: whoever reads gets an answer before the mount goes away. */
    view_free(session->view);
    link_free(session->link);
    if (session->mounted)
        fuse_session_unmount(session->fuse);
    if (session->fuse)
        fuse_session_destroy(session->fuse);
    events_free(session->events);
    mirror_free(session->mirror);
    if (session->signal_fd >= 0)
        close(session->signal_fd);
}

/* ---- the loop ---- */

static int timeout_ms(uint64_t due_us, uint64_t now_us)
{
    if (due_us == UINT64_MAX)
        return -1;
    if (due_us <= now_us)
        return 0;
    return (int)MIN((due_us - now_us + 999) / 1000, (uint64_t)INT_MAX);
}

/* Takes one request of the kernel's: 1, 0 where there is none, or a negative errno that ends the
 * session. */
static int serve_one(struct session *session, struct fuse_buf *buffer)
{
    int r = fuse_session_receive_buf(session->fuse, buffer);

    if (r == -EAGAIN || r == -EINTR || r == 0)
        return 0; /* 0: unmounted, fuse_session_exited() says so */
    if (r < 0)
        return r;
    fuse_session_process_buf(session->fuse, buffer);
    return 1;
}

/* Takes what there is, up to a bound, without asking poll(2) in between: several readers are served
 * faster so, and one is not served slower. 0 or a negative errno. */
static int serve(struct session *session, struct fuse_buf *buffer)
{
    int r = 1;

    for (unsigned n = 0; r > 0 && n < BURST_MAX; n++)
        r = serve_one(session, buffer);
    return MIN(r, 0);
}

static int loop(struct session *session, struct fault *ret_fault)
{
    struct fuse_buf buffer = {.mem = NULL};
    int r = 0;

    while (r == 0 && !fuse_session_exited(session->fuse)) {
        struct pollfd fds[2 + LINK_FDS_MAX] = {
            {.fd = session->signal_fd, .events = POLLIN},
            {.fd = fuse_session_fd(session->fuse), .events = POLLIN},
        };
        size_t n = 2 + link_poll(session->link, fds + 2);
        bool daemon_speaks = false;
        uint64_t now_us = view_now_us();

        if (poll(fds, n, timeout_ms(view_due_us(session->view, now_us), now_us)) < 0 &&
            errno != EINTR) {
            r = fault_set(ret_fault, -errno, "cannot wait for requests: %s", strerror(errno));
            break;
        }
        if (fds[0].revents)
            break;
        for (size_t i = 2; i < n; i++)
            daemon_speaks = daemon_speaks || fds[i].revents;
        if (daemon_speaks)
            link_dispatch(session->link, view_now_us());
        if (fds[1].revents)
            r = serve(session, &buffer);
        if (r < 0)
            fault_set(ret_fault, r, "the kernel's connection broke: %s", strerror(-r));
        view_step(session->view, view_now_us());
    }
    free(buffer.mem);
    return r;
}

int session_run(const struct session_options *options, struct fault *ret_fault)
{
    struct session session = {.signal_fd = -1};
    int r = mountpoint_prepare(options->mount_point, ret_fault);

    if (r == 0)
        r = open_signals(&session, ret_fault);
    if (r == 0)
        r = open_daemon(&session, options, ret_fault);
    if (r == 0)
        r = mount_view(&session, options, ret_fault);
    if (r == 0)
        r = loop(&session, ret_fault);
    session_done(&session);
    return r;
}
