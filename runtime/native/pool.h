// A pool of threads that work on the parts of one job at a time.
//
// A decoder's step is a hundred short jobs, so a thread that waits for the next one spins for a moment before it
// sleeps. `ticket_` holds the parts of the job and the next part to be taken, in one number:
//
//     parts << 32 | next         a thread takes part `next` by raising the number by 1; next == parts: nothing to do
//
// Whoever has taken a part may use `job_`, which changes only after every part is done.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace itune {

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) { start_once(); }
    ~Pool() {
        if (process_ != process_id()) forget();
    }
    int threads() const { return threads_; }

    // Start the threads. After a fork the threads of the parent are gone, and the child starts its own. Python's lock
    // is held.
    void start_once() {
        if (process_ == process_id()) return;
        forget();
        mutex_ = std::make_unique<std::mutex>();
        crew_ = std::make_unique<Crew>(threads_ - 1);
        process_ = process_id();
    }

    // Hold the pool for a series of jobs: several threads of the process may share it.
    std::unique_lock<std::mutex> hold() { return std::unique_lock<std::mutex>(*mutex_); }

    // Call body(part, thread) for each part from 0 to parts - 1, all of them even if one throws. The caller holds the
    // pool.
    template <typename Body>
    void run(std::size_t parts, Body&& body) {
        if (threads_ == 1 || parts <= 1) {
            for (std::size_t part = 0; part < parts; ++part) body(part, 0);
            return;
        }
        crew_->run(parts, {&body, [](void* self, std::size_t part, int thread) {
                               (*static_cast<std::remove_reference_t<Body>*>(self))(part, thread);
                           }});
    }

  private:
    struct Job {
        void* body;
        void (*call)(void* body, std::size_t part, int thread);
    };

    class Crew {
      public:
        explicit Crew(int helpers) {
            try {
                for (int i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { help(i + 1); });
            } catch (...) {  // the system refuses more threads
                stop();
                throw;
            }
        }
        ~Crew() { stop(); }

        void run(std::size_t parts, Job job) {
            job_ = job;
            done_.store(0);
            ticket_.store(static_cast<std::uint64_t>(parts) << 32);
            if (asleep_.load() > 0) {
                std::lock_guard<std::mutex> lock(mutex_);
                wake_.notify_all();
            }
            work(0);
            for (int spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins) pause(spins);
            if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
        }

      private:
        void stop() {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                stopping_ = true;
            }
            wake_.notify_all();
            for (std::thread& thread : threads_) thread.join();
        }

        static bool has_work(std::uint64_t ticket) { return (ticket & 0xFFFFFFFF) < ticket >> 32; }

        static void pause(int spins) {
            if (spins % 1024 == 1023) std::this_thread::yield();
#if defined(__x86_64__) || defined(_M_X64)
            _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
            asm volatile("yield");
#endif
        }

        // Take parts until there are none left.
        void work(int thread) {
            std::uint64_t ticket = ticket_.load();
            while (has_work(ticket)) {
                if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
                try {
                    job_.call(job_.body, static_cast<std::size_t>(ticket & 0xFFFFFFFF), thread);
                } catch (...) {  // out of memory
                    std::lock_guard<std::mutex> lock(mutex_);
                    failure_ = std::current_exception();
                }
                done_.fetch_add(1, std::memory_order_release);
                ticket = ticket_.load();
            }
        }

        void help(int thread) {
            for (;;) {
                for (int spins = 0; spins < kSpins && !has_work(ticket_.load()); ++spins) pause(spins);
                if (!has_work(ticket_.load())) {
                    std::unique_lock<std::mutex> lock(mutex_);
                    asleep_.fetch_add(1);
                    wake_.wait(lock, [this] { return stopping_ || has_work(ticket_.load()); });
                    asleep_.fetch_sub(1);
                    if (stopping_) return;
                }
                work(thread);
            }
        }

        static constexpr int kSpins = 4000;  // about 50 to 200 microseconds
        Job job_{};
        std::atomic<std::uint64_t> ticket_{0};
        std::atomic<std::size_t> done_{0};
        std::atomic<int> asleep_{0};
        std::mutex mutex_;  // for sleeping, and of failure_
        std::exception_ptr failure_;
        std::condition_variable wake_;
        bool stopping_ = false;
        std::vector<std::thread> threads_;
    };

    // Threads that do not exist cannot be joined, and their mutexes may be locked for ever.
    void forget() {
        static_cast<void>(mutex_.release());
        static_cast<void>(crew_.release());
    }

    static int process_id() {
#if defined(_WIN32)
        return _getpid();
#else
        return getpid();
#endif
    }

    int threads_, process_ = 0;
    std::unique_ptr<std::mutex> mutex_;
    std::unique_ptr<Crew> crew_;
};

}  // namespace itune
