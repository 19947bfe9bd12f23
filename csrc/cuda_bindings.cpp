// The module _cuda: the CUDA launchers for Python. Pointers come as integers and were checked in Python; no arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cell_step.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("cuda: ") + error);
}

using Sizes = std::array<int, 5>;  // B, C, H, W, k
using Raw = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t>;
using Product = std::tuple<uintptr_t, uintptr_t, uintptr_t, int>;
using Behind = std::tuple<std::array<uintptr_t, 7>, int64_t, int, int>;

ftso::CudaRaw raw(const Raw& x) {
  return {at<float>(std::get<0>(x)), std::get<1>(x), at<float>(std::get<2>(x)), at<float>(std::get<3>(x))};
}

ftso::CudaCell cell(const Sizes& s, uintptr_t edges, const Raw& x0, const Raw& x1) {
  return {s[0], s[1], s[2], s[3], s[4], at<float>(edges), {raw(x0), raw(x1)}};
}

ftso::CudaProduct product(const Product& p) {
  return {at<float>(std::get<0>(p)), at<float>(std::get<1>(p)), at<float>(std::get<2>(p)), std::get<3>(p)};
}

// w, g, z, al, be, ga, dw; floats from part to part; rows; parts
ftso::CudaBehind behind(const Behind& d) {
  const auto& p = std::get<0>(d);
  return {at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<float>(p[4]),
          at<float>(p[5]), at<float>(p[6]), std::get<1>(d),  std::get<2>(d),  std::get<3>(d)};
}

}  // namespace

PYBIND11_MODULE(FTSO_MODULE, m) {
  m.doc() = "The CUDA kernels of ftso_fast: raw pointers, no checks. Call it through ftso_fast.kernels.";
  m.def("cell_parts", &ftso::cell_parts);
  m.def("cell_unfit", &ftso::cell_unfit);
  m.def("cell_shared_bytes", [](int C) {
    int forward = 0, pool = 0, backward = 0;
    check(ftso::cell_shared_bytes(C, &forward, &pool, &backward));
    return py::dict("cell_fwd"_a = forward, "cell_pool"_a = pool, "cell_bwd"_a = backward);
  });
  m.def("cell_step_fwd", [](const Sizes& sizes, uintptr_t edges, const Raw& x0, const Raw& x1, const Product& main,
                            const Product& strided, uintptr_t pooled, int device, uintptr_t stream) {
    check(ftso::cell_step_fwd({cell(sizes, edges, x0, x1), product(main), product(strided), at<float>(pooled)}, device,
                              at<void>(stream)));
  });
  m.def("cell_step_bwd", [](const Sizes& sizes, uintptr_t edges, const Raw& x0, const Raw& x1, const Behind& main,
                            const Behind& strided, uintptr_t d_pooled, uintptr_t g0, uintptr_t g1, uintptr_t sums,
                            uintptr_t dots, int device, uintptr_t stream) {
    check(ftso::cell_step_bwd({cell(sizes, edges, x0, x1),
                               behind(main),
                               behind(strided),
                               at<float>(d_pooled),
                               {at<float>(g0), at<float>(g1)},
                               at<float>(sums),
                               at<float>(dots)},
                              device, at<void>(stream)));
  });
}
