/* What the files of the front share: _held.c holds fragments, _reads.c answers reads with them,
 * _greeting.c has the kernel agree to passthrough, _requests.c takes requests, and _front.c is what
 * Python sees of it. */
#ifndef FRAGFS_FRONT_H
#define FRAGFS_FRONT_H

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define REQUEST_BYTES_MAX ((1 << 20) + (64 << 10)) /* the kernel reserves room for the largest write */
#define SLOTS 256
#define BUCKETS 1024
#define NOTES_MAX 16
#define NAMES 4096
#define ID_BYTES 32
#define STREAMS 8
#define PIECES_MAX 64 /* of a read that is answered; longer ones are missed */

/* What the event loop is told; front.py unpacks it. */
enum { SERVED = 0, MISSED = 1, ENDED = 2, OPENS = 3, CLOSES = 4 };

struct record {
    uint64_t unique, number, offset; /* offset: of OPENS the flags */
    uint32_t size, kind;
};

/* A fragment whose file may be opened without asking; NAMES of them, by the remainder of their
 * numbers. */
struct name {
    int64_t fragment; /* 0: none */
    uint64_t size;
    int64_t credit_ns; /* how much later than now it is used last, in the order of leaving */
    bool is_due;       /* it is to be checked, and named again, before it may be opened again */
    uint8_t id[ID_BYTES];
};

/* Bytes of a fragment: an open file of the cache, or a copy. */
struct slot {
    int64_t fragment; /* 0: empty */
    uint64_t used;
    unsigned pins;
    int descriptor;
    char *copy;
    size_t size;
};

struct file {
    struct file *next;
    uint64_t number, size;
    size_t extents;
    uint64_t *ends;      /* of each extent, in the file */
    int64_t *fragments;
    uint32_t *sizes, *offsets;
    uint64_t stops[STREAMS]; /* where the last reads ended that did not go on from another one */
    unsigned next_stop;
};

/* What one thread needs to answer. */
struct worker {
    int pipe_out, pipe_in;
    size_t pipe_pages;
    char *buffer;
    size_t buffer_size;
};

typedef struct {
    PyObject_HEAD
    int device, requests, records, stop;
    pthread_mutex_t lock; /* of all that follows */
    struct slot slots[SLOTS];
    struct file *files[BUCKETS];
    struct name *names; /* NULL: nothing is opened */
    char *directory;
    int claims;
    int64_t since_ns;
    size_t bytes_held, bytes_max;
    uint64_t clock, reads, bytes_returned, opened;
    char *request, *reply;   /* what passes through `serve` and `relay` */
    bool wants_passthrough, has_passthrough;
    uint64_t greeting; /* the request whose reply is to ask for it; 0: none. Needs no lock. */
    struct worker serving;   /* of the thread in `serve` */
    struct worker answering; /* of who calls `answer`, one at a time */
    struct record notes[NOTES_MAX + 1];
    int noted;
    size_t noted_bytes;
    int64_t told_ns;
} Front;

/* Takes requests until there are none any more; gives the errno that ended it, 0 if it was told to
 * end. */
int serve(Front *front);

/* Sends what pyfuse3 answers on to the kernel, one message a reply, until the socket is shut down. */
void relay(Front *front);

/* Answers a read from what is held; false if some of it is not, or cannot be read. */
bool answer_read(Front *front, struct worker *worker, uint64_t unique, uint64_t number,
                 uint64_t offset, size_t size);

void open_pipe(struct worker *worker);
void close_pipe(struct worker *worker);

/* Remembers the greeting of a kernel that offers passthrough. */
void note_greeting(Front *front, const char *request, size_t size);

/* Asks for it in the reply to the greeting; leaves others as they are. */
void ask_for_passthrough(Front *front, char *reply, size_t size);

/* The lock is held by who calls these. */
struct file **find_file(Front *front, uint64_t number);
bool follow(Front *front, uint64_t number, uint64_t offset, size_t size);
struct slot *find_slot(Front *front, int64_t fragment);
struct slot *get_slot(Front *front, int64_t fragment);
bool fill_slot(Front *front, int64_t fragment, int descriptor, char *copy, size_t size);
void empty_slot(Front *front, struct slot *slot);
struct name *name_at(Front *front, int64_t fragment);
void free_file(struct file *file);

#endif
