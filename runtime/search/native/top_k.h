// The k best logits of each row and the log-sum-exp of the row, in one pass over memory (twin: top_k.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace itune {

// logits [rows, size] -> values, token_ids [rows, k], best first and equal ones by token; logsumexp [rows]. k <= size.
// Where a row holds NaN or +inf its logsumexp is not finite either, and the rest is any of its tokens.
void top_k(const float* logits, std::size_t rows, std::size_t size, std::size_t k, float* values,
           std::int64_t* token_ids, float* logsumexp);

}  // namespace itune
