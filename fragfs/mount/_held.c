/* The fragments that the front holds, and the files of the cache that it may open by itself. The lock
 * is held by who calls. */

#include "_front.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CHECK_ONE_IN 16
#define NAME_BYTES 16 /* of an id; cache/shared.py, file_name() */

/* What follows the fragment's bytes; cache/shared.py, FOOTER. */
struct footer {
    char magic[8];
    uint64_t size, checksum;
    uint8_t id[ID_BYTES];
};

void empty_slot(Front *front, struct slot *slot)
{
    front->bytes_held -= slot->size;
    if (slot->descriptor >= 0)
        close(slot->descriptor);
    free(slot->copy);
    memset(slot, 0, sizeof *slot);
    slot->descriptor = -1;
}

struct slot *find_slot(Front *front, int64_t fragment)
{
    for (int i = 0; i < SLOTS; i++)
        if (front->slots[i].fragment == fragment)
            return &front->slots[i];
    return NULL;
}

/* The one that was not used for longest; NULL if all are in use now. */
static struct slot *oldest_slot(Front *front)
{
    struct slot *oldest = NULL;

    for (int i = 0; i < SLOTS; i++) {
        struct slot *slot = &front->slots[i];
        if (slot->fragment && !slot->pins && (!oldest || slot->used < oldest->used))
            oldest = slot;
    }
    return oldest;
}

struct file **find_file(Front *front, uint64_t number)
{
    struct file **at = &front->files[number % BUCKETS];

    while (*at && (*at)->number != number)
        at = &(*at)->next;
    return at;
}

/* Whether a read goes on where one of the last ones ended, and that it ended where it does. */
bool follow(Front *front, uint64_t number, uint64_t offset, size_t size)
{
    struct file *file = *find_file(front, number);

    if (!file)
        return false;
    for (int i = 0; i < STREAMS; i++)
        if (file->stops[i] == offset) {
            file->stops[i] = offset + size;
            return true;
        }
    file->stops[file->next_stop++ % STREAMS] = offset + size;
    return false;
}

void free_file(struct file *file)
{
    free(file->ends);
    free(file->fragments);
    free(file->sizes);
    free(file->offsets);
    free(file);
}

/* Puts bytes into a slot, and others out of theirs if there is no room; false if there is none, and
 * then they stay the caller's. */
bool fill_slot(Front *front, int64_t fragment, int descriptor, char *copy, size_t size)
{
    struct slot *slot = NULL;

    if (fragment <= 0 || size > front->bytes_max || find_slot(front, fragment))
        return false;
    while (front->bytes_held + size > front->bytes_max || !(slot = find_slot(front, 0))) {
        struct slot *oldest = oldest_slot(front);
        if (!oldest)
            return false;
        empty_slot(front, oldest);
    }
    *slot = (struct slot){fragment, ++front->clock, 0, descriptor, copy, size};
    front->bytes_held += size;
    return true;
}

/* --- files of the cache */

/* Where a fragment's name is, or would be; front->names is there. */
struct name *name_at(Front *front, int64_t fragment)
{
    return &front->names[(uint64_t)fragment % NAMES];
}

/* Whether all of the cache is to be checked by who can hash: cache/shared.py, is_suspect(). */
static bool is_suspect(const Front *front)
{
    char told = 0;

    return pread(front->claims, &told, 1, 0) < 0 || told == 'D';
}

static bool is_right(const Front *front, const struct name *name, int descriptor)
{
    struct footer footer;
    struct stat status;

    if (fstat(descriptor, &status) < 0 || (uint64_t)status.st_size != name->size + sizeof footer)
        return false;
    int64_t changed_ns = status.st_ctim.tv_sec * INT64_C(1000000000) + status.st_ctim.tv_nsec;
    return changed_ns >= front->since_ns &&
           pread(descriptor, &footer, sizeof footer, (off_t)name->size) == sizeof footer &&
           !memcmp(footer.magic, "fragfsC1", sizeof footer.magic) && footer.size == name->size &&
           !memcmp(footer.id, name->id, ID_BYTES) && !is_suspect(front);
}

/* Its place in the order of leaving: cache/shared.py, touch(). */
static void touch(int descriptor, int64_t credit_ns)
{
    struct timespec times[2];

    clock_gettime(CLOCK_REALTIME, &times[0]);
    int64_t at_ns = times[0].tv_sec * INT64_C(1000000000) + times[0].tv_nsec + credit_ns;
    times[0] = times[1] = (struct timespec){at_ns / 1000000000, at_ns % 1000000000};
    (void)futimens(descriptor, times);
}

/* False if it is not there, or not to be trusted; one in so many that are is left to who can hash. */
static bool open_named(Front *front, struct name *name)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/", front->directory);

    if (length < 0 || (size_t)length + 2 * NAME_BYTES >= sizeof path)
        return false;
    for (int i = 0; i < NAME_BYTES; i++)
        length += sprintf(path + length, "%02x", name->id[i]);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (descriptor < 0)
        return false;
    bool taken = is_right(front, name, descriptor);
    if (taken && ++front->opened % CHECK_ONE_IN == 0) {
        name->is_due = true;
        taken = false;
    }
    taken = taken && fill_slot(front, name->fragment, descriptor, NULL, (size_t)name->size);
    if (taken)
        touch(descriptor, name->credit_ns);
    else
        close(descriptor);
    return taken;
}

/* What is held of a fragment, or can be opened now; NULL if neither. */
struct slot *get_slot(Front *front, int64_t fragment)
{
    struct slot *slot = find_slot(front, fragment);

    if (slot || !front->names)
        return slot;
    struct name *name = name_at(front, fragment);
    if (name->fragment != fragment || name->is_due || !open_named(front, name))
        return NULL;
    return find_slot(front, fragment);
}
