/* The loops of _rebuild.c for one width of words, which includes this once for each:
 *
 * WORD       the type of a word
 * HAS_EIGHT  whether _rebuild_vectors.h has vectors of such words
 */

/* Planes that vary, each shifted to its place: summed one, two or four in a pass. */
VECTOR_LOOP static void FOR_WORD(set_one)(const Part *parts, WORD start, WORD *restrict out,
                                          size_t count)
{
    const uint8_t *restrict a = parts[0].bytes;
    const unsigned s = parts[0].shift;
    for (size_t i = 0; i < count; i++)
        out[i] = (WORD)(start + ((WORD)a[i] << s));
}

VECTOR_LOOP static void FOR_WORD(add_one)(const Part *parts, WORD *restrict out, size_t count)
{
    const uint8_t *restrict a = parts[0].bytes;
    const unsigned s = parts[0].shift;
    for (size_t i = 0; i < count; i++)
        out[i] = (WORD)(out[i] + ((WORD)a[i] << s));
}

VECTOR_LOOP static void FOR_WORD(set_two)(const Part *parts, WORD start, WORD *restrict out,
                                          size_t count)
{
    const uint8_t *restrict a = parts[0].bytes, *restrict b = parts[1].bytes;
    const unsigned s = parts[0].shift, t = parts[1].shift;
    for (size_t i = 0; i < count; i++)
        out[i] = (WORD)(start + ((WORD)a[i] << s) + ((WORD)b[i] << t));
}

VECTOR_LOOP static void FOR_WORD(set_four)(const Part *parts, WORD start, WORD *restrict out,
                                           size_t count)
{
    const uint8_t *restrict a = parts[0].bytes, *restrict b = parts[1].bytes;
    const uint8_t *restrict c = parts[2].bytes, *restrict d = parts[3].bytes;
    const unsigned s = parts[0].shift, t = parts[1].shift;
    const unsigned u = parts[2].shift, v = parts[3].shift;
    for (size_t i = 0; i < count; i++)
        out[i] = (WORD)(start + ((WORD)a[i] << s) + ((WORD)b[i] << t) + ((WORD)c[i] << u) +
                        ((WORD)d[i] << v));
}

/* Words from their bytes, lowest first, less a bias. */
static void FOR_WORD(merge)(const Plane *planes, size_t start, WORD bias, WORD *out, size_t count)
{
    Part parts[sizeof(WORD)];
    unsigned part_count = 0, merged = 1;
    WORD constant = (WORD)(0 - bias);
    for (unsigned p = 0; p < sizeof(WORD); p++) {
        if (planes[p].is_constant)
            constant = (WORD)(constant + ((WORD)planes[p].bytes[0] << 8 * p));
        else
            parts[part_count++] = (Part){planes[p].bytes + start, 8 * p};
    }
    if (!part_count)
        for (size_t i = 0; i < count; i++)
            out[i] = constant;
    else if (part_count == 1)
        FOR_WORD(set_one)(parts, constant, out, count);
    else if (part_count < 4) {
        FOR_WORD(set_two)(parts, constant, out, count);
        merged = 2;
    } else {
        FOR_WORD(set_four)(parts, constant, out, count);
        merged = 4;
    }
    for (; merged < part_count; merged++)
        FOR_WORD(add_one)(parts + merged, out, count);
}

#if HAS_EIGHT
/* Eight codes at a time, as many as there are; gives how many words that makes. Behind `escape_count`
 * escapes there is room for a vector more. */
VECTORS_INLINE size_t FOR_WORD(spread_codes)(const uint8_t *packed, const unsigned bits,
                                             const WORD *escapes, size_t escape_count,
                                             size_t *escape, WORD *out, size_t count)
{
    const __m128i top = _mm_set1_epi16((short)((1 << bits) - 1));
    const __m128i zero = _mm_set1_epi16((short)((1 << (bits - 1)) - 1));
    const __m128i scale =
        bits == 1   ? _mm_setr_epi16((short)(1 << 15), 1 << 14, 1 << 13, 1 << 12, 1 << 11, 1 << 10,
                                     1 << 9, 1 << 8)
        : bits == 2 ? _mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1)
                    : _mm_setr_epi16(1 << 12, 1 << 8, 1 << 4, 1, 1 << 12, 1 << 8, 1 << 4, 1);
    size_t done = 0, next = *escape;
    for (; done + 8 <= count && next <= escape_count; done += 8) {
        uint32_t eight = 0;
        memcpy(&eight, packed, bits);
        packed += bits;
        /* Each lane moves its own code up to its top, by a product, and then down. */
        __m128i codes = bits == 4 ? _mm_unpacklo_epi64(_mm_set1_epi16((short)eight),
                                                       _mm_set1_epi16((short)(eight >> 16)))
                                  : _mm_set1_epi16((short)eight);
        codes = _mm_srli_epi16(_mm_mullo_epi16(codes, scale), (int)(16 - bits));
        __m128i outside = _mm_cmpeq_epi16(codes, top);
        __m128i near = _mm_andnot_si128(outside, _mm_sub_epi16(codes, zero));
        unsigned set = (unsigned)_mm_movemask_epi8(_mm_packs_epi16(outside, _mm_setzero_si128()));
        FOR_WORD(store_eight)(out + done,
                              FOR_WORD(or_eight)(FOR_WORD(small_eight)(near),
                                                 FOR_WORD(spread_eight)(escapes + next, set)));
        next += (unsigned)__builtin_popcount(set);
    }
    *escape = next;
    return done;
}

VECTORS static size_t FOR_WORD(spread)(const uint8_t *packed, unsigned bits, const WORD *escapes,
                                       size_t escape_count, size_t *escape, WORD *out, size_t count)
{
    switch (bits) {
    case 1: return FOR_WORD(spread_codes)(packed, 1, escapes, escape_count, escape, out, count);
    case 2: return FOR_WORD(spread_codes)(packed, 2, escapes, escape_count, escape, out, count);
    default: return FOR_WORD(spread_codes)(packed, 4, escapes, escape_count, escape, out, count);
    }
}
#endif

static Outcome FOR_WORD(expand_codes)(const Task *task, Source *source, WORD *out, size_t count)
{
    const WORD *escapes = (const WORD *)task->escapes;
    const unsigned bits = source->form, top = (1u << bits) - 1, zero = (1u << (bits - 1)) - 1;
    const uint8_t *packed = source->planes[0].bytes + source->expanded * bits / 8;
    size_t i = 0, next = source->escape;
#if HAS_EIGHT
    if (can_spread)
        i = FOR_WORD(spread)(packed, bits, escapes, task->escape_count, &next, out, count);
#endif
    /* Without a branch for each word: escapes come at random. */
    for (; i < count && next < task->escape_count; i++) {
        unsigned code = packed[i * bits / 8] >> (i * bits & 7) & top;
        WORD word = (WORD)((WORD)code - zero), escape = escapes[next];
        out[i] = code == top ? escape : word;
        next += code == top;
    }
    for (; i < count; i++) {
        unsigned code = packed[i * bits / 8] >> (i * bits & 7) & top;
        out[i] = (WORD)((WORD)code - zero);
        next += code == top;
    }
    source->escape = next;
    return next > source->escape_end ? WRONG_ESCAPES : FINE;
}

/* The next `count` words of a source: a multiple of 8 of them, or all the rest. */
static Outcome FOR_WORD(expand)(const Task *task, Source *source, WORD *out, size_t count)
{
    Outcome outcome = FINE;
    if (source->form == 0)
        memset(out, 0, count * sizeof(WORD));
    else if (source->form == FORM_PLANES)
        FOR_WORD(merge)(source->planes, source->expanded, (WORD)0x8080808080808080u, out, count);
    else
        outcome = FOR_WORD(expand_codes)(task, source, out, count);
    source->expanded += count;
    if (source->expanded == source->size && source->escape != source->escape_end)
        outcome = WRONG_ESCAPES;
    return outcome;
}

VECTOR_LOOP static void FOR_WORD(find_keys)(const WORD *restrict words, size_t count, unsigned shift,
                                            unsigned mask, uint8_t *restrict keys)
{
    for (size_t i = 0; i < count; i++)
        keys[i] = (uint8_t)(words[i] >> shift & mask);
}

VECTOR_LOOP static void FOR_WORD(add)(const WORD *a, const WORD *restrict b, size_t count, WORD *out)
{
    /* `a` and `out` may be the same. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
    for (size_t i = 0; i < count; i++)
        out[i] = (WORD)(a[i] + b[i]);
}

#if HAS_EIGHT
/* Give each place whose key is one of some groups' the next word of its source. The first groups set
 * all places, the others change their own. */
VECTORS_INLINE void FOR_WORD(take_some)(const uint8_t *keys, size_t count, const Source *sources,
                                        const unsigned some, int is_first, WORD **cursors, WORD *out)
{
    WORD *next[TAKEN_TOGETHER];
    __m128i first[TAKEN_TOGETHER], range[TAKEN_TOGETHER];
    for (unsigned s = 0; s < some; s++) {
        next[s] = cursors[s];
        first[s] = _mm_set1_epi8((char)sources[s].first_key);
        range[s] = _mm_set1_epi8((char)(sources[s].last_key - sources[s].first_key));
    }
    for (size_t i = 0; i < count; i += 16) {
        __m128i sixteen = load_16(keys + i);
        unsigned sets[TAKEN_TOGETHER];
        for (unsigned s = 0; s < some; s++) {
            __m128i distance = _mm_sub_epi8(sixteen, first[s]);
            __m128i inside = _mm_cmpeq_epi8(_mm_min_epu8(distance, range[s]), distance);
            sets[s] = (unsigned)_mm_movemask_epi8(inside);
        }
#pragma GCC unroll 2
        for (unsigned lane = 0; lane < 16; lane += 8) {
            WORD *place = out + i + lane;
            FOR_WORD(Eight) words = FOR_WORD(spread_eight)(next[0], sets[0] >> lane & 0xff);
            next[0] += (unsigned)__builtin_popcount(sets[0] >> lane & 0xff);
#pragma GCC unroll 3
            for (unsigned s = 1; s < some; s++) {
                unsigned set = sets[s] >> lane & 0xff;
                words = FOR_WORD(or_eight)(words, FOR_WORD(spread_eight)(next[s], set));
                next[s] += (unsigned)__builtin_popcount(set);
            }
            if (!is_first)
                words = FOR_WORD(or_eight)(words, FOR_WORD(load_eight)(place));
            FOR_WORD(store_eight)(place, words);
        }
    }
    for (unsigned s = 0; s < some; s++)
        cursors[s] = next[s];
}

VECTORS static void FOR_WORD(take)(const uint8_t *keys, size_t count, const Source *sources,
                                   size_t source_count, WORD **cursors, WORD *out)
{
    size_t s = 0;
    for (; s + 4 <= source_count; s += 4)
        FOR_WORD(take_some)(keys, count, sources + s, 4, s == 0, cursors + s, out);
    switch (source_count - s) {
    case 3: FOR_WORD(take_some)(keys, count, sources + s, 3, s == 0, cursors + s, out); break;
    case 2: FOR_WORD(take_some)(keys, count, sources + s, 2, s == 0, cursors + s, out); break;
    case 1: FOR_WORD(take_some)(keys, count, sources + s, 1, s == 0, cursors + s, out); break;
    default: break;
    }
}
#endif

/* Sort the words that the sources hold into the places of a block; `cursors` move on. */
static void FOR_WORD(distribute)(const Task *task, const uint8_t *keys, size_t count,
                                 const uint8_t *source_of, WORD **cursors, WORD *out)
{
    (void)task;
#if HAS_EIGHT
    if (can_spread && count % 16 == 0) {
        FOR_WORD(take)(keys, count, task->sources, task->source_count, cursors, out);
        return;
    }
#endif
    for (size_t i = 0; i < count; i++)
        out[i] = *cursors[source_of[keys[i]]]++;
}

static Outcome FOR_WORD(rebuild)(Task *task, const WORD *prediction, size_t count, char *memory,
                                 WORD *out)
{
    WORD *start[SOURCES_MAX], *cursors[SOURCES_MAX], *ends[SOURCES_MAX];
    WORD residual[BLOCK];
    uint8_t keys[BLOCK], source_of[256];
    Outcome outcome = FINE;
    const size_t source_count = task->source_count;
    for (size_t s = 0; s < source_count; s++) {
        Source *source = &task->sources[s];
        start[s] = cursors[s] = ends[s] = (WORD *)memory + s * SOURCE_WORDS;
        memset(source_of + source->first_key, (int)s, source->last_key - source->first_key + 1);
    }
    for (size_t done = 0; done < count && outcome == FINE; done += BLOCK) {
        size_t size = count - done < BLOCK ? count - done : BLOCK;
        if (count - done >= 2 * BLOCK)
            fetch_ahead(prediction + done + BLOCK, BLOCK * sizeof(WORD));
        if (source_count == 1) {
            outcome = FOR_WORD(expand)(task, &task->sources[0], residual, size);
            FOR_WORD(add)(prediction + done, residual, size, out + done);
            continue;
        }
        for (size_t s = 0; s < source_count && outcome == FINE; s++) {
            Source *source = &task->sources[s];
            size_t left = (size_t)(ends[s] - cursors[s]);
            if (left >= size)
                continue;
            memmove(start[s], cursors[s], left * sizeof(WORD));
            cursors[s] = start[s];
            size_t more = source->size - source->expanded;
            if (more > 2 * BLOCK - left)
                more = (2 * BLOCK - left) & ~(size_t)7;
            outcome = FOR_WORD(expand)(task, source, start[s] + left, more);
            ends[s] = start[s] + left + more;
        }
        if (outcome != FINE)
            break;
        FOR_WORD(find_keys)(prediction + done, size, task->shift, task->mask, keys);
        FOR_WORD(distribute)(task, keys, size, source_of, cursors, residual);
        for (size_t s = 0; s < source_count; s++)
            if (cursors[s] > ends[s])
                return TOO_MANY_WORDS;
        FOR_WORD(add)(prediction + done, residual, size, out + done);
    }
    return outcome;
}

#undef WORD
#undef HAS_EIGHT
