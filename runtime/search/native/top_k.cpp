#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// One binary for all x86: the loader picks the widest vectors that the machine has. Elsewhere the baseline has to do.
#ifdef ITUNE_TARGET_CLONES
#define ITUNE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ITUNE_CLONES
#endif

namespace itune {

namespace {

// Sums run in so many lanes at any vector width, so that every machine returns the same bits.
constexpr std::size_t kLanes = 16;
// Floats that are looked at together: small enough for the first-level cache.
constexpr std::size_t kBlock = 32 * kLanes;
// Floats that are compared with the worst of the k best together.
constexpr std::size_t kGroup = 4 * kLanes;

struct Entry {
    float value;
    std::int64_t token;
};

bool better(const Entry& a, const Entry& b) {
    return a.value != b.value ? a.value > b.value : a.token < b.token;
}

// Round-to-nearest range reduction and Cephes' polynomial: 2 units in the last place; 0 below -87; NaN stays NaN.
inline float exp_nonpositive(float x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to a whole number, kept in the low bits
    float shifted = x * 1.44269504088896341f + magic;
    float n = shifted - magic;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * r + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    series = series * (r * r) + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;  // 2 ** n; what magic put above the low byte is shifted out
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : series * scale;
}

ITUNE_CLONES float block_maximum(const float* x) {
    float lanes[kLanes];
    for (std::size_t l = 0; l < kLanes; ++l) lanes[l] = x[l];
    for (std::size_t i = kLanes; i < kBlock; i += kLanes) {
        for (std::size_t l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    }
    for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
        for (std::size_t l = 0; l < width; ++l) lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
    }
    return lanes[0];
}

ITUNE_CLONES bool any_above(const float* x, float threshold) {
    std::int32_t above = 0;
    for (std::size_t i = 0; i < kGroup; ++i) above |= x[i] > threshold;
    return above != 0;
}

ITUNE_CLONES double block_sum(const float* x, float shift) {
    float lanes[kLanes] = {};
    for (std::size_t i = 0; i < kBlock; i += kLanes) {
        for (std::size_t l = 0; l < kLanes; ++l) lanes[l] += exp_nonpositive(x[i + l] - shift);
    }
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

// Look at a block, of which `count` values are real, for the k best so far: a heap with the worst of them on top.
void offer(const float* block, std::size_t count, std::size_t first_token, std::size_t k, std::vector<Entry>& heap) {
    for (std::size_t start = 0; start < count; start += kGroup) {
        if (heap.size() == k && !any_above(block + start, heap.front().value)) continue;
        for (std::size_t i = start; i < std::min(start + kGroup, count); ++i) {
            if (heap.size() == k) {
                // Tokens ascend: an equal one loses.
                if (!(block[i] > heap.front().value)) continue;
                std::pop_heap(heap.begin(), heap.end(), better);
                heap.pop_back();
            }
            heap.push_back({block[i], static_cast<std::int64_t>(first_token + i)});
            std::push_heap(heap.begin(), heap.end(), better);
        }
    }
}

}  // namespace

void top_k(const float* logits, std::size_t rows, std::size_t size, std::size_t k, float* values,
           std::int64_t* token_ids, float* logsumexp) {
    std::vector<Entry> heap;
    heap.reserve(k);
    float padded[kBlock];
    for (std::size_t row = 0; row < rows; ++row, logits += size, values += k, token_ids += k) {
        heap.clear();
        float shift = std::numeric_limits<float>::lowest();
        double sum = 0;  // of e ** (x - shift)
        for (std::size_t start = 0; start < size; start += kBlock) {
            const float* block = logits + start;
            std::size_t count = std::min(kBlock, size - start);
            if (count < kBlock) {
                std::fill(std::copy(block, block + count, padded), padded + kBlock,
                          -std::numeric_limits<float>::infinity());
                block = padded;
            }
            float maximum = block_maximum(block);
            if (maximum > shift) {
                sum *= std::exp(static_cast<double>(shift) - maximum);
                shift = maximum;
            }
            sum += block_sum(block, shift);
            if (heap.size() < k || maximum > heap.front().value) offer(block, count, start, k, heap);
        }
        logsumexp[row] = static_cast<float>(shift + std::log(sum));
        // A heap sort, since NaN would lead std::sort astray.
        std::sort_heap(heap.begin(), heap.end(), better);
        for (std::size_t i = 0; i < k; ++i) {
            values[i] = heap[i].value;
            token_ids[i] = heap[i].token;
        }
    }
}

}  // namespace itune
