// Run-time choice of the instruction set: one binary serves every machine of its architecture.
#include <stdexcept>

#include "kernels.h"

namespace petl {

#define PETL_DECLARE(isa) \
  namespace isa {         \
  extern const Kernels kernels; \
  }
#if defined(PETL_X86)
PETL_DECLARE(sse2)
PETL_DECLARE(avx2)
PETL_DECLARE(avx512)
PETL_DECLARE(avx512bf16)
#elif defined(PETL_ARM64)
PETL_DECLARE(neon)
#else
PETL_DECLARE(generic)
#endif
#undef PETL_DECLARE

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

std::vector<Candidate> candidates() {
#if defined(PETL_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  return {{&sse2::kernels, true},
          {&avx2::kernels, has_avx2},
          {&avx512::kernels, has_avx512},
          {&avx512bf16::kernels, has_bf16}};
#elif defined(PETL_ARM64)
  return {{&neon::kernels, true}};
#else
  return {{&generic::kernels, true}};
#endif
}

const Kernels*& active() {
  static const Kernels* chosen = [] {
    const Kernels* widest = nullptr;
    for (const Candidate& c : candidates()) {
      if (c.supported) widest = c.kernels;
    }
    return widest;
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *active(); }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.kernels->isa);
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.supported) names.push_back(c.kernels->isa);
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Candidate& c : candidates()) {
    if (c.supported && name == c.kernels->isa) {
      active() = c.kernels;
      return;
    }
    if (c.supported) known += std::string(known.empty() ? "" : ", ") + c.kernels->isa;
  }
  throw std::invalid_argument("set_isa: name must be one of " + known + " on this processor, got " + name);
}

}  // namespace petl
