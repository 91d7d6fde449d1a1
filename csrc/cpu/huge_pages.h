// Fresh memory for a large output costs a page fault every 4 KiB: over a quarter of the time of an Anima call of one
// prompt at 1024 x 1024 pixels. Asking for 2 MiB pages before the first write takes most of that away.
#pragma once
#include <cstddef>

namespace anima {

// Advice only: it changes no content, does nothing for memory in use already, and nothing where the system has no
// such pages. The range is the caller's own, about to be written whole.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace anima
