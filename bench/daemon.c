#include "bench/daemon.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/cleanup.h"
#include "lib/hearth.h"

#define ANSWER_US 60000000u

#define COLD_LIMIT_MS 20000

struct answer {
    struct daemon_counters *counters;
    bool cold; /* of a model that was asked about */
    char *message;
    int error;
};

static int connect_to(const char *socket_path, struct hearth **ret_hearth, char ret_message[320])
{
    struct hearth_options options = HEARTH_OPTIONS_INIT;

    options.socket_path = socket_path;
    return hearth_connect(&options, ret_hearth, ret_message);
}

int daemon_pid(const char *socket_path, pid_t *ret_pid, char ret_message[320])
{
    struct hearth *hearth;
    int r = connect_to(socket_path, &hearth, ret_message);

    if (r < 0)
        return r;
    *ret_pid = (pid_t)hearth_daemon_pid(hearth);
    hearth_free(hearth);
    return 0;
}

static void take_line(struct daemon_counters *counters, const char *key, double value)
{
    const struct {
        const char *key;
        double *value;
    } wanted[] = {
        {"requests_total", &counters->requests},
        {"requests_reused_connection_total", &counters->requests_reused},
        {"step_rows_total", &counters->step_rows},
        {"step_runnable_total", &counters->step_runnable},
        {"engine_cpu_seconds_total", &counters->engine_cpu_s},
        {"engine_busy_seconds_total", &counters->engine_busy_s},
        {"engine_run_delay_seconds_total", &counters->engine_run_delay_s},
        {"stream_frames_total", &counters->frames},
        {"stream_frames_waited_total", &counters->frames_waited},
        {"kv_used_bytes", &counters->kv_used_bytes},
    };

    for (size_t i = 0; i < ELEMENTSOF(wanted); i++)
        if (strcmp(key, wanted[i].key) == 0)
            *wanted[i].value = value;
}

static void on_reply(void *userdata, const struct hearth_reply *reply)
{
    struct answer *answer = userdata;
    char key[128];
    double value;

    if (reply->kind == HEARTH_ERROR) {
        answer->error = -EIO;
        snprintf(answer->message, 320, "%s", reply->sentence);
    }
    if (reply->kind == HEARTH_ITEM && reply->state)
        answer->cold = strcmp(reply->state, "cold") == 0;
    if (reply->kind != HEARTH_ITEM || !answer->counters || !reply->text)
        return;
    for (const char *line = reply->text; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (sscanf(line, "%127s %lf", key, &value) == 2)
            take_line(answer->counters, key, value);
    }
}

/* What came of a request: of `id`, once it was sent (0). */
static int finish(struct hearth *hearth, int sent, const uint64_t *id, const struct answer *answer)
{
    int r = sent < 0 ? sent : hearth_finish(hearth, *id, ANSWER_US);

    return r < 0 ? r : answer->error;
}

/* Requests on a connection, about a model or not. */
typedef int (*dialogue_fn)(struct hearth *hearth, const char *model, struct answer *answer);

static int ask(const char *socket_path, dialogue_fn dialogue, const char *model,
               struct answer *answer)
{
    struct hearth *hearth;
    int r = connect_to(socket_path, &hearth, answer->message);

    if (r < 0)
        return r;
    r = dialogue(hearth, model, answer);
    hearth_free(hearth);
    return r;
}

static int counters(struct hearth *hearth, const char *model, struct answer *answer)
{
    uint64_t id = 0;

    (void)model;
    return finish(hearth, hearth_metrics(hearth, NULL, on_reply, answer, &id), &id, answer);
}

int daemon_counters(const char *socket_path, struct daemon_counters *ret, char ret_message[320])
{
    struct answer answer = {.counters = ret, .message = ret_message};

    *ret = (struct daemon_counters){-1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    return ask(socket_path, counters, NULL, &answer);
}

static int warm(struct hearth *hearth, const char *model, struct answer *answer)
{
    uint64_t id = 0;

    return finish(hearth, hearth_warm(hearth, model, true, on_reply, answer, &id), &id, answer);
}

int daemon_warm(const char *socket_path, const char *model, char ret_message[320])
{
    return ask(socket_path, warm, model, &(struct answer){.message = ret_message});
}

static int unload(struct hearth *hearth, const char *model, struct answer *answer)
{
    uint64_t id = 0;
    int r = finish(hearth, hearth_unload(hearth, model, on_reply, answer, &id), &id, answer);

    for (int ms = 0; r == 0 && ms < COLD_LIMIT_MS; ms += 2) {
        r = finish(hearth, hearth_models(hearth, model, on_reply, answer, &id), &id, answer);
        if (r < 0 || answer->cold)
            return r;
        usleep(2000);
    }
    if (r < 0)
        return r;
    snprintf(answer->message, 320, "%s does not get cold", model);
    return -ETIMEDOUT;
}

int daemon_unload(const char *socket_path, const char *model, char ret_message[320])
{
    return ask(socket_path, unload, model, &(struct answer){.message = ret_message});
}

uint64_t daemon_rss_bytes(pid_t pid)
{
    char path[64];
    unsigned long size, resident = 0;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/statm", (int)pid);
    file = fopen(path, "re");
    if (!file)
        return 0;
    if (fscanf(file, "%lu %lu", &size, &resident) != 2)
        resident = 0;
    fclose(file);
    return (uint64_t)resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

double daemon_cpu_s(pid_t pid)
{
    char path[64], line[1024];
    unsigned long user = 0, system = 0;
    const char *after;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    file = fopen(path, "re");
    if (!file)
        return 0;
    /* Behind the name, which may hold anything: state and ten numbers, then the two. */
    after = fgets(line, sizeof(line), file) ? strrchr(line, ')') : NULL;
    fclose(file);
    if (!after || sscanf(after + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
                         &system) != 2)
        return 0;
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

uint64_t daemon_peak_bytes(pid_t pid)
{
    char path[64], line[256];
    unsigned long long kib = 0;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    file = fopen(path, "re");
    while (file && fgets(line, sizeof(line), file))
        if (sscanf(line, "VmHWM: %llu", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return (uint64_t)kib * 1024;
}

void daemon_reset_peak(pid_t pid)
{
    char path[64];
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/clear_refs", (int)pid);
    file = fopen(path, "we");
    if (!file)
        return;
    fputs("5", file);
    fclose(file);
}
