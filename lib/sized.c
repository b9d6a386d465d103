#include "lib/sized.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "lib/cleanup.h"

/* Where a struct ends whose last member is this one. */
#define END_OF(type, member) (offsetof(type, member) + sizeof(((type *)0)->member))

const struct sized sized_options = {"hearth_options", "HEARTH_OPTIONS_INIT",
                                    END_OF(struct hearth_options, connect_timeout_us),
                                    sizeof(struct hearth_options)};
const struct sized sized_generate = {"hearth_generate", "HEARTH_GENERATE_INIT",
                                     END_OF(struct hearth_generate, keep_alive_us),
                                     sizeof(struct hearth_generate)};
const struct sized sized_set = {"hearth_set", "HEARTH_SET_INIT",
                                END_OF(struct hearth_set, keep_alive_us),
                                sizeof(struct hearth_set)};

/* A pool's options are three parts: the size, the embedded struct, and what follows it. */
#define POOL_HEAD_BYTES offsetof(struct hearth_pool_options, connection)
#define POOL_REST_AT    offsetof(struct hearth_pool_options, min_connections)
static const struct sized sized_pool_rest = {"hearth_pool_options", "HEARTH_POOL_OPTIONS_INIT",
                                             END_OF(struct hearth_pool_options, health_timeout_us) -
                                                 POOL_REST_AT,
                                             sizeof(struct hearth_pool_options) - POOL_REST_AT};
static_assert(POOL_REST_AT == POOL_HEAD_BYTES + sizeof(struct hearth_options),
              "nothing lies between the embedded struct and what follows it");

static int refuse_size(const struct sized *type, struct fault *ret_fault)
{
    return fault_set(ret_fault, -EINVAL, "%s.size does not fit: start from %s", type->name,
                     type->init);
}

/* Whether this version may take `bytes` at `given` for a `type`. */
static int check(const struct sized *type, const char *given, size_t bytes, struct fault *ret_fault)
{
    if (bytes < type->first_bytes)
        return refuse_size(type, ret_fault);
    for (size_t i = type->bytes; i < bytes; i++)
        if (given[i])
            return fault_set(ret_fault, -EINVAL,
                             "%s has options that this libhearth does not know: leave them out or "
                             "install the version that has them",
                             type->name);
    return 0;
}

static void copy(const struct sized *type, const void *given, size_t bytes, void *ret_known)
{
    memcpy(ret_known, given, MIN(bytes, type->bytes));
}

int sized_read(const struct sized *type, const void *given, void *ret_known,
               struct fault *ret_fault)
{
    size_t bytes = 0;
    if (given)
        memcpy(&bytes, given, sizeof(bytes));
    int r = check(type, given, bytes, ret_fault);
    if (r < 0)
        return r;
    copy(type, given, bytes, ret_known);
    memcpy(ret_known, &type->bytes, sizeof(type->bytes));
    return 0;
}

int sized_read_pool_options(const struct hearth_pool_options *given,
                            struct hearth_pool_options *ret_known, struct fault *ret_fault)
{
    const char *connection = (const char *)given + POOL_HEAD_BYTES;
    if (given->size < POOL_HEAD_BYTES + sizeof(size_t))
        return refuse_size(&sized_pool_rest, ret_fault);
    /* The rest begins where the caller's version of the embedded struct ends. */
    size_t left = given->size - POOL_HEAD_BYTES, embedded = given->connection.size;
    if (embedded > left || embedded % _Alignof(struct hearth_options) != 0)
        return refuse_size(&sized_options, ret_fault);
    int r = check(&sized_options, connection, embedded, ret_fault);
    if (r == 0)
        r = check(&sized_pool_rest, connection + embedded, left - embedded, ret_fault);
    if (r < 0)
        return r;
    copy(&sized_options, connection, embedded, &ret_known->connection);
    copy(&sized_pool_rest, connection + embedded, left - embedded,
         (char *)ret_known + POOL_REST_AT);
    ret_known->size = sizeof(*ret_known);
    ret_known->connection.size = sizeof(ret_known->connection);
    return 0;
}
