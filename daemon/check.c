#include "daemon/check.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/arch.h"
#include "daemon/engine/gguf.h"
#include "daemon/engine/kernels.h"
#include "daemon/model/catalog.h"
#include "lib/cleanup.h"

DEFINE_CLEANUP(struct gguf *, gguf_free)
DEFINE_CLEANUP(struct catalog *, catalog_free)

static void print_kernels(FILE *out)
{
    static const char *const best_first[] = {"avx512", "avx2"};
    const struct kernel_table *table;
    struct fault fault = {0};

    if (kernels_choose(getenv("HEARTH_CPU"), &table, &fault) < 0)
        fprintf(out, "warning %s\n", fault.text);
    else
        fprintf(out, "kernels %s\n", table->name);
    for (size_t i = 0; i < ELEMENTSOF(best_first); i++) {
        const char *lack = kernels_lack(best_first[i]);
        if (lack)
            fprintf(out, "kernels_lack %s %s\n", best_first[i], lack);
    }
}

static uint32_t cpus_allowed(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof(set), &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

static void print_config(const struct config *config, const char *config_path,
                         const struct config_memory *memory, FILE *out)
{
    fprintf(out, "config %s\ndefault_model %s\n", config_path ? config_path : "none",
            config->default_model);
    for (char **dir = config->models_dirs; dir && *dir; dir++)
        fprintf(out, "models_dir %s\n", *dir);
    fprintf(out, "state_dir %s\n", config->state_dir);
    fprintf(out, "machine_memory_bytes %" PRIu64 "\nmemory_budget_bytes %" PRIu64 "\n",
            memory->machine_bytes, memory->budget_bytes);
    fprintf(out, "kv_budget_bytes %" PRIu64 "\n", memory->kv_bytes);
    fprintf(out, "cpus %u\nthreads %u\nconnections %u\n", cpus_allowed(),
            config->engine.threads ? config->engine.threads : cpus_allowed(),
            config->limits.connections);
}

/* 0 where the file is a model that this engine knows, as far as its header tells. */
static int check_file(const char *path, uint64_t *ret_bytes, struct fault *ret_fault)
{
    _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    _cleanup_(gguf_freep) struct gguf *gguf = NULL;
    struct gguf_source source = {.fd = fd};
    struct gguf_string name;
    struct stat st;
    int r;

    if (fd < 0 || fstat(fd, &st) < 0)
        return fault_set(ret_fault, -errno, "it cannot be read: %s", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fault_set(ret_fault, -EINVAL, "it is no regular file");
    source.size = (uint64_t)st.st_size;
    r = gguf_open(&source, &gguf, ret_fault);
    if (r == 0)
        r = gguf_get_string(gguf, "general.architecture", &name, ret_fault);
    if (r < 0)
        return r;
    if (!arch_find(name))
        return fault_set(ret_fault, -ENOTSUP, "its architecture is '%.*s', and known are: %s",
                         (int)MIN(name.len, (size_t)64), name.bytes, arch_names());
    *ret_bytes = source.size;
    return 0;
}

static void print_model(const struct catalog_item *item, uint64_t budget_bytes, FILE *out)
{
    uint64_t bytes = 0;
    struct fault fault = {.text = "out of memory"};

    if (!item->path)
        return;
    if (check_file(item->path, &bytes, &fault) < 0)
        fprintf(out, "warning %s is no model that can be loaded: %s\n", item->path, fault.text);
    else if (bytes > budget_bytes)
        fprintf(out,
                "warning %s has %" PRIu64 " MiB and the memory_budget is %" PRIu64
                " MiB: it cannot be loaded until the budget is raised\n",
                item->path, bytes >> 20, budget_bytes >> 20);
}

int check_print(const struct config *config, const char *config_path, FILE *out,
                struct fault *ret_fault)
{
    struct config_memory memory = config_memory_of(config, config_machine_memory());
    _cleanup_(catalog_freep) struct catalog *catalog = NULL;
    bool has_default = false;
    int r = catalog_read(config, &catalog);

    if (r < 0)
        return fault_set(ret_fault, r, "cannot list the models: %s", strerror(-r));
    print_config(config, config_path, &memory, out);
    print_kernels(out);
    fprintf(out, "models %zu\n", catalog->n_items);
    for (size_t i = 0; i < catalog->n_notes; i++)
        fprintf(out, "warning %s\n", catalog->notes[i]);
    for (size_t i = 0; i < catalog->n_items; i++) {
        print_model(&catalog->items[i], memory.budget_bytes, out);
        has_default |= strcmp(catalog->items[i].name, config->default_model) == 0;
    }
    if (!has_default)
        fprintf(out, "warning default_model is %s, and there is no such model\n",
                config->default_model);
    return 0;
}
