// The module ppomax.engine._kv: KVCacheManager over CacheManager, NumPy arrays over its vectors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "cache_manager.h"
#include "check.h"

namespace py = pybind11;
using namespace ppomax;

namespace {

// With noconvert() and without forcecast: another dtype is refused and not copied.
using Integers = py::array_t<std::int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

// Calls run without the GIL, so two Python threads could be inside at once: the second one gets an error.
struct Manager : CacheManager {
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

template <typename T>
std::span<const T> as_span(const py::array_t<T, py::array::c_style>& array, const char* name) {
    check_argument(array.ndim() == 1, name, " must have 1 dimension, got ", array.ndim());
    return {array.data(), static_cast<std::size_t>(array.size())};
}

std::span<const bool> as_span(const std::optional<Flags>& array, const char* name) {
    return array ? as_span(*array, name) : std::span<const bool>{};
}

Manager* create(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_sequences,
                std::int64_t max_blocks_per_sequence, std::int64_t max_prefill_tokens,
                std::vector<Token> stop_tokens, std::int64_t namespaces) {
    const Sizes sizes{
        .num_blocks = num_blocks,
        .block_size = block_size,
        .max_sequences = max_sequences,
        .max_blocks_per_sequence = max_blocks_per_sequence,
        .max_prefill_tokens = max_prefill_tokens,
        .namespaces = namespaces,
    };
    return new Manager(sizes, std::move(stop_tokens));
}

SequenceId submit(Manager& manager, const Integers& prompt, const Integers& max_new_tokens, Space space) {
    const auto tokens = as_span(prompt, "prompt");
    const auto limits = as_span(max_new_tokens, "max_new_tokens");
    return without_gil(manager, [&] { return manager.submit(tokens, limits, space); });
}

std::vector<Finished> commit(Manager& manager, const Integers& tokens, const std::optional<Flags>& stopped) {
    const auto sampled = as_span(tokens, "tokens");
    const auto flags = as_span(stopped, "stopped");
    return without_gil(manager, [&] { return manager.commit(sampled, flags); });
}

Step step(Manager& manager, const Integers& tokens, std::int64_t prefill_tokens, const std::optional<Flags>& stopped) {
    const auto sampled = as_span(tokens, "tokens");
    const auto flags = as_span(stopped, "stopped");
    return without_gil(manager, [&] { return manager.step(sampled, flags, prefill_tokens); });
}

// The method as a function that takes its turn.
template <typename Result, typename... Arguments>
auto in_turn(Result (CacheManager::*method)(Arguments...)) {
    return [method](Manager& manager, Arguments... arguments) {
        return without_gil(manager, [&] { return (manager.*method)(arguments...); });
    };
}

template <typename Result, typename... Arguments>
auto in_turn(Result (CacheManager::*method)(Arguments...) const) {
    return [method](Manager& manager, Arguments... arguments) {
        return without_gil(manager, [&] { return (manager.*method)(arguments...); });
    };
}

auto on_ids(void (CacheManager::*method)(std::span<const SequenceId>)) {
    return [method](Manager& manager, const Integers& ids) {
        const auto span = as_span(ids, "ids");
        without_gil(manager, [&] { (manager.*method)(span); });
    };
}

py::array_t<std::int64_t> tokens_of(Manager& manager, SequenceId id) {
    const auto found = without_gil(manager, [&] { return manager.tokens(id); });
    py::array_t<std::int64_t> copy(std::ssize(found));
    std::ranges::copy(found, copy.mutable_data());
    return copy;
}

py::array_t<std::int64_t> response(const Finished& finished) {
    py::array_t<std::int64_t> copy(std::ssize(finished.response));
    std::ranges::copy(finished.response, copy.mutable_data());
    return copy;
}

// A read-only array over the manager's memory; the array keeps the manager alive.
template <typename T>
py::array view(const py::object& self, const T* data, const std::vector<py::ssize_t>& shape) {
    py::array array(py::dtype::of<T>(), shape, data, self);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

template <auto Field>
py::array batch_array(const py::object& self) {
    const auto& data = self.cast<Manager&>().batch().*Field;
    return view(self, data.data(), {std::ssize(data)});
}

py::array copies(const py::object& self) {
    const auto& data = self.cast<Manager&>().batch().copies;
    return view(self, data.data(), {std::ssize(data) / 2, 2});
}

py::array block_table(const py::object& self) {
    const auto& table = self.cast<Manager&>().block_table();
    return view(self, table.blocks().data(), {table.rows() + 1, table.columns()});
}

py::array dirty_rows(const py::object& self) {
    const auto& table = self.cast<Manager&>().block_table();
    return view(self, table.dirty_rows().data(), {table.rows()});
}

template <auto Field>
std::int64_t size(const Manager& manager) {
    return manager.sizes().*Field;
}

void bind_results(py::module_& m) {
    py::class_<Finished>(m, "Finished")
        .def_readonly("id", &Finished::id)
        .def_readonly("stopped", &Finished::stopped)
        .def_readonly("version", &Finished::version)
        .def_property_readonly("response", &response);
    py::class_<Step>(m, "Step")
        .def_readonly("num_tokens", &Step::num_tokens)
        .def_readonly("num_members", &Step::num_members)
        .def_readonly("num_decodes", &Step::num_decodes)
        .def_readonly("num_samples", &Step::num_samples)
        .def_readonly("num_copies", &Step::num_copies)
        .def_readonly("num_dirty_rows", &Step::num_dirty_rows)
        .def_readonly("preempted", &Step::preempted)
        .def_readonly("finished", &Step::finished);
    py::class_<SequenceInfo>(m, "SequenceInfo")
        .def_readonly("row", &SequenceInfo::row)
        .def_readonly("length", &SequenceInfo::length)
        .def_readonly("prompt_tokens", &SequenceInfo::prompt_tokens)
        .def_readonly("max_tokens", &SequenceInfo::max_tokens)
        .def_readonly("cached_tokens", &SequenceInfo::cached_tokens)
        .def_readonly("version", &SequenceInfo::version);
    py::class_<Statistics>(m, "Statistics")
        .def_readonly("free_blocks", &Statistics::free_blocks)
        .def_readonly("cached_blocks", &Statistics::cached_blocks)
        .def_readonly("blocks_in_use", &Statistics::blocks_in_use)
        .def_readonly("peak_blocks_in_use", &Statistics::peak_blocks_in_use)
        .def_readonly("running", &Statistics::running)
        .def_readonly("waiting", &Statistics::waiting)
        .def_readonly("hit_tokens", &Statistics::hit_tokens)
        .def_readonly("prefill_tokens", &Statistics::prefill_tokens)
        .def_readonly("evictions", &Statistics::evictions)
        .def_readonly("preemptions", &Statistics::preemptions)
        .def_readonly("copies", &Statistics::copies);
}

void bind_calls(py::class_<Manager>& manager) {
    manager
        .def("submit", &submit, py::arg("prompt").noconvert(), py::arg("max_new_tokens").noconvert(),
             py::arg("namespace") = 0)
        .def("plan", in_turn(&CacheManager::plan), py::arg("prefill_tokens"))
        .def("commit", &commit, py::arg("tokens").noconvert(), py::arg("stopped").noconvert() = py::none())
        .def("step", &step, py::arg("tokens").noconvert(), py::arg("prefill_tokens"),
             py::arg("stopped").noconvert() = py::none())
        .def("fork", in_turn(&CacheManager::fork), py::arg("id"), py::arg("num_tokens"))
        .def("preempt", on_ids(&CacheManager::preempt), py::arg("ids").noconvert())
        .def("release", on_ids(&CacheManager::release), py::arg("ids").noconvert())
        .def("reset", in_turn(&CacheManager::reset))
        .def("bump_version", in_turn(&CacheManager::bump_version), py::arg("namespace") = 0)
        .def("version", in_turn(&CacheManager::version), py::arg("namespace") = 0)
        .def("clear_cache", in_turn(&CacheManager::clear_cache))
        .def("sequence", in_turn(&CacheManager::sequence), py::arg("id"))
        .def("tokens_of", &tokens_of, py::arg("id"))
        .def("check_integrity", in_turn(&CacheManager::check_integrity))
        .def_property_readonly("statistics", in_turn(&CacheManager::statistics));
}

void bind_memory(py::class_<Manager>& manager) {
    manager
        .def_property_readonly("block_table", &block_table)
        .def_property_readonly("dirty_rows", &dirty_rows)
        .def_property_readonly("copies", &copies)
        .def_property_readonly("tokens", &batch_array<&StepBatch::tokens>)
        .def_property_readonly("positions", &batch_array<&StepBatch::positions>)
        .def_property_readonly("slot_mapping", &batch_array<&StepBatch::slot_mapping>)
        .def_property_readonly("rows", &batch_array<&StepBatch::rows>)
        .def_property_readonly("seq_lens", &batch_array<&StepBatch::seq_lens>)
        .def_property_readonly("cu_seqlens", &batch_array<&StepBatch::cu_seqlens>)
        .def_property_readonly("sample_ids", &batch_array<&StepBatch::sample_ids>)
        .def_property_readonly("sample_positions", &batch_array<&StepBatch::sample_positions>)
        .def_property_readonly("num_blocks", &size<&Sizes::num_blocks>)
        .def_property_readonly("block_size", &size<&Sizes::block_size>)
        .def_property_readonly("max_sequences", &size<&Sizes::max_sequences>)
        .def_property_readonly("max_blocks_per_sequence", &size<&Sizes::max_blocks_per_sequence>)
        .def_property_readonly("max_prefill_tokens", &size<&Sizes::max_prefill_tokens>);
}

}  // namespace

PYBIND11_MODULE(_kv, m) {
    m.doc() = "Which sequences run in the next step, and where their K and V are (C++). Documented in _kv.pyi.";
    bind_results(m);
    py::class_<Manager> manager(m, "KVCacheManager");
    manager.def(py::init(&create), py::arg("num_blocks"), py::arg("block_size"), py::arg("max_sequences"),
                py::arg("max_blocks_per_sequence"), py::kw_only(), py::arg("max_prefill_tokens") = 8192,
                py::arg("stop_tokens") = std::vector<Token>{}, py::arg("namespaces") = 1);
    bind_calls(manager);
    bind_memory(manager);
}
