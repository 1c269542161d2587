// AVX2 with VNNI in its 256-bit form: Intel from Alder Lake.
#include "avx2_vectors.h"

namespace itune {
namespace {

struct AvxVnni : Avx2Vectors {
    static constexpr int kZero8 = 128;
    using Weights = Bytes;

    static Weights prepare(Bytes codes) { return codes; }
    static Int dot8(Int sums, Weights weights, Int x) {
        return (Int)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
    }
    static Int dot4(Int sums, Bytes codes, Int x) { return dot8(sums, codes, x); }
};

}  // namespace

const Kernels& avxvnni_kernels() {
    static constexpr Kernels kernels = VectorKernels<AvxVnni>::table("avx-vnni");
    return kernels;
}

}  // namespace itune
