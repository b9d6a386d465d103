#include "daemon/serve/worktime.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

/* How often, while busy, CPU and run-queue delay are read. */
#define ACCOUNT_EVERY_US 100000u

static uint64_t thread_cpu_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

/* Time this thread waited for a CPU, from /proc/thread-self/schedstat (its second number). */
static uint64_t run_delay_ns(const struct worktime *worktime)
{
    char text[96];
    uint64_t on_cpu, delay;
    ssize_t n;

    if (worktime->schedstat_fd < 0)
        return 0;
    n = pread(worktime->schedstat_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    return sscanf(text, "%" SCNu64 " %" SCNu64, &on_cpu, &delay) == 2 ? delay : 0;
}

void worktime_begin(struct worktime *worktime, struct metrics *metrics)
{
    *worktime = (struct worktime){
        .metrics = metrics,
        .schedstat_fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC),
    };
}

/* The stretch of work so far is counted, and the next begins. */
static void count(struct worktime *worktime, uint64_t now_us)
{
    uint64_t cpu = thread_cpu_us(), delay = run_delay_ns(worktime);

    if (worktime->busy) {
        metrics_add(worktime->metrics, M_ENGINE_BUSY, now_us - worktime->busy_since_us);
        metrics_add(worktime->metrics, M_ENGINE_CPU, cpu - worktime->cpu_at_us);
        if (delay > worktime->run_delay_at_ns)
            metrics_add(worktime->metrics, M_ENGINE_RUN_DELAY,
                        (delay - worktime->run_delay_at_ns) / 1000);
    }
    worktime->busy_since_us = now_us;
    worktime->cpu_at_us = cpu;
    worktime->run_delay_at_ns = delay;
}

bool worktime_set(struct worktime *worktime, bool busy, uint64_t now_us)
{
    bool was_busy = worktime->busy;

    if (busy == was_busy && (!busy || now_us - worktime->busy_since_us < ACCOUNT_EVERY_US))
        return false;
    count(worktime, now_us);
    worktime->busy = busy;
    return was_busy;
}

void worktime_end(struct worktime *worktime)
{
    if (worktime->schedstat_fd >= 0)
        close(worktime->schedstat_fd);
    worktime->schedstat_fd = -1;
}
