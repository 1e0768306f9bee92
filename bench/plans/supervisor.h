// Runs work on a GPU in a child process, and where the child hangs or dies starts another one behind the plan that did
// it: a kernel that never ends can only be stopped with its process. The parent must not touch CUDA.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace fastbn::bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What the child tells the parent, in memory that both see.
struct Progress {
  std::atomic<int64_t> plan{-1};  // the number of the plan that is running
  std::atomic<int64_t> beats{0};  // counts up with every plan
  std::atomic<int64_t> right{0}, wrong{0}, failed{0}, hung{0};
  std::atomic<bool> out_of_time{false};
  char name[400] = "";  // the columns of that plan

  void begin(int64_t index, const std::string& columns) {
    std::snprintf(name, sizeof name, "%s", columns.c_str());
    plan = index;
    ++beats;
  }
};

// Calls work(begin, progress) in child processes, with the number of the first plan to run, until it returns: at first
// `begin`, then the number after that of a plan that took over `plan_seconds`, or whose process died. For these calls
// report(progress, "hang" or "failure"). Returns whether a child got to the end.
template <class Work, class Report>
bool supervise(int64_t begin, double plan_seconds, Progress& progress, Work work, Report report) {
  constexpr double start_seconds = 60;  // until a process has a context and memory
  for (;;) {
    progress.plan = -1;
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      work(begin, progress);
      std::fflush(nullptr);
      _exit(0);
    }
    if (child < 0) {
      std::perror("fork");
      return false;
    }
    int status = 0;
    bool hangs = false;
    int64_t beats = progress.beats;
    auto last_beat = Clock::now();
    while (waitpid(child, &status, WNOHANG) == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (beats != progress.beats) {
        beats = progress.beats;
        last_beat = Clock::now();
      }
      if (seconds_since(last_beat) > (progress.plan < 0 ? start_seconds : plan_seconds)) {
        hangs = true;
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        break;
      }
    }
    if (!hangs && WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
    if (progress.plan < 0) {
      std::fprintf(stderr, "%s before the first plan\n", hangs ? "hung" : "failed");
      return false;
    }
    ++(hangs ? progress.hung : progress.failed);
    report(progress, hangs ? "hang" : "failure");
    begin = progress.plan + 1;
  }
}

// Returns memory for progress that a child shares.
inline Progress& shared_progress() {
  void* memory = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(1);
  }
  return *new (memory) Progress;
}

}  // namespace fastbn::bench
