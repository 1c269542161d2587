// 64-bit ARM without dot products (Cortex-A53, A72): products in 16 bits, added in pairs.
#include "neon_vectors.h"

namespace itune {
namespace {

struct Neon : NeonVectors {
    static Int dot8(Int sums, Weights weights, Int x) {
        int8x16_t values = vreinterpretq_s8_s32(x);
        int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(values)));
        int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(weights), vget_high_s8(values)));
        return vaddq_s32(sums, vpaddq_s32(low, high));
    }
    static Int dot4(Int sums, Bytes codes, Int x) { return dot8(sums, vreinterpretq_s8_u8(codes), x); }
};

}  // namespace

const Kernels& neon_kernels() {
    static constexpr Kernels kernels = VectorKernels<Neon>::table("neon");
    return kernels;
}

}  // namespace itune
