// Repetition penalty, n-grams that may not repeat, bad words and minimum length (twin: processors.py).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

namespace itune {

using Tokens = std::vector<std::int64_t>;

constexpr std::int64_t kNoToken = -1;
constexpr double kImpossible = -std::numeric_limits<double>::infinity();

struct Processors {
    double repetition_penalty;
    std::int64_t ngram_size, min_new_tokens, end_token;
    std::set<Tokens> bad_words;  // not the end token alone

    // Put the tokens that may not follow `history` into `banned`, in ascending order.
    void ban(const Tokens& history, std::int64_t generated, Tokens& banned) const {
        auto length = static_cast<std::int64_t>(history.size());
        auto ends_with = [&](Tokens::const_iterator first, std::int64_t size) {
            return size <= length && std::equal(first, first + size, history.end() - size);
        };
        banned.clear();
        if (generated < min_new_tokens) banned.push_back(end_token);
        for (std::int64_t last = ngram_size - 1; ngram_size > 0 && last < length; ++last) {
            if (ends_with(history.begin() + last - (ngram_size - 1), ngram_size - 1)) banned.push_back(history[last]);
        }
        for (const Tokens& word : bad_words) {
            if (ends_with(word.begin(), static_cast<std::int64_t>(word.size()) - 1)) banned.push_back(word.back());
        }
        std::sort(banned.begin(), banned.end());
    }

    // An upper bound on the number of tokens whose scores are lowered after `history`.
    std::size_t lowered(const Tokens& history, const Tokens& banned) const {
        return banned.size() + (repetition_penalty != 1 ? history.size() : 0);
    }

    // Apply the processors to the scores [k] of the tokens `token_ids` [k].
    void apply(double* scores, const std::int64_t* token_ids, std::size_t k, const Tokens& history,
               const Tokens& banned) const {
        for (std::size_t i = 0; repetition_penalty != 1 && i < k; ++i) {
            bool seen = false;  // looking at every token vectorises, stopping at the first match does not
            for (std::int64_t token : history) seen |= token == token_ids[i];
            if (seen) scores[i] = scores[i] < 0 ? scores[i] * repetition_penalty : scores[i] / repetition_penalty;
        }
        for (std::size_t i = 0; !banned.empty() && i < k; ++i) {
            if (std::binary_search(banned.begin(), banned.end(), token_ids[i])) scores[i] = kImpossible;
        }
    }
};

}  // namespace itune
