/* A stable distribution of words over groups. numpy does it by an argsort of the keys, at 5 ns an
 * element; here it is one pass at 1 ns or, without AVX2, at 3. The inverse is in _rebuild.c.
 *
 * Each word of the prediction names its group: lookup[word >> shift & mask]. Residuals of a group
 * stand together, groups in order, and inside a group in word order. Integer arithmetic only, modulo
 * the width of the word. Words are in the machine's byte order; groups.py uses this on little-endian
 * machines alone.
 *
 * Every index is checked: groups that do not fit the words end in ValueError, never in a write
 * outside the buffers. The interpreter lock is released around the loops.
 */

#include "_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VECTORS 1
#include <immintrin.h>
#define VECTORS __attribute__((target("avx2,popcnt")))
#define VECTORS_INLINE __attribute__((target("avx2,popcnt"), always_inline)) static inline
#else
#define HAS_VECTORS 0
#endif

enum {
    GROUPS_MAX = 256,
    WORDS_MAX = 1 << 30,
    /* Words sorted at a time, so that they stay in the first-level cache. */
    BLOCK = 1024,
    /* Groups that are sorted by vectors, and how many of them in one pass over a block: cursors and
     * keys stay in registers. */
    VECTOR_GROUPS_MAX = 16,
    TOGETHER = 4,
    /* Vectors are stored whole. */
    ROOM = 8,
};

typedef struct {
    const uint8_t *lookup;
    unsigned shift;
    unsigned mask;
    uint32_t start[GROUPS_MAX + 1];
    size_t group_count;
} Groups;

#define DEFINE_LOOPS(word)                                                                         \
    static int split_##word(const word *restrict values, const word *restrict prediction,          \
                            size_t count, const Groups *g, uint32_t *restrict next,                \
                            word *restrict out)                                                    \
    {                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                       \
            unsigned group = g->lookup[prediction[i] >> g->shift & g->mask];                       \
            uint32_t place = next[group]++;                                                        \
            if (place >= g->start[group + 1])                                                      \
                return -1;                                                                         \
            out[place] = (word)(values[i] - prediction[i]);                                        \
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

#if HAS_VECTORS

static int has_vectors, can_gather;

/* The lanes of each set, in order: those of 32 bits, and the bytes of those of 16 bits. */
static uint8_t lanes_of[256][8], bytes_of[256][16];

static void prepare_tables(void)
{
    for (unsigned set = 0; set < 256; set++)
        for (unsigned lane = 0, place = 0; lane < 8; lane++)
            if (set >> lane & 1) {
                lanes_of[set][place] = (uint8_t)lane;
                bytes_of[set][2 * place] = (uint8_t)(2 * lane);
                bytes_of[set][2 * place + 1] = (uint8_t)(2 * lane + 1);
                place++;
            }
    __builtin_cpu_init();
    has_vectors = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
    can_gather = has_vectors;
}

/* gather_eight: those of eight words that are in a set, in order, and what does not matter behind. */
VECTORS_INLINE void gather_eight_uint16_t(const uint16_t *words, unsigned set, uint16_t *out)
{
    __m128i eight = _mm_loadu_si128((const __m128i *)words);
    __m128i bytes = _mm_loadu_si128((const __m128i *)bytes_of[set]);
    _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(eight, bytes));
}

VECTORS_INLINE void gather_eight_uint32_t(const uint32_t *words, unsigned set, uint32_t *out)
{
    __m256i eight = _mm256_loadu_si256((const __m256i *)words);
    __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)lanes_of[set]));
    _mm256_storeu_si256((__m256i *)out, _mm256_permutevar8x32_epi32(eight, lanes));
}

/* Keys that belong to a group: from the first one on, so many more. */
typedef struct {
    uint8_t first, more;
} Range;

/* The range of each group; 0 if a group's keys are not all neighbours, or there are too many groups. */
static int find_ranges(const Groups *g, Range *ranges)
{
    if (g->group_count > VECTOR_GROUPS_MAX)
        return 0;
    unsigned group = 0, first = 0;
    for (unsigned key = 0; key < 256; key++) {
        if (g->lookup[key] == group)
            continue;
        if (g->lookup[key] != group + 1 || key == first || group + 1 >= g->group_count)
            return 0;
        ranges[group++] = (Range){(uint8_t)first, (uint8_t)(key - first - 1)};
        first = key;
    }
    ranges[group] = (Range){(uint8_t)first, (uint8_t)(255 - first)};
    return group + 1 == g->group_count;
}

/* Gather the words of some groups from a block; `counts` says how many each has. */
#define DEFINE_GATHER(word)                                                                        \
    VECTORS_INLINE void gather_some_##word(const uint8_t *keys, const word *words, size_t count,   \
                                           const Range *ranges, const unsigned some,               \
                                           word (*gathered)[BLOCK + ROOM], uint32_t *counts)       \
    {                                                                                              \
        word *next[TOGETHER];                                                                      \
        __m128i first[TOGETHER], more[TOGETHER];                                                   \
        for (unsigned s = 0; s < some; s++) {                                                      \
            next[s] = gathered[s];                                                                 \
            first[s] = _mm_set1_epi8((char)ranges[s].first);                                       \
            more[s] = _mm_set1_epi8((char)ranges[s].more);                                         \
        }                                                                                          \
        for (size_t i = 0; i < count; i += 16) {                                                   \
            __m128i sixteen = _mm_loadu_si128((const __m128i *)(keys + i));                        \
            for (unsigned s = 0; s < some; s++) {                                                  \
                __m128i distance = _mm_sub_epi8(sixteen, first[s]);                                \
                __m128i inside = _mm_cmpeq_epi8(_mm_min_epu8(distance, more[s]), distance);        \
                unsigned set = (unsigned)_mm_movemask_epi8(inside);                                \
                gather_eight_##word(words + i, set & 0xff, next[s]);                               \
                next[s] += (unsigned)__builtin_popcount(set & 0xff);                               \
                gather_eight_##word(words + i + 8, set >> 8, next[s]);                             \
                next[s] += (unsigned)__builtin_popcount(set >> 8);                                 \
            }                                                                                      \
        }                                                                                          \
        for (unsigned s = 0; s < some; s++)                                                        \
            counts[s] = (uint32_t)(next[s] - gathered[s]);                                         \
    }                                                                                              \
    /* As many whole blocks as there are; gives how many words that were, or -1. */                \
    VECTORS static ptrdiff_t split_blocks_##word(const word *values, const word *prediction,       \
                                                 size_t count, const Groups *g,                    \
                                                 const Range *ranges, uint32_t *next, word *out)   \
    {                                                                                              \
        word words[BLOCK], gathered[VECTOR_GROUPS_MAX][BLOCK + ROOM];                              \
        uint8_t keys[BLOCK];                                                                       \
        uint32_t counts[VECTOR_GROUPS_MAX];                                                        \
        size_t at = 0;                                                                             \
        for (; at + BLOCK <= count; at += BLOCK) {                                                 \
            for (size_t i = 0; i < BLOCK; i++) {                                                   \
                keys[i] = (uint8_t)(prediction[at + i] >> g->shift & g->mask);                     \
                words[i] = (word)(values[at + i] - prediction[at + i]);                            \
            }                                                                                      \
            size_t s = 0;                                                                          \
            for (; s + 4 <= g->group_count; s += 4)                                                \
                gather_some_##word(keys, words, BLOCK, ranges + s, 4, gathered + s, counts + s);   \
            for (; s + 2 <= g->group_count; s += 2)                                                \
                gather_some_##word(keys, words, BLOCK, ranges + s, 2, gathered + s, counts + s);   \
            if (s < g->group_count)                                                                \
                gather_some_##word(keys, words, BLOCK, ranges + s, 1, gathered + s, counts + s);   \
            for (s = 0; s < g->group_count; s++) {                                                 \
                if (counts[s] > g->start[s + 1] - next[s])                                         \
                    return -1;                                                                     \
                memcpy(out + next[s], gathered[s], counts[s] * sizeof(word));                      \
                next[s] += counts[s];                                                              \
            }                                                                                      \
        }                                                                                          \
        return (ptrdiff_t)at;                                                                      \
    }

DEFINE_GATHER(uint16_t)
DEFINE_GATHER(uint32_t)

/* Sort what vectors are good for; gives how many words that was, or -1 if a group runs over. */
static ptrdiff_t split_by_vectors(unsigned width, const void *values, const void *prediction,
                                  size_t count, const Groups *g, uint32_t *next, void *out)
{
    Range ranges[VECTOR_GROUPS_MAX];
    if (!can_gather || (width != 2 && width != 4) || !find_ranges(g, ranges))
        return 0;
    if (width == 2)
        return split_blocks_uint16_t(values, prediction, count, g, ranges, next, out);
    return split_blocks_uint32_t(values, prediction, count, g, ranges, next, out);
}

#endif

void prepare_split(void)
{
#if HAS_VECTORS
    prepare_tables();
#endif
}

void allow_split_vectors(int is_allowed)
{
#if HAS_VECTORS
    can_gather = has_vectors && is_allowed;
#else
    (void)is_allowed;
#endif
}

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
    g->group_count = group_count;
    g->lookup = lookup->buf;
    g->shift = shift;
    g->mask = mask;
    if (start != count || count > WORDS_MAX) {
        PyErr_SetString(PyExc_ValueError, "the groups do not hold as many words as there are");
        return -1;
    }
    return 0;
}

PyObject *split(PyObject *self, PyObject *args)
{
    (void)self;
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
    uint32_t next[GROUPS_MAX];
    memcpy(next, g.start, sizeof next);
    size_t sorted = 0;
#if HAS_VECTORS
    ptrdiff_t by_vectors = split_by_vectors(width, in.buf, prediction.buf, count, &g, next, out.buf);
    failed = by_vectors < 0;
    sorted = failed ? count : (size_t)by_vectors;
#endif
#define RUN(word)                                                                                  \
    failed |= split_##word((const word *)in.buf + sorted, (const word *)prediction.buf + sorted,       \
                           count - sorted, &g, next, out.buf)
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

PyObject *count_keys(PyObject *self, PyObject *args)
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
