// The CUDA forward (select, attend) against the fp64 reference: every row of the case table and of
// cuda_check_rows.cc, in float16 and bfloat16. Options: see cuda_check_driver.hpp.
#include "cuda_check_driver.hpp"

int main(int argc, char** argv) {
  using namespace sparsek::testing;
  return check_main<RowOnGpu>("sparsek_cuda_check", all_rows(), argc, argv);
}
