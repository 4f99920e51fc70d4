// Times the CUDA forward by stages (select, attend, both) without Python in between, as inference
// runs it: without the last candidates, which only the backward reads; "select_training" writes
// them. Flags and protocols: see cuda_timing.hpp. "tflops" counts the work that is visible: 4 D per
// query head and visible (query, key) pair.
#include "cuda_timing.hpp"

namespace {

using namespace sparsek_bench;

void run(Configuration const& c, std::string const& gpu, cudaStream_t stream) {
  JsonLine line;
  describe(c, gpu, line);
  if (!describe_kernel(c, sparsek::attend_capability, line)) return line.print();
  Forward forward(c, stream);
  std::size_t const bytes = forward.workspace_bytes();
  line.add("workspace_mib", static_cast<double>(bytes) / (1 << 20));
  LentBuffer workspace(bytes);
  forward.context.allocator = &workspace;

  auto const last_candidate = std::exchange(forward.selection.last_candidate, std::nullopt);
  auto const select_training = [&] {
    sparsek::SelectionView selection = forward.selection;
    selection.last_candidate = last_candidate;
    sparsek::select(forward.context, forward.scores, forward.lengths, forward.options.selection,
                    selection);
  };
  forward.select();
  double const visible = forward.visible(c);
  double const flop = 4.0 * static_cast<double>(c.dim) * visible;
  line.add("visible_keys_per_query",
           visible / static_cast<double>(c.batch * c.heads * c.num_queries()));
  time_stages({{"select", 0, [&] { forward.select(); }},
               {"select_training", 0, select_training},
               {"attend", flop, [&] { forward.attend(); }},
               {"both", flop, [&] { forward.select(), forward.attend(); }}},
              c, stream, line);
  line.print();
}

}  // namespace

int main(int argc, char** argv) { return bench_main("sparsek_cuda_bench", argc, argv, run); }
