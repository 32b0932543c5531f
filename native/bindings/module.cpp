// The Python module lightning_ssd._native. io.cpp and optim.cpp bind their functions and translate their errors.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_io(nb::module_& module);
#ifdef LIGHTNING_SSD_HAS_OPTIM
void bind_optim(nb::module_& module);
#endif

NB_MODULE(_native, module) {
  module.doc() = "Native I/O engines and optimizer kernels.";
  nb::set_leak_warnings(false);  // an engine may live until the interpreter ends
  bind_io(module);
#ifdef LIGHTNING_SSD_HAS_OPTIM
  bind_optim(module);
#endif
}
