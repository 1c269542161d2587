// The whole search in one call: the engine's steps and the search's, without a return to Python between them.
#pragma once

#include "decoder.h"
#include "search.h"

namespace itune {

// A logit is NaN or infinite.
struct NotNumbers : std::runtime_error {
    NotNumbers() : std::runtime_error("logits that are no numbers") {}
};

// Caption the images of `state`. prompts [images, length], left-padded with kNoToken. `interrupted` is called now and
// then, and may throw. Throws NotNumbers.
template <typename Interrupted>
std::vector<std::vector<Caption>> find_captions(Decoder& decoder, State& state, const std::int64_t* prompts,
                                                std::size_t images, std::size_t length, Config config,
                                                Interrupted&& interrupted) {
    Search search(prompts, images, length, std::move(config));
    Moves moves;
    moves.tokens.assign(prompts, prompts + images * length);
    for (std::size_t i = 0; i < images; ++i) moves.parents.push_back(static_cast<std::int64_t>(i));
    std::unique_ptr<bool[]> mask(new bool[moves.tokens.size()]);
    for (std::size_t i = 0; i < moves.tokens.size(); ++i) mask[i] = moves.tokens[i] != kNoToken;
    Found found;
    std::size_t steps = 0;
    while (!moves.parents.empty()) {
        decoder.step(state, moves.tokens.data(), moves.parents.data(), mask.get(), moves.parents.size(), length,
                     static_cast<std::size_t>(search.k()), found);
        for (float value : found.logsumexp) {
            if (!(value < std::numeric_limits<float>::infinity())) throw NotNumbers();
        }
        if (++steps % 16 == 0) interrupted();
        moves = search.advance({found.logits.data(), found.token_ids.data(), found.logsumexp.data(), found.k});
        if (!moves.all_kept) state.keep(moves.kept.data(), moves.kept.size());
        mask.reset();
        length = 1;
    }
    return search.captions();
}

}  // namespace itune
