// Times or checks every plan that the planner could choose, for a table of ops, on the current GPU: the kernels alone,
// without torch. Times are of CUDA events, with L2 flushed in between, as CSV on stdout. `--check` compares results
// with those in two phases and with the definitions in double, and names the plans that are wrong or never end.
//
// Build and run:
//   nvcc -std=c++20 -O3 -arch=native -Icsrc bench/plans.cu csrc/cuda/*.cu csrc/cuda/kernels/*.cu -o plans
//   ./plans --seconds 100 > plans.csv
//   ./plans --check
//   ./plans --shape 128,256,784 --dtype bfloat16 --epilogue none --planned --once --in-process    for a profiler
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "plans/cases.h"
#include "plans/runner.cuh"
#include "plans/supervisor.h"

namespace fastbn::bench {
namespace {

struct Options {
  bool check = false, planned = false, once = false, in_process = false;
  std::string shape, dtype, direction, epilogue;  // of the ops to run; empty: all. A shape may be a prefix
  int64_t begin = 0;                              // the first plan to run, to go on with a table that was cut
  int64_t every = 1;                              // one of each `every` plans runs, another one of each op
  double seconds = 1e9;                           // after which no plan begins
  double plan_seconds = 5;                        // after which a plan counts as one that never ends
};

constexpr const char* usage =
    "plans [--check] [--shape OUTER,CHANNELS,INNER] [--dtype NAME] [--direction NAME] [--epilogue NAME] [--planned]\n"
    "      [--once] [--in-process] [--begin PLAN] [--every N] [--seconds S] [--plan-seconds S]\n";

Options parse(int argc, char** argv) {
  Options options;
  const auto fail = [&](const char* word) {
    std::fprintf(stderr, "%s: unknown, or its value is missing\n%s", word, usage);
    std::exit(2);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> const char* {
      if (i + 1 == argc) fail(argv[i]);
      return argv[++i];
    };
    if (word == "--check")
      options.check = true;
    else if (word == "--planned")
      options.planned = true;
    else if (word == "--once")
      options.once = true;
    else if (word == "--in-process")
      options.in_process = true;
    else if (word == "--shape")
      options.shape = value();
    else if (word == "--dtype")
      options.dtype = value();
    else if (word == "--direction")
      options.direction = value();
    else if (word == "--epilogue")
      options.epilogue = value();
    else if (word == "--begin")
      options.begin = std::atoll(value());
    else if (word == "--every")
      options.every = std::max(std::atoll(value()), 1ll);
    else if (word == "--seconds")
      options.seconds = std::atof(value());
    else if (word == "--plan-seconds")
      options.plan_seconds = std::atof(value());
    else
      fail(argv[i]);
  }
  return options;
}

std::vector<Op> ops_of(const Options& options) {
  std::vector<Op> ops;
  for (const Op& op : options.check ? checked_ops() : measured_ops()) {
    const auto is = [](const std::string& wanted, const std::string& name) { return wanted.empty() || wanted == name; };
    if (op.shape().starts_with(options.shape) && is(options.dtype, dtype_names[static_cast<int>(op.dtype)]) &&
        is(options.direction, op.backward() ? "backward" : "forward") &&
        is(options.epilogue, epilogue_names[op.epilogue])) {
      ops.push_back(op);
    }
  }
  return ops;
}

DeviceLimits limits_here() {
#ifdef __CUDACC__
  DeviceLimits limits{"cuda", 0, 0, 0};
  FASTBN_CHECK(cuda::device_limits(0, &limits));
  return limits;
#else  // the emulator: few blocks, and little to flush
  DeviceLimits limits = known_devices[2];
  limits.sm_count = 4;
  limits.l2_bytes = 1 << 10;
  return limits;
#endif
}

bool is_same(const Plan& a, const Plan& b) { return columns_of(a) == columns_of(b); }

double predicted_us(const Op& op, const DeviceLimits& limits, const Plan& plan) {
  return plan.schedule == Schedule::stream ? predicted_stream_us(op.request(), limits, plan)
                                           : predicted_two_phase_us(op.request(), limits, plan);
}

// Runs the plans of ops from a given number on.
class Worker {
 public:
  Worker(const Options& options, std::vector<Op> ops, Clock::time_point start)
      : options_(options), ops_(std::move(ops)), start_(start) {}

  void operator()(int64_t begin, Progress& progress) {
    limits_ = limits_here();
    int64_t index = 0, number = 0;
    for (const Op& op : ops_) {
      turn_ = number++ % options_.every;
      std::vector<Plan> plans = plans_of(op, limits_);
      const Plan two_phase = plans[0], chosen = choose_plan(op.request(), limits_);
      if (options_.planned) plans = {chosen};
      const int64_t first = index;
      index += int64_t(plans.size());
      if (index <= begin) continue;
      if (seconds_since(start_) > options_.seconds) break;
      switch (op.dtype) {
        case DType::float32: run(floats_, op, plans, two_phase, chosen, first, begin, progress); break;
        case DType::bfloat16: run(bfloats_, op, plans, two_phase, chosen, first, begin, progress); break;
        case DType::float16: run(halves_, op, plans, two_phase, chosen, first, begin, progress); break;
        case DType::float64: std::abort();
      }
      if (progress.out_of_time) break;
    }
    if (seconds_since(start_) > options_.seconds) progress.out_of_time = true;
  }

 private:
  template <class T>
  void run(std::unique_ptr<Runner<T>>& runner, const Op& op, const std::vector<Plan>& plans, const Plan& two_phase,
           const Plan& chosen, int64_t first, int64_t begin, Progress& progress) {
    if (!runner) {
      int64_t numel = 0, channels = 0;
      for (const Op& other : ops_) {
        if (other.dtype != op.dtype) continue;
        numel = std::max(numel, other.layout.numel());
        channels = std::max(channels, other.layout.channels);
      }
      runner = std::make_unique<Runner<T>>(limits_, numel, channels);
      runner->wait();
    }
    bool is_set = false;
    double copy_us = 0;
    for (int64_t i = std::max<int64_t>(begin - first, 0); i < int64_t(plans.size()); ++i) {
      if (seconds_since(start_) > options_.seconds) {
        progress.out_of_time = true;
        return;
      }
      if (i % options_.every != turn_) continue;
      const Plan& plan = plans[i];
      const std::string columns = op.name() + "," + columns_of(plan) + "," + std::to_string(is_same(plan, chosen));
      progress.begin(first + i, columns);
      if (!is_set) {
        runner->set(op, two_phase);
        if (!options_.check && !options_.once) copy_us = runner->copy_us(op.layout);
        is_set = true;
      }
      if (!runner->fits(plan)) continue;
      if (options_.once) {
        FASTBN_CHECK(runner->run(plan));
        runner->wait();
        std::puts(columns.c_str());
      } else if (options_.check) {
        check(*runner, plan, columns, progress);
      } else {
        const int64_t wrong = runner->compare_once(plan);
        ++(wrong ? progress.wrong : progress.right);
        const auto [us, min_us] = runner->time([&] { return runner->run(plan); });
        std::printf("%s,%.2f,%.2f,%lld,%.2f,%.2f\n", columns.c_str(), us, min_us, static_cast<long long>(wrong),
                    copy_us, predicted_us(op, limits_, plan));
      }
      std::fflush(stdout);
    }
  }

  template <class T>
  void check(Runner<T>& runner, const Plan& plan, const std::string& columns, Progress& progress) {
    const Mistakes mistakes = runner.check(plan);
    ++(mistakes.total() ? progress.wrong : progress.right);
    if (mistakes.total() == 0) return;
    const auto number = [](int64_t count) { return static_cast<long long>(count); };
    std::printf("%s,%lld,%lld,%lld,%lld\n", columns.c_str(), number(mistakes.two_phase), number(mistakes.reference),
                number(mistakes.channels), number(mistakes.unstable));
  }

  const Options& options_;
  const std::vector<Op> ops_;
  const Clock::time_point start_;
  int64_t turn_ = 0;  // of the plans of an op
  DeviceLimits limits_{"", 0, 0, 0};
  std::unique_ptr<Runner<float>> floats_;
  std::unique_ptr<Runner<bfloat16>> bfloats_;
  std::unique_ptr<Runner<float16>> halves_;
};

int run(const Options& options) {
  const std::vector<Op> ops = ops_of(options);
  if (ops.empty()) {
    std::fputs("no op is as the arguments say\n", stderr);
    return 2;
  }
  Progress& progress = shared_progress();
  Worker worker(options, ops, Clock::now());
  std::printf("outer,channels,inner,dtype,direction,epilogue,%s,planned%s\n", plan_columns,
              options.once ? ""
              : options.check
                  ? ",differs_from_two_phase,differs_from_reference,wrong_channel_values,differs_in_second_run"
                  : ",us,min_us,wrong,copy_us,predicted_us");
  bool complete = true;
  if (options.in_process) {
    worker(options.begin, progress);
  } else {
    complete = supervise(options.begin, options.plan_seconds, progress, std::ref(worker),
                         [&](const Progress& at, const char* what) {
                           const char* rest = options.check ? "%s,%s,,,\n" : "%s,nan,nan,%s,nan,nan\n";
                           std::printf(rest, at.name, what);
                         });
  }
  const auto number = [](const std::atomic<int64_t>& count) { return static_cast<long long>(count); };
  std::fflush(stdout);
  std::fprintf(stderr, "%lld plans are right, %lld wrong, %lld failed, %lld hung%s%s\n", number(progress.right),
               number(progress.wrong), number(progress.failed), number(progress.hung),
               progress.out_of_time ? "; out of time after plan " : "",
               progress.out_of_time ? std::to_string(progress.plan).c_str() : "");
  return complete && progress.wrong + progress.failed + progress.hung == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastbn::bench

int main(int argc, char** argv) { return fastbn::bench::run(fastbn::bench::parse(argc, argv)); }
