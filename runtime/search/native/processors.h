// Repetition penalty, n-grams that may not repeat, bad words and minimum length (twin: processors.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace itune {

using Tokens = std::vector<std::int64_t>;

constexpr std::int64_t kNoToken = -1;
constexpr double kImpossible = -std::numeric_limits<double>::infinity();

class Processors {
  public:
    Processors(double repetition_penalty, std::int64_t ngram_size, std::int64_t min_new_tokens,
               const std::vector<Tokens>& bad_words, std::int64_t end_token);

    // How many tokens are pushed down in every row alike, whose longest history has `length` tokens.
    std::int64_t pushed_everywhere(std::size_t length, std::int64_t generated) const;
    // Put what may not follow `history`, beyond that, into `banned`.
    void ban(const Tokens& history, Tokens& banned) const;
    // Impose all of it on the scores [k] of the tokens `token_ids` [k].
    void apply(double* scores, const std::int64_t* token_ids, std::size_t k, const Tokens& history,
               const Tokens& banned, std::int64_t generated) const;

  private:
    double penalty_;
    std::size_t ngram_size_;
    std::int64_t min_new_tokens_, end_token_;
    Tokens bad_tokens_;  // ascending
    std::vector<Tokens> bad_sequences_;
};

}  // namespace itune
