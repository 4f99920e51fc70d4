// Views, contexts, allocators, errors and questions about capability.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "sparsek/sparsek.hpp"

namespace sparsek {
namespace {

TEST(DataType, SizesAndNames) {
  EXPECT_EQ(size_of(DataType::kFloat16), 2U);
  EXPECT_EQ(size_of(DataType::kBFloat16), 2U);
  EXPECT_EQ(size_of(DataType::kFloat32), 4U);
  EXPECT_EQ(size_of(DataType::kInt32), 4U);
  EXPECT_EQ(size_of(DataType::kFloat64), 8U);
  EXPECT_STREQ(name_of(DataType::kBFloat16), "bfloat16");
  EXPECT_STREQ(name_of(DataType::kInt32), "int32");
}

TEST(TensorView, IsContiguousUnlessTold) {
  float x = 0.0F;
  TensorView<3> const t(&x, DataType::kFloat32, {2, 3, 5});
  EXPECT_EQ(t.stride, (std::array<std::int64_t, 3>{15, 5, 1}));
  ConstTensorView<3> const c = t;
  EXPECT_EQ(c.data, &x);
  EXPECT_EQ(c.shape, t.shape);
  ConstTensorView<2> const strided(&x, DataType::kFloat32, {2, 3}, {1, 2});
  EXPECT_EQ(strided.stride, (std::array<std::int64_t, 2>{1, 2}));
}

TEST(BufferAllocator, HandsOutAlignedPieces) {
  alignas(kWorkspaceAlignment) static std::byte buffer[4 * kWorkspaceAlignment];
  BufferAllocator allocator(buffer, sizeof(buffer));
  EXPECT_EQ(allocator.allocate(1), buffer);
  EXPECT_EQ(allocator.allocate(kWorkspaceAlignment + 1), buffer + kWorkspaceAlignment);
  EXPECT_EQ(allocator.allocate(kWorkspaceAlignment), buffer + 3 * kWorkspaceAlignment);
  allocator.deallocate(buffer);
}

TEST(BufferAllocator, ThrowsWhenTheBufferIsTooSmall) {
  alignas(kWorkspaceAlignment) static std::byte buffer[2 * kWorkspaceAlignment];
  BufferAllocator allocator(buffer, sizeof(buffer));
  allocator.allocate(10);
  try {
    allocator.allocate(kWorkspaceAlignment + 1);
    FAIL() << "expected an InvalidArgument";
  } catch (InvalidArgument const& e) {
    EXPECT_STREQ(e.what(), "workspace: expected at least 768 bytes, got 512");
  }
}

TEST(Error, KindsShareABase) {
  EXPECT_THROW(throw InvalidArgument("x"), Error);
  EXPECT_THROW(throw Unsupported("x"), Error);
  EXPECT_THROW(throw DeviceError("x"), std::runtime_error);
}

TEST(Device, Compares) {
  EXPECT_EQ((Device{DeviceType::kCuda, 1}), (Device{DeviceType::kCuda, 1}));
  EXPECT_NE((Device{DeviceType::kCuda, 1}), (Device{DeviceType::kCuda, 0}));
}

TEST(Capability, NamesTheCpuKernel) {
  Capability const c =
      attend_capability(Context{}, DataType::kFloat32, {1, 8, 16, 64}, {1, 2, 32, 64}, {});
  EXPECT_TRUE(c.supported) << c.reason;
  EXPECT_EQ(c.kernel, "cpu/" + cpu_isa());
}

TEST(Capability, SaysWhatIsMissing) {
  Capability const c =
      attend_capability(Context{}, DataType::kFloat64, {1, 8, 16, 64}, {1, 2, 32, 64}, {});
  EXPECT_FALSE(c.supported);
  EXPECT_NE(c.reason.find("float64"), std::string::npos) << c.reason;
}

TEST(Workspace, TheCpuTakesNoneFromTheAllocator) {
  EXPECT_EQ(select_workspace_bytes(Context{}, 2, 4, 1000, {}), 0U);
  EXPECT_EQ(
      attend_workspace_bytes(Context{}, DataType::kFloat32, {1, 8, 16, 64}, {1, 2, 32, 64}, {}),
      0U);
}

}  // namespace
}  // namespace sparsek
