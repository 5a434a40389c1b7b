/* Words put together from window, rim and low bytes, as planes.py describes them and does with numpy.
 *
 * Every size is checked. The interpreter lock is released around the loops.
 */

#include "_kernels.h"

enum { LOWS_MAX = 8, BLOCK = 2048 };

/* Planes of wider low bytes are views of a payload, where nothing is aligned. */
#if defined(__GNUC__)
typedef uint16_t loose_uint16_t __attribute__((aligned(1), may_alias));
typedef uint32_t loose_uint32_t __attribute__((aligned(1), may_alias));
#else
typedef uint16_t loose_uint16_t;
typedef uint32_t loose_uint32_t;
#endif
typedef uint8_t loose_uint8_t;

/* Stands in for a block of a plane that is constant: its bits are in the constant. */
static const uint8_t nothing[BLOCK];

#define DEFINE_LOW(word, low)                                                                      \
    VECTOR_LOOP static void add_##low##_to_##word(const loose_##low *restrict plane,               \
                                                  unsigned shift, word *restrict out,              \
                                                  size_t count)                                    \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            out[i] = (word)(out[i] | (word)plane[i] << shift);                                     \
    }

#define DEFINE_PLANES(word)                                                                        \
    VECTOR_LOOP static void top_##word(const uint8_t *restrict rim,                                \
                                       const uint8_t *restrict window, unsigned lead,              \
                                       word constant, word *restrict out, size_t count)            \
    {                                                                                              \
        const uint16_t mask = (uint16_t)((0xff00u << (8 - lead) & 0xff00u) | 0xffu >> lead);       \
        for (size_t i = 0; i < count; i++) {                                                       \
            uint16_t top = (uint16_t)(((unsigned)rim[i] | (unsigned)rim[i] << 8) & mask);          \
            top = (uint16_t)(top | (unsigned)window[i] << (8 - lead));                             \
            out[i] = (word)((word)((word)top << (8 * (sizeof(word) - 2))) | constant);             \
        }                                                                                          \
    }                                                                                              \
    DEFINE_LOW(word, uint8_t)                                                                      \
    DEFINE_LOW(word, uint16_t)                                                                     \
    DEFINE_LOW(word, uint32_t)                                                                     \
    static void put_##word(const Parts *parts, word *out)                                          \
    {                                                                                              \
        for (size_t start = 0; start < parts->count; start += BLOCK) {                             \
            size_t size = parts->count - start < BLOCK ? parts->count - start : BLOCK;             \
            top_##word(parts->rim ? parts->rim + start : nothing,                                  \
                       parts->window ? parts->window + start : nothing, parts->lead,               \
                       (word)parts->constant, out + start, size);                                  \
            for (size_t i = 0; i < parts->low_count; i++) {                                        \
                const Low *low = &parts->lows[i];                                                  \
                const unsigned shift = 8 * low->position;                                          \
                const char *from = (const char *)low->buffer.buf + start * low->width;             \
                if (low->width == 1)                                                               \
                    add_uint8_t_to_##word((const void *)from, shift, out + start, size);           \
                else if (low->width == 2)                                                          \
                    add_uint16_t_to_##word((const void *)from, shift, out + start, size);          \
                else                                                                               \
                    add_uint32_t_to_##word((const void *)from, shift, out + start, size);          \
            }                                                                                      \
        }                                                                                          \
    }

typedef struct {
    Py_buffer buffer;
    unsigned position, width; /* in bytes of a word */
} Low;

typedef struct {
    const uint8_t *rim, *window; /* NULL where constant */
    unsigned lead;
    unsigned long long constant;
    size_t count, low_count;
    Low lows[LOWS_MAX];
} Parts;

DEFINE_PLANES(uint16_t)
DEFINE_PLANES(uint32_t)
DEFINE_PLANES(uint64_t)

static void refuse(void)
{
    PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
}

static int open_low(PyObject *given, unsigned unit, size_t count, Low *low)
{
    if (!PyTuple_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "a low plane is a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(given, "IIy*", &low->position, &low->width, &low->buffer))
        return -1;
    if ((low->width == 1 || low->width == 2 || low->width == 4) && low->position < unit &&
        low->position + low->width <= unit - 2 && (size_t)low->buffer.len == count * low->width)
        return 0;
    PyBuffer_Release(&low->buffer);
    refuse();
    return -1;
}

/* A plane of the top, or None. */
static int open_top(PyObject *given, size_t count, Py_buffer *buffer, const uint8_t **bytes)
{
    *bytes = NULL;
    buffer->obj = NULL;
    if (given == Py_None)
        return 0;
    if (PyObject_GetBuffer(given, buffer, PyBUF_SIMPLE))
        return -1;
    if ((size_t)buffer->len != count) {
        refuse();
        return -1;
    }
    *bytes = buffer->buf;
    return 0;
}

PyObject *put_together(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *given_rim, *given_window, *given_lows, *result = NULL;
    Py_buffer out, rim, window;
    unsigned unit;
    Parts parts;
    if (!PyArg_ParseTuple(args, "IIKOOO!w*", &unit, &parts.lead, &parts.constant, &given_rim,
                          &given_window, &PyTuple_Type, &given_lows, &out))
        return NULL;
    rim.obj = window.obj = NULL;
    parts.low_count = 0;
    size_t low_count = (size_t)PyTuple_Size(given_lows);
    if ((unit != 2 && unit != 4 && unit != 8) || (size_t)out.len % unit || parts.lead > 7 ||
        low_count > LOWS_MAX) {
        refuse();
        goto done;
    }
    parts.count = (size_t)out.len / unit;
    if (open_top(given_rim, parts.count, &rim, &parts.rim) ||
        open_top(given_window, parts.count, &window, &parts.window))
        goto done;
    for (; parts.low_count < low_count; parts.low_count++)
        if (open_low(PyTuple_GetItem(given_lows, (Py_ssize_t)parts.low_count), unit, parts.count,
                     &parts.lows[parts.low_count]))
            goto done;
    Py_BEGIN_ALLOW_THREADS;
    switch (unit) {
    case 2: put_uint16_t(&parts, out.buf); break;
    case 4: put_uint32_t(&parts, out.buf); break;
    default: put_uint64_t(&parts, out.buf); break;
    }
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    while (parts.low_count > 0)
        PyBuffer_Release(&parts.lows[--parts.low_count].buffer);
    PyBuffer_Release(&window); /* does nothing where there is none */
    PyBuffer_Release(&rim);
    PyBuffer_Release(&out);
    return result;
}
