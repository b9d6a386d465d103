/* Memory for weights, and how it passes from one model to the next. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/engine/arena.h"
#include "lib/cleanup.h"

#define MIB ((size_t)1 << 20)

static struct arena arena_of(size_t bytes, struct arena_legacy *legacy)
{
    struct arena arena;

    cr_assert_eq(arena_init(&arena, bytes, true, legacy), 0);
    cr_assert_not_null(arena.memory);
    cr_assert_eq((uintptr_t)arena.memory % (2 * MIB), 0);
    cr_assert_eq(arena.bytes, bytes);
    return arena;
}

static struct arena_legacy *left_by(size_t bytes, uint8_t fill, size_t most)
{
    struct arena arena = arena_of(bytes, NULL);
    struct arena_legacy *legacy;

    memset(arena.memory, fill, bytes);
    legacy = arena_leave(&arena, most);
    cr_assert_null(arena.memory);
    return legacy;
}

static bool all(const uint8_t *bytes, size_t n, uint8_t value)
{
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != value)
            return false;
    return true;
}

/* What the process has mapped, or has in memory, in bytes: columns 0 and 1 of the file. */
static size_t process_bytes(int column)
{
    unsigned long pages[2] = {0};
    FILE *file = fopen("/proc/self/statm", "re");

    cr_assert_not_null(file);
    cr_assert_eq(fscanf(file, "%lu %lu", &pages[0], &pages[1]), 2);
    fclose(file);
    return pages[column] * 4096;
}

Test(arena, new_memory_is_zero_and_writable_to_its_end)
{
    static const size_t sizes[] = {1, 64, 4096, 4097, 2 * MIB, 2 * MIB + 1, 5 * MIB + 64};

    for (size_t i = 0; i < ELEMENTSOF(sizes); i++) {
        struct arena arena = arena_of(sizes[i], NULL);

        cr_expect(all(arena.memory, sizes[i], 0));
        memset(arena.memory, 1, sizes[i]);
        arena_settle(&arena);
        arena_done(&arena);
        cr_expect_null(arena.memory);
    }
}

Test(arena, a_size_that_no_memory_has_is_refused_and_the_legacy_given_back)
{
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX / 2, (size_t)1 << 50};

    for (size_t i = 0; i < ELEMENTSOF(sizes); i++) {
        size_t before = process_bytes(1);
        struct arena_legacy *legacy = left_by(32 * MIB, 7, SIZE_MAX);
        struct arena arena;

        cr_expect_eq(arena_init(&arena, sizes[i], true, legacy), -ENOMEM);
        cr_expect_lt(process_bytes(1), before + 16 * MIB);
        cr_expect_null(arena.memory);
        arena_done(&arena);
    }
}

Test(arena, whole_runs_pass_and_the_rest_is_new)
{
    static const struct {
        size_t before, most, after, passed;
    } cases[] = {
        {8 * MIB, SIZE_MAX, 8 * MIB, 8 * MIB},                /* all */
        {8 * MIB, SIZE_MAX, 8 * MIB - 64, 8 * MIB - 64},      /* its last page, too */
        {8 * MIB, SIZE_MAX, 8 * MIB - 4096, 8 * MIB - 4096},  /* what is too much is given back */
        {20 * MIB, SIZE_MAX, 6 * MIB + 4000, 6 * MIB + 4000}, /* the same */
        {9 * MIB, SIZE_MAX, 20 * MIB + 64, 8 * MIB},          /* whole runs of the old one alone */
        {20 * MIB, 7 * MIB, 20 * MIB, 6 * MIB},               /* no more than was kept */
        {2 * MIB - 4096, SIZE_MAX, 2 * MIB, 0},               /* too little to be worth it */
        {4 * MIB, 0, 4 * MIB, 0},                             /* nothing was kept */
    };

    for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
        struct arena_legacy *legacy = left_by(cases[i].before, 7, cases[i].most);
        size_t whole = (cases[i].after + 4095) / 4096 * 4096;
        struct arena arena;

        cr_expect_eq(legacy != NULL, cases[i].passed > 0);
        cr_expect(!legacy || legacy->bytes <= cases[i].most);
        arena = arena_of(cases[i].after, legacy);
        cr_expect_eq(arena.recycled_bytes, cases[i].passed, "case %zu: %zu", i,
                     arena.recycled_bytes);
        cr_expect(all(arena.memory, arena.recycled_bytes, 7), "case %zu: not what was left", i);
        cr_expect(all(arena.memory + arena.recycled_bytes, whole - arena.recycled_bytes, 0),
                  "case %zu: not new, or its last page not cleared", i);
        memset(arena.memory, 9, arena.bytes);
        arena_done(&arena);
    }
}

/* A page of it is gone, so that the kernel does not move it as one. */
Test(arena, a_legacy_that_does_not_move_is_given_back)
{
    struct arena_legacy *legacy = left_by(32 * MIB, 7, SIZE_MAX);
    size_t before = process_bytes(1);
    struct arena arena;

    cr_assert_eq(munmap(legacy->at + 4 * MIB, 4096), 0);
    arena = arena_of(40 * MIB, legacy);
    cr_expect_eq(arena.recycled_bytes, 0);
    cr_expect_lt(process_bytes(1), before - 16 * MIB);
    cr_expect(all(arena.memory, arena.bytes, 0));
    arena_done(&arena);
}

/* Again and again through models of other sizes, new parts in small pages and in huge ones, as they
 * come in a daemon that lives long. */
Test(arena, memory_passes_on_for_many_generations)
{
    struct arena arena = arena_of(2 * MIB, NULL);
    size_t mapped = process_bytes(0);

    memset(arena.memory, 0, arena.bytes);
    for (uint32_t i = 1; i < 200; i++) {
        size_t bytes = (2 + i * 7919 % 37) * MIB + i * 64, old = arena.bytes;
        struct arena_legacy *legacy;

        arena_settle(&arena);
        legacy = arena_leave(&arena, bytes);
        cr_assert_eq(arena_init(&arena, bytes, i % 2 == 0, legacy), 0);
        cr_expect_eq(arena.recycled_bytes, MIN(old, bytes) / (2 * MIB) * (2 * MIB),
                     "generation %u: %zu of %zu for %zu", i, arena.recycled_bytes, old, bytes);
        cr_expect(all(arena.memory, arena.recycled_bytes, (uint8_t)(i - 1)));
        cr_expect(all(arena.memory + arena.recycled_bytes, bytes - arena.recycled_bytes, 0));
        memset(arena.memory, (int)i, arena.bytes);
    }
    arena_done(&arena);
    cr_expect_leq(process_bytes(0), mapped, "addresses are lost");
}
