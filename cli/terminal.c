#include "cli/terminal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define ENTER      "\033[?1049h\033[?25l"
#define LEAVE      "\033[?25h\033[?1049l"
#define HOME       "\033[H"
#define CLEAR_REST "\033[K\033[J"

static int write_all(const char *text, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = write(STDOUT_FILENO, text + at, len - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        at += (size_t)n;
    }
    return 0;
}

void terminal_enter(struct terminal *terminal)
{
    struct termios raw;
    terminal->key_fd = -1;
    if (tcgetattr(STDIN_FILENO, &terminal->before) == 0) {
        raw = terminal->before;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        raw.c_cc[VMIN] = 1;
        raw.c_cc[VTIME] = 0;
        if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0)
            terminal->key_fd = STDIN_FILENO;
    }
    fflush(stdout);
    write_all(ENTER, strlen(ENTER));
    terminal->entered = true;
}

void terminal_leave(struct terminal *terminal)
{
    if (!terminal->entered)
        return;
    write_all(LEAVE, strlen(LEAVE));
    if (terminal->key_fd >= 0)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &terminal->before);
    terminal->entered = false;
}

void terminal_size(size_t *ret_columns, size_t *ret_rows)
{
    struct winsize size = {0};
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) < 0 || size.ws_col == 0 || size.ws_row == 0)
        size = (struct winsize){.ws_col = 80, .ws_row = 24};
    *ret_columns = size.ws_col;
    *ret_rows = size.ws_row;
}

FILE *terminal_begin(char **ret_text, size_t *ret_len)
{
    FILE *picture = open_memstream(ret_text, ret_len);
    if (picture)
        fputs(HOME, picture);
    return picture;
}

int terminal_show(FILE *picture, char **text, size_t *len)
{
    fputs(CLEAR_REST, picture);
    int r = fclose(picture) == 0 ? write_all(*text, *len) : -ENOMEM;
    free(*text);
    *text = NULL;
    return r;
}
