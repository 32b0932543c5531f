#include "timing.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <thread>
#include <utility>

namespace simulated_cuda {

namespace {

using SteadyClock = std::chrono::steady_clock;

}  // namespace

Timing& timing() {
  static Timing instance;
  return instance;
}

Seconds now() { return std::chrono::duration<Seconds>(SteadyClock::now().time_since_epoch()).count(); }

void sleep_until(Seconds time) {
  const auto since_epoch = std::chrono::duration_cast<SteadyClock::duration>(std::chrono::duration<Seconds>(time));
  std::this_thread::sleep_until(SteadyClock::time_point(since_epoch));
}

void Timing::begin(const Rates& rates, bool has_values) {
  is_on_ = true;
  has_values_ = has_values;
  rates_ = rates;
}

void Timing::end() { *this = Timing(); }

Cost Timing::kernel(double operations, size_t nbytes) const {
  if (!is_on_) return {};
  const Seconds least = std::max(operations / rates_.operations, static_cast<double>(nbytes) / rates_.memory);
  return {Engine::compute, rates_.launch + least, 0};
}

Cost Timing::copy(Engine engine, size_t nbytes, bool is_pinned) const {
  if (!is_on_) return {};
  return {engine, rates_.launch + static_cast<double>(nbytes) / (is_pinned ? rates_.pinned : rates_.pageable), nbytes};
}

Seconds Timing::reserve(const std::string& name, const Cost& cost, Seconds since) {
  if (cost.seconds == 0) return since;
  auto& busy = busy_[static_cast<size_t>(cost.engine)];
  while (!busy.empty() && busy.begin()->second < now()) busy.erase(busy.begin());
  Seconds begin = since;
  auto next = busy.upper_bound(begin);
  if (next != busy.begin()) begin = std::max(begin, std::prev(next)->second);
  for (; next != busy.end() && next->first < begin + cost.seconds; ++next) begin = next->second;
  const Seconds end = begin + cost.seconds;
  spans_.push_back({name, static_cast<int>(cost.engine), begin, end, cost.nbytes});
  Seconds merged_end = end;
  if (next != busy.end() && next->first == end) {
    merged_end = next->second;
    next = busy.erase(next);
  }
  if (next != busy.begin() && std::prev(next)->second == begin) {
    std::prev(next)->second = merged_end;
  } else {
    busy[begin] = merged_end;
  }
  return end;
}

std::vector<Span> Timing::take_spans() { return std::exchange(spans_, {}); }

}  // namespace simulated_cuda
