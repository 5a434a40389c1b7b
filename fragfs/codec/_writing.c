/* Loops for writers: what a residual would take in each form, and bringing it into one. forms.py and
 * residual.py do the same with numpy where this is not built: equal numbers, equal bytes, more time.
 *
 * Integer arithmetic only, so that both come to the same decisions. The interpreter lock is released
 * around the loops. Part of the module in _kernels.c.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

PyObject *fragfs_forms(PyObject *self, PyObject *args);
PyObject *fragfs_planes(PyObject *self, PyObject *args);
PyObject *fragfs_pack(PyObject *self, PyObject *args);

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_LOOP __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_LOOP
#endif

enum {
    SAMPLE_WORDS = 1 << 12,
    LOGS = 2 * SAMPLE_WORDS, /* a sample has fewer words than this */
    UNIT_MAX = 8,
    PLANES = 8,
    PACKED_WORDS = 1 << 12, /* packed at a time: codes stay in the first-level cache */
    FIXED = 16, /* fraction bits of costs and logarithms */
    LOSS_BITS = 8,
    RAW_TENTHS = 77,
};

/* How often each byte occurs in a sample of a group: in the lowest plane apart for residuals within
 * a signed byte (0) and for those far from it (1), and in each plane above. */
typedef struct {
    uint32_t low[2][256];
    uint32_t upper[UNIT_MAX - 1][256];
} Survey;

/* Packs codes of so many bits, one to a byte, 8/bits to a byte; zeros follow the last one. */
VECTOR_LOOP static void join_codes(const uint8_t *restrict codes, size_t count, unsigned bits,
                                   uint8_t *restrict packed)
{
    if (bits == 4)
        for (size_t i = 0; i < (count + 1) / 2; i++)
            packed[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    else if (bits == 2)
        for (size_t i = 0; i < (count + 3) / 4; i++)
            packed[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 |
                                  codes[4 * i + 3] << 6);
    else
        for (size_t i = 0; i < (count + 7) / 8; i++) {
            unsigned byte = 0;
            for (unsigned k = 0; k < 8; k++)
                byte |= (unsigned)codes[8 * i + k] << k;
            packed[i] = (uint8_t)byte;
        }
}

#define DEFINE_WRITING(word)                                                                       \
    static size_t survey_##word(const word *restrict values, size_t count, size_t step,            \
                                Survey *restrict s)                                                \
    {                                                                                              \
        const word bias = (word)0x8080808080808080u;                                               \
        size_t taken = 0;                                                                          \
        for (size_t i = 0; i < count; i += step, taken++) {                                        \
            word value = (word)(values[i] + bias);                                                 \
            unsigned is_far = (value ^ bias) >> 4 >> 4 ? 1 : 0;                                    \
            s->low[is_far][value & 0xff]++;                                                        \
            for (unsigned plane = 1; plane < sizeof(word); plane++)                                \
                s->upper[plane - 1][value >> 8 * plane & 0xff]++;                                  \
        }                                                                                          \
        return taken;                                                                              \
    }                                                                                              \
    static int all_zero_##word(const word *values, size_t count)                                   \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            if (values[i])                                                                         \
                return 0;                                                                          \
        return 1;                                                                                  \
    }                                                                                              \
    VECTOR_LOOP static void plane_##word(const word *restrict values, size_t count, word bias,     \
                                         unsigned shift, uint8_t *restrict out)                    \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            out[i] = (uint8_t)((word)(values[i] + bias) >> shift);                                 \
    }                                                                                              \
    VECTOR_LOOP static void cut_##word(const word *restrict values, size_t count, unsigned bits,   \
                                       uint8_t *restrict codes)                                    \
    {                                                                                              \
        const word escape = (word)((1u << bits) - 1), zero = (word)((1u << (bits - 1)) - 1);       \
        for (size_t i = 0; i < count; i++) {                                                       \
            word shifted = (word)(values[i] + zero);                                               \
            codes[i] = (uint8_t)(shifted < escape ? shifted : escape);                             \
        }                                                                                          \
    }                                                                                              \
    /* Escapes are rare: eight codes without one are passed over at once. */                       \
    static size_t collect_##word(const word *restrict values, const uint8_t *restrict codes,       \
                                 size_t count, uint8_t escape, word *restrict outside)             \
    {                                                                                              \
        const uint64_t each = 0x0101010101010101u;                                                 \
        size_t used = 0;                                                                           \
        for (size_t i = 0; i < count; i += 8) {                                                    \
            uint64_t eight;                                                                        \
            memcpy(&eight, codes + i, 8);                                                          \
            /* Codes are below 16, so a byte that the sum makes 0x80 or more was the escape. */    \
            if (!((eight + each * (0x80u - escape)) & each * 0x80))                                \
                continue;                                                                          \
            for (size_t k = i; k < i + 8 && k < count; k++) {                                      \
                outside[used] = values[k];                                                         \
                used += codes[k] == escape;                                                        \
            }                                                                                      \
        }                                                                                          \
        return used;                                                                               \
    }                                                                                              \
    static size_t pack_##word(const word *restrict values, size_t count, unsigned bits,            \
                              uint8_t *restrict packed, word *restrict outside)                    \
    {                                                                                              \
        /* Whole bytes of any width, and zeros behind the last code. */                            \
        uint8_t codes[PACKED_WORDS];                                                               \
        const uint8_t escape = (uint8_t)((1u << bits) - 1);                                        \
        size_t used = 0;                                                                           \
        for (size_t i = 0; i < count; i += PACKED_WORDS) {                                         \
            size_t some = count - i < PACKED_WORDS ? count - i : PACKED_WORDS;                     \
            cut_##word(values + i, some, bits, codes);                                             \
            memset(codes + some, 0, -some % 8);                                                    \
            used += collect_##word(values + i, codes, some, escape, outside + used);               \
            join_codes(codes, some, bits, packed + i * bits / 8);                                  \
        }                                                                                          \
        return used;                                                                               \
    }

DEFINE_WRITING(uint8_t)
DEFINE_WRITING(uint16_t)
DEFINE_WRITING(uint32_t)
DEFINE_WRITING(uint64_t)

/* forms.py says why each number is what it is. */

typedef struct {
    const uint32_t *logs;
    const uint32_t *losses;
    int is_mixed; /* there are several groups */
} Tables;

static int64_t times_log(const Tables *t, int64_t count)
{
    return count * t->logs[count];
}

static int64_t coded(const Tables *t, int64_t entropy, int64_t count, int64_t likely)
{
    int64_t cost = entropy + count * t->losses[likely >> (FIXED - LOSS_BITS)];
    return 10 * cost > RAW_TENTHS * (count << FIXED) ? 8 * (count << FIXED) : cost;
}

static int64_t plane_cost(const Tables *t, const uint32_t *counts, int64_t total)
{
    int64_t entropy = times_log(t, total);
    uint32_t most = 0;
    for (unsigned value = 0; value < 256; value++) {
        entropy -= times_log(t, counts[value]);
        most = counts[value] > most ? counts[value] : most;
    }
    return coded(t, entropy, total, ((int64_t)most << FIXED) / total);
}

static int64_t packed_cost(const Tables *t, Survey *s, unsigned unit, int64_t total,
                           unsigned bits)
{
    const unsigned escape = (1u << bits) - 1, first = 0x80 - ((1u << (bits - 1)) - 1);
    uint32_t counts[256];
    int64_t inside = 0, entropy = times_log(t, total);
    for (unsigned value = 0; value < 256; value++)
        counts[value] = s->low[0][value] + s->low[1][value];
    for (unsigned value = first; value < first + escape; value++) {
        inside += s->low[0][value];
        entropy -= times_log(t, s->low[0][value]);
        counts[value] = s->low[1][value];
    }
    int64_t outside = total - inside;
    entropy -= times_log(t, outside);
    int64_t likely = ((int64_t)s->low[0][0x80] << FIXED) / total;
    for (unsigned codes = bits; codes < 8; codes *= 2)
        likely = likely * likely >> FIXED;
    int64_t cost = coded(t, entropy, (total * bits + 7) / 8, likely);
    if (!outside)
        return cost;
    int64_t apart = plane_cost(t, counts, outside);
    for (unsigned plane = 1; plane < unit; plane++) {
        uint32_t *upper = s->upper[plane - 1];
        upper[0x80] -= (uint32_t)inside;
        apart += plane_cost(t, upper, outside);
        upper[0x80] += (uint32_t)inside;
    }
    return cost + apart + (t->is_mixed ? apart / 8 : 0);
}

static unsigned choose_form(const Tables *t, Survey *s, unsigned unit, int64_t total,
                            int64_t *cost)
{
    uint32_t counts[256];
    for (unsigned value = 0; value < 256; value++)
        counts[value] = s->low[0][value] + s->low[1][value];
    unsigned form = PLANES;
    *cost = plane_cost(t, counts, total);
    for (unsigned plane = 1; plane < unit; plane++)
        *cost += plane_cost(t, s->upper[plane - 1], total);
    for (unsigned bits = 1; bits <= 4; bits *= 2) {
        int64_t packed = packed_cost(t, s, unit, total, bits);
        if (packed * 101 < *cost * 100) {
            form = bits;
            *cost = packed;
        }
    }
    return form;
}

static int is_width(unsigned width)
{
    return width == 1 || width == 2 || width == 4 || width == 8;
}

PyObject *fragfs_forms(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer values, sizes, logs, losses, forms, costs;
    unsigned width;
    if (!PyArg_ParseTuple(args, "Iy*y*y*y*w*w*", &width, &values, &sizes, &logs, &losses,
                          &forms, &costs))
        return NULL;
    PyObject *result = NULL;
    size_t group_count = (size_t)sizes.len / sizeof(uint32_t), count = 0;
    int is_fitting = is_width(width) && (size_t)forms.len == group_count &&
                     (size_t)sizes.len == group_count * sizeof(uint32_t) &&
                     (size_t)costs.len == group_count * sizeof(int64_t) &&
                     logs.len == LOGS * sizeof(uint32_t) &&
                     losses.len == ((1 << LOSS_BITS) + 1) * sizeof(uint32_t);
    for (size_t group = 0; is_fitting && group < group_count; group++) {
        size_t size = ((const uint32_t *)sizes.buf)[group];
        is_fitting = size > 0 && size <= (1u << 30);
        count += size;
    }
    if (!is_fitting || (size_t)values.len != count * width) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS;
    const Tables tables = {logs.buf, losses.buf, group_count > 1};
    const char *at = values.buf;
    for (size_t group = 0; group < group_count; group++) {
        size_t size = ((const uint32_t *)sizes.buf)[group], taken = 0;
        size_t step = size < SAMPLE_WORDS ? 1 : size / SAMPLE_WORDS;
        Survey survey;
        memset(&survey, 0, sizeof survey);
        int is_zero = 0;
        int64_t cost = 0;
#define LOOK(word)                                                                                 \
    taken = survey_##word((const word *)at, size, step, &survey);                                  \
    is_zero = survey.low[0][0x80] == taken && all_zero_##word((const word *)at, size)
        switch (width) {
        case 1: LOOK(uint8_t); break;
        case 2: LOOK(uint16_t); break;
        case 4: LOOK(uint32_t); break;
        default: LOOK(uint64_t); break;
        }
        unsigned form = 0;
        if (!is_zero)
            form = choose_form(&tables, &survey, width, (int64_t)taken, &cost);
        ((uint8_t *)forms.buf)[group] = (uint8_t)form;
        ((int64_t *)costs.buf)[group] = cost * (int64_t)size / (int64_t)taken;
        at += size * width;
    }
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&values);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&logs);
    PyBuffer_Release(&losses);
    PyBuffer_Release(&forms);
    PyBuffer_Release(&costs);
    return result;
}

PyObject *fragfs_planes(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer values, out;
    unsigned width;
    unsigned long long bias;
    if (!PyArg_ParseTuple(args, "Iy*Kw*", &width, &values, &bias, &out))
        return NULL;
    PyObject *result = NULL;
    if (!is_width(width) || (size_t)values.len % width || out.len != values.len) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t count = (size_t)values.len / width;
    Py_BEGIN_ALLOW_THREADS;
    for (unsigned plane = 0; plane < width; plane++) {
        uint8_t *to = (uint8_t *)out.buf + plane * count;
        switch (width) {
        case 1: plane_uint8_t(values.buf, count, (uint8_t)bias, 0, to); break;
        case 2: plane_uint16_t(values.buf, count, (uint16_t)bias, 8 * plane, to); break;
        case 4: plane_uint32_t(values.buf, count, (uint32_t)bias, 8 * plane, to); break;
        default: plane_uint64_t(values.buf, count, (uint64_t)bias, 8 * plane, to); break;
        }
    }
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return result;
}

PyObject *fragfs_pack(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer values, packed, outside;
    unsigned width, bits;
    if (!PyArg_ParseTuple(args, "Iy*Iw*w*", &width, &values, &bits, &packed, &outside))
        return NULL;
    PyObject *result = NULL;
    size_t used = 0, count = 0;
    if (!is_width(width) || (bits != 1 && bits != 2 && bits != 4) || (size_t)values.len % width ||
        outside.len != values.len ||
        (count = (size_t)values.len / width, (size_t)packed.len != (count * bits + 7) / 8)) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS;
#define PACK(word) used = pack_##word(values.buf, count, bits, packed.buf, outside.buf)
    switch (width) {
    case 1: PACK(uint8_t); break;
    case 2: PACK(uint16_t); break;
    case 4: PACK(uint32_t); break;
    default: PACK(uint64_t); break;
    }
    Py_END_ALLOW_THREADS;
    result = PyLong_FromSize_t(used);
done:
    PyBuffer_Release(&values);
    PyBuffer_Release(&packed);
    PyBuffer_Release(&outside);
    return result;
}
