/* What hearthd would run with: the whole of the configuration resolved against this machine, and
 * what is wrong with the models there are.
 *
 * Flat lines `key value` for people and for `hearth doctor`; lines `warning SENTENCE` say what to
 * look at. Opens each model's file and reads its header; nothing is loaded. Hides nothing.
 * Thread: the caller's. */
#ifndef HEARTH_DAEMON_CHECK_H
#define HEARTH_DAEMON_CHECK_H

#include <stdio.h>

#include "daemon/config.h"

/* `config_path`: the file that was read, or NULL. -ENOMEM. */
int check_print(const struct config *config, const char *config_path, FILE *out,
                struct fault *ret_fault);

#endif
