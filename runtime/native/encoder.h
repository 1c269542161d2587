// CLIP's vision transformer, and the projections of its embeddings to the keys and values of every adapted layer.
//
// What export/graph/clip.py builds as a graph: patches as one product, one product for queries, keys and values (with
// 1/sqrt(d) in the queries' weights), pre-norm blocks. Images go through one by one, so that none depends on another.
#pragma once

#include "decoder.h"

namespace itune {

struct EncoderLayer {
    Norm attention_norm, feed_forward_norm;
    Linear qkv, projection, inner, outer;
};

struct EncoderConfig {
    std::size_t width = 0, heads = 0, inner = 0, image_size = 0, patch_size = 0;
    std::size_t adapters = 0, visual_heads = 0, visual_width = 0;  // visual_width: all heads together
    float epsilon = 0;
    Activation activation = Activation::none;

    std::size_t grid() const { return image_size / patch_size; }
    std::size_t tokens() const { return grid() * grid() + 1; }
    std::size_t patch() const { return patch_size * patch_size * 3; }
};

class Encoder : public Transformer {
  public:
    using Transformer::Transformer;

    // Encode pixels [images, image_size, image_size, 3] into `state`, which has no visual keys and values yet.
    void encode(const std::uint8_t* pixels, std::size_t images, State& state) {
        std::size_t size = config.image_size * config.image_size * 3;
        state.visual.reserve(config.adapters);
        for (std::size_t i = 0; i < config.adapters; ++i) {
            state.add_visual(config.visual_heads, config.visual_width / config.visual_heads, config.tokens());
        }
        for (std::size_t image = 0; image < images; ++image) {
            embed(pixels + image * size);
            for (const EncoderLayer& layer : layers) {
                self_attention(layer);
                feed_forward(layer);
            }
            project_visual(state, image);
        }
    }

    EncoderConfig config;
    std::vector<float> mean, class_embedding, positions;  // mean [patch]; positions [tokens, width]
    Linear patches;                                       // without a bias
    Norm first_norm;
    std::vector<EncoderLayer> layers;
    Linear visual;  // [adapters, keys then values, visual_width]

  private:
    void embed(const std::uint8_t* pixels) {
        std::size_t tokens = config.tokens(), width = config.width, grid = config.grid(), side = config.patch_size * 3;
        inner_.resize(tokens, config.patch());
        inner_.prepare(tokens, patches.matrix.block());
        pool().run(grid * grid, [&](std::size_t patch, int) {
            const std::uint8_t* corner =
                pixels + (patch / grid * config.patch_size * config.image_size + patch % grid * config.patch_size) * 3;
            float* to = inner_.row(patch);
            for (std::size_t i = 0; i < config.patch(); ++i) {
                to[i] = static_cast<float>(corner[i / side * config.image_size * 3 + i % side]) - mean[i];
            }
            inner_.quantize(*kernels, patch);
        });
        hidden_.resize(tokens, width);
        normed_.resize(tokens, width);
        std::copy(class_embedding.begin(), class_embedding.end(), normed_.row(0));
        multiply(patches.matrix, inner_, tokens - 1, [&](std::size_t panel, std::size_t r, float* tile) {
            std::size_t first = panel * kPanel, columns = std::min<std::size_t>(kPanel, width - first);
            std::copy_n(tile, columns, normed_.row(r + 1) + first);
        });
        pool().run(tokens, [&](std::size_t r, int) {
            kernels->add_scaled(1, positions.data() + r * width, width, normed_.row(r));
            kernels->layer_norm(normed_.row(r), width, first_norm.weight.data(), first_norm.bias.data(), config.epsilon,
                                hidden_.row(r));
        });
    }

    void self_attention(const EncoderLayer& layer) {
        std::size_t tokens = config.tokens(), width = config.width, head_width = width / config.heads;
        std::size_t stride = State::padded(tokens);
        normalize(layer.attention_norm, config.epsilon, layer.qkv.matrix, tokens);
        qkv_.resize(tokens + 1 + kPanel / (3 * width), 3 * width);  // the last panel of values is read beyond its end
        std::fill_n(qkv_.row(tokens), kPanel, 0.0F);
        project(layer.qkv, normed_, tokens, [&](std::size_t r) { return qkv_.row(r); });
        context_.resize(tokens, width);
        context_.prepare(tokens, layer.projection.matrix.block());
        std::size_t size = (head_width + kTile) * stride;  // of a thread: keys [head_width, tokens], scores of a tile
        scratch_.reserve(static_cast<std::size_t>(pool().threads()) * size);
        pool().run(config.heads, [&](std::size_t h, int thread) {
            float* keys = scratch_.data() + static_cast<std::size_t>(thread) * size;
            float* scores = keys + head_width * stride;
            for (std::size_t t = 0; t < tokens; ++t) {
                const float* key = qkv_.row(t) + width + h * head_width;
                for (std::size_t k = 0; k < head_width; ++k) keys[k * stride + t] = key[k];
            }
            for (std::size_t k = 0; k < head_width; ++k) std::fill_n(keys + k * stride + tokens, stride - tokens, 0.0F);
            alignas(64) float tile[kTile * kPanel];
            for (std::size_t first = 0; first < tokens; first += kTile) {
                int rows = static_cast<int>(std::min<std::size_t>(kTile, tokens - first));
                for (std::size_t n = 0; n < stride; n += kPanel) {
                    kernels->multiply_float(keys + n, stride, head_width, qkv_.row(first) + h * head_width, 3 * width,
                                            rows, tile);
                    for (int r = 0; r < rows; ++r) std::copy_n(tile + r * kPanel, kPanel, scores + r * stride + n);
                }
                for (int r = 0; r < rows; ++r) kernels->softmax(scores + r * stride, tokens, 1);
                for (std::size_t n = 0; n < head_width; n += kPanel) {
                    kernels->multiply_float(qkv_.row(0) + 2 * width + h * head_width + n, 3 * width, tokens, scores,
                                            stride, rows, tile);
                    std::size_t columns = std::min<std::size_t>(kPanel, head_width - n);
                    for (int r = 0; r < rows; ++r) {
                        std::copy_n(tile + r * kPanel, columns, context_.row(first + r) + h * head_width + n);
                    }
                }
            }
        });
        pool().run(tokens, [&](std::size_t r, int) { context_.quantize(*kernels, r); });
        add_product(layer.projection, context_, tokens);
    }

    void feed_forward(const EncoderLayer& layer) {
        std::size_t tokens = config.tokens();
        normalize(layer.feed_forward_norm, config.epsilon, layer.inner.matrix, tokens);
        inner_.resize(tokens, config.inner);
        inner_.prepare(tokens, layer.outer.matrix.block());
        project(layer.inner, normed_, tokens, [&](std::size_t r) { return inner_.row(r); });
        activate(config.activation, config.inner, tokens);
        add_product(layer.outer, inner_, tokens);
    }

    // Keys and values of all adapted layers, each where attention reads it.
    void project_visual(State& state, std::size_t image) {
        std::size_t tokens = config.tokens(), heads = config.visual_heads, width = config.visual_width / heads;
        std::size_t outputs = visual.matrix.outputs();
        places_.clear();
        for (std::size_t n = 0; n < outputs; ++n) {
            State::Visual& layer = state.visual[n / (2 * config.visual_width)];
            std::size_t head = image * heads + n % config.visual_width / width, column = n % width;
            if (n / config.visual_width % 2 == 0) {
                places_.push_back({layer.keys.get() + (head * width + column) * layer.key_stride, 1});
            } else {
                places_.push_back(
                    {layer.values.get() + head * tokens * layer.value_stride + column, layer.value_stride});
            }
        }
        normed_.resize(tokens, config.width);
        normed_.prepare(tokens, visual.matrix.block());
        pool().run(tokens, [&](std::size_t r, int) {
            std::copy_n(hidden_.row(r), config.width, normed_.row(r));
            normed_.quantize(*kernels, r);
        });
        multiply(visual.matrix, normed_, tokens, [&](std::size_t panel, std::size_t r, float* tile) {
            std::size_t first = panel * kPanel, columns = std::min<std::size_t>(kPanel, outputs - first);
            for (std::size_t n = 0; n < columns; ++n) {
                const Place& place = places_[first + n];
                place.start[r * place.stride] = tile[n] + visual.bias[first + n];
            }
        });
    }

    struct Place {  // where an output of the first token goes, and how far apart those of the others are
        float* start;
        std::size_t stride;
    };

    // Reused between images; the pool is held meanwhile.
    Activations qkv_;
    Buffer<float> scratch_;
    std::vector<Place> places_;
};

}  // namespace itune
