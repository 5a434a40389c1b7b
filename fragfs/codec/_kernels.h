/* What the sources of the compiled module share. */

#ifndef FRAGFS_KERNELS_H
#define FRAGFS_KERNELS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* One loop, compiled twice: for what every x86-64 has, and for what nearly all have by now. Neither
 * may contract a product and a sum into one operation: it would round once instead of twice. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_LOOP __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_LOOP
#endif

#if defined(__GNUC__)
#define HIDDEN __attribute__((visibility("hidden")))
#else
#define HIDDEN
#endif

/* Ask for memory that is read soon: processors fetch ahead by themselves, but not past a page. */
static inline void fetch_ahead(const void *from, size_t size)
{
#if defined(__GNUC__)
    for (size_t i = 0; i < size; i += 64)
        __builtin_prefetch((const char *)from + i);
#else
    (void)from;
    (void)size;
#endif
}

/* _planes.c */
HIDDEN PyObject *put_together(PyObject *self, PyObject *args);

/* _split.c */
HIDDEN void prepare_split(void);
HIDDEN void allow_split_vectors(int is_allowed);
HIDDEN PyObject *split(PyObject *self, PyObject *args);
HIDDEN PyObject *count_keys(PyObject *self, PyObject *args);

/* _rebuild.c */
HIDDEN void prepare_rebuild(void);
HIDDEN PyObject *allow_vectors(PyObject *self, PyObject *allowed);
HIDDEN PyObject *merge_planes(PyObject *self, PyObject *args);
HIDDEN PyObject *rebuild(PyObject *self, PyObject *args);

#endif
