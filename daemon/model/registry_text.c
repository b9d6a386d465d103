/* What the registry says of its models, as text. */
#include <inttypes.h>
#include <string.h>

#include "daemon/model/registry_internal.h"

void registry_write_info(const struct model_entry *entry, FILE *out)
{
    static const char *const strategies[] = {
        [PRELOAD_LAZY] = "lazy", [PRELOAD_EAGER] = "eager", [PRELOAD_NONE] = "none"};

    const char *path = entry->file ? "passed by its user" : entry->path ? entry->path : "built-in";

    fprintf(out, "name %s\npath %s\n", entry->name, path);
    fprintf(out, "strategy %s\npinned %d\n",
            strategies[entry->config ? entry->config->preload : PRELOAD_LAZY], entry->pinned);
    if (entry->model) {
        const struct model_info *info = model_info(entry->model);
        fprintf(out, "architecture %s\ntypes %s\nparameters %" PRIu64 "\n", info->architecture,
                info->types, info->n_params);
        fprintf(out,
                "vocabulary %u\nembedding %u\nlayers %u\nheads %u\nkv_heads %u\nfeed_forward %u\n",
                info->n_vocab, info->n_embd, info->n_layers, info->n_heads, info->n_kv_heads,
                info->n_ff);
        fprintf(out,
                "context_tokens %u\nweight_bytes %" PRIu64 "\nkv_bytes_per_token %" PRIu64 "\n",
                info->context_tokens, info->weight_bytes, info->kv_token_bytes);
        fprintf(out, "scratch_bytes_per_token %" PRIu64 "\nscratch_bytes_per_logits %" PRIu64 "\n",
                info->step_token_bytes, info->step_logits_bytes);
    }
}

/* The parts of registry_memory_bytes() of a model that is loaded. */
static void write_memory(const struct model_entry *entry, FILE *out)
{
    struct model_memory memory = {0};
    uint64_t weight_bytes = 0;

    if (entry->model) {
        model_memory(entry->model, &memory);
        weight_bytes = model_info(entry->model)->weight_bytes;
    }
    fprintf(out,
            "weight_bytes %" PRIu64 "\ntable_bytes %" PRIu64 "\nscratch_bytes %" PRIu64
            "\nkv_bytes %" PRIu64 "\n",
            weight_bytes, entry->model ? model_info(entry->model)->other_bytes : 0,
            memory.scratch_bytes, memory.kv_bytes);
}

void registry_write_stats(const struct model_entry *entry, FILE *out)
{
    fprintf(out, "requests %" PRIu64 "\ntokens %" PRIu64 "\nin_use %u\nload_us %" PRIu64 "\n",
            entry->requests, entry->tokens, entry->in_use, entry->load_us);
    write_memory(entry, out);
    fprintf(out, "evictions %u\n", entry->evictions);
    if (entry->last_eviction.by[0])
        fprintf(out,
                "evicted_for %s\nevicted_why %s\nevicted_bytes %" PRIu64
                "\nevicted_reload_us %" PRIu64 "\n",
                entry->last_eviction.by, entry->last_eviction.why, entry->last_eviction.bytes,
                entry->last_eviction.reload_us);
}

/* ---- series of hearth.prom ---- */

/* Users' files share one label, so that neither their number nor their names make series. */
#define FILE_LABEL "file"

enum series { SERIES_READY, SERIES_MEMORY, SERIES_REQUESTS, _SERIES_MAX };

static uint64_t value_of(const struct model_entry *entry, enum series series)
{
    switch (series) {
    case SERIES_READY: return entry->state == MODEL_READY;
    case SERIES_MEMORY: return registry_memory_bytes(entry);
    default: return entry->requests;
    }
}

static bool is_labelled_file(const struct model_entry *entry)
{
    return entry->file || strcmp(entry->name, FILE_LABEL) == 0;
}

static void write_series(const struct registry *registry, const char *name, enum series series,
                         FILE *out)
{
    uint64_t files = series == SERIES_REQUESTS ? registry->file_requests : 0;
    bool any = registry->n_files > 0;

    for (const struct model_entry *e = registry->entries; e; e = e->hh.next)
        if (is_labelled_file(e)) {
            any = true;
            files += value_of(e, series);
        } else {
            fprintf(out, "%s{model=\"%s\"} %" PRIu64 "\n", name, e->name, value_of(e, series));
        }
    if (any)
        fprintf(out, "%s{model=\"" FILE_LABEL "\"} %" PRIu64 "\n", name, files);
}

void registry_write_prometheus(struct registry *registry, FILE *out)
{
    static const struct {
        const char *name, *type, *help;
    } texts[_SERIES_MAX] = {
        {"hearth_model_ready", "gauge", "Whether the model is ready (of users' files: how many)"},
        {"hearth_model_memory_bytes", "gauge",
         "Memory of the model: weights, tables, scratch and KV"},
        {"hearth_model_requests_total", "counter", "Requests that used the model"},
    };

    for (enum series i = 0; i < _SERIES_MAX; i++) {
        fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", texts[i].name, texts[i].help, texts[i].name,
                texts[i].type);
        write_series(registry, texts[i].name, i, out);
    }
}
