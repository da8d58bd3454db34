// Python bindings of csrc/text as the module tapelm._text: conversions only, no logic, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "text/bpe.h"
#include "text/bpe_trainer.h"
#include "text/loader.h"
#include "text/rank_merges.h"
#include "text/shards.h"

namespace py = pybind11;
using namespace tapelm::text;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands a vector's memory to numpy without a copy.
template <typename T>
Array<T> to_numpy(std::vector<T>&& values) {
  auto* owner = new std::vector<T>(std::move(values));
  const py::capsule free(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return Array<T>({static_cast<py::ssize_t>(owner->size())}, owner->data(), free);
}

Array<uint32_t> to_numpy(IdBuffer&& ids) {
  auto* owner = new IdBuffer(std::move(ids));
  const py::capsule free(owner, [](void* p) { delete static_cast<IdBuffer*>(p); });
  return Array<uint32_t>({static_cast<py::ssize_t>(owner->size())}, owner->data(), free);
}

// The UTF-8 of a str, or the bytes themselves, without a copy; the object must outlive the view.
std::string_view view_of(py::handle text) {
  if (PyBytes_Check(text.ptr())) {
    return {PyBytes_AS_STRING(text.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(text.ptr()))};
  }
  if (!PyUnicode_Check(text.ptr())) {
    throw py::type_error("text must be str or bytes, not " + std::string(Py_TYPE(text.ptr())->tp_name));
  }
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) {
    PyErr_Clear();
    throw py::value_error("text contains a lone surrogate (half of a UTF-16 pair), which is no character: "
                          "repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')");
  }
  return {data, static_cast<size_t>(size)};
}

// Rows (left, right, merged).
Array<uint32_t> to_rows(const std::vector<Merge>& merges) {
  Array<uint32_t> rows({static_cast<py::ssize_t>(merges.size()), py::ssize_t{3}});
  auto out = rows.mutable_unchecked<2>();
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto row = static_cast<py::ssize_t>(i);
    out(row, 0) = merges[i].left, out(row, 1) = merges[i].right, out(row, 2) = merges[i].merged;
  }
  return rows;
}

BpeModel make_model(std::vector<std::string> tokens, const Array<uint32_t>& merges, std::vector<uint32_t> specials,
                    int pretokenizer, bool ignore_merges) {
  if (merges.ndim() != 2 || merges.shape(1) != 3) throw py::value_error("merges must have shape (n, 3)");
  BpeModel model{std::move(tokens), {}, std::move(specials), static_cast<Pretokenizer>(pretokenizer), ignore_merges};
  model.merges.reserve(static_cast<size_t>(merges.shape(0)));
  const auto rows = merges.unchecked<2>();
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) model.merges.push_back({rows(i, 0), rows(i, 1), rows(i, 2)});
  return model;
}

Array<uint32_t> encode(const Bpe& bpe, const py::object& text, bool allow_special) {
  const std::string_view view = view_of(text);
  IdBuffer ids;
  {
    const py::gil_scoped_release release;
    ids = bpe.encode(view, allow_special);
  }
  return to_numpy(std::move(ids));
}

// (ids, offsets) of all texts; the tuple keeps every text alive while the GIL is released.
py::tuple encode_batch(const Bpe& bpe, const py::tuple& texts, bool allow_special, unsigned threads) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (const py::handle text : texts) views.push_back(view_of(text));
  EncodedBatch batch;
  {
    const py::gil_scoped_release release;
    batch = bpe.encode_batch(views, allow_special, threads);
  }
  return py::make_tuple(to_numpy(std::move(batch.ids)), to_numpy(std::move(batch.offsets)));
}

py::bytes decode(const Bpe& bpe, const Array<uint32_t>& ids) {
  std::string text;
  {
    const py::gil_scoped_release release;
    text = bpe.decode({ids.data(), static_cast<size_t>(ids.size())});
  }
  return py::bytes(text);
}

void feed(BpeTrainer& trainer, const py::object& text) {
  const std::string_view view = view_of(text);
  const py::gil_scoped_release release;
  trainer.feed(view);
}

Array<uint32_t> train(const BpeTrainer& trainer, size_t vocab_size, const std::vector<uint32_t>& byte_ids,
                      const std::vector<std::string>& reserved, uint64_t min_frequency) {
  std::vector<Merge> merges;
  {
    const py::gil_scoped_release release;
    merges = trainer.train(vocab_size, byte_ids, reserved, min_frequency);
  }
  return to_rows(merges);
}

Array<uint32_t> merges_of_tokens(const std::vector<std::string>& tokens) {
  return to_rows(merges_of_ranks(tokens));
}

// Lengths in bytes of the words of a text.
std::vector<size_t> word_lengths(const py::object& text, int pretokenizer) {
  const std::string_view view = view_of(text);
  const auto* p = reinterpret_cast<const uint8_t*>(view.data());
  const auto* end = p + view.size();
  std::vector<size_t> lengths;
  for (; p < end; p += lengths.back()) {
    lengths.push_back(first_word(static_cast<Pretokenizer>(pretokenizer), p, end));
  }
  return lengths;
}

py::bytes shard_header(uint32_t token_bytes, uint64_t tokens, uint64_t documents, uint32_t vocab_size,
                       uint32_t end_of_text) {
  const ShardHeader header = make_shard_header(token_bytes, tokens, documents, vocab_size, end_of_text);
  return {reinterpret_cast<const char*>(&header), sizeof(header)};
}

void fill(const Loader& loader, uint64_t step, Array<int64_t>& inputs, Array<int64_t>& targets,
          Array<int32_t>& document_ids) {
  int64_t* const x = inputs.mutable_data();
  int64_t* const y = targets.mutable_data();
  int32_t* const d = document_ids.mutable_data();
  const auto expected = static_cast<py::ssize_t>(loader.batch_tokens());
  if (inputs.size() != expected || targets.size() != expected || document_ids.size() != expected) {
    throw py::value_error("buffers must have batch_size x seq_len elements");
  }
  const py::gil_scoped_release release;
  loader.fill(step, x, y, d);
}

}  // namespace

PYBIND11_MODULE(_text, m) {
  m.doc() = "Byte-pair encoding, token shards and batch assembly in C++.";
  m.attr("GPT2") = static_cast<int>(Pretokenizer::kGpt2);
  m.attr("LLAMA3") = static_cast<int>(Pretokenizer::kLlama3);
  m.attr("GPT2_DIGITS") = static_cast<int>(Pretokenizer::kGpt2Digits);
  m.attr("O200K") = static_cast<int>(Pretokenizer::kO200k);

  py::class_<Bpe>(m, "Bpe")
      .def(py::init([](std::vector<std::string> tokens, const Array<uint32_t>& merges, std::vector<uint32_t> specials,
                       int pretokenizer, bool ignore_merges) {
             return std::make_unique<Bpe>(
                 make_model(std::move(tokens), merges, std::move(specials), pretokenizer, ignore_merges));
           }),
           py::arg("tokens"), py::arg("merges"), py::arg("specials"), py::arg("pretokenizer"),
           py::arg("ignore_merges"))
      .def("encode", &encode, py::arg("text"), py::arg("allow_special"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("allow_special"), py::arg("threads"))
      .def("decode", &decode, py::arg("ids"));

  py::class_<BpeTrainer>(m, "BpeTrainer")
      .def(py::init([](int pretokenizer) {
             return std::make_unique<BpeTrainer>(static_cast<Pretokenizer>(pretokenizer));
           }),
           py::arg("pretokenizer"))
      .def("feed", &feed, py::arg("text"))
      .def("train", &train, py::arg("vocab_size"), py::arg("byte_ids"), py::arg("reserved"), py::arg("min_frequency"))
      .def_property_readonly("words", &BpeTrainer::words);

  m.def("merges_of_ranks", &merges_of_tokens, py::arg("tokens"));
  m.def("word_lengths", &word_lengths, py::arg("text"), py::arg("pretokenizer"));
  m.def("shard_header", &shard_header, py::arg("token_bytes"), py::arg("tokens"), py::arg("documents"),
        py::arg("vocab_size"), py::arg("end_of_text"));

  py::class_<ShardHeader>(m, "ShardHeader")
      .def_readonly("token_bytes", &ShardHeader::token_bytes)
      .def_readonly("tokens", &ShardHeader::tokens)
      .def_readonly("documents", &ShardHeader::documents)
      .def_readonly("vocab_size", &ShardHeader::vocab_size)
      .def_readonly("end_of_text", &ShardHeader::end_of_text);

  py::class_<Loader>(m, "Loader")
      .def(py::init([](const std::vector<std::string>& paths, uint32_t end_of_text, uint64_t batch_size,
                       uint64_t seq_len, uint64_t seed, uint64_t rank, uint64_t world_size) {
             return std::make_unique<Loader>(paths, end_of_text,
                                             LoaderOptions{batch_size, seq_len, seed, rank, world_size});
           }),
           py::arg("paths"), py::arg("end_of_text"), py::arg("batch_size"), py::arg("seq_len"), py::arg("seed"),
           py::arg("rank"), py::arg("world_size"))
      .def_property_readonly("tokens", &Loader::tokens)
      .def_property_readonly("windows", &Loader::windows)
      .def_property_readonly("steps_per_epoch", &Loader::steps_per_epoch)
      .def_property_readonly("headers", [](const Loader& loader) { return loader.shards().headers(); })
      .def("window_indices", &Loader::window_indices, py::arg("step"))
      .def("fill", &fill, py::arg("step"), py::arg("inputs").noconvert(), py::arg("targets").noconvert(),
           py::arg("document_ids").noconvert());
}
