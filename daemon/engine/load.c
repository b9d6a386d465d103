#include "daemon/engine/model.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/engine/plan.h"
#include "daemon/engine/pulse.h"
#include "daemon/engine/reader.h"
#include "lib/cleanup.h"

DEFINE_CLEANUP(struct model_load *, model_load_free)

/* About one piece of a load: what is read and packed at once, and how long a cancelled load or one
 * that is to be paced may go on. */
#define PIECE_BYTES (1u << 20)

/* A huge page of every processor that this runs on. */
#define HUGE_BYTES (2u << 20)

/* Rows of an item from `row` on, or a whole vector. */
struct piece {
    uint32_t item, row;
};

struct model_load {
    struct model_progress *progress; /* may be NULL */
    struct gguf *gguf;
    struct plan plan;
    struct model *model;
    struct reader reader;
    uint64_t max_bytes;                   /* of the arena; 0: no bound */
    struct arena_legacy *_Atomic *legacy; /* the caller's, until the arena is made */
    const struct engine_pulse *pulse;
    uint32_t seen;      /* of the pulse, at the beginning */
    size_t piece_bytes; /* the most of one piece in the file */
    struct piece *pieces;
    uint32_t n_pieces;
    _Atomic uint32_t next;   /* to be taken */
    _Atomic uint32_t n_done; /* of them */
};

/* ---- memory ---- */

/* One arena for everything that is packed. While steps run new memory comes in small pages, which
 * the kernel gathers later, see model_load_end(). */
static int make_arena(struct model_load *load, size_t bytes)
{
    struct arena_legacy *legacy = load->legacy ? atomic_exchange(load->legacy, NULL) : NULL;
    bool steps_run = load->pulse && pulse_works(load->pulse, &load->seen);

    return arena_init(&load->model->arena, bytes, !steps_run, legacy);
}

static int model_map(struct model_load *load)
{
    const struct plan *plan = &load->plan;
    size_t bytes = 0, used = 0;

    for (size_t i = 0; i < plan->n_items; i++)
        if (__builtin_add_overflow(bytes, plan_item_bytes(&plan->items[i]), &bytes))
            return fault_set(plan->fault, -ENOMEM, "the weights do not fit into memory");
    if (load->max_bytes > 0 && bytes > load->max_bytes)
        return fault_set(plan->fault, -ENOMEM,
                         "the weights take %zu MiB, more than the %llu MiB that the file's size "
                         "led to expect",
                         bytes >> 20, (unsigned long long)load->max_bytes >> 20);
    if (make_arena(load, bytes) < 0)
        return fault_set(plan->fault, -ENOMEM, "no memory for weights of %zu bytes", bytes);
    for (size_t i = 0; i < plan->n_items; i++) {
        const struct plan_item *item = &plan->items[i];

        if (item->tensor)
            item->tensor->data = load->model->arena.memory + used;
        else
            *item->vector = (float *)(load->model->arena.memory + used);
        used += plan_item_bytes(item);
    }
    return 0;
}

/* ---- pieces ---- */

/* Rows of an item that are read and packed at once: whole groups, about one piece. */
static uint32_t rows_at_once(const struct tensor *tensor)
{
    uint64_t row_bytes = gguf_row_bytes(tensor->type, tensor->cols);
    uint64_t groups = PIECE_BYTES / (row_bytes * KERNEL_ROW_GROUP);
    uint64_t rows = MAX(groups, (uint64_t)1) * KERNEL_ROW_GROUP;

    return (uint32_t)MIN(rows, (uint64_t)tensor->rows);
}

static uint64_t count_pieces(const struct plan *plan)
{
    uint64_t n = 0;

    for (size_t i = 0; i < plan->n_items; i++) {
        const struct tensor *tensor = plan->items[i].tensor;

        n += tensor ? (tensor->rows + rows_at_once(tensor) - 1) / rows_at_once(tensor) : 1;
    }
    return n;
}

static int cut_into_pieces(struct model_load *load)
{
    uint64_t n = count_pieces(&load->plan);

    load->pieces = n < UINT32_MAX ? calloc(MAX(n, (uint64_t)1), sizeof(*load->pieces)) : NULL;
    if (!load->pieces)
        return fault_set(load->plan.fault, -ENOMEM, "no memory for the plan of a load");
    for (size_t i = 0; i < load->plan.n_items; i++) {
        const struct plan_item *item = &load->plan.items[i];
        uint32_t rows = item->tensor ? rows_at_once(item->tensor) : 1;
        uint32_t all = item->tensor ? item->tensor->rows : 1;
        uint64_t bytes = item->tensor
                             ? rows * gguf_row_bytes(item->tensor->type, item->tensor->cols)
                             : item->sources[0]->bytes;

        load->piece_bytes = MAX(load->piece_bytes, bytes);
        for (uint64_t row = 0; row < all; row += rows)
            load->pieces[load->n_pieces++] = (struct piece){(uint32_t)i, (uint32_t)row};
    }
    assert(load->n_pieces == n);
    return 0;
}

/* Bytes of one tensor; *ret_at is where they are. */
static int read_tensor(struct model_load *load, const struct gguf_tensor *source, uint64_t offset,
                       size_t len, uint8_t *buffer, const uint8_t **ret_at, struct fault *ret_fault)
{
    int r = reader_read(&load->reader, source->offset + offset, len, buffer, ret_at);
    char name[72];

    if (r == 0)
        return 0;
    for (size_t i = 0; i <= MIN(source->name.len, sizeof(name) - 1); i++)
        name[i] = i == MIN(source->name.len, sizeof(name) - 1)         ? 0
                  : isprint((unsigned char)source->name.bytes[i]) != 0 ? source->name.bytes[i]
                                                                       : '?';
    if (r == -ENODATA)
        return fault_set(ret_fault, -EBADMSG,
                         "the file ends inside tensor %s: it became shorter while it was read",
                         name);
    return fault_set(ret_fault, r == -ENOMEM ? r : -EIO, "tensor %s cannot be read: %s", name,
                     strerror(-r));
}

/* The source of an item that row `row` is in; *row becomes its row there. */
static const struct gguf_tensor *source_of(const struct plan_item *item, uint64_t *row)
{
    uint32_t k = 0;

    while (*row >= item->sources[k]->dims[1])
        *row -= item->sources[k++]->dims[1];
    assert(k < item->n_sources);
    return item->sources[k];
}

/* Rows of an item, one below the other. Those of several sources are put together in the buffer's
 * second half. */
static int read_rows(struct model_load *load, const struct plan_item *item, uint32_t begin,
                     uint32_t n, uint8_t *buffer, const uint8_t **ret_at, struct fault *ret_fault)
{
    size_t row_bytes = gguf_row_bytes(item->tensor->type, item->tensor->cols);
    uint8_t *whole = buffer + reader_room(load->piece_bytes);

    for (uint32_t done = 0, some; done < n; done += some) {
        uint64_t row = begin + done;
        const struct gguf_tensor *source = source_of(item, &row);
        int r;

        some = (uint32_t)MIN(source->dims[1] - row, (uint64_t)(n - done));
        r = read_tensor(load, source, row * row_bytes, some * row_bytes, buffer, ret_at, ret_fault);
        if (r < 0 || some == n)
            return r;
        memcpy(whole + done * row_bytes, *ret_at, some * row_bytes);
    }
    *ret_at = whole;
    return 0;
}

/* Reads and packs one piece; its bytes of the file, or an error. */
static int64_t load_piece(struct model_load *load, const struct piece *piece, uint8_t *buffer,
                          struct fault *ret_fault)
{
    const struct plan_item *item = &load->plan.items[piece->item];
    const uint8_t *at = NULL;
    uint32_t n;
    int r;

    if (!item->tensor) {
        r = read_tensor(load, item->sources[0], 0, item->sources[0]->bytes, buffer, &at, ret_fault);
        if (r < 0)
            return r;
        memcpy(*item->vector, at, item->sources[0]->bytes);
        memset((uint8_t *)*item->vector + item->sources[0]->bytes, 0,
               plan_item_bytes(item) - item->sources[0]->bytes);
        return (int64_t)item->sources[0]->bytes;
    }
    n = MIN(rows_at_once(item->tensor), item->tensor->rows - piece->row);
    r = read_rows(load, item, piece->row, n, buffer, &at, ret_fault);
    if (r < 0)
        return r;
    load->plan.kernels->pack(item->tensor, piece->row, n, at);
    return (int64_t)(n * gguf_row_bytes(item->tensor->type, item->tensor->cols));
}

/* ---- the beginning ---- */

/* What the header says: architecture, vocabulary, hyperparameters. */
static int model_read_header(struct model *model, const struct gguf *gguf, uint32_t context_tokens,
                             struct fault *ret_fault)
{
    struct gguf_string name;
    int r;

    r = gguf_get_string(gguf, "general.architecture", &name, ret_fault);
    if (r == -ENOENT)
        return fault_set(ret_fault, -EBADMSG, "the model lacks the key general.architecture");
    if (r < 0)
        return r;
    model->arch = arch_find(name);
    if (!model->arch) {
        char clean[ARCH_NAME_BYTES] = "";

        for (size_t i = 0; i < MIN(name.len, sizeof(clean) - 1); i++)
            clean[i] = isprint((unsigned char)name.bytes[i]) ? name.bytes[i] : '?';
        return fault_set(ret_fault, -ENOTSUP,
                         "the architecture \"%s\" is not supported; this version knows %s", clean,
                         arch_names());
    }
    r = tokenizer_new(gguf, &model->tokenizer, ret_fault);
    if (r < 0)
        return r;
    model->hparams.n_vocab = tokenizer_n_vocab(model->tokenizer);
    if (model->hparams.n_vocab == 0 || model->hparams.n_vocab > ARCH_MAX_VOCAB)
        return fault_set(ret_fault, -EBADMSG, "a vocabulary of %u tokens", model->hparams.n_vocab);
    r = model->arch->read(gguf, &model->hparams, ret_fault);
    if (r < 0)
        return r;
    model->context_tokens = model->hparams.context_tokens;
    if (context_tokens > 0)
        model->context_tokens = MIN(model->context_tokens, context_tokens);
    return 0;
}

/* The weights: planned and mapped. */
static int plan_weights(struct model_load *load)
{
    struct model *model = load->model;
    int r;

    model->weights.layers = calloc(model->hparams.n_layers, sizeof(struct layer_weights));
    if (!model->weights.layers)
        return fault_set(load->plan.fault, -ENOMEM, "no memory for %u layers",
                         model->hparams.n_layers);
    r = model->arch->plan(&load->plan, &model->hparams, &model->weights);
    if (r == 0)
        r = plan_finish(&load->plan);
    if (r == 0)
        r = cut_into_pieces(load);
    if (r == 0)
        r = model_map(load);
    return r;
}

static uint64_t total_bytes(const struct plan *plan)
{
    uint64_t total = 0;

    for (size_t i = 0; i < plan->n_items; i++)
        total += plan_item_file_bytes(&plan->items[i]);
    return total;
}

int model_load_begin(const struct gguf_source *source, const struct model_load_options *options,
                     struct model_progress *progress, struct model_load **ret_load,
                     struct fault *ret_fault)
{
    _cleanup_(model_load_freep) struct model_load *load = calloc(1, sizeof(*load));
    int r;

    if (!load)
        return fault_set(ret_fault, -ENOMEM, "no memory for a load");
    load->progress = progress;
    load->max_bytes = options->max_bytes;
    load->pulse = options->pulse;
    load->legacy = options->legacy;
    if (load->pulse)
        pulse_works(load->pulse, &load->seen);
    load->plan = (struct plan){.kernels = options->kernels, .fault = ret_fault};
    reader_init(&load->reader, source, options->direct);
    r = gguf_open(source, &load->gguf, ret_fault);
    if (r < 0)
        return r;
    load->plan.gguf = load->gguf;
    load->model = calloc(1, sizeof(*load->model));
    if (!load->model)
        return fault_set(ret_fault, -ENOMEM, "no memory for a model");
    load->model->kernels = options->kernels;
    r = model_read_header(load->model, load->gguf, options->context_tokens, ret_fault);
    if (r == 0)
        r = plan_weights(load);
    if (r < 0)
        return r;
    load->legacy = NULL;
    load->plan.fault = NULL; /* the caller's, gone after this call */
    if (progress) {
        atomic_store(&progress->done_bytes, 0);
        atomic_store(&progress->total_bytes, total_bytes(&load->plan));
    }
    *ret_load = TAKE_PTR(load);
    return 0;
}

/* ---- the way ---- */

/* A buffer of whole huge pages: the disk writes to it in long runs instead of scattered pages,
 * which more than doubled the speed of O_DIRECT where it was measured. */
static int map_buffer(struct load_hand *hand, size_t bytes)
{
    size_t want = (bytes + HUGE_BYTES - 1) & ~(size_t)(HUGE_BYTES - 1);
    uint8_t *mapping =
        mmap(NULL, want + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    size_t before;

    load_hand_done(hand);
    if (mapping == MAP_FAILED)
        return -ENOMEM;
    before = -(uintptr_t)mapping & (HUGE_BYTES - 1);
    if (before > 0)
        munmap(mapping, before);
    if (before < HUGE_BYTES)
        munmap(mapping + before + want, HUGE_BYTES - before);
    hand->buffer = mapping + before;
    hand->bytes = want;
    (void)madvise(hand->buffer, want, MADV_HUGEPAGE); /* refused, it is only slower */
    return 0;
}

/* A piece for the hand, and a buffer for it: 1; 0: none is left. */
static int take_piece(struct model_load *load, struct load_hand *hand, struct fault *ret_fault)
{
    size_t bytes = 2 * reader_room(load->piece_bytes);

    if (hand->load != load) {
        hand->load = load;
        hand->has_piece = false;
    }
    if (!hand->has_piece) {
        uint32_t next = atomic_load(&load->next);

        do
            if (next >= load->n_pieces)
                return 0;
        while (!atomic_compare_exchange_weak(&load->next, &next, next + 1));
        hand->piece = next;
        hand->has_piece = true;
    }
    return hand->bytes >= bytes || map_buffer(hand, bytes) == 0
               ? 1
               : fault_set(ret_fault, -ENOMEM, "no memory to read weights through");
}

int model_load_slice(struct model_load *load, struct load_hand *hand, struct fault *ret_fault)
{
    struct model_progress *progress = load->progress;
    int64_t bytes;
    int r;

    if (progress && atomic_load(&progress->cancel))
        return fault_set(ret_fault, -ECANCELED, "the load was cancelled");
    r = take_piece(load, hand, ret_fault);
    if (r <= 0)
        return r;
    bytes = load_piece(load, &load->pieces[hand->piece], hand->buffer, ret_fault);
    if (bytes < 0)
        return (int)bytes;
    hand->has_piece = false;
    if (progress) {
        atomic_fetch_add(&progress->done_bytes, (uint64_t)bytes);
        if (progress->pause)
            progress->pause(progress->pause_userdata);
    }
    /* Orders what was packed before what model_load_end() does. */
    atomic_fetch_add(&load->n_done, 1);
    return 1;
}

bool model_load_is_whole(const struct model_load *load)
{
    return atomic_load(&load->n_done) == load->n_pieces;
}

bool model_load_wants_hands(const struct model_load *load)
{
    return atomic_load(&load->next) < load->n_pieces;
}

void load_hand_done(struct load_hand *hand)
{
    if (hand->buffer)
        munmap(hand->buffer, hand->bytes);
    hand->buffer = NULL;
    hand->bytes = 0;
}

/* ---- the end ---- */

int model_load_end(struct model_load *load, struct model **ret_model, struct fault *ret_fault)
{
    struct model *model = load->model;
    int r;

    assert(model_load_is_whole(load));
    if (model->weights.tied)
        model->weights.output = model->weights.embedding;
    r = model_derive(model, &load->plan, ret_fault);
    if (r < 0)
        return r;
    if (load->progress) {
        atomic_store(&load->progress->direct_bytes, atomic_load(&load->reader.direct_bytes));
        atomic_store(&load->progress->recycled_bytes, model->arena.recycled_bytes);
    }
    arena_settle(&model->arena);
    *ret_model = TAKE_PTR(load->model);
    return 0;
}

struct model_load *model_load_free(struct model_load *load)
{
    if (!load)
        return NULL;
    model_free(load->model);
    plan_done(&load->plan);
    reader_done(&load->reader);
    gguf_free(load->gguf);
    free(load->pieces);
    free(load);
    return NULL;
}

int model_load(const struct gguf_source *source, const struct model_load_options *options,
               struct model_progress *progress, struct model **ret_model, struct fault *ret_fault)
{
    _cleanup_(model_load_freep) struct model_load *load = NULL;
    _cleanup_(load_hand_done) struct load_hand hand = {0};
    int r;

    r = model_load_begin(source, options, progress, &load, ret_fault);
    if (r < 0)
        return r;
    do
        r = model_load_slice(load, &hand, ret_fault);
    while (r > 0);
    return r < 0 ? r : model_load_end(load, ret_model, ret_fault);
}
