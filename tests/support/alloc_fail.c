#include "tests/support/alloc_fail.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>

static _Thread_local unsigned left; /* allocations until the one that fails; 0: none will */
static _Thread_local bool failed;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_reallocarray(void *old, size_t n, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_reallocarray(void *old, size_t n, size_t bytes);
FILE *__real_open_memstream(char **ret_text, size_t *ret_bytes);
FILE *__wrap_open_memstream(char **ret_text, size_t *ret_bytes);

void alloc_fail_at(unsigned n)
{
    left = n;
    failed = false;
}

bool alloc_fail_done(void)
{
    left = 0;
    return failed;
}

static bool fails_now(void)
{
    if (left == 0 || --left > 0)
        return false;
    failed = true;
    errno = ENOMEM;
    return true;
}

void *__wrap_malloc(size_t bytes)
{
    return fails_now() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    return fails_now() ? NULL : __real_calloc(n, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    return fails_now() ? NULL : __real_realloc(old, bytes);
}

void *__wrap_reallocarray(void *old, size_t n, size_t bytes)
{
    return fails_now() ? NULL : __real_reallocarray(old, n, bytes);
}

FILE *__wrap_open_memstream(char **ret_text, size_t *ret_bytes)
{
    if (fails_now())
        return NULL;
    if (!fails_now())
        return __real_open_memstream(ret_text, ret_bytes);
    *ret_text = NULL;
    *ret_bytes = 0;
    return fopen("/dev/full", "we"); /* what is written is lost, and fclose() says so */
}
