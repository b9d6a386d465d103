#include "tests/support/golden.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *golden_folder(void)
{
    static char beside[4096];
    const char *named = getenv("HEARTH_GOLDEN"), *root = getenv("HEARTH_SOURCE_ROOT");

    if (named && *named)
        return named;
    snprintf(beside, sizeof(beside), "%s/../shared/golden", root ? root : ".");
    return beside;
}

const char *golden_path(const char *name)
{
    static char path[4352];

    if (access(golden_folder(), R_OK) < 0)
        cr_skip_test("no golden data: set HEARTH_GOLDEN to its folder");
    snprintf(path, sizeof(path), "%s/%s", golden_folder(), name);
    return path;
}

void *golden_bytes(const char *name, size_t *ret_len)
{
    FILE *file = fopen(golden_path(name), "rb");
    char *bytes;
    long len;

    cr_assert_not_null(file, "cannot open %s", golden_path(name));
    cr_assert_eq(fseek(file, 0, SEEK_END), 0);
    len = ftell(file);
    cr_assert_geq(len, 0);
    rewind(file);
    bytes = malloc((size_t)len + 1);
    cr_assert_not_null(bytes);
    cr_assert_eq(fread(bytes, 1, (size_t)len, file), (size_t)len);
    fclose(file);
    bytes[len] = '\0';
    *ret_len = (size_t)len;
    return bytes;
}

float *golden_floats(const char *name, size_t n)
{
    size_t len;
    float *values = golden_bytes(name, &len);

    cr_assert_eq(len, n * sizeof(float), "%s has %zu bytes, not %zu floats", name, len, n);
    return values;
}

json_t *golden_json(const char *name)
{
    json_error_t error;
    json_t *json = json_load_file(golden_path(name), 0, &error);

    cr_assert_not_null(json, "%s:%d: %s", name, error.line, error.text);
    return json;
}

int32_t *golden_ids(const json_t *array, uint32_t *ret_n)
{
    size_t n = json_array_size(array);
    int32_t *ids = malloc((n + 1) * sizeof(*ids));

    cr_assert_not_null(ids);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    *ret_n = (uint32_t)n;
    return ids;
}

struct gguf_source golden_source(const char *name)
{
    struct gguf_source source = {.fd = -1};
    size_t len;

    source.memory = golden_bytes(name, &len);
    source.size = len;
    return source;
}

double golden_nmse(const float *a, const float *b, size_t n)
{
    double difference = 0, square = 0;

    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        square += (double)b[i] * b[i];
    }
    return difference / square;
}
