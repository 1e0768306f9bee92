// Times every plan that the planner could choose, for a table of shapes, on the current GPU: the kernels alone, without
// torch, by CUDA events with L2 flushed in between. CSV on stdout; bench/results/h200-plans.csv is such a run.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "plan/planner.h"

namespace fastbn::bench {

#define FASTBN_CHECK(call)                                                                   \
  do {                                                                                       \
    if (const cudaError_t error = call; error != cudaSuccess) {                              \
      std::fprintf(stderr, "line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (false)

constexpr int samples = 7;

enum Epilogue { none, relu, add_relu };
constexpr const char* epilogue_names[] = {"none", "relu", "add_relu"};

// Returns contiguous and channels_last activations of ResNet-50 and MobileNetV3, some of other networks, some of few
// channels, and some so small that the launch takes most of the time.
std::vector<Layout> make_layouts() {
  std::vector<Layout> layouts;
  const auto add = [&](int64_t n, int64_t channels, int64_t space) {
    layouts.push_back({n, channels, space});
    if (space > 1) layouts.push_back({n * space, channels, 1});
  };
  const int resnet50[][2] = {{64, 112}, {64, 56},  {128, 56}, {256, 56},  {128, 28}, {256, 28},
                             {512, 28}, {256, 14}, {512, 14}, {1024, 14}, {512, 7},  {2048, 7}};
  const int mobilenetv3[][2] = {{16, 112}, {72, 56}, {40, 28}, {184, 14}, {480, 14}, {672, 7}, {960, 7}};
  for (int n : {32, 128, 256})
    for (auto [channels, size] : resnet50) add(n, channels, size * size);
  for (auto [channels, size] : mobilenetv3) add(128, channels, size * size);
  const int64_t others[][3] = {
      {128, 3, 224 * 224}, {64, 1, 512 * 512}, {16, 8, 512 * 512}, {16, 64, 512 * 512}, {16, 32, 16 * 56 * 56},
      {64, 256, 1024},     {4096, 512, 1},     {1000000, 64, 1},   {2, 64, 49},         {8, 16, 196},
      {32, 128, 1},        {3, 5, 16},         {29, 13, 1},        {70, 24, 49}};
  for (auto [n, channels, space] : others) add(n, channels, space);
  return layouts;
}

// Returns two-phase plans with several numbers of blocks.
std::vector<Plan> make_plans(const Request& given, const DeviceLimits& limits) {
  Request request = given;
  if (request.direction == Direction::forward) {  // as in choose_plan
    request.residual = false;
    request.masked = request.masked && request.layout.run() % vec_size != 0;
  }
  std::vector<Plan> plans;
  Plan walk = choose_walk(request);
  walk.groups = walk.tiles = std::max(walk.tiles, 1);
  const int64_t max_splits = max_splits_of(request.layout, walk);
  for (int blocks : {4, 8, 16}) {
    Plan plan = walk;
    plan.set_splits(request.layout,
                    static_cast<int>(std::clamp<int64_t>(limits.sm_count * blocks / plan.tiles, 1, max_splits)));
    plan.last_splits = plan.splits;
    add_shared_bytes(request, plan);
    add_traffic(given, plan);
    plans.push_back(plan);
  }
  return plans;
}

__global__ void read_all(const int4* from, int64_t count, int* sink) {
  int seen = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int4 words = __ldcg(from + i);
    seen ^= words.x ^ words.y ^ words.z ^ words.w;
  }
  if (seen == 0x12345) *sink = seen;
}

// Fills a tensor with roughly normal numbers, by a hash of the index.
template <class T>
__global__ void fill(T* to, int64_t count, uint64_t seed, float mean) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t bits = (i + seed) * 0x9E3779B97F4A7C15ull;
    bits = (bits ^ bits >> 29) * 0xBF58476D1CE4E5B9ull;
    bits ^= bits >> 32;
    float value = mean;
    for (int k = 0; k < 4; ++k) value += float(bits >> 16 * k & 0xffff) / 65536 - 0.5f;
    to[i] = from_acc<T>(value * 1.7f);
  }
}

// Counts elements that differ by more than the rounding of T and of the statistics.
template <class T>
__global__ void compare(const T* a, const T* b, int64_t count, unsigned long long* wrong) {
  constexpr float tolerance = sizeof(T) == 2 ? 1 / 64.0f : 1e-5f;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const float x = to_acc(a[i]), y = to_acc(b[i]);
    if (!(fabsf(x - y) <= tolerance * (fabsf(y) + 0.1f))) atomicAdd(wrong, 1ull);
  }
}

class Bench {
 public:
  Bench() {
    FASTBN_CHECK(cuda::device_limits(0, &limits_));
    for (void** tensor : {&input_, &residual_, &grad_out_, &result_, &expected_, &grad_residual_})
      FASTBN_CHECK(cudaMalloc(tensor, tensor_bytes));
    FASTBN_CHECK(cudaMalloc(&mask_, tensor_bytes / 8));
    FASTBN_CHECK(cudaMalloc(&vectors_, 8 * max_channels * sizeof(double)));
    FASTBN_CHECK(cudaMalloc(&workspace_, workspace_bytes));
    FASTBN_CHECK(cudaMalloc(&flush_, flush_bytes));
    FASTBN_CHECK(cudaMemset(flush_, 0, flush_bytes));
    FASTBN_CHECK(cudaMalloc(&counter_, sizeof *counter_));
    FASTBN_CHECK(cudaStreamCreate(&stream_));
    for (int i = 0; i < samples; ++i) {
      FASTBN_CHECK(cudaEventCreate(&begin_[i]));
      FASTBN_CHECK(cudaEventCreate(&end_[i]));
    }
  }

  template <class T>
  void run(DType dtype, const char* dtype_name, const std::string& wanted) {
    int64_t seed = 0;
    for (void* tensor : {input_, residual_, grad_out_})
      fill<<<1024, 256, 0, stream_>>>(static_cast<T*>(tensor), tensor_bytes / int64_t(sizeof(T)), seed += 1 << 20,
                                      0.3f);
    for (const Layout& layout : make_layouts()) {
      char name[100];
      std::snprintf(name, sizeof name, "%lld,%lld,%lld", static_cast<long long>(layout.outer),
                    static_cast<long long>(layout.channels), static_cast<long long>(layout.inner));
      if (std::string(name).rfind(wanted, 0) != 0) continue;
      const double copy_us =
          time([&] {
            return cudaMemcpyAsync(result_, input_, layout.numel() * sizeof(T), cudaMemcpyDeviceToDevice, stream_);
          }).first;
      for (Direction direction : {Direction::forward, Direction::backward})
        for (Epilogue epilogue : {none, relu, add_relu}) {
          const std::string prefix = std::string(name) + "," + dtype_name + "," +
                                     (direction == Direction::forward ? "forward" : "backward") + "," +
                                     epilogue_names[epilogue];
          run_plans<T>(layout, dtype, direction, epilogue, prefix, copy_us);
        }
    }
  }

 private:
  template <class T>
  void run_plans(const Layout& layout, DType dtype, Direction direction, Epilogue epilogue, const std::string& prefix,
                 double copy_us) {
    const bool backward = direction == Direction::backward,
               masked = epilogue == add_relu && layout.run() % vec_size == 0;
    Request request{layout, dtype, direction};
    request.activation = epilogue == none ? Activation::none : Activation::relu;
    request.masked = masked;
    request.residual = epilogue == add_relu && (!backward || !masked);

    std::vector<double> values(8 * layout.channels, 1);
    FASTBN_CHECK(cudaMemcpy(vectors_, values.data(), values.size() * sizeof(double), cudaMemcpyHostToDevice));
    const auto vector = [&](int i) { return vectors_ + i * layout.channels; };
    const auto channel_vector = [&](int i) { return ChannelVector{vector(i), DType::float64}; };
    ForwardParams forward;
    forward.layout = layout;
    forward.dtype = dtype;
    forward.activation = request.activation;
    forward.input = input_;
    forward.residual = epilogue == add_relu ? residual_ : nullptr;
    forward.mask = masked ? mask_ : nullptr;
    forward.mean = vector(0);
    forward.inv_std = vector(1);
    forward.weight = channel_vector(2);
    forward.bias = channel_vector(3);
    forward.running_mean = channel_vector(4);
    forward.running_var = channel_vector(5);
    forward.momentum = 0.1;
    forward.eps = 1e-5;
    BackwardParams params;
    params.layout = layout;
    params.dtype = dtype;
    params.activation = request.activation;
    params.grad_out = grad_out_;
    params.input = input_;
    params.residual = epilogue == add_relu && !masked ? residual_ : nullptr;
    params.mask = forward.mask;
    params.weight = forward.weight;
    params.bias = forward.bias;
    params.mean = forward.mean;
    params.inv_std = forward.inv_std;
    params.grad_residual = epilogue == add_relu ? grad_residual_ : nullptr;
    params.grad_weight = channel_vector(6);
    params.grad_bias = channel_vector(7);
    const auto run = [&](const Plan& plan, void* to) {
      forward.output = params.grad_input = to;
      return backward ? cuda::backward(params, plan, workspace_, stream_)
                      : cuda::forward(forward, plan, workspace_, stream_);
    };

    const std::vector<Plan> plans = make_plans(request, limits_);
    if (backward) {  // its statistics and mask
      Request first = request;
      first.direction = Direction::forward;
      forward.output = result_;
      FASTBN_CHECK(cuda::forward(forward, make_plans(first, limits_)[0], workspace_, stream_));
    }
    FASTBN_CHECK(run(plans[0], expected_));  // in two phases
    for (const Plan& plan : plans) {
      if (cuda::workspace_bytes(plan, params) > workspace_bytes) continue;
      FASTBN_CHECK(cudaMemsetAsync(result_, 0xff, layout.numel() * sizeof(T), stream_));
      FASTBN_CHECK(cudaMemsetAsync(counter_, 0, sizeof *counter_, stream_));
      FASTBN_CHECK(run(plan, result_));
      compare<<<1024, 256, 0, stream_>>>(static_cast<T*>(result_), static_cast<T*>(expected_), layout.numel(),
                                         counter_);
      unsigned long long wrong = 0;
      FASTBN_CHECK(cudaMemcpyAsync(&wrong, counter_, sizeof wrong, cudaMemcpyDeviceToHost, stream_));
      const auto [us, min_us] = time([&] { return run(plan, result_); });
      const char* schedules[] = {"two_phase"};
      std::printf("%s,%s,%s,%d,%d,%d,%d,%d,%.2f,%.2f,%llu,%.2f\n", prefix.c_str(),
                  schedules[static_cast<int>(plan.schedule)],
                  plan.kernel == Kernel::row_tiles ? "row_tiles" : "channel_tiles", plan.fold, plan.vectors_per_row,
                  plan.channels_per_tile, plan.groups, plan.splits, us, min_us, wrong, copy_us);
    }
    std::fflush(stdout);
  }

  // Returns the median and the minimum time, in microseconds.
  template <class Run>
  std::pair<double, double> time(Run run) {
    for (int i = 0; i < samples; ++i) {
      read_all<<<528, 512, 0, stream_>>>(static_cast<int4*>(flush_), flush_bytes / 16, static_cast<int*>(flush_));
      FASTBN_CHECK(cudaEventRecord(begin_[i], stream_));
      FASTBN_CHECK(run());
      FASTBN_CHECK(cudaEventRecord(end_[i], stream_));
    }
    FASTBN_CHECK(cudaStreamSynchronize(stream_));
    float ms[samples];
    for (int i = 0; i < samples; ++i) FASTBN_CHECK(cudaEventElapsedTime(ms + i, begin_[i], end_[i]));
    std::sort(ms, ms + samples);
    return {1e3 * ms[samples / 2], 1e3 * ms[0]};
  }

  static constexpr int64_t tensor_bytes = int64_t(16) * 64 * 512 * 512 * 4, workspace_bytes = int64_t(256) << 20;
  static constexpr int64_t flush_bytes = int64_t(160) << 20, max_channels = 4096;
  DeviceLimits limits_{"cuda", 0, 0, 0};
  void *input_, *residual_, *grad_out_, *result_, *expected_, *grad_residual_, *workspace_, *flush_;
  uint8_t* mask_;
  double* vectors_;
  unsigned long long* counter_;
  cudaStream_t stream_;
  cudaEvent_t begin_[samples], end_[samples];
};

}  // namespace fastbn::bench

// Build and run:
//   nvcc -std=c++20 -O3 -arch=native -Icsrc bench/plans.cu csrc/cuda/*.cu csrc/cuda/kernels/*.cu -o plans
//   ./plans > plans.csv
//   ./plans 128,64,    only shapes whose "outer,channels,inner" starts with the argument, for a profiler
int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  fastbn::bench::Bench bench;
  std::puts(
      "outer,channels,inner,dtype,direction,epilogue,schedule,kernel,fold,vectors_per_row,channels_per_tile,groups,"
      "splits,us,min_us,wrong,copy_us");
  bench.run<fastbn::bfloat16>(fastbn::DType::bfloat16, "bfloat16", wanted);
  bench.run<float>(fastbn::DType::float32, "float32", wanted);
}
