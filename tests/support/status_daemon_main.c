/* status-daemon [--activated] PATH: the made-up daemon as a program, for process tests.
 *
 * Takes a command a line on stdin and answers each with a line on stdout, `ok` or a number; ends
 * with stdin. Commands: model NAME, state WORD, mute, unmute, refuse CODE, accept, goaway, hangup,
 * and count hello|models|warm|unload. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "lib/cleanup.h"
#include "tests/support/status_daemon.h"

static int count(struct status_daemon *daemon, const char *name)
{
    static const struct {
        const char *name;
        enum wire_type type;
    } types[] = {
        {"hello", WIRE_HELLO},
        {"models", WIRE_MODELS},
        {"warm", WIRE_WARM},
        {"unload", WIRE_UNLOAD},
    };

    for (size_t i = 0; i < ELEMENTSOF(types); i++)
        if (strcmp(types[i].name, name) == 0)
            return printf("%" PRIu64 "\n", status_daemon_count(daemon, types[i].type));
    return puts("what?");
}

/* `refuse` keeps a pointer: its code lives here. */
static char code[64];

static int obey(struct status_daemon *daemon, const char *word, const char *argument)
{
    if (strcmp(word, "count") == 0)
        return count(daemon, argument);
    if (strcmp(word, "model") == 0)
        status_daemon_set_model(daemon, argument);
    else if (strcmp(word, "state") == 0)
        status_daemon_set_state(daemon, argument);
    else if (strcmp(word, "mute") == 0 || strcmp(word, "unmute") == 0)
        status_daemon_mute(daemon, word[0] == 'm');
    else if (strcmp(word, "refuse") == 0)
        status_daemon_refuse(daemon, strcpy(code, argument));
    else if (strcmp(word, "accept") == 0)
        status_daemon_refuse(daemon, NULL);
    else if (strcmp(word, "goaway") == 0)
        status_daemon_go_away(daemon);
    else if (strcmp(word, "hangup") == 0)
        status_daemon_hang_up(daemon);
    else
        return puts("what?");
    return puts("ok");
}

int main(int argc, char **argv)
{
    struct status_daemon *daemon;
    char line[128], word[64], argument[64];

    if (argc == 3 && strcmp(argv[1], "--activated") == 0)
        daemon = status_daemon_start_activated(argv[2]);
    else if (argc == 2)
        daemon = status_daemon_start(argv[1]);
    else
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ok");
    while (fgets(line, sizeof(line), stdin)) {
        argument[0] = '\0';
        if (sscanf(line, "%63s %63s", word, argument) >= 1)
            obey(daemon, word, argument);
    }
    status_daemon_stop(daemon);
    return 0;
}
