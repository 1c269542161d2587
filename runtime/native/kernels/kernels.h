// The arithmetic whose speed depends on the processor's instructions, behind one table of functions.
//
// A matrix lies in memory as panels of 32 outputs, so that a product reads it once, from front to back:
//
//     float   [K] of [32 floats]
//     int8    [blocks] of { [block / 4] of [32 outputs][4 bytes along K], [32] float scales }
//     int4    [blocks] of { [block / 8] of [32 outputs][4 bytes], [32] float scales }
//             low halves of a byte are k .. k + 3, high halves k + 4 .. k + 7
//
// A weight is (code - zero) * scale, with zero 128 (int8) or 8 (int4). Blocks of 64 (int8) or 32 (int4) along K share a
// scale, as in ONNX Runtime's MatMulNBits; or all of K is one block: a scale for each output, and for each row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace itune {

constexpr int kPanel = 32;  // outputs of a panel
constexpr int kTile = 6;    // rows that a kernel multiplies at a time, at most

// Rows of activations in integers: codes from -127 to 127 with a scale for each row and block.
struct QuantizedRows {
    std::int8_t* codes;         // [rows, blocks * block size]
    float* scales;              // [rows, blocks]
    std::int32_t* sums;         // [rows, blocks]: of the codes
    std::size_t blocks, block;  // number and size, a multiple of 32
};

enum class Activation { none, relu, gelu, gelu_tanh, quick_gelu, silu };

struct Kernels {
    const char* name;
    // Products of at most kTile rows with a panel -> tile [rows, 32].
    void (*multiply_float)(const float* panel, std::size_t panel_stride, std::size_t depth, const float* x,
                           std::size_t x_stride, int rows, float* tile);
    void (*multiply_int8)(const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile);
    void (*multiply_int4)(const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile);
    // One row of activations in blocks, the last one padded with zeros.
    void (*quantize)(const float* x, std::size_t size, std::size_t block, std::int8_t* codes, float* scales,
                     std::int32_t* sums);
    void (*layer_norm)(const float* x, std::size_t size, const float* weight, const float* bias, float epsilon,
                       float* y);
    void (*activate)(Activation kind, float* x, std::size_t size);
    // x = softmax(x * scale).
    void (*softmax)(float* x, std::size_t size, float scale);
    // The sum of exp(x - largest).
    float (*sum_of_exponentials)(const float* x, std::size_t size, float largest);
    float (*largest)(const float* x, std::size_t size);
    float (*dot)(const float* x, const float* y, std::size_t size);
    // y += factor * x.
    void (*add_scaled)(float factor, const float* x, std::size_t size, float* y);
};

// The tables of this build that this processor can run, the fastest first; `portable` is always there.
struct KernelList {
    const Kernels* all[8];
    int count;
};
KernelList runnable_kernels();

const Kernels& portable_kernels();
#if defined(ITUNE_X86)
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512vnni_kernels();
#elif defined(ITUNE_ARM64)
const Kernels& neon_kernels();
const Kernels& neondot_kernels();
#endif

}  // namespace itune
