// The whole search in one call: the engine's steps and the search's, without a return to Python between them.
#pragma once

#include "decoder.h"
#include "search.h"

namespace itune {

// Caption the images of `state`. prompts [images, length], left-padded with kNoToken.
// Raises std::domain_error if a logit is NaN or infinite.
inline std::vector<std::vector<Caption>> find_captions(Decoder& decoder, State& state, const std::int64_t* prompts,
                                                       std::size_t images, std::size_t length, Config config) {
    Search search(prompts, images, length, std::move(config));
    Moves moves;
    moves.tokens.assign(prompts, prompts + images * length);
    for (std::size_t i = 0; i < images; ++i) moves.parents.push_back(static_cast<std::int64_t>(i));
    std::unique_ptr<bool[]> mask(new bool[moves.tokens.size()]);
    for (std::size_t i = 0; i < moves.tokens.size(); ++i) mask[i] = moves.tokens[i] != kNoToken;
    Found found;
    while (!moves.parents.empty()) {
        decoder.step(state, moves.tokens.data(), moves.parents.data(), mask.get(), moves.parents.size(), length,
                     static_cast<std::size_t>(search.k()), found);
        for (float value : found.logsumexp) {
            if (!(value < std::numeric_limits<float>::infinity()))
                throw std::domain_error("logits that are no numbers");
        }
        moves = search.advance({found.logits.data(), found.token_ids.data(), found.logsumexp.data(), found.k});
        if (!moves.all_kept) state.keep(moves.kept.data(), moves.kept.size());
        mask.reset();
        length = 1;
    }
    return search.captions();
}

}  // namespace itune
