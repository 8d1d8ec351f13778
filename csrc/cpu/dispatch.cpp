// Run-time choice of the instruction set: one binary serves every machine of its architecture.
#include <stdexcept>

#include "kernels.h"

namespace petl {

// PETL_ISAS is "ISA(sse2) ISA(avx2) ...": those that are built, narrowest first.
#define ISA(name) \
  namespace name { \
  extern const Kernels kernels; \
  }
PETL_ISAS
#undef ISA

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

bool supports([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return has_avx2;
  if (isa == "avx512") return has_avx512;
  if (isa == "avx512bf16") return has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return true;
}

std::vector<Candidate> candidates() {
#define ISA(name) {&name::kernels, supports(#name)},
  return {PETL_ISAS};
#undef ISA
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
