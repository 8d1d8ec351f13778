// The table of kernels of one instruction set; compiled, like the kernels, once per set.
#include "kernels.h"

#define PETL_STRING_(name) #name
#define PETL_STRING(name) PETL_STRING_(name)

namespace petl::PETL_ISA {

#define PETL_DECLARE(name, Call) void name(const Call& call);
PETL_KERNELS(PETL_DECLARE)

#define PETL_ENTRY(name, Call) name,
extern const Kernels kernels;
const Kernels kernels = {PETL_STRING(PETL_ISA), PETL_KERNELS(PETL_ENTRY)};

}  // namespace petl::PETL_ISA
