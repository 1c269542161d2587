// The Python module `_itune_native`; _itune_native.pyi has its types.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "search.h"
#include "top_k.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dimensions>
using Input = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

// A NumPy array over `values`, which it owns from now on.
template <typename T>
nb::ndarray<nb::numpy, T> to_numpy(std::vector<T>&& values, std::initializer_list<std::size_t> shape) {
    auto held = std::make_unique<std::vector<T>>(std::move(values));
    T* data = held->data();
    nb::capsule owner(held.release(), [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
    return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

nb::tuple advance(itune::Search& search, Input<float, 2> logits, Input<std::int64_t, 2> token_ids,
                  Input<float, 1> logsumexp) {
    std::size_t rows = search.rows(), k = logits.shape(1);
    if (logits.shape(0) != rows || token_ids.shape(0) != rows || token_ids.shape(1) != k ||
        logsumexp.shape(0) != rows) {
        throw itune::SearchError("The decoder must return logits, token ids and a logsumexp for each of " +
                                 std::to_string(rows) + " rows.");
    }
    itune::Moves moves;
    {
        nb::gil_scoped_release release;
        moves = search.advance({logits.data(), token_ids.data(), logsumexp.data(), rows, k});
    }
    std::size_t next_rows = moves.tokens.size(), images = moves.kept.size();
    nb::object kept = nb::none();
    if (!moves.all_kept) kept = nb::cast(to_numpy(std::move(moves.kept), {images}));
    return nb::make_tuple(to_numpy(std::move(moves.tokens), {next_rows, 1}),
                          to_numpy(std::move(moves.parents), {next_rows}), kept);
}

nb::tuple top_k(Input<float, 2> logits, std::size_t k) {
    std::size_t rows = logits.shape(0), size = logits.shape(1);
    k = std::min(k, size);
    std::vector<float> values(rows * k), logsumexp(rows);
    std::vector<std::int64_t> token_ids(rows * k);
    {
        nb::gil_scoped_release release;
        itune::top_k(logits.data(), rows, size, k, values.data(), token_ids.data(), logsumexp.data());
    }
    return nb::make_tuple(to_numpy(std::move(values), {rows, k}), to_numpy(std::move(token_ids), {rows, k}),
                          to_numpy(std::move(logsumexp), {rows}));
}

}  // namespace

NB_MODULE(_itune_native, m) {
    nb::object search_error = nb::module_::import_("itune.runtime.errors").attr("SearchError");
    nb::register_exception_translator(
        [](const std::exception_ptr& pointer, void* search_error) {
            try {
                std::rethrow_exception(pointer);
            } catch (const itune::SearchError& error) {
                PyErr_SetString(static_cast<PyObject*>(search_error), error.what());
            }
        },
        search_error.release().ptr());

    nb::class_<itune::Search>(m, "Search")
        .def(
            "__init__",
            [](itune::Search* self, Input<std::int64_t, 2> prompts, std::int64_t end_token,
               std::int64_t most_candidates, std::int64_t num_beams, std::int64_t max_new_tokens,
               std::int64_t min_new_tokens, double length_penalty, bool stop_when_full, bool stop_never_early,
               std::int64_t no_repeat_ngram_size, double repetition_penalty,
               const std::vector<itune::Tokens>& bad_words, bool do_sample, std::int64_t rows_per_image,
               double temperature, std::int64_t top_k, double top_p, std::uint64_t seed) {
                itune::Options options{end_token,      most_candidates,  num_beams, max_new_tokens, length_penalty,
                                       stop_when_full, stop_never_early, do_sample, rows_per_image,
                                       {temperature, top_k, top_p}, seed};
                itune::Processors processors(repetition_penalty, no_repeat_ngram_size, min_new_tokens, bad_words,
                                             end_token);
                new (self) itune::Search(prompts.data(), prompts.shape(0), prompts.shape(1), options,
                                         std::move(processors));
            },
            nb::arg("prompts"), nb::kw_only(), nb::arg("end_token"), nb::arg("most_candidates"),
            nb::arg("num_beams"), nb::arg("max_new_tokens"), nb::arg("min_new_tokens"), nb::arg("length_penalty"),
            nb::arg("stop_when_full"), nb::arg("stop_never_early"), nb::arg("no_repeat_ngram_size"),
            nb::arg("repetition_penalty"), nb::arg("bad_words"), nb::arg("do_sample"), nb::arg("rows_per_image"),
            nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("seed"))
        .def_prop_ro("k", &itune::Search::k)
        .def("advance", &advance)
        .def("captions", &itune::Search::captions);
    m.def("top_k", &top_k, nb::arg("logits"), nb::arg("k"));
}
