/* The one loop that numpy has no fast form of: a stable distribution of words over groups, and its
 * inverse. numpy does it by an argsort of the keys, at 5 ns an element; here it is one pass at
 * about 1 ns. groups.py does the same with numpy where this is not built: equal bytes, more time.
 *
 * Each word of the prediction names its group: lookup[word >> shift & mask]. Residuals of a group
 * stand together, groups in order, and inside a group in word order. Integer arithmetic only, modulo
 * the width of the word. Words are in the machine's byte order; groups.py uses this on little-endian
 * machines alone.
 *
 * Every index is checked: a table that comes from a damaged file ends in ValueError, never in a
 * write outside the buffers. The interpreter lock is released around the loops.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { GROUPS_MAX = 256, WORDS_MAX = 1 << 30 };

typedef struct {
    const uint8_t *lookup;
    unsigned shift;
    unsigned mask;
    uint32_t start[GROUPS_MAX + 1];
} Groups;

#define DEFINE_LOOPS(word)                                                                         \
    static int split_##word(const word *restrict values, const word *restrict prediction,          \
                            size_t count, const Groups *g, word *restrict out)                     \
    {                                                                                              \
        uint32_t next[GROUPS_MAX];                                                                 \
        memcpy(next, g->start, sizeof next);                                                       \
        for (size_t i = 0; i < count; i++) {                                                       \
            unsigned group = g->lookup[prediction[i] >> g->shift & g->mask];                       \
            uint32_t place = next[group]++;                                                        \
            if (place >= g->start[group + 1])                                                      \
                return -1;                                                                         \
            out[place] = (word)(values[i] - prediction[i]);                                        \
        }                                                                                          \
        return 0;                                                                                  \
    }                                                                                              \
    static int join_##word(const word *restrict residual, const word *restrict prediction,         \
                           size_t count, const Groups *g, word *restrict out)                      \
    {                                                                                              \
        uint32_t next[GROUPS_MAX];                                                                 \
        memcpy(next, g->start, sizeof next);                                                       \
        for (size_t i = 0; i < count; i++) {                                                       \
            unsigned group = g->lookup[prediction[i] >> g->shift & g->mask];                       \
            uint32_t place = next[group]++;                                                        \
            if (place >= g->start[group + 1])                                                      \
                return -1;                                                                         \
            out[i] = (word)(residual[place] + prediction[i]);                                      \
        }                                                                                          \
        return 0;                                                                                  \
    }                                                                                              \
    static void count_##word(const word *words, size_t count, unsigned shift, unsigned mask,       \
                             uint32_t (*tables)[256])                                              \
    {                                                                                              \
        size_t i = 0;                                                                              \
        /* Four tables: increments of one counter in a row would wait for each other. */           \
        for (; i + 4 <= count; i += 4)                                                             \
            for (unsigned lane = 0; lane < 4; lane++)                                              \
                tables[lane][words[i + lane] >> shift & mask]++;                                   \
        for (; i < count; i++)                                                                     \
            tables[0][words[i] >> shift & mask]++;                                                 \
    }

DEFINE_LOOPS(uint8_t)
DEFINE_LOOPS(uint16_t)
DEFINE_LOOPS(uint32_t)
DEFINE_LOOPS(uint64_t)

static int load_groups(Groups *g, const Py_buffer *lookup, const Py_buffer *sizes, unsigned shift,
                       unsigned mask, size_t count)
{
    size_t group_count = (size_t)sizes->len / sizeof(uint32_t);
    if (lookup->len != 256 || mask > 255 || group_count < 1 || group_count > GROUPS_MAX) {
        PyErr_SetString(PyExc_ValueError, "malformed groups");
        return -1;
    }
    uint64_t start = 0;
    for (size_t i = 0; i <= GROUPS_MAX; i++) {
        g->start[i] = (uint32_t)start;
        start += i < group_count ? ((const uint32_t *)sizes->buf)[i] : 0;
    }
    g->lookup = lookup->buf;
    g->shift = shift;
    g->mask = mask;
    if (start != count || count > WORDS_MAX) {
        PyErr_SetString(PyExc_ValueError, "the groups do not hold as many words as there are");
        return -1;
    }
    return 0;
}

static PyObject *move(PyObject *args, int split)
{
    Py_buffer in, prediction, lookup, sizes, out;
    unsigned width, shift, mask;
    if (!PyArg_ParseTuple(args, "Iy*y*y*y*w*II", &width, &in, &prediction, &lookup, &sizes, &out,
                          &shift, &mask))
        return NULL;
    PyObject *result = NULL;
    int failed = 0;
    Groups g;
    if ((width != 1 && width != 2 && width != 4 && width != 8) || shift >= 8 * width ||
        in.len != prediction.len || in.len != out.len || (size_t)in.len % width) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)in.len / width;
    if (load_groups(&g, &lookup, &sizes, shift, mask, count))
        goto done;
    Py_BEGIN_ALLOW_THREADS;
#define RUN(word)                                                                                  \
    failed = split ? split_##word(in.buf, prediction.buf, count, &g, out.buf)                      \
                   : join_##word(in.buf, prediction.buf, count, &g, out.buf)
    switch (width) {
    case 1: RUN(uint8_t); break;
    case 2: RUN(uint16_t); break;
    case 4: RUN(uint32_t); break;
    default: RUN(uint64_t); break;
    }
    Py_END_ALLOW_THREADS;
    if (failed)
        PyErr_SetString(PyExc_ValueError, "a group has more words than it should");
    else
        result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&in);
    PyBuffer_Release(&prediction);
    PyBuffer_Release(&lookup);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *split(PyObject *self, PyObject *args)
{
    (void)self;
    return move(args, 1);
}

static PyObject *join(PyObject *self, PyObject *args)
{
    (void)self;
    return move(args, 0);
}

static PyObject *count_keys(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer words, out;
    unsigned width, shift, mask;
    if (!PyArg_ParseTuple(args, "Iy*w*II", &width, &words, &out, &shift, &mask))
        return NULL;
    PyObject *result = NULL;
    if ((width != 1 && width != 2 && width != 4 && width != 8) || shift >= 8 * width ||
        mask > 255 || out.len != 256 * sizeof(uint32_t) || (size_t)words.len % width) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)words.len / width;
    uint32_t tables[4][256] = {{0}};
    Py_BEGIN_ALLOW_THREADS;
    switch (width) {
    case 1: count_uint8_t(words.buf, count, shift, mask, tables); break;
    case 2: count_uint16_t(words.buf, count, shift, mask, tables); break;
    case 4: count_uint32_t(words.buf, count, shift, mask, tables); break;
    default: count_uint64_t(words.buf, count, shift, mask, tables); break;
    }
    Py_END_ALLOW_THREADS;
    for (size_t key = 0; key < 256; key++)
        ((uint32_t *)out.buf)[key] =
            tables[0][key] + tables[1][key] + tables[2][key] + tables[3][key];
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&words);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"split", split, METH_VARARGS,
     "split(width, values, prediction, lookup, sizes, out, shift, mask): values - prediction, by group"},
    {"join", join, METH_VARARGS,
     "join(width, residual, prediction, lookup, sizes, out, shift, mask): undo split"},
    {"count_keys", count_keys, METH_VARARGS,
     "count_keys(width, words, out, shift, mask): how many words have each key"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Loops over groups of words; used by groups.py.", 0, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
