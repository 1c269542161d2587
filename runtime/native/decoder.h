// A GPT-2 that looks at an image: one step for all rows, from tokens to the k best next ones.
//
// The places where the image enters (the equations are in export/methods):
//
//     I-Tuning    X [W_fc | W_q] -> GELU and queries;  [GELU | S U] [W_proj ; W_o]         in adapted layers
//     SmallCap    x + W_o S U, with queries of LayerNorm(x), between attention and feed-forward
//     ClipCap     tokens from the vocabulary's end on are embeddings of the image
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "best_tokens.h"
#include "state.h"
#include "transformer.h"

namespace itune {

struct Layer {
    Norm attention_norm, feed_forward_norm, cross_norm;
    Linear qkv, projection, inner, outer, query, output;  // the last two: SmallCap
    int visual = -1;                                      // place in State::visual, or none
    float scale = 1;                                      // on Q K^T of self-attention
};

struct DecoderConfig {
    std::size_t heads = 0, width = 0, inner = 0, vocabulary = 0, positions = 0, prefix = 0;
    std::size_t adapters = 0, visual_width = 0;  // visual_width: all heads together
    float epsilon = 0;
    Activation activation = Activation::none;
    bool cross_attention = false;  // SmallCap
};

// Candidates of a step, as Engine.step returns them.
struct Found {
    std::size_t k = 0;
    std::vector<float> logits;            // [rows, k]
    std::vector<std::int64_t> token_ids;  // [rows, k]
    std::vector<float> logsumexp;         // [rows]
};

class Decoder : public Transformer {
  public:
    using Transformer::Transformer;

    // Feed tokens [rows, T] (mask [rows, T], or none: all are real) to rows that continue `parents` [rows].
    // `attention` [adapted layers, heads, tokens, N], if any: receives the attention to the image.
    void step(State& state, const std::int64_t* tokens, const std::int64_t* parents, const bool* mask, std::size_t rows,
              std::size_t length, std::size_t k, Found& found, float* attention = nullptr) {
        read_tokens(state, tokens, parents, mask, rows, length);
        embed(state);
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const Layer& layer = layers[i];
            self_attention(state, layer, i);
            if (layer.visual >= 0 && config.cross_attention) cross_attention(state, layer, attention);
            feed_forward(state, layer, attention);
        }
        head(k, found);
    }

    DecoderConfig config;
    std::vector<Layer> layers;
    Matrix embeddings, untied_head;  // [vocabulary or shortlist, width]
    std::vector<float> positions;    // [positions, width]
    Norm last_norm;
    std::vector<std::int64_t> shortlist;       // the tokens of the embeddings' rows; empty: all
    std::vector<std::int32_t> shortlist_rows;  // the row of each token

  private:
    struct Item {  // a token that a row reads
        std::size_t row, position, image;
        std::int64_t token;
    };

    void read_tokens(State& state, const std::int64_t* tokens, const std::int64_t* parents, const bool* mask,
                     std::size_t rows, std::size_t length) {
        std::vector<std::vector<std::int32_t>> before = std::move(state.rows);
        state.rows.assign(rows, {});
        items_.clear();
        last_.clear();
        first_.assign(1, 0);
        std::size_t images = state.images().size(), by_image = images == 0 ? 0 : rows / images;
        if (by_image == 0 || rows % images != 0) throw std::invalid_argument("rows that do not fit the images");
        for (std::size_t r = 0; r < rows; ++r) {
            std::vector<std::int32_t>& slots = state.rows[r];
            if (!before.empty()) slots = before.at(static_cast<std::size_t>(parents[r]));
            std::size_t start = items_.size();
            for (std::size_t t = 0; t < length; ++t) {
                if (mask != nullptr && !mask[r * length + t]) continue;
                if (slots.size() >= config.positions) throw std::out_of_range("more tokens than positions");
                items_.push_back({r, slots.size(), r / by_image, tokens[r * length + t]});
                slots.push_back(state.add_slot());
            }
            if (items_.size() == start) throw std::invalid_argument("a row without a token");
            last_.push_back(items_.size() - 1);
            if ((r + 1) % by_image == 0) first_.push_back(items_.size());
        }
    }

    void embed(const State& state) {
        std::size_t count = items_.size(), width = config.width;
        hidden_.resize(count, width);
        for (std::size_t i = 0; i < count; ++i) {
            const Item& item = items_[i];
            float* x = hidden_.row(i);
            std::size_t token = static_cast<std::size_t>(item.token);
            if (item.token >= 0 && token < config.vocabulary) {
                std::size_t row = shortlist.empty() ? token : static_cast<std::size_t>(shortlist_rows[token]);
                if (row >= embeddings.outputs()) throw std::out_of_range("a token outside the decoder's vocabulary");
                embeddings.read(row, x);
            } else if (item.token >= 0 && token - config.vocabulary < config.prefix) {
                std::size_t place = state.images()[item.image] * config.prefix + token - config.vocabulary;
                if ((place + 1) * width > state.prefix.size()) throw std::out_of_range("a token without its prefix");
                std::copy_n(state.prefix.data() + place * width, width, x);
            } else {
                throw std::out_of_range("a token outside the vocabulary");
            }
            kernels->add_scaled(1, positions.data() + item.position * width, width, x);
        }
    }

    void self_attention(State& state, const Layer& layer, std::size_t number) {
        std::size_t count = items_.size(), width = config.width, head_width = width / config.heads;
        normalize(layer.attention_norm, config.epsilon, layer.qkv.matrix, count);
        project(layer.qkv, normed_, count,
                [&](std::size_t i) { return state.slot(number, state.rows[items_[i].row][items_[i].position]); });
        context_.resize(count, width);
        context_.prepare(count, layer.projection.matrix.block());
        scores_.reserve(static_cast<std::size_t>(pool().threads()) * config.positions);
        pool().run(count, [&](std::size_t i, int thread) {
            const Item& item = items_[i];
            const std::vector<std::int32_t>& slots = state.rows[item.row];
            float* scores = scores_.data() + static_cast<std::size_t>(thread) * config.positions;
            const float* own = state.slot(number, slots[item.position]);
            for (std::size_t h = 0; h < config.heads; ++h) {
                const float* query = own + h * head_width;
                for (std::size_t t = 0; t <= item.position; ++t) {
                    scores[t] = kernels->dot(query, state.slot(number, slots[t]) + width + h * head_width, head_width);
                }
                kernels->softmax(scores, item.position + 1, layer.scale);
                float* to = context_.row(i) + h * head_width;
                std::fill(to, to + head_width, 0.0F);
                for (std::size_t t = 0; t <= item.position; ++t) {
                    kernels->add_scaled(scores[t], state.slot(number, slots[t]) + 2 * width + h * head_width,
                                        head_width, to);
                }
            }
            context_.quantize(*kernels, i);
        });
        add_product(layer.projection, context_, count);
    }

    void cross_attention(const State& state, const Layer& layer, float* attention) {
        std::size_t count = items_.size(), width = config.visual_width;
        normalize(layer.cross_norm, config.epsilon, layer.query.matrix, count);
        inner_.resize(count, width);
        project(layer.query, normed_, count, [&](std::size_t i) { return inner_.row(i); });
        context_.resize(count, width);
        context_.prepare(count, layer.output.matrix.block());
        attend_image(state, layer, inner_, 0, context_, 0, attention);
        pool().run(count, [&](std::size_t i, int) { context_.quantize(*kernels, i); });
        add_product(layer.output, context_, count);
    }

    void feed_forward(const State& state, const Layer& layer, float* attention) {
        std::size_t count = items_.size();
        bool adapted = layer.visual >= 0 && !config.cross_attention;
        std::size_t width = config.inner + (adapted ? config.visual_width : 0);
        normalize(layer.feed_forward_norm, config.epsilon, layer.inner.matrix, count);
        inner_.resize(count, width);
        inner_.prepare(count, layer.outer.matrix.block());
        project(layer.inner, normed_, count, [&](std::size_t i) { return inner_.row(i); });
        // Where S U goes, the queries were.
        if (adapted) attend_image(state, layer, inner_, config.inner, inner_, config.inner, attention);
        activate(config.activation, config.inner, count);
        add_product(layer.outer, inner_, count);
    }

    // to[:, to_first:] = softmax(Q K^T) U with Q = from[:, from_first:]: all rows of an image meet its keys together.
    void attend_image(const State& state, const Layer& layer, const Activations& from, std::size_t from_first,
                      Activations& to, std::size_t to_first, float* attention) {
        const State::Visual& visual = state.visual[static_cast<std::size_t>(layer.visual)];
        std::size_t heads = visual.heads, width = visual.width, images = state.images().size(), count = items_.size();
        std::size_t stride = heads * visual.key_stride;  // of the scores of one item
        visual_scores_.reserve(count * stride);
        float* scores = visual_scores_.data();
        // Calls f(image's number, head, panel, first item, items) for tiles of all images and heads.
        auto tiles = [&](std::size_t panels, auto&& f) {
            pool().run(images * heads * panels, [&](std::size_t part, int) {
                std::size_t image = part / (heads * panels), head = part / panels % heads, panel = part % panels;
                for (std::size_t first = first_[image]; first < first_[image + 1]; first += kTile) {
                    std::size_t left = first_[image + 1] - first;
                    f(state.images()[image], head, panel * kPanel, first,
                      static_cast<int>(std::min<std::size_t>(kTile, left)));
                }
            });
        };
        tiles(visual.key_stride / kPanel,
              [&](std::size_t image, std::size_t h, std::size_t n, std::size_t first, int rows) {
                  alignas(64) float tile[kTile * kPanel];
                  kernels->multiply_float(visual.keys_of(image, h) + n, visual.key_stride, width,
                                          from.row(first) + from_first + h * width, from.width(), rows, tile);
                  for (int r = 0; r < rows; ++r) {
                      std::copy_n(tile + r * kPanel, kPanel, scores + (first + r) * stride + h * visual.key_stride + n);
                  }
              });
        pool().run(count, [&](std::size_t i, int) {
            for (std::size_t h = 0; h < heads; ++h) {
                kernels->softmax(scores + i * stride + h * visual.key_stride, visual.tokens, 1);
            }
        });
        if (attention != nullptr) {
            float* own = attention + static_cast<std::size_t>(layer.visual) * heads * count * visual.tokens;
            for (std::size_t h = 0; h < heads; ++h) {
                for (std::size_t i = 0; i < count; ++i) {
                    std::copy_n(scores + i * stride + h * visual.key_stride, visual.tokens,
                                own + (h * count + i) * visual.tokens);
                }
            }
        }
        tiles(visual.value_stride / kPanel,
              [&](std::size_t image, std::size_t h, std::size_t n, std::size_t first, int rows) {
                  alignas(64) float tile[kTile * kPanel];
                  kernels->multiply_float(visual.values_of(image, h) + n, visual.value_stride, visual.tokens,
                                          scores + first * stride + h * visual.key_stride, stride, rows, tile);
                  for (int r = 0; r < rows; ++r) {
                      std::copy_n(tile + r * kPanel, std::min<std::size_t>(kPanel, width - n),
                                  to.row(first + r) + to_first + h * width + n);
                  }
              });
    }

    // The logits are never written as a whole: each thread keeps the best of its panels, and chunks of a fixed size
    // keep their largest logit and sum of exponentials, so that the result does not depend on the threads.
    void head(std::size_t k, Found& found) {
        const Matrix& matrix = untied_head.outputs() > 0 ? untied_head : embeddings;
        std::size_t rows = last_.size(), outputs = matrix.outputs(), panels = matrix.panels();
        std::size_t chunks = (panels + kChunk - 1) / kChunk;
        k = std::min(k, outputs);
        normed_.resize(rows, config.width);
        normed_.prepare(rows, matrix.block());
        pool().run(rows, [&](std::size_t r, int) {
            kernels->layer_norm(hidden_.row(last_[r]), config.width, last_norm.weight.data(), last_norm.bias.data(),
                                config.epsilon, normed_.row(r));
            normed_.quantize(*kernels, r);
        });
        auto threads = static_cast<std::size_t>(pool().threads());
        best_.resize(threads * rows);
        for (BestTokens& each : best_) each.clear(k);
        constexpr std::size_t columns = kChunk * kPanel;
        logits_.reserve(threads * rows * columns);
        largest_.resize(chunks * rows);
        sums_.resize(chunks * rows);
        pool().run(chunks, [&](std::size_t chunk, int thread) {
            alignas(64) float tile[kTile * kPanel];
            auto own = static_cast<std::size_t>(thread) * rows;
            std::size_t start = chunk * columns, end = std::min(outputs, start + columns);
            float* largest = largest_.data() + chunk * rows;
            std::fill_n(largest, rows, -std::numeric_limits<float>::infinity());
            for (std::size_t panel = chunk * kChunk; panel * kPanel < end; ++panel) {
                std::size_t n = panel * kPanel, count = std::min<std::size_t>(kPanel, end - n);
                for (std::size_t first = 0; first < rows; first += kTile) {
                    int tiled = static_cast<int>(std::min<std::size_t>(kTile, rows - first));
                    matrix.multiply(*kernels, panel, normed_, first, tiled, tile);
                    for (int r = 0; r < tiled; ++r) {
                        const float* logits = tile + r * kPanel;
                        float most = kernels->largest(logits, count);
                        largest[first + r] = std::max(largest[first + r], most);
                        best_[own + first + r].offer(logits, count, static_cast<std::int64_t>(n), most);
                        std::copy_n(logits, count, logits_.data() + (own + first + r) * columns + n - start);
                    }
                }
            }
            for (std::size_t r = 0; r < rows; ++r) {
                const float* logits = logits_.data() + (own + r) * columns;
                sums_[chunk * rows + r] = kernels->sum_of_exponentials(logits, end - start, largest[r]);
            }
        });
        found.k = k;
        found.logits.assign(rows * k, -std::numeric_limits<float>::infinity());
        found.token_ids.assign(rows * k, 0);
        found.logsumexp.resize(rows);
        for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t thread = 1; thread < threads; ++thread) best_[r].merge(best_[thread * rows + r]);
            best_[r].write(found.logits.data() + r * k, found.token_ids.data() + r * k);
            float largest = largest_[r];
            for (std::size_t c = 1; c < chunks; ++c) largest = std::max(largest, largest_[c * rows + r]);
            float sum = 0;
            for (std::size_t c = 0; c < chunks; ++c)
                sum += sums_[c * rows + r] * std::exp(largest_[c * rows + r] - largest);
            found.logsumexp[r] = largest + std::log(sum);
        }
        if (!shortlist.empty()) {
            for (std::int64_t& id : found.token_ids) id = shortlist[static_cast<std::size_t>(id)];
        }
    }

    static constexpr std::size_t kChunk = 16;  // panels of the head whose exponentials are summed together

    // Reused between steps; the pool is held during a step.
    std::vector<Item> items_;
    std::vector<std::size_t> last_, first_;  // each row's last item; each image's first item, and the end
    Buffer<float> scores_, visual_scores_, logits_;
    std::vector<BestTokens> best_;  // [threads, rows]
    std::vector<float> largest_, sums_;
};

}  // namespace itune
