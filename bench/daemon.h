/* The daemon under test, seen from outside: its counters over the status socket, its memory and CPU
 * in /proc. Hides both. */
#ifndef HEARTH_BENCH_DAEMON_H
#define HEARTH_BENCH_DAEMON_H

#include <stdint.h>
#include <sys/types.h>

/* A moment of the counters that the ratios are made of; -1: the daemon has no such counter. */
struct daemon_counters {
    double requests, requests_reused;
    double step_rows, step_runnable;
    double engine_cpu_s, engine_busy_s, engine_run_delay_s;
    double frames, frames_waited;
    double kv_used_bytes;
};

/* -errno with a sentence in ret_message (320 bytes). */
int daemon_pid(const char *socket_path, pid_t *ret_pid, char ret_message[320]);
int daemon_counters(const char *socket_path, struct daemon_counters *ret, char ret_message[320]);
/* Loads the model and waits for it. */
int daemon_warm(const char *socket_path, const char *model, char ret_message[320]);
/* Lets it go and waits until it is cold. */
int daemon_unload(const char *socket_path, const char *model, char ret_message[320]);
/* 0 when the process cannot be looked at. */
uint64_t daemon_rss_bytes(pid_t pid);
double daemon_cpu_s(pid_t pid);
/* The most resident memory since daemon_reset_peak(), or since its start. */
uint64_t daemon_peak_bytes(pid_t pid);
void daemon_reset_peak(pid_t pid);

#endif
