#include "prefetch.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace tapelm::text {
namespace {

constexpr size_t kAheadBytes = size_t{4} << 20;  // prepared ahead: enough batches to wake a thread seldom, warm in L3
constexpr size_t kFewest = 4, kMost = 32;
constexpr int kSpins = 50;

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<uint8_t, Free>;

// Blocks of one size, handed out again while they are warm in the cache. The process id tells a forked child, where
// the mutex may be held for ever by a thread that does not exist.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  Pool(size_t bytes, size_t kept) : bytes_((bytes + 63) / 64 * 64), kept_(kept), process_(::getpid()) {}

  BatchMemory take() {
    Block block;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        block = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (!block) block.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes_)));
    if (!block) throw std::bad_alloc();
    return {block.release(), [pool = shared_from_this()](uint8_t* memory) { pool->give_back(Block(memory)); }};
  }

 private:
  void give_back(Block block) {
    if (process_ != ::getpid()) return;
    const std::lock_guard lock(mutex_);
    if (idle_.size() < kept_) idle_.push_back(std::move(block));
  }

  const size_t bytes_, kept_;
  const pid_t process_;
  std::mutex mutex_;
  std::vector<Block> idle_;
};

struct Prepared {
  BatchMemory memory;
  std::exception_ptr fault;  // instead of the memory
  uint32_t position = 0;     // PrefetchState::position when it was begun
};

}  // namespace

// A ring of prepared batches between one producer, the thread, and one consumer at a time. Neither takes a lock that
// the other holds unless the consumer jumps; each sleeps on a counter that the other raises.
struct PrefetchState {
  PrefetchState(size_t batch_bytes, Prefetcher::Fill fill_batch)
      : process(::getpid()),
        ring(std::bit_floor(std::clamp(kAheadBytes / std::max<size_t>(batch_bytes, 1), kFewest, kMost))),
        pool(std::make_shared<Pool>(batch_bytes, ring.size() + 2)),
        fill(std::move(fill_batch)),
        thread([this] { run(); }) {}

  ~PrefetchState() {
    stop = true;
    ring_bell();
    thread.join();
  }

  void run() {
    const auto depth = static_cast<uint32_t>(ring.size());
    uint32_t begun = 0;      // the position that `step` counts from
    uint64_t step = 0;
    bool asleep = true;      // until there is a position, after a fault, and from a full ring to one half empty
    bool faulted = false;
    while (true) {
      const uint32_t rung = bell;  // read before what it announces
      if (stop) return;
      if (begun != position) {
        const std::lock_guard lock(jump);
        begun = position;
        step = wanted;
        faulted = asleep = false;
      }
      const uint32_t ahead = produced - consumed;
      asleep = asleep ? faulted || begun == 0 || ahead > depth / 2 : ahead == depth;
      if (asleep) {
        bell.wait(rung);
        continue;
      }
      Prepared& slot = ring[produced % depth];
      slot.position = begun;
      try {
        slot.memory = pool->take();
        fill(step++, slot.memory.get());
      } catch (...) {
        slot.memory = nullptr;
        slot.fault = std::current_exception();  // rethrown by next(), on the caller's thread
        faulted = asleep = true;
      }
      ++produced;
      produced.notify_one();
    }
  }

  BatchMemory next(uint64_t step) {
    const std::lock_guard consumer(consuming);
    if (position == 0 || step != first) jump_to(step);
    while (true) {
      await_one();
      const Prepared prepared = std::exchange(ring[consumed % ring.size()], {});
      ++consumed;
      // The producer went to sleep at a full ring, so that this comes by on the way to an empty one.
      if (produced - consumed == ring.size() / 2) ring_bell();
      if (prepared.position != position) continue;  // begun before the jump
      ++first;
      if (prepared.fault == nullptr) return prepared.memory;
      first = kNowhere;
      std::rethrow_exception(prepared.fault);
    }
  }

  void jump_to(uint64_t step) {
    for (; consumed != produced; ++consumed) ring[consumed % ring.size()] = {};
    {
      const std::lock_guard lock(jump);
      wanted = first = step;
      if (++position == 0) ++position;  // 0 says that there was none yet
    }
    ring_bell();
  }

  void await_one() {
    // A batch is often microseconds away: spinning that long is cheaper than a sleep and a wake-up by the kernel.
    for (int i = 0; i < kSpins && produced == consumed; ++i) std::this_thread::yield();
    for (uint32_t seen; (seen = produced) == consumed;) produced.wait(seen);
  }

  void ring_bell() {
    ++bell;
    bell.notify_one();
  }

  static constexpr uint64_t kNowhere = ~0ull;

  const pid_t process;
  std::vector<Prepared> ring;  // a power of two, so that the counters may wrap; [consumed, produced) are ready
  const std::shared_ptr<Pool> pool;
  Prefetcher::Fill fill;
  std::atomic<uint32_t> produced{0};
  std::atomic<uint32_t> consumed{0};
  std::atomic<uint32_t> bell{0};      // something changed that the producer may sleep on
  std::atomic<uint32_t> position{0};  // raised by every jump
  std::atomic<bool> stop{false};
  std::mutex consuming;
  std::mutex jump;        // of position and wanted together
  uint64_t wanted = 0;    // first step of the position
  uint64_t first = 0;     // the consumer's: the step that needs no jump
  std::thread thread;     // the last member: it starts when all others are there
};

Prefetcher::Prefetcher(size_t batch_bytes, Fill fill) : batch_bytes_(batch_bytes), fill_(std::move(fill)) {}

Prefetcher::~Prefetcher() {
  if (state_ != nullptr && state_->process != ::getpid()) static_cast<void>(state_.release());
}

void Prefetcher::start() {
  if (state_ != nullptr && state_->process != ::getpid()) {
    static_cast<void>(state_.release());  // of the parent: its thread is not here, and a mutex may be locked
  }
  if (state_ == nullptr) state_ = std::make_unique<PrefetchState>(batch_bytes_, fill_);
}

BatchMemory Prefetcher::next(uint64_t step) { return state_->next(step); }

}  // namespace tapelm::text
