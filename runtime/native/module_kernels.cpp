// The kernels one by one, for tests: `_itune_native.multiply` and `_itune_native.apply`.
#include "bindings.h"
#include "matrix.h"

namespace {

// x [rows, K] times a matrix as `Weights::matrix` takes it -> [rows, N].
nb::ndarray<nb::numpy, float> multiply(const std::string& kernels_name, nb::dict tensors, Input<float, 2> x,
                                       std::size_t outputs, bool transposed, int threads) {
    const itune::Kernels& kernels = find_kernels(kernels_name);
    std::size_t rows = x.shape(0), depth = x.shape(1);
    itune::Matrix matrix = Weights(std::move(tensors)).matrix("weight", outputs, depth, transposed);
    itune::Activations activations;
    activations.resize(rows, depth);
    activations.prepare(rows, matrix.block());
    for (std::size_t r = 0; r < rows; ++r) {
        std::copy_n(x.data() + r * depth, depth, activations.row(r));
        activations.quantize(kernels, r);
    }
    itune::Executor executor(kernels, threads);
    std::vector<float> found(rows * outputs);
    {
        nb::gil_scoped_release release;
        auto held = executor.pool().hold();
        executor.multiply(matrix, activations, rows, [&](std::size_t panel, std::size_t r, float* tile) {
            std::size_t first = panel * itune::kPanel, columns = std::min<std::size_t>(itune::kPanel, outputs - first);
            std::copy_n(tile, columns, found.data() + r * outputs + first);
        });
    }
    return to_numpy(std::move(found), {rows, outputs});
}

// `function`: an activation; "softmax" (factor: its scale), "layer_norm" (weights 1, biases 0; factor: epsilon),
// "sum_of_exponentials" (factor: the largest), "dot" and "add_scaled" with x itself.
nb::ndarray<nb::numpy, float> apply(const std::string& kernels_name, const std::string& function, Input<float, 1> x,
                                    float factor) {
    const itune::Kernels& kernels = find_kernels(kernels_name);
    std::size_t size = x.size();
    std::vector<float> y(x.data(), x.data() + size), ones(size, 1.0F), zeros(size, 0.0F);
    if (function == "softmax") {
        kernels.softmax(y.data(), size, factor);
    } else if (function == "layer_norm") {
        kernels.layer_norm(x.data(), size, ones.data(), zeros.data(), factor, y.data());
    } else if (function == "sum_of_exponentials") {
        y = {kernels.sum_of_exponentials(x.data(), size, factor)};
    } else if (function == "dot") {
        y = {kernels.dot(x.data(), x.data(), size)};
    } else if (function == "add_scaled") {
        kernels.add_scaled(factor, x.data(), size, y.data());
    } else {
        kernels.activate(find_activation(function), y.data(), size);
    }
    size = y.size();
    return to_numpy(std::move(y), {size});
}

}  // namespace

void add_kernels(nb::module_& m) {
    m.def("kernels", [] {
        std::vector<std::string> names;
        itune::KernelList list = itune::runnable_kernels();
        for (int i = 0; i < list.count; ++i) names.emplace_back(list.all[i]->name);
        return names;
    });
    m.def("multiply", &multiply);
    m.def("apply", &apply);
}
