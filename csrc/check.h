// Errors with a message of several parts, put together only where a check fails.
#pragma once

#include <sstream>
#include <stdexcept>

namespace ppomax {

template <typename Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
}

// What a caller may pass: std::invalid_argument, ValueError in Python.
template <typename... Parts>
void check_argument(bool holds, const Parts&... message) {
    if (!holds) fail<std::invalid_argument>(message...);
}

// What must be true whatever the caller does: std::logic_error, RuntimeError in Python.
template <typename... Parts>
void check_invariant(bool holds, const Parts&... message) {
    if (!holds) fail<std::logic_error>(message...);
}

}  // namespace ppomax
