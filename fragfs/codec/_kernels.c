/* Loops that numpy has no fast form of, and the table of the module. floats.py and steps.py do the
 * same with numpy where this is not built: equal bytes, more time.
 *
 * First: conversions between float formats, as floats.py describes them. The interpreter lock is
 * released around the loops.
 */

#include "_kernels.h"

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint32_t widen_one_bf16(uint16_t word)
{
    return (uint32_t)word << 16;
}

static inline uint32_t widen_one_f16(uint16_t word)
{
    uint32_t magnitude = word & 0x7fffu;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    uint32_t denormal = as_bits((float)(int32_t)magnitude * 5.9604644775390625e-8f); /* 2**-24 */
    return (magnitude < 0x400u ? denormal : normal) | (uint32_t)(word & 0x8000u) << 16;
}

static inline uint32_t widen_one_f32(uint32_t word)
{
    return word;
}

enum { FIRST = 1, LAST = 2 };

/* widen: the same numbers as f32. add: total (+)= in * coefficient, where numbers too small to be safe
 * from flushing count as zero, and so do sums, once complete, that are infinite or NaN: their bits
 * would be the machine's choice. */
#define DEFINE_WIDEN(name, word)                                                                   \
    VECTOR_LOOP static void widen_##name(const word *restrict in, size_t count,                    \
                                         uint32_t *restrict out)                                   \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            out[i] = widen_one_##name(in[i]);                                                      \
    }                                                                                              \
    VECTOR_LOOP static void add_##name(const word *restrict in, size_t count, float coefficient,   \
                                       int place, uint32_t *restrict total)                        \
    {                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                       \
            uint32_t bits = widen_one_##name(in[i]);                                               \
            bits = (bits & 0x7f800000u) < 64u << 23 ? 0 : bits;                                    \
            float product = as_float(bits) * coefficient;                                          \
            uint32_t sum = as_bits(place & FIRST ? product : as_float(total[i]) + product);        \
            total[i] = place & LAST && (sum & 0x7f800000u) == 0x7f800000u ? 0 : sum;               \
        }                                                                                          \
    }

DEFINE_WIDEN(bf16, uint16_t)
DEFINE_WIDEN(f16, uint16_t)
DEFINE_WIDEN(f32, uint32_t)

VECTOR_LOOP static void narrow_bf16(const uint32_t *restrict in, size_t count, uint16_t *restrict out)
{
    for (size_t i = 0; i < count; i++)
        out[i] = (uint16_t)((in[i] + 0x7fffu + (in[i] >> 16 & 1)) >> 16);
}

/* Formats with a narrower exponent than f32: mantissa bits, exponent bias, largest finite code. */
#define DEFINE_NARROW(name, word, mantissa, bias, largest)                                         \
    VECTOR_LOOP static void narrow_##name(const uint32_t *restrict in, size_t count,               \
                                          word *restrict out)                                      \
    {                                                                                              \
        const unsigned drop = 23 - (mantissa);                                                     \
        /* Its unit in the last place is the smallest denormal: adding it rounds to those. */      \
        const uint32_t magic = (uint32_t)(127 + 24 - (bias) - (mantissa)) << 23;                   \
        for (size_t i = 0; i < count; i++) {                                                       \
            uint32_t magnitude = in[i] & 0x7fffffffu;                                              \
            uint32_t normal = (magnitude >> drop & 1) + ((1u << (drop - 1)) - 1) + magnitude;      \
            normal = (normal >> drop) - ((127u - (bias)) << (mantissa));                           \
            uint32_t denormal = as_bits(as_float(magnitude) + as_float(magic)) - magic;            \
            uint32_t code = magnitude < (128u - (bias)) << 23 ? denormal : normal;                 \
            code = code < (largest) ? code : (largest);                                            \
            uint32_t sign = in[i] >> 31 << (8 * sizeof(word) - 1);                                 \
            out[i] = (word)(code | sign);                                                          \
        }                                                                                          \
    }

DEFINE_NARROW(f16, uint16_t, 10, 15, 0x7bffu)
DEFINE_NARROW(e4m3, uint8_t, 3, 7, 0x7eu)
DEFINE_NARROW(e5m2, uint8_t, 2, 15, 0x7bu)

enum Format { FORMAT_BF16, FORMAT_F16, FORMAT_E4M3, FORMAT_E5M2, FORMAT_F32 };
enum { INPUTS_MAX = 3, BLOCK = 2048, STEP_COUNT = 256 };

static size_t format_size(unsigned format)
{
    return format == FORMAT_F32 ? 4 : format <= FORMAT_F16 ? 2 : 1;
}

typedef struct {
    Py_buffer buffer;
    unsigned format;
    float coefficient;
} Input;

static const char *block_of(const Input *input, size_t start)
{
    return (const char *)input->buffer.buf + start * format_size(input->format);
}

static void widen_block(const Input *input, size_t start, size_t count, uint32_t *out)
{
    const char *from = block_of(input, start);
    switch (input->format) {
    case FORMAT_BF16: widen_bf16((const uint16_t *)from, count, out); break;
    case FORMAT_F16: widen_f16((const uint16_t *)from, count, out); break;
    default: widen_f32((const uint32_t *)from, count, out); break;
    }
}

static void add_block(const Input *input, size_t start, size_t count, int place, uint32_t *total)
{
    const char *from = block_of(input, start);
    const float factor = input->coefficient;
    switch (input->format) {
    case FORMAT_BF16: add_bf16((const uint16_t *)from, count, factor, place, total); break;
    case FORMAT_F16: add_f16((const uint16_t *)from, count, factor, place, total); break;
    default: add_f32((const uint32_t *)from, count, factor, place, total); break;
    }
}

static void narrow_block(const uint32_t *in, size_t count, unsigned format, char *out)
{
    switch (format) {
    case FORMAT_BF16: narrow_bf16(in, count, (uint16_t *)out); break;
    case FORMAT_F16: narrow_f16(in, count, (uint16_t *)out); break;
    case FORMAT_E4M3: narrow_e4m3(in, count, (uint8_t *)out); break;
    case FORMAT_E5M2: narrow_e5m2(in, count, (uint8_t *)out); break;
    default: memcpy(out, in, 4 * count); break;
    }
}

/* Block by block, so that all but inputs and output stays in the first-level cache. One input without
 * scaling is a cast. */
static void convert_all(const Input *inputs, size_t input_count, int scaled, unsigned format,
                        size_t count, char *out)
{
    uint32_t wide[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        for (size_t i = 0; i < input_count; i++) {
            if (start + size < count)
                fetch_ahead(block_of(&inputs[i], start + size), BLOCK * format_size(inputs[i].format));
            if (scaled)
                add_block(&inputs[i], start, size,
                          (i == 0 ? FIRST : 0) | (i + 1 == input_count ? LAST : 0), wide);
            else
                widen_block(&inputs[i], start, size, wide);
        }
        narrow_block(wide, size, format, out + start * format_size(format));
    }
}

static PyObject *convert(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *sequence;
    unsigned format;
    int scaled;
    Py_buffer out;
    if (!PyArg_ParseTuple(args, "OpIw*", &sequence, &scaled, &format, &out))
        return NULL;
    PyObject *result = NULL;
    Input inputs[INPUTS_MAX];
    Py_ssize_t opened = 0, input_count = PySequence_Size(sequence);
    if (input_count < 1 || input_count > INPUTS_MAX || format > FORMAT_F32 ||
        (size_t)out.len % format_size(format)) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)out.len / format_size(format);
    for (; opened < input_count; opened++) {
        Input *input = &inputs[opened];
        PyObject *item = PySequence_GetItem(sequence, opened);
        if (item && !PyTuple_Check(item)) {
            Py_DECREF(item);
            PyErr_SetString(PyExc_TypeError, "an input is a tuple");
            goto done;
        }
        int parsed = item && PyArg_ParseTuple(item, "Iy*f", &input->format, &input->buffer,
                                              &input->coefficient);
        Py_XDECREF(item);
        if (!parsed)
            goto done;
        if ((input->format > FORMAT_F16 && input->format != FORMAT_F32) ||
            (size_t)input->buffer.len != count * format_size(input->format)) {
            PyBuffer_Release(&input->buffer);
            PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS;
    convert_all(inputs, (size_t)input_count, scaled, format, count, out.buf);
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    while (opened > 0)
        PyBuffer_Release(&inputs[--opened].buffer);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *add_steps(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer words, steps, out;
    if (!PyArg_ParseTuple(args, "y*y*w*", &words, &steps, &out))
        return NULL;
    PyObject *result = NULL;
    if (words.len % 4 || out.len != words.len || steps.len != STEP_COUNT * 4) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    const uint32_t *from = words.buf, *table = steps.buf;
    uint32_t *to = out.buf;
    size_t count = (size_t)words.len / 4;
    Py_BEGIN_ALLOW_THREADS;
    for (size_t i = 0; i < count; i++)
        to[i] = from[i] + table[from[i] >> 15 & (STEP_COUNT - 1)];
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&words);
    PyBuffer_Release(&steps);
    PyBuffer_Release(&out);
    return result;
}

/* In _writing.c. */
PyObject *fragfs_forms(PyObject *self, PyObject *args);
PyObject *fragfs_planes(PyObject *self, PyObject *args);
PyObject *fragfs_pack(PyObject *self, PyObject *args);

static PyMethodDef methods[] = {
    {"forms", fragfs_forms, METH_VARARGS,
     "forms(width, values, sizes, logs, losses, forms, costs): form and cost of each group of values"},
    {"planes", fragfs_planes, METH_VARARGS,
     "planes(width, values, bias, out): byte planes of values + bias, lowest first"},
    {"pack", fragfs_pack, METH_VARARGS,
     "pack(width, values, bits, packed, outside): packed codes of values; counts those outside"},
    {"convert", convert, METH_VARARGS,
     "convert(inputs, scaled, format, out): the sum of inputs, each (format, words, coefficient), or"
     " one input as it is; formats: bf16 0, f16 1, f8_e4m3 2, f8_e5m2 3 (of out only), f32 4"},
    {"add_steps", add_steps, METH_VARARGS,
     "add_steps(words, steps, out): each word of 32 bits plus the step of its leading mantissa bits"},
    {"split", split, METH_VARARGS,
     "split(width, values, prediction, lookup, sizes, out, shift, mask): values - prediction, by group"},
    {"count_keys", count_keys, METH_VARARGS,
     "count_keys(width, words, out, shift, mask): how many words have each key"},
    {"merge_planes", merge_planes, METH_VARARGS,
     "merge_planes(width, planes, bias, out): words from their bytes, lowest first, less a bias; a"
     " plane of one byte is constant"},
    {"rebuild", rebuild, METH_VARARGS,
     "rebuild(width, prediction, out, shift, mask, groups, escapes): prediction and residuals added;"
     " groups: a tuple of (last key, words, form, escapes, planes); behind the escapes 16 words more;"
     " out may be the prediction"},
    {"put_together", put_together, METH_VARARGS,
     "put_together(unit, lead, constant, rim, window, lows, out): words from their planes; rim and"
     " window may be None; lows: a tuple of (position, width, bytes)"},
    {"allow_vectors", allow_vectors, METH_O,
     "allow_vectors(allowed): whether split and rebuild use AVX2 where there is any, for tests of what other"
     " processors do; gives whether it will"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Loops that numpy has no fast form of.", 0, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    prepare_split();
    prepare_rebuild();
    PyObject *created = PyModule_Create(&module);
    /* kernels.py uses no module of another version: a file built for older sources. */
    if (created && PyModule_AddIntConstant(created, "VERSION", 5)) {
        Py_DECREF(created);
        return NULL;
    }
    return created;
}
