/* make-model: writes a GGUF model of any shape with random weights. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/model_maker.h"
#include "lib/cleanup.h"

#define EXIT_USAGE 2

static const char usage_text[] =
    "make-model --out FILE [OPTION]...\n"
    "Write a GGUF model with random weights; the same options give the same file.\n"
    "\n"
    "  --out FILE          where to; replaced only when the new file is complete\n"
    "  --arch A            llama (default), qwen2, qwen3, gemma3, bert\n"
    "  --dim N             width of the model (256)\n"
    "  --layers N          (4)\n"
    "  --heads N           attention heads (8)\n"
    "  --kv-heads N        heads of K and V (4; bert: as many as heads)\n"
    "  --ff N              width of the feed-forward part (512)\n"
    "  --vocab N           tokens (3000)\n"
    "  --context N         longest text in tokens (1024)\n"
    "  --type T            f32 f16 bf16 q8_0 (default) q4_0 q4_k q6_k q4_k_m; a matrix whose rows\n"
    "                      the type's blocks do not divide becomes q8_0, else f16\n"
    "  --tokenizer K       llama or gpt2 (default: llama; qwen2 and qwen3: gpt2), bert\n"
    "  --tied              the output is the token embedding\n"
    "  --seed N            (1)\n"
    "  --help\n"
    "\n"
    "Exit status: 0 written, 1 failed, 2 usage.\n";

enum option_code {
    OPT_OUT = 256,
    OPT_ARCH,
    OPT_DIM,
    OPT_LAYERS,
    OPT_HEADS,
    OPT_KV_HEADS,
    OPT_FF,
    OPT_VOCAB,
    OPT_CONTEXT,
    OPT_TYPE,
    OPT_TOKENIZER,
    OPT_TIED,
    OPT_SEED,
    OPT_HELP,
};

static const struct option options[] = {
    {"out", required_argument, NULL, OPT_OUT},
    {"arch", required_argument, NULL, OPT_ARCH},
    {"dim", required_argument, NULL, OPT_DIM},
    {"layers", required_argument, NULL, OPT_LAYERS},
    {"heads", required_argument, NULL, OPT_HEADS},
    {"kv-heads", required_argument, NULL, OPT_KV_HEADS},
    {"ff", required_argument, NULL, OPT_FF},
    {"vocab", required_argument, NULL, OPT_VOCAB},
    {"context", required_argument, NULL, OPT_CONTEXT},
    {"type", required_argument, NULL, OPT_TYPE},
    {"tokenizer", required_argument, NULL, OPT_TOKENIZER},
    {"tied", no_argument, NULL, OPT_TIED},
    {"seed", required_argument, NULL, OPT_SEED},
    {"help", no_argument, NULL, OPT_HELP},
    {NULL, 0, NULL, 0},
};

struct command {
    struct model_plan plan;
    const char *out;
    bool tokenizer_given, kv_heads_given;
    bool help;
};

/* Decimal digits alone. */
static int parse_number(const char *text, uint64_t most, uint64_t *ret)
{
    char *end;

    if (*text < '0' || *text > '9')
        return -EINVAL;
    errno = 0;
    *ret = strtoull(text, &end, 10);
    return errno || *end || *ret > most ? -EINVAL : 0;
}

/* Where a numeric option goes, or NULL. */
static uint32_t *number_of(struct model_plan *plan, int code)
{
    switch (code) {
    case OPT_DIM: return &plan->dim;
    case OPT_LAYERS: return &plan->layers;
    case OPT_HEADS: return &plan->heads;
    case OPT_KV_HEADS: return &plan->kv_heads;
    case OPT_FF: return &plan->ff;
    case OPT_VOCAB: return &plan->vocab;
    case OPT_CONTEXT: return &plan->context;
    default: return NULL;
    }
}

static int take_option(struct command *command, int code, const char *value)
{
    struct model_plan *plan = &command->plan;
    uint32_t *number = number_of(plan, code);
    uint64_t parsed = 0;
    int error;

    if (number) {
        error = parse_number(value, UINT32_MAX, &parsed);
        *number = (uint32_t)parsed;
        command->kv_heads_given |= code == OPT_KV_HEADS;
        return error;
    }
    switch (code) {
    case OPT_OUT: command->out = value; return 0;
    case OPT_ARCH: return plan_arch_from_name(value, &plan->arch);
    case OPT_TYPE: return plan_type_from_name(value, &plan->type);
    case OPT_TOKENIZER:
        command->tokenizer_given = true;
        return plan_vocabulary_from_name(value, &plan->vocabulary);
    case OPT_TIED: plan->tied = true; return 0;
    case OPT_SEED: return parse_number(value, UINT64_MAX, &plan->seed);
    default: command->help = true; return 0;
    }
}

static int parse_command(int argc, char **argv, struct command *ret_command)
{
    struct command command = {.plan = model_plan_default()};
    int code, index = 0;

    while ((code = getopt_long(argc, argv, "", options, &index)) != -1) {
        if (code == '?')
            return -EINVAL;
        if (take_option(&command, code, optarg) < 0) {
            fprintf(stderr, "make-model: --%s %s is not possible; see --help\n",
                    options[index].name, optarg);
            return -EINVAL;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "make-model: unexpected argument %s; see --help\n", argv[optind]);
        return -EINVAL;
    }
    if (!command.out && !command.help) {
        fprintf(stderr, "make-model: --out FILE is missing; see --help\n");
        return -EINVAL;
    }
    if (!command.tokenizer_given && command.plan.arch == PLAN_BERT)
        command.plan.vocabulary = VOCABULARY_BERT;
    else if (!command.tokenizer_given &&
             (command.plan.arch == PLAN_QWEN2 || command.plan.arch == PLAN_QWEN3))
        command.plan.vocabulary = VOCABULARY_GPT2;
    if (!command.kv_heads_given && command.plan.arch == PLAN_BERT)
        command.plan.kv_heads = command.plan.heads;
    *ret_command = command;
    return 0;
}

/* Writes beside the file's name first, so that nobody meets half a model under it. */
static int write_model(const struct command *command)
{
    _cleanup_free_ char *part = NULL;
    struct fault fault = {""};
    int fd, error;

    if (asprintf(&part, "%s.part", command->out) < 0) {
        part = NULL;
        return -ENOMEM;
    }
    fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        error = -errno;
        fprintf(stderr, "make-model: %s cannot be written: %s\n", part, strerror(-error));
        return error;
    }
    error = model_make_to_fd(&command->plan, fd, &fault);
    if (close(fd) < 0 && !error)
        error = fault_set(&fault, -errno, "it cannot be closed: %s", strerror(errno));
    if (!error && rename(part, command->out) < 0)
        error = fault_set(&fault, -errno, "it cannot take its name: %s", strerror(errno));
    if (error) {
        unlink(part);
        fprintf(stderr, "make-model: %s: %s\n", command->out, fault.text);
    }
    return error;
}

int main(int argc, char **argv)
{
    struct command command;
    struct fault fault = {""};

    if (parse_command(argc, argv, &command) < 0)
        return EXIT_USAGE;
    if (command.help) {
        fputs(usage_text, stdout);
        return EXIT_SUCCESS;
    }
    if (model_plan_check(&command.plan, &fault) < 0) {
        fprintf(stderr, "make-model: %s\n", fault.text);
        return EXIT_USAGE;
    }
    return write_model(&command) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
