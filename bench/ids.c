/* `ids`: texts to token ids, for comparing tokenizers; a file with a vocabulary alone will do. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/bench.h"
#include "lib/cleanup.h"

/* The most that one text may have. */
#define TEXT_BYTES (64u << 20)

/* One line: a JSON array. */
static int print_ids(const struct tokenizer *tokenizer, const char *text, size_t len)
{
    _cleanup_free_ int32_t *ids = NULL;
    size_t n = 0;
    int r = tokenizer_encode(tokenizer, text, len, &ids, &n);

    if (r < 0)
        return bench_fail("cannot tokenize a text of %zu bytes: %s", len, strerror(-r));
    putchar('[');
    for (size_t i = 0; i < n; i++)
        printf("%s%d", i > 0 ? ", " : "", ids[i]);
    printf("]\n");
    return BENCH_DONE;
}

static int print_whole(const struct tokenizer *tokenizer)
{
    _cleanup_free_ char *text = malloc(TEXT_BYTES);
    size_t n;

    if (!text)
        return bench_fail("no memory for the text");
    n = fread(text, 1, TEXT_BYTES, stdin);
    if (ferror(stdin) || !feof(stdin))
        return bench_fail("stdin cannot be read, or is %u bytes or more", TEXT_BYTES);
    return print_ids(tokenizer, text, n);
}

/* Every line of stdin is a JSON string. */
static int print_lines(const struct tokenizer *tokenizer)
{
    _cleanup_free_ char *line = NULL;
    size_t room = 0, number = 0;
    int exit_code = BENCH_DONE;
    ssize_t n;

    while (exit_code == BENCH_DONE && (n = getline(&line, &room, stdin)) >= 0) {
        json_t *text = json_loadb(line, (size_t)n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);

        number++;
        if (!json_is_string(text))
            exit_code = bench_fail("line %zu is no JSON string", number);
        else
            exit_code = print_ids(tokenizer, json_string_value(text), json_string_length(text));
        json_decref(text);
    }
    return exit_code;
}

static int run(int argc, char **argv)
{
    const char *path = NULL;
    struct tokenizer *tokenizer = NULL;
    struct gguf *gguf = NULL;
    struct gguf_source source;
    struct fault fault = {0};
    _cleanup_close_ int fd = -1;
    bool lines = false;
    int exit_code;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--lines") == 0)
            lines = true;
        else if (argv[i][0] != '-' && !path)
            path = argv[i];
        else
            return bench_usage(&bench_ids);
    }
    if (!path)
        return bench_usage(&bench_ids);
    fd = bench_open(path, &source);
    if (fd < 0)
        return BENCH_FAILED;
    if (gguf_open(&source, &gguf, &fault) < 0 || tokenizer_new(gguf, &tokenizer, &fault) < 0)
        exit_code = bench_fail("cannot use %s: %s", path, fault.text);
    else
        exit_code = lines ? print_lines(tokenizer) : print_whole(tokenizer);
    tokenizer_free(tokenizer);
    gguf_free(gguf);
    if (exit_code == BENCH_DONE && fflush(stdout) != 0)
        exit_code = bench_fail("cannot write to stdout: %s", strerror(errno));
    return exit_code;
}

const struct bench_command bench_ids = {
    .name = "ids",
    .usage = "MODEL [--lines]",
    .help = "Token ids of stdin's text (or of a JSON string a line) as a JSON array a text.",
    .run = run,
};
