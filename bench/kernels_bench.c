/* kernels-bench [VARIANT [ROWS COLS]]: GFLOP/s of one thread by type and number of columns, then
 * microseconds of attention by shape and context. Thread CPU time, the best of several runs: other
 * work on the machine disturbs it little. Without ROWS COLS: the matrices of the small models. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "daemon/engine/gguf.h"
#include "daemon/engine/kernels.h"
#include "lib/cleanup.h"

#define RUNS       5
#define RUN_US     4000.0
#define MAX_N      512u
#define MAX_CALLS  (1u << 20)
#define HUGE_BYTES (2u << 20)
#define MAX_MATRIX (1u << 16)

static double now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec * 1e-3;
}

/* What is large lies in huge pages, as a model's weights do. */
static void *aligned(size_t bytes)
{
    size_t unit = bytes >= HUGE_BYTES ? HUGE_BYTES : KERNEL_ALIGN;
    size_t whole = (bytes / unit + 1) * unit;
    void *memory = aligned_alloc(unit, whole);
    if (memory && unit == HUGE_BYTES)
        (void)madvise(memory, whole, MADV_HUGEPAGE);
    if (!memory) {
        fprintf(stderr, "kernels-bench: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}

struct work {
    void (*run)(void *userdata);
    void *userdata;
};

/* Microseconds of one call, the best of RUNS. */
static double measure(const struct work *work)
{
    double best = 1e30;
    uint32_t calls = 1;
    for (int run = 0; run < RUNS;) {
        double start = now_us();
        for (uint32_t i = 0; i < calls; i++)
            work->run(work->userdata);
        double took = now_us() - start;
        if (took < RUN_US && calls < MAX_CALLS) {
            calls *= 2;
            continue;
        }
        best = MIN(best, took / calls);
        run++;
    }
    return best;
}

struct matmul_work {
    const struct kernel_table *table;
    struct tensor tensor;
    uint32_t n;
    float *x, *y;
    void *prepared;
    bool prepare;
};

static void run_matmul(void *userdata)
{
    struct matmul_work *w = userdata;
    if (w->prepare)
        w->table->prepare(w->tensor.type, w->tensor.cols, w->n, w->x, w->prepared);
    else
        w->table->matmul(&w->tensor, w->prepared, w->n, w->y, w->tensor.rows, 0, w->tensor.rows);
}

static void bench_matrix(const struct kernel_table *table, enum gguf_type type, uint32_t rows,
                         uint32_t cols)
{
    static const uint32_t columns[] = {1, 2, 4, 8, 12, 16, 32, 64, 400};
    uint64_t row_bytes = gguf_row_bytes(type, cols);
    struct matmul_work w = {
        .table = table, .tensor = {type, rows, cols, NULL, table->packed_bytes(type, rows, cols)}};
    struct work matmul = {run_matmul, &w};
    if (row_bytes == 0 || w.tensor.bytes == 0)
        return;
    uint8_t *file = aligned(row_bytes * rows);
    /* Bytes that are small numbers in every type: speed does not depend on them, denormals would.
     */
    memset(file, 0x35, row_bytes * rows);
    w.tensor.data = aligned(w.tensor.bytes);
    memset(w.tensor.data, 0, w.tensor.bytes);
    double pack_us = now_us();
    table->pack(&w.tensor, 0, rows, file);
    pack_us = now_us() - pack_us;
    w.x = aligned((size_t)MAX_N * cols * sizeof(float));
    w.y = aligned((size_t)MAX_N * rows * sizeof(float));
    w.prepared = aligned(table->prepared_bytes(type, cols, MAX_N));
    for (size_t i = 0; i < (size_t)MAX_N * cols; i++)
        w.x[i] = (float)(i % 37) * 0.01f - 0.2f;
    printf("%-7s %-5s %5ux%-5u", table->name, gguf_type_name(type), rows, cols);
    for (size_t i = 0; i < ELEMENTSOF(columns); i++) {
        w.n = columns[i];
        w.prepare = true;
        double prepare_us = measure(&matmul);
        w.prepare = false;
        double us = measure(&matmul);
        printf(" %6.1f", 2e-3 * rows * cols * w.n / us);
        if (i + 1 == ELEMENTSOF(columns))
            printf("  prepare %.0f ns a column, pack %.1f GB/s\n", prepare_us * 1000 / w.n,
                   1e-3 * row_bytes * rows / pack_us);
    }
    free(file);
    free(w.tensor.data);
    free(w.x);
    free(w.y);
    free(w.prepared);
}

struct attend_work {
    const struct kernel_table *table;
    struct kv_shape shape;
    uint32_t n_heads, n_positions;
    void *pages[64];
    float *q, *out;
    void *scratch;
};

static void run_attend(void *userdata)
{
    struct attend_work *w = userdata;
    w->table->attend(&w->shape, w->pages, w->n_positions, w->n_heads, 0.3f, w->q, w->out,
                     w->scratch);
}

static void bench_attention(const struct kernel_table *table, uint32_t n_heads, uint32_t n_kv_heads,
                            uint32_t head_dim)
{
    static const uint32_t positions[] = {1, 5, 16, 32, 64, 128, 512};
    struct attend_work w = {.table = table, .shape = {n_kv_heads, head_dim, false}};
    struct work attend = {run_attend, &w};
    w.n_heads = n_heads;
    w.q = aligned(n_heads * head_dim * sizeof(float));
    w.out = aligned(n_heads * head_dim * sizeof(float));
    w.scratch = aligned(table->attend_scratch_bytes(n_heads, 1024));
    for (uint32_t i = 0; i < n_heads * head_dim; i++)
        w.q[i] = (float)(i % 11) * 0.1f;
    for (uint32_t p = 0; p < 64 * KV_TILE; p++) {
        if (p % KV_TILE == 0)
            w.pages[p / KV_TILE] = aligned(table->kv_page_bytes(&w.shape));
        table->kv_store(&w.shape, w.pages[p / KV_TILE], p % KV_TILE, w.q, w.q);
    }
    printf("%-7s attend %u heads of %u, %u KV heads: us", table->name, n_heads, head_dim,
           n_kv_heads);
    for (size_t i = 0; i < ELEMENTSOF(positions); i++) {
        w.n_positions = positions[i];
        printf("  %u: %.2f", positions[i], measure(&attend));
    }
    printf("\n");
    for (size_t i = 0; i < ELEMENTSOF(w.pages); i++)
        free(w.pages[i]);
    free(w.q);
    free(w.out);
    free(w.scratch);
}

int main(int argc, char **argv)
{
    static const enum gguf_type types[] = {GGUF_F32,  GGUF_F16,  GGUF_BF16, GGUF_Q8_0,
                                           GGUF_Q4_0, GGUF_Q4_K, GGUF_Q5_K, GGUF_Q6_K};
    static const uint32_t small[][2] = {{64, 64},   {172, 64},  {64, 172},  {512, 64},
                                        {256, 128}, {128, 256}, {1024, 128}};
    const struct kernel_table *table;
    struct fault fault;
    if (kernels_choose(argc > 1 ? argv[1] : NULL, &table, &fault) < 0) {
        fprintf(stderr, "kernels-bench: %s\n", fault.text);
        return 1;
    }
    printf("GFLOP/s, columns:                 1      2      4      8     12     16     32     64"
           "    400\n");
    if (argc > 3) {
        unsigned long rows = strtoul(argv[2], NULL, 10), cols = strtoul(argv[3], NULL, 10);
        if (rows == 0 || cols == 0 || rows > MAX_MATRIX || cols > MAX_MATRIX) {
            fprintf(stderr, "kernels-bench: ROWS and COLS are 1..%u\n", MAX_MATRIX);
            return 2;
        }
        for (size_t t = 0; t < ELEMENTSOF(types); t++)
            bench_matrix(table, types[t], (uint32_t)rows, (uint32_t)cols);
        return 0;
    }
    for (size_t t = 0; t < 4; t++)
        for (size_t s = 0; s < ELEMENTSOF(small); s++)
            bench_matrix(table, types[t], small[s][0], small[s][1]);
    bench_attention(table, 8, 4, 8);
    bench_attention(table, 8, 4, 16);
    bench_attention(table, 12, 12, 64);
    bench_attention(table, 32, 4, 128);
    return 0;
}
