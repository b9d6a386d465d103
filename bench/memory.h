/* Memory of a request: how much the daemon grows from 1,000 requests in flight to 2,000, KV memory
 * apart, for each of them. A phase of its own after the timing. */
#ifndef HEARTH_BENCH_MEMORY_H
#define HEARTH_BENCH_MEMORY_H

#include <sys/types.h>

#include "bench/load.h"

/* `load` says what a request is and how many connections there are at most. A negative errno with a
 * sentence in ret_message. */
int memory_per_request(const struct load_options *load, pid_t pid, double *ret_bytes,
                       char ret_message[320]);

#endif
