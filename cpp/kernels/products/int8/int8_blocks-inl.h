// Products of encoded weights with activations in int8, of any number of rows. Included inside a target's
// namespace.
#include "kernels/unpack/integers-inl.h"
#include "kernels/products/int8/few_rows-inl.h"

template <class Format>
void nt_int8_blocks(const NtArgs& args) {
  for (uint32_t m = 0; m < args.x.rows;) {
    if (args.x.rows - m == 1) {
      int8_few_rows<Format, 1>(args, m);
      m += 1;
    } else {
      int8_few_rows<Format, kFewRows>(args, m);
      m += kFewRows;
    }
  }
}
