// What a decoder remembers of some images: keys and values of the image, and the cache of their rows.
//
// The cache never moves. Each token that a row reads gets a slot, and a row is a list of slots, one for each position:
//
//     slots   0  1  2 | 3  4 | 5  6 | ...          a step adds one for each token
//     row 0   0  1  2   3      6                   row 1 of a step continues row 0 of the step before:
//     row 1   0  1  2   3      5                   its list is copied, its keys and values are not
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace itune {

class State {
  public:
    // Keys [images, heads, w, N] and values [images, heads, N, w] of an adapted layer, copied into padded rows.
    struct Visual {
        std::size_t heads = 0, width = 0, tokens = 0, key_stride = 0, value_stride = 0;
        std::shared_ptr<float> keys, values;

        const float* keys_of(std::size_t image, std::size_t head) const {
            return keys.get() + (image * heads + head) * width * key_stride;
        }
        const float* values_of(std::size_t image, std::size_t head) const {
            return values.get() + (image * heads + head) * tokens * value_stride;
        }
    };

    State(std::size_t images, std::size_t layers, std::size_t width) : layers_(layers), width_(width) {
        for (std::size_t i = 0; i < images; ++i) images_.push_back(i);
    }

    State(State&&) = default;

    // Keys and values of another layer, to be written.
    Visual& add_visual(std::size_t heads, std::size_t width, std::size_t tokens) {
        Visual layer;
        layer.heads = heads;
        layer.width = width;
        layer.tokens = tokens;
        layer.key_stride = padded(tokens);
        layer.value_stride = padded(width);
        layer.keys = padded_rows(images_.size() * heads * width, tokens);
        layer.values = padded_rows(images_.size() * heads * tokens, width);
        visual.push_back(std::move(layer));
        return visual.back();
    }

    // The same with keys [images, heads, w, N] and values [images, heads, N, w].
    void add_visual(const float* keys, const float* values, std::size_t heads, std::size_t width, std::size_t tokens) {
        Visual& layer = add_visual(heads, width, tokens);
        copy_rows(keys, images_.size() * heads * width, tokens, layer.key_stride, layer.keys.get());
        copy_rows(values, images_.size() * heads * tokens, width, layer.value_stride, layer.values.get());
    }

    // Images still here, as numbers among those of the start.
    const std::vector<std::size_t>& images() const { return images_; }
    void keep(const std::int64_t* images, std::size_t count) {
        std::vector<std::size_t> kept;
        for (std::size_t i = 0; i < count; ++i) kept.push_back(images_.at(static_cast<std::size_t>(images[i])));
        images_ = std::move(kept);
    }

    // A place for the query, key and value of one token in each layer.
    std::int32_t add_slot() {
        if (slots_ % kChunk == 0) chunks_.emplace_back(layers_ * kChunk * 3 * width_);
        return slots_++;
    }
    float* slot(std::size_t layer, std::int32_t slot) const {
        auto number = static_cast<std::size_t>(slot);
        return chunks_[number / kChunk].data() + (layer * kChunk + number % kChunk) * 3 * width_;
    }

    std::vector<std::vector<std::int32_t>> rows;  // the slots of each row of the last step
    std::vector<Visual> visual;                   // of each adapted layer
    std::vector<float> prefix;                    // ClipCap: [images, prefix_length, width]

    static std::size_t padded(std::size_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

  private:
    // Rows of `size` numbers to be written, and zeros behind each.
    std::shared_ptr<float> padded_rows(std::size_t rows, std::size_t size) {
        std::size_t stride = padded(size);
        std::shared_ptr<std::uint8_t> memory = arena_.take(rows * stride * sizeof(float));
        std::shared_ptr<float> start(memory, reinterpret_cast<float*>(memory.get()));
        for (std::size_t r = 0; r < rows; ++r) std::fill_n(start.get() + r * stride + size, stride - size, 0.0F);
        return start;
    }

    static void copy_rows(const float* from, std::size_t rows, std::size_t size, std::size_t stride, float* to) {
        for (std::size_t r = 0; r < rows; ++r) std::copy_n(from + r * size, size, to + r * stride);
    }

    static constexpr std::size_t kChunk = 32;
    Arena arena_;
    std::size_t layers_, width_;
    std::vector<std::size_t> images_;
    std::int32_t slots_ = 0;
    std::vector<Buffer<float>> chunks_;  // [layers, kChunk, 3 * width]: query, key and value
};

}  // namespace itune
