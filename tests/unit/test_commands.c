/* The commands of hearth against daemons that misbehave: whatever comes, a command ends with the
 * right exit code, a sentence on stderr, and nothing on stdout that it was not told. */
#include <fcntl.h>
#include <sys/wait.h>
#include <signal.h>

#include "cli/cli.h"
#include "tests/support/alloc_fail.h"
#include "tests/unit/fake_daemon.h"

/* What a command wrote. */
static char out[65536], err[65536];

static void slurp(int fd, char *text, size_t size)
{
    ssize_t n = pread(fd, text, size - 1, 0);
    text[n > 0 ? n : 0] = '\0';
    close(fd);
}

static int temporary(void)
{
    char path[] = "/tmp/hearth-test-XXXXXX";
    int fd = mkstemp(path);
    unlink(path);
    return fd;
}

/* Runs a command on a socket with the words of `line` as its arguments. */
static int run(cli_command_fn fn, const char *socket, const char *line)
{
    const struct cli_command commands[] = {{"it", fn, "", "", "", true}};
    char words[1024],
        *argv[64] = {(char *)"hearth", (char *)"it", (char *)"--socket", (char *)socket};
    int argc = 4;
    snprintf(words, sizeof(words), "%s", line);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    int fds[] = {temporary(), temporary()}, before[] = {dup(1), dup(2)};
    fflush(NULL);
    dup2(fds[0], 1);
    dup2(fds[1], 2);
    int exit_code = cli_main(commands, 1, argc, argv);
    fflush(NULL);
    dup2(before[0], 1);
    dup2(before[1], 2);
    close(before[0]);
    close(before[1]);
    slurp(fds[0], out, sizeof(out));
    slurp(fds[1], err, sizeof(err));
    return exit_code;
}

static const struct {
    cli_command_fn fn;
    const char *args;
} commands[] = {
    {cli_run_model, "m hi"},
    {cli_run_model, "m hi --json"},
    {cli_embed, "m hi"},
    {cli_tokenize, "m hi"},
    {cli_tokenize, "m hi --json"},
    {cli_warm, "m n"},
    {cli_warm, "m --wait"},
    {cli_unload, "m"},
    {cli_pin, "m"},
    {cli_pin, "m --off"},
    {cli_reload, ""},
    {cli_models, ""},
    {cli_models, "m"},
    {cli_models, "--json"},
    {cli_status, ""},
    {cli_status, "--json"},
    {cli_stats, ""},
    {cli_stats, "pool --json"},
    {cli_events, ""},
    {cli_events, "--json"},
    {cli_top, "--once --interval 100ms"},
};

/* A fake daemon whose status socket is its main one. */
static void start(struct fake *fake, fake_script script)
{
    char status[HEARTH_PATH_BYTES + 8];
    fake_start(fake, script);
    snprintf(status, sizeof(status), "%s.status", fake->path);
    cr_assert_eq(symlink(fake->path, status), 0);
}

static void stop(struct fake *fake)
{
    char status[HEARTH_PATH_BYTES + 8];
    snprintf(status, sizeof(status), "%s.status", fake->path);
    unlink(status);
    fake_stop(fake);
}

/* ---- scripts ---- */

static void hang_up(struct fake *fake, int fd)
{
    (void)fake, (void)fd;
}

static void speak_another_protocol(struct fake *fake, int fd)
{
    (void)fake;
    fake_write(fd, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
}

static void hang_up_on_the_request(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    (void)fake;
    if (fake_hello(fd))
        fake_next(fd, &frame);
}

static void refuse(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    (void)fake;
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer buffer = {0};
        fake_put_error(&buffer, frame.header.id, "forbidden", "not you \033[2J of all\nmen", 0);
        if (!fake_send(fd, &buffer))
            return;
    }
}

/* An item with everything in it, some of it odd; then the connection breaks. */
static void put_item(struct wire_buffer *buffer, uint64_t id)
{
    const int32_t ids[] = {1, 2};
    const float vector[] = {0.6f, 0.8f};
    wire_begin(buffer, WIRE_ITEM, id);
    wire_put_text(buffer, TAG_MODEL, "m\033[31m");
    wire_put_text(buffer, TAG_STATE, "load\033ing");
    wire_put_text(buffer, TAG_NAME, "na\007me");
    wire_put_text(buffer, TAG_TEXT, "odd \033]0;x\007\nrequests_total 12");
    wire_put_text(buffer, TAG_INFO, "key va\033lue\nkernels \033x\n");
    wire_put_text(buffer, TAG_STATS, "requests 18446744073709551615\n\n x\nin_use -4\n");
    wire_put_text(buffer, TAG_VERSION, "\x80\033");
    wire_put_bytes(buffer, TAG_IDS, (const uint8_t *)ids, sizeof(ids));
    wire_put_bytes(buffer, TAG_VECTOR, (const uint8_t *)vector, sizeof(vector));
    wire_put_number(buffer, TAG_DONE_BYTES, UINT64_MAX);
    wire_put_number(buffer, TAG_TOTAL_BYTES, 1);
    wire_put_number(buffer, TAG_MEMORY_BYTES, UINT64_MAX);
    wire_end(buffer);
}

static void break_off(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer buffer = {0};
    (void)fake;
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    put_item(&buffer, frame.header.id);
    fake_put_tokens(&buffer, frame.header.id, "text\033[2J");
    fake_send(fd, &buffer);
}

static void answer_oddly(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    (void)fake;
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer buffer = {0};
        put_item(&buffer, frame.header.id);
        fake_put_done(&buffer, frame.header.id, "\033[31m");
        if (!fake_send(fd, &buffer))
            return;
    }
}

static void answer_nothing(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    (void)fake;
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer buffer = {0};
        fake_put_done(&buffer, frame.header.id, NULL);
        if (!fake_send(fd, &buffer))
            return;
    }
}

static void go_away(struct fake *fake, int fd)
{
    struct wire_buffer buffer = {0};
    char byte;
    (void)fake;
    if (!fake_hello(fd))
        return;
    fake_put_goaway(&buffer);
    if (fake_send(fd, &buffer))
        fake_read(fd, &byte, 1);
}

/* ---- what must hold ---- */

/* One sentence a line, and nothing in it that drives a terminal. */
static void expect_sentences(size_t i)
{
    cr_expect_eq(strncmp(err, "hearth: ", 8), 0, "command %zu says '%s'", i, err);
    for (const char *c = err; *c; c++)
        cr_expect(*c == '\n' || (unsigned char)*c >= 0x20, "command %zu: control in '%s'", i, err);
}

Test(commands, end_with_1_and_a_sentence_when_the_daemon_hangs_up_before_its_hello)
{
    fake_script scripts[] = {hang_up, speak_another_protocol};
    for (size_t s = 0; s < ELEMENTSOF(scripts); s++) {
        struct fake fake;
        start(&fake, scripts[s]);
        for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
            cr_expect_eq(run(commands[i].fn, fake.path, commands[i].args), CLI_FAILED, "%zu", i);
            cr_expect_str_empty(out, "command %zu prints '%s'", i, out);
            expect_sentences(i);
        }
        stop(&fake);
    }
}

Test(commands, end_with_a_sentence_when_the_daemon_dies_at_the_request)
{
    fake_script scripts[] = {hang_up_on_the_request, break_off};
    for (size_t s = 0; s < ELEMENTSOF(scripts); s++) {
        struct fake fake;
        start(&fake, scripts[s]);
        for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
            bool watches = commands[i].fn == cli_events || commands[i].fn == cli_top;
            cr_expect_eq(run(commands[i].fn, fake.path, commands[i].args),
                         watches ? CLI_NO_DAEMON : CLI_FAILED, "script %zu, %zu: %s", s, i, err);
            expect_sentences(i);
        }
        stop(&fake);
    }
}

Test(commands, print_a_refusal_as_its_sentence)
{
    struct fake fake;
    start(&fake, refuse);
    for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
        cr_expect_eq(run(commands[i].fn, fake.path, commands[i].args), CLI_FAILED, "%zu", i);
        cr_expect(strstr(err, "not you \\x1b[2J of all"), "command %zu says '%s'", i, err);
        expect_sentences(i);
    }
    stop(&fake);
}

Test(commands, print_nothing_that_drives_a_terminal)
{
    struct fake fake;
    start(&fake, answer_oddly);
    for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
        bool raw = commands[i].fn == cli_events && *commands[i].args; /* objects as they come */
        int exit_code = run(commands[i].fn, fake.path, commands[i].args);
        cr_expect(exit_code == CLI_DONE || exit_code == CLI_FAILED, "%zu: %d", i, exit_code);
        for (const char *c = out; *c && !raw; c++)
            cr_expect(*c == '\n' || (unsigned char)*c >= 0x20, "command %zu: control in '%s'", i,
                      out);
    }
    stop(&fake);
}

Test(commands, do_without_what_an_answer_does_not_have)
{
    struct fake fake;
    start(&fake, answer_nothing);
    for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
        bool wants = commands[i].fn == cli_embed || commands[i].fn == cli_status ||
                     (commands[i].fn == cli_models && strcmp(commands[i].args, "m") == 0);
        cr_expect_eq(run(commands[i].fn, fake.path, commands[i].args),
                     wants ? CLI_FAILED : CLI_DONE, "%zu: %s", i, err);
        if (wants)
            expect_sentences(i);
    }
    stop(&fake);
}

Test(commands, say_so_when_the_daemon_is_going_away)
{
    struct fake fake;
    start(&fake, go_away);
    for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
        int exit_code = run(commands[i].fn, fake.path, commands[i].args);
        cr_expect(exit_code == CLI_FAILED || exit_code == CLI_NO_DAEMON, "%zu: %d", i, exit_code);
        expect_sentences(i);
    }
    stop(&fake);
}

/* ---- doctor ---- */

Test(commands, doctor_names_a_daemon_that_misbehaves)
{
    static const struct {
        fake_script script;
        const char *says;
    } cases[] = {
        {hang_up, "problem  daemon"},
        {speak_another_protocol, "problem  daemon"},
        {hang_up_on_the_request, "does not answer; do: end that process"},
        {go_away, "problem  daemon"},
        {answer_oddly, "warning  daemon"}, /* of another version */
        {answer_nothing, "warning  daemon"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct fake fake;
        start(&fake, cases[i].script);
        int exit_code = run(cli_doctor, fake.path, "");
        bool problem = strstr(out, "problem ") != NULL;
        cr_expect_eq(exit_code, problem ? CLI_FAILED : CLI_DONE, "case %zu: %d", i, exit_code);
        cr_expect(strstr(out, cases[i].says), "case %zu: %s", i, out);
        cr_expect_str_empty(err);
        for (const char *c = out; *c; c++)
            cr_expect(*c == '\n' || (unsigned char)*c >= 0x20, "control in '%s'", out);
        stop(&fake);
    }
}

/* ---- one model in full, and busy ---- */

static void show_one_model(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer buffer = {0};
    (void)fake;
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    wire_begin(&buffer, WIRE_ITEM, frame.header.id);
    wire_put_text(&buffer, TAG_MODEL, "m");
    wire_put_text(&buffer, TAG_STATE, "loading");
    wire_put_text(&buffer, TAG_INFO, "name m\nlayers 3\npath /m.gguf");
    wire_put_text(&buffer, TAG_STATS, "requests 7\nempty\nlayers 4\n");
    wire_put_number(&buffer, TAG_DONE_BYTES, 1024);
    wire_put_number(&buffer, TAG_TOTAL_BYTES, 2048);
    wire_put_number(&buffer, TAG_PINNED, 1);
    wire_put_number(&buffer, TAG_HOLDS, 2);
    wire_end(&buffer);
    fake_put_done(&buffer, frame.header.id, NULL);
    fake_send(fd, &buffer);
}

Test(commands, a_model_in_full_has_each_key_once)
{
    struct fake fake;
    start(&fake, show_one_model);
    cr_expect_eq(run(cli_models, fake.path, "m"), CLI_DONE);
    cr_expect_str_eq(out, "name           m\n"
                          "state          loading\n"
                          "done_bytes     1024\n"
                          "total_bytes    2048\n"
                          "memory_bytes   0\n"
                          "preload        0\n"
                          "pinned         1\n"
                          "keep_alive_us  0\n"
                          "holds          2\n"
                          "layers         3\n"
                          "path           /m.gguf\n"
                          "requests       7\n"
                          "empty          \n");
    cr_expect_eq(run(cli_models, fake.path, ""), CLI_DONE);
    cr_expect(strstr(out, "1.0KiB of 2.0KiB"), "%s", out);
    stop(&fake);
}

static void be_busy(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer buffer = {0};
    (void)fake;
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    fake_put_error(&buffer, frame.header.id, "busy", "the queue is full", 1500000);
    fake_send(fd, &buffer);
}

Test(commands, who_is_refused_for_being_busy_learns_when_to_try_again)
{
    struct fake fake;
    start(&fake, be_busy);
    cr_expect_eq(run(cli_run_model, fake.path, "m hi"), CLI_FAILED);
    cr_expect_str_eq(err, "hearth: the queue is full (try again in 1.5 s)\n");
    stop(&fake);
}

/* ---- out of memory ---- */

static void answer_well(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    (void)fake;
    if (!fake_hello(fd))
        return;
    while (fake_next(fd, &frame)) {
        struct wire_buffer buffer = {0};
        put_item(&buffer, frame.header.id);
        if (frame.header.type == WIRE_COMPLETE)
            fake_put_tokens(&buffer, frame.header.id, "text");
        if (frame.header.type == WIRE_SUBSCRIBE)
            fake_put_error(&buffer, frame.header.id, "shutting-down", "the daemon is shutting down",
                           0);
        else
            fake_put_done(&buffer, frame.header.id, "stop");
        if (!fake_send(fd, &buffer))
            return;
    }
}

Test(commands, end_in_order_wherever_memory_runs_out)
{
    for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
        struct fake fake;
        bool failed = true;
        start(&fake, answer_well); /* each has room for FAKE_MAX_CONNECTIONS */
        for (unsigned n = 1; failed; n++) {
            cr_assert_lt(n, FAKE_MAX_CONNECTIONS + 0u, "command %zu never gets through", i);
            alloc_fail_at(n);
            int exit_code = run(commands[i].fn, fake.path, commands[i].args);
            failed = alloc_fail_done();
            cr_expect(exit_code == CLI_DONE || exit_code == CLI_FAILED ||
                          exit_code == CLI_NO_DAEMON,
                      "command %zu, allocation %u: %d", i, n, exit_code);
            cr_expect(exit_code == CLI_DONE || strncmp(err, "hearth: ", 8) == 0,
                      "command %zu, allocation %u: '%s'", i, n, err);
        }
        stop(&fake);
    }
}

/* ---- events ---- */

static void tell_events(struct fake *fake, int fd)
{
    static const char *const lines[] = {
        ("{\"time\":\"2026-11-24T10:00:00.123Z\",\"event\":\"evicted\",\"model\":\"a\",\"for\":"
         "\"b\","
         "\"why\":\"least likely\",\"bytes\":1048576,\"reload_us\":2500000}"),
        ("{\"time\":\"2026-11-24T10:00:01Z\",\"event\":\"busy\",\"uid\":7,\"refused\":3,"
         "\"sentence\":\"the queue is full\"}"),
        "{\"event\":\"lost\",\"count\":12}",
        "{\"time\":\"to\\u001bmorrow\",\"event\":\"daemon\",\"state\":\"draining\"}",
        "{\"event\":\"new\\nkind\",\"seq\":1,\"list\":[1,2],\"text\":\"a b\"}",
        "no \033 JSON",
        "[1]",
        "{\"event\":\"state\",\"state\":3}",
    };
    _cleanup_frame_ struct fake_frame frame = {0};
    struct wire_buffer buffer = {0};
    (void)fake;
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    for (size_t i = 0; i < ELEMENTSOF(lines); i++) {
        wire_begin(&buffer, WIRE_ITEM, frame.header.id);
        wire_put_text(&buffer, TAG_TEXT, lines[i]);
        wire_end(&buffer);
    }
    fake_put_error(&buffer, frame.header.id, "shutting-down", "the daemon is shutting down", 0);
    fake_send(fd, &buffer);
}

Test(commands, events_have_words_and_those_unknown_their_members)
{
    struct fake fake;
    setenv("TZ", "UTC", 1);
    start(&fake, tell_events);
    cr_expect_eq(run(cli_events, fake.path, ""), CLI_NO_DAEMON);
    cr_expect_str_eq(err, "hearth: the daemon has ended\n");
    cr_expect_str_eq(
        out, "10:00:00.123  a goes for b: least likely (1.0MiB come free; its last load took "
             "2.5s)\n"
             "10:00:01  busy: 3 refused, the last of uid 7: the queue is full\n"
             "-             12 events are lost: this reader was too slow\n"
             "to\\x1bmorrow     hearthd is draining\n"
             "-             new\\x0akind list=[1,2] text=\"a b\"\n"
             "no \\x1b JSON\n"
             "[1]\n"
             "-             - is -, was -\n");
    stop(&fake);
}

/* ---- Ctrl-C ---- */

/* Takes a request, lets the client be interrupted, and never answers. */
static void interrupt(struct fake *fake, int fd)
{
    _cleanup_frame_ struct fake_frame frame = {0};
    if (!fake_hello(fd) || !fake_next(fd, &frame))
        return;
    kill(getpid(), SIGINT);
    while (fake_next(fd, &frame))
        if (frame.header.type == WIRE_CANCEL)
            atomic_fetch_add(&fake->seen, 1);
}

Test(commands, ctrl_c_cancels_and_gives_up_on_a_daemon_that_does_not_answer)
{
    static const struct {
        cli_command_fn fn;
        const char *args;
    } cancelling[] = {{cli_run_model, "m hi"}, {cli_warm, "m --wait"}};
    /* A process each: the second Ctrl-C of one would kill it. */
    for (size_t i = 0; i < ELEMENTSOF(cancelling); i++) {
        pid_t pid = fork();
        if (pid == 0) {
            struct fake fake;
            start(&fake, interrupt);
            int exit_code = run(cancelling[i].fn, fake.path, cancelling[i].args);
            stop(&fake);
            _exit(exit_code != CLI_INTERRUPTED || atomic_load(&fake.seen) != 1 || *err);
        }
        int status;
        cr_assert_eq(waitpid(pid, &status, 0), pid);
        cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "command %zu: %x", i, status);
    }
}
