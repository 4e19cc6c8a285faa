// What this machine can do at best: reading, streaming writes, and multiply-adds. Compiled at run time by
// with_machine.py (cc -O3 -march=native -pthread -shared). Each function returns nanoseconds of one pass of
// `threads` threads that start together, from the first start to the last end.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 12")
#endif
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float floats __attribute__((vector_size(WIDTH)));
typedef int64_t words __attribute__((vector_size(WIDTH)));

enum { MAX_THREADS = 256, CHAINS = 12 };  // independent chains, enough to hide the latency of a multiply-add

struct job {
  int id, threads;
  char *memory;
  int64_t bytes;  // of this thread's part, or multiply-add rounds
  int64_t begin, end;
};

static volatile int waiting;
static volatile uint64_t sink;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void meet(struct job *job) {
  __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
  while (waiting < job->threads) {
  }
  job->begin = now();
}

static void *read_part(void *argument) {
  struct job *job = argument;
  meet(job);
  words a = {0}, b = a, c = a, d = a;
  const words *w = (const words *)job->memory;
  for (int64_t i = 0; i + 4 <= job->bytes / WIDTH; i += 4) {
    a ^= w[i], b ^= w[i + 1], c ^= w[i + 2], d ^= w[i + 3];
  }
  a ^= b ^ c ^ d;
  sink += (uint64_t)a[0];
  job->end = now();
  return 0;
}

static void *write_part(void *argument) {
  struct job *job = argument;
  meet(job);
  words *w = (words *)job->memory, value = {1};
  for (int64_t i = 0; i < job->bytes / WIDTH; i++) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)(w + i), (__m512i)value);
#elif defined(__AVX__)
    _mm256_stream_si256((__m256i *)(w + i), (__m256i)value);
#else
    w[i] = value;
#endif
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
  job->end = now();
  return 0;
}

static void *multiply_fp32(void *argument) {
  struct job *job = argument;
  floats sum[CHAINS], x, y;
  memset(sum, 0, sizeof sum);
  for (int i = 0; i < WIDTH / 4; i++) x[i] = 1.0f, y[i] = 1e-9f;
  meet(job);
  for (int64_t r = 0; r < job->bytes; r++) {
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] += x * y;
  }
  job->end = now();
  for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];
  sink += (uint64_t)sum[0][0];
  return 0;
}

#if defined(__AVX512BF16__)
#define BF16_OPS 64
static void *multiply_bf16(void *argument) {
  struct job *job = argument;
  __m512 sum[CHAINS];
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3300);
  for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_ps();
  meet(job);
  for (int64_t r = 0; r < job->bytes; r++) {
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
  }
  job->end = now();
  for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  sink += (uint64_t)_mm512_reduce_add_ps(sum[0]);
  return 0;
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BF16_OPS 32
static void *multiply_bf16(void *argument) {
  struct job *job = argument;
  float32x4_t sum[CHAINS];
  bfloat16x8_t x = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f80)), y = vreinterpretq_bf16_u16(vdupq_n_u16(0x3300));
  for (int i = 0; i < CHAINS; i++) sum[i] = vdupq_n_f32(0);
  meet(job);
  for (int64_t r = 0; r < job->bytes; r++) {
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = vbfmmlaq_f32(sum[i], x, y);
  }
  job->end = now();
  for (int i = 1; i < CHAINS; i++) sum[0] = vaddq_f32(sum[0], sum[i]);
  sink += (uint64_t)vaddvq_f32(sum[0]);
  return 0;
}
#else
#define BF16_OPS 0
#define multiply_bf16 multiply_fp32
#endif

#if defined(__AVX512VNNI__)
#define INT8_OPS 128
#define INTS __m512i
#define INTS_OF(n) _mm512_set1_epi32(n)
#define DOT(sum, x, y) _mm512_dpbusd_epi32(sum, x, y)
#define ADD(a, b) _mm512_add_epi32(a, b)
#elif defined(__AVXVNNI__)
#define INT8_OPS 64
#define INTS __m256i
#define INTS_OF(n) _mm256_set1_epi32(n)
#define DOT(sum, x, y) _mm256_dpbusd_avx_epi32(sum, x, y)
#define ADD(a, b) _mm256_add_epi32(a, b)
#elif defined(__AVX2__)
// No product of bytes into 32 bits: the exact way is by 16-bit lanes, 16 products an instruction.
#define INT8_OPS 32
#define INTS __m256i
#define INTS_OF(n) _mm256_set1_epi32(n)
#define DOT(sum, x, y) _mm256_add_epi32(sum, _mm256_madd_epi16(x, sum))
#define ADD(a, b) _mm256_add_epi32(a, b)
#elif defined(__ARM_FEATURE_DOTPROD)
#define INT8_OPS 32
#define INTS int32x4_t
#define INTS_OF(n) vdupq_n_s32(n)
#define DOT(sum, x, y) vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y))
#define ADD(a, b) vaddq_s32(a, b)
#endif
#if defined(INT8_OPS)
static void *multiply_int8(void *argument) {
  struct job *job = argument;
  INTS sum[CHAINS], x = INTS_OF(0x01010101), y = INTS_OF(0x02010201);
  for (int i = 0; i < CHAINS; i++) sum[i] = INTS_OF(i);
  meet(job);
  for (int64_t r = 0; r < job->bytes; r++) {
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = DOT(sum[i], x, y);
  }
  job->end = now();
  for (int i = 1; i < CHAINS; i++) sum[0] = ADD(sum[0], sum[i]);
  int32_t first;
  memcpy(&first, &sum[0], 4);
  sink += (uint64_t)first;
  return 0;
}
#else
#define INT8_OPS 0
#define multiply_int8 multiply_fp32
#endif

// Operations (a multiply-add is two) of one round of a chain, all lanes; 0: this machine has no such instruction.
int64_t operations(int kind) {
  const int64_t each[] = {WIDTH / 4 * 2, BF16_OPS, INT8_OPS};
  return each[kind] * CHAINS;
}

// A buffer of `bytes` zeroed bytes, in 2 MiB pages where asked for and possible. Never freed.
char *buffer(int64_t bytes, int huge) {
  const int64_t page = 2 << 20;
  char *memory = mmap(0, (size_t)(bytes + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  memory = (char *)(((uintptr_t)memory + page - 1) / page * page);
#if defined(MADV_HUGEPAGE)
  madvise(memory, (size_t)bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  memset(memory, 1, (size_t)bytes);
  return memory;
}

// kind: 0 fp32, 1 bf16, 2 int8, 3 read, 4 write. `amount`: bytes of `memory`, or rounds of each thread.
int64_t pass(int kind, char *memory, int64_t amount, int threads) {
  static void *(*const work[])(void *) = {multiply_fp32, multiply_bf16, multiply_int8, read_part, write_part};
  struct job jobs[MAX_THREADS];
  pthread_t started[MAX_THREADS];
  if (threads < 1 || threads > MAX_THREADS || kind < 0 || kind > 4) return -1;
  int64_t part = kind < 3 ? amount : amount / threads / 4096 * 4096;
  waiting = 0;
  for (int i = 0; i < threads; i++) {
    jobs[i] = (struct job){i, threads, kind < 3 ? 0 : memory + i * part, part, 0, 0};
    if (i && pthread_create(&started[i], 0, work[kind], &jobs[i])) return -1;
  }
  work[kind](&jobs[0]);
  int64_t begin = jobs[0].begin, end = jobs[0].end;
  for (int i = 1; i < threads; i++) {
    pthread_join(started[i], 0);
    if (jobs[i].begin < begin) begin = jobs[i].begin;
    if (jobs[i].end > end) end = jobs[i].end;
  }
  return end - begin;
}
