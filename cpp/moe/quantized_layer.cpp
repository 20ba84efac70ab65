#include "moe/quantized_layer.h"

#include "core/error.h"
#include "moe/tp_moe.h"

namespace ktmoe {
namespace {

template <class Family>
std::unique_ptr<MoE_Interface> make(const GeneralMOEConfig& config) {
  return std::make_unique<TP_MOE<AMX_MOE_TP<Family>>>(config);
}

[[noreturn]] void refuse(const GeneralMOEConfig& config, const char* expected) {
  throw_invalid("group_size: got ", config.group_size, ", expected ", expected);
}

template <template <class> class Family>
std::unique_ptr<MoE_Interface> make_int4(const GeneralMOEConfig& config) {
  switch (config.group_size) {
    case 0:
    case 32: return make<Family<formats::Int4Group32>>(config);
    case 64: return make<Family<formats::Int4Group64>>(config);
    case 128: return make<Family<formats::Int4Group128>>(config);
    default: refuse(config, "32, 64 or 128");
  }
}

std::unique_ptr<MoE_Interface> make_amx_int8(const GeneralMOEConfig& config) {
  if (config.group_size != 0) refuse(config, "0: integer products take scales of rows");
  return make<GemmKernel224Int8>(config);
}

std::unique_ptr<MoE_Interface> make_int8(const GeneralMOEConfig& config) {
  switch (config.group_size) {
    case 0: return make<Bf16Family<formats::Int8>>(config);
    case 32: return make<Bf16Family<formats::Int8Group32>>(config);
    default: refuse(config, "0 or 32");
  }
}

}  // namespace

AMXInt8Layer::AMXInt8Layer(const GeneralMOEConfig& config) : QuantizedLayer(make_amx_int8(config)) {}
AMXInt4Layer::AMXInt4Layer(const GeneralMOEConfig& config)
    : QuantizedLayer(make_int4<IntegerFamily>(config)) {}
Int8Layer::Int8Layer(const GeneralMOEConfig& config) : QuantizedLayer(make_int8(config)) {}
Int4Layer::Int4Layer(const GeneralMOEConfig& config) : QuantizedLayer(make_int4<Bf16Family>(config)) {}

}  // namespace ktmoe
