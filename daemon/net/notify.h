/* Notes to the service manager while the daemon serves.
 *
 * sd_notify() waits where the manager's queue is full, and with it would wait every client; here
 * the note is dropped then. What may be sent so is what the next note makes good: a status line, a
 * feed of the watchdog (two are sent in its time). Hides the socket. Thread: any. */
#ifndef HEARTH_NET_NOTIFY_H
#define HEARTH_NET_NOTIFY_H

/* 0: sent, or nobody asked for notes ($NOTIFY_SOCKET); -EAGAIN: dropped; another negative errno. */
int notify_send(const char *text);

#endif
