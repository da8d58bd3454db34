// Python bindings of csrc/text as the module tapelm._text: conversions only, no logic, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "text/bpe.h"
#include "text/bpe_trainer.h"
#include "text/encode_files.h"
#include "text/isa.h"
#include "text/jsonl.h"
#include "text/loader.h"
#include "text/rank_merges.h"
#include "text/prefetch.h"
#include "text/shards.h"

namespace py = pybind11;
using namespace tapelm::text;

namespace {

// Other Python threads run while it lives. A thread that wants the lock back while the interpreter ends is unwound by
// Python, which the destructor lets pass; pybind11's own would end the process with an abort.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() noexcept(false) { PyEval_RestoreThread(state_); }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands a vector's memory to numpy without a copy.
template <typename T, typename Allocator>
Array<T> to_numpy(std::vector<T, Allocator>&& values) {
  using Owned = std::vector<T, Allocator>;
  auto* owner = new Owned(std::move(values));
  const py::capsule free(owner, [](void* p) { delete static_cast<Owned*>(p); });
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
    const ReleasedGil released;
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
    const ReleasedGil released;
    batch = bpe.encode_batch(views, allow_special, threads);
  }
  return py::make_tuple(to_numpy(std::move(batch.ids)), to_numpy(std::move(batch.offsets)));
}

py::bytes decode(const Bpe& bpe, const Array<uint32_t>& ids) {
  std::string text;
  {
    const ReleasedGil released;
    text = bpe.decode({ids.data(), static_cast<size_t>(ids.size())});
  }
  return py::bytes(text);
}

void feed(BpeTrainer& trainer, const py::object& text) {
  const std::string_view view = view_of(text);
  const ReleasedGil released;
  trainer.feed(view);
}

Array<uint32_t> train(const BpeTrainer& trainer, size_t vocab_size, const std::vector<uint32_t>& byte_ids,
                      const std::vector<std::string>& reserved, uint64_t min_frequency) {
  std::vector<Merge> merges;
  {
    const ReleasedGil released;
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

// (tokens, starts): uint16 or uint32, and the index of the first token of every document.
py::tuple to_arrays(TokenBlock&& block, uint32_t token_bytes) {
  const Array<uint8_t> bytes = to_numpy(std::move(block.tokens));
  return py::make_tuple(bytes.attr("view")(token_bytes == 2 ? "<u2" : "<u4"), to_numpy(std::move(block.starts)));
}

py::tuple encode_lines_block(const Bpe& bpe, const py::buffer& lines, const std::string& path, uint64_t first_line,
                             uint32_t end_of_text, uint32_t token_bytes) {
  const py::buffer_info memory = lines.request();
  if (memory.ndim != 1 || memory.strides[0] != 1) throw py::type_error("lines must be contiguous bytes");
  const std::string_view view(static_cast<const char*>(memory.ptr), static_cast<size_t>(memory.size));
  TokenBlock block;
  {
    const ReleasedGil released;
    block = encode_lines(bpe, view, {end_of_text, token_bytes}, [&](size_t i) {
      return path + ", line " + std::to_string(first_line + i);
    });
  }
  return to_arrays(std::move(block), token_bytes);
}

py::tuple encode_pieces_block(const Bpe& bpe, const std::vector<py::bytes>& pieces,
                              const std::vector<std::string>& places, const std::vector<bool>& ends, bool continued,
                              uint32_t end_of_text, uint32_t token_bytes) {
  std::vector<std::string_view> views;
  for (const py::bytes& piece : pieces) views.push_back(view_of(piece));
  if (places.size() != views.size()) throw py::value_error("places must have an element for every piece");
  TokenBlock block;
  {
    const ReleasedGil released;
    block = encode_pieces(bpe, views, ends, continued, {end_of_text, token_bytes},
                          [&](size_t i) { return places[i]; });
  }
  return to_arrays(std::move(block), token_bytes);
}

// A view of part of a batch's memory, which lives as long as any of its views.
template <typename T>
py::array view_of_batch(const BatchMemory& memory, size_t offset, std::vector<py::ssize_t> shape) {
  const py::capsule owner(new BatchMemory(memory), [](void* p) { delete static_cast<BatchMemory*>(p); });
  return py::array_t<T>(std::move(shape), reinterpret_cast<const T*>(memory.get() + offset), owner);
}

// A Loader with its prefetch thread, preparing batches, or with `rows` what a GPU assembles them from.
class PrefetchingLoader {
 public:
  PrefetchingLoader(const std::vector<std::string>& paths, uint32_t end_of_text, LoaderOptions options, bool rows)
      : loader_(paths, end_of_text, options),
        batch_(static_cast<py::ssize_t>(options.batch_size)),
        seq_len_(static_cast<py::ssize_t>(options.seq_len)),
        rows_(rows),
        lengths_bytes_((4 * options.batch_size + 63) / 64 * 64),
        prefetcher_(rows ? lengths_bytes_ + options.batch_size * (options.seq_len + 1) * loader_.shards().token_bytes()
                         : options.batch_size * options.seq_len * 20,
                    fill()) {}

  const Loader& loader() const { return loader_; }

  std::vector<uint64_t> window_indices(uint64_t step) const {
    LoaderCursor cursor;
    return loader_.window_indices(step, cursor);
  }

  // (inputs, targets, document_ids) of a step, or with `rows` (rows, lengths).
  py::tuple next(uint64_t step) {
    prefetcher_.start();
    BatchMemory memory;
    {
      const ReleasedGil released;
      memory = prefetcher_.next(step);
    }
    if (rows_) {
      const std::vector<py::ssize_t> shape{batch_, seq_len_ + 1};
      return py::make_tuple(loader_.shards().token_bytes() == 2
                                ? view_of_batch<uint16_t>(memory, lengths_bytes_, shape)
                                : view_of_batch<uint32_t>(memory, lengths_bytes_, shape),
                            view_of_batch<uint32_t>(memory, 0, {batch_}));
    }
    const size_t tokens = static_cast<size_t>(batch_ * seq_len_);
    return py::make_tuple(view_of_batch<int64_t>(memory, 0, {batch_, seq_len_}),
                          view_of_batch<int64_t>(memory, 8 * tokens, {batch_, seq_len_}),
                          view_of_batch<int32_t>(memory, 16 * tokens, {batch_, seq_len_}));
  }

 private:
  Prefetcher::Fill fill() const {
    return [this, cursor = LoaderCursor()](uint64_t step, uint8_t* memory) mutable {
      if (rows_) {
        loader_.fill_rows(step, cursor, memory + lengths_bytes_, reinterpret_cast<uint32_t*>(memory));
        return;
      }
      const size_t tokens = static_cast<size_t>(batch_ * seq_len_);
      loader_.fill(step, cursor, reinterpret_cast<int64_t*>(memory), reinterpret_cast<int64_t*>(memory) + tokens,
                   reinterpret_cast<int32_t*>(memory + 16 * tokens));
    };
  }

  const Loader loader_;
  const py::ssize_t batch_;
  const py::ssize_t seq_len_;
  const bool rows_;
  const size_t lengths_bytes_;
  Prefetcher prefetcher_;
};

}  // namespace

PYBIND11_MODULE(_text, m) {
  tapelm::forced_isa();  // a wrong name in TAPELM_ISA is an ImportError
  m.doc() = "Byte-pair encoding, token shards and batch assembly in C++.";
  m.attr("TORCH_VERSION") = TORCH_VERSION;  // of the headers, with which the ops are compiled too
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
  m.def("encode_lines", &encode_lines_block, py::arg("bpe"), py::arg("lines"), py::arg("path"),
        py::arg("first_line"), py::arg("end_of_text"), py::arg("token_bytes"));
  m.def("encode_pieces", &encode_pieces_block, py::arg("bpe"), py::arg("pieces"), py::arg("places"), py::arg("ends"),
        py::arg("continued"), py::arg("end_of_text"), py::arg("token_bytes"));
  m.def("text_field",
        [](const py::bytes& line) {
          std::string unescaped;
          return py::str(text_field(view_of(line), unescaped));
        },
        py::arg("line"));
  m.def("safe_cut",
        [](const py::bytes& text, const std::vector<std::string>& specials) {
          return safe_cut(view_of(text), specials);
        },
        py::arg("text"), py::arg("specials"));
  m.def("word_lengths", &word_lengths, py::arg("text"), py::arg("pretokenizer"));
  m.def("start_writing", &start_writing, py::arg("descriptor"), py::call_guard<py::gil_scoped_release>());
  m.def("shard_header", &shard_header, py::arg("token_bytes"), py::arg("tokens"), py::arg("documents"),
        py::arg("vocab_size"), py::arg("end_of_text"));

  py::class_<ShardHeader>(m, "ShardHeader")
      .def_readonly("token_bytes", &ShardHeader::token_bytes)
      .def_readonly("tokens", &ShardHeader::tokens)
      .def_readonly("documents", &ShardHeader::documents)
      .def_readonly("vocab_size", &ShardHeader::vocab_size)
      .def_readonly("end_of_text", &ShardHeader::end_of_text);

  m.attr("SHUFFLED") = static_cast<int>(Order::kShuffled);
  m.attr("SEQUENTIAL") = static_cast<int>(Order::kSequential);
  m.attr("PACKED") = static_cast<int>(Order::kPacked);

  py::class_<PrefetchingLoader>(m, "Loader")
      .def(py::init([](const std::vector<std::string>& paths, uint32_t end_of_text, uint64_t batch_size,
                       uint64_t seq_len, uint64_t seed, uint64_t rank, uint64_t world_size, int order, bool rows) {
             const LoaderOptions options{batch_size, seq_len, seed, rank, world_size, static_cast<Order>(order)};
             return std::make_unique<PrefetchingLoader>(paths, end_of_text, options, rows);
           }),
           py::arg("paths"), py::arg("end_of_text"), py::arg("batch_size"), py::arg("seq_len"), py::arg("seed"),
           py::arg("rank"), py::arg("world_size"), py::arg("order") = static_cast<int>(Order::kShuffled),
           py::arg("rows") = false)
      .def_property_readonly("tokens", [](const PrefetchingLoader& self) { return self.loader().tokens(); })
      .def_property_readonly("windows", [](const PrefetchingLoader& self) { return self.loader().windows(); })
      .def_property_readonly("steps_per_epoch",
                             [](const PrefetchingLoader& self) { return self.loader().steps_per_epoch(); })
      .def_property_readonly("headers",
                             [](const PrefetchingLoader& self) { return self.loader().shards().headers(); })
      .def("window_indices", &PrefetchingLoader::window_indices, py::arg("step"))
      .def("next", &PrefetchingLoader::next, py::arg("step"));
}
