// AVX2: Intel from Haswell, AMD from Zen. `vpmaddubsw` adds two products in 16 bits, where unsigned codes of 8 bits
// would saturate. So a weight is split into its magnitude, at most 128, and its sign, which goes to the activation: two
// products are at most 2 * 128 * 127 = 32,512.
#include "avx2_vectors.h"

namespace itune {
namespace {

struct Avx2 : Avx2Vectors {
    static constexpr int kZero8 = 0;
    struct Weights {
        __m256i magnitudes, signs;
    };

    static Weights prepare(Bytes codes) {
        __m256i weights = (__m256i)(codes ^ 128);  // code - 128
        return {_mm256_abs_epi8(weights), weights};
    }
    static Int dot8(Int sums, Weights weights, Int x) {
        return add_pairs(sums, _mm256_maddubs_epi16(weights.magnitudes, _mm256_sign_epi8((__m256i)x, weights.signs)));
    }
    static Int dot4(Int sums, Bytes codes, Int x) {
        return add_pairs(sums, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
    }
    static Int add_pairs(Int sums, __m256i pairs) { return sums + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
};

}  // namespace

const Kernels& avx2_kernels() {
    static constexpr Kernels kernels = VectorKernels<Avx2>::table("avx2");
    return kernels;
}

}  // namespace itune
