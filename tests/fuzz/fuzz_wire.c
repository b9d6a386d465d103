/* Arbitrary bytes as a frame's body: read option by option, then parsed as a client parses a reply.
 *
 * For libFuzzer: clang -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_wire.c
 * lib/wire.c lib/reply.c */
#include <stdlib.h>
#include <string.h>

#include "lib/client.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_options(const uint8_t *data, size_t size)
{
    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, data, size);
    while (wire_reader_next(&reader, &option) > 0) {
        uint64_t number;
        float real;
        if (option.value < data || option.value + option.len > data + size)
            abort();
        wire_option_number(&option, &number);
        wire_option_real(&option, &real);
        wire_option_is(&option, "ready");
        wire_utf8_valid(option.value, option.len);
        wire_tag_name(option.tag);
        wire_code_from_name((const char *)option.value, option.len);
    }
}

/* Every pointer of a parsed reply must be readable to its end. */
static size_t touch(const struct hearth_reply *r)
{
    const char *const words[] = {r->text,  r->reason, r->variant, r->code,  r->sentence, r->option,
                                 r->model, r->state,  r->info,    r->stats, r->version,  r->name};
    size_t sum = 0;
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
        sum += words[i] ? strlen(words[i]) : 0;
    if (r->text && r->text[r->text_bytes] != '\0')
        abort();
    for (size_t i = 0; i < r->n_ids; i++)
        sum += (size_t)r->ids[i];
    for (size_t i = 0; i < r->n_vector; i++)
        sum += r->vector[i] > 0;
    for (size_t i = 0; i < r->fingerprint_bytes; i++)
        sum += ((const uint8_t *)r->fingerprint)[i];
    return sum;
}

static void parse_reply(const uint8_t *data, size_t size)
{
    struct reply_scratch scratch = {0};
    struct hearth_reply reply = {.kind = HEARTH_ITEM, .id = 1};
    struct fault fault;
    volatile size_t sum = 0;
    uint8_t *body = malloc(size + 1); /* the byte that the client lends */
    if (!body)
        return;
    memcpy(body, data, size);
    body[size] = 0xff;
    if (reply_parse(body, size, &scratch, &reply, &fault) == 0)
        sum += touch(&reply);
    (void)sum;
    free(scratch.data);
    free(body);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct wire_header header;
    if (size >= WIRE_HEADER_BYTES && wire_header_read(data, &header) == 0)
        wire_type_name(header.type);
    read_options(data, size);
    parse_reply(data, size);
    return 0;
}
