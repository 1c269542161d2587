// What the kernels for 64-bit ARM have in common: vectors of 4 floats.
#pragma once

#include <arm_neon.h>

#include "vector_kernels.h"

namespace itune {
namespace {

struct NeonVectors {
    static constexpr int kLanes = 4, kColumns = 2, kZero8 = 0;
    using Float = float32x4_t;
    using Int = int32x4_t;
    using Bytes = uint8x16_t;
    using Weights = int8x16_t;

    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static Weights prepare(Bytes codes) { return vreinterpretq_s8_u8(codes ^ vdupq_n_u8(128)); }  // code - 128
    static void store_bytes(std::int8_t* to, Int values) {
        int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(values), vdup_n_s16(0)));
        vst1_lane_s32(reinterpret_cast<std::int32_t*>(to), vreinterpret_s32_s8(bytes), 0);
    }
};

}  // namespace
}  // namespace itune
