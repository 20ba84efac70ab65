// Exceptions with composed messages: every error names the argument, what came and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ktmoe {

// Joins its arguments, streamed one after the other, into one string.
template <class... Parts>
std::string str_cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A value, shape or name that cannot be used (ValueError in Python).
template <class... Parts>
[[noreturn]] void throw_invalid(const Parts&... parts) {
  throw std::invalid_argument(str_cat(parts...));
}

// An index outside its range (IndexError in Python).
template <class... Parts>
[[noreturn]] void throw_out_of_range(const Parts&... parts) {
  throw std::out_of_range(str_cat(parts...));
}

// A state or machine in which the call cannot work (RuntimeError in Python).
template <class... Parts>
[[noreturn]] void throw_runtime(const Parts&... parts) {
  throw std::runtime_error(str_cat(parts...));
}

}  // namespace ktmoe
