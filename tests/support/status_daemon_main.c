/* status-daemon [--activated] PATH: the made-up daemon as a program, for process tests.
 *
 * Takes a command a line on stdin and answers each with a line on stdout, `ok` or a number; ends
 * with stdin. Commands: model NAME, state WORD, mute, unmute, refuse CODE, accept, push 0|1,
 * event TEXT, lose N, break CODE, goaway, hangup, holds, caller, and count
 * hello|models|warm|unload|set|hold|subscribe|ping. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"
#include "tests/support/status_daemon.h"

static int count(struct status_daemon *daemon, const char *name)
{
    static const struct {
        const char *name;
        enum wire_type type;
    } types[] = {
        {"hello", WIRE_HELLO},         {"models", WIRE_MODELS}, {"warm", WIRE_WARM},
        {"unload", WIRE_UNLOAD},       {"set", WIRE_SET},       {"hold", WIRE_HOLD},
        {"subscribe", WIRE_SUBSCRIBE}, {"ping", WIRE_PING},
    };

    for (size_t i = 0; i < ELEMENTSOF(types); i++)
        if (strcmp(types[i].name, name) == 0)
            return printf("%" PRIu64 "\n", status_daemon_count(daemon, types[i].type));
    return puts("what?");
}

/* `refuse` keeps a pointer: its code lives here. */
static char code[64];

/* Commands that answer with something; -1: none of them. */
static int tell(struct status_daemon *daemon, const char *word, const char *argument)
{
    char caller[256];

    if (strcmp(word, "count") == 0)
        return count(daemon, argument);
    if (strcmp(word, "holds") == 0)
        return printf("%" PRIu64 "\n", status_daemon_holds(daemon));
    if (strcmp(word, "caller") != 0)
        return -1;
    status_daemon_get_caller(daemon, caller, sizeof(caller));
    return puts(caller);
}

static int obey(struct status_daemon *daemon, const char *word, const char *argument)
{
    if (tell(daemon, word, argument) >= 0)
        return 0;
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
    else if (strcmp(word, "push") == 0)
        status_daemon_push(daemon, argument[0] == '1');
    else if (strcmp(word, "event") == 0)
        status_daemon_event(daemon, argument, 0);
    else if (strcmp(word, "lose") == 0)
        status_daemon_event(daemon, NULL, strtoull(argument, NULL, 10));
    else if (strcmp(word, "break") == 0)
        status_daemon_break_holds(daemon, argument);
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
    char line[8192], word[64], argument[8192];

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
        if (sscanf(line, "%63s %8191[^\n]", word, argument) >= 1)
            obey(daemon, word, argument);
    }
    status_daemon_stop(daemon);
    return 0;
}
