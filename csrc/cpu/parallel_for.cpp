#include "parallel_for.h"

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace anima {

// With OpenMP (the default build) the threads are the pool that torch uses too: threads of our own would compete
// with torch's, which keep spinning after their last job. Builds without it, and ThreadSanitizer's, which cannot
// follow OpenMP, start threads.
void run_on_threads(int threads, void (*work)(const void* context, int thread), const void* context) {
  if (threads <= 1) {
    if (threads == 1) work(context, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) work(context, thread);
#else
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, context, thread);
  work(context, 0);
  for (auto& other : others) other.join();
#endif
}

}  // namespace anima
