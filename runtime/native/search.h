// The search's core in C++: the state of one search between two steps of the engine.
//
// Its NumPy twin (numpy_search.py, sampling.py) says why each step is what it is. Both do the same in float64: their
// captions are equal, and their scores agree to 1e-12.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "sampling.h"

namespace itune {

using Tokens = std::vector<std::int64_t>;
using Caption = std::pair<Tokens, double>;

constexpr std::int64_t kNoToken = -1;

// The fields of SearchConfig, and the engine's vocabulary.
struct Config {
    std::int64_t end_token, most_candidates;
    std::int64_t num_beams, rows_per_image, max_new_tokens, min_new_tokens, no_repeat_ngram_size;
    double length_penalty, repetition_penalty;
    bool stop_when_full, stop_never_early;  // early_stopping: True, "never"
    std::set<Tokens> bad_words;             // not the end token alone
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

class Search {
  public:
    // prompts [images, length], left-padded with kNoToken.
    Search(const std::int64_t* prompts, std::size_t images, std::size_t length, Config config)
        : config_(std::move(config)), captions_(images) {
        std::size_t places = config_.do_sample ? static_cast<std::size_t>(config_.rows_per_image) : 0;
        for (std::size_t number = 0; number < images; ++number, prompts += length) {
            auto first = std::find_if(prompts, prompts + length, [](std::int64_t token) { return token != kNoToken; });
            Tokens prompt(first, prompts + length);
            std::vector<Caption> finished(places, Caption{{}, kImpossible});
            images_.push_back({number, prompt.size(), {Beam{prompt, {}, 0}}, std::move(finished)});
        }
        find_banned();
    }

    // Candidates that each row of the next `advance` needs.
    std::int64_t k() const { return k_; }
    const std::vector<std::vector<Caption>>& captions() const { return captions_; }

    // `candidates`: at least k() for each row.
    Moves advance(const Candidates& candidates) {
        Moves moves;
        std::vector<Image> running;
        running.reserve(images_.size());
        ++generated_;
        std::size_t next_row = 0;
        for (std::size_t i = 0; i < images_.size(); ++i) {
            Image& image = images_[i];
            std::size_t first_row = next_row;
            next_row += image.beams.size();
            if (config_.do_sample) {
                draw_samples(image, candidates, first_row);
            } else {
                move_beams(image, candidates, first_row);
            }
            next_.resize(best_.size());
            for (std::size_t place = 0; place < best_.size(); ++place) {
                next_[place].history = image.beams[best_[place].beam].history;
                next_[place].history.push_back(best_[place].token);
                next_[place].score = best_[place].score;
            }
            std::swap(image.beams, next_);
            if (is_done(image)) {
                for (Caption& caption : image.finished) {
                    if (caption.second > kImpossible) captions_[image.number].push_back(std::move(caption));
                }
                continue;
            }
            for (const Choice& choice : best_) {
                moves.tokens.push_back(choice.token);
                moves.parents.push_back(static_cast<std::int64_t>(first_row + choice.beam));
            }
            moves.kept.push_back(static_cast<std::int64_t>(i));
            running.push_back(std::move(image));
        }
        moves.all_kept = running.size() == images_.size();
        images_ = std::move(running);
        find_banned();
        return moves;
    }

  private:
    struct Beam {
        Tokens history;  // prompt and generated tokens
        Tokens banned;   // tokens that may not follow, in ascending order
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

    // Set each beam's banned tokens, and k_ so that enough candidates keep their scores.
    void find_banned() {
        std::size_t lowered = 0;
        for (Image& image : images_) {
            for (Beam& beam : image.beams) {
                ban(beam);
                std::size_t penalised = config_.repetition_penalty != 1 ? beam.history.size() : 0;
                lowered = std::max(lowered, beam.banned.size() + penalised);
            }
        }
        std::int64_t top_k = config_.warpers.top_k > 0 ? config_.warpers.top_k : config_.most_candidates;
        std::int64_t unchanged = config_.do_sample ? top_k : 2 * config_.num_beams;
        k_ = std::min(unchanged + static_cast<std::int64_t>(lowered), config_.most_candidates);
    }

    // Minimum length, n-grams that may not repeat, bad words.
    void ban(Beam& beam) const {
        const Tokens& history = beam.history;
        auto length = static_cast<std::int64_t>(history.size());
        auto ends_with = [&](Tokens::const_iterator first, std::int64_t size) {
            return size <= length && std::equal(first, first + size, history.end() - size);
        };
        beam.banned.clear();
        if (generated_ < config_.min_new_tokens) beam.banned.push_back(config_.end_token);
        std::int64_t before = config_.no_repeat_ngram_size - 1;
        for (std::int64_t last = before; before >= 0 && last < length; ++last) {
            if (ends_with(history.begin() + last - before, before)) beam.banned.push_back(history[last]);
        }
        for (const Tokens& word : config_.bad_words) {
            if (ends_with(word.begin(), static_cast<std::int64_t>(word.size()) - 1)) beam.banned.push_back(word.back());
        }
        std::sort(beam.banned.begin(), beam.banned.end());
    }

    // Lower the scores of a row's candidates: repetition penalty, then banned tokens.
    void process(std::vector<double>& scores, const std::int64_t* token_ids, const Beam& beam) const {
        double penalty = config_.repetition_penalty;
        for (std::size_t i = 0; penalty != 1 && i < scores.size(); ++i) {
            bool seen = false;  // looking at every token vectorises, stopping at the first match does not
            for (std::int64_t token : beam.history) seen |= token == token_ids[i];
            if (seen) scores[i] = scores[i] < 0 ? scores[i] * penalty : scores[i] / penalty;
        }
        for (std::size_t i = 0; !beam.banned.empty() && i < scores.size(); ++i) {
            if (std::binary_search(beam.banned.begin(), beam.banned.end(), token_ids[i])) scores[i] = kImpossible;
        }
    }

    void score_row(const Candidates& candidates, std::size_t row, const Beam& beam) {
        const float* logits = candidates.logits + row * candidates.k;
        // A row without any possible token has a logsumexp of -inf, and -inf - -inf is NaN.
        double logsumexp = candidates.logsumexp[row];
        if (logsumexp == kImpossible) logsumexp = 0;
        log_probs_.resize(candidates.k);
        for (std::size_t j = 0; j < candidates.k; ++j) log_probs_[j] = static_cast<double>(logits[j]) - logsumexp;
        if (config_.num_beams > 1) {
            processed_ = log_probs_;
        } else {
            processed_.assign(logits, logits + candidates.k);
        }
        process(processed_, candidates.token_ids + row * candidates.k, beam);
    }

    // Put the `width` best candidates of all beams into best_: by rank, then lower beam, then lower token.
    void select(const Image& image, const Candidates& candidates, std::size_t first_row, std::size_t width) {
        auto better = [](const Choice& a, const Choice& b) {
            if (a.rank != b.rank) return a.rank > b.rank;
            return a.beam != b.beam ? a.beam < b.beam : a.token < b.token;
        };
        best_.clear();
        for (std::size_t b = 0; b < image.beams.size(); ++b) {
            const Beam& beam = image.beams[b];
            score_row(candidates, first_row + b, beam);
            const std::int64_t* token_ids = candidates.token_ids + (first_row + b) * candidates.k;
            for (std::size_t j = 0; j < candidates.k; ++j) {
                Choice choice{processed_[j], 0, b, token_ids[j]};
                if (config_.num_beams > 1) {
                    choice.rank = choice.score = beam.score + processed_[j];
                } else {
                    choice.score = beam.score + (processed_[j] > kImpossible ? log_probs_[j] : kImpossible);
                }
                if (best_.size() == width) {
                    if (!better(choice, best_.back())) continue;
                    best_.pop_back();
                }
                best_.insert(std::upper_bound(best_.begin(), best_.end(), choice, better), choice);
            }
        }
        Choice missing = best_.back();  // in a vocabulary smaller than `width`
        missing.score = kImpossible;
        best_.resize(width, missing);
    }

    // Greedy and beam search: put how each new beam continues into best_.
    void move_beams(Image& image, const Candidates& candidates, std::size_t first_row) {
        std::size_t num_beams = static_cast<std::size_t>(config_.num_beams);
        // Each beam ends at most once, so of twice as many candidates num_beams can continue.
        select(image, candidates, first_row, num_beams > 1 ? 2 * num_beams : 1);
        std::vector<Caption>& finished = image.finished;
        for (std::size_t place = 0; place < best_.size(); ++place) {
            Choice& choice = best_[place];
            if (choice.token != config_.end_token && generated_ < config_.max_new_tokens) continue;
            if (place < num_beams && choice.score > kImpossible) {  // an end beyond the num_beams best does not count
                finished.push_back(caption(image, image.beams[choice.beam], choice.token, choice.score));
            }
            choice.score = kImpossible;
        }
        // Stable: of equals, the one that finished earlier.
        std::stable_sort(finished.begin(), finished.end(),
                         [](const Caption& a, const Caption& b) { return a.second > b.second; });
        if (finished.size() > num_beams) finished.resize(num_beams);
        std::stable_partition(best_.begin(), best_.end(), [](const Choice& each) { return each.score > kImpossible; });
        best_.resize(num_beams);
    }

    // Sampling: put how each sample continues into best_.
    void draw_samples(Image& image, const Candidates& candidates, std::size_t first_row) {
        std::uint64_t step = static_cast<std::uint64_t>(generated_ - 1);
        bool possible = false;
        best_.clear();
        for (std::size_t sample = 0; sample < image.finished.size(); ++sample) {
            std::size_t parent = image.beams.size() > 1 ? sample : 0;
            const Beam& beam = image.beams[parent];
            const std::int64_t* token_ids = candidates.token_ids + (first_row + parent) * candidates.k;
            Choice drawn{0, kImpossible, parent, config_.end_token};
            if (beam.score > kImpossible) {
                if (parent == sample) {  // at the first step all samples share the row of the first
                    score_row(candidates, first_row + parent, beam);
                    possible = nucleus_.restrict_to(processed_.data(), token_ids, candidates.k, config_.warpers);
                }
                if (possible) {
                    std::size_t choice = nucleus_.choose(uniform(config_.seed, sample, step));
                    drawn.token = token_ids[choice];
                    drawn.score = beam.score + log_probs_[choice];
                    if (drawn.token == config_.end_token || generated_ == config_.max_new_tokens) {
                        image.finished[sample] = caption(image, beam, drawn.token, drawn.score);
                        drawn.score = kImpossible;
                    }
                }
            }
            best_.push_back(drawn);
        }
    }

    // The caption that a beam becomes with its last token.
    Caption caption(const Image& image, const Beam& beam, std::int64_t last, double score) const {
        Tokens tokens(beam.history.begin() + static_cast<std::ptrdiff_t>(image.prompt_length), beam.history.end());
        if (last != config_.end_token) tokens.push_back(last);
        return {std::move(tokens), score / std::pow(static_cast<double>(generated_), config_.length_penalty)};
    }

    // Whether no better caption can follow: `_check_early_stop_heuristic` of transformers.
    bool is_done(const Image& image) const {
        if (config_.do_sample) {
            return std::all_of(image.beams.begin(), image.beams.end(),
                               [](const Beam& beam) { return beam.score == kImpossible; });
        }
        bool full = image.finished.size() == static_cast<std::size_t>(config_.num_beams);
        if (full && config_.stop_when_full) return true;
        bool longest = config_.stop_never_early && config_.length_penalty > 0;
        double length = static_cast<double>(longest ? config_.max_new_tokens : generated_);
        double reachable = image.beams[0].score / std::pow(length, config_.length_penalty);
        return !(reachable > (full ? image.finished.back().second : kImpossible));
    }

    Config config_;
    std::vector<Image> images_;  // the ones still running
    std::vector<std::vector<Caption>> captions_;
    std::int64_t generated_ = 0, k_ = 0;
    // Reused between steps.
    std::vector<double> log_probs_, processed_;
    std::vector<Choice> best_;  // of one image: how each new beam or sample continues
    std::vector<Beam> next_;
    Nucleus nucleus_;
};

}  // namespace itune
