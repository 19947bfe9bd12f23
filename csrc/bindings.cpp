// The only file that sees Python. Pointers come as integers and were checked in Python; no arithmetic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "crops.h"
#include "ftso.h"
#include "node.h"
#include "search_step.h"
#include "skip_net.h"

namespace py = pybind11;

namespace {

// How often each kernel ran, by the name that the kernel itself returned: "skip_cell_fwd/avx512".
std::map<std::string, int64_t> calls;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Launch>
void counted(const char* kernel, Launch launch) {
  const char* isa;
  {
    py::gil_scoped_release release;
    isa = launch();
  }
  ++calls[std::string(kernel) + "/" + isa];
}

using Addresses = std::vector<uintptr_t>;

std::vector<float*> pointers(const Addresses& addresses) {
  std::vector<float*> found;
  for (uintptr_t address : addresses) found.push_back(at<float>(address));
  return found;
}

void count_stages(const ftso::SkipNet& net) {
  for (const auto& launch : net.launches()) ++calls[std::string(launch.stage) + "/" + launch.isa];
}

void net_forward(ftso::SkipNet& net, uintptr_t memory, bool with_weights, uintptr_t images, const Addresses& weights,
                 uintptr_t edges_normal, uintptr_t edges_reduce, uintptr_t logits, int threads) {
  const std::vector<float*> w = pointers(weights);
  net.begin_launches();
  {
    py::gil_scoped_release release;
    net.forward(at<float>(memory), with_weights, at<const float>(images), w.data(), at<const float>(edges_normal),
                at<const float>(edges_reduce), at<float>(logits), threads);
  }
  count_stages(net);
}

void net_backward(ftso::SkipNet& net, uintptr_t memory, uintptr_t images, const Addresses& weights,
                  uintptr_t edges_normal, uintptr_t edges_reduce, uintptr_t d_logits, uintptr_t d_edges_normal,
                  uintptr_t d_edges_reduce, const Addresses& d_weights, int threads) {
  const std::vector<float*> w = pointers(weights), dw = pointers(d_weights);
  net.begin_launches();
  {
    py::gil_scoped_release release;
    net.backward(at<float>(memory), at<const float>(images), w.data(), at<const float>(edges_normal),
                 at<const float>(edges_reduce), at<const float>(d_logits), at<float>(d_edges_normal),
                 at<float>(d_edges_reduce), dw.empty() ? nullptr : dw.data(), threads);
  }
  count_stages(net);
}

std::pair<double, double> net_loss_and_gradient(ftso::SkipNet& net, const ftso::Searched& searched, uintptr_t memory,
                                                uintptr_t images, uintptr_t labels, uintptr_t d_normal,
                                                uintptr_t d_reduce, int threads) {
  ftso::Found found;
  net.begin_launches();
  {
    py::gil_scoped_release release;
    found = ftso::loss_and_gradient(net, at<float>(memory), at<const float>(images), at<const int64_t>(labels),
                                    searched, {at<double>(d_normal), at<double>(d_reduce)}, threads);
  }
  count_stages(net);
  return {found.loss, found.size};
}

void bind_search_step(py::module_& m) {
  m.def("edge_weights",
        [](uintptr_t betas, uintptr_t edges) { ftso::edge_weights(at<const double>(betas), at<float>(edges)); });
  m.def("edge_weights_bwd", [](uintptr_t betas, uintptr_t d_edges, uintptr_t d_betas) {
    ftso::edge_weights_bwd(at<const double>(betas), at<const float>(d_edges), at<double>(d_betas));
  });
  m.def("cross_entropy", [](int64_t B, int64_t classes, uintptr_t logits, uintptr_t labels, uintptr_t d_logits) {
    return ftso::cross_entropy(B, classes, at<const float>(logits), at<const int64_t>(labels), at<float>(d_logits));
  });
  m.def("first_outside", [](int64_t B, int64_t classes, uintptr_t labels) {
    return ftso::first_outside(B, classes, at<const int64_t>(labels));
  });
  m.def("adam", [](int64_t n, uintptr_t x, uintptr_t gradient, uintptr_t first, uintptr_t second, double lr,
                   double decay_1, double decay_2, double eps, double weight_decay, int64_t steps) {
    ftso::adam(n, at<double>(x), at<const double>(gradient), at<double>(first), at<double>(second),
               {lr, decay_1, decay_2, eps, weight_decay, steps});
  });
  using Weight = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;  // values, parameters, velocity, gradient
  py::class_<ftso::Searched>(m, "Searched")
      .def(py::init([](uintptr_t normal, uintptr_t reduce, const std::vector<Weight>& weights) {
        ftso::Searched searched{{at<const double>(normal), at<const double>(reduce)}, {}};
        for (const auto& [n, w, velocity, gradient] : weights)
          searched.weights.push_back({n, at<float>(w), at<float>(velocity), at<float>(gradient)});
        return searched;
      }))
      .def("sgd",
           [](const ftso::Searched& searched, double lr, double momentum, double weight_decay, double limit,
              bool nesterov) { return ftso::sgd(searched.weights, {lr, momentum, weight_decay, limit, nesterov}); });
}

// Planes as (address, floats from image to image, floats from channel to channel).
using View = std::tuple<uintptr_t, int64_t, int64_t>;

ftso::Planes planes(const View& view) { return {at<float>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)}; }

ftso::Node::Call node_call(const std::vector<View>& inputs, uintptr_t edge_weights, uintptr_t operator_weights,
                           uintptr_t image_weights, const Addresses& weights, const Addresses& affine, const View& node,
                           uintptr_t saved, uintptr_t work, int threads) {
  ftso::Node::Call call{{},
                        at<const float>(edge_weights),
                        at<const float>(operator_weights),
                        at<const float>(image_weights),
                        {},
                        {},
                        planes(node),
                        at<float>(saved),
                        at<float>(work),
                        threads};
  for (const View& view : inputs) call.inputs.push_back(planes(view));
  for (uintptr_t address : weights) call.weights.push_back(at<const float>(address));
  for (uintptr_t address : affine) call.affine.push_back(at<const float>(address));
  return call;
}

void bind_node(py::module_& m) {
  using ftso::Node;
  py::class_<Node>(m, "Node")
      .def(py::init([](int64_t B, int64_t C, int64_t N, int64_t k, const std::vector<int>& operators,
                       const std::vector<std::tuple<int64_t, int64_t, int>>& inputs) {
        Node::Spec spec{B, C, N, k, operators, {}};
        for (const auto& [H, W, stride] : inputs) spec.inputs.push_back({H, W, stride});
        return new Node(spec);
      }))
      .def("saved_floats", &Node::saved_floats)
      .def("work_floats", &Node::work_floats)
      .def("forward",
           [](const Node& n, const std::vector<View>& inputs, uintptr_t edge_weights, uintptr_t operator_weights,
              uintptr_t image_weights, const Addresses& weights, const Addresses& affine, const View& node,
              uintptr_t saved, int threads) {
             const auto call = node_call(inputs, edge_weights, operator_weights, image_weights, weights, affine, node,
                                         saved, 0, threads);
             counted("partial_mix_fwd", [&] { return n.forward(call); });
           })
      .def("backward", [](const Node& n, const std::vector<View>& inputs, uintptr_t edge_weights,
                          uintptr_t operator_weights, uintptr_t image_weights, const Addresses& weights,
                          const Addresses& affine, const View& grad, uintptr_t saved, uintptr_t work,
                          const std::vector<View>& d_inputs, uintptr_t d_edge_weights, uintptr_t d_operator_weights,
                          const Addresses& d_weights, const Addresses& d_affine, const std::vector<bool>& add,
                          int threads) {
        const auto call = node_call(inputs, edge_weights, operator_weights, image_weights, weights, affine, grad, saved,
                                    work, threads);
        Node::Gradients gradients{
            {}, at<float>(d_edge_weights), at<float>(d_operator_weights), pointers(d_weights), pointers(d_affine), add};
        for (const View& view : d_inputs) gradients.inputs.push_back(planes(view));
        counted("partial_mix_bwd", [&] { return n.backward(call, gradients); });
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of ftso_fast: raw pointers, no checks. Call it through ftso_fast.kernels.";
  m.def("skip_cell_fwd", [](int64_t B, int64_t C, int64_t HW, int64_t k, uintptr_t x0, uintptr_t x1, uintptr_t weights,
                            uintptr_t out, int threads) {
    counted("skip_cell_fwd", [&] {
      return ftso::skip_cell_fwd(B, C, HW, k, at<const float>(x0), at<const float>(x1), at<const float>(weights),
                                 at<float>(out), threads);
    });
  });
  m.def("skip_cell_bwd",
        [](int64_t B, int64_t C, int64_t HW, int64_t k, uintptr_t grad_out, uintptr_t x0, uintptr_t x1,
           uintptr_t weights, uintptr_t grad_x0, uintptr_t grad_x1, uintptr_t grad_weights, int threads) {
          counted("skip_cell_bwd", [&] {
            return ftso::skip_cell_bwd(B, C, HW, k, at<const float>(grad_out), at<const float>(x0), at<const float>(x1),
                                       at<const float>(weights), at<float>(grad_x0), at<float>(grad_x1),
                                       at<float>(grad_weights), threads);
          });
        });
  m.def("fma_peak", [](int64_t rounds, int threads) {
    double operations = 0;
    counted("fma_peak", [&] { return ftso::fma_peak(rounds, &operations, threads); });
    return operations;
  });
  py::class_<ftso::SkipNet>(m, "SkipNet")
      .def(py::init([](int64_t B, int64_t H, int64_t W, int64_t in_channels, int64_t channels, int64_t cells, int64_t k,
                       int64_t classes, int64_t precision) {
        return new ftso::SkipNet({B, H, W, in_channels, channels, cells, k, classes, precision});
      }))
      .def("arena_floats", &ftso::SkipNet::arena_floats)
      .def("saved_floats", &ftso::SkipNet::saved_floats)
      .def("input_sums", &ftso::SkipNet::input_sums)
      .def("launches",
           [](const ftso::SkipNet& net) {
             std::vector<std::tuple<std::string, std::string, double, double, double>> found;
             for (const auto& l : net.launches())
               found.emplace_back(l.stage, l.isa, l.seconds, l.work.flops, l.work.bytes);
             return found;
           })
      .def("forward", &net_forward)
      .def("loss_and_gradient", &net_loss_and_gradient)
      .def("backward", &net_backward);
  bind_node(m);
  bind_search_step(m);
  m.def("crop", [](int64_t n, int64_t H, int64_t W, int64_t C, int64_t pad, uintptr_t images, uintptr_t bits,
                   uintptr_t values, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    ftso::crop(
        {n, H, W, C, pad, at<const uint8_t>(images), at<const uint64_t>(bits), at<const float>(values), at<float>(out)},
        threads);
  });
  m.def("folded_conv", [](const std::array<int64_t, 4>& x_sizes, const std::vector<int64_t>& channels,
                          const std::array<int, 3>& window, const View& x, const Addresses& weights,
                          const Addresses& biases, const View& plus, const View& y, int threads) {
    const std::vector<float*> w = pointers(weights), b = pointers(biases);
    const auto [B, H, W, row] = x_sizes;
    const auto [K, stride, dilation] = window;
    const ftso::FoldedConv spec{B, H, W, row, channels.data(), static_cast<int>(b.size()), K, stride, dilation};
    counted("folded_conv",
            [&] { return ftso::folded_conv(spec, planes(x), w.data(), b.data(), planes(plus), planes(y), threads); });
  });
  m.def("populate", [](uintptr_t pages, int64_t bytes, double patience, int threads) {
    py::gil_scoped_release release;
    return ftso::populate(at<char>(pages), bytes, patience, threads);
  });
  m.def("calls", [] { return calls; });
  m.def("reset_calls", [] { calls.clear(); });
  m.def("isa", [] { return std::string(ftso::kernels().isa); });
  m.def(
      "force_isa", [](const std::optional<std::string>& name) { ftso::force_isa(name ? name->c_str() : nullptr); },
      py::arg("name").none(true));
  m.def("available_isas", [] {
    const char* names[8];
    const int n = ftso::available_isas(names, 8);
    return std::vector<std::string>(names, names + n);
  });
}
