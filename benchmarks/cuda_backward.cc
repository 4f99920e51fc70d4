// Times training's share of the CUDA backend by stages, without Python in between: select, attend,
// backward (all gradients, those of the scores included where there are gates), and all three
// together. Flags and protocols: see cuda_timing.hpp. "tflops" counts the work that is visible, per
// query head and visible (query, key) pair: 4 D forward, 10 D backward (five products).
#include "cuda_timing.hpp"

namespace {

using namespace sparsek_bench;

void run(Configuration const& c, std::string const& gpu, cudaStream_t stream) {
  JsonLine line;
  describe(c, gpu, line);
  if (!describe_kernel(c, sparsek::attend_backward_capability, line)) return line.print();
  Forward forward(c, stream);
  sparsek::ConstTensorView<4> const q = forward.q, k = forward.k;
  DeviceMemory const dout(forward.data.q.bytes()), dq(forward.data.q.bytes());
  DeviceMemory const dk(forward.data.k.bytes()), dv(forward.data.k.bytes());
  DeviceMemory const dscores(forward.data.scores.bytes());
  fill_normal(dout, c.data_type(), 5);
  std::size_t const bytes =
      forward.workspace_bytes() + sparsek::kWorkspaceAlignment +
      sparsek::attend_backward_workspace_bytes(forward.context, c.data_type(), forward.q_shape,
                                               forward.k_shape, forward.options);
  line.add("workspace_mib", static_cast<double>(bytes) / (1 << 20));
  LentBuffer workspace(bytes);
  forward.context.allocator = &workspace;

  std::optional<sparsek::TensorView<3>> dscores_view;
  if (forward.options.gate != Gate::kNone) {
    dscores_view = sparsek::TensorView<3>(dscores.data(), DataType::kFloat32, forward.score_shape);
  }
  auto const backward = [&] {
    sparsek::attend_backward(forward.context, q, k, forward.v, forward.scores, forward.selection,
                             forward.lengths, forward.options, forward.out, forward.lse,
                             {dout.data(), q.dtype, q.shape}, {dq.data(), q.dtype, q.shape},
                             {dk.data(), q.dtype, k.shape}, {dv.data(), q.dtype, k.shape},
                             dscores_view);
  };
  forward.select();
  forward.attend();
  double const visible = forward.visible(c);
  double const unit = static_cast<double>(c.dim) * visible;
  line.add("visible_keys_per_query",
           visible / static_cast<double>(c.batch * c.heads * c.num_queries()));
  time_stages({{"select", 0, [&] { forward.select(); }},
               {"attend", 4 * unit, [&] { forward.attend(); }},
               {"backward", 10 * unit, backward},
               {"step", 14 * unit, [&] { forward.select(), forward.attend(), backward(); }}},
              c, stream, line);
  line.print();
}

}  // namespace

int main(int argc, char** argv) {
  return bench_main("sparsek_cuda_backward_bench", argc, argv, run);
}
