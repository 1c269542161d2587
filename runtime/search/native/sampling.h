// Drawing a token at random (twin: sampling.py, which says what is guaranteed).
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

// A number in [0, 1): Philox 4x64-10 with `seed` as key and (step, sample) as counter, numbered as in NumPy.
double uniform(std::uint64_t seed, std::uint64_t sample, std::uint64_t step);

// The tokens that may be drawn, with their probabilities.
class Nucleus {
  public:
    // Restrict the candidates `logits` [k], `token_ids` [k]. Returns false if none is possible.
    bool restrict_to(const double* logits, const std::int64_t* token_ids, std::size_t k, const Warpers& warpers);
    // The index of the candidate that `number`, in [0, 1), selects.
    std::size_t choose(double number) const;

  private:
    std::vector<std::size_t> order_;  // of the candidates, best first
    std::vector<double> cumulative_;
};

}  // namespace itune
