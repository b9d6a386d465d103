/* hearth doctor: what is wrong with this machine's hearth, and what to do. */
#include "cli/doctor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/output.h"
#include "lib/cleanup.h"

#define READ_MAX_BYTES (1u << 20)
#define SYSTEM_SOCKET  "/run/hearth/hearth.sock"

const char *doctor_level_word(enum doctor_level level)
{
    static const char *const words[] = {
        [DOCTOR_OK] = "ok",
        [DOCTOR_WARNING] = "warning",
        [DOCTOR_PROBLEM] = "problem",
    };
    return words[level];
}

void doctor_find(struct doctor *d, enum doctor_level level, const char *area, const char *remedy,
                 const char *format, ...)
{
    if (d->n == DOCTOR_MAX_FINDINGS)
        return;
    struct doctor_finding *f = &d->findings[d->n++];
    *f = (struct doctor_finding){.level = level, .area = area};
    snprintf(f->remedy, sizeof(f->remedy), "%s", remedy ? remedy : "");
    va_list ap;
    va_start(ap, format);
    vsnprintf(f->text, sizeof(f->text), format, ap);
    va_end(ap);
    f->text[strcspn(f->text, "\n")] = '\0'; /* a finding is a line */
}

size_t doctor_count(const struct doctor *d, enum doctor_level level)
{
    size_t n = 0;
    for (size_t i = 0; i < d->n; i++)
        n += d->findings[i].level == level;
    return n;
}

const char *doctor_path(const struct doctor *d, const char *path, char ret[DOCTOR_PATH_BYTES])
{
    snprintf(ret, DOCTOR_PATH_BYTES, "%s%s", d->root, path);
    return ret;
}

char *doctor_read_bytes(const struct doctor *d, const char *path, size_t *ret_len)
{
    char real[DOCTOR_PATH_BYTES];
    _cleanup_close_ int fd = open(doctor_path(d, path, real), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    _cleanup_free_ char *text = fd >= 0 ? malloc(READ_MAX_BYTES + 1) : NULL;
    size_t len = 0;
    ssize_t n = 1;
    if (!text)
        return NULL;
    while (n > 0 && len < READ_MAX_BYTES) {
        n = read(fd, text + len, READ_MAX_BYTES - len);
        len += n > 0 ? (size_t)n : 0;
    }
    if (n < 0)
        return NULL;
    text[len] = '\0';
    if (ret_len)
        *ret_len = len;
    return TAKE_PTR(text);
}

bool doctor_text(const char *lines, const char *key, size_t nth, char *ret, size_t size)
{
    size_t key_len = strlen(key);
    for (const char *line = lines; line && *line;) {
        size_t len = strcspn(line, "\n");
        bool has = len > key_len && line[key_len] == ' ' && memcmp(line, key, key_len) == 0;
        if (has && nth-- == 0) {
            snprintf(ret, size, "%.*s", (int)(len - key_len - 1), line + key_len + 1);
            return true;
        }
        line += len + (line[len] == '\n');
    }
    return false;
}

uint64_t doctor_number(const char *lines, const char *key, uint64_t missing)
{
    char text[32], *end;
    if (!doctor_text(lines, key, 0, text, sizeof(text)))
        return missing;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    return end == text || errno ? missing : value;
}

bool doctor_is_system(const struct doctor *d)
{
    return strcmp(d->socket, SYSTEM_SOCKET) == 0;
}

/* ---- the command ---- */

static void print_lines(const struct doctor *d)
{
    size_t width = 0;
    for (size_t i = 0; i < d->n; i++)
        width = MAX(width, strlen(d->findings[i].area));
    for (size_t i = 0; i < d->n; i++) {
        const struct doctor_finding *f = &d->findings[i];
        _cleanup_free_ char *text = text_escape(f->text, strlen(f->text), false);
        _cleanup_free_ char *remedy = text_escape(f->remedy, strlen(f->remedy), false);
        printf("%-7s  %-*s  %s%s%s\n", doctor_level_word(f->level), (int)width, f->area,
               text ? text : "", *f->remedy ? "; do: " : "", remedy ? remedy : "");
    }
}

static int print_json(const struct doctor *d)
{
    json_t *list = json_array();
    for (size_t i = 0; i < d->n; i++) {
        const struct doctor_finding *f = &d->findings[i];
        json_t *o = json_object();
        json_object_set_new(o, "level", json_text(doctor_level_word(f->level)));
        json_object_set_new(o, "area", json_text(f->area));
        json_object_set_new(o, "text", json_text(f->text));
        json_object_set_new(o, "do", *f->remedy ? json_text(f->remedy) : json_null());
        json_array_append_new(list, o);
    }
    return json_print(list);
}

static void (*const checks[])(struct doctor *d) = {
    doctor_daemon, doctor_socket, doctor_systemd,     doctor_config, doctor_models,
    doctor_cpu,    doctor_memory, doctor_descriptors, doctor_fuse,
};

int cli_doctor(struct cli *cli, int argc, char **argv)
{
    size_t n;
    int exit_code;
    if (!cli_parse(cli, NULL, 0, argc, argv, 0, 0, NULL, &n, &exit_code))
        return exit_code;
    _cleanup_free_ struct doctor *d = calloc(1, sizeof(*d));
    if (!d)
        return cli_error("no memory to look at anything");
    d->root = "";
    d->named = cli->socket || getenv("HEARTH_SOCKET");
    d->caller.uid = geteuid();
    d->caller.n_groups = MAX(getgroups(DOCTOR_MAX_GROUPS - 1, d->caller.groups), 0);
    d->caller.groups[d->caller.n_groups++] = getegid();
    int r = hearth_socket_path(cli->socket, d->socket);
    if (r == 0)
        r = hearth_status_path(d->socket, d->status_socket);
    if (r < 0)
        return cli_error("no socket: %s", strerror(-r));
    for (size_t i = 0; i < ELEMENTSOF(checks); i++)
        checks[i](d);
    exit_code = CLI_DONE;
    if (cli->json)
        exit_code = print_json(d);
    else
        print_lines(d);
    free(d->status);
    free(d->check);
    return exit_code == CLI_DONE && doctor_count(d, DOCTOR_PROBLEM) ? CLI_FAILED : exit_code;
}
