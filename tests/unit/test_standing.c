/* Requests that change residency or stay: what goes onto the wire, and for whom. */
#include <endian.h>
#include <errno.h>

#include "tests/unit/fake_daemon.h"

#define PATIENCE_US 10000000u
#define MAX_KEPT    16

/* The frames of a connection's requests, in their order. */
static struct fake_frame kept[MAX_KEPT];
static atomic_int n_kept;

static void serve_keep(struct fake *fake, int fd)
{
    (void)fake;
    if (!fake_hello(fd))
        return;
    for (int i = 0; i < MAX_KEPT && fake_next(fd, &kept[i]); i++) {
        struct wire_buffer out = {0};
        atomic_store(&n_kept, i + 1);
        fake_put_done(&out, kept[i].header.id, NULL);
        if (!fake_send(fd, &out))
            return;
    }
}

/* 0: the option is not there, else the number of its bytes + 1. */
static size_t find_option(const struct fake_frame *frame, uint16_t tag, const uint8_t **ret_value)
{
    struct wire_reader reader;
    struct wire_option option;
    wire_reader_init(&reader, frame->body, frame->header.body_len);
    while (wire_reader_next(&reader, &option) > 0)
        if (option.tag == tag) {
            if (ret_value)
                *ret_value = option.value;
            return option.len + 1;
        }
    return 0;
}

static void finish_all(struct hearth *h)
{
    while (hearth_in_flight(h) > 0)
        cr_assert_geq(hearth_wait(h, PATIENCE_US), 0, "%s", hearth_message(h));
}

Test(standing, each_request_has_its_type_and_options)
{
    struct fake fake;
    struct hearth *h;
    char text[32];
    struct hearth_set set = HEARTH_SET_INIT;
    fake_start(&fake, serve_keep);
    cr_assert_eq(fake_connect(&fake, &h, NULL), 0);
    set.model = "m";
    cr_assert_eq(hearth_set(h, &set, NULL, NULL, NULL), 0);
    set.has_preload = set.has_pinned = set.pinned = set.has_keep_alive = true;
    set.keep_alive_us = 7;
    cr_assert_eq(hearth_set(h, &set, NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_hold(h, "m", NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_reload(h, NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_subscribe(h, NULL, NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_subscribe(h, "values", NULL, NULL, NULL), 0);
    finish_all(h);
    cr_assert_eq(n_kept, 6);
    cr_assert_eq(kept[0].header.type, WIRE_SET);
    cr_assert(fake_text(&kept[0], TAG_MODEL, text, sizeof(text)) && strcmp(text, "m") == 0);
    cr_assert_eq(find_option(&kept[0], TAG_PRELOAD, NULL), 0, "nothing is said of what is not set");
    cr_assert_eq(find_option(&kept[0], TAG_PINNED, NULL), 0);
    cr_assert_eq(find_option(&kept[0], TAG_KEEP_ALIVE_US, NULL), 0);
    cr_assert_eq(fake_number(&kept[1], TAG_PRELOAD, 9), 0);
    cr_assert_eq(fake_number(&kept[1], TAG_PINNED, 9), 1);
    cr_assert_eq(fake_number(&kept[1], TAG_KEEP_ALIVE_US, 9), 7);
    cr_assert_eq(kept[2].header.type, WIRE_HOLD);
    cr_assert(fake_text(&kept[2], TAG_MODEL, text, sizeof(text)) && strcmp(text, "m") == 0);
    cr_assert_eq(kept[3].header.type, WIRE_RELOAD);
    cr_assert_eq(kept[3].header.body_len, 0);
    cr_assert_eq(kept[4].header.type, WIRE_SUBSCRIBE);
    cr_assert_eq(kept[4].header.body_len, 0);
    cr_assert_eq(kept[5].header.type, WIRE_SUBSCRIBE);
    cr_assert(fake_text(&kept[5], TAG_NAME, text, sizeof(text)) && strcmp(text, "values") == 0);
    hearth_free(h);
    fake_stop(&fake);
}

Test(standing, a_set_without_a_model_or_of_a_wrong_size_is_not_sent)
{
    struct fake fake;
    struct hearth *h;
    struct {
        struct hearth_set set;
        char later[8];
    } longer = {.set = HEARTH_SET_INIT};
    fake_start(&fake, serve_keep);
    cr_assert_eq(fake_connect(&fake, &h, NULL), 0);
    cr_assert_eq(hearth_set(h, &longer.set, NULL, NULL, NULL), -EINVAL);
    longer.set.model = "m";
    longer.set.size = 8;
    cr_assert_eq(hearth_set(h, &longer.set, NULL, NULL, NULL), -EINVAL);
    longer.set.size = sizeof(longer);
    cr_assert_eq(hearth_set(h, &longer.set, NULL, NULL, NULL), 0, "its end says nothing");
    longer.later[3] = 1;
    cr_assert_eq(hearth_set(h, &longer.set, NULL, NULL, NULL), -EINVAL);
    finish_all(h);
    cr_assert_eq(n_kept, 1);
    hearth_free(h);
    fake_stop(&fake);
}

Test(standing, whom_a_request_is_for_goes_with_it_until_that_changes)
{
    struct fake fake;
    struct hearth *h;
    uint32_t gids[HEARTH_MAX_GROUPS + 1] = {100, 27}, words[3];
    const uint8_t *value = NULL;
    fake_start(&fake, serve_keep);
    cr_assert_eq(fake_connect(&fake, &h, NULL), 0);
    cr_assert_eq(hearth_ping(h, NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_act_for(h, 1000, gids, 2), 0);
    gids[0] = 1; /* it was copied */
    cr_assert_eq(hearth_hold(h, "m", NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_act_for(h, 7, gids, HEARTH_MAX_GROUPS + 1), -E2BIG);
    cr_assert_eq(hearth_unload(h, "m", NULL, NULL, NULL), 0);
    cr_assert_eq(hearth_act_for(h, 7, NULL, 0), 0);
    cr_assert_eq(hearth_unload(h, "m", NULL, NULL, NULL), 0);
    hearth_act_for_self(h);
    cr_assert_eq(hearth_unload(h, "m", NULL, NULL, NULL), 0);
    finish_all(h);
    cr_assert_eq(n_kept, 5);
    cr_assert_eq(find_option(&kept[0], TAG_ON_BEHALF_OF, NULL), 0);
    for (int i = 1; i <= 2; i++) {
        cr_assert_eq(find_option(&kept[i], TAG_ON_BEHALF_OF, &value), sizeof(words) + 1);
        memcpy(words, value, sizeof(words));
        cr_assert(le32toh(words[0]) == 1000 && le32toh(words[1]) == 100 && le32toh(words[2]) == 27);
    }
    cr_assert_eq(find_option(&kept[3], TAG_ON_BEHALF_OF, &value), 4 + 1);
    memcpy(words, value, 4);
    cr_assert_eq(le32toh(words[0]), 7);
    cr_assert_eq(find_option(&kept[4], TAG_ON_BEHALF_OF, NULL), 0);
    hearth_free(h);
    fake_stop(&fake);
}

Test(standing, a_pool_gives_no_identity_on)
{
    struct fake fake;
    struct hearth_pool *pool;
    struct hearth *h, *again;
    struct hearth_pool_options options = HEARTH_POOL_OPTIONS_INIT;
    fake_start(&fake, serve_keep);
    options.connection.socket_path = fake.path;
    cr_assert_eq(hearth_pool_new(&options, &pool), 0);
    cr_assert_eq(hearth_pool_acquire(pool, PATIENCE_US, &h), 0);
    cr_assert_eq(hearth_act_for(h, 1000, NULL, 0), 0);
    hearth_pool_release(pool, h);
    cr_assert_eq(hearth_pool_acquire(pool, PATIENCE_US, &again), 0);
    cr_assert_eq(again, h, "the same one");
    cr_assert_eq(hearth_unload(again, "m", NULL, NULL, NULL), 0);
    finish_all(again);
    cr_assert_eq(find_option(&kept[0], TAG_ON_BEHALF_OF, NULL), 0);
    hearth_pool_release(pool, again);
    hearth_pool_free(pool);
    fake_stop(&fake);
}
