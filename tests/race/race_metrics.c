/* Under ThreadSanitizer: threads count while one renders. */
#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/metrics/metrics.h"

#define COUNTERS 3
#define ROUNDS   20000
#define RENDERS  50

static struct metrics *metrics;

static void *count(void *unused)
{
    for (uint64_t i = 0; i < ROUNDS; i++) {
        metrics_add(metrics, M_REQUESTS, 1);
        metrics_set(metrics, M_QUEUE, i);
        metrics_observe_us(metrics, M_LATENCY, i * 37);
    }
    return unused;
}

int main(void)
{
    pthread_t threads[COUNTERS];
    int r = metrics_new(&metrics);
    assert(r == 0);
    for (int i = 0; i < COUNTERS; i++)
        pthread_create(&threads[i], NULL, count, NULL);
    for (int i = 0; i < RENDERS; i++) {
        char *text = NULL;
        size_t len;
        FILE *out = open_memstream(&text, &len);
        metrics_write_prometheus(metrics, out);
        metrics_write_section(metrics, "pool", out);
        fclose(out);
        free(text);
    }
    for (int i = 0; i < COUNTERS; i++)
        pthread_join(threads[i], NULL);
    assert(metrics_get(metrics, M_REQUESTS) == COUNTERS * ROUNDS);
    metrics_free(metrics);
    puts("counted");
    return 0;
}
