// The search's core in C++: the state of one search between two steps of the engine.
//
// Its NumPy twin (numpy_search.py, sampling.py, processors.py) says why each step is what it is. Both do the same in
// float64: their captions are equal, and their scores agree to 1e-12.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "processors.h"
#include "sampling.h"

namespace itune {

// Fields of SearchConfig, and the vocabulary of the engine.
struct Options {
    std::int64_t end_token, most_candidates, num_beams, rows_per_image, max_new_tokens;
    double length_penalty;
    bool stop_when_full, stop_never_early;  // early_stopping: True, "never"
    bool do_sample;
    Warpers warpers;
    std::uint64_t seed;
};

struct Candidates {
    const float* logits;            // [rows, k]
    const std::int64_t* token_ids;  // [rows, k]
    const float* logsumexp;         // [rows]
    std::size_t k;
};

struct Moves {
    Tokens tokens, parents;  // [rows of the next step]
    Tokens kept;             // [images that continue]
    bool all_kept;
};

using Caption = std::pair<Tokens, double>;

class Search {
  public:
    // prompts [images, length], left-padded with kNoToken.
    Search(const std::int64_t* prompts, std::size_t images, std::size_t length, Options options,
           Processors processors);

    std::int64_t k() const { return k_; }
    // `candidates`: at least k() for each row.
    Moves advance(const Candidates& candidates);
    const std::vector<std::vector<Caption>>& captions() const { return captions_; }

  private:
    struct Beam {
        Tokens history;  // prompt and generated tokens
        Tokens banned;   // tokens that may not follow
        double score;    // sum of log-probabilities; kImpossible marks a beam that does not exist
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

    void find_banned();
    void score_row(const Candidates& candidates, std::size_t row, const Beam& beam);
    void move_beams(Image& image, const Candidates& candidates, std::size_t first_row);
    void draw_samples(Image& image, const Candidates& candidates, std::size_t first_row);
    void select(const Image& image, const Candidates& candidates, std::size_t first_row, std::size_t width);
    Caption caption(const Image& image, const Beam& beam, std::int64_t last, double score) const;
    bool is_done(const Image& image) const;

    Options options_;
    Processors processors_;
    std::vector<Image> images_;  // the ones still running
    std::vector<std::vector<Caption>> captions_;
    std::size_t beams_per_image_ = 1;
    std::int64_t generated_ = 0, k_ = 0;
    // Reused between steps.
    std::vector<double> log_probs_, processed_;
    std::vector<Choice> best_;  // of one image: how each new beam or sample continues
    std::vector<Beam> next_;
    Nucleus nucleus_;
};

}  // namespace itune
