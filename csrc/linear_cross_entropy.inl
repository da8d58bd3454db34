// e^(x - top); for bfloat16 cheaper than exp, by 6e-8 of the argument less exact.
template <typename T>
TAPELM_INLINE vf exp_below(vf x, float top) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return exp2((x - top) * 1.44269504088896341f);
  return exp(x - top);
}

// One row of logits: returns log(sum(exp)) - logit[target]; with `scale` not 0 the row becomes the loss gradient
// scale * (softmax - onehot(target)) in place.
template <typename T>
float cross_entropy_row(T* logits, const float* bias, int64_t V, int64_t target, float scale) {
  const int64_t whole = V / W * W;
  const int rest = static_cast<int>(V - whole);
  const float lowest = -__builtin_inff();
  if (bias != nullptr) {
    for (int64_t i = 0; i < whole; i += W) store(logits + i, load(logits + i) + load(bias + i));
    if (rest) store_part(logits + whole, load_part(logits + whole, rest) + load_part(bias + whole, rest), rest);
  }
  vf highest = broadcast(lowest);
  for (int64_t i = 0; i < whole; i += W) highest = max(highest, load(logits + i));
  if (rest) highest = max(highest, load_part(logits + whole, rest, lowest));
  const float top = max(highest);
  vf total = {};
  for (int64_t i = 0; i < whole; i += W) total += exp_below<T>(load(logits + i), top);
  if (rest) total += exp_below<T>(load_part(logits + whole, rest, lowest), top);
  const float sum_exp = sum(total);
  const float loss = std::log(sum_exp) + top - static_cast<float>(logits[target]);
  if (scale != 0.0f) {
    const float factor = scale / sum_exp;
    const float at_target = std::exp(static_cast<float>(logits[target]) - top) * factor - scale;
    for (int64_t i = 0; i < whole; i += W) store(logits + i, exp_below<T>(load(logits + i), top) * factor);
    if (rest) store_part(logits + whole, exp_below<T>(load_part(logits + whole, rest, lowest), top) * factor, rest);
    logits[target] = static_cast<T>(at_target);
  }
  return loss;
}
