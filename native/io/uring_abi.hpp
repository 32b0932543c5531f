// The part of the kernel's io_uring interface that we use, declared here so that no header or library is needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightning_ssd::io::uring {

// The same numbers on every architecture with io_uring, except alpha.
inline constexpr long kSetupCall = 425;
inline constexpr long kEnterCall = 426;
inline constexpr long kRegisterCall = 427;

struct SqRingOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved1;
  uint64_t reserved2;
};

struct CqRingOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved1;
  uint64_t reserved2;
};

struct Params {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
  SqRingOffsets sq_off;
  CqRingOffsets cq_off;
};
static_assert(sizeof(Params) == 120);

struct SubmissionEntry {
  uint8_t opcode;
  uint8_t flags;
  uint16_t ioprio;
  int32_t fd;
  uint64_t offset;
  uint64_t address;
  uint32_t nbytes;
  uint32_t op_flags;
  uint64_t user_data;
  uint16_t buffer_index;
  uint16_t personality;
  uint32_t reserved1;
  uint64_t reserved2[2];
};
static_assert(sizeof(SubmissionEntry) == 64 && offsetof(SubmissionEntry, user_data) == 32);

struct CompletionEntry {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(CompletionEntry) == 16);

struct ProbeOp {
  uint8_t opcode;
  uint8_t reserved1;
  uint16_t flags;
  uint32_t reserved2;
};

struct Probe {
  uint8_t last_op;
  uint8_t num_ops;
  uint16_t reserved1;
  uint32_t reserved2[3];
  ProbeOp ops[32];
};
static_assert(sizeof(Probe) == 16 + 32 * 8);

enum Opcode : uint8_t { kReadFixed = 4, kWriteFixed = 5, kRead = 22, kWrite = 23 };

inline constexpr uint64_t kOffsetOfRings = 0;  // mmap offsets
inline constexpr uint64_t kOffsetOfEntries = 0x10000000;
inline constexpr uint32_t kFeatureSingleMmap = 1u << 0;     // both rings in one mapping (Linux 5.4)
inline constexpr uint32_t kFeatureResourceTags = 1u << 10;  // since Linux 5.13
inline constexpr uint32_t kEnterGetEvents = 1u << 0;
inline constexpr uint32_t kRegisterBuffers = 0;  // opcodes of the register call
inline constexpr uint32_t kRegisterProbe = 8;
inline constexpr uint16_t kProbeSupported = 1u << 0;

}  // namespace lightning_ssd::io::uring
