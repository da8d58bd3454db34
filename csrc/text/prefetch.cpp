#include "prefetch.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace tapelm::text {
namespace {

constexpr size_t kAheadBytes = size_t{2} << 20;  // prepared ahead: enough batches to wake a thread seldom, warm in L3
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
};

}  // namespace

struct PrefetchState {
  PrefetchState(size_t batch_bytes, Prefetcher::Fill fill_batch)
      : process(::getpid()),
        depth(std::clamp(kAheadBytes / std::max<size_t>(batch_bytes, 1), kFewest, kMost)),
        pool(std::make_shared<Pool>(batch_bytes, depth + 2)),
        fill(std::move(fill_batch)),
        thread([this] { run(); }) {}

  ~PrefetchState() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    room.notify_one();
    thread.join();
  }

  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      // Once full, the queue is refilled when half of it is gone: half as many wake-ups.
      if (idle || ready.size() >= depth) {
        room.wait(lock, [&] { return stop || (!idle && ready.size() <= depth / 2); });
      }
      if (stop) return;
      const uint64_t step = first + ready.size();
      const uint64_t restarts_before = restarts;
      lock.unlock();
      Prepared prepared;
      try {
        prepared.memory = pool->take();
        fill(step, prepared.memory.get());
      } catch (...) {
        prepared = {nullptr, std::current_exception()};  // rethrown by next(), on the caller's thread
      }
      lock.lock();
      if (restarts_before != restarts) continue;
      idle = prepared.fault != nullptr;
      ready.push_back(std::move(prepared));
      arrivals.fetch_add(1, std::memory_order_release);
      if (waiting) arrived.notify_one();
    }
  }

  BatchMemory next(uint64_t step) {
    std::unique_lock lock(mutex);
    const uint64_t arrivals_before = arrivals.load(std::memory_order_relaxed);
    if (!continues || step != first) {
      ready.clear();
      first = step;
      ++restarts;
      continues = true;
      idle = false;
      room.notify_one();
    }
    if (ready.empty()) {
      // A batch is often microseconds away: looking for it that long is cheaper than being put to sleep and woken.
      lock.unlock();
      for (int i = 0; i < kSpins && arrivals.load(std::memory_order_acquire) == arrivals_before; ++i) {
        std::this_thread::yield();
      }
      lock.lock();
    }
    waiting = true;
    arrived.wait(lock, [&] { return !ready.empty(); });
    waiting = false;
    const Prepared prepared = std::move(ready.front());
    ready.pop_front();
    ++first;
    if (prepared.fault != nullptr) {
      continues = false;
      std::rethrow_exception(prepared.fault);
    }
    if (ready.size() == depth / 2) room.notify_one();
    return prepared.memory;
  }

  const pid_t process;
  const size_t depth;  // batches prepared ahead
  const std::shared_ptr<Pool> pool;
  Prefetcher::Fill fill;
  std::mutex mutex;
  std::condition_variable room;
  std::condition_variable arrived;
  std::deque<Prepared> ready;  // of steps first, first + 1, ...
  uint64_t first = 0;
  uint64_t restarts = 0;
  std::atomic<uint64_t> arrivals{0};
  bool continues = false;  // next(first) needs no restart
  bool idle = true;        // nothing was asked for yet, or the last of `ready` is a fault
  bool waiting = false;
  bool stop = false;
  std::thread thread;  // the last member: it starts when all others are there
};

Prefetcher::Prefetcher(size_t batch_bytes, Fill fill) : batch_bytes_(batch_bytes), fill_(std::move(fill)) {}

Prefetcher::~Prefetcher() {
  if (state_ != nullptr && state_->process != ::getpid()) static_cast<void>(state_.release());
}

BatchMemory Prefetcher::next(uint64_t step) {
  if (state_ != nullptr && state_->process != ::getpid()) {
    static_cast<void>(state_.release());  // of the parent: its thread is not here, and its mutex may be locked
  }
  if (state_ == nullptr) state_ = std::make_unique<PrefetchState>(batch_bytes_, fill_);
  return state_->next(step);
}

}  // namespace tapelm::text
