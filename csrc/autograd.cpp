#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace tapelm {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

std::vector<std::string> split(const std::string& text, const std::string& separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + separator.size())
    parts.push_back(text.substr(begin, end - begin));
  parts.push_back(text.substr(begin));
  return parts;
}

// Position of a name among arguments of a schema, -1 without one.
int find(const std::vector<c10::Argument>& arguments, const std::string& name) {
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].name() == name) return static_cast<int>(i);
  return -1;
}

// A formula (see autograd.h) in numbers, which resolve() finds once both schemas are known.
struct Formula {
  enum class Source { gradient, input, output, negated_input, presence };
  struct Argument {
    Source source;
    int index;       // of the input or output
    int given = -1;  // the input without which the argument is none
    bool optional = false;  // the backward op takes none for it
  };
  struct Result {
    int input;         // whose gradient it is: its index among the inputs that are tensors
    int instead = -1;  // the result that is taken for it when it is empty
  };

  explicit Formula(const char* text) : text(text) {}

  void resolve(const c10::OperatorHandle& forward) {
    const c10::FunctionSchema& schema = forward.schema();
    for (const c10::Argument& input : schema.arguments()) {
      const bool tensor = *input.type() == *c10::TensorType::get() || *input.type() == *c10::OptionalType::ofTensor();
      tensor_of_input.push_back(tensor ? static_cast<int>(tensor_inputs.size()) : -1);
      if (tensor) tensor_inputs.push_back(static_cast<int>(tensor_of_input.size()) - 1);
    }
    differentiable.assign(schema.returns().size(), text.empty());
    if (text.empty()) return;
    const size_t open = text.find('('), close = text.find(") -> ");
    require(open != std::string::npos && close != std::string::npos, schema, "no call");
    backward = c10::Dispatcher::singleton().findSchemaOrThrow(("tapelm::" + text.substr(0, open)).c_str(), "");
    for (const std::string& name : split(text.substr(open + 1, close - open - 1), ", "))
      arguments.push_back(parse_argument(name, schema));
    const auto& parameters = backward->schema().arguments();
    require(arguments.size() == parameters.size(), schema, "another number of arguments");
    for (size_t i = 0; i < parameters.size(); ++i) {
      arguments[i].optional = parameters[i].type()->kind() == c10::TypeKind::OptionalType;
      if (arguments[i].source == Source::gradient) differentiable[arguments[i].index] = true;
    }
    const std::vector<std::string> parts = split(text.substr(close + 5), ", ");
    for (const std::string& part : parts) results.push_back(parse_result(part, parts, schema));
    require(results.size() == backward->schema().returns().size(), schema, "another number of results");
  }

  const std::string text;  // empty: no derivative
  std::vector<Argument> arguments;
  std::vector<Result> results;
  std::vector<int> tensor_inputs;    // indices of inputs that are tensors
  std::vector<int> tensor_of_input;  // and back; -1 for others
  std::vector<bool> differentiable;  // by output
  std::optional<c10::OperatorHandle> backward;
  std::once_flag resolved;

 private:
  void require(bool condition, const c10::FunctionSchema& schema, const std::string& fault) const {
    TORCH_INTERNAL_ASSERT(condition, "derivative of ", schema.name(), ": ", fault, " in \"", text, "\"");
  }

  // "grad", "grad_OUTPUT", "not INPUT", "has INPUT", "INPUT" or "OUTPUT", each perhaps with " if INPUT".
  Argument parse_argument(const std::string& whole, const c10::FunctionSchema& schema) const {
    const auto &inputs = schema.arguments(), &outputs = schema.returns();
    const auto parts = split(whole, " if ");
    const std::string& name = parts[0];
    Argument argument{};
    if (name == "grad")
      argument = {Source::gradient, 0};
    else if (name.rfind("grad_", 0) == 0)
      argument = {Source::gradient, find(outputs, name.substr(5))};
    else if (name.rfind("not ", 0) == 0)
      argument = {Source::negated_input, find(inputs, name.substr(4))};
    else if (name.rfind("has ", 0) == 0)
      argument = {Source::presence, find(inputs, name.substr(4))};
    else if (const int input = find(inputs, name); input >= 0)
      argument = {Source::input, input};
    else
      argument = {Source::output, find(outputs, name)};
    require(argument.index >= 0, schema, name);
    if (parts.size() == 2) {
      argument.given = find(inputs, parts[1]);
      require(argument.given >= 0, schema, parts[1]);
    }
    return argument;
  }

  // "INPUT" or "INPUT or OTHER", where OTHER is itself one of all results.
  Result parse_result(const std::string& whole, const std::vector<std::string>& all,
                      const c10::FunctionSchema& schema) const {
    const auto parts = split(whole, " or ");
    const int input = find(schema.arguments(), parts[0]);
    require(input >= 0 && tensor_of_input[input] >= 0, schema, parts[0]);
    Result result{tensor_of_input[input]};
    if (parts.size() == 2) {
      const auto other = std::find(all.begin(), all.end(), parts[1]);
      require(other != all.end(), schema, parts[1]);
      result.instead = static_cast<int>(other - all.begin());
    }
    return result;
  }
};

// Tensors are saved so that the engine sees changes in place and hooks on saved tensors run; the rest as it is.
struct Saved {
  SavedVariable tensor;
  IValue value;
  bool is_tensor = false;
};

class Derivative final : public Node {
 public:
  Derivative(std::shared_ptr<const Formula> formula, std::string op)
      : formula_(std::move(formula)), op_(std::move(op)) {}

  std::string name() const override { return "DerivativeOf(" + op_ + ")"; }

  void release_variables() override { saved.clear(); }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK_NOT_IMPLEMENTED(!formula_->text.empty(), op_,
                                " has no derivative: second derivatives are not supported.");
    TORCH_CHECK(saved.size() == formula_->arguments.size(), "Trying to backward through ", op_,
                " a second time after its saved tensors were freed; pass retain_graph=True the first time.");
    variable_list gradients(num_outputs());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) return gradients;
    Stack stack;
    for (size_t i = 0; i < saved.size(); ++i) {
      const Formula::Argument& argument = formula_->arguments[i];
      Tensor tensor;
      if (argument.source == Formula::Source::gradient) {
        const int slot = gradient_slot(argument.index);
        tensor = grads[slot];
        if (!tensor.defined() && !argument.optional) tensor = input_metadata(slot).zeros_like();
      } else if (!saved[i].is_tensor) {
        stack.push_back(saved[i].value);
        continue;
      } else {
        tensor = saved[i].tensor.unpack(getptr());
      }
      if (tensor.defined() || !argument.optional)
        stack.emplace_back(std::move(tensor));
      else
        stack.emplace_back();
    }
    formula_->backward->callBoxed(stack);
    for (size_t k = 0; k < formula_->results.size(); ++k) {
      const Formula::Result& result = formula_->results[k];
      if (!task_should_compute_output(result.input)) continue;
      const bool other = result.instead >= 0 && stack[k].toTensor().sym_numel() == 0;
      gradients[result.input] = stack[other ? result.instead : k].toTensor();
    }
    return gradients;
  }

  std::vector<Saved> saved;  // one for each argument of the backward op

 private:
  // Differentiable outputs alone have a slot among the gradients.
  int gradient_slot(int output) const {
    return static_cast<int>(std::count(formula_->differentiable.begin(), formula_->differentiable.begin() + output,
                                       true));
  }

  std::shared_ptr<const Formula> formula_;
  std::string op_;
};

class Kernel final : public c10::OperatorKernel {
 public:
  explicit Kernel(const char* formula) : formula_(std::make_shared<Formula>(formula)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    Formula& formula = *formula_;
    std::call_once(formula.resolved, [&] { formula.resolve(op); });
    const size_t inputs = op.schema().arguments().size(), outputs = op.schema().returns().size();
    const size_t base = stack->size() - inputs;
    bool required = false;
    for (const int i : formula.tensor_inputs) {
      const IValue& value = (*stack)[base + i];
      if (!value.isTensor() || !value.toTensor().defined()) continue;
      const Tensor& tensor = value.toTensor();
      required = required || tensor.requires_grad();
      TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(tensor), op.schema().name(),
                                  " has no forward-mode derivative.");
    }
    if (!required || !c10::GradMode::is_enabled()) {
      at::AutoDispatchBelowAutograd below;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
      return;
    }
    auto node = c10::make_intrusive<Derivative>(formula_, op.schema().name());
    for (const int i : formula.tensor_inputs) {
      const IValue& value = (*stack)[base + i];
      node->add_next_edge(value.isTensor() ? torch::autograd::impl::gradient_edge(value.toTensor())
                                           : torch::autograd::Edge());
    }
    node->saved.resize(formula.arguments.size());
    for (size_t k = 0; k < formula.arguments.size(); ++k) {
      const Formula::Argument& argument = formula.arguments[k];
      if (argument.source == Formula::Source::input)
        save(node->saved[k], (*stack)[base + argument.index], false);
      else if (argument.source == Formula::Source::negated_input)
        node->saved[k].value = !(*stack)[base + argument.index].toBool();
      else if (argument.source == Formula::Source::presence)
        node->saved[k].value = !(*stack)[base + argument.index].isNone();
    }
    std::vector<bool> given(formula.arguments.size());
    for (size_t k = 0; k < given.size(); ++k)
      given[k] = formula.arguments[k].given < 0 || !(*stack)[base + formula.arguments[k].given].isNone();
    {
      at::AutoDispatchBelowAutograd below;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    for (size_t i = 0; i < outputs; ++i)
      if (formula.differentiable[i]) torch::autograd::set_history((*stack)[base + i].toTensor(), node);
    for (size_t k = 0; k < given.size(); ++k)
      if (formula.arguments[k].source == Formula::Source::output && given[k])
        save(node->saved[k], (*stack)[base + formula.arguments[k].index], true);
  }

 private:
  static void save(Saved& saved, const IValue& value, bool is_output) {
    saved.is_tensor = value.isTensor();
    if (saved.is_tensor)
      saved.tensor = SavedVariable(value.toTensor(), is_output);
    else
      saved.value = value;
  }

  std::shared_ptr<Formula> formula_;
};

}  // namespace

torch::CppFunction derivative(const char* formula) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(formula));
}

torch::CppFunction no_derivative() { return derivative(""); }

}  // namespace tapelm
