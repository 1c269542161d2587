#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace itune {

Search::Search(const std::int64_t* prompts, std::size_t images, std::size_t length, Options options,
               Processors processors)
    : options_(options), processors_(std::move(processors)), captions_(images), longest_history_(length) {
    for (std::size_t number = 0; number < images; ++number, prompts += length) {
        Tokens prompt(std::find_if(prompts, prompts + length, [](std::int64_t token) { return token != kNoToken; }),
                      prompts + length);
        Image image{number, prompt.size(), {Beam{prompt, {}, 0}}, {}};
        if (options_.do_sample) {
            image.finished.resize(static_cast<std::size_t>(options_.rows_per_image), Caption{{}, kImpossible});
        }
        images_.push_back(std::move(image));
    }
    find_constraints();
}

void Search::find_constraints() {
    std::size_t most_banned = 0;
    for (Image& image : images_) {
        for (Beam& beam : image.beams) {
            processors_.ban(beam.history, beam.banned);
            most_banned = std::max(most_banned, beam.banned.size());
        }
    }
    const Warpers& warpers = options_.warpers;
    std::int64_t untouched = !options_.do_sample     ? 2 * options_.num_beams
                             : warpers.top_k > 0 ? warpers.top_k
                                                 : options_.most_candidates;
    std::int64_t pushed =
        processors_.pushed_everywhere(longest_history_, generated_) + static_cast<std::int64_t>(most_banned);
    k_ = std::min(untouched + pushed, options_.most_candidates);
}

void Search::check(const Candidates& candidates) const {
    if (static_cast<std::int64_t>(candidates.k) < k_) {
        throw SearchError("The decoder returned " + std::to_string(candidates.k) +
                          " candidates a row, an exact search takes " + std::to_string(k_) +
                          " here: let it return more.");
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    bool numbers = true;  // a NaN compares false
    for (std::size_t i = 0; i < candidates.rows; ++i) numbers &= candidates.logsumexp[i] < infinity;
    for (std::size_t i = 0; i < candidates.rows * candidates.k; ++i) numbers &= candidates.logits[i] < infinity;
    if (!numbers) {
        throw SearchError(
            "The decoder returned logits that are not numbers (NaN or infinite): export it again, in fp32 if "
            "it was fp16 or quantised.");
    }
}

Moves Search::advance(const Candidates& candidates) {
    check(candidates);
    Moves moves;
    ++generated_;
    ++longest_history_;
    std::vector<Image> running;
    running.reserve(images_.size());
    for (std::size_t i = 0; i < images_.size(); ++i) {
        Image& image = images_[i];
        std::size_t first_row = i * beams_per_image_, moved = moves.tokens.size();
        bool done = options_.do_sample ? draw_samples(image, candidates, first_row, moves)
                                       : move_beams(image, candidates, first_row, moves);
        if (!done) {
            moves.kept.push_back(static_cast<std::int64_t>(i));
            running.push_back(std::move(image));
            continue;
        }
        moves.tokens.resize(moved);
        moves.parents.resize(moved);
        std::vector<Caption>& captions = captions_[image.number];
        for (Caption& caption : image.finished) {
            if (caption.second > kImpossible) captions.push_back(std::move(caption));
        }
        if (captions.empty()) {
            std::size_t number = image.number;
            images_.clear();
            throw SearchError("No caption is possible for image " + std::to_string(number) + ", every next token is forbidden after " +
                              std::to_string(generated_ - 1) + ": loosen bad_words, no_repeat_ngram_size or min_new_tokens.");
        }
    }
    moves.all_kept = running.size() == images_.size();
    images_ = std::move(running);
    beams_per_image_ = static_cast<std::size_t>(options_.rows_per_image);
    find_constraints();
    return moves;
}

void Search::score_row(const Candidates& candidates, std::size_t row, const Beam& beam) {
    const float* logits = candidates.logits + row * candidates.k;
    // A row without any possible token has a logsumexp of -inf, and -inf - -inf is NaN.
    double logsumexp = candidates.logsumexp[row];
    if (logsumexp == kImpossible) logsumexp = 0;
    log_probs_.resize(candidates.k);
    for (std::size_t j = 0; j < candidates.k; ++j) log_probs_[j] = static_cast<double>(logits[j]) - logsumexp;
    if (options_.num_beams > 1) {
        processed_ = log_probs_;
    } else {
        processed_.assign(logits, logits + candidates.k);
    }
    processors_.apply(processed_.data(), candidates.token_ids + row * candidates.k, candidates.k, beam.history,
                      beam.banned, generated_ - 1);
}

// Put the `width` best candidates of all beams into best_: by rank, then lower beam, then lower token.
void Search::select(const Image& image, const Candidates& candidates, std::size_t first_row, std::size_t width) {
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
            if (options_.num_beams > 1) {
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
    Choice missing = best_.back();  // in a vocabulary smaller than that
    missing.score = kImpossible;
    best_.resize(width, missing);
}

// Greedy and beam search: `beams.advance`. Returns whether the image is done.
bool Search::move_beams(Image& image, const Candidates& candidates, std::size_t first_row, Moves& moves) {
    std::size_t num_beams = static_cast<std::size_t>(options_.num_beams);
    // Twice as many candidates as beams: each beam ends at most once, so num_beams of them can go on.
    select(image, candidates, first_row, num_beams > 1 ? 2 * num_beams : 1);
    for (std::size_t place = 0; place < best_.size(); ++place) {
        Choice& choice = best_[place];
        if (choice.token != options_.end_token && generated_ < options_.max_new_tokens) continue;
        // Beyond the num_beams best, an end does not count.
        if (place < num_beams && choice.score > kImpossible) finish_beam(image, choice);
        choice.score = kImpossible;
    }
    std::stable_partition(best_.begin(), best_.end(), [](const Choice& each) { return each.score > kImpossible; });
    next_.resize(num_beams);
    for (std::size_t place = 0; place < num_beams; ++place) {
        const Choice& choice = best_[place];
        go_on(image, place, choice.beam, choice.token, choice.score);
        moves.tokens.push_back(choice.token);
        moves.parents.push_back(static_cast<std::int64_t>(first_row + choice.beam));
    }
    std::swap(image.beams, next_);
    return is_done(image);
}

// Sampling: `sampling.draw`. Returns whether the image is done.
bool Search::draw_samples(Image& image, const Candidates& candidates, std::size_t first_row, Moves& moves) {
    std::size_t samples = image.finished.size(), step = static_cast<std::size_t>(generated_ - 1);
    bool done = true, possible = false;
    next_.resize(samples);
    for (std::size_t sample = 0; sample < samples; ++sample) {
        std::size_t parent = image.beams.size() > 1 ? sample : 0;
        const Beam& beam = image.beams[parent];
        const std::int64_t* token_ids = candidates.token_ids + (first_row + parent) * candidates.k;
        std::int64_t token = options_.end_token;
        double score = kImpossible;
        if (beam.score > kImpossible) {
            if (parent == sample) {  // at the first step all samples share the row of the first
                score_row(candidates, first_row + parent, beam);
                possible = nucleus_.restrict_to(processed_.data(), token_ids, candidates.k, options_.warpers);
            }
            if (possible) {
                std::size_t choice = nucleus_.choose(uniform(options_.seed, sample, step));
                token = token_ids[choice];
                score = beam.score + log_probs_[choice];
                if (token == options_.end_token || generated_ == options_.max_new_tokens) {
                    image.finished[sample] = {written(image, beam, token), normalised(score)};
                    score = kImpossible;
                }
            }
        }
        done = done && score == kImpossible;
        go_on(image, sample, parent, token, score);
        moves.tokens.push_back(token);
        moves.parents.push_back(static_cast<std::int64_t>(first_row + parent));
    }
    std::swap(image.beams, next_);
    return done;
}

void Search::go_on(const Image& image, std::size_t place, std::size_t parent, std::int64_t token, double score) {
    Beam& beam = next_[place];
    beam.history = image.beams[parent].history;
    beam.history.push_back(token);
    beam.score = score;
}

void Search::finish_beam(Image& image, const Choice& choice) {
    double score = normalised(choice.score);
    std::vector<Caption>& finished = image.finished;
    auto place = std::find_if(finished.begin(), finished.end(), [score](const Caption& c) { return c.second < score; });
    finished.insert(place, {written(image, image.beams[choice.beam], choice.token), score});
    finished.resize(std::min(finished.size(), static_cast<std::size_t>(options_.num_beams)));
}

// Whether nothing is left to gain: `_check_early_stop_heuristic` of transformers.
bool Search::is_done(const Image& image) const {
    bool full = image.finished.size() == static_cast<std::size_t>(options_.num_beams);
    if (full && options_.stop_when_full) return true;
    bool longest = options_.stop_never_early && options_.length_penalty > 0;
    double length = static_cast<double>(longest ? options_.max_new_tokens : generated_);
    double reachable = image.beams[0].score / std::pow(length, options_.length_penalty);
    return !(reachable > (full ? image.finished.back().second : kImpossible));
}

double Search::normalised(double score) const {
    return score / std::pow(static_cast<double>(generated_), options_.length_penalty);
}

// The caption that a beam has become with its last token.
Tokens Search::written(const Image& image, const Beam& beam, std::int64_t last) const {
    Tokens tokens(beam.history.begin() + static_cast<std::ptrdiff_t>(image.prompt_length), beam.history.end());
    if (last != options_.end_token) tokens.push_back(last);
    return tokens;
}

}  // namespace itune
