// Drawing a token at random (twin: sampling.py, which says what is guaranteed).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace itune {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

inline std::uint64_t high_product(std::uint64_t a, std::uint64_t b) {
    std::uint64_t a_low = a & 0xFFFFFFFF, a_high = a >> 32, b_low = b & 0xFFFFFFFF, b_high = b >> 32;
    std::uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
    std::uint64_t carry = (middle & 0xFFFFFFFF) + a_low * b_high;
    return a_high * b_high + (middle >> 32) + (carry >> 32);
}

// A number in [0, 1): Philox 4x64-10 with `seed` as key and (step, sample) as counter, numbered as in NumPy.
inline double uniform(std::uint64_t seed, std::uint64_t sample, std::uint64_t step) {
    std::uint64_t key[] = {seed, 0};
    std::uint64_t counter[] = {step + 1, sample, 0, 0};  // NumPy increments the counter before it draws
    for (int round = 0; round < 10; ++round) {
        constexpr std::uint64_t multipliers[] = {0xD2E7470EE14C6C93, 0xCA5A826395121157};
        std::uint64_t high0 = high_product(multipliers[0], counter[0]), low0 = multipliers[0] * counter[0];
        std::uint64_t high1 = high_product(multipliers[1], counter[2]), low1 = multipliers[1] * counter[2];
        counter[0] = high1 ^ counter[1] ^ key[0];
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key[1];
        counter[3] = low0;
        key[0] += 0x9E3779B97F4A7C15;
        key[1] += 0xBB67AE8584CAA73B;
    }
    return static_cast<double>(counter[0] >> 11) * (1.0 / 9007199254740992.0);
}

struct Warpers {
    double temperature;
    std::int64_t top_k;  // 0: off
    double top_p;
};

// The tokens that may be drawn, with their probabilities.
class Nucleus {
  public:
    // Restrict the candidates `logits` [k], `token_ids` [k]. Returns false if none is possible.
    bool restrict_to(const double* logits, const std::int64_t* token_ids, std::size_t k, const Warpers& warpers) {
        auto better = [=](std::size_t a, std::size_t b) {
            return logits[a] != logits[b] ? logits[a] > logits[b] : token_ids[a] < token_ids[b];
        };
        order_.resize(k);
        std::iota(order_.begin(), order_.end(), 0);
        std::size_t size = warpers.top_k > 0 ? std::min(k, static_cast<std::size_t>(warpers.top_k)) : k;
        // Engines return candidates best first; only processors change the order.
        if (!std::is_sorted(order_.begin(), order_.end(), better)) {
            std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(size), order_.end(), better);
        }
        double best = logits[order_[0]], sum = 0;
        if (best == kImpossible) return false;
        cumulative_.clear();
        for (std::size_t i = 0; i < size; ++i) {
            sum += std::exp((logits[order_[i]] - best) / warpers.temperature);
            cumulative_.push_back(sum);
        }
        if (warpers.top_p < 1) {
            auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), warpers.top_p * sum);
            cumulative_.erase(last + 1, cumulative_.end());
        }
        return true;
    }

    // The index of the candidate that `number`, in [0, 1), selects.
    std::size_t choose(double number) const {
        auto chosen = std::upper_bound(cumulative_.begin(), cumulative_.end(), number * cumulative_.back());
        return order_[static_cast<std::size_t>(chosen - cumulative_.begin())];
    }

  private:
    std::vector<std::size_t> order_;  // of the candidates, best first
    std::vector<double> cumulative_;
};

}  // namespace itune
