#include "processors.h"

#include <algorithm>

namespace itune {

Processors::Processors(double repetition_penalty, std::int64_t ngram_size, std::int64_t min_new_tokens,
                       const std::vector<Tokens>& bad_words, std::int64_t end_token)
    : penalty_(repetition_penalty),
      ngram_size_(static_cast<std::size_t>(ngram_size)),
      min_new_tokens_(min_new_tokens),
      end_token_(end_token),
      words_(bad_words.begin(), bad_words.end()) {
    words_.erase(Tokens{end_token});
}

void Processors::ban(const Tokens& history, std::int64_t generated, Tokens& banned) const {
    banned.clear();
    if (generated < min_new_tokens_) banned.push_back(end_token_);
    // Bans `token` if `history` ends with the `size` tokens from `prefix` on.
    auto ban_after = [&](Tokens::const_iterator prefix, std::size_t size, std::int64_t token) {
        if (size <= history.size() && std::equal(prefix, prefix + static_cast<std::ptrdiff_t>(size),
                                                 history.end() - static_cast<std::ptrdiff_t>(size))) {
            banned.push_back(token);
        }
    };
    for (std::size_t last = ngram_size_ - 1; ngram_size_ > 0 && last < history.size(); ++last) {
        auto first = history.begin() + static_cast<std::ptrdiff_t>(last - (ngram_size_ - 1));
        ban_after(first, ngram_size_ - 1, history[last]);
    }
    for (const Tokens& word : words_) ban_after(word.begin(), word.size() - 1, word.back());
    std::sort(banned.begin(), banned.end());
}

void Processors::apply(double* scores, const std::int64_t* token_ids, std::size_t k, const Tokens& history,
                       const Tokens& banned) const {
    for (std::size_t i = 0; penalty_ != 1 && i < k; ++i) {
        bool seen = false;  // looking at every token vectorises, stopping at the first match does not
        for (std::int64_t token : history) seen |= token == token_ids[i];
        if (seen) scores[i] = scores[i] < 0 ? scores[i] * penalty_ : scores[i] / penalty_;
    }
    for (std::size_t i = 0; !banned.empty() && i < k; ++i) {
        if (std::binary_search(banned.begin(), banned.end(), token_ids[i])) scores[i] = kImpossible;
    }
}

}  // namespace itune
