// A constant matrix, packed into panels (kernels.h), and its products with rows of activations.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/kernels.h"
#include "pool.h"

namespace itune {

// Memory for vectors: aligned to a cache line, not initialised.
template <typename T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(std::size_t size) { reserve(size); }
    // Room for `size` elements; what was there is lost if the buffer grows.
    void reserve(std::size_t size) {
        if (size <= size_) return;
        memory_.reset(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kAlignment})));
        size_ = size;
    }
    T* data() const { return memory_.get(); }

  private:
    struct Free {
        void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
    };
    static constexpr std::size_t kAlignment = 64;
    std::unique_ptr<T, Free> memory_;
    std::size_t size_ = 0;
};

// Memory for matrices, one behind the other: small pages would limit the speed at which many matrices are read.
class Arena {
  public:
    // `bytes` that live as long as the result.
    std::shared_ptr<std::uint8_t> take(std::size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > left_) {
            left_ = std::max(bytes, kChunk);
            chunk_.reset(static_cast<std::uint8_t*>(::operator new(left_, std::align_val_t{kHugePage})),
                         [](std::uint8_t* memory) { ::operator delete(memory, std::align_val_t{kHugePage}); });
            next_ = chunk_.get();
#if defined(MADV_HUGEPAGE)
            madvise(next_, left_, MADV_HUGEPAGE);
#endif
        }
        std::shared_ptr<std::uint8_t> taken(chunk_, next_);
        next_ += bytes;
        left_ -= bytes;
        return taken;
    }

  private:
    static constexpr std::size_t kHugePage = std::size_t{2} << 20, kChunk = 16 * kHugePage;
    std::shared_ptr<std::uint8_t> chunk_;
    std::uint8_t* next_ = nullptr;
    std::size_t left_ = 0;
};

// Rows of activations [rows, width], and the same in integers, by blocks, for a product that needs them.
class Activations {
  public:
    void resize(std::size_t rows, std::size_t width) {
        width_ = width;
        values_.reserve(rows * width);
    }
    float* row(std::size_t r) const { return values_.data() + r * width_; }
    std::size_t width() const { return width_; }

    // Room for the rows in integers; block 0 is none.
    void prepare(std::size_t rows, std::size_t block) {
        block_ = block;
        if (block == 0) return;
        blocks_ = (width_ + block - 1) / block;
        codes_.reserve(rows * blocks_ * block);
        scales_.reserve(rows * blocks_);
        sums_.reserve(rows * blocks_);
    }
    void quantize(const Kernels& kernels, std::size_t r) const {
        if (block_ == 0) return;
        QuantizedRows x = quantized(r);
        kernels.quantize(row(r), width_, block_, x.codes, x.scales, x.sums);
    }
    QuantizedRows quantized(std::size_t r) const {
        return {codes_.data() + r * blocks_ * block_, scales_.data() + r * blocks_, sums_.data() + r * blocks_, blocks_,
                block_};
    }

  private:
    std::size_t width_ = 0, block_ = 0, blocks_ = 0;
    Buffer<float> values_, scales_;
    Buffer<std::int8_t> codes_;
    Buffer<std::int32_t> sums_;
};

class Matrix {
  public:
    enum class Kind { float32, int8, int4 };

    Matrix() = default;

    // weight [K, N], or [N, K] if `transposed`.
    static Matrix pack_float(Arena& arena, const float* weight, std::size_t outputs, std::size_t depth,
                             bool transposed) {
        Matrix matrix(arena, Kind::float32, outputs, depth, depth * kPanel * sizeof(float), 0);
        for (std::size_t number = 0; number < matrix.panels(); ++number) {
            float* to = reinterpret_cast<float*>(matrix.panel(number));
            std::size_t first = number * kPanel, columns = std::min<std::size_t>(kPanel, outputs - first);
            if (columns < kPanel) std::fill_n(to, depth * kPanel, 0.0F);
            for (std::size_t k = 0; k < depth && !transposed; ++k) {
                std::memcpy(to + k * kPanel, weight + k * outputs + first, columns * sizeof(float));
            }
            for (std::size_t n = 0; n < columns && transposed; ++n) {
                for (std::size_t k = 0; k < depth; ++k) to[k * kPanel + n] = weight[(first + n) * depth + k];
            }
        }
        return matrix;
    }

    // codes [N, blocks, bytes of a block] and scales [N, blocks], as in MatMulNBits.
    static Matrix pack_blocks(Arena& arena, Kind kind, const std::uint8_t* codes, const float* scales,
                              std::size_t outputs, std::size_t depth) {
        std::size_t block = kind == Kind::int8 ? 64 : 32, blocks = (depth + block - 1) / block;
        std::size_t bytes = kind == Kind::int8 ? 64 : 16;  // of a block of one output
        std::size_t size = bytes * kPanel + kPanel * sizeof(float);
        Matrix matrix(arena, kind, outputs, depth, blocks * size, block);
        for (std::size_t n = 0; n < matrix.panels() * kPanel; ++n) {
            std::uint8_t* to = matrix.panel(n / kPanel);
            std::size_t lane = n % kPanel;
            for (std::size_t b = 0; b < blocks; ++b, to += size) {
                bool real = n < outputs;
                const std::uint8_t* from = codes + (n * blocks + b) * bytes;
                for (std::size_t i = 0; i < bytes; i += 4) {
                    std::uint32_t four = 0;
                    if (real) std::memcpy(&four, from + i, 4);
                    if (kind == Kind::int4) four = spread_pairs(four);
                    std::memcpy(to + (i * kPanel + lane * 4), &four, 4);
                }
                float scale = real ? scales[n * blocks + b] : 0.0F;
                std::memcpy(to + bytes * kPanel + lane * sizeof(float), &scale, sizeof scale);
            }
        }
        return matrix;
    }

    // codes [K, N] from -127 to 127 and scales [N]: all of K is one block.
    static Matrix pack_columns(Arena& arena, const std::int8_t* codes, const float* scales, std::size_t outputs,
                               std::size_t depth) {
        std::size_t block = (depth + 63) / 64 * 64, size = block * kPanel + kPanel * sizeof(float);
        Matrix matrix(arena, Kind::int8, outputs, depth, size, block);
        for (std::size_t number = 0; number < matrix.panels(); ++number) {
            std::uint8_t* to = matrix.panel(number);
            std::size_t columns = std::min<std::size_t>(kPanel, outputs - number * kPanel);
            std::memset(to, 128, block * kPanel);
            std::memset(to + block * kPanel, 0, kPanel * sizeof(float));
            for (std::size_t k = 0; k < depth; ++k) {
                const std::int8_t* from = codes + k * outputs + number * kPanel;
                for (std::size_t n = 0; n < columns; ++n) {
                    to[(k / 4 * kPanel + n) * 4 + k % 4] = static_cast<std::uint8_t>(from[n] + 128);
                }
            }
            std::memcpy(to + block * kPanel, scales + number * kPanel, columns * sizeof(float));
        }
        return matrix;
    }

    std::size_t outputs() const { return outputs_; }
    std::size_t depth() const { return depth_; }
    std::size_t panels() const { return (outputs_ + kPanel - 1) / kPanel; }
    std::size_t bytes() const { return panels() * stride_; }
    // Activations to multiply must be in integers by blocks of this size; 0: floats.
    std::size_t block() const { return block_; }

    // tile [rows, 32]: the products of `rows` rows from `first` on with a panel; at most kTile rows.
    void multiply(const Kernels& kernels, std::size_t number, const Activations& x, std::size_t first, int rows,
                  float* tile) const {
        const std::uint8_t* from = panel(number);
        if (kind_ == Kind::float32) {
            kernels.multiply_float(reinterpret_cast<const float*>(from), kPanel, depth_, x.row(first), x.width(), rows,
                                   tile);
        } else {
            (kind_ == Kind::int8 ? kernels.multiply_int8 : kernels.multiply_int4)(from, x.quantized(first), rows, tile);
        }
    }

    // The weights of output n [K]: a row of a table of embeddings.
    void read(std::size_t n, float* to) const {
        const std::uint8_t* from = panel(n / kPanel);
        std::size_t lane = n % kPanel;
        for (std::size_t k = 0; k < depth_; ++k) {
            if (kind_ == Kind::float32) {
                to[k] = reinterpret_cast<const float*>(from)[k * kPanel + lane];
                continue;
            }
            std::size_t bytes = kind_ == Kind::int8 ? block_ : block_ / 2, in_block = k % block_;
            const std::uint8_t* start = from + k / block_ * (bytes * kPanel + kPanel * sizeof(float));
            float scale = reinterpret_cast<const float*>(start + bytes * kPanel)[lane];
            if (kind_ == Kind::int8) {
                to[k] = static_cast<float>(start[(in_block / 4 * kPanel + lane) * 4 + in_block % 4] - 128) * scale;
            } else {
                int pair = start[(in_block / 8 * kPanel + lane) * 4 + in_block % 4];
                to[k] = static_cast<float>((pair >> (in_block % 8 < 4 ? 0 : 4) & 15) - 8) * scale;
            }
        }
    }

  private:
    // Eight codes of 4 bits, neighbours in a byte: 10 32 54 76 -> 40 51 62 73.
    static std::uint32_t spread_pairs(std::uint32_t pairs) {
        std::uint32_t spread = 0;
        for (int k = 0; k < 4; ++k) {
            spread |= (pairs >> 4 * k & 15) << 8 * k | (pairs >> (4 * k + 16) & 15) << (8 * k + 4);
        }
        return spread;
    }

    Matrix(Arena& arena, Kind kind, std::size_t outputs, std::size_t depth, std::size_t stride, std::size_t block)
        : kind_(kind),
          outputs_(outputs),
          depth_(depth),
          stride_(stride),
          block_(block),
          memory_(arena.take(panels() * stride)) {}
    std::uint8_t* panel(std::size_t number) const { return memory_.get() + number * stride_; }

    Kind kind_ = Kind::float32;
    std::size_t outputs_ = 0, depth_ = 0, stride_ = 0, block_ = 0;  // stride: bytes of a panel
    std::shared_ptr<std::uint8_t> memory_;
};

// Kernels and threads: what computes.
class Executor {
  public:
    Executor(const Kernels& kernels, int threads) : kernels(&kernels), pool_(std::make_unique<Pool>(threads)) {}
    Pool& pool() const { return *pool_; }

    // Calls store(panel, row, tile of one row [32]) for all products of x [rows, K] with a matrix.
    // A thread takes several panels that follow each other, and multiplies all rows by one panel before the next:
    // weights come from memory once.
    template <typename Store>
    void multiply(const Matrix& matrix, const Activations& x, std::size_t rows, Store&& store) const {
        std::size_t panels = matrix.panels(), parts = std::min<std::size_t>(panels, 4 * pool_->threads());
        pool_->run(parts, [&](std::size_t part, int) {
            alignas(64) float tile[kTile * kPanel];
            for (std::size_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
                for (std::size_t first = 0; first < rows; first += kTile) {
                    int count = static_cast<int>(std::min<std::size_t>(kTile, rows - first));
                    matrix.multiply(*kernels, panel, x, first, count, tile);
                    for (int r = 0; r < count; ++r) store(panel, first + r, tile + r * kPanel);
                }
            }
        });
    }

    const Kernels* kernels;

  private:
    std::unique_ptr<Pool> pool_;
};

}  // namespace itune
