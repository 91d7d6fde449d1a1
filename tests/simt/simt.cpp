// The machine behind simt.h: fibers, barriers, memory and its shadow. Compiled without instrumentation, for Linux.
//
// Shadow memory: for every two bytes of shared memory and of writable buffers, who wrote last and two who read last,
// each with the time. Time is `epoch`, which advances at every block and at every __syncthreads, and within it the
// warp's own count of __syncwarp. Two accesses of one epoch by different warps, or of one warp time by different lanes,
// have nothing that orders them. Two readers are enough to tell any writer that there is a reader from elsewhere, if
// the second is kept from as far away as possible (another block, another warp, another lane).
#include "simt.h"

#include <cxxabi.h>

#include <csetjmp>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr size_t kCell = 2;  // bytes a shadow cell stands for: neighbouring halves belong to different threads
constexpr unsigned kMaxThreads = 1024, kMaxGrid[3] = {2147483647u, 65535, 65535};
constexpr size_t kStacks = kMaxThreads * (kStack + kGuard);
constexpr size_t kMaxShared = (SIMT_ARCH < 800 ? 64 : 99) * 1024;  // the least of the architectures there are

struct Access {
  uint32_t epoch = 0;  // 0: never
  uint16_t thread = 0, warp_time = 0;
};
struct Cell {
  Access write, read[2];
};

enum class State { kReady, kAtCollective, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  char* stack = nullptr;
  State state = State::kDone;
  const char *kind = "", *file = "";
  int line = 0;
  unsigned mask = 0;
  unsigned char brought[2][kMaxExchange];  // the next collective's does not overwrite what others still read
  int published = 0;
};

struct Buffer {
  std::string name;
  char *begin, *end;
  bool writable;
  std::vector<Cell> shadow;
};

struct Range {
  const char *begin = nullptr, *end = nullptr;
  bool holds(const char* p) const { return p >= begin && p < end; }
};

// A launch
dim3 grid, block;
uint3 block_at;
int threads = 0;
const char* kernel_name = "";
void (*thread_body)(const void*);
const void* thread_call;

// Its threads
std::vector<Fiber> fibers;
char* stacks = nullptr;
Fiber* current = nullptr;
int current_index = 0;
jmp_buf scheduler;

// Time
uint32_t epoch = 0, block_start = 0, launch_start = 0;
uint16_t warp_time[kMaxThreads / 32];

// Memory
std::vector<Buffer> buffers;
size_t latest_buffer = 0;
Range statics, constants, dynamic;
std::vector<Cell> static_shadow, dynamic_shadow;
alignas(128) char dynamic_memory[kMaxShared];

std::string error;                 // of the first failure since it was last asked for
const void* failed_code = nullptr;  // the instruction, where one is to blame
bool failed = false;
std::set<std::string> launched;

// --- Errors

std::string thread_name(unsigned index) {
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u)", index % block.x, index / block.x % block.y,
                index / block.x / block.y);
  return text;
}

std::string at(const char* file, int line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

// "scan.cu:12, in scan.cu:40" of an inlined instruction, if the machine has addr2line.
std::string source_of(const void* code) {
  Dl_info module;
  if (!dladdr(code, &module)) return "";
  const size_t offset = size_t(static_cast<const char*>(code) - static_cast<const char*>(module.dli_fbase)) - 1;
  char line[2048];
  std::snprintf(line, sizeof line, "addr2line -i -e '%s' %#zx 2>/dev/null", module.dli_fname, offset);
  FILE* pipe = popen(line, "r");
  std::string places;
  while (pipe && std::fgets(line, sizeof line, pipe)) {
    const std::string path(line, std::strcspn(line, " \n"));
    if (path[0] != '?' && path.find("/simt.h:") == std::string::npos)
      places += (places.empty() ? " at " : ", in ") + path.substr(path.rfind('/') + 1);
  }
  if (pipe) pclose(pipe);
  return places;
}

const char* last_error() { return failed ? error.c_str() : nullptr; }

void set_error(const std::string& message) {
  if (!failed) error = message;
  failed = true;
}

// The block as a whole went wrong.
void fail_block(const std::string& message) {
  char where[96];
  std::snprintf(where, sizeof where, ", block (%u,%u,%u)", block_at.x, block_at.y, block_at.z);
  set_error("kernel " + std::string(kernel_name) + where + ": " + message);
}

void to_scheduler() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

// The running thread did something wrong, at the instruction `code`; it never returns to it.
void fail_thread(const std::string& message, const void* code) {
  if (!current) return set_error("host code: " + message + source_of(code));
  fail_block(thread_name(unsigned(current_index)) + ": " + message);
  failed_code = code;
  to_scheduler();
}

// --- Memory

int warp_of(int thread) { return thread / 32; }

// Whether something orders `before` and what the running thread does now.
bool unordered(const Access& before, bool shared_memory) {
  if (before.epoch < (shared_memory ? block_start : launch_start)) return false;
  if (before.epoch < block_start) return true;  // another block
  if (before.epoch < epoch || before.thread == current_index) return false;
  if (warp_of(before.thread) != warp_of(current_index)) return true;
  return before.warp_time == warp_time[warp_of(current_index)];
}

// How far apart two readers are: in blocks, warps, lanes.
int distance(const Access& a, const Access& b) {
  if ((a.epoch < block_start) != (b.epoch < block_start)) return 3;
  return warp_of(a.thread) != warp_of(b.thread) ? 2 : a.thread != b.thread;
}

void remember_reader(Cell& cell, const Access& now, bool shared_memory) {
  Access &first = cell.read[0], &second = cell.read[1];
  const uint32_t oldest = shared_memory ? block_start : launch_start;
  const bool other_block = first.epoch < block_start;
  const bool superseded = !other_block && (first.epoch < epoch || first.thread == now.thread ||
                                           (warp_of(first.thread) == warp_of(now.thread) &&
                                            first.warp_time != now.warp_time));
  if (first.epoch < oldest || superseded) first = now;
  else if (second.epoch < oldest || distance(first, now) >= distance(first, second)) second = now;
}

std::string conflict(const char* now, const char* before, const Access& other, const std::string& where) {
  std::string who;
  if (other.epoch < block_start) who = "another block's";
  else who = thread_name(other.thread) + "'s";
  const bool same_warp = other.epoch == epoch && warp_of(other.thread) == warp_of(current_index);
  const char* missing = other.epoch < block_start ? "blocks are not ordered"
                        : same_warp               ? "no __syncwarp or __syncthreads between them"
                                                  : "no __syncthreads between them";
  return std::string("race: ") + now + " " + where + " after " + who + " " + before + ", " + missing;
}

template <class Where>
void check_cells(std::vector<Cell>& shadow, size_t offset, size_t bytes, bool write, bool shared_memory,
                 const void* code, const Where& where) {
  const Access now{epoch, uint16_t(current_index), warp_time[warp_of(current_index)]};
  for (size_t i = offset / kCell; i <= (offset + bytes - 1) / kCell; ++i) {
    Cell& cell = shadow[i];
    if (shared_memory && !write && cell.write.epoch < block_start)
      return fail_thread("read of " + where(i * kCell) + ", which nothing has written yet", code);
    if (unordered(cell.write, shared_memory))
      return fail_thread(conflict(write ? "write to" : "read of", "write", cell.write, where(i * kCell)), code);
    if (!write) {
      remember_reader(cell, now, shared_memory);
      continue;
    }
    for (const Access& read : cell.read)
      if (unordered(read, shared_memory))
        return fail_thread(conflict("write to", "read", read, where(i * kCell)), code);
    cell.write = now;
  }
}

std::string plural(size_t n, const char* what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

std::string in_dynamic(size_t byte) { return "dynamic shared memory at byte " + std::to_string(byte); }
std::string in_static(size_t byte) {
  Dl_info symbol;
  const char* p = statics.begin + byte;
  if (!dladdr(p, &symbol) || !symbol.dli_sname) return "a __shared__ variable";
  char* readable = abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : symbol.dli_sname;
  std::free(readable);
  return "__shared__ " + name + " at byte " + std::to_string(p - static_cast<const char*>(symbol.dli_saddr));
}

void outside(const char* p, size_t bytes, const char* what, const void* code) {
  std::string message = std::string("out of bounds: ") + what + " of " + plural(bytes, "byte");
  const Buffer* nearest = nullptr;
  size_t distance = 0;
  for (const Buffer& b : buffers) {
    const size_t away = p < b.begin ? size_t(b.begin - p) : p < b.end ? 0 : size_t(p - b.end);
    if (!nearest || away < distance) nearest = &b, distance = away;
  }
  if (!nearest) return fail_thread(message + ", but no buffer is registered", code);
  if (p < nearest->begin) message += ", " + plural(distance, "byte") + " before the start of buffer ";
  else if (p < nearest->end) message += " across the end of buffer ";
  else message += ", " + plural(distance, "byte") + " after the end of buffer ";
  fail_thread(message + nearest->name + " (" + plural(size_t(nearest->end - nearest->begin), "byte") + ")", code);
}

Buffer* buffer_of(const char* p, size_t bytes) {
  const auto holds = [&](const Buffer& b) { return p >= b.begin && p + bytes <= b.end; };
  if (latest_buffer < buffers.size() && holds(buffers[latest_buffer])) return &buffers[latest_buffer];
  for (size_t i = 0; i < buffers.size(); ++i)
    if (holds(buffers[i])) return latest_buffer = i, &buffers[i];
  return nullptr;
}

void access(const void* address, size_t bytes, bool write, const void* code) {
  if (!current) return;  // host code
  const char* p = static_cast<const char*>(address);
  if (p >= current->stack && p < current->stack + kStack) return;
  if (p >= dynamic_memory && p < dynamic_memory + kMaxShared) {
    const size_t offset = size_t(p - dynamic_memory), size = size_t(dynamic.end - dynamic.begin);
    if (offset + bytes > size)
      return fail_thread(std::string("out of bounds: ") + (write ? "write" : "read") + " of " + plural(bytes, "byte") +
                             " at byte " + std::to_string(offset) + " of " + plural(size, "byte") +
                             " of dynamic shared memory", code);
    return check_cells(dynamic_shadow, offset, bytes, write, true, code, in_dynamic);
  }
  if (statics.holds(p))
    return check_cells(static_shadow, size_t(p - statics.begin), bytes, write, true, code, in_static);
  if (Buffer* buffer = buffer_of(p, bytes)) {
    if (!buffer->writable) {
      if (write) fail_thread("write to buffer " + buffer->name + ", which is read-only", code);
      return;
    }
    return check_cells(buffer->shadow, size_t(p - buffer->begin), bytes, write, false, code, [&](size_t byte) {
      return "buffer " + buffer->name + " at byte " + std::to_string(byte);
    });
  }
  if (constants.holds(p) && !write) return;  // tables in the code
  if (stacks && p >= stacks && p < stacks + kStacks)
    return fail_thread("access to another thread's local variables", code);
  outside(p, bytes, write ? "write" : "read", code);
}

// The library's own sections: variables are __shared__ ones as far as kernels are concerned.
int find_sections(dl_phdr_info* info, size_t, void*) {
  bool mine = false;
  Range writable, constant;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
    const Range range{begin, begin + segment.p_memsz};
    if (segment.p_type == PT_GNU_RELRO) constant = range;
    if (segment.p_type != PT_LOAD) continue;
    if (segment.p_flags & PF_W) writable = range;
    mine = mine || range.holds(reinterpret_cast<const char*>(&statics));
  }
  if (mine) {
    const char* image = reinterpret_cast<const char*>(info->dlpi_addr);
    statics = {std::max(writable.begin, constant.end), writable.end};
    constants = {image, statics.begin};
  }
  return mine;
}

// --- Threads

void thread_main() {
  for (;;) {
    thread_body(thread_call);
    current->state = State::kDone;
    to_scheduler();
  }
}

void make_machine() {
  dl_iterate_phdr(find_sections, nullptr);
  static_shadow.resize(size_t(statics.end - statics.begin) / kCell + 1);
  dynamic_shadow.resize(kMaxShared / kCell);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kStacks, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return set_error("no memory for the threads' stacks");
  stacks = static_cast<char*>(memory);
  fibers = std::vector<Fiber>(kMaxThreads);
  for (size_t i = 0; i < kMaxThreads; ++i) {
    char* guard = stacks + i * (kStack + kGuard);
    mprotect(guard, kGuard, PROT_NONE);
    fibers[i].stack = guard + kGuard;
  }
}

void run(int index) {
  current = &fibers[size_t(index)];
  current_index = index;
  if (_setjmp(scheduler) == 0) {
    if (current->started) _longjmp(current->resume, 1);
    current->started = true;
    getcontext(&current->start);
    current->start.uc_stack.ss_sp = current->stack;
    current->start.uc_stack.ss_size = kStack;
    current->start.uc_link = nullptr;
    makecontext(&current->start, thread_main, 0);
    setcontext(&current->start);
  }
  current = nullptr;
}

void wait_as(State state, unsigned mask, const char* kind, const char* file, int line) {
  current->state = state;
  current->mask = mask;
  current->kind = kind;
  current->file = file;
  current->line = line;
  to_scheduler();
}

std::string whereabouts(const Fiber& fiber) {
  if (fiber.state == State::kDone) return "has returned";
  return std::string("is at ") + fiber.kind + " (" + at(fiber.file, fiber.line) + ")";
}

bool same_place(const Fiber& a, const Fiber& b) {
  if (a.state == State::kDone && b.state == State::kDone) return true;
  return a.state == b.state && a.line == b.line && a.mask == b.mask && !std::strcmp(a.kind, b.kind) &&
         !std::strcmp(a.file, b.file);
}

// Lets lanes that are all at one collective go on. False: nobody could.
bool release_collectives(int first, int lanes) {
  bool released = false;
  for (int i = 0; i < lanes; ++i) {
    const Fiber& leader = fibers[size_t(first + i)];
    if (leader.state != State::kAtCollective) continue;
    const unsigned all = lanes == 32 ? ~0u : (1u << lanes) - 1, mask = leader.mask & all;
    bool complete = true;
    for (int j = 0; j < lanes; ++j)
      if (mask >> j & 1u) complete = complete && same_place(fibers[size_t(first + j)], leader);
    if (!complete) continue;
    if (!std::strcmp(leader.kind, "__syncwarp")) ++warp_time[first / 32];
    for (int j = 0; j < lanes; ++j)
      if (mask >> j & 1u) {
        fibers[size_t(first + j)].state = State::kReady;
        fibers[size_t(first + j)].published ^= 1;
      }
    released = true;
  }
  return released;
}

void report_divergent_collective(int first, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    const Fiber& leader = fibers[size_t(first + i)];
    if (leader.state != State::kAtCollective) continue;
    for (int j = 0; j < lanes; ++j) {
      const Fiber& other = fibers[size_t(first + j)];
      if ((leader.mask >> j & 1u) && !same_place(leader, other))
        return fail_block("divergent warp collective: " + thread_name(unsigned(first + i)) + " " + whereabouts(leader) +
                          ", which waits for " + thread_name(unsigned(first + j)) + ", but that " + whereabouts(other));
    }
  }
}

void run_warp(int first, int lanes) {
  for (;;) {
    bool collective = false;
    for (int i = first; i < first + lanes; ++i) {
      if (fibers[size_t(i)].state == State::kReady) run(i);
      if (failed) return;
      collective = collective || fibers[size_t(i)].state == State::kAtCollective;
    }
    if (!collective) return;
    if (!release_collectives(first, lanes)) return report_divergent_collective(first, lanes);
  }
}

void run_block() {
  block_start = ++epoch;
  std::memset(warp_time, 0, sizeof warp_time);
  std::memset(dynamic_memory, 0xff, size_t(dynamic.end - dynamic.begin));  // NaN
  for (int i = 0; i < threads; ++i) fibers[size_t(i)].state = State::kReady;
  for (;;) {
    for (int first = 0; first < threads && !failed; first += 32) run_warp(first, std::min(32, threads - first));
    if (failed) return;
    const Fiber& leader = fibers[0];
    for (int i = 1; i < threads; ++i)
      if (!same_place(leader, fibers[size_t(i)]))
        return fail_block("divergent barrier: " + thread_name(0) + " " + whereabouts(leader) + ", but " +
                          thread_name(unsigned(i)) + " " + whereabouts(fibers[size_t(i)]));
    if (leader.state == State::kDone) return;
    ++epoch;
    for (int i = 0; i < threads; ++i) fibers[size_t(i)].state = State::kReady;
  }
}

}  // namespace

uint3 thread_index() {
  const unsigned i = unsigned(current_index);
  return {i % block.x, i / block.x % block.y, i / block.x / block.y};
}
uint3 block_index() { return block_at; }
dim3 block_dim() { return block; }
dim3 grid_dim() { return grid; }
void* dynamic_shared() { return dynamic_memory; }

void collective(unsigned mask, const void* mine, size_t bytes, const char* kind, const char* file, int line) {
  const int first = current_index & ~31, lanes = std::min(32, threads - first);
  const unsigned all = lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> (current_index & 31) & 1u))
    fail_thread(std::string(kind) + " (" + at(file, line) + ") with a mask that lacks the calling lane", nullptr);
  if (!std::strcmp(kind, "__syncwarp") && (mask & all) != all)
    fail_thread(std::string(kind) + " (" + at(file, line) + ") of a part of the warp, which is not modelled", nullptr);
  if (bytes) std::memcpy(current->brought[current->published ^ 1], mine, bytes);
  wait_as(State::kAtCollective, mask, kind, file, line);
}

bool lane_exists(int lane) { return (current_index & ~31) + lane < threads; }

void read_lane(int lane, void* value, size_t bytes) {
  if (lane < 0 || lane > 31 || !lane_exists(lane) || !(current->mask >> lane & 1u))
    fail_thread(std::string(current->kind) + " (" + at(current->file, current->line) + ") reads lane " +
                    std::to_string(lane) + ", which does not take part", nullptr);
  const Fiber& source = fibers[size_t((current_index & ~31) + lane)];
  std::memcpy(value, source.brought[source.published], bytes);
}

void barrier(const char* kind, const char* file, int line) { wait_as(State::kAtBarrier, 0, kind, file, line); }

const char* launch(const char* name, dim3 grid_, dim3 block_, size_t shared_bytes, void (*body)(const void*),
                   const void* call) {
  if (failed) return last_error();
  if (!stacks) make_machine();
  grid = grid_, block = block_, kernel_name = name, thread_body = body, thread_call = call;
  launched.insert(name);
  const unsigned long long count = 1ull * block.x * block.y * block.z;
  if (!count || count > kMaxThreads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > kMaxGrid[0] ||
      grid.y > kMaxGrid[1] || grid.z > kMaxGrid[2] || shared_bytes > kMaxShared) {
    char text[160];
    std::snprintf(text, sizeof text, ": invalid launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of shared memory",
                  grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    set_error("kernel " + std::string(name) + text);
    return last_error();
  }
  threads = int(count);
  dynamic = {dynamic_memory, dynamic_memory + shared_bytes};
  launch_start = epoch + 1;
  for (unsigned z = 0; z < grid.z && !failed; ++z)
    for (unsigned y = 0; y < grid.y && !failed; ++y)
      for (unsigned x = 0; x < grid.x && !failed; ++x) {
        block_at = {x, y, z};
        run_block();
      }
  if (failed) {
    if (failed_code) error += source_of(failed_code);
    failed_code = nullptr;
    for (Fiber& fiber : fibers) fiber.started = false;  // they are in the middle of something
  }
  return last_error();
}

}  // namespace simt

// --- For the tests (simt.py)

extern "C" void simt_register(const char* name, void* address, size_t bytes, int writable) {
  char* begin = static_cast<char*>(address);
  simt::buffers.push_back({name, begin, begin + bytes, writable != 0, {}});
  if (writable) simt::buffers.back().shadow.resize(bytes / simt::kCell + 1);
}

// Forgets the buffers and the error.
extern "C" void simt_reset() {
  simt::buffers.clear();
  simt::failed = false;
}

extern "C" const char* simt_error() { return simt::last_error(); }

// The kernels that were launched since the library was loaded, one a line.
extern "C" const char* simt_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : simt::launched) names += name + "\n";
  return names.c_str();
}

// --- What the compiler's instrumentation calls

#define SIMT_HOOK(name, ...) extern "C" void name(__VA_ARGS__)
#define SIMT_HERE __builtin_return_address(0)

#define SIMT_ACCESSES(bytes)                                                                                      \
  SIMT_HOOK(__tsan_read##bytes, void* p) { simt::access(p, bytes, false, SIMT_HERE); }                            \
  SIMT_HOOK(__tsan_write##bytes, void* p) { simt::access(p, bytes, true, SIMT_HERE); }                            \
  SIMT_HOOK(__tsan_unaligned_read##bytes, void* p) { simt::access(p, bytes, false, SIMT_HERE); }                  \
  SIMT_HOOK(__tsan_unaligned_write##bytes, void* p) { simt::access(p, bytes, true, SIMT_HERE); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
SIMT_HOOK(__tsan_read_range, void* p, size_t bytes) { if (bytes) simt::access(p, bytes, false, SIMT_HERE); }
SIMT_HOOK(__tsan_write_range, void* p, size_t bytes) { if (bytes) simt::access(p, bytes, true, SIMT_HERE); }
SIMT_HOOK(__tsan_init) {}
SIMT_HOOK(__tsan_func_entry, void*) {}
SIMT_HOOK(__tsan_func_exit) {}
SIMT_HOOK(__tsan_vptr_update, void*, void*) {}
SIMT_HOOK(__tsan_vptr_read, void*) {}

// -fsanitize=undefined: each gets a description that begins with the place.
struct SimtPlace {
  const char* file;
  uint32_t line, column;
};
#define SIMT_UNDEFINED(name, what, ...)                                                                           \
  SIMT_HOOK(__ubsan_handle_##name, const SimtPlace* place, ##__VA_ARGS__) {                                       \
    simt::fail_thread(std::string(what) + " at " + simt::at(place->file, int(place->line)), nullptr);             \
  }
SIMT_UNDEFINED(out_of_bounds, "index outside the declared array", size_t)
SIMT_UNDEFINED(type_mismatch_v1, "misaligned or null address", size_t)
SIMT_UNDEFINED(shift_out_of_bounds, "shift by too many bits", size_t, size_t)
SIMT_UNDEFINED(add_overflow, "integer overflow", size_t, size_t)
SIMT_UNDEFINED(sub_overflow, "integer overflow", size_t, size_t)
SIMT_UNDEFINED(mul_overflow, "integer overflow", size_t, size_t)
SIMT_UNDEFINED(negate_overflow, "integer overflow", size_t)
SIMT_UNDEFINED(divrem_overflow, "division by zero", size_t, size_t)
SIMT_UNDEFINED(float_cast_overflow, "number does not fit the integer", size_t)
