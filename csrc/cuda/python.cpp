// Python bindings of csrc/cuda as the module tapelm._cuda: device pointers travel as integers, no torch is included.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "loader.h"

namespace py = pybind11;
using namespace tapelm::cuda;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Batches assembled on a GPU.";
  py::class_<Stage>(m, "Stage")
      .def(py::init([](uint32_t batch_size, uint32_t seq_len, uint32_t token_bytes, uint32_t end_of_text, bool packed) {
             return std::make_unique<Stage>(StageOptions{batch_size, seq_len, token_bytes, end_of_text, packed});
           }),
           py::arg("batch_size"), py::arg("seq_len"), py::arg("token_bytes"), py::arg("end_of_text"),
           py::arg("packed"))
      .def(
          "assemble",
          [](Stage& stage, const py::array& rows, const py::array& lengths, uint64_t inputs, uint64_t targets,
             uint64_t document_ids, uint64_t stream) {
            const DeviceBatch batch{reinterpret_cast<int64_t*>(inputs), reinterpret_cast<int64_t*>(targets),
                                    reinterpret_cast<int32_t*>(document_ids)};
            const void* from = rows.data();
            const auto* from_lengths = static_cast<const uint32_t*>(lengths.data());
            const py::gil_scoped_release release;
            stage.assemble(from, from_lengths, batch, reinterpret_cast<cudaStream_t>(stream));
          },
          py::arg("rows"), py::arg("lengths"), py::arg("inputs"), py::arg("targets"), py::arg("document_ids"),
          py::arg("stream"));
}
