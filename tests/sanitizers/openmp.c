// Tells ThreadSanitizer how OpenMP's threads begin and end: preloaded into the processes of `make tsan`.
//
// PyTorch splits work among threads by libgomp, which is not compiled with the sanitizer and waits by system calls of
// its own. So the sanitizer does not see that a parallel region begins after what stood before it and ends before what
// follows, and takes all that the parts hand over for races. Hiding reports from libgomp or PyTorch (suppressions)
// would hide true races in our parts with them, as PyTorch is on the stack of each. Here is just what OpenMP promises,
// as LLVM's Archer says it too: whatever stood before a region happens before all of it, and the whole region before
// what follows. Nothing is said of two parts of one region, nor of the awake teams of csrc/cpu/threads.cpp: those
// synchronise by atomics, which the sanitizer sees for itself.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

void __tsan_acquire(void* address);
void __tsan_release(void* address);

struct region {
  void (*function)(void*);
  void* data;
  char begin, end;  // their addresses stand for the two moments
};

static void run(void* of_region) {
  struct region* const own = of_region;
  __tsan_acquire(&own->begin);
  own->function(own->data);
  __tsan_release(&own->end);
}

typedef void parallel(void (*)(void*), void*, unsigned, unsigned);

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  static parallel* theirs;
  parallel* real = __atomic_load_n(&theirs, __ATOMIC_ACQUIRE);
  if (!real) {
    void* const library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    real = library ? (parallel*)dlsym(library, "GOMP_parallel") : NULL;
    if (!real) {
      fprintf(stderr, "tests/sanitizers/openmp.c: no libgomp.so.1: %s\n", dlerror());
      abort();
    }
    __atomic_store_n(&theirs, real, __ATOMIC_RELEASE);
  }
  struct region own = {function, data, 0, 0};
  __tsan_release(&own.begin);
  real(run, &own, threads, flags);
  __tsan_acquire(&own.end);
}
