// 64-bit ARM with dot products: most cores since 2018 (Cortex-A55 and A75, Neoverse, Apple).
#include "neon_vectors.h"

namespace itune {
namespace {

struct NeonDot : NeonVectors {
    static Int dot8(Int sums, Weights weights, Int x) { return vdotq_s32(sums, weights, vreinterpretq_s8_s32(x)); }
    static Int dot4(Int sums, Bytes codes, Int x) { return dot8(sums, vreinterpretq_s8_u8(codes), x); }
};

}  // namespace

const Kernels& neondot_kernels() {
    static constexpr Kernels kernels = VectorKernels<NeonDot>::table("neon-dot");
    return kernels;
}

}  // namespace itune
