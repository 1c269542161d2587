// What the bindings share: arrays from and to NumPy, and weights by their names in the decoder's graph.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"

namespace nb = nanobind;

template <typename T, int Dimensions>
using Input = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

// A NumPy array that takes over `values`.
template <typename T>
nb::ndarray<nb::numpy, T> to_numpy(std::vector<T>&& values, std::initializer_list<std::size_t> shape) {
    auto held = std::make_unique<std::vector<T>>(std::move(values));
    T* data = held->data();
    nb::capsule owner(held.release(), [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
    return {data, shape, owner};
}

inline const itune::Kernels& find_kernels(const std::string& name) {
    itune::KernelList list = itune::runnable_kernels();
    for (int i = 0; i < list.count; ++i) {
        if (name.empty() || name == list.all[i]->name) return *list.all[i];  // the first is the fastest
    }
    throw nb::value_error(("no kernels " + name + " for this processor").c_str());
}

inline itune::Activation find_activation(const std::string& name) {
    using itune::Activation;
    for (auto [own, kind] : {std::pair{"relu", Activation::relu}, std::pair{"gelu", Activation::gelu},
                             std::pair{"gelu_tanh", Activation::gelu_tanh}, std::pair{"silu", Activation::silu},
                             std::pair{"quick_gelu", Activation::quick_gelu}}) {
        if (name == own) return kind;
    }
    throw nb::value_error(("no activation " + name).c_str());
}

template <typename Array>
auto copied(const Array& array) {
    return std::vector<std::remove_const_t<typename Array::Scalar>>(array.data(), array.data() + array.size());
}

// Weights by the names of a graph, arrays or functions that return them; whatever a file says is checked here.
class Weights {
  public:
    explicit Weights(nb::dict tensors) : tensors_(std::move(tensors)) {}

    bool has(const std::string& name) const { return tensors_.contains(name.c_str()); }

    std::vector<float> vector(const std::string& name, std::size_t size) const {
        auto array = get<float, 1>(name);
        if (array.shape(0) != size) wrong(name);
        return copied(array);
    }

    // A row for each of the `rows`: [rows, width].
    std::vector<float> table(const std::string& name, std::size_t rows, std::size_t width) const {
        auto array = get<float, 2>(name);
        if (array.shape(0) != rows || array.shape(1) != width) wrong(name);
        return copied(array);
    }

    // `name`: [K, N], or [N, K] if `transposed`, as floats, as blocks of integers, which always are [N, K], or as
    // integers [K, N] with a scale for each column.
    itune::Matrix matrix(const std::string& name, std::size_t outputs, std::size_t depth, bool transposed) {
        using itune::Matrix;
        for (auto [suffix, kind] : {std::pair{".int8", Matrix::Kind::int8}, std::pair{".int4", Matrix::Kind::int4}}) {
            std::string stored = name + (transposed ? "" : ".T") + suffix;
            if (!has(stored)) continue;
            std::size_t block = kind == Matrix::Kind::int8 ? 64 : 32, bytes = kind == Matrix::Kind::int8 ? 64 : 16;
            std::size_t blocks = (depth + block - 1) / block;
            auto codes = get<std::uint8_t, 3>(stored);
            auto scales = get<float, 2>(name + ".scales");
            if (codes.shape(0) != outputs || codes.shape(1) != blocks || codes.shape(2) != bytes) wrong(stored);
            if (scales.shape(0) != outputs || scales.shape(1) != blocks) wrong(name + ".scales");
            return Matrix::pack_blocks(arena_, kind, codes.data(), scales.data(), outputs, depth);
        }
        if (std::string stored = name + ".int8"; !transposed && has(stored)) {
            auto codes = get<std::int8_t, 2>(stored);
            auto scales = get<float, 1>(name + ".scales");
            if (codes.shape(0) != depth || codes.shape(1) != outputs || depth > kLongest) wrong(stored);
            if (scales.shape(0) != outputs) wrong(name + ".scales");
            return Matrix::pack_columns(arena_, codes.data(), scales.data(), outputs, depth);
        }
        auto array = get<float, 2>(name);
        if (array.shape(0) != (transposed ? outputs : depth) || array.shape(1) != (transposed ? depth : outputs)) {
            wrong(name);
        }
        return Matrix::pack_float(arena_, array.data(), outputs, depth, transposed);
    }

    itune::Linear linear(const std::string& name, std::size_t outputs, std::size_t depth) {
        return {matrix(name + ".weight", outputs, depth, false), vector(name + ".bias", outputs)};
    }

    itune::Norm norm(const std::string& name, std::size_t width) const {
        return {vector(name + ".weight", width), vector(name + ".bias", width)};
    }

    template <typename T, int Dimensions>
    Input<T, Dimensions> get(const std::string& name) const {
        if (!has(name)) throw nb::value_error(("weight " + name + " is missing").c_str());
        nb::object found = tensors_[name.c_str()];
        if (PyCallable_Check(found.ptr()) != 0) found = found();
        Input<T, Dimensions> array;
        if (!nb::try_cast(found, array, false)) wrong(name);
        return array;
    }

    [[noreturn]] static void wrong(const std::string& name) {
        throw nb::value_error(("weight " + name + " has a wrong type or shape").c_str());
    }

  private:
    static constexpr std::size_t kLongest = 65'536;  // sums of 127 * 255 stay below 2^31
    nb::dict tensors_;
    itune::Arena arena_;
};

void add_kernels(nb::module_& m);
