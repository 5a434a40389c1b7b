/* Eight words of each width in a vector, for processors with AVX2: what _rebuild_loops.h is made of.
 *
 * The heart is spread_eight: a run of words goes to the lanes of a set, in order, the other lanes are
 * 0. So words of several runs are merged by a spread of each and an or. */

#include <immintrin.h>

#define VECTORS __attribute__((target("avx2,popcnt")))
#define VECTORS_INLINE __attribute__((target("avx2,popcnt"), always_inline)) static inline

static int has_vectors, can_spread;

/* For each set of lanes: which word of the run each lane takes, and the same for bytes of 16-bit words.
 * Lanes outside the set have the top bit, which makes shuffles of bytes give 0. */
static uint8_t word_for[256][8], bytes_for[256][16];

static void prepare_vectors(void)
{
    for (unsigned set = 0; set < 256; set++)
        for (unsigned lane = 0, next = 0; lane < 8; lane++) {
            int is_taken = set >> lane & 1;
            word_for[set][lane] = (uint8_t)(is_taken ? next : 0x80);
            bytes_for[set][2 * lane] = (uint8_t)(is_taken ? 2 * next : 0x80);
            bytes_for[set][2 * lane + 1] = (uint8_t)(is_taken ? 2 * next + 1 : 0x80);
            next += (unsigned)is_taken;
        }
    __builtin_cpu_init();
    has_vectors = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
    can_spread = has_vectors;
}

VECTORS_INLINE __m128i load_16(const void *from)
{
    return _mm_loadu_si128((const __m128i *)from);
}

VECTORS_INLINE __m128i load_8(const void *from)
{
    return _mm_loadl_epi64((const __m128i *)from);
}

typedef __m128i Eight_uint8_t, Eight_uint16_t;
typedef __m256i Eight_uint32_t;

VECTORS_INLINE Eight_uint8_t load_eight_uint8_t(const uint8_t *from)
{
    return load_8(from);
}

VECTORS_INLINE void store_eight_uint8_t(uint8_t *to, Eight_uint8_t words)
{
    _mm_storel_epi64((__m128i *)to, words);
}

VECTORS_INLINE Eight_uint8_t or_eight_uint8_t(Eight_uint8_t a, Eight_uint8_t b)
{
    return _mm_or_si128(a, b);
}

VECTORS_INLINE Eight_uint8_t spread_eight_uint8_t(const uint8_t *from, unsigned set)
{
    return _mm_shuffle_epi8(load_8(from), load_8(word_for[set]));
}

/* small_eight: eight words from eight small signed numbers of 16 bits. */
VECTORS_INLINE Eight_uint8_t small_eight_uint8_t(__m128i numbers)
{
    return _mm_packs_epi16(numbers, numbers);
}

VECTORS_INLINE Eight_uint16_t load_eight_uint16_t(const uint16_t *from)
{
    return load_16(from);
}

VECTORS_INLINE void store_eight_uint16_t(uint16_t *to, Eight_uint16_t words)
{
    _mm_storeu_si128((__m128i *)to, words);
}

VECTORS_INLINE Eight_uint16_t or_eight_uint16_t(Eight_uint16_t a, Eight_uint16_t b)
{
    return _mm_or_si128(a, b);
}

VECTORS_INLINE Eight_uint16_t spread_eight_uint16_t(const uint16_t *from, unsigned set)
{
    return _mm_shuffle_epi8(load_16(from), load_16(bytes_for[set]));
}

VECTORS_INLINE Eight_uint16_t small_eight_uint16_t(__m128i numbers)
{
    return numbers;
}

VECTORS_INLINE Eight_uint32_t load_eight_uint32_t(const uint32_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

VECTORS_INLINE void store_eight_uint32_t(uint32_t *to, Eight_uint32_t words)
{
    _mm256_storeu_si256((__m256i *)to, words);
}

VECTORS_INLINE Eight_uint32_t or_eight_uint32_t(Eight_uint32_t a, Eight_uint32_t b)
{
    return _mm256_or_si256(a, b);
}

VECTORS_INLINE Eight_uint32_t spread_eight_uint32_t(const uint32_t *from, unsigned set)
{
    __m256i word = _mm256_cvtepi8_epi32(load_8(word_for[set]));
    __m256i words = _mm256_permutevar8x32_epi32(load_eight_uint32_t(from), word);
    return _mm256_andnot_si256(_mm256_srai_epi32(word, 31), words);
}

VECTORS_INLINE Eight_uint32_t small_eight_uint32_t(__m128i numbers)
{
    return _mm256_cvtepi16_epi32(numbers);
}
