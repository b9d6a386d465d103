/* hearthfs: the daemon's state as files. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "fs/session.h"

static const char usage[] =
    "Usage: hearthfs [--socket PATH] MOUNTPOINT\n"
    "\n"
    "Shows the local inference daemon as files under MOUNTPOINT, until it is unmounted or gets\n"
    "SIGTERM. MOUNTPOINT/README says what is there.\n"
    "\n"
    "  --socket PATH  the daemon's socket (else $HEARTH_SOCKET, "
    "$XDG_RUNTIME_DIR/hearth/hearth.sock,\n"
    "                 /run/hearth/hearth.sock)\n"
    "  -o OPTIONS     mount options\n"
    "  --help, --version\n";

static int fail_usage(void)
{
    fputs(usage, stderr);
    return 2;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {0},
    };
    struct session_options session = {0};
    struct fault fault = {0};
    int c;

    while ((c = getopt_long(argc, argv, "o:h", options, NULL)) != -1) {
        switch (c) {
        case 's': session.socket_path = optarg; break;
        case 'o': session.mount_options = optarg; break;
        case 'h': fputs(usage, stdout); return 0;
        case 'v': puts("hearthfs " HEARTH_VERSION); return 0;
        default: return fail_usage();
        }
    }
    /* mount.fuse3 gives the source first, which is empty in a mount unit. */
    if (argc - optind == 2 && argv[optind][0] == '\0')
        optind++;
    if (argc - optind != 1)
        return fail_usage();
    session.mount_point = argv[optind];
    if (session_run(&session, &fault) < 0) {
        fprintf(stderr, "hearthfs: %s\n", fault.text);
        return 1;
    }
    return 0;
}
