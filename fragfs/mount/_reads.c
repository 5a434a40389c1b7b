/* The replies to reads, of the fragments that the front holds. */

#include "_front.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIPE_BYTES (2 << 20)         /* the largest read and its header, where a user may have as much */
#define COPIED_BYTES_MAX (32u << 10) /* up to here a copy costs less than a pipe */
#define PAGE_BYTES 4096u

struct piece {
    struct slot *slot;
    uint64_t start;
    size_t size;
};

/* --- replies */

void close_pipe(struct worker *worker)
{
    if (worker->pipe_in >= 0) {
        close(worker->pipe_in);
        close(worker->pipe_out);
    }
    worker->pipe_in = worker->pipe_out = -1;
    worker->pipe_pages = 0;
}

void open_pipe(struct worker *worker)
{
    int ends[2];

    close_pipe(worker);
    if (pipe2(ends, O_CLOEXEC) < 0)
        return;
    worker->pipe_out = ends[0];
    worker->pipe_in = ends[1];
    if (fcntl(worker->pipe_in, F_SETPIPE_SZ, PIPE_BYTES) < 0)
        (void)fcntl(worker->pipe_in, F_SETPIPE_SZ, PIPE_BYTES / 2);
    int size = fcntl(worker->pipe_in, F_GETPIPE_SZ);
    worker->pipe_pages = size > 0 ? (size_t)size / PAGE_BYTES : 0;
}

static char *space(struct worker *worker, size_t size)
{
    if (size > worker->buffer_size) {
        free(worker->buffer);
        worker->buffer = malloc(size);
        worker->buffer_size = worker->buffer ? size : 0;
    }
    return worker->buffer;
}

static bool read_all(int descriptor, char *into, size_t size, uint64_t start)
{
    while (size) {
        ssize_t got = pread(descriptor, into, size, (off_t)start);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        into += got;
        start += (uint64_t)got;
        size -= (size_t)got;
    }
    return true;
}

/* Whether a failed reply leaves nothing to be said: nobody waits for it, or nobody is there. */
static bool is_over(void)
{
    return errno == ENOENT || errno == ENODEV || errno == ECONNABORTED;
}

static bool reply_copied(Front *front, struct worker *worker, struct fuse_out_header *header,
                         const struct piece *pieces, int count, size_t size)
{
    char *at = space(worker, size);

    if (!at && size)
        return false;
    for (int i = 0; i < count; i++) {
        const struct slot *slot = pieces[i].slot;
        if (slot->copy)
            memcpy(at, slot->copy + pieces[i].start, pieces[i].size);
        else if (!read_all(slot->descriptor, at, pieces[i].size, pieces[i].start))
            return false;
        at += pieces[i].size;
    }
    struct iovec parts[2] = {{header, sizeof *header}, {worker->buffer, size}};
    return writev(front->device, parts, size ? 2 : 1) >= 0 || is_over();
}

/* The pages of the cache's files go out as they are. False if they do not: nothing is sent then. */
static bool reply_spliced(Front *front, struct worker *worker, struct fuse_out_header *header,
                          const struct piece *pieces, int count)
{
    if (write(worker->pipe_in, header, sizeof *header) != (ssize_t)sizeof *header)
        goto failed;
    for (int i = 0; i < count; i++) {
        const struct slot *slot = pieces[i].slot;
        size_t rest = pieces[i].size;
        off_t start = (off_t)pieces[i].start;
        if (slot->copy) {
            if (write(worker->pipe_in, slot->copy + start, rest) != (ssize_t)rest)
                goto failed;
            continue;
        }
        while (rest) {
            ssize_t moved = splice(slot->descriptor, &start, worker->pipe_in, NULL, rest, 0);
            if (moved < 0 && errno == EINTR)
                continue;
            if (moved <= 0)
                goto failed;
            rest -= (size_t)moved;
        }
    }
    if (splice(worker->pipe_out, NULL, front->device, NULL, header->len, 0) >= 0)
        return true;
    bool over = is_over();
    open_pipe(worker); /* what may be left in it would become part of the next reply */
    return over;
failed:
    open_pipe(worker);
    return false;
}

/* Mapped for this one reply: where a pipe is too small, still half the time of a copy. Of a file that
 * lost bytes, which those of the cache never do, the kernel makes an error of its own. */
static bool reply_mapped(Front *front, struct fuse_out_header *header, const struct piece *pieces,
                         int count)
{
    struct iovec parts[PIECES_MAX + 1] = {{header, sizeof *header}};
    bool answered = true;
    int made = 0;

    for (; made < count; made++) {
        const struct piece *piece = &pieces[made];
        struct iovec *part = &parts[made + 1];
        size_t skipped = piece->start % PAGE_BYTES;
        part->iov_len = piece->size;
        if (piece->slot->copy) {
            part->iov_base = piece->slot->copy + piece->start;
            continue;
        }
        char *mapped = mmap(NULL, skipped + piece->size, PROT_READ, MAP_SHARED | MAP_POPULATE,
                            piece->slot->descriptor, (off_t)(piece->start - skipped));
        if (mapped == MAP_FAILED) {
            answered = false;
            break;
        }
        part->iov_base = mapped + skipped;
    }
    if (answered)
        answered = writev(front->device, parts, count + 1) >= 0 || is_over();
    for (int i = 0; i < made; i++) {
        size_t skipped = pieces[i].start % PAGE_BYTES;
        if (!pieces[i].slot->copy)
            munmap((char *)parts[i + 1].iov_base - skipped, skipped + pieces[i].size);
    }
    return answered;
}

static size_t pages_of(const struct piece *pieces, int count)
{
    size_t pages = 1; /* of the header */

    for (int i = 0; i < count; i++)
        pages += (pieces[i].start % PAGE_BYTES + pieces[i].size + PAGE_BYTES - 1) / PAGE_BYTES;
    return pages;
}

/* --- reads
 *
 * Cuts one into pieces of what is held, and pins them; -1 if some of it is not. */
static int pin_pieces(Front *front, struct file *file, uint64_t offset, size_t size,
                      struct piece *pieces)
{
    size_t low = 0, high = file->extents;
    int count = 0;

    while (low < high) { /* the extent that holds the first byte */
        size_t middle = low + (high - low) / 2;
        if (file->ends[middle] <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    size_t last = low + PIECES_MAX - 1; /* nothing is opened in vain */
    if (size && last < file->extents && file->ends[last] < offset + size)
        return -1;
    for (size_t i = low; size; i++) {
        if (i >= file->extents)
            goto missed;
        uint64_t skipped = offset - (file->ends[i] - file->sizes[i]);
        size_t taken = file->sizes[i] - (size_t)skipped;
        if (taken > size)
            taken = size;
        struct slot *slot = get_slot(front, file->fragments[i]);
        uint64_t start = file->offsets[i] + skipped;
        if (!slot || start + taken > slot->size)
            goto missed;
        slot->pins++;
        slot->used = ++front->clock;
        pieces[count++] = (struct piece){slot, start, taken};
        offset += taken;
        size -= taken;
    }
    return count;
missed:
    while (count)
        pieces[--count].slot->pins--;
    return -1;
}

bool answer_read(Front *front, struct worker *worker, uint64_t unique, uint64_t number,
                 uint64_t offset, size_t size)
{
    struct piece pieces[PIECES_MAX];

    pthread_mutex_lock(&front->lock);
    struct file *file = *find_file(front, number);
    if (!file) {
        pthread_mutex_unlock(&front->lock);
        return false;
    }
    if (offset >= file->size)
        size = 0;
    else if (size > file->size - offset)
        size = (size_t)(file->size - offset);
    int count = pin_pieces(front, file, offset, size, pieces);
    pthread_mutex_unlock(&front->lock);
    if (count < 0)
        return false;

    struct fuse_out_header header = {(uint32_t)(sizeof header + size), 0, unique};
    bool answered = false;
    if (size > COPIED_BYTES_MAX) {
        if (pages_of(pieces, count) <= worker->pipe_pages)
            answered = reply_spliced(front, worker, &header, pieces, count);
        else
            answered = reply_mapped(front, &header, pieces, count);
    }
    if (!answered)
        answered = reply_copied(front, worker, &header, pieces, count, size);

    pthread_mutex_lock(&front->lock);
    for (int i = 0; i < count; i++)
        pieces[i].slot->pins--;
    front->reads += answered;
    front->bytes_returned += answered ? size : 0;
    pthread_mutex_unlock(&front->lock);
    return answered;
}
