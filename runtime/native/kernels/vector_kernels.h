// The kernels for any instruction set with vectors: a file that includes this gives an `Isa` and gets a table.
//
// A tile of 6 rows x 32 outputs stays in registers: each vector of weights is loaded once and meets one broadcast
// activation of each row. Whatever the number of rows, a row's sums are formed in the same order, so that no row
// depends on its neighbours, not even in its last bit.
//
// `Isa` has kLanes, floats in a vector; Float and Int, vectors of so many numbers, and Bytes, of 4 * kLanes bytes;
// kColumns, the vectors that share the loads of the activations; fma(a, b, c) = a * b + c; and
//     prepare(Bytes codes) -> Weights      weights of 8 bits, once for all rows
//     dot8(Int sums, Weights, Int x)       adds the products of 4 neighbours in each lane
//     dot4(Int sums, Bytes codes, Int x)   the same for codes from 0 to 15
//     kZero8                               what `prepare` leaves in the codes: 128, or 0 if it subtracts it
//
// Each file is compiled for its own processor. So that the linker cannot take a function of one file for that of
// another, everything here has internal linkage, and no header with inline functions of its own is included.
#pragma once

#include "kernels.h"

namespace itune {
namespace {

template <typename Isa>
struct VectorKernels {
    using Float = typename Isa::Float;
    using Int = typename Isa::Int;
    using Bytes = typename Isa::Bytes;
    static constexpr int kLanes = Isa::kLanes, kVectors = kPanel / kLanes, kColumns = Isa::kColumns;

    template <typename Vector, typename T>
    static Vector load(const T* from) {
        Vector value;
        __builtin_memcpy(&value, from, sizeof value);
        return value;
    }
    template <typename Vector, typename T>
    static void store(T* to, Vector value) {
        __builtin_memcpy(to, &value, sizeof value);
    }
    // x - 0 is x for all numbers, 0 and NaN included, so that no subtraction remains.
    static Float all(float value) { return value - Float{}; }
    static Int all_int(std::int32_t value) { return value - Int{}; }
    static Float to_float(Int value) { return __builtin_convertvector(value, Float); }

    // Ask for what is needed soon, in the second-level cache: the processor itself stops at the end of a page.
    static void prefetch(const std::uint8_t* place) {
        for (int c = 0; c < kColumns * kLanes * 4; c += 64) __builtin_prefetch(place + 4096 + c, 0, 2);
    }

    // Products

    template <int rows>
    static void multiply_float(const float* panel, std::size_t panel_stride, std::size_t depth, const float* x,
                               std::size_t x_stride, float* tile) {
        for (int first = 0; first < kVectors; first += kColumns) {
            Float sums[rows][kColumns] = {};
            for (std::size_t k = 0; k < depth; ++k) {
                prefetch(reinterpret_cast<const std::uint8_t*>(panel + k * panel_stride + first * kLanes));
                Float weights[kColumns];
                for (int c = 0; c < kColumns; ++c) {
                    weights[c] = load<Float>(panel + k * panel_stride + (first + c) * kLanes);
                }
                for (int r = 0; r < rows; ++r) {
                    Float value = all(x[r * x_stride + k]);
                    for (int c = 0; c < kColumns; ++c) sums[r][c] = Isa::fma(value, weights[c], sums[r][c]);
                }
            }
            for (int r = 0; r < rows; ++r) {
                for (int c = 0; c < kColumns; ++c) store(tile + r * kPanel + (first + c) * kLanes, sums[r][c]);
            }
        }
    }

    template <int rows>
    static void multiply_int8(const std::uint8_t* panel, const QuantizedRows& x, float* tile) {
        Float sums[rows][kVectors] = {};
        const std::size_t size = x.block * kPanel;
        for (std::size_t b = 0; b < x.blocks; ++b, panel += size + kPanel * sizeof(float)) {
            for (int first = 0; first < kVectors; first += kColumns) {
                Int found[rows][kColumns];
                for (int r = 0; r < rows; ++r) {
                    for (int c = 0; c < kColumns; ++c) found[r][c] = all_int(-Isa::kZero8 * x.sums[r * x.blocks + b]);
                }
                for (std::size_t k = 0; k < x.block / 4; ++k) {
                    prefetch(panel + (k * kPanel + first * kLanes) * 4);
                    typename Isa::Weights weights[kColumns];
                    for (int c = 0; c < kColumns; ++c) {
                        weights[c] = Isa::prepare(load<Bytes>(panel + (k * kPanel + (first + c) * kLanes) * 4));
                    }
                    for (int r = 0; r < rows; ++r) {
                        Int value = all_int(load<std::int32_t>(x.codes + (r * x.blocks + b) * x.block + k * 4));
                        for (int c = 0; c < kColumns; ++c) found[r][c] = Isa::dot8(found[r][c], weights[c], value);
                    }
                }
                add<rows>(found, x, b, panel + size, first, sums);
            }
        }
        store_tile<rows>(sums, tile);
    }

    template <int rows>
    static void multiply_int4(const std::uint8_t* panel, const QuantizedRows& x, float* tile) {
        Float sums[rows][kVectors] = {};
        const std::size_t size = x.block / 2 * kPanel;
        for (std::size_t b = 0; b < x.blocks; ++b, panel += size + kPanel * sizeof(float)) {
            for (int first = 0; first < kVectors; first += kColumns) {
                Int found[rows][kColumns];
                for (int r = 0; r < rows; ++r) {
                    for (int c = 0; c < kColumns; ++c) found[r][c] = all_int(-8 * x.sums[r * x.blocks + b]);
                }
                for (std::size_t k = 0; k < x.block / 8; ++k) {
                    prefetch(panel + (k * kPanel + first * kLanes) * 4);
                    Bytes low[kColumns], high[kColumns];
                    for (int c = 0; c < kColumns; ++c) {
                        Bytes pairs = load<Bytes>(panel + (k * kPanel + (first + c) * kLanes) * 4);
                        low[c] = pairs & 15;
                        high[c] = pairs >> 4;
                    }
                    for (int r = 0; r < rows; ++r) {
                        const std::int8_t* codes = x.codes + (r * x.blocks + b) * x.block + k * 8;
                        Int lower = all_int(load<std::int32_t>(codes)), upper = all_int(load<std::int32_t>(codes + 4));
                        for (int c = 0; c < kColumns; ++c) {
                            found[r][c] = Isa::dot4(Isa::dot4(found[r][c], low[c], lower), high[c], upper);
                        }
                    }
                }
                add<rows>(found, x, b, panel + size, first, sums);
            }
        }
        store_tile<rows>(sums, tile);
    }

    // sums += integers * scales of block b.
    template <int rows>
    static void add(const Int (&found)[rows][kColumns], const QuantizedRows& x, std::size_t b,
                    const std::uint8_t* scales, int first, Float (&sums)[rows][kVectors]) {
        for (int c = 0; c < kColumns; ++c) {
            Float scale = load<Float>(scales + (first + c) * kLanes * sizeof(float));
            for (int r = 0; r < rows; ++r) {
                Float& sum = sums[r][first + c];
                sum = Isa::fma(to_float(found[r][c]), scale * all(x.scales[r * x.blocks + b]), sum);
            }
        }
    }

    template <int rows>
    static void store_tile(const Float (&sums)[rows][kVectors], float* tile) {
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < kVectors; ++c) store(tile + r * kPanel + c * kLanes, sums[r][c]);
        }
    }

    // Elementwise

    static Float largest_of(Float a, Float b) { return a > b ? a : b; }
    static Float absolute(Float x) { return reinterpret_cast<Float>(reinterpret_cast<Int>(x) & 0x7FFFFFFF); }
    // The nearest whole number, for magnitudes below 2^22.
    static Float rounded(Float x) { return (x + 12582912.0F) - 12582912.0F; }

    // 2^n exp(r) with |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial of degree 7; NaN stays NaN.
    static Float exponential(Float x) {
        x = x < -87.0F ? all(-87.0F) : x;
        x = x > 88.0F ? all(88.0F) : x;
        Float n = rounded(x * 1.44269504F);
        Float r = Isa::fma(n, all(-0.693359375F), x);
        r = Isa::fma(n, all(2.12194440e-4F), r);
        Float value = all(1.0F / 5040);
        constexpr float factors[] = {1.0F / 720, 1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F};
        for (float factor : factors) {
            value = Isa::fma(value, r, all(factor));
        }
        Int power = (__builtin_convertvector(n, Int) + 127) << 23;
        return value * reinterpret_cast<Float>(power);
    }

    // Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26: to 1.5e-7.
    static Float error_function(Float x) {
        Float size = absolute(x), t = 1.0F / (1.0F + 0.3275911F * size), sum = all(1.061405429F);
        constexpr float factors[] = {-1.453152027F, 1.421413741F, -0.284496736F, 0.254829592F};
        for (float factor : factors) {
            sum = Isa::fma(sum, t, all(factor));
        }
        Float value = 1.0F - sum * t * exponential(-size * size);
        return x < 0.0F ? -value : value;
    }

    template <Activation kind>
    static Float activated(Float x) {
        switch (kind) {
            case Activation::relu: return x < 0.0F ? all(0) : x;
            case Activation::gelu: return x * 0.5F * (1.0F + error_function(x * 0.70710678F));
            case Activation::gelu_tanh: {  // tanh(u) = 2 sigmoid(2 u) - 1
                Float u = 0.79788456F * (x + 0.044715F * x * x * x);
                return x / (1.0F + exponential(-2.0F * u));
            }
            case Activation::quick_gelu: return x / (1.0F + exponential(-1.702F * x));
            case Activation::silu: return x / (1.0F + exponential(-x));
            default: return x;
        }
    }

    // Calls f(vector) -> vector for x [size] and stores the results in y; the last vector is padded with `padding`.
    template <typename F>
    static void map(const float* x, std::size_t size, float padding, float* y, F f) {
        std::size_t i = 0;
        for (; i + kLanes <= size; i += kLanes) store(y + i, f(load<Float>(x + i), i));
        if (i == size) return;
        Float rest = all(padding);
        __builtin_memcpy(&rest, x + i, (size - i) * sizeof(float));
        rest = f(rest, i);
        __builtin_memcpy(y + i, &rest, (size - i) * sizeof(float));
    }
    // Calls f(vector, place) for x [size]; the last vector is padded.
    template <typename F>
    static void each(const float* x, std::size_t size, float padding, F f) {
        std::size_t i = 0;
        for (; i + kLanes <= size; i += kLanes) f(load<Float>(x + i), i);
        if (i == size) return;
        Float rest = all(padding);
        __builtin_memcpy(&rest, x + i, (size - i) * sizeof(float));
        f(rest, i);
    }
    static Float part(const float* x, std::size_t i, std::size_t size) {
        if (i + kLanes <= size) return load<Float>(x + i);
        Float rest{};
        __builtin_memcpy(&rest, x + i, (size - i) * sizeof(float));
        return rest;
    }
    // One number from the lanes: f of both halves, until two lanes are left.
    template <typename T, int lanes = kLanes, typename Vector, typename F>
    static T reduce(Vector x, F f) {
        if constexpr (lanes == 2) {
            return f(x[0], x[1]);
        } else {
            typedef T Half __attribute__((vector_size(lanes / 2 * sizeof(T))));
            Half halves[2];
            __builtin_memcpy(halves, &x, sizeof halves);
            return reduce<T, lanes / 2>(f(halves[0], halves[1]), f);
        }
    }
    static float total(Float x) {
        return reduce<float>(x, [](auto a, auto b) { return a + b; });
    }

    static void quantize(const float* x, std::size_t size, std::size_t block, std::int8_t* codes, float* scales,
                         std::int32_t* sums) {
        for (std::size_t start = 0; start < size; start += block) {
            std::size_t end = start + block < size ? start + block : size;
            Int most{};  // magnitudes have the order of their bits; NaN is above all, so that it is never lost
            each(x + start, end - start, 0, [&](Float value, std::size_t) {
                Int bits = reinterpret_cast<Int>(absolute(value));
                most = bits > most ? bits : most;
            });
            std::int32_t bits = reduce<std::int32_t>(most, [](auto a, auto b) { return a > b ? a : b; });
            float magnitude = __builtin_bit_cast(float, bits), inverse = magnitude > 0 ? 127.0F / magnitude : 0.0F;
            *scales++ = magnitude / 127.0F;
            Int sum{};
            for (std::size_t i = start; i < start + block; i += kLanes) {
                Float value = i < size ? part(x, i, size) : Float{};
                Int code = __builtin_convertvector(rounded(value * inverse), Int);
                sum += code;
                Isa::store_bytes(codes + i, code);
            }
            *sums++ = reduce<std::int32_t>(sum, [](auto a, auto b) { return a + b; });
        }
    }

    static void layer_norm(const float* x, std::size_t size, const float* weight, const float* bias, float epsilon,
                           float* y) {
        Float sum{}, squares{};
        each(x, size, 0, [&](Float value, std::size_t) { sum += value; });
        float mean = total(sum) / static_cast<float>(size);
        each(x, size, mean, [&](Float value, std::size_t) { squares = Isa::fma(value - mean, value - mean, squares); });
        float variance = total(squares) / static_cast<float>(size);
        float factor = 1 / __builtin_sqrtf(variance + epsilon);
        map(x, size, 0, y, [&](Float value, std::size_t i) {
            return Isa::fma((value - mean) * factor, part(weight, i, size), part(bias, i, size));
        });
    }

    template <Activation kind>
    static void activate_all(float* x, std::size_t size) {
        map(x, size, 0, x, [&](Float value, std::size_t) { return activated<kind>(value); });
    }
    static void activate(Activation kind, float* x, std::size_t size) {
        switch (kind) {
            case Activation::relu: return activate_all<Activation::relu>(x, size);
            case Activation::gelu: return activate_all<Activation::gelu>(x, size);
            case Activation::gelu_tanh: return activate_all<Activation::gelu_tanh>(x, size);
            case Activation::quick_gelu: return activate_all<Activation::quick_gelu>(x, size);
            case Activation::silu: return activate_all<Activation::silu>(x, size);
            default: return;
        }
    }

    static float sum_of_exponentials(const float* x, std::size_t size, float most) {
        Float sum{};
        each(x, size, -__builtin_inff(), [&](Float value, std::size_t) { sum += exponential(value - most); });
        // The exponential of the padding is not 0 but 1e-38, which no sum notices.
        return total(sum);
    }

    static void softmax(float* x, std::size_t size, float scale) {
        Float sum{};
        float maximum = largest(x, size);
        map(x, size, -__builtin_inff(), x, [&](Float value, std::size_t) {
            Float found = exponential((value - maximum) * scale);
            sum += found;
            return found;
        });
        float factor = 1 / total(sum);
        map(x, size, 0, x, [&](Float value, std::size_t) { return value * factor; });
    }

    static float largest(const float* x, std::size_t size) {
        Float most = all(-__builtin_inff());
        each(x, size, -__builtin_inff(), [&](Float value, std::size_t) { most = largest_of(value, most); });
        return reduce<float>(most, [](auto a, auto b) { return a > b ? a : b; });
    }

    static float dot(const float* x, const float* y, std::size_t size) {
        Float sum{};
        each(x, size, 0, [&](Float value, std::size_t i) { sum = Isa::fma(value, part(y, i, size), sum); });
        return total(sum);
    }

    static void add_scaled(float factor, const float* x, std::size_t size, float* y) {
        map(y, size, 0, y, [&](Float value, std::size_t i) { return Isa::fma(part(x, i, size), all(factor), value); });
    }

    // The table

    template <typename F>
    static void by_rows(int rows, F f) {
        switch (rows) {
            case 1: return f.template operator()<1>();
            case 2: return f.template operator()<2>();
            case 3: return f.template operator()<3>();
            case 4: return f.template operator()<4>();
            case 5: return f.template operator()<5>();
            default: return f.template operator()<6>();
        }
    }

    static constexpr Kernels table(const char* name) {
        return {name,
                [](const float* panel, std::size_t panel_stride, std::size_t depth, const float* x,
                   std::size_t x_stride, int rows, float* tile) {
                    by_rows(rows, [&]<int n>() { multiply_float<n>(panel, panel_stride, depth, x, x_stride, tile); });
                },
                [](const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile) {
                    by_rows(rows, [&]<int n>() { multiply_int8<n>(panel, x, tile); });
                },
                [](const std::uint8_t* panel, const QuantizedRows& x, int rows, float* tile) {
                    by_rows(rows, [&]<int n>() { multiply_int4<n>(panel, x, tile); });
                },
                quantize,
                layer_norm,
                activate,
                softmax,
                sum_of_exponentials,
                largest,
                dot,
                add_scaled};
    }
};

}  // namespace
}  // namespace itune
