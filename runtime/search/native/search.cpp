#include "search.h"

#include <algorithm>
#include <cmath>

namespace itune {

Search::Search(const std::int64_t* prompts, std::size_t images, std::size_t length, Options options,
               Processors processors)
    : options_(options), processors_(std::move(processors)), captions_(images) {
    std::size_t places = options_.do_sample ? static_cast<std::size_t>(options_.rows_per_image) : 0;
    for (std::size_t number = 0; number < images; ++number, prompts += length) {
        Tokens prompt(std::find_if(prompts, prompts + length, [](std::int64_t token) { return token != kNoToken; }),
                      prompts + length);
        std::vector<Caption> finished(places, Caption{{}, kImpossible});
        images_.push_back({number, prompt.size(), {Beam{prompt, {}, 0}}, std::move(finished)});
    }
    find_banned();
}

void Search::find_banned() {
    std::size_t lowered = 0;
    for (Image& image : images_) {
        for (Beam& beam : image.beams) {
            processors_.ban(beam.history, generated_, beam.banned);
            lowered = std::max(lowered, processors_.lowered(beam.history, beam.banned));
        }
    }
    std::int64_t top_k = options_.warpers.top_k > 0 ? options_.warpers.top_k : options_.most_candidates;
    std::int64_t unchanged = options_.do_sample ? top_k : 2 * options_.num_beams;
    k_ = std::min(unchanged + static_cast<std::int64_t>(lowered), options_.most_candidates);
}

Moves Search::advance(const Candidates& candidates) {
    Moves moves;
    std::vector<Image> running;
    running.reserve(images_.size());
    ++generated_;
    for (std::size_t i = 0; i < images_.size(); ++i) {
        Image& image = images_[i];
        std::size_t first_row = i * beams_per_image_;
        if (options_.do_sample) {
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
    beams_per_image_ = static_cast<std::size_t>(options_.rows_per_image);
    find_banned();
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
                      beam.banned);
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

// Greedy and beam search: put how each new beam continues into best_.
void Search::move_beams(Image& image, const Candidates& candidates, std::size_t first_row) {
    std::size_t num_beams = static_cast<std::size_t>(options_.num_beams);
    // Each beam ends at most once, so of twice as many candidates num_beams can continue.
    select(image, candidates, first_row, num_beams > 1 ? 2 * num_beams : 1);
    std::vector<Caption>& finished = image.finished;
    for (std::size_t place = 0; place < best_.size(); ++place) {
        Choice& choice = best_[place];
        if (choice.token != options_.end_token && generated_ < options_.max_new_tokens) continue;
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
void Search::draw_samples(Image& image, const Candidates& candidates, std::size_t first_row) {
    std::uint64_t step = static_cast<std::uint64_t>(generated_ - 1);
    bool possible = false;
    best_.clear();
    for (std::size_t sample = 0; sample < image.finished.size(); ++sample) {
        std::size_t parent = image.beams.size() > 1 ? sample : 0;
        const Beam& beam = image.beams[parent];
        const std::int64_t* token_ids = candidates.token_ids + (first_row + parent) * candidates.k;
        Choice drawn{0, kImpossible, parent, options_.end_token};
        if (beam.score > kImpossible) {
            if (parent == sample) {  // at the first step all samples share the row of the first
                score_row(candidates, first_row + parent, beam);
                possible = nucleus_.restrict_to(processed_.data(), token_ids, candidates.k, options_.warpers);
            }
            if (possible) {
                std::size_t choice = nucleus_.choose(uniform(options_.seed, sample, step));
                drawn.token = token_ids[choice];
                drawn.score = beam.score + log_probs_[choice];
                if (drawn.token == options_.end_token || generated_ == options_.max_new_tokens) {
                    image.finished[sample] = caption(image, beam, drawn.token, drawn.score);
                    drawn.score = kImpossible;
                }
            }
        }
        best_.push_back(drawn);
    }
}

// The caption that a beam becomes with its last token.
Caption Search::caption(const Image& image, const Beam& beam, std::int64_t last, double score) const {
    Tokens tokens(beam.history.begin() + static_cast<std::ptrdiff_t>(image.prompt_length), beam.history.end());
    if (last != options_.end_token) tokens.push_back(last);
    return {std::move(tokens), score / std::pow(static_cast<double>(generated_), options_.length_penalty)};
}

// Whether no better caption can follow: `_check_early_stop_heuristic` of transformers.
bool Search::is_done(const Image& image) const {
    if (options_.do_sample) {
        return std::all_of(image.beams.begin(), image.beams.end(),
                           [](const Beam& beam) { return beam.score == kImpossible; });
    }
    bool full = image.finished.size() == static_cast<std::size_t>(options_.num_beams);
    if (full && options_.stop_when_full) return true;
    bool longest = options_.stop_never_early && options_.length_penalty > 0;
    double length = static_cast<double>(longest ? options_.max_new_tokens : generated_);
    double reachable = image.beams[0].score / std::pow(length, options_.length_penalty);
    return !(reachable > (full ? image.finished.back().second : kImpossible));
}

}  // namespace itune
