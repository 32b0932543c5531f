#include "io/piece.hpp"

#include <cerrno>
#include <utility>

namespace lightning_ssd::io {

namespace {

size_t round_down(size_t nbytes) { return nbytes / kBlockNbytes * kBlockNbytes; }
size_t round_up(size_t nbytes) { return round_down(nbytes + kBlockNbytes - 1); }

}  // namespace

Piece::Piece(std::shared_ptr<Transfer> transfer, size_t start, size_t nbytes)
    : transfer_(std::move(transfer)),
      offset_(transfer_->request().offset + start),
      data_(transfer_->request().data + start),
      nbytes_(nbytes),
      body_nbytes_(transfer_->request().direction == Direction::read ? round_up(nbytes) : round_down(nbytes)) {}

Attempt Piece::attempt() const {
  const Request& request = transfer_->request();
  // O_DIRECT cannot continue after a short result that ends off a block boundary; the buffered descriptor can.
  const bool direct = moved_nbytes_ < body_nbytes_ && moved_nbytes_ % kBlockNbytes == 0;
  const size_t end = direct ? body_nbytes_ : nbytes_;
  return {request.direction, direct ? request.direct_fd : request.tail_fd, offset_ + moved_nbytes_,
          data_ + moved_nbytes_, end - moved_nbytes_};
}

Piece::Step Piece::advance(ssize_t result) {
  if (result == -EINTR) return Step::again;
  if (result == -EAGAIN) return Step::busy;
  if (result <= 0) {
    error_ = result == 0 ? EIO : static_cast<int>(-result);  // 0: end of file inside the range
    return Step::failed;
  }
  moved_nbytes_ += static_cast<size_t>(result);
  return moved_nbytes_ >= nbytes_ ? Step::done : Step::again;
}

}  // namespace lightning_ssd::io
