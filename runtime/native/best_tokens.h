// The k best tokens of a row, kept while its logits stream by: by logit, then lower id.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace itune {

class BestTokens {
  public:
    void clear(std::size_t k) {
        k_ = k;
        heap_.clear();
        threshold_ = -std::numeric_limits<float>::infinity();
    }

    // Logits of the tokens from `id` on, and the largest of them.
    void offer(const float* logits, std::size_t count, std::int64_t id, float largest) {
        if (heap_.size() == k_ && largest < threshold_) return;
        for (std::size_t i = 0; i < count; ++i) offer_one({logits[i], id + static_cast<std::int64_t>(i)});
    }

    void merge(const BestTokens& other) {
        for (const Token& token : other.heap_) offer_one(token);
    }

    // Best first; as many as there are.
    void write(float* logits, std::int64_t* ids) {
        std::sort(heap_.begin(), heap_.end(), better);
        for (const auto& [logit, id] : heap_) {
            *logits++ = logit;
            *ids++ = id;
        }
    }

  private:
    using Token = std::pair<float, std::int64_t>;
    static bool better(const Token& a, const Token& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    }

    void offer_one(Token token) {
        if (token.first != token.first) return;  // NaN, which the log-sum-exp shows
        if (heap_.size() == k_) {
            if (!better(token, heap_.front())) return;
            std::pop_heap(heap_.begin(), heap_.end(), better);
            heap_.back() = token;
        } else {
            heap_.push_back(token);
        }
        std::push_heap(heap_.begin(), heap_.end(), better);
        threshold_ = heap_.front().first;
    }

    std::size_t k_ = 0;
    std::vector<Token> heap_;  // the worst in front
    float threshold_ = 0;
};

}  // namespace itune
