// Mapped files with unreadable pages: an error that can be raised, instead of a SIGBUS that ends the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace lightning_ssd::io {

struct BusError {
  uintptr_t watched;  // what `watch_mapping` returned
  size_t offset;      // of the unreadable page, in the mapping
};

// Installs the handler of SIGBUS and returns whether that succeeded. If a page of a watched mapping cannot be read, the
// handler replaces it and up to 2 MiB after it by private memory of 0xFF bytes (NaN), and calls `notify`, in the thread
// that read the page. Faults elsewhere get the action that was installed before.
bool handle_bus_errors(void (*notify)());

// Watches a mapping; `forget_mapping` takes what it returns. Thread-safe, but not to be called by signal handlers.
uintptr_t watch_mapping(uintptr_t begin, size_t nbytes);
void forget_mapping(uintptr_t watched);

// The next bus error that was not taken yet.
std::optional<BusError> take_bus_error();

}  // namespace lightning_ssd::io
