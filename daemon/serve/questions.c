#include "daemon/serve/questions.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/serve/files.h"
#include "lib/cleanup.h"
#include "lib/news.h"

/* Text made by `fn`, malloc'd; NULL when memory is out. */
static char *text_of(void (*fn)(const struct model_entry *entry, FILE *out),
                     const struct model_entry *entry, size_t *ret_len)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, ret_len);

    if (!out)
        return NULL;
    fn(entry, out);
    if (fclose(out) == 0)
        return text;
    free(text);
    return NULL;
}

static void put_progress(struct wire_buffer *out, const struct model_entry *entry)
{
    uint64_t done = 0, total = 0;

    if (entry->task) {
        done = atomic_load(&entry->task->progress.done_bytes);
        total = atomic_load(&entry->task->progress.total_bytes);
    } else if (entry->model) {
        done = total = entry->loaded_bytes;
    }
    wire_put_text(out, TAG_MODEL, entry->name);
    wire_put_text(out, TAG_STATE, model_state_name(entry->state));
    wire_put_number(out, TAG_DONE_BYTES, done);
    wire_put_number(out, TAG_TOTAL_BYTES, total);
}

void question_progress(struct request *request, const struct model_entry *entry)
{
    struct wire_buffer *out;

    if (!request->peer)
        return;
    out = reply_begin(request->peer, WIRE_ITEM, request->key.id);
    put_progress(out, entry);
    reply_end(request->peer);
}

void question_put_model(struct wire_buffer *out, uint64_t id, const struct model_entry *entry)
{
    size_t info_len = 0, stats_len = 0;
    _cleanup_free_ char *info = text_of(registry_write_info, entry, &info_len);
    _cleanup_free_ char *stats = text_of(registry_write_stats, entry, &stats_len);

    wire_begin(out, WIRE_ITEM, id);
    put_progress(out, entry);
    wire_put_number(out, TAG_MEMORY_BYTES, registry_memory_bytes(entry));
    wire_put_number(out, TAG_PRELOAD, entry->wanted);
    wire_put_number(out, TAG_PINNED, entry->pinned);
    wire_put_number(out, TAG_KEEP_ALIVE_US, entry->keep_alive_us);
    wire_put_number(out, TAG_HOLDS, entry->holds);
    if (info)
        wire_put_bytes(out, TAG_INFO, info, info_len);
    if (stats)
        wire_put_bytes(out, TAG_STATS, stats, stats_len);
    if (entry->state == MODEL_FAILED)
        wire_put_text(out, TAG_SENTENCE, entry->error);
    wire_end(out);
}

void question_reply_model(struct peer *peer, uint64_t id, const struct model_entry *entry)
{
    peer->tail = NULL;
    question_put_model(&peer->out, id, entry);
    peer->wants_flush(peer);
}

void question_models(struct service *service, struct peer *peer, uint64_t id,
                     const struct request_options *options)
{
    struct model_entry *entry;

    if (options->model[0]) {
        entry = files_find_model(service, peer, options, options->model);
        if (!entry) {
            reply_error(peer, id, CODE_NO_SUCH_MODEL, "there is no model %s", options->model);
            return;
        }
        question_reply_model(peer, id, entry);
    } else {
        for (entry = registry_first(service->registry); entry; entry = entry->hh.next)
            if (files_may_see(service, peer, options, entry))
                question_reply_model(peer, id, entry);
    }
    reply_done(peer, id);
}

static void write_status_info(struct service *service, FILE *out)
{
    fprintf(out, "uptime_s %" PRIu64 "\nkernels %s\ndefault_model %s\n",
            (service_now_us(service) - service->started_us) / 1000000u,
            service->options.kernels->name, service->options.config->default_model);
    fprintf(out, "models %zu\nmodels_ready %" PRIu64 "\nmodel_bytes %" PRIu64 "\n",
            registry_n_models(service->registry),
            metrics_get(service->options.metrics, M_MODELS_READY),
            registry_loaded_bytes(service->registry));
    fprintf(out, "kv_bytes %" PRIu64 "\n",
            metrics_get(service->options.metrics, M_KV_USED) +
                metrics_get(service->options.metrics, M_PREFIX_BYTES));
    fprintf(out, "memory_budget_bytes %" PRIu64 "\nconnections %u\nrequests_live %u\n",
            service->memory.budget_bytes, admission_n_connections(service->admission),
            service_n_requests(service));
}

void question_put_status(struct service *service, struct wire_buffer *out, uint64_t id)
{
    _cleanup_free_ char *info = NULL;
    size_t len = 0;
    FILE *text = open_memstream(&info, &len);
    bool written = text != NULL;

    if (text) {
        write_status_info(service, text);
        written = fclose(text) == 0;
    }
    wire_begin(out, WIRE_ITEM, id);
    wire_put_text(out, TAG_STATE, service_state(service));
    wire_put_text(out, TAG_VERSION, HEARTH_VERSION);
    wire_put_number(out, TAG_PID, (uint64_t)getpid());
    if (written)
        wire_put_bytes(out, TAG_INFO, info, len);
    wire_end(out);
}

void question_status(struct service *service, struct peer *peer, uint64_t id)
{
    peer->tail = NULL;
    question_put_status(service, &peer->out, id);
    reply_done(peer, id);
}

/* A section's text: 0, -ENOENT, -ENOMEM. */
static int section_text(struct service *service, const char *name, char **ret_text, size_t *ret_len)
{
    const struct metrics *metrics = service->options.metrics;
    FILE *out = open_memstream(ret_text, ret_len);
    int r = 0;

    if (!out)
        return -ENOMEM;
    registry_tell_memory(service->registry);
    if (strcmp(name, NEWS_PROMETHEUS) == 0) {
        metrics_write_prometheus(metrics, out);
        registry_write_prometheus(service->registry, out);
    } else {
        r = metrics_write_section(metrics, name, out);
        if (r == -ENOENT)
            r = metrics_write_one(metrics, name, out);
    }
    if (fclose(out) != 0 && r == 0)
        r = -ENOMEM;
    return r;
}

void question_put_section(struct service *service, struct wire_buffer *out, uint64_t id,
                          const char *name)
{
    _cleanup_free_ char *text = NULL;
    size_t len = 0;

    if (section_text(service, name, &text, &len) < 0)
        return;
    wire_begin(out, WIRE_ITEM, id);
    wire_put_text(out, TAG_NAME, name);
    wire_put_bytes(out, TAG_TEXT, text, len);
    wire_end(out);
}

void question_metrics(struct service *service, struct peer *peer, uint64_t id,
                      const struct request_options *options)
{
    static const char *const sections[] = {NEWS_FLAT_SECTIONS};
    const char *const *names = sections;
    const char *one = options->name;
    size_t n = ELEMENTSOF(sections);

    if (options->name[0]) {
        names = &one;
        n = 1;
    }
    for (size_t i = 0; i < n; i++) {
        char *text = NULL;
        size_t len = 0;
        int r = section_text(service, names[i], &text, &len);
        if (r == 0)
            reply_text_item(peer, id, names[i], text, len);
        free(text);
        if (r < 0) {
            reply_error(peer, id, r == -ENOENT ? CODE_BAD_REQUEST : CODE_NO_MEMORY,
                        "there is no section or metric %s", names[i]);
            return;
        }
    }
    reply_done(peer, id);
}
