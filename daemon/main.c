/* hearthd: keeps language models warm and serves them on one Unix socket. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "daemon/check.h"
#include "daemon/config.h"
#include "daemon/log.h"
#include "daemon/model/registry.h"
#include "daemon/net/server.h"
#include "lib/cleanup.h"
#include "lib/hearth.h"

enum { EXIT_USAGE = 2 };

/* What the command line asks for. */
struct arguments {
    const char *config_path, *socket_path, *state_dir;
    const char **models_dirs;
    size_t n_models_dirs;
    bool check, list, print_keys, verbose;
    char *config_used; /* the file that was read, allocated */
};

static void print_usage(FILE *out)
{
    fputs("Usage: hearthd [OPTION]...\n"
          "Keeps language models (GGUF) warm and serves them on one Unix socket.\n"
          "\n"
          "  --socket PATH     listen there (default: the socket systemd passes, else\n"
          "                    $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth/hearth.sock,\n"
          "                    /run/hearth/hearth.sock)\n"
          "  --models DIR      look for NAME.gguf there; may be given several times\n"
          "  --state-dir DIR   keep what outlives the daemon there\n"
          "  --config FILE     read the configuration (YAML) from FILE\n"
          "  --check           check the configuration and the models, print what would be\n"
          "                    run with, and exit\n"
          "  --list            print the names of the models, write them to the list that is\n"
          "                    read while no daemon runs, and exit\n"
          "  --print-keys      print every configuration key with its default and exit\n"
          "  --verbose         log connections that come and go, too\n"
          "  --version, --help\n"
          "\n"
          "Exit status: 0 after a drain, 1 failed, 2 usage or configuration.\n"
          "See hearthd(8) and docs/configuration.md.\n",
          out);
}

/* 0 to go on, else the exit status + 1. */
static int parse_arguments(int argc, char **argv, struct arguments *ret)
{
    enum { SOCKET = 256, MODELS, STATE_DIR, CONFIG, CHECK, LIST, KEYS, VERBOSE, VERSION, HELP };
    static const struct option options[] = {{"socket", required_argument, NULL, SOCKET},
                                            {"models", required_argument, NULL, MODELS},
                                            {"state-dir", required_argument, NULL, STATE_DIR},
                                            {"config", required_argument, NULL, CONFIG},
                                            {"check", no_argument, NULL, CHECK},
                                            {"list", no_argument, NULL, LIST},
                                            {"print-keys", no_argument, NULL, KEYS},
                                            {"verbose", no_argument, NULL, VERBOSE},
                                            {"version", no_argument, NULL, VERSION},
                                            {"help", no_argument, NULL, HELP},
                                            {0}};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
        switch (c) {
        case SOCKET: ret->socket_path = optarg; break;
        case MODELS: ret->models_dirs[ret->n_models_dirs++] = optarg; break;
        case STATE_DIR: ret->state_dir = optarg; break;
        case CONFIG: ret->config_path = optarg; break;
        case CHECK: ret->check = true; break;
        case LIST: ret->list = true; break;
        case KEYS: ret->print_keys = true; break;
        case VERBOSE: ret->verbose = true; break;
        case VERSION: puts("hearthd " HEARTH_VERSION); return EXIT_SUCCESS + 1;
        case HELP: print_usage(stdout); return EXIT_SUCCESS + 1;
        default: fputs("Try 'hearthd --help'.\n", stderr); return EXIT_USAGE + 1;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "hearthd: unexpected argument %s\nTry 'hearthd --help'.\n", argv[optind]);
        return EXIT_USAGE + 1;
    }
    return 0;
}

/* The file that is read: the one named; none beside --socket; else the user's own, if there is
 * one. */
static int read_config(struct config *config, struct arguments *arguments, struct fault *ret_fault)
{
    _cleanup_free_ char *path = NULL;
    const char *home = getenv("XDG_CONFIG_HOME");
    int r;

    if (arguments->config_path) {
        arguments->config_used = strdup(arguments->config_path);
        return config_load(config, arguments->config_path, ret_fault);
    }
    if (arguments->socket_path)
        return 0;
    if (home && home[0] == '/')
        r = asprintf(&path, "%s/hearth/hearth.yaml", home);
    else if (getenv("HOME"))
        r = asprintf(&path, "%s/.config/hearth/hearth.yaml", getenv("HOME"));
    else
        return 0;
    if (r < 0)
        return fault_set(ret_fault, -ENOMEM, "no memory for the configuration");
    r = config_load(config, path, ret_fault);
    if (r == -ENOENT)
        return 0;
    arguments->config_used = TAKE_PTR(path);
    return r;
}

static int apply_arguments(struct config *config, struct arguments *arguments,
                           struct fault *ret_fault)
{
    int r = read_config(config, arguments, ret_fault);

    for (size_t i = 0; i < arguments->n_models_dirs && r >= 0; i++)
        r = config_add_models_dir(config, arguments->models_dirs[i]);
    if (r >= 0 && arguments->state_dir)
        r = config_set_state_dir(config, arguments->state_dir);
    if (r >= 0)
        r = config_check(config, ret_fault);
    return r < 0 || arguments->list ? r : registry_check_config(config, ret_fault);
}

/* As many descriptors as the kernel lets this process have, up to what the connections need. */
static void raise_descriptors(const struct config *config)
{
    struct rlimit limit;
    rlim_t want = (rlim_t)config->limits.connections + 256;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= want)
        return;
    limit.rlim_cur = MIN(want, limit.rlim_max);
    if (setrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < want)
        log_warning("only %llu file descriptors are allowed: fewer connections than "
                    "limits.connections (%u) will do; raise LimitNOFILE",
                    (unsigned long long)limit.rlim_cur, config->limits.connections);
}

static int serve(const struct config *config, const struct arguments *arguments)
{
    struct clock clock = {.now_us = clock_monotonic_us};
    struct server_options options = {
        .config = config, .clock = &clock, .socket_path = arguments->socket_path};
    struct server *server = NULL;
    struct metrics *metrics = NULL;
    struct fault fault = {.text = "out of memory"};
    sigset_t signals;
    int r;

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    raise_descriptors(config);
    r = kernels_choose(getenv("HEARTH_CPU"), &options.kernels, &fault);
    if (r == 0)
        r = metrics_new(&metrics);
    options.metrics = metrics;
    if (r == 0)
        r = server_new(&options, &server, &fault);
    if (r == 0)
        r = server_run(server);
    else
        log_error("%s", fault.text);
    server_free(server);
    metrics_free(metrics);
    return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* Prints the names, and leaves them where they are looked for while no daemon runs. */
static int list(const struct config *config, const struct arguments *arguments,
                struct fault *ret_fault)
{
    char socket_path[HEARTH_PATH_BYTES];
    _cleanup_free_ char *names_path = NULL;
    int r = listener_path(arguments->socket_path, socket_path);

    if (r == 0)
        r = server_names_path(config, socket_path, &names_path);
    if (r < 0)
        return fault_set(ret_fault, r, "the socket's path is too long");
    return registry_list_names(config, names_path, stdout, ret_fault);
}

int main(int argc, char **argv)
{
    struct arguments arguments = {0};
    struct config *config = NULL;
    struct fault fault = {.text = "out of memory"};
    int r;

    arguments.models_dirs = calloc((size_t)argc, sizeof(*arguments.models_dirs));
    if (!arguments.models_dirs)
        return EXIT_FAILURE;
    r = parse_arguments(argc, argv, &arguments);
    if (r == 0 && arguments.print_keys) {
        config_print_keys(stdout);
        r = EXIT_SUCCESS + 1;
    }
    if (r > 0) {
        free(arguments.models_dirs);
        return r - 1;
    }
    log_open(arguments.verbose ? LOG_DEBUG : LOG_INFO);
    r = config_new(&config);
    if (r == 0)
        r = apply_arguments(config, &arguments, &fault);
    if (r < 0) {
        log_error("%s", fault.text);
        r = EXIT_USAGE;
    } else if (arguments.list) {
        r = list(config, &arguments, &fault) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
    } else if (arguments.check) {
        r = check_print(config, arguments.config_used, stdout, &fault) < 0 ? EXIT_FAILURE
                                                                           : EXIT_SUCCESS;
    } else {
        r = serve(config, &arguments);
    }
    config_free(config);
    free(arguments.config_used);
    free(arguments.models_dirs);
    return r;
}
