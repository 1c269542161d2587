// Repetition penalty, n-grams that may not repeat, bad words and minimum length (twin: processors.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

namespace itune {

using Tokens = std::vector<std::int64_t>;

constexpr std::int64_t kNoToken = -1;
constexpr double kImpossible = -std::numeric_limits<double>::infinity();

class Processors {
  public:
    Processors(double repetition_penalty, std::int64_t ngram_size, std::int64_t min_new_tokens,
               const std::vector<Tokens>& bad_words, std::int64_t end_token);

    // Put the tokens that may not follow `history` into `banned`, in ascending order.
    void ban(const Tokens& history, std::int64_t generated, Tokens& banned) const;
    // An upper bound on the number of tokens whose scores are lowered after `history`.
    std::size_t lowered(const Tokens& history, const Tokens& banned) const {
        return banned.size() + (penalty_ != 1 ? history.size() : 0);
    }
    // Apply the processors to the scores [k] of the tokens `token_ids` [k].
    void apply(double* scores, const std::int64_t* token_ids, std::size_t k, const Tokens& history,
               const Tokens& banned) const;

  private:
    double penalty_;
    std::size_t ngram_size_;
    std::int64_t min_new_tokens_, end_token_;
    std::set<Tokens> words_;
};

}  // namespace itune
