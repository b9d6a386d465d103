/* Directories: a listing is taken when it is opened. */
#include "fs/view_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "lib/cleanup.h"

struct listing {
    struct handle *handle;
    size_t capacity;
};

static int list_add(struct listing *listing, uint64_t ino, mode_t mode, const char *name)
{
    struct handle *handle = listing->handle;
    struct entry *entry;

    if (handle->n_entries == listing->capacity) {
        size_t capacity = MAX(16u, listing->capacity * 2);
        struct entry *entries;
        int r = handle_keep(handle, capacity * sizeof(*entries));
        if (r < 0)
            return r;
        entries = realloc(handle->entries, capacity * sizeof(*entries));
        if (!entries)
            return -ENOMEM;
        handle->entries = entries;
        listing->capacity = capacity;
    }
    entry = &handle->entries[handle->n_entries++];
    entry->ino = ino;
    entry->mode = mode;
    strcpy(entry->name, name);
    return 0;
}

static int list_node(void *userdata, const struct tree_node *node)
{
    return list_add(userdata, node->ino, node->mode, node->name);
}

static int fill_listing(const struct view *view, struct handle *handle,
                        const struct tree_node *node)
{
    struct listing listing = {.handle = handle};
    int r = list_add(&listing, node->ino, S_IFDIR, ".");

    if (r == 0)
        r = list_add(&listing, node->parent, S_IFDIR, "..");
    if (r == 0)
        r = tree_each(view->tree, node->ino, list_node, &listing);
    return r;
}

void answer_opendir(struct view *view, fuse_req_t req, uint64_t ino,
                    const struct fuse_file_info *asked)
{
    struct tree_node node;
    struct handle *handle = NULL;
    int r = tree_get(view->tree, ino, &node);

    if (r == 0 && !S_ISDIR(node.mode))
        r = -ENOTDIR;
    if (r == 0)
        r = handle_new(view, req, &node, &handle);
    if (r == 0)
        r = fill_listing(view, handle, &node);
    if (r < 0) {
        if (handle)
            handle_free(handle);
        fuse_reply_err(req, -r);
        return;
    }
    handle_give(handle, req, asked);
}

void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
    struct view *view = view_of(req);
    uint64_t now_us = view_now_us(), since_us = view_look(view, now_us);
    struct wish *wish;

    if (!tree_follows(ino) || view_answers(view, since_us, now_us)) {
        answer_opendir(view, req, ino, file);
        return;
    }
    wish = wish_park(view, req, WISH_OPENDIR, false, since_us);
    if (!wish)
        return;
    wish->ino = ino;
    wish->file = *file;
}

/* An entry's bytes in the buffer, or 0 where it does not fit. */
static size_t put_entry(fuse_req_t req, const struct handle *handle, size_t index, bool plus,
                        char *buffer, size_t size)
{
    const struct view *view = view_of(req);
    const struct entry *entry = &handle->entries[index];
    off_t next = (off_t)index + 1;
    size_t n;

    if (plus) {
        struct fuse_entry_param param;
        view_fill_entry(view, handle->ino, entry->ino, entry->mode, &param);
        if (index < 2)
            param.ino = 0; /* . and .. are no lookups */
        n = fuse_add_direntry_plus(req, buffer, size, entry->name, &param, next);
    } else {
        struct stat attr;
        view_fill_attr(view, entry->ino, entry->mode, &attr);
        n = fuse_add_direntry(req, buffer, size, entry->name, &attr, next);
    }
    return n <= size ? n : 0;
}

static void list(fuse_req_t req, size_t size, off_t offset, const struct fuse_file_info *file,
                 bool plus)
{
    const struct handle *handle = handle_of(file);
    _cleanup_free_ char *buffer = malloc(size);
    size_t used = 0;

    if (!buffer) {
        fuse_reply_err(req, ENOMEM);
        return;
    }
    for (size_t i = offset < 0 ? 0 : (size_t)offset; i < handle->n_entries; i++) {
        size_t n = put_entry(req, handle, i, plus, buffer + used, size - used);
        if (n == 0)
            break;
        used += n;
    }
    fuse_reply_buf(req, buffer, used);
}

void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                struct fuse_file_info *file)
{
    (void)ino;
    list(req, size, offset, file, false);
}

void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                    struct fuse_file_info *file)
{
    (void)ino;
    list(req, size, offset, file, true);
}
