// AVX-512 with VNNI: Intel from Ice Lake, AMD from Zen 4. `vpdpbusd` multiplies unsigned by signed bytes and adds four
// products to each 32-bit lane without saturation, so the codes of the weights are used as they are.
#include <immintrin.h>

#include "vector_kernels.h"

namespace itune {
namespace {

struct Avx512Vnni {
    static constexpr int kLanes = 16, kColumns = 2, kZero8 = 128;
    typedef float Float __attribute__((vector_size(64)));
    typedef std::int32_t Int __attribute__((vector_size(64)));
    typedef std::uint8_t Bytes __attribute__((vector_size(64)));
    using Weights = Bytes;

    static Float fma(Float a, Float b, Float c) { return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
    static Weights prepare(Bytes codes) { return codes; }
    static Int dot8(Int sums, Weights weights, Int x) {
        return (Int)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x);
    }
    static Int dot4(Int sums, Bytes codes, Int x) { return dot8(sums, codes, x); }
    static void store_bytes(std::int8_t* to, Int values) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
    }
};

}  // namespace

const Kernels& avx512vnni_kernels() {
    static constexpr Kernels kernels = VectorKernels<Avx512Vnni>::table("avx512-vnni");
    return kernels;
}

}  // namespace itune
