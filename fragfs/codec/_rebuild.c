/* From stored residuals and a prediction to words: the inverse of what residual.py stores.
 *
 * Each group of residuals is a source that yields its words in order, a block at a time, from packed
 * codes or byte planes. A block of the prediction then takes from each source as many words as it
 * has keys of that group. So nothing but the sources, the prediction and the result goes through
 * memory, and a source's words stay in the second-level cache. rebuild.py does the same with numpy.
 *
 * Every size is checked: what comes from a damaged file ends in ValueError, never in an access
 * outside the buffers. The interpreter lock is released around the loops.
 */

#include "_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VECTORS 1
#include "_rebuild_vectors.h"
#else
#define HAS_VECTORS 0
#endif

enum {
    SOURCES_MAX = 16,
    PLANES_MAX = 8,
    WORDS_MAX = 1 << 30,
    /* Words taken at a time. Blocks of 512 to 2048 take equally long (EPYC, 2026-11). */
    BLOCK = 1024,
    /* A source holds what one block may take behind what one block has left, and what loads of whole
     * vectors may touch behind that. */
    SOURCE_WORDS = 3 * BLOCK + 16,
    FORM_PLANES = 8,
    /* Groups whose words one pass over a block sorts in: cursors and words stay in registers. */
    TAKEN_TOGETHER = 4,
    /* Words that must follow the escapes: vectors are loaded whole. */
    ESCAPES_ROOM = 16,
};

typedef enum { FINE, TOO_MANY_WORDS, WRONG_ESCAPES } Outcome;

typedef struct {
    const uint8_t *bytes;
    int is_constant;
} Plane;

/* Part of a plane that varies, and where its bytes lie in a word. */
typedef struct {
    const uint8_t *bytes;
    unsigned shift;
} Part;

typedef struct {
    unsigned form;   /* bits of a code; 0: all zero, 8: planes */
    unsigned first_key, last_key;
    size_t size;     /* words of the group */
    size_t expanded; /* of them, how many the source has yielded; a multiple of 8 until the end */
    size_t escape, escape_end; /* the next of its escapes, and the end of them */
    Plane planes[PLANES_MAX];
} Source;

typedef struct {
    unsigned shift, mask;
    size_t source_count;
    Source sources[SOURCES_MAX];
    const char *escapes;
    size_t escape_count;
} Task;

void prepare_rebuild(void)
{
#if HAS_VECTORS
    prepare_vectors();
#endif
}

PyObject *allow_vectors(PyObject *self, PyObject *allowed)
{
    (void)self;
    int truth = PyObject_IsTrue(allowed);
    if (truth < 0)
        return NULL;
    allow_split_vectors(truth);
#if HAS_VECTORS
    can_spread = has_vectors && truth;
    return PyBool_FromLong(can_spread);
#else
    return Py_NewRef(Py_False);
#endif
}

#define JOIN_NAMES(name, word) name##_##word
#define NAME_FOR(name, word) JOIN_NAMES(name, word)
#define FOR_WORD(name) NAME_FOR(name, WORD)

#define WORD uint8_t
#define HAS_EIGHT HAS_VECTORS
#include "_rebuild_loops.h"

#define WORD uint16_t
#define HAS_EIGHT HAS_VECTORS
#include "_rebuild_loops.h"

#define WORD uint32_t
#define HAS_EIGHT HAS_VECTORS
#include "_rebuild_loops.h"

#define WORD uint64_t
#define HAS_EIGHT 0
#include "_rebuild_loops.h"

/* The buffers of one call. */
typedef struct {
    Py_buffer opened[SOURCES_MAX * PLANES_MAX];
    size_t count;
} Buffers;

/* Open the planes of `size` bytes each; a single byte is a constant. */
static int open_planes(PyObject *given, size_t plane_count, size_t size, Buffers *buffers,
                       Plane *planes)
{
    if ((size_t)PyTuple_Size(given) != plane_count) {
        PyErr_SetString(PyExc_ValueError, "a wrong number of planes");
        return -1;
    }
    for (size_t i = 0; i < plane_count; i++) {
        Py_buffer *buffer = &buffers->opened[buffers->count];
        if (PyObject_GetBuffer(PyTuple_GetItem(given, (Py_ssize_t)i), buffer, PyBUF_SIMPLE))
            return -1;
        buffers->count++;
        planes[i].bytes = buffer->buf;
        planes[i].is_constant = buffer->len == 1;
        if (buffer->len != 1 && (size_t)buffer->len != size) {
            PyErr_SetString(PyExc_ValueError, "a plane that does not fit its words");
            return -1;
        }
    }
    return 0;
}

static int open_source(PyObject *given, unsigned width, Buffers *buffers, Source *source)
{
    PyObject *planes;
    unsigned last_key, size, form, escape_count;
    if (!PyTuple_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "a group is a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(given, "IIIIO!", &last_key, &size, &form, &escape_count, &PyTuple_Type,
                          &planes))
        return -1;
    int is_packed = form == 1 || form == 2 || form == 4;
    if ((form && form != FORM_PLANES && !is_packed) || size < 1 || size > WORDS_MAX ||
        last_key > 255 || escape_count > (is_packed ? size : 0)) {
        PyErr_SetString(PyExc_ValueError, "a malformed group");
        return -1;
    }
    source->form = form;
    source->last_key = last_key;
    source->size = size;
    source->expanded = 0;
    source->escape_end = escape_count;
    size_t plane_size = is_packed ? ((size_t)size * form + 7) / 8 : size;
    size_t plane_count = is_packed ? 1 : form ? width : 0;
    if (open_planes(planes, plane_count, plane_size, buffers, source->planes))
        return -1;
    if (is_packed && source->planes[0].is_constant && plane_size != 1) {
        PyErr_SetString(PyExc_ValueError, "codes that do not fit their words");
        return -1;
    }
    return 0;
}

/* Groups cover all keys in order, and as many words as there are. `room`: words of the escapes. */
static int open_sources(PyObject *given, unsigned width, size_t count, size_t room, Buffers *buffers,
                        Task *task)
{
    size_t source_count = (size_t)PyTuple_Size(given);
    if (source_count < 1 || source_count > SOURCES_MAX) {
        PyErr_SetString(PyExc_ValueError, "a wrong number of groups");
        return -1;
    }
    size_t words = 0, escapes = 0;
    unsigned next_key = 0;
    task->source_count = source_count;
    for (size_t i = 0; i < source_count; i++) {
        Source *source = &task->sources[i];
        if (open_source(PyTuple_GetItem(given, (Py_ssize_t)i), width, buffers, source))
            return -1;
        if (source->last_key < next_key || (i + 1 == source_count && source->last_key != 255)) {
            PyErr_SetString(PyExc_ValueError, "groups do not cover the keys");
            return -1;
        }
        source->first_key = next_key;
        next_key = source->last_key + 1;
        words += source->size;
        source->escape = escapes;
        escapes = source->escape_end += escapes;
    }
    if (words != count || escapes + ESCAPES_ROOM > room) {
        PyErr_SetString(PyExc_ValueError, "groups do not cover the words");
        return -1;
    }
    task->escape_count = escapes;
    return 0;
}

static int is_width(unsigned width)
{
    return width == 1 || width == 2 || width == 4 || width == 8;
}

PyObject *rebuild(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer prediction, out, escapes;
    PyObject *groups;
    unsigned width, shift, mask;
    if (!PyArg_ParseTuple(args, "Iy*w*IIO!y*", &width, &prediction, &out, &shift, &mask,
                          &PyTuple_Type, &groups, &escapes))
        return NULL;
    PyObject *result = NULL;
    char *memory = NULL;
    Buffers buffers;
    Task task;
    buffers.count = 0;
    if (!is_width(width) || shift >= 8 * width || mask > 255 || prediction.len != out.len ||
        (size_t)out.len % width || (size_t)escapes.len % width) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)out.len / width;
    task.shift = shift;
    task.mask = mask;
    task.escapes = escapes.buf;
    if (open_sources(groups, width, count, (size_t)escapes.len / width, &buffers, &task))
        goto done;
    memory = PyMem_Malloc(task.source_count * SOURCE_WORDS * width);
    if (!memory) {
        PyErr_NoMemory();
        goto done;
    }
    Outcome outcome;
    Py_BEGIN_ALLOW_THREADS;
    switch (width) {
    case 1: outcome = rebuild_uint8_t(&task, prediction.buf, count, memory, out.buf); break;
    case 2: outcome = rebuild_uint16_t(&task, prediction.buf, count, memory, out.buf); break;
    case 4: outcome = rebuild_uint32_t(&task, prediction.buf, count, memory, out.buf); break;
    default: outcome = rebuild_uint64_t(&task, prediction.buf, count, memory, out.buf); break;
    }
    Py_END_ALLOW_THREADS;
    if (outcome == FINE)
        result = Py_NewRef(Py_None);
    else
        PyErr_SetString(PyExc_ValueError, outcome == WRONG_ESCAPES
                                              ? "a wrong number of escapes"
                                              : "a group has more words than it should");
done:
    PyMem_Free(memory);
    while (buffers.count > 0)
        PyBuffer_Release(&buffers.opened[--buffers.count]);
    PyBuffer_Release(&prediction);
    PyBuffer_Release(&out);
    PyBuffer_Release(&escapes);
    return result;
}

PyObject *merge_planes(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *given;
    unsigned width;
    unsigned long long bias;
    Py_buffer out;
    if (!PyArg_ParseTuple(args, "IO!Kw*", &width, &PyTuple_Type, &given, &bias, &out))
        return NULL;
    PyObject *result = NULL;
    Buffers buffers;
    Plane planes[PLANES_MAX];
    buffers.count = 0;
    if (!is_width(width) || (size_t)out.len % width) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)out.len / width;
    if (open_planes(given, width, count, &buffers, planes))
        goto done;
    Py_BEGIN_ALLOW_THREADS;
    switch (width) {
    case 1: merge_uint8_t(planes, 0, (uint8_t)bias, out.buf, count); break;
    case 2: merge_uint16_t(planes, 0, (uint16_t)bias, out.buf, count); break;
    case 4: merge_uint32_t(planes, 0, (uint32_t)bias, out.buf, count); break;
    default: merge_uint64_t(planes, 0, (uint64_t)bias, out.buf, count); break;
    }
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    while (buffers.count > 0)
        PyBuffer_Release(&buffers.opened[--buffers.count]);
    PyBuffer_Release(&out);
    return result;
}
