// The Python module `_itune_native`; NumpySearch in numpy_search.py has the same interface.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "search.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dimensions>
using Input = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

// A NumPy array that takes over `values`.
nb::ndarray<nb::numpy, std::int64_t> to_numpy(itune::Tokens&& values, std::initializer_list<std::size_t> shape) {
    auto held = std::make_unique<itune::Tokens>(std::move(values));
    std::int64_t* data = held->data();
    nb::capsule owner(held.release(), [](void* pointer) noexcept { delete static_cast<itune::Tokens*>(pointer); });
    return {data, shape, owner};
}

// `config`: a SearchConfig, whose fields are read by name.
void make(itune::Search* self, Input<std::int64_t, 2> prompts, nb::object config, std::int64_t end_token,
          std::int64_t most_candidates) {
    auto integer = [&](const char* name) { return nb::cast<std::int64_t>(config.attr(name)); };
    auto real = [&](const char* name) { return nb::cast<double>(config.attr(name)); };
    nb::object early_stopping = config.attr("early_stopping");
    auto bad_words = nb::cast<std::vector<itune::Tokens>>(config.attr("bad_words"));
    itune::Config own;
    own.end_token = end_token;
    own.most_candidates = most_candidates;
    own.num_beams = integer("num_beams");
    own.rows_per_image = integer("rows_per_image");
    own.max_new_tokens = integer("max_new_tokens");
    own.min_new_tokens = integer("min_new_tokens");
    own.no_repeat_ngram_size = integer("no_repeat_ngram_size");
    own.length_penalty = real("length_penalty");
    own.repetition_penalty = real("repetition_penalty");
    own.stop_when_full = early_stopping.is(nb::bool_(true));
    own.stop_never_early = nb::isinstance<nb::str>(early_stopping);
    own.bad_words = {bad_words.begin(), bad_words.end()};
    own.bad_words.erase({end_token});  // as in transformers; a sequence may end with it
    own.do_sample = nb::cast<bool>(config.attr("do_sample"));
    own.warpers = {real("temperature"), integer("top_k"), real("top_p")};
    own.seed = nb::cast<std::uint64_t>(config.attr("seed"));
    new (self) itune::Search(prompts.data(), prompts.shape(0), prompts.shape(1), std::move(own));
}

nb::tuple advance(itune::Search& search, Input<float, 2> logits, Input<std::int64_t, 2> token_ids,
                  Input<float, 1> logsumexp) {
    itune::Moves moves;
    {
        nb::gil_scoped_release release;
        moves = search.advance({logits.data(), token_ids.data(), logsumexp.data(), logits.shape(1)});
    }
    std::size_t rows = moves.tokens.size(), images = moves.kept.size();
    nb::object kept = nb::none();
    if (!moves.all_kept) kept = nb::cast(to_numpy(std::move(moves.kept), {images}));
    return nb::make_tuple(to_numpy(std::move(moves.tokens), {rows, 1}), to_numpy(std::move(moves.parents), {rows}),
                          kept);
}

}  // namespace

NB_MODULE(_itune_native, m) {
    nb::class_<itune::Search>(m, "Search")
        .def("__init__", &make)
        .def_prop_ro("k", &itune::Search::k)
        .def("advance", &advance)
        .def("captions", &itune::Search::captions);
}
