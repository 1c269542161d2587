// The search's core in C++: the state of one search between two steps of the engine.
//
// Its NumPy twin (numpy_search.py, beams.py, sampling.py, processors.py) says why each step is what it is. Both do the
// same operations in the same order in float64, so that their results are equal to the last bit; this is compiled
// without contraction into fused multiply-adds for that reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "processors.h"
#include "sampling.h"

namespace itune {

// Becomes itune.runtime.errors.SearchError.
struct SearchError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The fields of SearchConfig, and what the engine's vocabulary needs.
struct Options {
    std::int64_t end_token, most_candidates;
    std::int64_t num_beams, max_new_tokens;
    double length_penalty;
    bool stop_when_full, stop_never_early;
    bool do_sample;
    std::int64_t rows_per_image;
    Warpers warpers;
    std::uint64_t seed;
};

struct Candidates {
    const float* logits;            // [rows, k]
    const std::int64_t* token_ids;  // [rows, k]
    const float* logsumexp;         // [rows]
    std::size_t rows, k;
};

struct Moves {
    Tokens tokens, parents;  // [rows of the next step]
    Tokens kept;             // [images that go on]
    bool all_kept;
};

using Caption = std::pair<Tokens, double>;

class Search {
  public:
    // prompts [images, length], left-padded with kNoToken.
    Search(const std::int64_t* prompts, std::size_t images, std::size_t length, Options options,
           Processors processors);

    std::int64_t k() const { return k_; }
    // Rows that `advance` wants candidates for.
    std::size_t rows() const { return images_.size() * beams_per_image_; }
    Moves advance(const Candidates& candidates);
    const std::vector<std::vector<Caption>>& captions() const { return captions_; }

  private:
    struct Beam {
        Tokens history;  // prompt and generated tokens
        Tokens banned;   // what may not follow
        double score;    // sum of log-probabilities; kImpossible: there is no such beam
    };
    struct Image {
        std::size_t number, prompt_length;
        std::vector<Beam> beams;
        std::vector<Caption> finished;  // of beams: best first; of samples: one place each
    };
    struct Choice {
        double rank, score;
        std::size_t beam;
        std::int64_t token;
    };

    void check(const Candidates& candidates) const;
    void find_constraints();
    void score_row(const Candidates& candidates, std::size_t row, const Beam& beam);
    bool move_beams(Image& image, const Candidates& candidates, std::size_t first_row, Moves& moves);
    bool draw_samples(Image& image, const Candidates& candidates, std::size_t first_row, Moves& moves);
    void select(const Image& image, const Candidates& candidates, std::size_t first_row, std::size_t width);
    void go_on(const Image& image, std::size_t place, std::size_t parent, std::int64_t token, double score);
    void finish_beam(Image& image, const Choice& choice);
    bool is_done(const Image& image) const;
    double normalised(double score) const;
    Tokens written(const Image& image, const Beam& beam, std::int64_t last) const;

    Options options_;
    Processors processors_;
    std::vector<Image> images_;  // the ones still running
    std::vector<std::vector<Caption>> captions_;
    std::size_t beams_per_image_ = 1, longest_history_;
    std::int64_t generated_ = 0, k_ = 0;
    // Scratch, kept for its memory.
    std::vector<double> log_probs_, processed_;
    std::vector<Choice> best_;
    std::vector<Beam> next_;
    Nucleus nucleus_;
};

}  // namespace itune
