/* One file, read-only, from memory: the least a FUSE server in C can do for a read.
 *
 * Usage: c_server FILE MOUNTPOINT. Shows FILE as MOUNTPOINT/file, in the foreground, until it is
 * unmounted. One thread, the low-level interface, replies straight from the mapped file, pages kept
 * over opens: what fragfs is measured against. The extended attribute "user.fragfs.status" of the
 * mount's root is JSON with the requests answered, under the names that fragfs uses.
 */
#define FUSE_USE_VERSION 312

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_INODE 2
#define FILE_NAME "file"
#define STATUS_NAME "user.fragfs.status"

/* Nothing changes while it is mounted: the kernel need never ask twice. */
static const double forever_s = 1e6;

static const char *content;
static size_t content_size;
static unsigned long long reads, bytes_returned;

static int fill_attributes(fuse_ino_t inode, struct stat *found)
{
    memset(found, 0, sizeof *found);
    found->st_ino = inode;
    found->st_uid = getuid();
    found->st_gid = getgid();
    if (inode == FUSE_ROOT_ID) {
        found->st_mode = S_IFDIR | 0555;
        found->st_nlink = 2;
    } else if (inode == FILE_INODE) {
        found->st_mode = S_IFREG | 0444;
        found->st_nlink = 1;
        found->st_size = (off_t)content_size;
    } else {
        return ENOENT;
    }
    return 0;
}

static void answer_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry;

    if (parent != FUSE_ROOT_ID || strcmp(name, FILE_NAME) != 0) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    memset(&entry, 0, sizeof entry);
    entry.ino = FILE_INODE;
    entry.attr_timeout = entry.entry_timeout = forever_s;
    fill_attributes(FILE_INODE, &entry.attr);
    fuse_reply_entry(request, &entry);
}

static void answer_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *unused)
{
    struct stat found;
    int error = fill_attributes(inode, &found);

    (void)unused;
    if (error)
        fuse_reply_err(request, error);
    else
        fuse_reply_attr(request, &found, forever_s);
}

static void answer_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *opened)
{
    if (inode != FILE_INODE || (opened->flags & O_ACCMODE) != O_RDONLY) {
        fuse_reply_err(request, inode == FILE_INODE ? EACCES : EISDIR);
        return;
    }
    opened->keep_cache = 1;
    fuse_reply_open(request, opened);
}

static void answer_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
                        struct fuse_file_info *unused)
{
    size_t start = (size_t)offset < content_size ? (size_t)offset : content_size;

    (void)inode;
    (void)unused;
    if (size > content_size - start)
        size = content_size - start;
    reads++;
    bytes_returned += size;
    fuse_reply_buf(request, content + start, size);
}

static void answer_getxattr(fuse_req_t request, fuse_ino_t inode, const char *name, size_t size)
{
    char text[160];
    size_t length;

    if (inode != FUSE_ROOT_ID || strcmp(name, STATUS_NAME) != 0) {
        fuse_reply_err(request, ENODATA);
        return;
    }
    length = (size_t)snprintf(text, sizeof text,
                              "{\"pid\": %ld, \"reads\": %llu, \"bytes_returned\": %llu}",
                              (long)getpid(), reads, bytes_returned);
    if (size == 0)
        fuse_reply_xattr(request, length);
    else if (size < length)
        fuse_reply_err(request, ERANGE);
    else
        fuse_reply_buf(request, text, length);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = answer_lookup,
    .getattr = answer_getattr,
    .open = answer_open,
    .read = answer_read,
    .getxattr = answer_getxattr,
};

static int map_content(const char *path)
{
    struct stat found;
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);

    if (descriptor < 0 || fstat(descriptor, &found) != 0)
        return -1;
    content_size = (size_t)found.st_size;
    content = mmap(NULL, content_size, PROT_READ, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    close(descriptor);
    return content == MAP_FAILED ? -1 : 0;
}

int main(int count, char **words)
{
    char *options[] = {words[0], "-o", "fsname=fragfs-bench,subtype=c_server,ro"};
    struct fuse_args arguments = FUSE_ARGS_INIT(3, options);
    struct fuse_session *session;
    int status = 1;

    if (count != 3 || map_content(words[1]) != 0) {
        fprintf(stderr, "usage: %s FILE MOUNTPOINT\n", words[0]);
        return 2;
    }
    session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (session == NULL)
        return 1;
    if (fuse_set_signal_handlers(session) == 0) {
        if (fuse_session_mount(session, words[2]) == 0) {
            status = fuse_session_loop(session) == 0 ? 0 : 1;
            fuse_session_unmount(session);
        }
        fuse_remove_signal_handlers(session);
    }
    fuse_session_destroy(session);
    fuse_opt_free_args(&arguments);
    return status;
}
