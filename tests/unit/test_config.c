#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/config.h"
#include "lib/cleanup.h"

static char path[] = "/tmp/hearth-config-XXXXXX";
static struct config *config;
static struct fault fault;

static void begin(void)
{
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    close(fd);
    cr_assert_eq(config_new(&config), 0);
}

static void end(void)
{
    config = config_free(config);
    unlink(path);
}

TestSuite(config, .init = begin, .fini = end);

static int load_bytes(const char *bytes, size_t len)
{
    FILE *file = fopen(path, "w");
    cr_assert_not_null(file);
    cr_assert_eq(fwrite(bytes, 1, len, file), len);
    fclose(file);
    config_free(config);
    cr_assert_eq(config_new(&config), 0);
    fault.text[0] = '\0';
    return config_load(config, path, &fault);
}

static int load(const char *yaml)
{
    return load_bytes(yaml, strlen(yaml));
}

static void takes(const char *yaml)
{
    cr_assert_eq(load(yaml), 0, "%s: %s", yaml, fault.text);
}

/* The file is refused at this line, and the sentence has `says` in it. */
static void refuses(const char *yaml, unsigned line, const char *says)
{
    char start[64];
    cr_expect_eq(load(yaml), -EINVAL, "taken: %s", yaml);
    snprintf(start, sizeof(start), "%s:%u: ", path, line);
    cr_expect_eq(strncmp(fault.text, start, strlen(start)), 0, "'%s' is not at %s", fault.text,
                 start);
    cr_expect(strstr(fault.text, says), "'%s' does not say '%s'", fault.text, says);
}

Test(config, defaults_are_the_contracts)
{
    cr_expect_str_eq(config->default_model, "ember");
    cr_expect_eq(config->memory_budget.percent, 60);
    cr_expect_eq(config->idle_exit_us, 300000000);
    cr_expect_eq(config->drain_timeout_us, 10000000);
    cr_expect_eq(config->limits.connections, 4096);
    cr_expect_eq(config->limits.connections_per_uid, 1024);
    cr_expect_eq(config->limits.queue, 8192);
    cr_expect_eq(config->limits.queue_per_uid, 4096);
    cr_expect_eq(config->limits.frame, 1 << 20);
    cr_expect_eq(config->limits.stream_buffer, 64 << 10);
    cr_expect_eq(config->limits.input_bytes, 64 << 20);
    cr_expect_eq(config->limits.input_bytes_per_uid, 16 << 20);
    cr_expect_eq(config->limits.holds_per_uid, 64);
    cr_expect_eq(config->limits.memory_per_uid.percent, 50);
    cr_expect(config->batching.enabled);
    cr_expect_eq(config->batching.max_batch, 200);
    cr_expect_eq(config->batching.min_batch, 1);
    cr_expect_eq(config->batching.max_delay_us, 0);
    cr_expect_eq(config->batching.adaptive_us, 0);
    cr_expect(!config->batching.preserve_order);
    cr_expect(config->streaming.enabled);
    cr_expect_eq(config->streaming.credit, 64 << 10);
    cr_expect_eq(config->streaming.park_timeout_us, 30000000);
    cr_expect(config->loading.async);
    cr_expect_eq(config->loading.max_concurrent, 3);
    cr_expect_eq(config->loading.per_uid, 2);
    cr_expect_eq(config->loading.timeout_us, 120000000);
    cr_expect_eq(config->loading.retries, 3);
    cr_expect_eq(config->engine.threads, 0);
    cr_expect_eq(config->engine.kv, KV_F16);
    cr_expect_eq(config->engine.kv_budget.percent, 25);
    cr_expect_eq(config->engine.kv_per_uid.percent, 50);
    cr_expect_eq(config->engine.chunk_target_us, 20000);
    cr_expect(config->engine.prefix_cache);
    cr_expect_eq(config->engine.prefix_sharing, SHARING_UID);
    cr_expect_eq(config_check(config, NULL), 0);
}

Test(config, directories_come_from_the_environment)
{
    struct config *c;
    setenv("XDG_DATA_HOME", "/data", 1);
    setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two", 1);
    cr_assert_eq(config_new(&c), 0);
    cr_expect_str_eq(c->models_dirs[0], "/var/lib/hearth/models");
    cr_expect_str_eq(c->models_dirs[1], "/data/hearth/models");
    cr_expect_null(c->models_dirs[2]);
    cr_expect_str_eq(c->state_dir, "/var/lib/one");
    config_free(c);

    unsetenv("STATE_DIRECTORY");
    unsetenv("XDG_DATA_HOME");
    setenv("XDG_STATE_HOME", "relative", 1); /* not absolute: as if unset */
    setenv("HOME", "/home/someone", 1);
    cr_assert_eq(config_new(&c), 0);
    cr_expect_str_eq(c->models_dirs[1], "/home/someone/.local/share/hearth/models");
    cr_expect_str_eq(c->state_dir, "/home/someone/.local/state/hearth");
    config_free(c);

    unsetenv("HOME");
    cr_assert_eq(config_new(&c), 0);
    cr_expect_null(c->models_dirs[1]);
    cr_expect_str_eq(c->state_dir, "/var/lib/hearth");
    config_free(c);
}

Test(config, every_kind_of_value_is_read)
{
    takes("default_model: story-1.gguf_x\n"
          "models_dirs: [/srv/a, /srv/b]\n"
          "state_dir: \"/srv/state dir\"\n"
          "memory_budget: 8GiB\n"
          "idle_exit: 0s\n"
          "admin: {users: [root, 1000], groups: [hearth]}\n"
          "batching: {max_delay: 50us, adaptive: 5ms, enabled: no, preserve_order: true}\n"
          "loading: {prediction: dry-run, timeout: 2min}\n"
          "engine:\n"
          "  threads: 4\n"
          "  kv: f32\n"
          "  kv_budget: 512MiB\n"
          "  prefix_sharing: all\n"
          "models:\n"
          "  tiny:\n"
          "    path: /srv/t.gguf\n"
          "    preload: eager\n"
          "    priority: -3\n"
          "    pinned: yes\n"
          "    keep_alive: 1h\n"
          "    context: 2048\n"
          "    needs: [ember, other]\n"
          "  bare:\n");
    cr_expect_str_eq(config->default_model, "story-1.gguf_x");
    cr_expect_str_eq(config->models_dirs[0], "/srv/a");
    cr_expect_str_eq(config->models_dirs[1], "/srv/b");
    cr_expect_null(config->models_dirs[2]);
    cr_expect_str_eq(config->state_dir, "/srv/state dir");
    cr_expect_eq(config->memory_budget.bytes, UINT64_C(8) << 30);
    cr_expect_eq(config->memory_budget.percent, 0);
    cr_expect_eq(config->idle_exit_us, 0);
    cr_expect_str_eq(config->admin_users[1], "1000");
    cr_expect_str_eq(config->admin_groups[0], "hearth");
    cr_expect_eq(config->batching.max_delay_us, 50);
    cr_expect_eq(config->batching.adaptive_us, 5000);
    cr_expect(!config->batching.enabled);
    cr_expect(config->batching.preserve_order);
    cr_expect_eq(config->loading.prediction, PREDICTION_DRY_RUN);
    cr_expect_eq(config->loading.timeout_us, 120000000);
    cr_expect_eq(config->engine.threads, 4);
    cr_expect_eq(config->engine.kv, KV_F32);
    cr_expect_eq(config->engine.kv_budget.bytes, 512 << 20);
    cr_expect_eq(config->engine.prefix_sharing, SHARING_ALL);
    cr_assert_eq(config->n_models, 2);

    const struct config_model *tiny = config_find_model(config, "tiny");
    cr_assert_not_null(tiny);
    cr_expect_str_eq(tiny->path, "/srv/t.gguf");
    cr_expect_eq(tiny->preload, PRELOAD_EAGER);
    cr_expect_eq(tiny->priority, -3);
    cr_expect(tiny->pinned);
    cr_expect_eq(tiny->keep_alive_us, UINT64_C(3600000000));
    cr_expect_eq(tiny->context, 2048);
    cr_expect_str_eq(tiny->needs[1], "other");
    cr_expect_null(config_find_model(config, "bare")->path);
    cr_expect_null(config_find_model(config, "absent"));
}

Test(config, an_empty_file_and_empty_sections_change_nothing)
{
    static const char *const files[] = {"",          "# nothing\n",  "---\n...\n",
                                        "limits:\n", "models: {}\n", "engine: ~\n"};
    for (size_t i = 0; i < ELEMENTSOF(files); i++) {
        takes(files[i]);
        cr_expect_eq(config->limits.queue, 8192);
        cr_expect_eq(config->n_models, 0);
    }
}

Test(config, an_unknown_key_names_the_nearest_known_one)
{
    static const struct {
        const char *yaml, *says;
    } cases[] = {
        {"limts: {queue: 1}\n", "limts: expected a known key; the nearest one is limits"},
        {"limits: {que: 1}\n", "limits.que: expected a known key; the nearest one is limits.queue"},
        {"max_batch: 8\n",
         "max_batch: expected a known key; the nearest one is batching.max_batch"},
        {"engine: {stream_bufer: 1}\n", "the nearest one is limits.stream_buffer"},
        {"models: {a: {preloda: eager}}\n",
         "models.a.preloda: expected a known key; the nearest one is models.NAME.preload"},
        {"memory: 1GiB\n", "memory: expected a known key; the nearest one is memory_budget"},
        {"drain: 1s\n", "the nearest one is drain_timeout"},
        {"default-model: a\n", "the nearest one is default_model"},
        {"<<: {a: 1}\n", "expected a known key"},
        {"'': 1\n", "expected a known key"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        refuses(cases[i].yaml, 1, cases[i].says);
}

Test(config, values_out_of_kind_or_bounds_are_refused_with_what_was_expected)
{
    static const struct {
        const char *yaml, *says;
    } cases[] = {
        {"idle_exit: 5", "idle_exit: expected a time with its unit (us, ms, s, min, h)"},
        {"idle_exit: 5sec", "found '5sec'"},
        {"idle_exit: -5s", "found '-5s'"},
        {"idle_exit: 1.5s", "found '1.5s'"},
        {"idle_exit: ' 5s'", "found ' 5s'"},
        {"idle_exit: 9999h", "from 0s to 8760h"},
        {"idle_exit: 99999999999999999999s", "found"},
        {"idle_exit: 5124095576030431h", "found"}, /* wraps to a small number */
        {"memory_budget: 8GB", "memory_budget: expected 1% to 100%, or a size with its unit"},
        {"memory_budget: 0%", "found '0%'"},
        {"memory_budget: 101%", "found '101%'"},
        {"memory_budget: 1KiB", "from 16MiB to 64TiB"},
        {"limits: {frame: 1048576}", "limits.frame: expected a size with its unit"},
        {"limits: {queue: 0}", "a whole number from 1 to 1000000, found '0'"},
        {"limits: {queue: 4294967297}", "found '4294967297'"}, /* 1 in 32 bits */
        {"limits: {queue: 0x10}", "found '0x10'"},
        {"limits: {queue: many}", "found 'many'"},
        {"limits: {queue: }", "found ''"},
        {"limits: {queue: [1]}", "found a list"},
        {"limits: {queue: {a: 1}}", "found a mapping"},
        {"limits: {queue: !!int 5}", "found a tag"},
        {"batching: {enabled: maybe}", "batching.enabled: expected yes or no, found 'maybe'"},
        {"engine: {kv: f64}", "engine.kv: expected f16 or f32, found 'f64'"},
        {"loading: {prediction: yes}", "expected on, off or dry-run"},
        {"models: {a: {priority: 101}}", "models.a.priority: expected a whole number from -100"},
        {"models: {a: {priority: --1}}", "found '--1'"},
        {"models: {a: {path: a.gguf}}", "models.a.path: expected an absolute path"},
        {"models: {a: 5}", "models.a: expected keys of its own, found a value"},
        {"models: [a]", "models: expected keys of its own, found a list"},
        {"models_dirs: /srv", "models_dirs: expected a list of absolute paths"},
        {"models_dirs: [srv]", "found 'srv'"},
        {"models_dirs: [[/srv]]", "found a list"},
        {"admin: {users: ['']}", "admin.users: expected a list of names or numbers"},
        {"default_model: ../../etc/passwd", "default_model: expected a model's name"},
        {"state_dir: \"/a\\0b\"", "found a NUL character"},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        refuses(cases[i].yaml, 1, cases[i].says);
}

Test(config, model_names_are_checked)
{
    static const char *const names[] = {"a/b",     ".hidden",     "-x", "''",
                                        "\"a b\"", "\"\\u00e4\"", ".."};
    char yaml[300];
    for (size_t i = 0; i < ELEMENTSOF(names); i++) {
        snprintf(yaml, sizeof(yaml), "models:\n  ok: {}\n  %s: {}\n", names[i]);
        refuses(yaml, 3, "expected a model's name");
    }
    snprintf(yaml, sizeof(yaml), "models: {%0129d: {}}\n", 1);
    refuses(yaml, 1, "expected a model's name");
    snprintf(yaml, sizeof(yaml), "models: {%0128d: {}}\n", 1);
    takes(yaml);
}

Test(config, a_key_given_twice_is_refused_where_it_comes_again)
{
    refuses("idle_exit: 1s\nidle_exit: 2s\n", 2, "idle_exit: expected once");
    refuses("limits: {queue: 1,\n  queue: 2}\n", 2, "limits.queue: expected once");
    refuses("limits:\n  queue: 1\nengine:\nlimits:\n  frame: 1MiB\n", 4, "limits: expected once");
    refuses("models:\n  a:\n  b:\n  a:\n", 4, "models.a: expected once");
    refuses("models:\n  a:\n    pinned: no\n    'pinned': no\n", 4,
            "models.a.pinned: expected once");
}

Test(config, what_is_no_yaml_is_refused_at_its_line)
{
    static const struct {
        const char *yaml;
        unsigned line;
    } cases[] = {
        {"limits:\n\tqueue: 1\n", 2},                 /* a tab for blanks */
        {"limits: {queue: 1\n", 2},                   /* never closed */
        {"limits: }\n", 1},                           /* never opened */
        {"idle_exit: 1s: 2s\n", 1},                   /* two values */
        {"idle_exit: 'x\n", 2},                       /* a quote left open */
        {"state_dir: \"\\q\"\n", 1},                  /* no such escape */
        {"limits:\n   queue: 1\n  frame: 1MiB\n", 3}, /* indented to nowhere */
        {"idle_exit: %1s\n", 1},                      /* a reserved character */
        {"idle_exit: @1s\n", 1},
        {"idle_exit: 1s\n\x01: 1\n", 2}, /* a control character */
        {"%YAML 9.0\n---\na: 1\n", 1},
    };
    for (size_t i = 0; i < ELEMENTSOF(cases); i++)
        refuses(cases[i].yaml, cases[i].line, "expected YAML");
    refuses("idle_exit: 1s\n\xff: 1\n", 2, "expected YAML");
    refuses("idle_exit: \xc3\n", 1, "expected YAML");
}

Test(config, what_is_yaml_but_no_configuration_is_refused)
{
    refuses("[1, 2]\n", 1, "expected keys of its own, found a list");
    refuses("\nhello\n", 2, "expected keys of its own, found a value");
    refuses("idle_exit: 1s\n---\nidle_exit: 2s\n", 2, "expected one document");
    refuses("limits: &a {queue: 1}\nengine: *a\n", 2, "found an alias");
    refuses("? [a, b]\n: 1\n", 1, "expected a key, found a list");
}

Test(config, deep_nesting_is_refused_at_the_first_step_too_far)
{
    static char yaml[200000];
    memset(yaml, '[', sizeof(yaml) - 1);
    memcpy(yaml, "models_dirs: ", 13);
    refuses(yaml, 1, "models_dirs");
    memset(yaml, '{', sizeof(yaml) - 1);
    memcpy(yaml, "limits: ", 8);
    refuses(yaml, 1, "limits");
    for (size_t i = 0; i + 2 < sizeof(yaml); i += 2)
        memcpy(yaml + i, "- ", 2);
    cr_expect_eq(load(yaml), -EINVAL);
}

Test(config, a_billion_laughs_end_at_the_first_alias)
{
    refuses("models_dirs: &a [/x, /y]\nadmin:\n  users: [*a, *a, *a]\n", 3, "found an alias");
}

Test(config, huge_files_values_and_lists_are_refused)
{
    size_t len = CONFIG_FILE_BYTES + 1;
    char *text = malloc(len + 1);
    memset(text, '#', len);
    text[len] = '\0';
    cr_expect_eq(load_bytes(text, len), -EFBIG);
    cr_expect(strstr(fault.text, "at most 1048576 bytes"), "%s", fault.text);
    cr_expect_eq(load_bytes(text, len - 1), 0);

    int n = sprintf(text, "state_dir: /");
    memset(text + n, 'x', 5000);
    text[n + 5000] = '\0';
    refuses(text, 1, "found more than 4096 bytes");
    cr_expect_lt(strlen(fault.text), FAULT_TEXT_BYTES);

    n = sprintf(text, "admin: {users: [u0");
    for (int i = 1; i < 65; i++)
        n += sprintf(text + n, ", u%d", i);
    sprintf(text + n, "]}\n");
    refuses(text, 1, "admin.users: expected at most 64 entries");

    n = sprintf(text, "models:\n");
    for (int i = 0; i < 1025; i++)
        n += sprintf(text + n, "  m%d:\n", i);
    refuses(text, 1026, "models.m1024: expected at most 1024 models");
    free(text);
}

Test(config, errors_show_no_control_characters)
{
    refuses("idle_exit: \"\\e[2J\\a\"\n", 1, "found '?[2J?'");
    refuses("\"\\e[2J\": 1\n", 1, "?[2J: expected a known key");
}

Test(config, unreadable_files_are_told_by_their_errno)
{
    cr_expect_eq(config_load(config, "/nonexistent/hearth.yaml", &fault), -ENOENT);
    cr_expect_str_eq(fault.text,
                     "/nonexistent/hearth.yaml: cannot be read: No such file or directory");
    cr_expect_eq(config_load(config, "/", &fault), -EISDIR);
}

Test(config, every_truncation_of_a_good_file_is_taken_or_refused_in_one_sentence)
{
    static const char yaml[] = "default_model: tiny\nmodels_dirs: [/a, \"/b c\"]\n"
                               "limits: {queue: 5, frame: 2MiB}\nmodels:\n  tiny:\n"
                               "    needs: ['a', b]\n    keep_alive: 5min\n";
    for (size_t len = 0; len < sizeof(yaml); len++) {
        int r = load_bytes(yaml, len);
        cr_expect(r == 0 || (r == -EINVAL && strstr(fault.text, "expected")), "%zu: %d %s", len, r,
                  fault.text);
    }
    for (size_t at = 0; at + 1 < sizeof(yaml); at++) { /* and every byte turned to another */
        char twisted[sizeof(yaml)];
        memcpy(twisted, yaml, sizeof(yaml));
        twisted[at] ^= 0x5a;
        int r = load_bytes(twisted, sizeof(yaml) - 1);
        cr_expect(r == 0 || (r == -EINVAL && strstr(fault.text, "expected")), "%zu: %d %s", at, r,
                  fault.text);
    }
}

Test(config, directories_given_by_flags_go_before_the_files)
{
    cr_assert_eq(config_add_models_dir(config, "/flag1"), 0);
    cr_assert_eq(config_add_models_dir(config, "/flag2"), 0);
    cr_expect_str_eq(config->models_dirs[0], "/flag1");
    cr_expect_str_eq(config->models_dirs[1], "/flag2");
    cr_expect_null(config->models_dirs[2], "the defaults are still there");

    takes("models_dirs: [/file]\n");
    cr_assert_eq(config_add_models_dir(config, "/flag1"), 0);
    cr_assert_eq(config_add_models_dir(config, "/flag2"), 0);
    cr_expect_str_eq(config->models_dirs[0], "/flag1");
    cr_expect_str_eq(config->models_dirs[1], "/flag2");
    cr_expect_str_eq(config->models_dirs[2], "/file");

    cr_assert_eq(config_set_state_dir(config, "/elsewhere"), 0);
    cr_expect_str_eq(config->state_dir, "/elsewhere");
}

Test(config, check_finds_cycles_of_needs)
{
    takes("models: {a: {needs: [b, c]}, b: {needs: [c, ember]}, c: {}}\n");
    cr_expect_eq(config_check(config, &fault), 0, "a diamond is no cycle: %s", fault.text);
    takes("models: {a: {needs: [b]}, b: {needs: [c]}, c: {needs: [b]}}\n");
    cr_expect_eq(config_check(config, &fault), -EINVAL);
    cr_expect(strstr(fault.text, "models.b.needs: expected no cycle, and b needs c needs b;"), "%s",
              fault.text);
    takes("models: {a: {needs: [a]}}\n");
    cr_expect_eq(config_check(config, &fault), -EINVAL);
}

Test(config, check_walks_the_longest_chain_of_needs)
{
    char *text = malloc(CONFIG_FILE_BYTES);
    int n = sprintf(text, "models:\n");
    for (unsigned i = 0; i < CONFIG_MAX_MODELS; i++)
        n += sprintf(text + n, "  m%u: {needs: [m%u]}\n", i, i + 1);
    takes(text);
    cr_expect_eq(config_check(config, &fault), 0);
    free(text);
}

Test(config, check_finds_limits_that_contradict_each_other)
{
    takes("batching: {min_batch: 9, max_batch: 8}\n");
    cr_expect_eq(config_check(config, &fault), -EINVAL);
    cr_expect(strstr(fault.text, "batching.min_batch"), "%s", fault.text);
    takes("limits: {frame: 32MiB}\n");
    cr_expect_eq(config_check(config, &fault), -EINVAL);
    cr_expect(strstr(fault.text, "limits.input_bytes_per_uid"), "%s", fault.text);
}

Test(config, shares_are_taken_of_a_whole_without_overflow)
{
    cr_expect_eq(config_size_of((struct config_size){.percent = 60}, 1000), 600);
    cr_expect_eq(config_size_of((struct config_size){.percent = 33}, 50), 16);
    cr_expect_eq(config_size_of((struct config_size){.percent = 100}, UINT64_MAX), UINT64_MAX);
    cr_expect_eq(config_size_of((struct config_size){.bytes = 5}, 1000), 5);
}

Test(config, memory_is_parted_once)
{
    const uint64_t gib = UINT64_C(1) << 30;
    struct config_memory m;

    takes("memory_budget: 50%\nlimits: {memory_per_uid: 25%}\n"
          "engine: {kv_budget: 25%, kv_per_uid: 10%}\n");
    m = config_memory_of(config, 16 * gib);
    cr_expect(m.machine_bytes == 16 * gib && m.budget_bytes == 8 * gib);
    cr_expect(m.kv_bytes == 2 * gib && m.models_bytes == 6 * gib, "together the budget");
    cr_expect_eq(m.kv_per_uid_bytes, 2 * gib / 10);
    cr_expect_eq(m.models_per_uid_bytes, 2 * gib);
    takes("memory_budget: 1GiB\nengine: {kv_budget: 2GiB}\n");
    m = config_memory_of(config, 16 * gib);
    cr_expect(m.kv_bytes == 2 * gib && m.models_bytes == 0, "nothing is left, and no less");
}

Test(config, machine_memory_is_at_most_the_ram)
{
    uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    cr_expect_gt(config_machine_memory(), 0);
    cr_expect_leq(config_machine_memory(), ram);
}

/* A file of the source tree; the caller frees it. */
static char *source_text(const char *name)
{
    const char *root = getenv("HEARTH_SOURCE_ROOT");
    char full[4096], *text = NULL;
    size_t unused = 0;
    snprintf(full, sizeof(full), "%s/%s", root ? root : ".", name);
    FILE *file = fopen(full, "r");
    cr_assert_not_null(file, "%s", full);
    cr_assert_gt(getdelim(&text, &unused, '\0', file), 0);
    fclose(file);
    return text;
}

Test(config, the_example_is_taken_with_and_without_its_comment_signs)
{
    char *text = source_text("packaging/systemd/hearth.yaml");
    takes(text);
    cr_expect_eq(config->n_models, 0);
    for (char *p = text; *p; p++) /* a sign before a key: with a blank after it, it is prose */
        if (*p == '#' && (p[1] >= 'a' && p[1] <= 'z'))
            memmove(p, p + 1, strlen(p));
    for (char *p = text; (p = strstr(p, "  #  ")); p++) /* keys of a key with such a sign */
        memcpy(p, "     ", 5);
    takes(text);
    cr_expect_not_null(config_find_model(config, "story"), "%s", text);
    free(text);
}

Test(config, the_document_is_the_table)
{
    char *printed = NULL, *kept = source_text("docs/configuration.md");
    size_t len;
    FILE *out = open_memstream(&printed, &len);
    config_print_keys(out);
    fclose(out);
    cr_expect_eq(strcmp(kept, printed), 0,
                 "renew it: build/daemon/hearthd --print-keys >docs/configuration.md");
    free(kept);
    free(printed);
}
