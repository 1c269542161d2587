// The Python module `_itune_native`: the search, whose NumPy twin in numpy_search.py has the same interface, and the
// decoder of engines/native.py.
#include "bindings.h"
#include "captions.h"
#include "encoder.h"

namespace {

// `config`: a SearchConfig, whose fields are read by name.
itune::Config search_config(nb::object config, std::int64_t end_token, std::int64_t most_candidates) {
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
    return own;
}

void make_search(itune::Search* self, Input<std::int64_t, 2> prompts, nb::object config, std::int64_t end_token,
                 std::int64_t most_candidates) {
    new (self) itune::Search(prompts.data(), prompts.shape(0), prompts.shape(1),
                             search_config(config, end_token, most_candidates));
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

// Sizes come from a file; with this limit, sums and products of two do not overflow.
std::size_t read_size(nb::object settings, const char* name) {
    auto value = nb::cast<std::size_t>(settings.attr(name));
    if (value >= std::size_t{1} << 30) throw nb::value_error((std::string(name) + " is too large").c_str());
    return value;
}

void check_heads(std::size_t width, std::size_t heads) {
    if (heads == 0 || width % heads != 0) throw nb::value_error("heads do not divide the width");
}

// What a DecoderShape and an EncoderShape have in common.
template <typename Config>
void read_transformer(nb::object settings, Config& config) {
    config.heads = read_size(settings, "heads");
    config.width = read_size(settings, "width");
    config.inner = read_size(settings, "inner");
    config.visual_width = read_size(settings, "visual_width");
    config.epsilon = nb::cast<float>(settings.attr("epsilon"));
    config.activation = find_activation(nb::cast<std::string>(settings.attr("activation")));
    check_heads(config.width, config.heads);
}

// `settings`: a DecoderShape of engines/native.py; `tensors`: the graph's weights by name.
void make_decoder(itune::Decoder* self, nb::object settings, nb::dict tensors, int threads, const std::string& wanted) {
    auto size = [&](const char* name) { return read_size(settings, name); };
    Weights weights(std::move(tensors));
    std::unique_ptr<itune::Decoder> decoder(new itune::Decoder(find_kernels(wanted), threads));
    itune::DecoderConfig& config = decoder->config;
    read_transformer(settings, config);
    config.vocabulary = size("vocabulary");
    config.positions = size("positions");
    config.prefix = size("prefix");
    config.cross_attention = nb::cast<bool>(settings.attr("cross_attention"));
    float scale = nb::cast<float>(settings.attr("attention_scale"));
    bool by_layer = nb::cast<bool>(settings.attr("inverse_layer_scale"));
    auto adapted = nb::cast<std::vector<std::size_t>>(settings.attr("adapter_layers"));
    std::size_t width = config.width;
    decoder->config.adapters = adapted.size();
    for (std::size_t i = 0; i < size("layers"); ++i) {
        std::string name = "transformer.h." + std::to_string(i), own = "layers." + std::to_string(i);
        itune::Layer layer;
        layer.scale = by_layer ? scale / static_cast<float>(i + 1) : scale;
        auto place = std::find(adapted.begin(), adapted.end(), i);
        if (place != adapted.end()) layer.visual = static_cast<int>(place - adapted.begin());
        bool merged = layer.visual >= 0 && !config.cross_attention;
        std::size_t inner = config.inner + (merged ? config.visual_width : 0);
        layer.attention_norm = weights.norm(name + ".ln_1", width);
        layer.qkv = weights.linear(name + ".attn.c_attn", 3 * width, width);
        layer.projection = weights.linear(name + ".attn.c_proj", width, width);
        layer.feed_forward_norm = weights.norm(name + ".ln_2", width);
        layer.inner = weights.linear(name + ".mlp.c_fc", inner, width);
        layer.outer = weights.linear(name + ".mlp.c_proj", width, inner);
        if (merged) {
            std::vector<float> bias = weights.vector(own + ".output.bias", width);
            for (std::size_t n = 0; n < width; ++n) layer.outer.bias[n] += bias[n];
        } else if (layer.visual >= 0) {
            layer.cross_norm = weights.norm(own + ".norm", width);
            layer.query = weights.linear(own + ".query", config.visual_width, width);
            layer.output = weights.linear(own + ".output", width, config.visual_width);
        }
        decoder->layers.push_back(std::move(layer));
    }
    decoder->last_norm = weights.norm("transformer.ln_f", width);
    decoder->positions = weights.table("transformer.wpe.weight", config.positions, width);
    std::size_t outputs = config.vocabulary;
    if (weights.has("vocabulary.token_ids")) {
        decoder->shortlist = copied(weights.get<std::int64_t, 1>("vocabulary.token_ids"));
        decoder->shortlist_rows = copied(weights.get<std::int32_t, 1>("vocabulary.rows"));
        outputs = decoder->shortlist.size();
        if (decoder->shortlist_rows.size() != config.vocabulary) Weights::wrong("vocabulary.rows");
    }
    decoder->embeddings = weights.matrix("transformer.wte.weight", outputs, width, true);
    bool untied = weights.has("lm_head.weight") || weights.has("lm_head.weight.int8");
    if (untied) decoder->untied_head = weights.matrix("lm_head.weight", outputs, width, true);
    new (self) itune::Decoder(std::move(*decoder));
}

// `settings`: an EncoderShape of engines/native.py; `tensors`: the vision graph's weights by name.
void make_encoder(itune::Encoder* self, nb::object settings, nb::dict tensors, int threads, const std::string& wanted) {
    auto size = [&](const char* name) { return read_size(settings, name); };
    Weights weights(std::move(tensors));
    std::unique_ptr<itune::Encoder> encoder(new itune::Encoder(find_kernels(wanted), threads));
    itune::EncoderConfig& config = encoder->config;
    read_transformer(settings, config);
    config.image_size = size("image_size");
    config.patch_size = size("patch_size");
    config.adapters = size("adapters");
    config.visual_heads = size("visual_heads");
    check_heads(config.visual_width, config.visual_heads);
    std::size_t width = config.width, outputs = config.adapters * 2 * config.visual_width;
    encoder->mean = weights.vector("clip.pixel_mean", config.patch());
    encoder->patches.matrix = weights.matrix("clip.embeddings.patch_embedding.weight", width, config.patch(), false);
    encoder->class_embedding = weights.vector("clip.embeddings.class_embedding", width);
    encoder->positions = weights.table("clip.embeddings.position_embedding.weight", config.tokens(), width);
    encoder->first_norm = weights.norm("clip.pre_layrnorm", width);
    for (std::size_t i = 0; i < size("layers"); ++i) {
        std::string name = "clip.encoder.layers." + std::to_string(i);
        itune::EncoderLayer layer;
        layer.attention_norm = weights.norm(name + ".layer_norm1", width);
        layer.qkv = weights.linear(name + ".self_attn.qkv", 3 * width, width);
        layer.projection = weights.linear(name + ".self_attn.out_proj", width, width);
        layer.feed_forward_norm = weights.norm(name + ".layer_norm2", width);
        layer.inner = weights.linear(name + ".mlp.fc1", config.inner, width);
        layer.outer = weights.linear(name + ".mlp.fc2", width, config.inner);
        encoder->layers.push_back(std::move(layer));
    }
    encoder->visual = weights.linear("visual", outputs, width);
    new (self) itune::Encoder(std::move(*encoder));
}

itune::State encode(itune::Encoder& encoder, Input<std::uint8_t, 4> pixels, const itune::Decoder& decoder) {
    std::size_t side = encoder.config.image_size, images = pixels.shape(0);
    bool fits = encoder.config.adapters == decoder.config.adapters &&
                encoder.config.visual_width == decoder.config.visual_width;
    if (!fits || pixels.shape(1) != side || pixels.shape(2) != side || pixels.shape(3) != 3) {
        throw nb::value_error("pixels or decoder do not fit the encoder");
    }
    itune::State state(images, decoder.layers.size(), decoder.config.width);
    encoder.pool().start_once();
    nb::gil_scoped_release release;
    auto held = encoder.pool().hold();
    encoder.encode(pixels.data(), images, state);
    return state;
}

// `visual`: [(keys [images, heads, w, N], values [images, heads, N, w])] of the adapted layers.
itune::State make_state(const itune::Decoder& decoder, std::size_t images,
                        const std::vector<std::pair<Input<float, 4>, Input<float, 4>>>& visual) {
    itune::State state(images, decoder.layers.size(), decoder.config.width);
    if (visual.size() != decoder.config.adapters) throw nb::value_error("wrong number of visual keys and values");
    const auto& first = visual.empty() ? Input<float, 4>() : visual[0].first;
    for (const auto& [keys, values] : visual) {
        std::size_t heads = keys.shape(1), width = keys.shape(2), tokens = keys.shape(3);
        bool fits = keys.shape(0) == images && values.shape(0) == images && values.shape(1) == heads &&
                    values.shape(2) == tokens && values.shape(3) == width &&
                    heads * width == decoder.config.visual_width;
        fits = fits && heads == first.shape(1) && tokens == first.shape(3);  // all layers alike
        if (!fits || tokens == 0) throw nb::value_error("visual keys or values have a wrong shape");
        state.add_visual(keys.data(), values.data(), heads, width, tokens);
    }
    return state;
}

void set_prefix(itune::State& state, Input<float, 3> prefix, const itune::Decoder& decoder) {
    if (prefix.shape(0) != state.images().size() || prefix.shape(1) != decoder.config.prefix ||
        prefix.shape(2) != decoder.config.width) {
        throw nb::value_error("the prefix has a wrong shape");
    }
    state.prefix.assign(prefix.data(), prefix.data() + prefix.size());
}

nb::tuple step(itune::Decoder& decoder, itune::State& state, Input<std::int64_t, 2> tokens,
               Input<std::int64_t, 1> parents, Input<bool, 2> mask, std::size_t k) {
    std::size_t rows = tokens.shape(0);
    if (parents.size() != rows || mask.shape(0) != rows || mask.shape(1) != tokens.shape(1)) {
        throw nb::value_error("parents or mask do not fit the tokens");
    }
    itune::Found found;
    decoder.pool().start_once();
    {
        nb::gil_scoped_release release;
        auto held = decoder.pool().hold();
        decoder.step(state, tokens.data(), parents.data(), mask.data(), rows, tokens.shape(1), k, found);
    }
    return nb::make_tuple(to_numpy(std::move(found.logits), {rows, found.k}),
                          to_numpy(std::move(found.token_ids), {rows, found.k}),
                          to_numpy(std::move(found.logsumexp), {rows}));
}

// The attention of one image's adapters [adapted layers, heads, T, N] while it reads `tokens`.
nb::ndarray<nb::numpy, float> attention(itune::Decoder& decoder, itune::State& state, Input<std::int64_t, 1> tokens) {
    const itune::State::Visual& visual = state.visual.at(0);
    std::size_t layers = state.visual.size(), length = tokens.shape(0);
    std::vector<float> weights(layers * visual.heads * length * visual.tokens);
    itune::Found found;
    std::int64_t parent = 0;
    decoder.pool().start_once();
    {
        nb::gil_scoped_release release;
        auto held = decoder.pool().hold();
        decoder.step(state, tokens.data(), &parent, nullptr, 1, length, 1, found, weights.data());
    }
    return to_numpy(std::move(weights), {layers, visual.heads, length, visual.tokens});
}

std::vector<std::vector<itune::Caption>> captions(itune::Decoder& decoder, itune::State& state,
                                                  Input<std::int64_t, 2> prompts, nb::object config,
                                                  std::int64_t end_token, std::int64_t most_candidates) {
    if (prompts.shape(0) != state.images().size()) throw nb::value_error("prompts do not fit the images");
    itune::Config own = search_config(config, end_token, most_candidates);
    decoder.pool().start_once();
    nb::gil_scoped_release release;
    auto held = decoder.pool().hold();
    auto interrupted = [] {
        nb::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    };
    return itune::find_captions(decoder, state, prompts.data(), prompts.shape(0), prompts.shape(1), std::move(own),
                                interrupted);
}

}  // namespace

NB_MODULE(_itune_native, m) {
    nb::exception<itune::NotNumbers>(m, "NotNumbersError", PyExc_ArithmeticError);
    nb::class_<itune::Search>(m, "Search")
        .def("__init__", &make_search)
        .def_prop_ro("k", &itune::Search::k)
        .def("advance", &advance)
        .def("captions", &itune::Search::captions);
    nb::class_<itune::State>(m, "State")
        .def_prop_ro("images", [](const itune::State& state) { return state.images().size(); })
        .def("set_prefix", &set_prefix)
        .def("keep", [](itune::State& state, Input<std::int64_t, 1> kept) { state.keep(kept.data(), kept.size()); });
    nb::class_<itune::Encoder>(m, "Encoder").def("__init__", &make_encoder).def("encode", &encode);
    nb::class_<itune::Decoder>(m, "Decoder")
        .def("__init__", &make_decoder)
        .def_prop_ro("candidates", [](const itune::Decoder& decoder) { return decoder.embeddings.outputs(); })
        .def_prop_ro("kernels", [](const itune::Decoder& decoder) { return decoder.kernels->name; })
        .def("state", &make_state)
        .def("step", &step)
        .def("attention", &attention)
        .def("captions", &captions);
    add_kernels(m);
}
