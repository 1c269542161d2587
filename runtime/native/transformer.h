// What decoder and encoder share: pre-norm blocks over rows of hidden states.
#pragma once

#include "matrix.h"

namespace itune {

struct Norm {
    std::vector<float> weight, bias;
};

struct Linear {
    Matrix matrix;
    std::vector<float> bias;
};

class Transformer : public Executor {
  public:
    using Executor::Executor;

  protected:
    // normed_ = LayerNorm(hidden_), ready for a product with `next`.
    void normalize(const Norm& norm, float epsilon, const Matrix& next, std::size_t rows) {
        std::size_t width = norm.weight.size();
        normed_.resize(rows, width);
        normed_.prepare(rows, next.block());
        pool().run(rows, [&](std::size_t r, int) {
            kernels->layer_norm(hidden_.row(r), width, norm.weight.data(), norm.bias.data(), epsilon, normed_.row(r));
            normed_.quantize(*kernels, r);
        });
    }

    // place(row) [outputs] = x W + b; each row is written in parts.
    template <typename Place>
    void project(const Linear& linear, const Activations& x, std::size_t rows, Place&& place) const {
        multiply(linear.matrix, x, rows, [&](std::size_t panel, std::size_t r, float* tile) {
            std::size_t first = panel * kPanel;
            float* to = place(r) + first;
            const float* bias = linear.bias.data() + first;
            std::size_t columns = std::min<std::size_t>(kPanel, linear.bias.size() - first);
            for (std::size_t n = 0; n < columns; ++n) to[n] = tile[n] + bias[n];
        });
    }

    // hidden_ += x W + b.
    void add_product(const Linear& linear, const Activations& x, std::size_t rows) const {
        multiply(linear.matrix, x, rows, [&](std::size_t panel, std::size_t r, float* tile) {
            std::size_t first = panel * kPanel;
            float* to = hidden_.row(r) + first;
            const float* bias = linear.bias.data() + first;
            std::size_t columns = std::min<std::size_t>(kPanel, linear.bias.size() - first);
            for (std::size_t n = 0; n < columns; ++n) to[n] += tile[n] + bias[n];
        });
    }

    // inner_ = activation(inner_) in its first `size` columns, then in integers for the next product.
    void activate(Activation activation, std::size_t size, std::size_t rows) const {
        pool().run(rows, [&](std::size_t r, int) {
            kernels->activate(activation, inner_.row(r), size);
            inner_.quantize(*kernels, r);
        });
    }

    // Reused from call to call; the pool is held meanwhile.
    Activations hidden_, normed_, context_, inner_;
};

}  // namespace itune
