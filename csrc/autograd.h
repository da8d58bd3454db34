// Derivatives of the ops, one line each, without Python between the engine and the kernels.
#pragma once

#include <torch/library.h>

namespace tapelm {

// The Autograd kernel of an op whose derivative is another op, the same on every device. The formula
//   "layer_norm_backward(grad, x, weight, mean, rstd) -> x, weight, bias"
// is a call of that op and says whose gradients its results are, in order. Arguments are inputs and results of the
// forward op by their names in its schema, `grad` for the gradient of its first result and `grad_r` for that of its
// result r. A gradient that nothing flows into is zeros, or none where the argument is optional. Results without a
// gradient in the formula are not differentiable. Besides names there are
//   not flag     the negated bool
//   has bias     whether the optional input bias was given
//   mean if bias  none unless the optional input bias was given
//   x or residual the gradient of x is, when this result is empty, that of residual
torch::CppFunction derivative(const char* formula);

// The Autograd kernel of an op that has no derivative: differentiating through it is an error, not a silent zero.
torch::CppFunction no_derivative();

}  // namespace tapelm
