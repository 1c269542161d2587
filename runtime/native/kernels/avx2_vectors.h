// What the kernels for AVX2 have in common: vectors of 8 floats.
#pragma once

#include <immintrin.h>

#include "vector_kernels.h"

namespace itune {
namespace {

struct Avx2Vectors {
    static constexpr int kLanes = 8, kColumns = 1;
    typedef float Float __attribute__((vector_size(32)));
    typedef std::int32_t Int __attribute__((vector_size(32)));
    typedef std::uint8_t Bytes __attribute__((vector_size(32)));

    static Float fma(Float a, Float b, Float c) { return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
    static void store_bytes(std::int8_t* to, Int values) {
        __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
        __m128i words = _mm_packs_epi32(low, high);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
    }
};

}  // namespace
}  // namespace itune
