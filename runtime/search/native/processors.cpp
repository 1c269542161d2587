#include "processors.h"

#include <algorithm>
#include <set>

namespace itune {

namespace {

// Looks at every token, which vectorises; a search that stops at the first match does not.
bool contains(const Tokens& tokens, std::int64_t wanted) {
    bool found = false;
    for (std::int64_t token : tokens) found |= token == wanted;
    return found;
}

}  // namespace

Processors::Processors(double repetition_penalty, std::int64_t ngram_size, std::int64_t min_new_tokens,
                       const std::vector<Tokens>& bad_words, std::int64_t end_token)
    : penalty_(repetition_penalty),
      ngram_size_(static_cast<std::size_t>(ngram_size)),
      min_new_tokens_(min_new_tokens),
      end_token_(end_token) {
    std::set<Tokens> words(bad_words.begin(), bad_words.end());
    words.erase(Tokens{end_token});
    for (const Tokens& word : words) {
        if (word.size() == 1) {
            bad_tokens_.push_back(word[0]);
        } else {
            bad_sequences_.push_back(word);
        }
    }
}

std::int64_t Processors::pushed_everywhere(std::size_t length, std::int64_t generated) const {
    std::size_t pushed = bad_tokens_.size() + (generated < min_new_tokens_ ? 1 : 0);
    return static_cast<std::int64_t>(penalty_ != 1 ? pushed + length : pushed);
}

void Processors::ban(const Tokens& history, Tokens& banned) const {
    banned.clear();
    if (ngram_size_ > 0) {
        std::size_t prefix = ngram_size_ - 1;
        for (std::size_t start = 0; start + prefix < history.size(); ++start) {
            if (std::equal(history.end() - static_cast<std::ptrdiff_t>(prefix), history.end(),
                           history.begin() + static_cast<std::ptrdiff_t>(start))) {
                banned.push_back(history[start + prefix]);
            }
        }
    }
    for (const Tokens& word : bad_sequences_) {
        std::ptrdiff_t prefix = static_cast<std::ptrdiff_t>(word.size()) - 1;
        if (prefix <= static_cast<std::ptrdiff_t>(history.size()) &&
            std::equal(history.end() - prefix, history.end(), word.begin())) {
            banned.push_back(word.back());
        }
    }
}

void Processors::apply(double* scores, const std::int64_t* token_ids, std::size_t k, const Tokens& history,
                       const Tokens& banned, std::int64_t generated) const {
    if (penalty_ != 1) {
        for (std::size_t i = 0; i < k; ++i) {
            if (contains(history, token_ids[i])) {
                scores[i] = scores[i] < 0 ? scores[i] * penalty_ : scores[i] / penalty_;
            }
        }
    }
    if (!banned.empty()) {
        for (std::size_t i = 0; i < k; ++i) {
            if (contains(banned, token_ids[i])) scores[i] = kImpossible;
        }
    }
    bool too_short = generated < min_new_tokens_;
    if (too_short || !bad_tokens_.empty()) {
        for (std::size_t i = 0; i < k; ++i) {
            if ((too_short && token_ids[i] == end_token_) ||
                std::binary_search(bad_tokens_.begin(), bad_tokens_.end(), token_ids[i])) {
                scores[i] = kImpossible;
            }
        }
    }
}

}  // namespace itune
