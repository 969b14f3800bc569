// The pybind11 module pycert._C: the engine's Program, build information, test switches. Importing it registers the
// operators of csrc/ops with torch.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cpu/kernels.h"
#include "engine/context.h"
#include "ops/choices.h"
#include "ops/common.h"
#include "ops/device.h"
#include "ops/krelu.h"
#include "ops/record.h"
#include "ops/testing.h"

namespace py = pybind11;

namespace pycert {

using engine::BoundsResult;
using engine::Context;
using engine::InputRegion;
using engine::Node;
using engine::Op;
using engine::Options;
using engine::Program;
using engine::Spec;

namespace {

// Whether this thread takes subnormal results for zero.
bool flushes_subnormals() {
  volatile float least = std::numeric_limits<float>::min();
  volatile float half = least * 0.5f;
  return half * 2.0f != least;
}

// Turns flushing off in this thread and in those that share its work, or on again where it was on; whether it was on.
bool keep_subnormals(bool keep) {
  if (keep && !flushes_subnormals()) return false;
  static thread_local bool turned_off = false;
  const auto set = [keep] {
    if (keep && flushes_subnormals()) turned_off = at::globalContext().setFlushDenormal(false);
    if (!keep && turned_off) turned_off = !at::globalContext().setFlushDenormal(true);
  };
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { set(); });
  set();
  return true;
}

// Whether every dict still has the very keys and values that `entries` lists behind it, in order.
bool same_entries(const py::list& dicts, const py::list& entries) {
  const Py_ssize_t count = PyList_GET_SIZE(entries.ptr());
  Py_ssize_t next = 0;
  const auto is_next = [&](PyObject* found) { return next < count && PyList_GET_ITEM(entries.ptr(), next++) == found; };
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts.ptr()); ++i) {
    PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    if (!PyDict_Check(dict) || !is_next(dict)) return false;
    while (PyDict_Next(dict, &position, &key, &value) != 0)
      if (!is_next(key) || !is_next(value)) return false;
  }
  return next == count;
}

const std::unordered_map<std::string, Op>& op_names() {
  static const std::unordered_map<std::string, Op> names = {{"input", Op::Input},
                                                            {"constant", Op::Constant},
                                                            {"linear", Op::Linear},
                                                            {"conv", Op::Conv},
                                                            {"batch_norm", Op::BatchNorm},
                                                            {"mul_const", Op::MulConst},
                                                            {"div_const", Op::DivConst},
                                                            {"add_const", Op::AddConst},
                                                            {"add", Op::Add},
                                                            {"sum", Op::Sum},
                                                            {"avg_pool", Op::AvgPool},
                                                            {"max_pool", Op::MaxPool},
                                                            {"max2", Op::Max2},
                                                            {"min2", Op::Min2},
                                                            {"product", Op::Product},
                                                            {"matmul", Op::MatMul},
                                                            {"limit", Op::Limit},
                                                            {"reshape", Op::Reshape},
                                                            {"gather", Op::Gather},
                                                            {"concat", Op::Concat},
                                                            {"relu", Op::Relu},
                                                            {"abs", Op::Abs},
                                                            {"sigmoid", Op::Sigmoid},
                                                            {"tanh", Op::Tanh},
                                                            {"leaky_relu", Op::LeakyRelu},
                                                            {"prelu", Op::PRelu},
                                                            {"clamp", Op::Clamp},
                                                            {"softsign", Op::Softsign},
                                                            {"sin", Op::Sin},
                                                            {"cos", Op::Cos},
                                                            {"elu", Op::Elu},
                                                            {"softplus", Op::Softplus},
                                                            {"silu", Op::Silu},
                                                            {"mish", Op::Mish},
                                                            {"gelu", Op::Gelu},
                                                            {"gelu_tanh", Op::GeluTanh},
                                                            {"hardswish", Op::Hardswish},
                                                            {"exp", Op::Exp},
                                                            {"log", Op::Log},
                                                            {"sqrt", Op::Sqrt},
                                                            {"reciprocal", Op::Reciprocal},
                                                            {"square", Op::Square},
                                                            {"custom", Op::Custom}};
  return names;
}

template <typename T>
void read(const py::dict& attrs, const char* name, T& into) {
  if (attrs.contains(name) && !attrs[name].is_none()) into = py::cast<T>(attrs[name]);
}

Node node_of(const py::dict& d) {
  Node node;
  const auto op = py::cast<std::string>(d["op"]);
  const auto found = op_names().find(op);
  TORCH_CHECK_VALUE(found != op_names().end(), "Program: unknown operator '", op, "'");
  node.op = found->second;
  node.inputs = py::cast<std::vector<int64_t>>(d["inputs"]);
  node.shape = py::cast<std::vector<int64_t>>(d["shape"]);
  node.params = py::cast<std::vector<int64_t>>(d["params"]);
  node.path = py::cast<std::string>(d["path"]);
  node.label = node.path.empty() ? op : node.path + " (" + op + ")";
  const py::dict attrs = d["attrs"];
  read(attrs, "stride", node.conv.stride);
  read(attrs, "padding", node.conv.padding);
  read(attrs, "dilation", node.conv.dilation);
  read(attrs, "output_padding", node.conv.output_padding);
  read(attrs, "groups", node.conv.groups);
  read(attrs, "transposed", node.conv.transposed);
  read(attrs, "kernel", node.kernel);
  read(attrs, "ceil_mode", node.ceil_mode);
  read(attrs, "count_include_pad", node.count_include_pad);
  if (node.op == Op::AvgPool)
    read(attrs, "divisor", node.divisor_override);
  else
    read(attrs, "divisor", node.divisor);
  read(attrs, "eps", node.eps);
  read(attrs, "slope", node.slope);
  read(attrs, "alpha", node.slope);
  read(attrs, "fill", node.fill);
  read(attrs, "min", node.minimum);
  read(attrs, "max", node.maximum);
  read(attrs, "threshold", node.maximum);
  read(attrs, "sign", node.sign);
  read(attrs, "roundings", node.roundings);
  read(attrs, "lost", node.lost);
  read(attrs, "module", node.module);
  read(attrs, "name", node.name);
  if (attrs.contains("value") && !attrs["value"].is_none()) node.value = py::cast<double>(attrs["value"]);
  if (node.op == Op::Gather)
    node.gather = py::cast<at::Tensor>(attrs["index"]).to(at::kLong).contiguous();
  else
    read(attrs, "index", node.index);
  return node;
}

// Lets Ctrl-C through during long calls: looks for signals at most every 50 ms.
std::function<void()> signal_check() {
  using Clock = std::chrono::steady_clock;
  auto last = std::make_shared<Clock::time_point>(Clock::now());
  return [last] {
    const auto now = Clock::now();
    if (now - *last < std::chrono::milliseconds(50)) return;
    *last = now;
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

using RegionTuple = std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>, int64_t,
                               bool>;                                          // lower, upper, centre, eps, p, clipped
using SpecTuple = std::tuple<at::Tensor, std::optional<at::Tensor>, int64_t>;  // rows, source, count

struct Call {
  std::vector<at::Tensor> params;
  std::vector<InputRegion> regions;
  Options options;
  std::optional<Spec> spec;
};

at::Tensor or_empty(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }

Call call_of(std::vector<at::Tensor> params, const std::vector<RegionTuple>& regions, Options options,
             const std::optional<SpecTuple>& spec) {
  Call call{std::move(params), {}, std::move(options), std::nullopt};
  for (const auto& [lower, upper, centre, eps, p, clipped] : regions)
    call.regions.push_back({lower, upper, or_empty(centre), or_empty(eps), p, clipped});
  call.options.interrupt = signal_check();
  if (spec.has_value()) call.spec = Spec{std::get<0>(*spec), or_empty(std::get<1>(*spec)), std::get<2>(*spec)};
  return call;
}

py::object optional_tensor(const at::Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }

py::list optional_tensors(const std::vector<at::Tensor>& tensors) {
  py::list out;
  for (const at::Tensor& t : tensors) out.append(optional_tensor(t));
  return out;
}

py::tuple bound(const Program& program, std::vector<at::Tensor> params, const std::vector<RegionTuple>& regions,
                Options options, const std::optional<SpecTuple>& spec) {
  Call call = call_of(std::move(params), regions, std::move(options), spec);
  BoundsResult result;
  {
    py::gil_scoped_release release;
    Context context(program, std::move(call.params), std::move(call.regions), std::move(call.options));
    result = context.bound(call.spec);
  }
  return py::make_tuple(optional_tensor(result.lower), optional_tensor(result.upper), optional_tensors(result.A_lower),
                        optional_tensor(result.c_lower), optional_tensors(result.A_upper),
                        optional_tensor(result.c_upper));
}

at::Tensor loss_bound(const Program& program, std::vector<at::Tensor> params, const std::vector<RegionTuple>& regions,
                      Options options, const SpecTuple& spec) {
  Call call = call_of(std::move(params), regions, std::move(options), spec);
  py::gil_scoped_release release;
  Context context(program, std::move(call.params), std::move(call.regions), std::move(call.options));
  return context.loss_bound(*call.spec);
}

std::vector<std::tuple<int64_t, at::Tensor, at::Tensor>> layer_bounds(const Program& program,
                                                                      std::vector<at::Tensor> params,
                                                                      const std::vector<RegionTuple>& regions,
                                                                      Options options) {
  Call call = call_of(std::move(params), regions, std::move(options), std::nullopt);
  py::gil_scoped_release release;
  Context context(program, std::move(call.params), std::move(call.regions), std::move(call.options));
  std::vector<std::tuple<int64_t, at::Tensor, at::Tensor>> out;
  for (auto& [i, box] : context.layer_bounds()) out.emplace_back(i, std::get<0>(box), std::get<1>(box));
  return out;
}

std::pair<double, double> estimate(const Program& program, std::vector<at::Tensor> params,
                                   const std::vector<RegionTuple>& regions, Options options,
                                   const std::optional<SpecTuple>& spec) {
  Call call = call_of(std::move(params), regions, std::move(options), spec);
  py::gil_scoped_release release;
  Context context(program, std::move(call.params), std::move(call.regions), std::move(call.options));
  return context.estimate(call.spec);
}

// Python callbacks of custom activations: each call takes the interpreter lock.
engine::CustomLines lines_callback(py::function f) {
  auto held = std::shared_ptr<py::function>(new py::function(std::move(f)), [](py::function* p) {
    py::gil_scoped_acquire gil;
    delete p;
  });
  return [held](const std::string& name, const at::Tensor& l, const at::Tensor& u, int64_t slope, bool deployed) {
    py::gil_scoped_acquire gil;
    return py::cast<std::array<at::Tensor, 4>>((*held)(name, l, u, slope, deployed));
  };
}

engine::CustomInterval interval_callback(py::function f) {
  auto held = std::shared_ptr<py::function>(new py::function(std::move(f)), [](py::function* p) {
    py::gil_scoped_acquire gil;
    delete p;
  });
  return [held](const std::string& name, const at::Tensor& l, const at::Tensor& u, bool deployed) {
    py::gil_scoped_acquire gil;
    return py::cast<std::array<at::Tensor, 2>>((*held)(name, l, u, deployed));
  };
}

uint32_t term_number(const std::string& name) {
  const auto& names = term_names();
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "unknown term '", name, "'; known are ", c10::Join(", ", names));
  return uint32_t(found - names.begin());
}

void disable_term(const std::string& name) { disabled_terms() |= 1u << term_number(name); }

bool term_enabled(const std::string& name) { return enabled(Term(term_number(name))); }

// Bounds of the values one by one, so that the caller may tighten each before those that follow from it.
class IntervalWalk {
 public:
  IntervalWalk(const Program& program, std::vector<at::Tensor> params, const std::vector<RegionTuple>& regions,
               Options options) {
    Call call = call_of(std::move(params), regions, std::move(options), std::nullopt);
    py::gil_scoped_release release;
    context_ =
        std::make_unique<Context>(program, std::move(call.params), std::move(call.regions), std::move(call.options));
  }
  std::pair<at::Tensor, at::Tensor> advance(int64_t i) {
    py::gil_scoped_release release;
    context_->propagate(i);
    return {std::get<0>(context_->box(i)), std::get<1>(context_->box(i))};
  }
  void set_box(int64_t i, at::Tensor lower, at::Tensor upper) {
    context_->set_box(i, {std::move(lower), std::move(upper)});
  }

 private:
  std::unique_ptr<Context> context_;
};

}  // namespace

}  // namespace pycert

// glibc gives freed memory back to the system above a threshold that follows the largest mapped block freed so far, and
// fresh pages cost more than the arithmetic on them (a third of CROWN on a small network). Freeing one block of the
// largest size it learns from, never touched, lets the process keep up to 64 MiB.
static void keep_freed_memory() {
#if defined(__GLIBC__)
  void* volatile block = std::malloc((size_t(32) << 20) - (size_t(64) << 10));
  std::free(block);
#endif
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  keep_freed_memory();
  using namespace pycert;
  m.doc() = "pycert's compiled engine and operators";

  py::class_<Options>(m, "Options")
      .def(py::init([](int64_t method, int64_t slope, int64_t soundness, int64_t side, bool intersect,
                       bool return_linear, bool fast, int64_t memory, std::vector<bool> training, int64_t iterations,
                       double learning_rate, bool shared, bool intermediate, double threshold) {
             Options o;
             o.method = engine::Method(method);
             o.slope = slope;
             o.soundness = Soundness(soundness);
             o.side = engine::Side(side);
             o.intersect = intersect;
             o.return_linear = return_linear;
             o.fast = fast;
             o.memory = memory;
             o.training = std::move(training);
             o.ascent = {iterations, learning_rate, shared, intermediate, threshold};
             return o;
           }),
           py::arg("method"), py::arg("slope"), py::arg("soundness"), py::arg("side"), py::arg("intersect"),
           py::arg("return_linear"), py::arg("fast"), py::arg("memory"), py::arg("training"), py::arg("iterations"),
           py::arg("learning_rate"), py::arg("shared"), py::arg("intermediate"), py::arg("threshold"))
      .def_readwrite("flat_pools", &Options::flat_pools)
      .def("set_rates",
           [](Options& o, double decay, double cut_rate) {
             o.ascent.decay = decay;
             o.ascent.cut_rate = cut_rate;
           })
      .def("set_cuts",
           [](Options& o, const std::unordered_map<int64_t, std::array<at::Tensor, 4>>& cuts) {
             for (const auto& [activation, c] : cuts) o.cuts[activation] = {c[0], c[1], c[2], c[3]};
           })
      .def("set_first",
           [](Options& o, engine::Tables slopes, engine::Tables multipliers) {
             o.first_slopes = std::move(slopes);
             o.first_multipliers = std::move(multipliers);
           })
      .def("set_boxes",
           [](Options& o, std::unordered_map<int64_t, Box> given, std::unordered_map<int64_t, Box> reference) {
             o.given = std::move(given);
             o.reference = std::move(reference);
           })
      .def("set_custom", [](Options& o, py::function lines, py::function interval) {
        o.custom_lines = lines_callback(std::move(lines));
        o.custom_interval = interval_callback(std::move(interval));
      });

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init([](const std::vector<py::dict>& nodes, int64_t output) {
             std::vector<Node> list;
             for (const py::dict& d : nodes) list.push_back(node_of(d));
             return std::make_shared<Program>(std::move(list), output);
           }),
           py::arg("nodes"), py::arg("output"))
      .def("bound", &bound, py::arg("params"), py::arg("regions"), py::arg("options"), py::arg("spec"))
      .def("loss_bound", &loss_bound, py::arg("params"), py::arg("regions"), py::arg("options"), py::arg("spec"))
      .def("layer_bounds", &layer_bounds, py::arg("params"), py::arg("regions"), py::arg("options"))
      .def("estimate", &estimate, py::arg("params"), py::arg("regions"), py::arg("options"), py::arg("spec"))
      .def_property_readonly("preactivations", &Program::preactivations);

  py::class_<IntervalWalk>(m, "IntervalWalk")
      .def(py::init<const Program&, std::vector<at::Tensor>, const std::vector<RegionTuple>&, Options>(),
           py::arg("program"), py::arg("params"), py::arg("regions"), py::arg("options"), py::keep_alive<1, 2>())
      .def("advance", &IntervalWalk::advance, py::arg("node"), "Bounds of one value, after those of all before it")
      .def("set_box", &IntervalWalk::set_box, py::arg("node"), py::arg("lower"), py::arg("upper"));

  m.def("isa", [] { return std::string(cpu::instruction_set()); }, "Instruction set of the CPU kernels in use");
  m.def("same_entries", &same_entries, py::arg("dicts"), py::arg("entries"),
        "Whether dicts hold the very objects that `entries` lists: each dict, then its keys and values");
  m.def("keep_subnormals", &keep_subnormals, py::arg("keep"),
        "Turns the flushing of subnormal numbers off, or what this turned off on again; whether it was on",
        py::call_guard<py::gil_scoped_release>());
  m.def("has_cuda", [] {
#ifdef PYCERT_WITH_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("untested_cuda_kernels", &untested_cuda_kernels, "CUDA kernels whose authors never ran them on a GPU");
  m.def("testing_within_cuda_guard", [](const py::function& call) {
    const CudaPrecisionGuard guard(/*on_cuda=*/true);
    call();
  });
  m.def("set_cuda_check", [](py::function check) {
    set_cuda_check([check = std::move(check)] {
      const py::gil_scoped_acquire held;
      try {
        return check().cast<bool>();
      } catch (py::error_already_set& error) {  // it may cross threads that know nothing of the interpreter
        TORCH_CHECK(false, error.what());
      }
    });
  });
  m.def("check_cuda_kernels", &check_cuda_kernels, py::call_guard<py::gil_scoped_release>());
  m.def("octahedron_hull", &octahedron_hull, py::arg("octahedron"), py::arg("room"), py::arg("pivots"),
        py::call_guard<py::gil_scoped_release>());
  using Way = std::tuple<std::string, bool, std::array<int64_t, 3>, double, double>;
  m.def("set_choices", [](const std::string& device, const std::vector<Way>& all) {
    std::vector<MeasuredWays> measured;
    for (const auto& [name, is_double, shape, own, other] : all)
      measured.push_back({name, is_double ? at::kDouble : at::kFloat, shape, own, other});
    set_choices(c10::Device(device).type(), std::move(measured));
  });
  m.def("testing_replace_kernels", [](uintptr_t for_float, uintptr_t for_double) {
    replace_cpu_kernels(reinterpret_cast<const DeviceKernels<float>*>(for_float),
                        reinterpret_cast<const DeviceKernels<double>*>(for_double));
  });
  py::class_<record::Entry>(m, "ProfileEntry")
      .def_readonly("layer", &record::Entry::layer)
      .def_readonly("phase", &record::Entry::phase)
      .def_readonly("kernel", &record::Entry::kernel)
      .def_readonly("calls", &record::Entry::calls)
      .def_readonly("seconds", &record::Entry::seconds)
      .def_property_readonly("bytes", [](const record::Entry& e) { return e.cost.bytes; })
      .def_property_readonly("flops", [](const record::Entry& e) { return e.cost.flops; });
  py::class_<record::Target>(m, "ProfileTarget")
      .def_readonly("layer", &record::Target::layer)
      .def_readonly("rows", &record::Target::rows)
      .def_readonly("neurons", &record::Target::neurons)
      .def_readonly("seconds", &record::Target::seconds);
  m.def("profile_start", &record::start);
  m.def("profile_stop", [] {
    record::Report report = record::stop();
    return py::make_tuple(std::move(report.entries), std::move(report.targets));
  });
  m.def("terms", &term_names, "Terms of the error analysis that tests can take out");
  m.def("testing_disable", &disable_term);
  m.def("testing_enabled", &term_enabled);
  m.def("testing_enable_all", [] { disabled_terms() = 0; });
  m.def("testing_fail_allocation", &fail_allocation);
}
