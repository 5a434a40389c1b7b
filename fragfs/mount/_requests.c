/* Takes the kernel's requests, and answers the reads of what is decoded: a request then costs what
 * it costs a server in C, and never waits for the interpreter.
 *
 * What it does not hold itself, and everything that is no read, it passes on: reads, opens and closes
 * as records into a pipe, for the event loop (front.py); other requests as messages to pyfuse3, which
 * takes the socket for the device. Which fragments it may open, and which were checked, it is told by
 * `name` and `give`.
 *
 * Source: Linux include/uapi/linux/fuse.h; fs/fuse/dev.c. A reply to a request that nobody waits
 * for any more fails with ENOENT, which is no error.
 */
#include "_front.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LISTING_BYTES_MAX (64u << 10) /* a reply must fit a socket's buffer */
#define FORGETS_MAX 512u
#define NOTES_BYTES_MAX (8u << 20)
#define NOTES_MS_MAX 8 /* how long a note is kept back for more of them */

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Tells the event loop what was noted; false if it has ended. */
static bool tell_noted(Front *front)
{
    size_t size = (size_t)front->noted * sizeof front->notes[0];

    front->noted = 0;
    front->noted_bytes = 0;
    front->told_ns = now_ns();
    for (;;) {
        ssize_t written = write(front->records, front->notes, size); /* in one piece: < PIPE_BUF */
        if (written >= 0)
            return true;
        if (errno != EINTR)
            return false;
    }
}

/* Keeps a note of a read back, or adds it to that of the one it goes on from. */
static void note(Front *front, struct record record)
{
    front->noted_bytes += record.size;
    for (int i = 0; i < front->noted; i++) {
        struct record *one = &front->notes[i];
        if (one->kind == record.kind && one->number == record.number &&
            one->offset + one->size == record.offset) {
            one->size += record.size;
            return;
        }
    }
    front->notes[front->noted++] = record;
}

/* Tells the event loop of a request, and of all that was noted before it. */
static bool tell_at_once(Front *front, struct record record)
{
    front->notes[front->noted++] = record;
    return tell_noted(front);
}

/* Tells the event loop of a read; of reads that were answered and go on from others, a few at a
 * time. False if it has ended. */
static bool tell(Front *front, struct record record)
{
    pthread_mutex_lock(&front->lock);
    bool goes_on = follow(front, record.number, record.offset, record.size);
    pthread_mutex_unlock(&front->lock);
    if (record.kind != SERVED)
        return tell_at_once(front, record);
    note(front, record);
    if (goes_on && front->noted < NOTES_MAX &&
        front->noted_bytes < NOTES_BYTES_MAX &&
        now_ns() - front->told_ns < NOTES_MS_MAX * (int64_t)1000000)
        return true;
    return tell_noted(front);
}

/* --- requests */

static void refuse(Front *front, uint64_t unique, int error)
{
    struct fuse_out_header header = {sizeof header, -error, unique};

    while (write(front->device, &header, sizeof header) < 0 && errno == EINTR)
        ;
}

/* False when pyfuse3 has ended. */
static bool send_on(Front *front, const struct iovec *parts, int count)
{
    const struct fuse_in_header *header = parts[0].iov_base;
    struct msghdr message = {.msg_iov = (struct iovec *)parts, .msg_iovlen = (size_t)count};

    for (;;) {
        if (sendmsg(front->requests, &message, MSG_NOSIGNAL) >= 0)
            return true;
        if (errno == EINTR)
            continue;
        if (errno != EMSGSIZE)
            return false;
        if (header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET)
            refuse(front, header->unique, E2BIG);
        return true;
    }
}

/* What the kernel forgets when it drops its caches is more than a socket takes at once. */
static bool pass_on_forgets(Front *front, struct fuse_in_header *header, size_t size)
{
    struct fuse_batch_forget_in *batch = (struct fuse_batch_forget_in *)(header + 1);
    struct fuse_forget_one *forgets = (struct fuse_forget_one *)(batch + 1);
    size_t there = (size - sizeof *header - sizeof *batch) / sizeof *forgets;
    size_t count = batch->count < there ? batch->count : there;

    while (count) {
        size_t taken = count < FORGETS_MAX ? count : FORGETS_MAX;
        struct iovec parts[3] = {{header, sizeof *header},
                                 {batch, sizeof *batch},
                                 {forgets, taken * sizeof *forgets}};
        batch->count = (uint32_t)taken;
        header->len = (uint32_t)(sizeof *header + sizeof *batch + parts[2].iov_len);
        if (!send_on(front, parts, 3))
            return false;
        forgets += taken;
        count -= taken;
    }
    return true;
}

static bool pass_on(Front *front, char *request, size_t size)
{
    struct fuse_in_header *header = (struct fuse_in_header *)request;

    if (header->opcode == FUSE_INIT)
        note_greeting(front, request, size);
    if (header->opcode == FUSE_BATCH_FORGET &&
        size >= sizeof *header + sizeof(struct fuse_batch_forget_in))
        return pass_on_forgets(front, header, size);
    if ((header->opcode == FUSE_READDIR || header->opcode == FUSE_READDIRPLUS) &&
        size >= sizeof *header + sizeof(struct fuse_read_in)) {
        struct fuse_read_in *listing = (struct fuse_read_in *)(header + 1);
        if (listing->size > LISTING_BYTES_MAX)
            listing->size = LISTING_BYTES_MAX;
    }
    return send_on(front, &(struct iovec){request, size}, 1);
}

/* False when pyfuse3 or the event loop has ended. */
static bool take(Front *front, char *request, size_t size)
{
    struct fuse_in_header *header = (struct fuse_in_header *)request;

    if (size < sizeof *header || header->opcode == FUSE_INTERRUPT)
        return true; /* nothing that takes time can be interrupted */
    if (header->opcode == FUSE_OPEN && size >= sizeof *header + sizeof(struct fuse_open_in)) {
        const struct fuse_open_in *open = (struct fuse_open_in *)(header + 1);
        return tell_at_once(
            front, (struct record){header->unique, header->nodeid, open->flags, 0, OPENS});
    }
    if (header->opcode == FUSE_RELEASE && size >= sizeof *header + sizeof(struct fuse_release_in)) {
        const struct fuse_release_in *release = (struct fuse_release_in *)(header + 1);
        return tell_at_once(front, (struct record){header->unique, release->fh, 0, 0, CLOSES});
    }
    if (header->opcode != FUSE_READ)
        return pass_on(front, request, size);
    if (size < sizeof *header + sizeof(struct fuse_read_in)) {
        refuse(front, header->unique, EIO);
        return true;
    }
    const struct fuse_read_in *read = (struct fuse_read_in *)(header + 1);
    struct record record = {header->unique, read->fh, read->offset, read->size, SERVED};
    if (!answer_read(front, &front->serving, record.unique, record.number, record.offset,
                     record.size))
        record.kind = MISSED;
    return tell(front, record);
}

int serve(Front *front)
{
    struct pollfd events[2] = {{front->device, POLLIN, 0}, {front->stop, POLLIN, 0}};
    int error = 0;

    open_pipe(&front->serving);
    for (;;) {
        ssize_t size = read(front->device, front->request, REQUEST_BYTES_MAX);
        if (size == 0) { /* a device never says so */
            error = ENODEV;
            break;
        }
        if (size > 0) {
            if (take(front, front->request, (size_t)size))
                continue;
            error = EPIPE;
            break;
        }
        if (errno == EAGAIN) {
            int ready = poll(events, 2, front->noted ? NOTES_MS_MAX : -1);
            if (ready < 0 && errno != EINTR) {
                error = errno;
                break;
            }
            if (ready == 0 && !tell_noted(front)) {
                error = EPIPE;
                break;
            }
            if (ready > 0 && events[1].revents)
                break;
        } else if (errno != EINTR && errno != ENOENT) { /* ENOENT: it was interrupted */
            error = errno;
            break;
        }
    }
    tell_at_once(front, (struct record){0, 0, 0, (uint32_t)error, ENDED});
    return error;
}

void relay(Front *front)
{
    for (;;) {
        ssize_t size = recv(front->requests, front->reply, REQUEST_BYTES_MAX, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size <= 0)
            return;
        ask_for_passthrough(front, front->reply, (size_t)size);
        while (write(front->device, front->reply, (size_t)size) < 0 && errno == EINTR)
            ;
    }
}
