#include "formats/registry.h"

#include "core/error.h"

namespace ktmoe {

void throw_unknown_format(FormatId id) {
  throw_invalid("format: got number ", static_cast<int>(id), ", expected one below ", kNumFormats);
}

}  // namespace ktmoe
