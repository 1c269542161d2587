// Drawing a token at random (twin: sampling.py, which says what is promised).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace itune {

struct Warpers {
    double temperature;
    std::int64_t top_k;  // 0: off
    double top_p;
};

// A number in [0, 1): Philox 4x64-10 with `seed` as key and (step, sample) as counter, as NumPy numbers its draws.
double uniform(std::uint64_t seed, std::uint64_t sample, std::uint64_t step);

// The tokens that may be drawn, with their probabilities.
class Nucleus {
  public:
    // Restrict the candidates `logits` [k], `token_ids` [k]. False if none is possible.
    bool restrict_to(const double* logits, const std::int64_t* token_ids, std::size_t k, const Warpers& warpers);
    // The index of the candidate that `number`, in [0, 1), stands for.
    std::size_t choose(double number) const;

  private:
    struct Entry {
        double logit;
        std::int64_t token;
        std::size_t index;
    };
    std::vector<Entry> entries_;  // best first
    std::vector<double> cumulative_;
};

}  // namespace itune
