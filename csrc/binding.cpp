// The module ppomax.engine._kv: KVCacheManager over CacheManager, NumPy arrays over its vectors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <span>
#include <stdexcept>
#include <vector>

#include "cache_manager.h"
#include "check.h"

namespace py = pybind11;
using ppomax::Row;
using ppomax::Statistics;

namespace {

// With noconvert() and without forcecast: another dtype is refused and not copied.
using RowArray = py::array_t<Row, py::array::c_style>;

// Calls run without the GIL, so two Python threads could be inside at once: the second one gets an error.
struct Manager : ppomax::CacheManager {
    using CacheManager::CacheManager;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

class Turn {
public:
    explicit Turn(Manager& manager) : manager_(manager) {
        if (manager.busy.test_and_set(std::memory_order_acquire)) {
            throw std::runtime_error("the manager is in a call of another thread; it has one owner thread");
        }
    }
    ~Turn() { manager_.busy.clear(std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

private:
    Manager& manager_;
};

template <typename Call>
auto without_gil(Manager& manager, Call call) {
    const Turn turn(manager);
    const py::gil_scoped_release released;
    return call();
}

std::span<const Row> as_span(const RowArray& rows) {
    ppomax::check_argument(rows.ndim() == 1, "rows must have 1 dimension, got ", rows.ndim());
    return {rows.data(), static_cast<std::size_t>(rows.size())};
}

// A read-only array over the manager's memory; the array keeps the manager alive.
template <typename T>
py::array view(const py::object& owner, std::span<const T> data, const std::vector<py::ssize_t>& shape) {
    py::array array(py::dtype::of<T>(), shape, data.data(), owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

py::array block_table(const py::object& self) {
    const auto& manager = self.cast<Manager&>();
    return view(self, manager.block_table(), {manager.max_sequences(), manager.max_blocks_per_sequence()});
}

py::array lengths(const py::object& self) {
    const auto& manager = self.cast<Manager&>();
    return view(self, manager.lengths(), {manager.max_sequences()});
}

py::array slot_mapping(const py::object& self) {
    const auto& manager = self.cast<Manager&>();
    return view(self, manager.slot_mapping(), {manager.max_sequences()});
}

py::array_t<std::int64_t> prefill_slots(Manager& manager, Row row) {
    const auto prompt_tokens = without_gil(manager, [&] { return manager.prompt_tokens(row); });
    py::array_t<std::int64_t> slots(prompt_tokens);
    const std::span<std::int64_t> out(slots.mutable_data(), static_cast<std::size_t>(slots.size()));
    without_gil(manager, [&] { manager.prefill_slots(row, out); });
    return slots;
}

Row admit(Manager& manager, std::int64_t prompt_tokens, std::int64_t max_tokens) {
    return without_gil(manager, [&] { return manager.admit(prompt_tokens, max_tokens); });
}

void step(Manager& manager, const RowArray& rows) {
    without_gil(manager, [&, span = as_span(rows)] { manager.step(span); });
}

void release(Manager& manager, const RowArray& rows) {
    without_gil(manager, [&, span = as_span(rows)] { manager.release(span); });
}

Statistics statistics(Manager& manager) {
    return without_gil(manager, [&] { return manager.statistics(); });
}

void check_integrity(Manager& manager) {
    without_gil(manager, [&] { manager.check_integrity(); });
}

}  // namespace

PYBIND11_MODULE(_kv, m) {
    m.doc() = "Block tables, lengths and slots of the paged KV cache (C++). Documented in _kv.pyi.";

    py::class_<Statistics>(m, "Statistics")
        .def_readonly("free_blocks", &Statistics::free_blocks)
        .def_readonly("blocks_in_use", &Statistics::blocks_in_use)
        .def_readonly("reserved_blocks", &Statistics::reserved_blocks)
        .def_readonly("rows_in_use", &Statistics::rows_in_use)
        .def_readonly("peak_blocks_in_use", &Statistics::peak_blocks_in_use);

    py::class_<Manager>(m, "KVCacheManager")
        .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), py::arg("num_blocks"),
             py::arg("block_size"), py::arg("max_sequences"), py::arg("max_blocks_per_sequence"))
        .def("admit", &admit, py::arg("prompt_tokens"), py::arg("max_tokens"))
        .def("prefill_slots", &prefill_slots, py::arg("row"))
        .def("step", &step, py::arg("rows").noconvert())
        .def("release", &release, py::arg("rows").noconvert())
        .def("check_integrity", &check_integrity)
        .def_property_readonly("block_table", &block_table)
        .def_property_readonly("lengths", &lengths)
        .def_property_readonly("slot_mapping", &slot_mapping)
        .def_property_readonly("statistics", &statistics)
        .def_property_readonly("num_blocks", &Manager::num_blocks)
        .def_property_readonly("block_size", &Manager::block_size)
        .def_property_readonly("max_sequences", &Manager::max_sequences)
        .def_property_readonly("max_blocks_per_sequence", &Manager::max_blocks_per_sequence);
}
