/* hearth: the command line of the local inference daemon. */
#include <signal.h>

#include "cli/cli.h"
#include "lib/cleanup.h"

static const struct cli_command commands[] = {
    {"run", cli_run_model, "MODEL|FILE [PROMPT] [OPTION...]", "continue a text, as it comes",
     "Prints the continuation alone. Without PROMPT the text is read from standard input, to the\n"
     "byte. A model that is not loaded is loaded first; a FILE (with a slash) is opened here and\n"
     "passed along, for this user alone. On a terminal control characters are shown as \\xNN; a\n"
     "pipe gets the bytes as they are. Ctrl-C stops the daemon's work too.\n",
     true},
    {"embed", cli_embed, "MODEL [TEXT]", "print the vector of a text",
     "A JSON array a line, of length 1. Without TEXT each line of standard input is a text, and\n"
     "the n-th line of the output is its vector, or null where it failed.\n",
     false},
    {"tokenize", cli_tokenize, "MODEL [TEXT]", "print the token ids of a text",
     "The ids stand on one line, without a begin-of-sequence token; special tokens in the text\n"
     "are not parsed. Without TEXT it is read from standard input, to the byte.\n",
     true},
    {"warm", cli_warm, "MODEL... [--wait]", "load models ahead",
     "Returns as soon as the daemon has taken the order; with --wait, when every model is ready.\n"
     "On a terminal --wait draws bars; else it prints lines 'NAME STATE DONE_BYTES TOTAL_BYTES'.\n",
     false},
    {"unload", cli_unload, "MODEL...", "let models go",
     "Requests that run finish first. A model that others use is refused, unless you administer\n"
     "the daemon.\n",
     false},
    {"pin", cli_pin, "MODEL... [--off]", "keep models from being evicted",
     "Until --off or the daemon's end; for its administrators. Pinning does not load: see warm.\n",
     false},
    {"models", cli_models, "[MODEL]", "list the models, or show one in full",
     "Without a daemon the models it knew last are listed as cold. Looking never starts it.\n",
     true},
    {"status", cli_status, "", "say whether the daemon runs, and how it is",
     "Flat lines 'key value', the state first: inactive, starting, running, draining or\n"
     "unresponsive. Looking never starts the daemon.\n",
     true},
    {"stats", cli_stats, "[SECTION]", "print what the daemon has counted",
     "Sections: pool, batcher, streaming, loader, prometheus, or a metric's name; all but\n"
     "prometheus by default.\n",
     true},
    {"reload", cli_reload, "", "look through the models directories again",
     "Returns once the daemon has looked; for its administrators. New files appear, those that\n"
     "are gone disappear, and models that failed may be tried again where their files changed.\n",
     false},
    {"top", cli_top, "[--interval TIME] [--once]", "watch the daemon at work",
     "On a terminal the figures are drawn anew every interval; q leaves. Elsewhere they come as a\n"
     "line each, with --json as an object each. Looking never starts the daemon.\n",
     true},
    {"events", cli_events, "", "tell what happens, as it happens",
     "A line each: states of models, failed loads, evictions, refusals. --json prints the objects\n"
     "as they come, one a line. Looking never starts the daemon; when it ends, so does this.\n",
     true},
    {"doctor", cli_doctor, "", "look for what is wrong, and say what to do",
     "A line for each finding: ok, warning or problem, what about, what is so, and what to do.\n"
     "Exit status 1 where there is a problem. Looks only, starts nothing, needs no daemon.\n",
     true},
};

int main(int argc, char **argv)
{
    /* A reader that has had enough ends it without a word, whatever the parent had ignored. */
    signal(SIGPIPE, SIG_DFL);
    return cli_main(commands, ELEMENTSOF(commands), argc, argv);
}
