#include "daemon/model/history.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/model/catalog.h"
#include "lib/cleanup.h"
#include "lib/wire.h"

#define MAGIC       "HRTHhst1"
#define MAGIC_BYTES 8u

/* Counts, a model without its name, a request, the checksum. */
#define HEAD_BYTES    (MAGIC_BYTES + 8u)
#define MODEL_BYTES   (8u + 1u)
#define REQUEST_BYTES 8u
#define CHECK_BYTES   8u

_Static_assert(HEAD_BYTES + PREDICTOR_MAX_MODELS * (MODEL_BYTES + WIRE_MAX_MODEL_NAME) +
                       HISTORY_MAX_REQUESTS * REQUEST_BYTES + CHECK_BYTES <=
                   HISTORY_MAX_BYTES,
               "a full history fits");

#define FLAG_READY 1u

struct past_request {
    uint16_t model;
    bool ready;
    uint32_t gap_ms; /* after the one before, at most */
};

struct past_model {
    char name[WIRE_MAX_MODEL_NAME + 1];
    uint64_t bytes;
    uint32_t n_requests; /* in the ring; 0: the place is free */
};

struct history {
    struct past_model models[PREDICTOR_MAX_MODELS];
    struct past_request requests[HISTORY_MAX_REQUESTS]; /* a ring */
    uint32_t first, n;
    uint64_t last_us; /* 0: none in this life */
};

int history_new(struct history **ret_history)
{
    struct history *history = calloc(1, sizeof(*history));

    if (!history)
        return -ENOMEM;
    *ret_history = history;
    return 0;
}

struct history *history_free(struct history *history)
{
    free(history);
    return NULL;
}

size_t history_length(const struct history *history)
{
    return history->n;
}

static const struct past_request *request_at(const struct history *history, uint32_t i)
{
    return &history->requests[(history->first + i) % HISTORY_MAX_REQUESTS];
}

static void drop_oldest(struct history *history)
{
    history->models[request_at(history, 0)->model].n_requests--;
    history->first = (history->first + 1) % HISTORY_MAX_REQUESTS;
    history->n--;
}

/* The model's place; one that no request kept is about is taken for a new name. */
static int place_of(struct history *history, const char *name)
{
    int place = -1;

    for (uint32_t m = 0; m < PREDICTOR_MAX_MODELS; m++) {
        if (history->models[m].n_requests == 0)
            place = place < 0 ? (int)m : place;
        else if (strcmp(history->models[m].name, name) == 0)
            return (int)m;
    }
    return place;
}

void history_add(struct history *history, const char *name, uint64_t bytes, bool ready,
                 uint64_t now_us)
{
    uint64_t gap_ms = history->last_us ? (now_us - history->last_us) / 1000 : UINT32_MAX;
    struct past_model *model;
    int place;

    if (history->n == HISTORY_MAX_REQUESTS)
        drop_oldest(history);
    while ((place = place_of(history, name)) < 0)
        drop_oldest(history);
    model = &history->models[place];
    snprintf(model->name, sizeof(model->name), "%s", name);
    model->bytes = bytes;
    model->n_requests++;
    history->requests[(history->first + history->n++) % HISTORY_MAX_REQUESTS] =
        (struct past_request){(uint16_t)place, ready, (uint32_t)MIN(gap_ms, UINT32_MAX)};
    history->last_us = now_us;
}

void history_tell(const struct history *history, struct predictor *predictor, uint64_t now_us)
{
    uint64_t at_us = now_us;

    for (uint32_t i = 1; i < history->n; i++)
        at_us -= (uint64_t)request_at(history, i)->gap_ms * 1000;
    for (uint32_t i = 0; i < history->n; i++) {
        const struct past_request *request = request_at(history, i);
        const struct past_model *model = &history->models[request->model];
        int number = predictor_model(predictor, model->name);
        at_us += i > 0 ? (uint64_t)request->gap_ms * 1000 : 0;
        if (number < 0)
            continue;
        predictor_set_bytes(predictor, (uint32_t)number, model->bytes);
        predictor_request(predictor, (uint32_t)number, request->ready, at_us);
    }
}

/* ---- bytes ---- */

/* FNV-1a: against accidents, not against people. */
static uint64_t checksum(const uint8_t *bytes, size_t n)
{
    uint64_t sum = 0xcbf29ce484222325u;

    for (size_t i = 0; i < n; i++)
        sum = (sum ^ bytes[i]) * 0x100000001b3u;
    return sum;
}

static uint8_t *put(uint8_t *at, uint64_t value, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        *at++ = (uint8_t)(value >> (8 * i));
    return at;
}

static uint64_t get(const uint8_t **at, uint32_t n)
{
    uint64_t value = 0;

    for (uint32_t i = 0; i < n; i++)
        value |= (uint64_t) * (*at)++ << (8 * i);
    return value;
}

int history_write(const struct history *history, uint8_t **ret_bytes, size_t *ret_n)
{
    uint8_t *bytes = malloc(HISTORY_MAX_BYTES), *at = bytes;
    uint16_t number[PREDICTOR_MAX_MODELS];
    uint32_t n_models = 0;

    if (!bytes)
        return -ENOMEM;
    for (uint32_t m = 0; m < PREDICTOR_MAX_MODELS; m++)
        if (history->models[m].n_requests > 0)
            number[m] = (uint16_t)n_models++;
    memcpy(at, MAGIC, MAGIC_BYTES);
    at = put(at + MAGIC_BYTES, n_models, 4);
    at = put(at, history->n, 4);
    for (uint32_t m = 0; m < PREDICTOR_MAX_MODELS; m++) {
        const struct past_model *model = &history->models[m];
        size_t len = strlen(model->name);
        if (model->n_requests == 0)
            continue;
        at = put(at, model->bytes, 8);
        at = put(at, len, 1);
        memcpy(at, model->name, len);
        at += len;
    }
    for (uint32_t i = 0; i < history->n; i++) {
        const struct past_request *request = request_at(history, i);
        at = put(at, number[request->model], 2);
        at = put(at, request->ready ? FLAG_READY : 0, 2);
        at = put(at, request->gap_ms, 4);
    }
    at = put(at, checksum(bytes, (size_t)(at - bytes)), CHECK_BYTES);
    *ret_bytes = bytes;
    *ret_n = (size_t)(at - bytes);
    return 0;
}

static bool read_models(struct history *history, uint32_t n, const uint8_t **at, const uint8_t *end)
{
    for (uint32_t m = 0; m < n; m++) {
        struct past_model *model = &history->models[m];
        size_t len;
        if ((size_t)(end - *at) < MODEL_BYTES)
            return false;
        model->bytes = get(at, 8);
        len = get(at, 1);
        if (len > (size_t)(end - *at) || !model_name_valid((const char *)*at, len))
            return false;
        memcpy(model->name, *at, len);
        *at += len;
        for (uint32_t other = 0; other < m; other++)
            if (strcmp(history->models[other].name, model->name) == 0)
                return false;
    }
    return true;
}

static bool read_requests(struct history *history, uint32_t n, uint32_t n_models,
                          const uint8_t **at, const uint8_t *end)
{
    if ((size_t)(end - *at) != (size_t)n * REQUEST_BYTES)
        return false;
    for (; history->n < n; history->n++) {
        struct past_request *request = &history->requests[history->n];
        uint64_t flags;
        request->model = (uint16_t)get(at, 2);
        flags = get(at, 2);
        request->ready = flags & FLAG_READY;
        request->gap_ms = (uint32_t)get(at, 4);
        if (request->model >= n_models || flags > FLAG_READY)
            return false;
        history->models[request->model].n_requests++;
    }
    return true;
}

static bool parse(struct history *history, const uint8_t *bytes, size_t n)
{
    const uint8_t *at = bytes + MAGIC_BYTES, *end, *check;
    uint32_t n_models, n_requests;

    if (n < HEAD_BYTES + CHECK_BYTES || n > HISTORY_MAX_BYTES ||
        memcmp(bytes, MAGIC, MAGIC_BYTES) != 0)
        return false;
    check = end = bytes + n - CHECK_BYTES;
    if (get(&check, CHECK_BYTES) != checksum(bytes, n - CHECK_BYTES))
        return false;
    n_models = (uint32_t)get(&at, 4);
    n_requests = (uint32_t)get(&at, 4);
    return n_models <= PREDICTOR_MAX_MODELS && n_requests <= HISTORY_MAX_REQUESTS &&
           read_models(history, n_models, &at, end) &&
           read_requests(history, n_requests, n_models, &at, end);
}

int history_read(const uint8_t *bytes, size_t n, struct history **ret_history,
                 struct fault *ret_fault)
{
    struct history *history;

    if (history_new(&history) < 0)
        return fault_set(ret_fault, -ENOMEM, "no memory for the history");
    if (!parse(history, bytes, n)) {
        history_free(history);
        return fault_set(ret_fault, -EBADMSG,
                         "it is not a history of this version, or it is damaged");
    }
    *ret_history = history;
    return 0;
}

/* ---- the file ---- */

/* The folders on the way to it, as far as they are missing. */
static void make_folders(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(path, 0700); /* where it fails, opening the file says why */
        *slash = '/';
    }
}

static int write_whole(int fd, const uint8_t *bytes, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t r = write(fd, bytes + done, n - done);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -EIO;
        done += (size_t)r;
    }
    return fsync(fd) < 0 ? -errno : 0;
}

int history_save(const char *path, const uint8_t *bytes, size_t n)
{
    _cleanup_free_ char *temporary = NULL;
    _cleanup_close_ int fd = -1;
    int r;

    if (asprintf(&temporary, "%s.%d", path, getpid()) < 0) {
        temporary = NULL;
        return -ENOMEM;
    }
    make_folders(temporary);
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    r = write_whole(fd, bytes, n);
    if (r == 0 && rename(temporary, path) < 0)
        r = -errno;
    if (r < 0)
        unlink(temporary);
    return r;
}

int history_load(const char *path, struct history **ret_history, struct fault *ret_fault)
{
    _cleanup_free_ uint8_t *bytes = malloc(HISTORY_MAX_BYTES + 1);
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    size_t n = 0;

    if (!bytes)
        return fault_set(ret_fault, -ENOMEM, "no memory for the history");
    if (fd < 0)
        return fault_set(ret_fault, -errno, "it cannot be opened: %s", strerror(errno));
    while (n <= HISTORY_MAX_BYTES) {
        ssize_t r = read(fd, bytes + n, HISTORY_MAX_BYTES + 1 - n);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return fault_set(ret_fault, -errno, "it cannot be read: %s", strerror(errno));
        if (r == 0)
            break;
        n += (size_t)r;
    }
    return history_read(bytes, n, ret_history, ret_fault);
}
