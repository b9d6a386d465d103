#include "tests/support/gguf_make.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/cleanup.h"

struct model_plan tiny_model_plan(void)
{
    struct model_plan plan = model_plan_default();

    plan.type = PLAN_F32;
    plan.dim = 64;
    plan.layers = 2;
    plan.heads = 4;
    plan.kv_heads = 2;
    plan.ff = 96;
    plan.vocab = 400;
    plan.context = 128;
    return plan;
}

static int gather(void *userdata, const void *bytes, size_t len)
{
    struct byte_buffer *buffer = userdata;

    byte_buffer_put(buffer, bytes, len);
    return buffer->failed ? -ENOMEM : 0;
}

int make_model_bytes(const struct model_plan *plan, uint8_t **ret_bytes, size_t *ret_len,
                     struct fault *ret_fault)
{
    struct byte_buffer buffer = {0};
    int error = model_make(plan, gather, &buffer, ret_fault);

    if (error) {
        byte_buffer_done(&buffer);
        return error;
    }
    *ret_bytes = buffer.bytes;
    *ret_len = buffer.len;
    return 0;
}

int make_model_file(const struct model_plan *plan, const char *path, struct fault *ret_fault)
{
    _cleanup_close_ int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0)
        return fault_set(ret_fault, -errno, "%s cannot be written: %s", path, strerror(errno));
    return model_make_to_fd(plan, fd, ret_fault);
}

struct gguf_source memory_source(const void *bytes, size_t len)
{
    return (struct gguf_source){.fd = -1, .memory = bytes, .size = len};
}
