#include "race_check.hpp"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>

#include "report.hpp"

namespace simulated_cuda {

RaceCheck& race_check() {
  static RaceCheck instance;
  return instance;
}

void RaceCheck::watch(char* base, size_t nbytes) {
  base_ = base;
  const size_t table_nbytes = nbytes / kGrainNbytes * sizeof(Grain);
  // Zeros that take memory only where something was touched.
  void* table = mmap(nullptr, table_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(table != MAP_FAILED, "simulated CUDA: no memory for the check of races");
  grains_ = static_cast<Grain*>(table);
}

void RaceCheck::begin(StreamId stream, const std::string& name) {
  kernels_[stream].push_back(&*names_.insert(name).first);
}

void RaceCheck::read(StreamId stream, const Clock& now, const Range& range) {
  bool is_reported = false;
  each_grain(range, [&](Grain& grain) {
    if (!is_reported && has_unseen_write(grain, stream, now)) {
      report_write(grain, stream, "reads");
      is_reported = true;
    }
    grain.read_at[stream] = now[stream];
  });
}

void RaceCheck::write(StreamId stream, const Clock& now, const Range& range) {
  bool is_reported = false;
  each_grain(range, [&](Grain& grain) {
    if (!is_reported && has_unseen_write(grain, stream, now)) {
      report_write(grain, stream, "writes");
      is_reported = true;
    }
    for (StreamId other = 0; other < kNumStreams && !is_reported; ++other) {
      if (other == stream || grain.read_at[other] <= now[other]) continue;
      report().race(name_of(stream, now[stream]) + " on stream " + std::to_string(stream) + " writes what " +
                    name_of(other, grain.read_at[other]) + " on stream " + std::to_string(other) +
                    " reads: nothing orders them");
      is_reported = true;
    }
    grain.written_on = static_cast<uint8_t>(stream);
    grain.written_at = now[stream];
    std::fill(std::begin(grain.read_at), std::end(grain.read_at), 0);
  });
}

template <class Visit>
void RaceCheck::each_grain(const Range& range, Visit visit) {
  if (range.nbytes == 0) return;
  const size_t first = static_cast<size_t>(range.begin - base_) / kGrainNbytes;
  const size_t last = static_cast<size_t>(range.begin - base_ + range.nbytes - 1) / kGrainNbytes;
  for (size_t i = first; i <= last; ++i) visit(grains_[i]);
}

bool RaceCheck::has_unseen_write(const Grain& grain, StreamId stream, const Clock& now) const {
  return grain.written_on != stream && grain.written_at > now[grain.written_on];
}

void RaceCheck::report_write(const Grain& grain, StreamId stream, const char* verb) const {
  report().race(*kernels_[stream].back() + " on stream " + std::to_string(stream) + " " + verb + " what " +
                name_of(grain.written_on, grain.written_at) + " on stream " + std::to_string(grain.written_on) +
                " wrote: nothing orders them");
}

const std::string& RaceCheck::name_of(StreamId stream, uint32_t tick) const { return *kernels_[stream].at(tick - 1); }

}  // namespace simulated_cuda
