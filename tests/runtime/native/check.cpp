// Runs the native engine without Python, so that sanitizers and emulators can watch: every set of kernels against the
// portable one, and whole searches that must not depend on the number of threads. Prints the kernels; exits with 1 at
// the first difference.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "captions.h"
#include "encoder.h"

using namespace itune;

std::mt19937 generator(7);
Arena arena;

std::vector<float> normal(std::size_t size, float scale = 1) {
    std::normal_distribution<float> distribution(0, scale);
    std::vector<float> values(size);
    for (float& value : values) value = distribution(generator);
    return values;
}

void require(bool fine, const char* kernels, const char* what) {
    if (fine) return;
    std::printf("%s: %s differs\n", kernels, what);
    std::exit(1);
}

bool near(const std::vector<float>& a, const std::vector<float>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!(std::fabs(a[i] - b[i]) <= 2e-4F * (1 + std::fabs(a[i])))) return false;
    }
    return a.size() == b.size();
}

Matrix random_matrix(int kind, std::size_t outputs, std::size_t depth, float scale) {
    if (kind == 0) return Matrix::pack_float(arena, normal(outputs * depth, scale).data(), outputs, depth, true);
    std::vector<std::uint8_t> codes(outputs * (depth + 64));
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(generator() % 255 + 1);
    float step = scale / (kind == 2 ? 4.0F : 64.0F);
    std::vector<float> scales(outputs * (depth / 32 + 2), step);
    if (kind == 3) {
        std::vector<std::int8_t> columns(codes.begin(), codes.end());
        return Matrix::pack_columns(arena, columns.data(), scales.data(), outputs, depth);
    }
    Matrix::Kind own = kind == 1 ? Matrix::Kind::int8 : Matrix::Kind::int4;
    return Matrix::pack_blocks(arena, own, codes.data(), scales.data(), outputs, depth);
}

std::vector<float> product(const Kernels& kernels, const Matrix& matrix, const std::vector<float>& x, std::size_t rows,
                           int threads) {
    Activations activations;
    activations.resize(rows, matrix.depth());
    activations.prepare(rows, matrix.block());
    for (std::size_t r = 0; r < rows; ++r) {
        std::copy_n(x.data() + r * matrix.depth(), matrix.depth(), activations.row(r));
        activations.quantize(kernels, r);
    }
    Executor executor(kernels, threads);
    auto held = executor.pool().hold();
    std::vector<float> y(rows * matrix.outputs());
    executor.multiply(matrix, activations, rows, [&](std::size_t panel, std::size_t r, float* tile) {
        std::size_t first = panel * kPanel, count = std::min<std::size_t>(kPanel, matrix.outputs() - first);
        std::copy_n(tile, count, y.data() + r * matrix.outputs() + first);
    });
    return y;
}

void check_kernels(const Kernels& kernels) {
    for (int kind = 0; kind < 4; ++kind) {
        for (std::size_t outputs : {1, 31, 70}) {
            for (std::size_t depth : {1, 33, 130}) {
                Matrix matrix = random_matrix(kind, outputs, depth, 0.3F);
                std::vector<float> x = normal(13 * depth);
                for (std::size_t rows : {1, 5, 6, 13}) {
                    require(near(product(portable_kernels(), matrix, x, rows, 1), product(kernels, matrix, x, rows, 2)),
                            kernels.name, "a product");
                }
            }
        }
    }
    for (std::size_t size : {1, 17, 100}) {
        std::vector<float> x = normal(size, 3), weight = normal(size), bias = normal(size), a(size), b(size);
        for (int kind = 0; kind < 6; ++kind) {
            a = b = x;
            portable_kernels().activate(static_cast<Activation>(kind), a.data(), size);
            kernels.activate(static_cast<Activation>(kind), b.data(), size);
            require(near(a, b), kernels.name, "an activation");
        }
        a = b = x;
        portable_kernels().softmax(a.data(), size, 0.7F);
        kernels.softmax(b.data(), size, 0.7F);
        require(near(a, b), kernels.name, "softmax");
        portable_kernels().layer_norm(x.data(), size, weight.data(), bias.data(), 1e-3F, a.data());
        kernels.layer_norm(x.data(), size, weight.data(), bias.data(), 1e-3F, b.data());
        require(near(a, b), kernels.name, "layer_norm");
        require(kernels.largest(x.data(), size) == *std::max_element(x.begin(), x.end()), kernels.name, "largest");
        require(near({portable_kernels().dot(x.data(), bias.data(), size)}, {kernels.dot(x.data(), bias.data(), size)}),
                kernels.name, "dot");
    }
}

constexpr std::size_t kWidth = 48, kInner = 70, kVocabulary = 700, kHeads = 2, kVisual = 20;
constexpr std::size_t kImages = 3, kSide = 24, kPatch = 8;

Norm random_norm() { return {normal(kWidth), normal(kWidth)}; }
Linear random_linear(int kind, std::size_t outputs, std::size_t depth) {
    return {random_matrix(kind, outputs, depth, 0.2F), normal(outputs)};
}

Decoder random_decoder(const Kernels& kernels, int kind, int threads) {
    generator.seed(11);
    Decoder decoder(kernels, threads);
    decoder.config = {4, kWidth, kInner, kVocabulary, 40, 0, 2, kVisual, 1e-5F, Activation::gelu_tanh, false};
    for (int i = 0; i < 2; ++i) {
        Layer layer;
        layer.attention_norm = random_norm();
        layer.feed_forward_norm = random_norm();
        layer.visual = i;
        layer.scale = 0.3F;
        layer.qkv = random_linear(kind, 3 * kWidth, kWidth);
        layer.projection = random_linear(kind, kWidth, kWidth);
        layer.inner = random_linear(kind, kInner + kVisual, kWidth);
        layer.outer = random_linear(kind, kWidth, kInner + kVisual);
        decoder.layers.push_back(std::move(layer));
    }
    decoder.last_norm = random_norm();
    decoder.positions = normal(40 * kWidth);
    decoder.embeddings = random_matrix(kind == 0 ? 0 : 1, kVocabulary, kWidth, 0.5F);
    return decoder;
}

Encoder random_encoder(const Kernels& kernels, int kind, int threads) {
    Encoder encoder(kernels, threads);
    encoder.config = {kWidth, 3, kInner, kSide, kPatch, 2, kHeads, kVisual, 1e-5F, Activation::quick_gelu};
    encoder.mean = normal(encoder.config.patch());
    encoder.patches.matrix = random_matrix(kind, kWidth, encoder.config.patch(), 0.01F);
    encoder.class_embedding = normal(kWidth);
    encoder.positions = normal(encoder.config.tokens() * kWidth);
    encoder.first_norm = random_norm();
    EncoderLayer layer;
    layer.attention_norm = random_norm();
    layer.feed_forward_norm = random_norm();
    layer.qkv = random_linear(kind, 3 * kWidth, kWidth);
    layer.projection = random_linear(kind, kWidth, kWidth);
    layer.inner = random_linear(kind, kInner, kWidth);
    layer.outer = random_linear(kind, kWidth, kInner);
    encoder.layers.push_back(std::move(layer));
    encoder.visual = random_linear(kind, 4 * kVisual, kWidth);
    return encoder;
}

std::vector<std::vector<Caption>> captions(Decoder& decoder, Encoder& encoder) {
    std::vector<std::uint8_t> pixels(kImages * kSide * kSide * 3);
    for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<std::uint8_t>(i * 37 % 251 + i / 900);
    State state(kImages, decoder.layers.size(), kWidth);
    {
        auto held = encoder.pool().hold();
        encoder.encode(pixels.data(), kImages, state);
    }
    Config config{};
    config.end_token = 0;
    config.most_candidates = kVocabulary;
    config.num_beams = config.rows_per_image = 5;
    config.max_new_tokens = 9;
    config.length_penalty = config.repetition_penalty = 1;
    config.warpers = {1, 50, 1};
    std::int64_t prompts[] = {kNoToken, 5, 3, 2, kNoToken, 8};
    auto held = decoder.pool().hold();
    return find_captions(decoder, state, prompts, kImages, 2, config, [] {});
}

void check_pool() {
    Pool pool(3);
    auto held = pool.hold();
    std::atomic<int> done{0};
    bool thrown = false;
    try {
        pool.run(50, [&](std::size_t part, int) {
            ++done;
            if (part == 7) throw std::bad_alloc();
        });
    } catch (const std::bad_alloc&) {
        thrown = true;
    }
    pool.run(50, [&](std::size_t, int) { ++done; });
    require(thrown && done == 100, "pool", "what it does after an exception");
}

int main() {
    check_pool();
    KernelList list = runnable_kernels();
    for (int i = 0; i < list.count; ++i) {
        const Kernels& kernels = *list.all[i];
        check_kernels(kernels);
        for (int kind = 0; kind < 3; ++kind) {
            Decoder one = random_decoder(kernels, kind, 1);
            Encoder alone = random_encoder(kernels, kind, 1);
            auto expected = captions(one, alone);
            require(expected.size() == kImages && expected[0].size() == 5, kernels.name, "the number of captions");
            Decoder decoder = random_decoder(kernels, kind, 3);
            Encoder encoder = random_encoder(kernels, kind, 3);
            std::vector<std::thread> threads;  // that share both
            std::vector<std::vector<std::vector<Caption>>> found(3);
            for (auto& each : found) threads.emplace_back([&] { each = captions(decoder, encoder); });
            for (std::thread& thread : threads) thread.join();
            for (const auto& each : found) require(each == expected, kernels.name, "a caption with threads");
        }
        std::printf("%s\n", kernels.name);
    }
}
