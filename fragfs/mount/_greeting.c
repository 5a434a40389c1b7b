/* Asks the kernel for passthrough when it greets: libfuse 3.14 knows nothing of it, so the request is
 * written into what pyfuse3 answers.
 *
 * Source: Linux include/uapi/linux/fuse.h, FUSE_INIT, since 6.9; the headers to build with may be
 * older. Documentation/filesystems/fuse-passthrough.rst.
 */
#include "_front.h"

#include <linux/fuse.h>

#define GREETING_BYTES 64 /* of its request, and of its reply */
#define EXTENDED (1u << 30)
#define PASSTHROUGH (1u << 5)
#define STACK_DEPTH 1 /* what is read lies on a file system that lies on no other */

struct greeting {
    uint32_t major, minor, max_readahead, flags, more_flags;
};

struct greeting_reply {
    uint32_t major, minor, max_readahead, flags, background, max_write, time_gran, pages;
    uint32_t more_flags, max_stack_depth;
};

void note_greeting(Front *front, const char *request, size_t size)
{
    const struct fuse_in_header *header = (const struct fuse_in_header *)request;
    const struct greeting *greeting = (const struct greeting *)(header + 1);

    if (front->wants_passthrough && size >= sizeof *header + GREETING_BYTES &&
        greeting->flags & EXTENDED && greeting->more_flags & PASSTHROUGH)
        front->greeting = header->unique; /* seen by who relays the reply: sockets are between */
}

void ask_for_passthrough(Front *front, char *reply, size_t size)
{
    const struct fuse_out_header *header = (const struct fuse_out_header *)reply;
    struct greeting_reply *answer = (struct greeting_reply *)(reply + sizeof *header);

    if (!front->greeting || size < sizeof *header + GREETING_BYTES ||
        header->unique != front->greeting || header->error)
        return;
    answer->flags |= EXTENDED;
    answer->more_flags |= PASSTHROUGH;
    answer->max_stack_depth = STACK_DEPTH;
    front->greeting = 0;
    front->has_passthrough = true;
}
