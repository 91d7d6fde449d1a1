// The one way work is spread over threads.
//
// body(item, thread) runs once for every item in [0, items), on up to `threads` threads; thread < threads.
// Items are taken from a counter, so uneven ones balance.
#pragma once
#include <atomic>
#include <cstdint>

namespace anima {

// work(context, thread) once for each thread in [0, threads), at the same time. In parallel_for.cpp and not here
// because kernel files are compiled for several instruction sets and must not share inline library code.
void run_on_threads(int threads, void (*work)(const void* context, int thread), const void* context);

template <class Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  struct Context {
    const Body& body;
    int64_t items;
    mutable std::atomic<int64_t> next;
  };
  const Context context{body, items, {0}};
  run_on_threads(
      int(threads < items ? threads : items),
      [](const void* shared, int thread) {
        const Context& c = *static_cast<const Context*>(shared);
        for (int64_t item; (item = c.next.fetch_add(1, std::memory_order_relaxed)) < c.items;) c.body(item, thread);
      },
      &context);
}

}  // namespace anima
