// Every kernel in plain C++: what the others must compute, and what runs on any processor.
//
// The integer sums are exact, so the others differ by the rounding of floats only.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace itune {
namespace {

void multiply_float(const float* panel, std::size_t panel_stride, std::size_t depth, const float* x,
                    std::size_t x_stride, int rows, float* tile) {
    std::fill(tile, tile + rows * kPanel, 0.0F);
    for (std::size_t k = 0; k < depth; ++k) {
        for (int r = 0; r < rows; ++r) {
            for (int n = 0; n < kPanel; ++n) tile[r * kPanel + n] += x[r * x_stride + k] * panel[k * panel_stride + n];
        }
    }
}

// `code(block, k, n)` reads one code of `bits`.
template <int bits, typename Code>
void multiply_integers(const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile, Code code) {
    constexpr int zero = 1 << (bits - 1);
    std::size_t size = x.block * bits / 8 * kPanel, block = x.block;
    std::fill(tile, tile + rows * kPanel, 0.0F);
    for (std::size_t b = 0; b < x.blocks; ++b, panel += size + kPanel * sizeof(float)) {
        const float* scales = reinterpret_cast<const float*>(panel + size);
        for (int r = 0; r < rows; ++r) {
            const std::int8_t* codes = x.codes + (r * x.blocks + b) * block;
            for (int n = 0; n < kPanel; ++n) {
                std::int32_t sum = -zero * x.sums[r * x.blocks + b];
                for (std::size_t k = 0; k < block; ++k) sum += codes[k] * code(panel, k, n);
                tile[r * kPanel + n] += static_cast<float>(sum) * (x.scales[r * x.blocks + b] * scales[n]);
            }
        }
    }
}

void multiply_int8(const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile) {
    multiply_integers<8>(panel, x, rows, tile, [](const std::uint8_t* codes, std::size_t k, int n) -> int {
        return codes[(k / 4 * kPanel + n) * 4 + k % 4];
    });
}

void multiply_int4(const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile) {
    multiply_integers<4>(panel, x, rows, tile, [](const std::uint8_t* codes, std::size_t k, int n) -> int {
        return codes[(k / 8 * kPanel + n) * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15;
    });
}

void quantize(const float* x, std::size_t size, std::size_t block, std::int8_t* codes, float* scales,
              std::int32_t* sums) {
    for (std::size_t start = 0; start < size; start += block) {
        float largest = 0;
        for (std::size_t k = start; k < std::min(start + block, size); ++k) {
            if (!(std::fabs(x[k]) <= largest) && !std::isnan(largest)) largest = std::fabs(x[k]);  // NaN stays
        }
        float inverse = largest > 0 ? 127.0F / largest : 0.0F;
        *scales++ = largest / 127.0F;
        *sums = 0;
        for (std::size_t k = start; k < start + block; ++k) {
            codes[k] = k < size && inverse > 0 ? static_cast<std::int8_t>(std::nearbyint(x[k] * inverse)) : 0;
            *sums += codes[k];
        }
        ++sums;
    }
}

void layer_norm(const float* x, std::size_t size, const float* weight, const float* bias, float epsilon, float* y) {
    float mean = 0, variance = 0;
    for (std::size_t i = 0; i < size; ++i) mean += x[i];
    mean /= static_cast<float>(size);
    for (std::size_t i = 0; i < size; ++i) variance += (x[i] - mean) * (x[i] - mean);
    float factor = 1 / std::sqrt(variance / static_cast<float>(size) + epsilon);
    for (std::size_t i = 0; i < size; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

float activated(Activation kind, float x) {
    switch (kind) {
        case Activation::relu: return x < 0 ? 0 : x;
        case Activation::gelu: return x / 2 * (1 + std::erf(x * 0.70710678F));
        case Activation::gelu_tanh: return x / 2 * (1 + std::tanh(0.79788456F * (x + 0.044715F * x * x * x)));
        case Activation::quick_gelu: return x / (1 + std::exp(-1.702F * x));
        case Activation::silu: return x / (1 + std::exp(-x));
        default: return x;
    }
}

void activate(Activation kind, float* x, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) x[i] = activated(kind, x[i]);
}

float sum_of_exponentials(const float* x, std::size_t size, float largest) {
    float sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += std::exp(x[i] - largest);
    return sum;
}

void softmax(float* x, std::size_t size, float scale) {
    float largest = *std::max_element(x, x + size), sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += x[i] = std::exp((x[i] - largest) * scale);
    for (std::size_t i = 0; i < size; ++i) x[i] /= sum;
}

float largest(const float* x, std::size_t size) { return *std::max_element(x, x + size); }

float dot(const float* x, const float* y, std::size_t size) {
    float sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
}

void add_scaled(float factor, const float* x, std::size_t size, float* y) {
    for (std::size_t i = 0; i < size; ++i) y[i] += factor * x[i];
}

}  // namespace

const Kernels& portable_kernels() {
    static const Kernels kernels{"portable", multiply_float, multiply_int8,       multiply_int4, quantize, layer_norm,
                                 activate,   softmax,        sum_of_exponentials, largest,       dot,      add_scaled};
    return kernels;
}

}  // namespace itune
