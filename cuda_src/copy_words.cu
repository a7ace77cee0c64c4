// copy_words.cu: dst[i] = src[i], where one of them may lie in pinned host memory
//
// For the few bytes that go up before a step and come down after it: the copy engine takes 4 us longer for both of them,
// as it and the multiprocessors wait for each other by turns (an H200).
//
// Work:    one thread a word, so that all that cross the bus are under way together.
// Bound:   latency of the bus.
// grid (ceil(count / kNumThreads)), block (kNumThreads)
struct Words {  // WORDS in kernels/copy_words.py
  unsigned* dst;        // [count], apart from src
  const unsigned* src;  // [count]
  long long count;
};

template <int kNumThreads>  // threads per block
__global__ void __launch_bounds__(kNumThreads)
copy_words(Words words) {
  const int i = blockIdx.x * kNumThreads + threadIdx.x;
  if (i < words.count) words.dst[i] = words.src[i];
}
