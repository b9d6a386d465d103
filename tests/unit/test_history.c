/* The history: what the predictor was told survives as bytes, and damaged bytes do not. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <criterion/criterion.h>

#include "daemon/model/history.h"

#define GAP_US 10000000u
#define GB     UINT64_C(1000000000)

static struct history *history;
static uint8_t *bytes;
static size_t n_bytes;

static void add(uint32_t model, uint64_t i)
{
    char name[16];

    snprintf(name, sizeof(name), "m%u", model);
    history_add(history, name, GB, i % 8 > 0, 1 + i * GAP_US);
}

/* A circle of eight models, most of them found ready. */
static void make(uint64_t n_requests)
{
    cr_assert_eq(history_new(&history), 0);
    for (uint64_t i = 0; i < n_requests; i++)
        add((uint32_t)(i % 8), i);
}

static void write_bytes(void)
{
    cr_assert_eq(history_write(history, &bytes, &n_bytes), 0);
    cr_assert_leq(n_bytes, HISTORY_MAX_BYTES);
}

static int read_back(const uint8_t *from, size_t n)
{
    struct history *read = NULL;
    struct fault fault = {0};
    int r = history_read(from, n, &read, &fault);

    cr_assert_eq(r < 0, fault.text[0] != 0);
    history_free(read);
    return r;
}

Test(history, what_is_written_is_read_and_written_the_same)
{
    struct history *read;
    uint8_t *again;
    size_t n_again;

    make(100);
    write_bytes();
    cr_assert_eq(history_read(bytes, n_bytes, &read, NULL), 0);
    cr_assert_eq(history_length(read), 100);
    cr_assert_eq(history_write(read, &again, &n_again), 0);
    cr_assert_eq(n_again, n_bytes);
    cr_assert_arr_eq(again, bytes, n_bytes);
    free(again);
    free(bytes);
    history_free(read);
    history_free(history);
    cr_assert_null(history_free(NULL));
}

Test(history, a_predictor_that_is_told_it_knows_what_the_old_one_knew)
{
    struct predictor *old, *new;
    char name[16];

    cr_assert_eq(predictor_new(&old), 0);
    cr_assert_eq(predictor_new(&new), 0);
    predictor_set_budget(old, 4 * GB);
    predictor_set_budget(new, 4 * GB);
    make(200);
    for (uint64_t i = 0; i < 200; i++) {
        uint32_t model;
        snprintf(name, sizeof(name), "m%u", (unsigned)(i % 8));
        model = (uint32_t)predictor_model(old, name);
        predictor_set_bytes(old, model, GB);
        predictor_request(old, model, i % 8 > 0, 1 + i * GAP_US);
    }
    history_tell(history, new, 200 * (uint64_t)GAP_US + HISTORY_LONGEST_US);
    for (uint32_t m = 0; m < 8; m++) {
        snprintf(name, sizeof(name), "m%u", m);
        cr_assert_float_eq(predictor_wanted(new, (uint32_t)predictor_model(new, name)),
                           predictor_wanted(old, (uint32_t)predictor_model(old, name)), 1e-9);
    }
    cr_assert_eq(predictor_mode(new), predictor_mode(old));
    predictor_free(old);
    predictor_free(new);
    history_free(history);
}

Test(history, keeps_a_bounded_number_of_requests_and_of_models)
{
    make(3 * HISTORY_MAX_REQUESTS);
    cr_assert_eq(history_length(history), HISTORY_MAX_REQUESTS);
    for (uint32_t m = 0; m < 2 * PREDICTOR_MAX_MODELS; m++)
        add(m, 3 * HISTORY_MAX_REQUESTS + m);
    cr_assert_leq(history_length(history), HISTORY_MAX_REQUESTS);
    write_bytes();
    cr_assert_eq(read_back(bytes, n_bytes), 0);
    free(bytes);
    history_free(history);
}

Test(history, no_damage_goes_unnoticed)
{
    make(20);
    write_bytes();
    for (size_t n = 0; n < n_bytes; n++) /* cut */
        cr_assert_eq(read_back(bytes, n), -EBADMSG);
    for (size_t i = 0; i < n_bytes * 8; i++) { /* a bit turned over */
        bytes[i / 8] ^= (uint8_t)(1u << (i % 8));
        cr_assert_eq(read_back(bytes, n_bytes), -EBADMSG);
        bytes[i / 8] ^= (uint8_t)(1u << (i % 8));
    }
    cr_assert_eq(read_back(bytes, n_bytes), 0);
    free(bytes);
    history_free(history);
}

static void seal(uint8_t *at, size_t n)
{
    uint64_t sum = 0xcbf29ce484222325u;

    for (size_t i = 0; i < n - 8; i++)
        sum = (sum ^ at[i]) * 0x100000001b3u;
    for (uint32_t i = 0; i < 8; i++)
        at[n - 8 + i] = (uint8_t)(sum >> (8 * i));
}

/* Each byte takes each value, with a right checksum: refused, or read without harm. */
Test(history, whatever_its_bytes_say_is_checked)
{
    make(3);
    write_bytes();
    for (size_t i = 0; i + 8 < n_bytes; i++) {
        uint8_t was = bytes[i];
        for (uint32_t value = 0; value < 256; value++) {
            struct history *read = NULL;
            bytes[i] = (uint8_t)value;
            seal(bytes, n_bytes);
            if (history_read(bytes, n_bytes, &read, NULL) == 0) {
                struct predictor *p;
                cr_assert_eq(predictor_new(&p), 0);
                history_tell(read, p, HISTORY_LONGEST_US);
                predictor_free(p);
            }
            history_free(read);
        }
        bytes[i] = was;
    }
    free(bytes);
    history_free(history);
}

Test(history, is_saved_in_one_step_and_loaded)
{
    char folder[] = "/tmp/hearth-history-XXXXXX", path[96], inner[80];
    struct history *read;
    struct fault fault = {0};

    cr_assert_not_null(mkdtemp(folder));
    snprintf(inner, sizeof(inner), "%s/state", folder);
    snprintf(path, sizeof(path), "%s/history", inner);
    cr_assert_eq(history_load(path, &read, &fault), -ENOENT);
    make(50);
    write_bytes();
    cr_assert_eq(history_save(path, bytes, n_bytes), 0);
    cr_assert_eq(history_save(path, bytes, n_bytes), 0);
    cr_assert_eq(history_load(path, &read, &fault), 0);
    cr_assert_eq(history_length(read), 50);
    history_free(read);
    cr_assert_eq(history_save(path, bytes, n_bytes - 3), 0); /* as if it were cut */
    cr_assert_eq(history_load(path, &read, &fault), -EBADMSG);
    cr_assert_lt(history_save("/proc/none/history", bytes, n_bytes), 0);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(rmdir(inner), 0); /* nothing temporary was left */
    cr_assert_eq(rmdir(folder), 0);
    free(bytes);
    history_free(history);
}
