// Mapped files whose pages cannot be read: instead of the process's end by SIGBUS, something that can be raised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace lightning_ssd::io {

struct BusError {
  uintptr_t watched;  // as `watch_mapping` returned
  size_t offset;      // in it, of the page that could not be read
};

// From now on, where a page of a watched mapping cannot be read, it and up to 2 MiB after it become private memory of
// 0xFF bytes (NaN), and `notify` is called, in the signal's handler, by the thread that read. What faults elsewhere
// gets the action that was there before. Returns whether the handler is there.
bool handle_bus_errors(void (*notify)());

// Returns what `forget_mapping` takes. Thread-safe; not for handlers.
uintptr_t watch_mapping(uintptr_t begin, size_t nbytes);
void forget_mapping(uintptr_t watched);

// One that was not taken yet.
std::optional<BusError> take_bus_error();

}  // namespace lightning_ssd::io
