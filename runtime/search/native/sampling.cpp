#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace itune {

namespace {

std::uint64_t high_product(std::uint64_t a, std::uint64_t b) {
    std::uint64_t a_low = a & 0xFFFFFFFF, a_high = a >> 32, b_low = b & 0xFFFFFFFF, b_high = b >> 32;
    std::uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
    std::uint64_t carry = (middle & 0xFFFFFFFF) + a_low * b_high;
    return a_high * b_high + (middle >> 32) + (carry >> 32);
}

// e ** x for x <= 0, the same sequence of operations as `exp` in sampling.py.
double exp_nonpositive(double x) {
    if (x < -700) return 0;
    double n = std::nearbyint(x * 1.4426950408889634);
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    static constexpr double factorials[] = {6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0,
                                            40320.0,      5040.0,      720.0,      120.0,     24.0,
                                            6.0,          2.0,         1.0,        1.0};
    double series = 1 / factorials[0];
    for (std::size_t i = 1; i < 14; ++i) series = series * r + 1 / factorials[i];
    return std::ldexp(series, static_cast<int>(n));
}

}  // namespace

double uniform(std::uint64_t seed, std::uint64_t sample, std::uint64_t step) {
    std::uint64_t key[] = {seed, 0};
    std::uint64_t counter[] = {step + 1, sample, 0, 0};  // NumPy counts before it draws
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

bool Nucleus::restrict_to(const double* logits, const std::int64_t* token_ids, std::size_t k,
                          const Warpers& warpers) {
    auto better = [](const Entry& a, const Entry& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    };
    entries_.clear();
    for (std::size_t i = 0; i < k; ++i) entries_.push_back({logits[i], token_ids[i], i});
    std::size_t size = warpers.top_k > 0 ? std::min(k, static_cast<std::size_t>(warpers.top_k)) : k;
    // Engines return candidates best first, so that only processors can make this necessary.
    if (!std::is_sorted(entries_.begin(), entries_.end(), better)) {
        std::partial_sort(entries_.begin(), entries_.begin() + static_cast<std::ptrdiff_t>(size), entries_.end(),
                          better);
    }
    double best = entries_[0].logit;
    if (best == -std::numeric_limits<double>::infinity()) return false;
    cumulative_.clear();
    double sum = 0;
    for (std::size_t i = 0; i < size; ++i) {
        sum += exp_nonpositive((entries_[i].logit - best) / warpers.temperature);
        cumulative_.push_back(sum);
    }
    if (warpers.top_p < 1) {
        auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), warpers.top_p * sum);
        cumulative_.erase(last + 1, cumulative_.end());
    }
    return true;
}

std::size_t Nucleus::choose(double number) const {
    auto chosen = std::upper_bound(cumulative_.begin(), cumulative_.end(), number * cumulative_.back());
    return entries_[static_cast<std::size_t>(chosen - cumulative_.begin())].index;
}

}  // namespace itune
