#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/metrics/metrics.h"

static struct metrics *m;

static void begin(void)
{
    cr_assert_eq(metrics_new(&m), 0);
}

static void end(void)
{
    m = metrics_free(m);
}

TestSuite(metrics, .init = begin, .fini = end);

typedef int (*text_fn)(const char *name, FILE *out);

static int text_prometheus(const char *name, FILE *out)
{
    (void)name;
    metrics_write_prometheus(m, out);
    return 0;
}

static int text_section(const char *name, FILE *out)
{
    return metrics_write_section(m, name, out);
}

static int text_one(const char *name, FILE *out)
{
    return metrics_write_one(m, name, out);
}

/* The text that fn writes; the caller frees it. */
static char *text_of(text_fn fn, const char *name, int expected)
{
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    cr_assert_not_null(out);
    cr_assert_eq(fn(name, out), expected);
    fclose(out);
    return text;
}

/* Whether `text` has `line` as one of its lines. */
static bool has_line(const char *text, const char *line)
{
    size_t len = strlen(line);
    for (const char *p = text; (p = strstr(p, line)); p++)
        if ((p == text || p[-1] == '\n') && (p[len] == '\n' || p[len] == '\0'))
            return true;
    return false;
}

static void expect_line(text_fn fn, const char *name, const char *line)
{
    char *text = text_of(fn, name, 0);
    cr_expect(has_line(text, line), "no line '%s' in:\n%s", line, text);
    free(text);
}

Test(metrics, add_set_and_get)
{
    metrics_add(m, M_REQUESTS, 3);
    metrics_add(m, M_REQUESTS, 4);
    metrics_set(m, M_QUEUE, 9);
    metrics_set(m, M_QUEUE, 2);
    cr_expect_eq(metrics_get(m, M_REQUESTS), 7);
    cr_expect_eq(metrics_get(m, M_QUEUE), 2);
    cr_expect_eq(metrics_get(m, M_STEPS), 0);
}

/* What a scraper checks of every line of the Prometheus text: a HELP and a TYPE before the samples
 * of a name, names of legal characters with the prefix, counters ending in _total, finite numbers.
 */
static void check_comment(const char *line, char *name, char *type)
{
    char what[8], rest[256];
    cr_assert_eq(sscanf(line, "# %7s %127s %255[^\n]", what, name, rest), 3, "%s", line);
    cr_assert(strcmp(what, "HELP") == 0 || strcmp(what, "TYPE") == 0, "%s", line);
    if (strcmp(what, "TYPE") == 0)
        snprintf(type, 16, "%.15s", rest);
}

static void check_sample(const char *line, const char *name, const char *type)
{
    static const char legal[] = "abcdefghijklmnopqrstuvwxyz_0123456789";
    size_t len = strspn(line, legal);
    const char *value = strrchr(line, ' ');
    char *stop;
    cr_assert(strncmp(line, "hearth_", 7) == 0, "%s", line);
    cr_assert(strncmp(line, name, strlen(name)) == 0, "%s stands under %s", line, name);
    cr_assert(line[len] == ' ' || line[len] == '{', "%s", line);
    cr_assert_not_null(value);
    cr_assert(value[1] >= '0' && value[1] <= '9', "%s", line);
    strtod(value + 1, &stop);
    cr_assert_eq(*stop, '\0', "%s", line);
    if (strcmp(type, "counter") == 0)
        cr_assert(strstr(name, "_total"), "%s", name);
    else
        cr_assert_null(strstr(name, "_total"), "%s", name);
}

Test(metrics, prometheus_text_parses_line_by_line)
{
    char name[128] = "", type[16] = "";
    size_t samples = 0;
    metrics_observe_us(m, M_LATENCY, 123456);
    metrics_add(m, M_ENGINE_CPU, 1500000);
    char *text = text_of(text_prometheus, NULL, 0), *rest = text, *line;
    cr_assert_eq(text[strlen(text) - 1], '\n');
    while ((line = strsep(&rest, "\n")) && *line) {
        if (*line == '#') {
            check_comment(line, name, type);
            continue;
        }
        check_sample(line, name, type);
        samples++;
    }
    cr_expect_geq(samples, (size_t)_METRIC_MAX);
    cr_expect_null(strstr(text, "nan"));
    cr_expect_null(strstr(text, "inf"));
    free(text);
}

Test(metrics, prometheus_text_says_up_and_version)
{
    expect_line(text_prometheus, NULL, "hearth_up 1");
    expect_line(text_prometheus, NULL, "hearth_build_info{version=\"" HEARTH_VERSION "\"} 1");
}

Test(metrics, every_name_is_given_once)
{
    static const char *const names[] = {
#define METRIC(id, name, kind, unit, section, help) name,
#include "daemon/metrics/definitions.h"
#undef METRIC
    };
    for (size_t i = 0; i < _METRIC_MAX; i++)
        for (size_t j = i + 1; j < _METRIC_MAX; j++)
            cr_expect_str_neq(names[i], names[j]);
}

Test(metrics, seconds_are_exact)
{
    metrics_add(m, M_ENGINE_CPU, 1000001);
    expect_line(text_prometheus, NULL, "hearth_engine_cpu_seconds_total 1.000001");
    metrics_add(m, M_ENGINE_CPU, 499999);
    expect_line(text_section, "batcher", "engine_cpu_seconds_total 1.5");
    expect_line(text_section, "batcher", "engine_busy_seconds_total 0");
}

Test(metrics, histogram_buckets_count_up_to_and_including_their_bound)
{
    static const uint64_t at[] = {0, 100, 101, 200, 1000, 59999999, 60000000, 60000001};
    for (size_t i = 0; i < sizeof(at) / sizeof(*at); i++)
        metrics_observe_us(m, M_FIRST_TOKEN, at[i]);
    char *text = text_of(text_one, "first_token_seconds", 0);
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"0.0001\"} 2"));
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"0.0002\"} 4"));
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"0.0005\"} 4"));
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"0.001\"} 5"));
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"60\"} 7"));
    cr_expect(has_line(text, "first_token_seconds_bucket{le=\"+Inf\"} 8"));
    cr_expect(has_line(text, "first_token_seconds_count 8"));
    cr_expect(has_line(text, "first_token_seconds_sum 180.001401"));
    free(text);
}

Test(metrics, sections_are_flat_lines_of_key_and_value)
{
    static const char *const sections[] = {"pool", "batcher", "streaming", "loader"};
    metrics_add(m, M_REQUESTS, 4);
    metrics_add(m, M_REQUESTS_REUSED, 3);
    for (size_t i = 0; i < 4; i++) {
        char *text = text_of(text_section, sections[i], 0), *rest = text, *line;
        char key[128], value[64], more;
        while ((line = strsep(&rest, "\n")) && *line)
            cr_expect_eq(sscanf(line, "%127s %63[0-9.] %c", key, value, &more), 2, "%s", line);
        free(text);
    }
    cr_expect_eq(metrics_write_section(m, "nothing", stdout), -ENOENT);
    cr_expect_eq(metrics_write_section(m, "", stdout), -ENOENT);
}

Test(metrics, ratios_are_their_two_counters)
{
    metrics_add(m, M_REQUESTS, 3);
    metrics_add(m, M_REQUESTS_REUSED, 2);
    metrics_add(m, M_STEP_ROWS, 99);
    metrics_add(m, M_STEP_RUNNABLE, 100);
    metrics_add(m, M_FRAMES, 8);
    metrics_add(m, M_FRAMES_WAITED, 1);
    metrics_add(m, M_ENGINE_CPU, 900);
    metrics_add(m, M_ENGINE_BUSY, 1100);
    metrics_add(m, M_ENGINE_RUN_DELAY, 100);
    expect_line(text_section, "pool", "pool_reuse 0.6667");
    expect_line(text_section, "batcher", "batch_efficiency 0.9900");
    expect_line(text_section, "batcher", "engine_efficiency 0.9000");
    expect_line(text_section, "streaming", "credit_wait_ratio 0.1250");
    expect_line(text_section, "streaming", "streaming_efficiency 0.8750");
}

Test(metrics, a_ratio_of_nothing_is_left_out)
{
    static const char *const sections[] = {"pool", "batcher", "streaming", "loader"};
    for (size_t i = 0; i < 4; i++) {
        char *text = text_of(text_section, sections[i], 0);
        cr_expect_null(strstr(text, "_ratio"));
        cr_expect_null(strstr(text, "efficiency"));
        cr_expect_null(strstr(text, "pool_reuse"));
        free(text);
    }
}

Test(metrics, one_metric_by_name)
{
    metrics_add(m, M_REQUESTS, 12);
    char *text = text_of(text_one, "requests_total", 0);
    cr_expect_str_eq(text, "12\n");
    free(text);
    cr_expect_eq(metrics_write_one(m, "requests", stdout), -ENOENT);
    cr_expect_eq(metrics_write_one(m, "", stdout), -ENOENT);
}

#define ADDITIONS 100000

static void *count(void *unused)
{
    for (int i = 0; i < ADDITIONS; i++) {
        metrics_add(m, M_REQUESTS, 1);
        metrics_observe_us(m, M_LATENCY, (uint64_t)i);
    }
    return unused;
}

Test(metrics, four_threads_lose_no_count)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, count, NULL), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    cr_expect_eq(metrics_get(m, M_REQUESTS), 4 * ADDITIONS);
    expect_line(text_one, "request_latency_seconds", "request_latency_seconds_count 400000");
}
